"""What is refused, when, and in whose words: every case here once crashed, was silent, or took minutes to say no."""

import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as distributed
from models import decode_logits, odd_model, prefilled, random_tokens, tiny_model
from recorder import Recorder
from texts import TEXT, Words
from tiers import sampled

import tidal_compile as tc
from tidal_compile.kernels.call import Call, Selection, arguments
from tidal_compile.models import load_model, with_cache

pytestmark = pytest.mark.uncompiled

SMALL = {"budget": 12, "sinks": 2, "recent": 3}


def step_of(model, fullgraph=True, **options):
    return torch.compile(model, backend="tidal", fullgraph=fullgraph, options=options)


def test_an_error_of_ours_ends_with_our_words():
    for options, kind in (({"policy": "tidal", "budget": 0}, tc.PolicyError), ({"polizy": "tidal"}, tc.TidalError)):
        with pytest.raises(kind) as caught:
            step_of(tiny_model(num_hidden_layers=1), **options)(input_ids=random_tokens(1, 8))
        assert "bug" not in str(caught.value) and str(caught.value) == caught.value.message
        assert type(caught.value).__name__ == kind.__name__ and type(caught.value).__module__ == kind.__module__
        torch._dynamo.reset()


@pytest.fixture
def three_graphs():
    """Dynamo keeps three graphs of a function, where its default is eight."""
    with torch._dynamo.config.patch(recompile_limit=3):
        yield


@pytest.mark.parametrize("fullgraph", sampled([True, False], [False]))
def test_more_policies_on_one_model_than_dynamo_keeps_graphs(fullgraph, three_graphs):
    """The fourth policy failed, or ran densely without a word."""
    model, prompt, token = tiny_model(num_hidden_layers=2), random_tokens(1, 40), random_tokens(1, 1, seed=2)
    policy = {"num_layers": 2, "layers": {"0": "select", "1": "reuse"}}
    settings = {"policy": policy, "cuda_graphs": False, "sinks": 2, "recent": 3}
    logits = []
    for budget in range(6, 10):
        step = step_of(model, fullgraph, budget=budget, **settings)
        logits.append(decode_logits(step, prefilled(model, prompt, 48), token))
    for budget, found in ((6, logits[0]), (9, logits[-1])):
        torch._dynamo.reset()
        recorder = Recorder(budget=budget, **settings)
        alone = torch.compile(model, backend=recorder, fullgraph=True)
        expected = decode_logits(alone, prefilled(model, prompt, 48), token)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len({row.sum().item() for row in logits}) == 4
    assert torch._dynamo.config.recompile_limit <= 5  # one ahead of what was compiled


def test_one_policy_that_recompiles_for_ever_is_an_error(three_graphs):
    model, step = tiny_model(num_hidden_layers=1), None
    step = torch.compile(model, backend="tidal", dynamic=False, options={"policy": "full", "cuda_graphs": False})
    with pytest.raises(tc.TidalError, match="compiled 3 times under the same policy"):
        for slots in range(40, 44):
            decode_logits(step, prefilled(model, random_tokens(1, 30), slots), random_tokens(1, 1))


def test_not_strict_where_a_call_matches_and_none_is_rewritten():
    """Olmo 3 with three sliding layers and a full one, which reuses what a sliding one can't select."""
    settings = {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    model = tiny_model("olmo3", num_hidden_layers=4, **settings)
    policy = tc.Policy.preset("tidal", 4, **SMALL)
    prompt, tokens = random_tokens(1, 40), random_tokens(1, 3, seed=2)
    with pytest.warns(UserWarning, match="left exact"):
        step = torch.compile(model, backend=Recorder(policy=policy, strict=False), fullgraph=True)
        got = decode_logits(step, prefilled(model, prompt, 48), tokens)
    torch.testing.assert_close(got, decode_logits(model, prefilled(model, prompt, 48), tokens), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(tc.UnsupportedModelError, match="layer 3 .reuse.: its selection, layer 2, is left alone"):
        step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy})
        decode_logits(step, prefilled(model, prompt, 48), tokens)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_attention_weights_are_refused(form):
    model = tiny_model(num_hidden_layers=3, attn_implementation=form)
    config = tc.compile_config("tidal", **SMALL)
    with pytest.raises(tc.UnsupportedModelError, match="output_attentions=True") as caught:
        model.generate(
            random_tokens(1, 40), max_new_tokens=4, do_sample=False, cache_implementation="static", compile_config=config,
            output_attentions=True, return_dict_in_generate=True,
        )  # fmt: skip
    assert "logging" not in str(caught.value)


@pytest.mark.parametrize("hides", [-1e4, -1e9, "lowest", -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_value_a_mask_hides_with(hides, dtype):
    """Hidden tokens are no sinks, no recent ones, and count for no ratio: the sets are those of a bool mask."""
    q, k, v = (torch.randn(1, heads, tokens, 16, dtype=dtype) for heads, tokens in ((4, 1), (2, 64), (2, 64)))
    seen = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    seen[..., :10], seen[..., 50:] = False, False
    hides = torch.finfo(dtype).min if hides == "lowest" else hides
    added = torch.zeros(1, 1, 1, 64, dtype=dtype).masked_fill(~seen, hides)
    selection = arguments(Selection(8, 0.25, 3, 4, "kv_head"))
    calls = [arguments(Call(q, k, v, torch.tensor(64), mask, 0.25)) for mask in (seen, added)]
    (out, index), (other, same) = (torch.ops.tidal.select_attention(*call, *selection) for call in calls)
    assert torch.equal(index, same) and (index >= 0).sum() == 2 * 10 and index[0, 0, :3].tolist() == [10, 11, 12]
    torch.testing.assert_close(out, other, atol=1e-2, rtol=1e-2)


def test_a_head_map_of_the_wrong_length_is_refused():
    layers = {"0": "full", "1": "select", "2": {"role": "reuse", "heads": [0, 1, 2]}}
    policy = {"num_layers": 3, "layers": layers, "defaults": SMALL}
    explanation = tc.explain(tiny_model(num_hidden_layers=3), policy)
    assert "heads [0, 1, 2] must name, for each of its 2 kv heads, one from 0 to 1" in explanation.problems[0]
    layers["2"]["heads"] = [0, 1]  # each its own: as if there were no map
    explanation = tc.explain(tiny_model(num_hidden_layers=3), policy)
    assert not explanation.problems and explanation.rows[2].heads is None


def test_what_ranks_cannot_choose_together_is_refused(one_of_two_ranks):
    model = tiny_model(num_hidden_layers=3)  # the half of one with 4 kv heads
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj

        def rowwise(x, forward=projection.forward):  # as transformers' tensor parallelism ends an attention block
            out = forward(x)
            distributed.all_reduce(out)
            return out

        projection.forward = rowwise
    for keep, problem in ((0.0, ""), (2.0, "by: pages, page 16, keep 2.0, but its heads are divided among ranks")):
        select = {"role": "select", "by": "pages", "share": "layer", "keep": keep}
        by_pages = {"0": "full", "1": select, "2": "reuse"}
        problems = tc.explain(model, {"num_layers": 3, "layers": by_pages, "defaults": SMALL}).problems
        assert problem in problems[0] if problem else not problems
    for share in ("kv_head", "layer"):
        assert not tc.explain(model, "tidal", share=share, **SMALL).problems
    for heads, problem in (([0, 1], "for each of its 4 kv heads"), ([3, 2, 1, 0], ""), ([1, 0, 3, 2], "")):
        layers = {"0": "full", "1": "select", "2": {"role": "reuse", "heads": heads}}
        problems = tc.explain(model, {"num_layers": 3, "layers": layers, "defaults": SMALL}).problems
        assert problem in problems[0] if problem else not problems
    for layer in model.model.layers:  # each rank has all heads, and a part of this product only, as in Phi 3
        projection = layer.self_attn.o_proj
        del projection.forward

        def split(x, weight=projection.weight):
            half = x.shape[-1] // 2
            out = torch.nn.functional.linear(x[..., :half], weight[:, :half])
            distributed.all_reduce(out)
            return out

        projection.forward = split
    layers = {"0": "full", "1": "select", "2": {"role": "reuse", "heads": [1, 0]}}
    for given in (layers, by_pages):
        assert not tc.explain(model, {"num_layers": 3, "layers": given, "defaults": SMALL}).problems


def test_settings_that_no_calibration_can_follow_are_refused_at_once():
    for settings, message in (
        ({"budget": 700}, "budget 700; valid are 1 to 699"),
        ({"budget": [16, 4000], "max_kl": 0.1}, "budget 4000; valid"),
        ({"budget": 16, "max_kl": -1.0}, "max_kl -1.0"),
        ({"budget": 16, "min_agreement": 2.0}, "min_agreement 2.0; valid are 0 to 1"),
        ({"budget": 16, "tries": 0}, "tries 0"),
    ):
        with pytest.raises(tc.TidalError, match=message):
            tc.calibrate(None, None, TEXT, context=700, **settings)
    with pytest.raises(tc.PolicyError, match="budget is a number of tokens >= 1"):
        tc.compile_config("tidal", budget=0)
    with pytest.raises(tc.PolicyError, match="smaller than sinks"):
        tc.compile_config({"num_layers": 1, "layers": {"0": "select"}}, budget=5)


def test_a_name_is_no_model():
    for call in (lambda: tc.explain("smollm2", "tidal"), lambda: tc.evaluate("smollm2", Words(), ["tidal"], text=TEXT)):
        with pytest.raises(tc.TidalError, match="a loaded Hugging Face decoder is needed, found str 'smollm2'"):
            call()


def test_an_unknown_model_is_answered_at_once_when_offline(monkeypatch):
    from huggingface_hub import HfApi

    def away(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", away)
    for name in ("somebody/no-such-model", "no-such-model", "./no/such/folder"):
        begin = time.perf_counter()
        with pytest.raises(tc.TidalError, match="no such folder"):
            load_model(name)
        assert time.perf_counter() - begin < 5  # transformers tries for 23 s


@pytest.mark.parametrize("name", ["opt", "qwen2_vl", "qwen3_vl"])
def test_what_generate_runs_is_explained_and_loaded(name, tmp_path):
    if name == "opt":
        model = odd_model("opt", num_hidden_layers=3)
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        text = {**tiny_model(num_hidden_layers=3).config.to_dict(), "rope_parameters": rope, "head_dim": 16}
        text = {key: value for key, value in text.items() if key not in ("model_type", "architectures")}
        vision = {
            "depth": 1, "embed_dim": 32, "hidden_size": 64 if name == "qwen2_vl" else 32, "num_heads": 2,
            "intermediate_size": 32, "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        }  # fmt: skip
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.for_model(name, text_config=text, vision_config=vision, image_token_id=120,
                                      video_token_id=121, vision_start_token_id=122, vision_end_token_id=123)  # fmt: skip
        AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
        model = load_model(str(tmp_path))
    explanation = tc.explain(model, "tidal", **SMALL)
    assert [row.role for row in explanation.rows] == ["full", "full", "select"] and not explanation.problems


def test_the_cache_goes_by_the_name_that_the_model_has():
    import warnings

    model = tiny_model(num_hidden_layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model(input_ids=random_tokens(1, 4), **with_cache(model, prefilled(model, random_tokens(1, 8), 16)))


def test_an_interrupt_while_importing_ends_with_one_line():
    command = [
        sys.executable,
        "-c",
        "import tidal_compile.__main__ as m; import sys; sys.argv=['x','explain','--model','random:llama']; m.main()",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    time.sleep(1.5)  # torch takes longer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().splitlines()[-1] == "interrupted" and "Traceback" not in err

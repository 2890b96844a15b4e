"""What users do with a model: generate() in its variants, batches, caches in use again, other kinds of model."""

import copy

import pytest
import torch
from models import decode_logits, prefilled, random_tokens, small_model, tiny_model
from recorder import Recorder
from tiers import sampled
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, TextStreamer

import tidal_compile as tc

STATIC = {"cache_implementation": "static", "max_new_tokens": 12}
GREEDY = {**STATIC, "do_sample": False}
# Leaves out nothing of up to 68 tokens
WIDE = {"num_layers": 2, "layers": {"0": "select", "1": "reuse"}, "defaults": {"budget": 68}}


pytestmark = pytest.mark.uncompiled


@pytest.fixture(scope="module")
def model():
    return small_model()


def generate(model, ids, policy=None, seed=0, **options):
    """generate() with a policy, or uncompiled."""
    torch.manual_seed(seed)
    config = {} if policy is None else {"compile_config": tc.compile_config(policy)}
    return model.generate(ids, **config, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "sampling", "several-sequences", "processors"],
)
def test_generate_is_what_it_was(model, options):
    ids = random_tokens(3, 20)
    counters.clear()
    got = generate(model, ids, "full", **STATIC, **options)
    assert counters["stats"]["unique_graphs"] == 1  # it was compiled
    assert torch.equal(got, generate(model, ids, **STATIC, **options))


@pytest.mark.compiled
def test_rows_that_end_at_different_steps():
    ids = random_tokens(2, 20)
    model = small_model(num_hidden_layers=1, eos_token_id=None)
    free = generate(model, ids, **GREEDY)[:, 20:]
    stop = free[0, 3].item()
    ends = [row.tolist().index(stop) if stop in row else 12 for row in free]
    assert len(set(ends)) > 1
    options = {**GREEDY, "eos_token_id": stop}
    assert torch.equal(generate(model, ids, "full", **options), generate(model, ids, **options))


def test_streaming(model):
    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(64 + int(i)) for i in ids)

    class Kept(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    streams = [Kept(Letters()), Kept(Letters())]
    for stream, policy in zip(streams, (None, "full"), strict=True):
        generate(model, random_tokens(1, 20), policy, streamer=stream, **GREEDY)
    assert streams[0].text == streams[1].text != ""


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}], ids=["beams", "sampled-beams"])
def test_beam_search(options):
    """Through a compiled forward, as generate() itself compiles no beam search: the cache is reordered between steps."""
    model, ids = small_model(), random_tokens(2, 20)
    options = {**STATIC, "num_beams": 3, **options}
    eager = generate(model, ids, **options)
    assert torch.equal(generate(model, ids, "full", **options), eager)
    model.forward = torch.compile(model.forward, backend="tidal", fullgraph=True, options={"policy": WIDE})
    counters.clear()
    assert torch.equal(generate(model, ids, **options), eager)
    assert 2 <= counters["stats"]["unique_graphs"] <= 3  # prefill, and decode


@pytest.mark.parametrize("helper", ["assistant", "prompt-lookup"])
def test_several_tokens_at_once(helper):
    """Assisted decoding checks several tokens in one step: exact, with compile_config or a compiled forward."""
    model, ids = small_model(), random_tokens(1, 20)
    options = {"max_new_tokens": 12, "do_sample": False}
    options |= (
        {"assistant_model": small_model(num_hidden_layers=1)}
        if helper == "assistant"
        else {"prompt_lookup_num_tokens": 3}
    )
    eager = generate(model, ids, **options)
    assert torch.equal(generate(model, ids, WIDE, **options), eager)


def test_a_compiled_step_of_several_tokens_is_exact(model):
    step = torch.compile(model, backend="tidal", options={"policy": WIDE})
    prompt, tokens = random_tokens(2, 30), random_tokens(2, 5, seed=2)
    caches = [prefilled(model, prompt, 64), prefilled(model, prompt, 64)]
    with torch.no_grad():
        got, eager = (
            one(input_ids=tokens, past_key_values=cache).logits
            for one, cache in zip((step, model), caches, strict=True)
        )
    torch.testing.assert_close(got, eager, atol=1e-4, rtol=1e-4)


def test_two_models_and_two_policies():
    """In one process, in turn: each answers as it would alone."""
    models, ids = [small_model(), small_model(seed=3, model_type="qwen2")], random_tokens(2, 60)
    wide, narrow = (
        {**WIDE, "defaults": defaults} for defaults in ({"budget": 100}, {"budget": 10, "sinks": 1, "recent": 2})
    )
    eager = [generate(model, ids, **GREEDY) for model in models]
    tight = generate(models[0], ids, narrow, **GREEDY)
    assert not torch.equal(tight, eager[0])
    for model, expected in zip(models, eager, strict=True):
        for policy in ("full", wide):
            assert torch.equal(generate(model, ids, policy, **GREEDY), expected)
    assert torch.equal(generate(models[0], ids, narrow, **GREEDY), tight)


def test_other_caches_are_exact_or_named(model):
    ids = random_tokens(2, 20)
    eager = generate(model, ids, max_new_tokens=12, do_sample=False)
    dynamic = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, "full", past_key_values=dynamic, max_new_tokens=12, do_sample=False), eager)

    forward = copy.copy(model)
    forward.forward = torch.compile(model.forward, backend="tidal", options={"policy": "full"})
    with pytest.raises(tc.UnsupportedModelError, match="not read from a static cache.*cache_implementation='static'"):
        generate(forward, ids, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("batch", sampled([1, 7, 32], [1, 32]))
def test_padded_rows_are_what_each_gives_alone(batch):
    """Rows of different lengths, left-padded, under a policy with every role, against each row in a batch of its own."""
    model = tiny_model(num_hidden_layers=5)
    policy = tc.Policy.from_dict({
        "num_layers": 5, "defaults": {"budget": 16, "sinks": 2, "recent": 3},
        "layers": {"0": "full", "1": "select", "2": "reuse", "3": {"role": "select", "share": "layer"}, "4": "reuse"},
    })  # fmt: skip
    recorder, longest, slots = Recorder(policy=policy), 50, 64
    step = torch.compile(model, backend=recorder, fullgraph=True)
    prompts, tokens = random_tokens(batch, longest), random_tokens(batch, 4, seed=2)
    mask = torch.ones(batch, longest, dtype=torch.long)
    for row in range(batch):
        mask[row, : row * 3 % 47] = 0
    wide = torch.cat([mask, torch.ones(batch, slots - longest, dtype=torch.long)], 1).bool()
    masks = [(wide & (torch.arange(slots) < longest + i + 1))[:, None, None] for i in range(4)]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = StaticCache(config=model.config, max_cache_len=slots)
    with torch.no_grad():
        model(input_ids=prompts, attention_mask=mask, position_ids=positions, past_key_values=cache)
        together = []
        for i in range(4):
            at = positions[:, -1:] + i + 1
            out = step(
                input_ids=tokens[:, i : i + 1].contiguous(),
                attention_mask=masks[i],
                position_ids=at,
                past_key_values=cache,
            )
            together.append(out.logits[:, -1].clone())
    together = torch.stack(together, 1)
    alone = torch.compile(model, backend=Recorder(policy=policy), fullgraph=True, dynamic=False)
    for row in range(batch):
        start = row * 3 % 47
        cache = prefilled(model, prompts[row : row + 1, start:], slots)
        got = decode_logits(alone, cache, tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], got, atol=2e-4, rtol=2e-4)


def test_one_cache_for_prompts_of_any_length(model):
    """Reset and filled again, shorter and longer, to its last slot; and from nothing: the first token has length 1."""
    step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": WIDE})
    cache = prefilled(model, random_tokens(1, 30), 64)
    for prompt, steps in ((30, 5), (10, 3), (55, 9), (0, 4)):
        cache.reset()
        tokens = random_tokens(1, steps, seed=prompt)
        fresh = StaticCache(config=model.config, max_cache_len=64)
        fresh.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
        if prompt:
            with torch.no_grad():
                for one in (cache, fresh):
                    model(input_ids=random_tokens(1, prompt), past_key_values=one)
        torch.testing.assert_close(
            decode_logits(step, cache, tokens), decode_logits(model, fresh, tokens), atol=1e-4, rtol=1e-4
        )


def test_chat_turns_extend_a_cache(model):
    """Turn by turn, with generate() over one static cache, against the whole conversation at once."""
    cache, ids = StaticCache(config=model.config, max_cache_len=128), random_tokens(1, 20)
    config = tc.compile_config("full")
    for turn in range(3):
        extended = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, compile_config=config)
        assert torch.equal(extended, generate(model, ids, max_new_tokens=6, do_sample=False))
        ids = torch.cat([extended, random_tokens(1, 9, seed=turn)], 1)


def test_a_cache_beyond_two_to_the_fifteenth():
    model, slots, live = small_model(), 40_000, 33_500
    caches = []
    for _ in range(3):
        cache = prefilled(model, random_tokens(1, 4), slots)
        for layer in cache.layers:
            generator = torch.Generator().manual_seed(layer.keys.shape[1])
            layer.keys[:, :, :live].normal_(generator=generator)
            layer.values[:, :, :live].normal_(generator=generator)
            layer.cumulative_length.fill_(live)
        caches.append(cache)
    tokens = random_tokens(1, 2)
    eager = decode_logits(model, caches[0], tokens)
    for policy, cache in zip(("full", {**WIDE, "defaults": {"budget": 40_000}}), caches[1:], strict=True):
        got = decode_logits(torch.compile(model, backend=Recorder(policy=policy)), cache, tokens)
        torch.testing.assert_close(got, eager, atol=1e-4, rtol=1e-4)
        torch._dynamo.reset()


MODES = [(mode, dtype) for mode in ("no_grad", "inference_mode") for dtype in ("float16", "bfloat16", "float32")]


@pytest.mark.parametrize(("mode", "dtype"), sampled(MODES, [*MODES[:3], ("inference_mode", "bfloat16")]))
def test_dtypes_and_inference_mode(mode, dtype):
    """As close to float32 as eager is."""
    mode, dtype = getattr(torch, mode), getattr(torch, dtype)
    exact = tiny_model(num_hidden_layers=2)
    model = copy.deepcopy(exact).to(dtype)
    step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": "full"})
    prompt, tokens = random_tokens(2, 30), random_tokens(2, 4, seed=2)
    with mode():
        truth = decode_logits.__wrapped__(exact, prefilled.__wrapped__(exact, prompt, 64), tokens)
        got, eager = (
            decode_logits.__wrapped__(one, prefilled.__wrapped__(model, prompt, 64), tokens) for one in (step, model)
        )
    assert got.dtype == dtype
    assert (got.float() - truth).abs().max() <= 2 * (eager.float() - truth).abs().max() + 1e-5


def test_device_map_auto(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    ids = random_tokens(2, 20).to(loaded.device)
    got = generate(loaded, ids, "full", **GREEDY)
    assert torch.equal(got, generate(loaded, ids, **GREEDY))
    assert torch.equal(got.cpu(), generate(model, ids.cpu(), **GREEDY))


def test_lora_adapters():
    peft = pytest.importorskip("peft")
    base, ids = small_model(), random_tokens(2, 20)
    before = generate(base, ids, **GREEDY)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    eager = generate(model, ids, **GREEDY)
    assert not torch.equal(eager, before)
    for policy in ("full", WIDE):
        counters.clear()
        assert torch.equal(generate(model, ids, policy, **GREEDY), eager)
        assert counters["stats"]["unique_graphs"] == 1
        torch._dynamo.reset()


@pytest.mark.compiled
def test_int8_weights():
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = small_model(num_hidden_layers=1), random_tokens(2, 20)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    counters.clear()
    got = generate(model, ids, {**WIDE, "num_layers": 1, "layers": {"0": "select"}}, **GREEDY)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got, generate(model, ids, **GREEDY))

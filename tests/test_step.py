"""What is evaluated is what is deployed: the uncompiled step, chunks of a prefill, and what a replay may be used for."""

import pytest
import torch
from models import ODD, decode_logits, odd_model, prefilled, random_tokens, sparse_for, tiny_model
from recorder import Recorder
from texts import SETTINGS, TEXT, Words
from tiers import sampled

import tidal_compile as tc
from tidal_compile.evaluate import quality
from tidal_compile.evaluate.decode import answer, prepare
from tidal_compile.models import continues, with_cache
from tidal_compile.replay import cannot_replay
from tidal_compile.run import filled, prefill
from tidal_compile.step import PolicyStep

CONTINUE = {name: name not in ("jamba", "bamba", "zamba") for name in ODD}
# Modules that run in cycles, or that several layers share, don't have the numbers of the cache's layers
REPLAYS = {name: CONTINUE[name] and name not in ("zamba2", "hrm_text") for name in ODD}


def rewritten(model, policy):
    """The step whose decode graph is rewritten as the backend does."""
    return torch.compile(model, backend=Recorder(policy=policy), fullgraph=True)


def deployed(model, step, prompt, tokens):
    """The logits `[1, T, vocab]` of such a step, after a prefill in one piece."""
    return decode_logits(step, prefilled(model, prompt, 128), tokens)


@pytest.mark.parametrize(
    "name",
    sampled(["falcon_h1", "gemma3n_text", "jamba", "zamba2", "hrm_text"], ["falcon_h1", "gemma3n_text", "jamba"]),
)
def test_the_evaluated_step_is_the_deployed_one(name):
    model = odd_model(name, **({"num_hidden_layers": 2} if name == "falcon_h1" else {}))
    policy, calls = sparse_for(model)
    assert any(role.role == "reuse" for role in policy.roles)
    prompt, tokens = random_tokens(1, 40), random_tokens(1, 5, seed=2)
    step = rewritten(model, policy)
    expected = deployed(model, step, prompt, tokens)
    dense = decode_logits(model, prefilled(model, prompt, 128), tokens)
    assert (expected - dense).abs().max() > 1e-3  # the budget is felt

    assert bool(cannot_replay(model, calls)) != REPLAYS[name]
    decoder = quality.Decoder(PolicyStep(model), REPLAYS[name])
    trial = quality.text_trial(model, [*prompt[0].tolist(), *tokens[0].tolist(), 7], 40, decoder, compiled=False)
    for asked, wanted in ((policy, expected), (tc.Policy.preset("full", policy.num_layers), dense), (policy, expected)):
        got = torch.cat(list(trial.logits(asked)))
        torch.testing.assert_close(got, wanted[0], atol=5e-4, rtol=5e-4)

    prompts = prepare(model, prompt.tolist(), [tokens[0, :1].tolist()], 4)
    (found,) = answer(model, decoder.step, prompts, policy.roles, True, [])
    likely = deployed(model, step, prompt, torch.tensor([[tokens[0, 0], *found[:-1]]])).argmax(-1)
    assert found == likely[0].tolist()


@pytest.mark.parametrize("name", ODD)
def test_a_prefill_in_chunks_is_the_prefill(name):
    """In one part where the model can't go on with several tokens: all that it holds then is right."""
    model = odd_model(name)
    assert continues(model) == CONTINUE[name]
    ids = random_tokens(1, 40)
    parts = list(prefill(model, ids, 48, chunk=16))
    assert len(parts) == (3 if CONTINUE[name] else 1)
    token = random_tokens(1, 1, seed=3)
    expected = model(input_ids=token, **with_cache(model, prefilled(model, ids, 48))).logits
    got = model(input_ids=token, **with_cache(model, parts[-1])).logits
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_continues_shows_whatever_the_weights(scale, dtype):
    for name in ("jamba", "bamba", "falcon_h1", "lfm2"):
        assert continues(odd_model(name, initializer_range=scale, dtype=dtype)) == CONTINUE[name], name


def test_recurrent_models_are_evaluated_without_padding():
    model = odd_model("falcon_h1", num_hidden_layers=2)
    contexts = [random_tokens(1, length, seed=length)[0].tolist() for length in (20, 24)]
    with pytest.raises(ValueError, match="recurrent layers see padding"):
        prepare(model, contexts, [[5], [6]], 4)
    records = tc.evaluate(model, Words(), [sparse_for(model)[0]], tasks=("needle", "text"), **SETTINGS)
    assert {record["subject"] for record in records} == {"dense", "unnamed @12"}
    assert any(record["kl"] > 1e-4 for record in records if "kl" in record and record["subject"] != "dense")


def test_what_cannot_be_replayed_is_not_calibrated():
    for name, reason in (("jamba", "go on with several tokens"), ("zamba2", "numbered"), ("hrm_text", "numbered")):
        with pytest.raises(tc.UnsupportedModelError, match=reason):
            tc.calibrate(odd_model(name), Words(), TEXT, budget=16, selections=1, sinks=1, recent=2)


def test_layers_of_modules_in_cycles_have_roles_of_their_own():
    """HRM runs two stacks of two layers in cycles: eight cache layers, of which a policy names each."""
    model = odd_model("hrm_text")
    explanation = tc.explain(model, "tidal", budget=12, sinks=2, recent=3)
    assert [row.layer for row in explanation.rows] == list(range(8))
    assert [row.role for row in explanation.rows] == [*["full"] * 2, "select", "select", *["reuse"] * 4]
    prompt, tokens = random_tokens(1, 40), random_tokens(1, 4, seed=2)
    full = deployed(model, rewritten(model, tc.Policy.preset("full", 8)), prompt, tokens)
    torch.testing.assert_close(full, decode_logits(model, prefilled(model, prompt, 128), tokens), atol=1e-3, rtol=1e-3)
    layers = {"0": "select", "1-6": "full", "7": "reuse"}
    data = {"num_layers": 8, "layers": layers, "defaults": {"budget": 12, "sinks": 2, "recent": 3}}
    recorder = Recorder(policy=data)
    step = torch.compile(model, backend=recorder, fullgraph=True)
    decode_logits(step, prefilled(model, prompt, 128), tokens)
    assert recorder.after[0]["sparse_attention.default"] == 1 and recorder.after[0]["full_attention.default"] == 6


def test_one_trace_serves_many_policies_and_a_reset():
    model, traces = tiny_model(num_hidden_layers=4), []
    step = PolicyStep(model)
    follow = step._follow
    step._step = torch.compile(
        model.forward, backend=lambda *args: traces.append(1) or follow(*args), fullgraph=True, dynamic=False
    )
    prompt, token = random_tokens(1, 40), random_tokens(1, 1, seed=2)
    logits = []
    for budget in range(8, 20):
        policy = tc.Policy.preset("tidal", 4, budget=budget, sinks=2, recent=3)
        logits.append(step(policy.roles, input_ids=token, **with_cache(model, filled(model, prompt, 64))).logits)
    assert len(traces) == 1 and len({row.sum().item() for row in logits}) == 12
    torch._dynamo.reset()
    torch.testing.assert_close(
        logits[-1], deployed(model, rewritten(model, policy), prompt, token), atol=1e-4, rtol=1e-4
    )
    torch._dynamo.reset()
    again = step(policy.roles, input_ids=token, **with_cache(model, filled(model, prompt, 64))).logits
    assert torch.equal(again, logits[-1]) and len(traces) == 2

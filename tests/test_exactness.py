"""Whole models through Inductor: `full` against eager, sparse policies against the oracle."""

import copy
import functools

import pytest
import torch
from models import decode_logits, prefilled, random_tokens, tiny_model
from oracle import OracleModel, roles_of
from policies import POLICIES, policy_of_six, tidal_step

import tidal_compile as tc
from tidal_compile.step import PolicyStep

pytestmark = pytest.mark.uncompiled
STEPS = 16
PROMPT = 90


def live_cache(cache):
    """What a static cache holds: keys and values of the live tokens of each layer."""
    length = int(cache.layers[0].cumulative_length)
    return [side[:, :, :length] for layer in cache.layers for side in (layer.keys, layer.values)]


def assert_same_but_for_rounding(ours, eager, exact):
    """As close to the float64 result as eager's float32 is, give or take the order of sums; and close to eager."""
    allowed = 4 * (eager.double() - exact).abs().max() + 1e-6
    assert (ours.double() - exact).abs().max() <= allowed
    torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


def test_full_equals_eager_cache_included(tiny):
    prompt, tokens = random_tokens(2, PROMPT), random_tokens(2, STEPS, seed=2)
    double = copy.deepcopy(tiny).double()
    models = [tiny, tidal_step(tiny, "full"), double]
    caches = [prefilled(model, prompt, 128) for model in (tiny, tiny, double)]
    eager, full, exact = (decode_logits(model, cache, tokens) for model, cache in zip(models, caches, strict=True))
    assert_same_but_for_rounding(full, eager, exact)
    for theirs, ours, truth in zip(*map(live_cache, caches), strict=True):
        assert_same_but_for_rounding(ours, theirs, truth)


def test_within_the_budget_tidal_equals_eager():
    model, prompt, tokens = tiny_model(num_hidden_layers=4), random_tokens(2, PROMPT), random_tokens(2, STEPS, seed=2)
    double = copy.deepcopy(model).double()
    eager, exact = (decode_logits(one, prefilled(one, prompt, 128), tokens) for one in (model, double))
    step = tidal_step(model, "tidal", budget=PROMPT + STEPS)
    assert_same_but_for_rounding(decode_logits(step, prefilled(model, prompt, 128), tokens), eager, exact)


def assert_equals_the_oracle(model, policy, step):
    prompt, tokens = random_tokens(2, PROMPT), random_tokens(2, STEPS, seed=2)
    expected = OracleModel(model, roles_of(policy)).logits(prompt, tokens)
    got = decode_logits(step, prefilled(model, prompt, 128), tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    eager = decode_logits(model, prefilled(model, prompt, 128), tokens)
    assert (got - eager).abs().max() > 1e-2, "the policy left nothing out, so this test shows nothing"


@pytest.fixture(scope="module")
def any_policy():
    """A model, and its step under any policy: Dynamo traces it once."""
    model = tiny_model(hidden_size=96, num_attention_heads=6)
    return model, PolicyStep(model)


@pytest.mark.shares_traces
@pytest.mark.parametrize("name", POLICIES)
def test_sparse_policies_equal_the_oracle(name, any_policy):
    policy, (model, step) = policy_of_six(name), any_policy
    assert_equals_the_oracle(model, policy, functools.partial(step, policy.roles))


@pytest.mark.compiled
def test_a_policy_of_many_roles_equals_the_oracle_through_inductor():
    layers = {
        "0": {"role": "select", "share": "layer"}, "1": {"role": "select", "budget": 40, "output": "sparse"},
        "2": {"role": "reuse", "from": 0}, "3": {"role": "reuse", "heads": [1, 0]},
    }  # fmt: skip
    defaults = {"budget": 16, "sinks": 1, "recent": 2}
    policy = tc.Policy.from_dict({"num_layers": 4, "defaults": defaults, "layers": layers})
    model = tiny_model(num_hidden_layers=4)
    assert_equals_the_oracle(model, policy, tidal_step(model, policy))


def test_each_head_layout_equals_the_oracle(tiny):
    policy = tc.Policy.preset("tidal", 4, budget=20, sinks=2, recent=4)
    prompt, tokens = random_tokens(1, PROMPT), random_tokens(1, 6, seed=2)
    expected = OracleModel(tiny, roles_of(policy)).logits(prompt, tokens)
    got = decode_logits(tidal_step(tiny, policy), prefilled(tiny, prompt, 128), tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_left_padded_rows_are_what_each_gives_alone():
    """Through generate, which builds the masks: padded rows equal the same prompts alone, under a sparse policy."""
    model = tiny_model(num_hidden_layers=4)
    config = tc.compile_config("tidal", budget=24, sinks=2, recent=4)
    ids, mask = random_tokens(3, 60), torch.ones(3, 60, dtype=torch.long)
    for row, pad in enumerate((0, 11, 37)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    options = {
        "max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "compile_config": config,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    together = model.generate(ids, attention_mask=mask, **options)
    torch._dynamo.reset()
    for row in range(3):
        pad = int((mask[row] == 0).sum())
        alone = model.generate(ids[row : row + 1, pad:], **options)
        for one, many in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(many[row : row + 1], one, atol=1e-4, rtol=1e-4)


def test_padded_batch_equals_the_oracle():
    policy = tc.Policy.preset("tidal", 4, budget={"ratio": 0.3, "min": 12}, sinks=2, recent=4)
    model, prompt, tokens = tiny_model(num_hidden_layers=4), random_tokens(2, PROMPT), random_tokens(2, 6, seed=2)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :33] = 0
    expected = OracleModel(model, roles_of(policy)).logits(prompt, tokens, mask)
    wide = torch.cat([mask, torch.ones(2, 128 - PROMPT, dtype=torch.long)], 1).bool()
    masks = [(wide & (torch.arange(128) <= PROMPT + i))[:, None, None] for i in range(6)]
    cache = prefilled(model, prompt, 128, mask)
    got = decode_logits(tidal_step(model, policy), cache, tokens, masks)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.compiled
def test_a_reused_cache_full_of_garbage_and_the_last_slot():
    """One cache: decode to its last slot, poison it, reset, prefill a shorter prompt, decode again."""
    policy = tc.Policy.preset("tidal", 4, budget=16, sinks=2, recent=4)
    model = tiny_model(num_hidden_layers=4)
    step = tidal_step(model, policy)
    cache = prefilled(model, random_tokens(2, 122), 128)  # shapes of the test above, whose kernels Inductor has
    decode_logits(step, cache, random_tokens(2, 6, seed=2))  # 128 of 128 slots
    cache.reset()
    prompt, tokens = random_tokens(2, 40, seed=5), random_tokens(2, 3, seed=6)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        layer.keys[:, :, 40:] = float("nan")
        layer.values[:, :, 40:] = float("nan")
    expected = OracleModel(model, roles_of(policy)).logits(prompt, tokens)
    torch.testing.assert_close(decode_logits(step, cache, tokens), expected, atol=1e-4, rtol=1e-4)

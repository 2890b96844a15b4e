"""What a method keeps beside the cache is never out of date, whoever wrote to the cache; and goes when the cache goes."""

import gc

import pytest
import torch
from models import decode_logits, prefilled, random_tokens, tiny_model
from oracle import OracleModel, roles_of
from recorder import Recorder
from transformers import StaticCache

import tidal_compile as tc
from tidal_compile.kernels.call import Call, Selection
from tidal_compile.kernels.methods import METHODS
from tidal_compile.models import with_cache
from tidal_compile.passes import state

pytestmark = [pytest.mark.uncompiled, pytest.mark.shares_traces]

MODEL = tiny_model(num_hidden_layers=3)
POLICY = tc.Policy.from_dict(
    {
        "num_layers": 3, "layers": {"0": {"role": "select", "by": "pages", "page": 8}, "1": "reuse", "2": {"role": "select", "by": "pages", "page": 4}},
        "defaults": {"budget": 20, "sinks": 2, "recent": 3},
    }
)  # fmt: skip
SLOTS = 96


@pytest.fixture(scope="module")
def step():
    """The rewritten step, which Dynamo traces once for each shape of a batch and a cache."""
    return torch.compile(MODEL, backend=Recorder(policy=POLICY), fullgraph=True, dynamic=False)


@torch.no_grad()
def fill(cache, ids, mask=None):
    """Another prompt for a cache that is in use."""
    cache.reset()
    MODEL(input_ids=ids, attention_mask=mask, **with_cache(MODEL, cache))


def forget(cache):
    """What is kept beside a cache, as if it had never been made."""
    for layer in cache.layers:
        state._kept.pop(layer.keys, None)


def set_counter(cache, length):
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def expected(prompt, tokens, mask=None):
    return OracleModel(MODEL, roles_of(POLICY)).logits(prompt, tokens, mask)


def assert_decodes(step, cache, prompt, tokens):
    """The next steps are those of the oracle, and bounds are those of the keys."""
    torch.testing.assert_close(decode_logits(step, cache, tokens), expected(prompt, tokens), atol=2e-4, rtol=2e-4)
    for layer in (0, 2):
        key = cache.layers[layer].keys
        for method, kept in state._kept[key].items():
            for ours, made in zip(kept.tensors, method.summarize(key), strict=True):
                assert torch.equal(ours, made)


def test_the_budget_is_felt(step):
    prompt, tokens = random_tokens(1, 50), random_tokens(1, 20, seed=2)
    got = decode_logits(step, prefilled(MODEL, prompt, SLOTS), tokens)
    dense = decode_logits(MODEL, prefilled(MODEL, prompt, SLOTS), tokens)
    assert (got - dense).abs().max() > 1e-2


@pytest.mark.parametrize("length", [30, 70, 50])
def test_a_cache_is_filled_again(step, length):
    """With a shorter, a longer and an equally long prompt."""
    prompt, tokens = random_tokens(2, 50), random_tokens(2, 12, seed=2)
    cache = prefilled(MODEL, prompt, SLOTS)
    assert_decodes(step, cache, prompt, tokens)
    other = random_tokens(2, length, seed=5)
    fill(cache, other)
    assert_decodes(step, cache, other, tokens)


def test_two_caches_in_turn(step):
    prompts, tokens = [random_tokens(1, 50, seed=seed) for seed in (3, 4)], random_tokens(1, 16, seed=2)
    caches = [prefilled(MODEL, prompt, SLOTS) for prompt in prompts]
    for turn in range(4):
        for cache, prompt in zip(caches, prompts, strict=True):
            got = decode_logits(step, cache, tokens[:, 4 * turn : 4 * turn + 4])
            whole = expected(prompt, tokens[:, : 4 * turn + 4])
            torch.testing.assert_close(got, whole[:, 4 * turn :], atol=2e-4, rtol=2e-4)


def test_a_chat_that_extends_a_cache(step):
    """Decoded tokens, then a prefill of several, then decoded ones."""
    prompt, tokens = random_tokens(1, 40), random_tokens(1, 10, seed=2)
    cache = prefilled(MODEL, prompt, SLOTS)
    first = decode_logits(step, cache, tokens)
    more = random_tokens(1, 21, seed=7)
    with torch.no_grad():
        MODEL(input_ids=more, **with_cache(MODEL, cache))
    fresh = prefilled(MODEL, prompt, SLOTS)
    again = torch.compile(MODEL, backend=Recorder(policy=POLICY), fullgraph=True)
    torch.testing.assert_close(decode_logits(again, fresh, tokens), first)
    with torch.no_grad():
        MODEL(input_ids=more, **with_cache(MODEL, fresh))
    forget(fresh)
    torch.testing.assert_close(decode_logits(step, cache, tokens), decode_logits(again, fresh, tokens))


def test_a_counter_that_is_set_back_and_forth(step):
    """Without a write to the keys: what was decoded is dropped, written over in part, and counted again."""
    prompt, tokens = random_tokens(1, 41), random_tokens(1, 20, seed=2)
    cache = prefilled(MODEL, prompt, SLOTS)
    decode_logits(step, cache, tokens)
    set_counter(cache, 41)
    assert_decodes(step, cache, prompt, random_tokens(1, 5, seed=9))
    set_counter(cache, 61)
    one = random_tokens(1, 1, seed=8)
    got = decode_logits(step, cache, one)
    set_counter(cache, 61)
    forget(cache)
    torch.testing.assert_close(got, decode_logits(step, cache, one))


def test_a_batch_that_is_reordered(step):
    prompt, tokens = random_tokens(3, 50), random_tokens(3, 10, seed=2)
    cache = prefilled(MODEL, prompt, SLOTS)
    assert_decodes(step, cache, prompt, tokens[:, :4])
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    got = decode_logits(step, cache, tokens[:, 4:])
    whole = torch.cat([tokens[order, :4], tokens[:, 4:]], 1)
    torch.testing.assert_close(got, expected(prompt[order], whole)[:, 4:], atol=2e-4, rtol=2e-4)


def test_rows_with_other_padding(step):
    """The same cache for rows that are padded otherwise, and a mask that changes without a write to the cache."""
    tokens, cache = random_tokens(2, 6, seed=2), None
    for pads in ((0, 21), (13, 0), (5, 30)):
        prompt, mask = random_tokens(2, 50, seed=sum(pads)), torch.ones(2, 50, dtype=torch.long)
        for row, pad in enumerate(pads):
            mask[row, :pad] = 0
        if cache is None:
            cache = prefilled(MODEL, prompt, SLOTS, mask)
        else:
            fill(cache, prompt, mask)
        wide = torch.cat([mask, torch.ones(2, SLOTS - 50, dtype=torch.long)], 1).bool()
        masks = [(wide & (torch.arange(SLOTS) <= 50 + i))[:, None, None] for i in range(6)]
        got = decode_logits(step, cache, tokens, masks)
        torch.testing.assert_close(got, expected(prompt, tokens, mask), atol=2e-4, rtol=2e-4)
    masks = [mask & (torch.arange(SLOTS) > 33) for mask in masks]
    set_counter(cache, 50)
    narrow = decode_logits(step, cache, tokens, masks)
    set_counter(cache, 50)
    forget(cache)
    torch.testing.assert_close(narrow, decode_logits(step, cache, tokens, masks))


@pytest.mark.parametrize("slots", [53, 61, 64])
def test_a_cache_that_ends_within_a_page_is_decoded_to_its_last_slot(step, slots):
    prompt, tokens = random_tokens(1, 50), random_tokens(1, slots - 50, seed=2)
    assert_decodes(step, prefilled(MODEL, prompt, slots), prompt, tokens)


def test_generate_twice_and_on_from_a_cache():
    config = tc.compile_config(POLICY)
    options = {"max_new_tokens": 8, "do_sample": False, "compile_config": config, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    for seed in (1, 6):
        ids = random_tokens(1, 45, seed=seed)
        out = MODEL.generate(ids, cache_implementation="static", **options)
        logits = expected(ids, out.sequences[:, 45:-1])
        torch.testing.assert_close(torch.stack(out.logits[1:], 1), logits, atol=2e-4, rtol=2e-4)
    results = []
    for forget in (False, True):
        cache = StaticCache(config=MODEL.config, max_cache_len=SLOTS)
        out = MODEL.generate(ids, past_key_values=cache, **options)
        if forget:
            state._kept.clear()
        results.append(MODEL.generate(out.sequences, past_key_values=cache, **options))
    assert torch.equal(results[0].sequences, results[1].sequences) and results[0].sequences.shape[1] == 45 + 16
    torch.testing.assert_close(torch.stack(results[0].logits), torch.stack(results[1].logits))


def test_a_cache_of_inference_mode_is_refused(step):
    with torch.inference_mode():
        cache = StaticCache(config=MODEL.config, max_cache_len=SLOTS)
        MODEL(input_ids=random_tokens(1, 30), **with_cache(MODEL, cache))
        with pytest.raises(RuntimeError, match=r"the cache was made under torch.inference_mode.*torch.no_grad"):
            decode_logits(step, cache, random_tokens(1, 1))


def test_memory_goes_when_the_cache_goes(step):
    before, most = len(state._kept), 0
    for seed in range(200):
        cache = prefilled(MODEL, random_tokens(1, 30, seed=seed), SLOTS)
        decode_logits(step, cache, random_tokens(1, 1))
        most = max(most, len(state._kept) - before)
    assert most <= 4  # of this cache and of the one before
    del cache
    gc.collect()
    assert len(state._kept) <= before


def test_what_is_kept_follows_from_the_keys():
    """Updated step by step from any start, bounds equal those of all keys in the pages that were passed."""
    method, key = METHODS["pages"](page=8), torch.randn(2, 3, 45, 16)
    (bounds,) = method.summarize(torch.zeros_like(key))
    assert bounds.shape == (2, 3, 5, 2, 16)
    for length in range(1, 46):
        call = Call(torch.randn(2, 3, 1, 16), key, key, torch.tensor(length), None, 1.0)
        method.update(call, Selection(8), bounds)
    assert torch.equal(bounds, method.summarize(key)[0])
    for page in range(5):
        rows = key[:, :, 8 * page : 8 * page + 8]
        assert torch.equal(bounds[:, :, page, 0], rows.min(2).values)
        assert torch.equal(bounds[:, :, page, 1], rows.max(2).values)

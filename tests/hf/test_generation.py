"""What transformers asserts of compiled static-cache generation, for each family, with our backend and policy `full`.

In our own words after its `GenerationTesterMixin` (tests/generation/test_utils.py of transformers): the static cache has
the shapes that were asked for, compiled generation equals eager generation with a dynamic cache, every output that can be
asked for has its shape, other inputs need no other graph, padding changes nothing.
"""

import pytest
import torch
from families import FAMILIES
from models import family_model, family_pair, random_tokens
from torch._dynamo.utils import counters
from transformers import StaticCache

import tidal_compile as tc

pytestmark = pytest.mark.uncompiled

PROMPT, NEW, BATCH = 20, 5, 2
MATCHED = [name for name, family in FAMILIES.items() if family.sites]
ASKED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}


def two_layers(name):
    model = family_pair(name, attn_implementation=FAMILIES[name].implementations[0])
    model.generation_config.pad_token_id = 0
    return model


def generate(model, ids, compiled, mask=None, **options):
    if compiled:
        options |= {"cache_implementation": "static", "compile_config": tc.compile_config("full")}
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **ASKED, **options)


def assert_similar(got, expected):
    """The same tokens; where two are as good as equal, the same logits up to there."""
    for step, (ours, theirs) in enumerate(zip(got.logits, expected.logits, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
        if not torch.equal(got.sequences[:, PROMPT + step], expected.sequences[:, PROMPT + step]):
            return
    assert torch.equal(got.sequences, expected.sequences)


COMPILED = ("llama", "gemma3", "gpt_oss")  # the others run the rewritten graph as it is


QUICK = (*COMPILED, "gemma2", "qwen3_moe", "gpt2", "phi3", "qwen3_next", "mixtral")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.compiled] * (name in COMPILED) + [pytest.mark.slow] * (name not in QUICK))
        for name in MATCHED
    ],
)
def test_compiled_generation(name):
    model = two_layers(name)
    inputs = [random_tokens(BATCH, PROMPT, seed=seed) for seed in (1, 2)]
    counters.clear()
    outputs = [generate(model, ids, compiled=True) for ids in inputs]
    assert hasattr(model, "_compiled_call")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # other inputs, the same graph
    for ids, got in zip(inputs, outputs, strict=True):
        assert_similar(got, generate(model, ids, compiled=False))
    check_shapes(model, outputs[0])


def check_shapes(model, got):
    config = model.config
    assert got.sequences.shape == (BATCH, PROMPT + NEW)
    for each in (got.scores, got.logits):
        assert len(each) == NEW and all(step.shape == (BATCH, config.vocab_size) for step in each)
    assert len(got.hidden_states) == NEW
    for step, layers in enumerate(got.hidden_states):
        tokens = PROMPT if step == 0 else 1
        assert len(layers) == 3 and all(layer.shape == (BATCH, tokens, config.hidden_size) for layer in layers)
    cache = got.past_key_values
    assert isinstance(cache, StaticCache)
    for layer in cache.layers:
        if hasattr(layer, "keys"):
            slots = 16 if layer.is_sliding else PROMPT + NEW - 1
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            assert layer.keys.shape[:3] == layer.values.shape[:3] == (BATCH, heads, slots)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "gpt2"])
def test_left_padding_changes_nothing(name):
    model, ids = two_layers(name), random_tokens(BATCH, PROMPT)
    padded = torch.cat([torch.zeros(BATCH, 9, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    got, alone = generate(model, padded, compiled=True, mask=mask), generate(model, ids, compiled=True)
    for ours, theirs in zip(got.logits, alone.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation_continues_from_a_cache(name):
    """Some tokens, then more from the cache that is left, equals all at once."""
    model, ids = two_layers(name), random_tokens(1, PROMPT)
    options = {"do_sample": False, "compile_config": tc.compile_config("full"), "return_dict_in_generate": True}
    at_once = model.generate(
        ids, max_new_tokens=8, past_key_values=StaticCache(model.config, max_cache_len=40), **options
    )
    part = model.generate(ids, max_new_tokens=3, past_key_values=StaticCache(model.config, max_cache_len=40), **options)
    rest = model.generate(part.sequences, max_new_tokens=5, past_key_values=part.past_key_values, **options)
    assert torch.equal(rest.sequences, at_once.sequences)


def test_attention_weights_are_refused_by_name():
    """The ops have no weights to return: eager attention that must return them can't be rewritten."""
    model = family_model("llama", num_hidden_layers=2, attn_implementation="eager")
    with pytest.raises(tc.UnsupportedModelError, match="output_attentions=True"):
        generate(model, random_tokens(1, PROMPT), compiled=True, output_attentions=True)


def test_latent_attention_is_refused_by_name():
    model = family_model("deepseek_v3", num_hidden_layers=2)
    with pytest.raises(tc.UnsupportedModelError, match="multi-head latent attention"):
        generate(model, random_tokens(1, PROMPT), compiled=True)

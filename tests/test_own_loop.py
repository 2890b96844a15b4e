"""`tc.generate` against `model.generate`: the same tokens, whatever the options, the model and the cache."""

import contextlib
import gc
import weakref
from importlib import import_module

import pytest
import torch
from families import FAMILIES as EXPECTED
from models import decode_logits, family_model, odd_model, random_tokens, small_model, tiny_model
from tiers import sampled
from torch._dynamo.utils import counters
from torch.nn.attention.bias import CausalBias
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache, StoppingCriteria

import tidal_compile as tc
from tidal_compile import prefill, run
from tidal_compile.cache import LiveCache
from tidal_compile.errors import TidalError

pytestmark = pytest.mark.uncompiled

loop = import_module("tidal_compile.generate")
WIDE = {"num_layers": 2, "layers": {"0": "select", "1": "reuse"}, "defaults": {"budget": 200}}  # leaves nothing out


@pytest.fixture
def model():
    return small_model()


def both(model, ids, policy="full", seed=0, **options):
    """What model.generate and tc.generate return."""
    torch.manual_seed(seed)
    theirs = model.generate(ids, **options)
    torch.manual_seed(seed)
    return theirs, tc.generate(model, ids, policy, **options)


OPTIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "top-k-min-p": {"do_sample": True, "top_k": 11, "min_p": 0.02},
    "several-sequences": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "least": {"do_sample": False, "min_new_tokens": 9, "suppress_tokens": [5, 9]},
    "one-token": {"do_sample": False, "max_new_tokens": 1},
    "length": {"do_sample": False, "max_length": 33, "max_new_tokens": None},
    "config": {"generation_config": GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=9, pad_token_id=3)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(model, name):
    options = {"max_new_tokens": 14, **OPTIONS[name]}
    if name == "config":
        options.pop("max_new_tokens")
    for policy in ("full", WIDE):
        assert torch.equal(*both(model, random_tokens(3, 20), policy, **options))


@pytest.mark.parametrize("name", sampled(sorted(EXPECTED), ["gemma3", "gpt2", "gpt_oss", "qwen3_moe"]))
def test_families_and_padding(name):
    model = family_model(name)
    ids = random_tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for given in ({}, {"attention_mask": mask}):
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **given}
        try:
            theirs = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
        except Exception as error:
            pytest.skip(f"transformers: {type(error).__name__}")
        got = tc.generate(model, ids, options={"strict": False}, **options)
        assert torch.equal(theirs, got), given


def test_ends_at_every_step(model):
    """Rows that end at different steps, and all at once: the last step is taken back, whatever step is the last."""
    ids = random_tokens(3, 9)
    full = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for step in range(12):
        eos = full[:, 9 + step].tolist()
        for ending in (eos, eos[:1]):
            theirs, got = both(model, ids, max_new_tokens=12, do_sample=False, eos_token_id=ending)
            assert torch.equal(theirs, got)


class Words:
    """Enough of a tokenizer for stop strings."""

    def __init__(self):
        self.vocabulary = {chr(97 + number // 26) + chr(97 + number % 26): number for number in range(128)}

    def __call__(self, text, **_):
        return {"input_ids": [self.vocabulary[text[at : at + 2]] for at in range(0, len(text), 2)]}

    def _convert_id_to_token(self, number):
        return list(self.vocabulary)[number]

    def get_vocab(self):
        return self.vocabulary

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def __len__(self):
        return 128


def test_stopping(model):
    """By strings, and by what a user wrote."""
    ids, tokenizer = random_tokens(1, 9), Words()
    full = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    names = {number: word for word, number in tokenizer.vocabulary.items()}
    string = names[full[0, 13].item()] + names[full[0, 14].item()][:1]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "tokenizer": tokenizer}
    theirs, got = both(model, ids, stop_strings=string, **options)
    assert torch.equal(theirs, got) and got.shape[1] < 29
    config = GenerationConfig(stop_strings=string, max_new_tokens=20, do_sample=False)
    assert torch.equal(tc.generate(model, ids, generation_config=config, tokenizer=tokenizer), got)
    with pytest.raises(TidalError, match="stop_strings need the tokenizer"):
        tc.generate(model, ids, stop_strings=string)

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 16)

    theirs, got = both(model, ids, max_new_tokens=20, do_sample=False, stopping_criteria=[After()])
    assert torch.equal(theirs, got) and got.shape[1] <= 16


class Collects:
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        self.got.append(value.clone())

    def end(self):
        self.ended += 1


def test_streaming_and_scores(model):
    ids, streams = random_tokens(1, 9), [Collects(), Collects()]
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True, "temperature": None}
    theirs = model.generate(ids, streamer=streams[0], **options)
    got = tc.generate(model, ids, streamer=streams[1], **options)
    assert [one.ended for one in streams] == [1, 1]
    assert all(
        torch.equal(one.flatten(), other.flatten()) for one, other in zip(*(s.got for s in streams), strict=True)
    )
    assert torch.equal(theirs.sequences, got.sequences) and len(theirs.scores) == len(got.scores)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(theirs[name]), torch.stack(got[name]), atol=1e-4, rtol=1e-4)


def test_a_processor_of_the_users_own(model):
    class Bans(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, input_ids[0].unique(), -torch.inf)

    ids = random_tokens(1, 9)
    theirs, got = both(model, ids, max_new_tokens=12, do_sample=False, logits_processor=LogitsProcessorList([Bans()]))
    assert torch.equal(theirs, got) and len(set(got[0, 9:].tolist())) == len(got[0, 9:])


def test_chat_turns_and_caches_that_go_on(model):
    """A cache that is returned, or made by the user, goes on from its tokens; it isn't used for another call."""
    first, options = random_tokens(1, 12), {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    options["eos_token_id"] = model.generate(first, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 15].item()
    cache = StaticCache(config=model.config, max_cache_len=64)
    turn, text = tc.generate(model, first, past_key_values=cache, **options), first
    for number in range(3):
        right = model.generate(text, **{**options, "return_dict_in_generate": False})
        assert torch.equal(turn.sequences, right)
        assert cache.get_seq_length() == right.shape[1] - 1
        text = torch.cat([right, random_tokens(1, 3, seed=number)], 1)
        turn = tc.generate(model, text, past_key_values=cache, **options)
    given = tc.generate(model, first, **options)
    other = tc.generate(model, random_tokens(1, 12, seed=5), **options)
    kept = given["cache" if "cache" in given else "past_key_values"]
    assert kept is not other["cache" if "cache" in other else "past_key_values"]
    text = torch.cat([given.sequences, random_tokens(1, 3)], 1)
    on = tc.generate(model, text, past_key_values=kept, **options).sequences
    assert torch.equal(on, model.generate(text, **{**options, "return_dict_in_generate": False}))


def test_one_compilation_for_prompts_of_many_lengths(model, monkeypatch):
    """The cache is kept, and grows in steps; prompts are read in chunks."""
    counters.clear()
    for length in (5, 40, 120, 9):
        ids = random_tokens(1, length, seed=length)
        assert torch.equal(*both(model, ids, max_new_tokens=6, do_sample=False))
    assert counters["stats"]["unique_graphs"] == 1 and model in loop._caches
    tc.generate(model, ids, max_new_tokens=2, keep_cache=False)
    assert model not in loop._caches
    for rows, length in [(rows, 9) for rows in range(2, 9)] + [
        (1, 230 * times) for times in (2, 3, 4)
    ]:  # over 8 shapes
        tc.generate(model, random_tokens(rows, length), max_new_tokens=2, do_sample=False)
    assert [loop.slots_for(one) for one in (1, 256, 257, 300, 5000, 100_000)] == [256, 256, 320, 320, 5120, 114_688]
    assert all(one <= loop.slots_for(one) <= max(256, 1.25 * one) for one in range(1, 9000, 7))
    assert all(loop.slots_for(loop.slots_for(one)) == loop.slots_for(one) for one in range(1, 9000, 7))
    read, long = [], random_tokens(1, 250)
    monkeypatch.setattr(prefill, "CHUNK", 100)
    got = tc.generate(model, long, max_new_tokens=6, do_sample=False, report=lambda *now: read.append(now))
    assert read == [(100, 250), (200, 250), (250, 250)]
    assert torch.equal(got, model.generate(long, max_new_tokens=6, do_sample=False))


def test_a_last_token_alone_is_a_step(model):
    """What a cache lacks of a prompt is read densely, but for its last token; that is one compilation, too."""
    policy = {"num_layers": 2, "layers": {"0": "select", "1": "reuse"}, "defaults": {"budget": 12, "recent": 4}}
    step = torch.compile(model.forward, backend="tidal", fullgraph=True, dynamic=False, options={"policy": policy})
    cache = StaticCache(config=model.config, max_cache_len=128)
    options = {"max_new_tokens": 3, "do_sample": False, "past_key_values": cache, "return_dict_in_generate": True}
    counters.clear()
    for length in (60, 75):
        ids = random_tokens(1, length, seed=length)
        found = {}
        for known, way in ((length - 1, "step"), (length - 2, "dense"), (length - 1, "exact")):
            run.rewind(cache, 0) if cache.get_seq_length() else None
            with torch.no_grad():
                model(ids[:, :known], past_key_values=cache)
            exact = {"exact": True} if way == "exact" else {}
            found[way] = tc.generate(model, ids, policy, output_logits=True, **options, **exact).logits[0]
        with torch.no_grad():
            dense = model(ids).logits[:, -1]
            run.rewind(cache, length - 1)
            sparse = decode_logits(step, cache, ids[:, -1:])[:, -1]
        torch.testing.assert_close(found["step"], sparse)
        torch.testing.assert_close(found["dense"], dense)
        torch.testing.assert_close(found["exact"], dense)
        assert (sparse - dense).abs().max() > 1e-3
    # Under the policy for `generate`, and for `decode_logits`; densely for one token, and for several
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_a_prompt_is_read_by_its_live_tokens(name, monkeypatch):
    """In chunks, behind what a cache has, with padding; layers that slide stay as they are."""
    model = family_model(name, 2)
    monkeypatch.setattr(prefill, "CHUNK", 13)
    ids, widths, causal = random_tokens(2, 40), [], []
    dispatch = CausalBias._dispatch
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    attention = torch.nn.functional.scaled_dot_product_attention

    def causally(query, key, *rest, **options):
        causal.append((query.shape[2], key.shape[2]))
        return dispatch(query, key, *rest, **options)

    def spy(query, key, *rest, **options):
        if query.shape[2] > 1:
            widths.append(key.shape[2])
        return attention(query, key, *rest, **options)

    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for given in ({}, {"attention_mask": mask}):
        theirs = model.generate(ids, cache_implementation="static", disable_compile=True, **options, **given)
        if name == "llama" and not given:
            monkeypatch.setattr(CausalBias, "_dispatch", causally)
        else:
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        got = tc.generate(model, ids, options={"strict": False}, **options, **given)
        monkeypatch.undo()
        monkeypatch.setattr(prefill, "CHUNK", 13)
        assert torch.equal(theirs, got)
    assert max(widths, default=0) <= 40
    chunks = [(13, 13), (13, 26), (13, 39), (1, 40)]
    assert causal == ([each for each in chunks for _ in range(2)] if name == "llama" else [])


@pytest.mark.parametrize("padded", [False, True])
def test_corrections_write_what_a_dense_pass_would(padded):
    """Under a policy that leaves much out: after a correction, keys and values are those of a dense pass over the text."""
    model = small_model(num_hidden_layers=4, eos_token_id=None)
    narrow = tc.Policy.from_dict({
        "num_layers": 4, "layers": {"0": "select", "1-3": "reuse"}, "defaults": {"budget": 6, "sinks": 1, "recent": 2}
    })  # fmt: skip
    ids, options = random_tokens(2, 30), {"max_new_tokens": 13, "do_sample": False}
    mask = torch.ones_like(ids)
    mask[0, : 7 if padded else 0] = 0
    options["attention_mask"] = mask
    caches, texts = [], []
    for every in (None, 4):
        cache = StaticCache(config=model.config, max_cache_len=64)
        texts.append(tc.generate(model, ids, narrow, past_key_values=cache, correct_every=every, **options))
        caches.append(cache)
    assert not torch.equal(*texts)
    for text, cache, is_corrected in zip(texts, caches, (False, True), strict=True):
        dense = StaticCache(config=model.config, max_cache_len=64)
        wide = torch.cat([mask, mask.new_ones(2, 12)], 1)
        with torch.no_grad():
            model(
                input_ids=text[:, :42], attention_mask=wide, past_key_values=dense,
                position_ids=(wide.cumsum(-1) - 1).clamp(min=0),
            )  # fmt: skip
        errors = [
            (one.keys - other.keys)[1, :, 30:42].abs().amax((0, 2))
            for one, other in zip(cache.layers, dense.layers, strict=True)
        ][3]  # of the last layer, by position
        assert (errors[:12].max() < 1e-4) == is_corrected
    exact = model.generate(ids, **options)
    assert torch.equal(tc.generate(model, ids, "full", correct_every=3, **options), exact)
    for policy, every, message in (("full", 0, "correct_every 0"), ("magicpig_cpu", 4, "would sort all tokens anew")):
        with pytest.raises(TidalError, match=message):
            tc.generate(model, ids, policy, correct_every=every, **options)
    with pytest.raises(TidalError, match="recurrent layers"):
        tc.generate(family_model("qwen3_next", 2), ids, correct_every=4, **options)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_corrections_behind_windows(name):
    """Under the exact policy they change nothing, though windows of 16 are passed several times."""
    model, ids = family_model(name, 4), random_tokens(2, 30)
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    exact = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    for every in (3, 20):
        assert torch.equal(tc.generate(model, ids, correct_every=every, **options), exact)


def test_an_interrupt_leaves_the_cache_usable(model):
    """The tokens that were streamed, with the ones before, are in it."""
    ids, cache = random_tokens(1, 9), StaticCache(config=model.config, max_cache_len=64)

    class Stops(Collects):
        def put(self, value):
            super().put(value)
            if len(self.got) == 5:
                raise KeyboardInterrupt

    stream = Stops()
    with pytest.raises(KeyboardInterrupt):
        tc.generate(model, ids, streamer=stream, past_key_values=cache, max_new_tokens=12, do_sample=False)
    so_far = torch.cat([one.flatten() for one in stream.got])[None]
    text = torch.cat([so_far, random_tokens(1, 3)], 1)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(tc.generate(model, text, past_key_values=cache, **options), model.generate(text, **options))


def test_layers_in_host_memory_and_samples():
    model = small_model(num_hidden_layers=3)
    sampled = {"role": "select", "by": "lsh", "k": 2, "l": 30, "decoded": "exact"}
    found = []
    for place in ("gpu", "cpu"):
        policy = tc.Policy.from_dict({
            "num_layers": 3, "layers": {"0": "full", "1-2": {**sampled, "place": place}}, "defaults": {"recent": 4, "budget": 20}
        })  # fmt: skip
        cache = {"past_key_values": tc.HostCache(model.config, 64, policy)} if place == "cpu" else {}
        found.append(tc.generate(model, random_tokens(2, 30), policy, max_new_tokens=10, do_sample=False, **cache))
    assert torch.equal(*found)


def test_refusals_and_memory(model):
    ids = random_tokens(1, 9)
    for options, message in (
        ({"num_beams": 3}, "beam search; use model.generate"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens 0"),
        ({"position_ids": torch.arange(9)[None] * 3}, "position_ids is not taken"),
        ({"token_type_ids": torch.ones(1, 9, dtype=torch.long)}, "token_type_ids other than 0"),
        ({"attention_mask": torch.ones(1, 12)}, r"attention_mask \(1, 12\) must be as large as input_ids \(1, 9\)"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not returned"),
        (
            {"past_key_values": StaticCache(config=model.config, max_cache_len=12)},
            "12 slots; 20 are needed|12 slots; 29",
        ),
        ({"use_cache": False}, "use_cache=False"),
    ):
        with pytest.raises(TidalError, match=message):
            tc.generate(model, ids, max_new_tokens=20, do_sample=False, **options)
    with pytest.raises(tc.PolicyError):
        tc.generate(model, ids, "no such policy")
    cache = StaticCache(config=model.config, max_cache_len=64)
    tc.generate(model, ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(TidalError, match="the cache has 1 rows; 3 are needed"):
        tc.generate(model, ids, past_key_values=cache, num_return_sequences=3, do_sample=True, max_new_tokens=2)
    short = tc.generate(model, ids.int(), max_new_tokens=30, do_sample=False)
    assert short.is_contiguous() and short.dtype == torch.long
    other = small_model()
    tc.generate(other, ids, max_new_tokens=3, do_sample=False)
    gone = weakref.ref(other)
    torch._dynamo.reset()
    del other
    gc.collect()
    assert gone() is None


def test_a_kept_cache_suits_the_next_call(model):
    """Other numbers, autocast, inference mode, and layers that are more than keys and values."""
    ids, options = random_tokens(1, 9), {"max_new_tokens": 4, "do_sample": False}
    with torch.inference_mode():
        tc.generate(model, ids, **options)
    exact = model.generate(ids, **options)
    assert torch.equal(tc.generate(model, ids, **options), exact)
    mixed = tc.UnsupportedModelError, RuntimeError  # the latter is transformers 5.17's own
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(mixed, match="q, keys and values are|index_copy_"):
        tc.generate(model, ids, **options)
    assert torch.equal(tc.generate(model, ids, **options), exact)
    model.to(torch.bfloat16)
    tc.generate(model, ids, **options)
    hybrid = odd_model("falcon_h1")
    right = hybrid.generate(ids, cache_implementation="static", disable_compile=True, **options)
    for _ in range(2):
        assert torch.equal(tc.generate(hybrid, ids, options={"strict": False}, **options), right)


@pytest.mark.parametrize("at", ["prompt", "step"])
def test_an_error_inside_a_layer_leaves_the_cache_whole(model, at):
    ids, cache = random_tokens(1, 20), StaticCache(config=model.config, max_cache_len=64)
    options = {"max_new_tokens": 6, "do_sample": False}
    tc.generate(model, ids[:, :9], past_key_values=cache, max_new_tokens=1, do_sample=False)

    def fails(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(fails)
    if at == "step":
        hook.remove()

        class Stops(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                raise KeyboardInterrupt

        options["stopping_criteria"] = [Stops()]
    with pytest.raises(KeyboardInterrupt):
        tc.generate(model, ids, past_key_values=cache, **options)
    hook.remove()
    options.pop("stopping_criteria", None)
    assert len({int(layer.cumulative_length) for layer in cache.layers}) == 1
    if at == "step":
        ids = torch.cat([ids, random_tokens(1, 2)], 1)
    assert torch.equal(tc.generate(model, ids, past_key_values=cache, **options), model.generate(ids, **options))


def test_a_model_with_masks_of_its_own_is_read_as_it_reads(monkeypatch):
    """Doge makes a mask of what each layer sees: flash attention would not know of it."""
    model = tiny_model("doge", num_hidden_layers=2, keep_window_size=12)
    for layer in model.model.layers:
        layer.self_attn.A.data.normal_(0.0, 2.0, generator=torch.Generator().manual_seed(0))
    ids = random_tokens(1, 40)
    (_, *_), (done, logits) = list(prefill.read(model, ids, LiveCache(model.config, 64), chunk=25))
    assert done == 40 and type(model) in prefill._with_masks
    monkeypatch.setattr(prefill, "_attention", lambda *_: contextlib.nullcontext())
    _, (_, by_itself) = list(prefill.read(model, ids, LiveCache(model.config, 64), chunk=25))
    torch.testing.assert_close(logits, by_itself, atol=1e-4, rtol=1e-4)

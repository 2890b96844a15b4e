"""`exact=True`: what the dense model says, drafted under a policy."""

from importlib import import_module

import pytest
import torch
from models import family_model, random_tokens, small_model
from tiers import sampled
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

import tidal_compile as tc
from tidal_compile.cache import LiveCache
from tidal_compile.drafts import WIDTH, Drafting, FromText, RowDrafter, _Pace
from tidal_compile.errors import TidalError

pytestmark = pytest.mark.uncompiled

loop = import_module("tidal_compile.generate")

SPARSE = {
    "num_layers": 3, "layers": {"0": "select", "1-2": "reuse"}, "defaults": {"budget": 16, "sinks": 2, "recent": 4},
}  # fmt: skip
WIDE = SPARSE | {"defaults": {"budget": 200}}  # leaves nothing out: every draft holds


@pytest.fixture
def model():
    return small_model(num_hidden_layers=3)


OPTIONS = {
    "plain": {},
    "ends": {"eos_token_id": [7, 9, 11, 40]},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "least": {"min_new_tokens": 9, "eos_token_id": list(range(2, 60))},
    "one-token": {"max_new_tokens": 1},
    "two-tokens": {"max_new_tokens": 2},
}


@pytest.mark.parametrize(
    ("name", "drafts"),
    sampled(
        [(name, drafts) for name in OPTIONS for drafts in (1, 3, 7, None)],
        [("plain", 3), ("ends", 7), ("processors", None), ("least", 1), ("one-token", 3), ("two-tokens", 7)],
    ),
)
def test_greedy_tokens_are_the_dense_ones(model, name, drafts):
    for rows, policy in ((1, SPARSE), (3, SPARSE), (2, WIDE)):
        ids, drafting = random_tokens(rows, 50, seed=rows), Drafting(drafts)
        options = {"max_new_tokens": 30, "do_sample": False, **OPTIONS[name]}
        dense = model.generate(ids, **options)
        assert torch.equal(tc.generate(model, ids, policy, exact=drafting, **options), dense)
        if policy is WIDE:
            assert drafting.accepted == drafting.drafted
            assert drafting.cycles * ((drafts or WIDTH) + 1) >= dense.shape[1] - 51 - drafting.steps or drafts is None


@pytest.mark.parametrize("drafts", [2, 7, None])
def test_rows_go_on_each_for_itself(model, drafts, monkeypatch):
    """What one row rejects doesn't hold up the others; the holes are closed when the cache is full."""
    monkeypatch.setattr(loop, "HOLES", 0.0)
    monkeypatch.setattr(loop, "slots_for", lambda length: length)
    closed, close = [], RowDrafter._close_holes
    monkeypatch.setattr(RowDrafter, "_close_holes", lambda self: closed.append(1) or close(self))
    ids, by_row, together = random_tokens(4, 60, seed=4), Drafting(drafts), Drafting(drafts)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "eos_token_id": list(range(2, 12))}):
        options = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None, **given}
        dense = model.generate(ids, **options)
        assert torch.equal(tc.generate(model, ids, SPARSE, exact=by_row, **options), dense)
        options["logits_processor"] = LogitsProcessorList([Same()])  # of the user's, which may look at tokens
        assert torch.equal(tc.generate(model, ids, SPARSE, exact=together, **options), dense)
    assert by_row.cycles < together.cycles or drafts is None
    assert closed or drafts is None


class Same(LogitsProcessor):
    """Changes nothing."""

    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("eos", [None, [2, 3, 5, 8, 13, 21, 34, 55]])
def test_the_cache_holds_what_was_said(model, alone, eos):
    """Whether rows go on together or not, and end early or not: as after dense steps, for a turn that goes on."""
    ids = random_tokens(3, 40, seed=9)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": eos, "attention_mask": mask}
    if not alone:
        options["logits_processor"] = LogitsProcessorList([Same()])
    caches = [LiveCache(model.config, 96) for _ in range(2)]
    said = tc.generate(model, ids, past_key_values=caches[0], **options)
    assert torch.equal(tc.generate(model, ids, SPARSE, exact=Drafting(4), past_key_values=caches[1], **options), said)
    filled = said.shape[1] - 1
    for dense, drafted in zip(*(cache.layers for cache in caches), strict=True):
        assert int(dense.cumulative_length) == int(drafted.cumulative_length) == filled
        for one, other in ((dense.keys, drafted.keys), (dense.values, drafted.values)):
            torch.testing.assert_close(one[:, :, 6:filled], other[:, :, 6:filled], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["streamer", "criterion", "processor"])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_interrupt_leaves_what_was_said(model, where, rows):
    """Drafts that nobody was told of are gone, and the conversation goes on as if they had not been made."""
    told = []

    def stop(*_):
        told.append(1)
        if len(told) > 9:
            raise KeyboardInterrupt

    class Streamer:
        put = staticmethod(stop if where == "streamer" else lambda value: None)
        end = staticmethod(lambda: None)

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            stop()
            return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            stop()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    ids, cache = random_tokens(rows, 40), LiveCache(model.config, 128)
    options = {"do_sample": False, "eos_token_id": None, "past_key_values": cache}
    more = {"streamer": {"streamer": Streamer()}, "criterion": {"stopping_criteria": [Criterion()]}}.get(
        where, {"logits_processor": LogitsProcessorList([Processor()])}
    )
    with pytest.raises(KeyboardInterrupt):
        tc.generate(model, ids, WIDE, exact=Drafting(5), max_new_tokens=40, **options, **more)
    dense = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    filled = int(cache.get_seq_length())
    assert 40 <= filled < 50
    turn = torch.cat([dense[:, :filled], random_tokens(rows, 5, seed=4)], 1)
    more = {"max_new_tokens": 9, "attention_mask": torch.ones_like(turn)}  # 0 is no padding here
    got = tc.generate(model, turn, **options, **more)
    assert torch.equal(got, model.generate(turn, do_sample=False, eos_token_id=None, **more))


def test_processors_criteria_and_configs(model):
    """In place, without an end token, and what the model's own config says of drafts."""

    class InPlace(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, ::3] += 1.5
            return scores

    class Fifth(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids[:, -1] % 5 == 0

    for given in ({"logits_processor": LogitsProcessorList([InPlace()])}, {"stopping_criteria": [Fifth()]}):
        for rows in (1, 3):
            options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **given}
            ids = random_tokens(rows, 50, seed=rows)
            assert torch.equal(
                tc.generate(model, ids, SPARSE, exact=Drafting(4), **options), model.generate(ids, **options)
            )
    ids = random_tokens(1, 50)
    expected = tc.generate(model, ids, SPARSE, max_new_tokens=12, do_sample=False)
    model.generation_config.prompt_lookup_num_tokens = 4
    assert torch.equal(tc.generate(model, ids, SPARSE, max_new_tokens=12, do_sample=False), expected)
    assert model.generation_config.prompt_lookup_num_tokens == 4
    with pytest.raises(TidalError, match="remembers each token"):
        tc.generate(model, ids, SPARSE, max_new_tokens=4, do_sample=False, guidance_scale=1.5)


def test_padding_scores_and_the_cache_that_is_left(model):
    """Padded rows; scores of all tokens; a cache of the user's, which a chat goes on from."""
    ids = random_tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    more = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs = model.generate(ids, **options, **more)
    cache = tc.generate(model, ids, SPARSE, exact=True, **options, **more)
    assert torch.equal(theirs.sequences, cache.sequences) and len(cache.scores) == len(cache.logits) == 24
    torch.testing.assert_close(torch.stack(cache.scores), torch.stack(theirs.scores), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(cache.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)

    turn = torch.cat([theirs.sequences, random_tokens(2, 7, seed=8)], 1)
    longer = torch.ones_like(turn)
    longer[0, :9] = 0
    kept = LiveCache(model.config, 128)
    first = tc.generate(model, ids, SPARSE, exact=True, past_key_values=kept, **options)
    assert torch.equal(first, theirs.sequences) and int(kept.get_seq_length()) == first.shape[1] - 1
    got = tc.generate(
        model, turn, SPARSE, exact=Drafting(3), past_key_values=kept, **options | {"attention_mask": longer}
    )
    assert torch.equal(got, model.generate(turn, **options | {"attention_mask": longer}))


def test_streams_every_token_once(model):
    class Streamer(list):
        def put(self, value):
            self.append(value)

        def end(self):
            self.append(None)

    ids, streamer = random_tokens(1, 40), Streamer()
    out = tc.generate(model, ids, WIDE, exact=Drafting(5), max_new_tokens=20, do_sample=False, streamer=streamer)
    assert streamer[-1] is None and torch.equal(torch.cat([streamer[0].flatten(), *streamer[1:-1]]), out[0])


@pytest.mark.parametrize("rows", [1, 4])
def test_samples_come_from_the_dense_distribution(rows):
    """Of many continuations of one prompt, how often each pair of tokens occurs: a chi-squared test of either loop.

    The policy's own distribution is far off, which the same test shows.
    """
    model = small_model(num_hidden_layers=3, vocab_size=12, eos_token_id=None)
    ids, times, new = (1 + random_tokens(1, 50) % 11).repeat(rows, 1), 800 // rows, 3
    options = {"max_new_tokens": new, "do_sample": True, "temperature": 0.9, "top_k": 4, "pad_token_id": 0}
    expected = pair_probabilities(model, ids[:1], 0.9, 4)

    def statistic(**given):
        torch.manual_seed(1)
        found = torch.zeros(12, 12)
        for _ in range(times):
            for row in tc.generate(model, ids, SPARSE, **options, **given)[:, 51:]:
                found[row[0], row[1]] += 1
        likely = expected * times * rows >= 5
        other = found[~likely].sum(), expected[~likely].sum() * times * rows
        chi = ((found[likely] - expected[likely] * times * rows) ** 2 / (expected[likely] * times * rows)).sum()
        chi += (other[0] - other[1]) ** 2 / other[1].clamp(min=1e-9) if other[1] > 1 else 0.0
        degrees = int(likely.sum())
        return (chi - degrees) / (2 * degrees) ** 0.5  # about a standard normal number

    assert statistic(exact=Drafting(2)) < 3.5
    assert statistic(exact=Drafting(2), prompt_lookup_num_tokens=2) < 3.5
    if rows == 1:
        assert statistic() > 5


@torch.no_grad()
def pair_probabilities(model, ids, temperature, top_k):
    """How likely the second and third token after a prompt are each pair, by the dense model."""

    def after(ids):
        logits = model(ids).logits[:, -1].double() / temperature
        least = logits.topk(top_k).values[:, -1:]
        return logits.masked_fill(logits < least, -torch.inf).softmax(-1)

    vocab = torch.arange(model.config.vocab_size)
    pairs = torch.zeros(len(vocab), len(vocab), dtype=torch.float64)
    for one, first in enumerate(after(ids)[0].tolist()):
        if first > 0.0:
            prefix = torch.cat([ids, torch.tensor([[one]])], 1)
            second = after(prefix)[0]
            longer = torch.cat([prefix.expand(len(vocab), -1), vocab[:, None]], 1)
            pairs += first * second[:, None] * after(longer)
    return pairs.float()


def test_how_many_drafts_pay():
    def settled(rate, draft, verify, cycles=60):
        pace, counts = _Pace(), []
        for number in range(cycles):
            count = pace.drafts()
            counts.append(count)
            if count:
                held = min(count, int(rate / max(1e-9, 1 - rate)) if number % 2 else count if rate > 0.5 else 0)
                pace.note(held + (held < count), held, draft, verify)
        return counts

    assert settled(0.99, 0.2, 1.0)[-1] == 7  # cheap drafts that nearly always hold
    assert settled(0.0, 0.2, 1.0)[-1] == 0  # none holds
    assert settled(0.99, 0.97, 1.0)[-1] == 0  # a draft costs as much as a dense step
    last = settled(0.0, 0.2, 1.0, 600)[300:]
    assert 290 < last.count(0) < 300  # tried again now and then
    assert 0 < settled(0.75, 0.35, 1.0)[-1] < 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exact": True, "correct_every": 8}, "leave out correct_every"),
        ({"exact": Drafting(8)}, "from 1 to 7"),
        ({"exact": Drafting(0)}, "from 1 to 7"),
        ({"exact": True, "policy": "magicpig_cpu"}, "exact with place: cpu"),
        ({"exact": True, "past_key_values": 60}, "60 slots; 78 are needed"),
        ({"policy": "quest", "prompt_lookup_num_tokens": 3}, "for one token a step"),
    ],
)
def test_refusals(model, given, message):
    given = {"policy": SPARSE} | given
    if "past_key_values" in given:
        given["past_key_values"] = LiveCache(model.config, given["past_key_values"])
    with pytest.raises(TidalError, match=message):
        tc.generate(model, random_tokens(1, 50), max_new_tokens=20, do_sample=False, **given)


def test_windows_can_not_take_back_a_draft():
    with pytest.raises(TidalError, match="sliding windows or recurrent layers"):
        tc.generate(family_model("gemma3", 2), random_tokens(1, 20), "full", exact=True, max_new_tokens=4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("who", ["another-model", "the-model-itself", "the-text"])
def test_others_may_draft(model, who, exact):
    """Verified by the dense model with `exact`, else by the policy: what comes out is theirs, whoever drafts."""
    helper = {
        "another-model": {"assistant_model": small_model(num_hidden_layers=1)},
        "the-model-itself": {"assistant_model": model}, "the-text": {"prompt_lookup_num_tokens": 5},
    }[who]  # fmt: skip
    for rows in (1, 3):
        ids = random_tokens(rows, 60, seed=rows)
        ids[:, 20:40], ids[:, 55:] = ids[:, :20].clone(), ids[:, 5:10].clone()
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        for given in ({}, {"repetition_penalty": 1.3}, {"attention_mask": mask}):
            options = {"max_new_tokens": 30, "do_sample": False, **given}
            drafting = Drafting(3)
            if exact:
                expected = model.generate(ids, **options)
                got = tc.generate(model, ids, SPARSE, exact=drafting, **options, **helper)
            else:
                expected = tc.generate(model, ids, SPARSE, **options)
                got = tc.generate(model, ids, SPARSE, **options, **helper)
            assert torch.equal(got, expected)
            if exact and who == "the-model-itself":
                assert drafting.acceptance == 1.0


def test_a_text_that_repeats_itself_drafts_itself(model):
    """The longest match counts, and of these the latest; a row without a match drafts anything."""
    text = torch.tensor([[1, 2, 3, 9, 1, 2, 4, 8, 5, 2, 6, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    room = torch.cat([text, torch.zeros(2, 8, dtype=torch.long)], 1)
    drafted, _ = FromText().propose(room, 13, 3)
    assert drafted.tolist() == [[4, 8, 5], [12, 12, 12]] and torch.equal(room[:, 13:16], drafted)
    assert FromText(1).propose(room, 13, 3)[0].tolist()[0] == [6, 1, 2]

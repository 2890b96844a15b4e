"""The benchmark suite at small sizes, on whatever device there is."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from commands import quick
from typer.testing import CliRunner

from tidal_compile.backend import Options
from tidal_compile.bench import decode, figures, kernels, markdown
from tidal_compile.bench.timing import relative_error, summary
from tidal_compile.cli import app
from tidal_compile.kernels.call import fitting
from tidal_compile.models import load_model
from tidal_compile.variant import Variant

pytestmark = pytest.mark.uncompiled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = kernels.Size(batch=2, heads=10, kv_heads=2, head_dim=32, context=300, budget=64, share="kv_head")


def result_of(folder):
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def test_decode_beside_its_baselines(tmp_path):
    sizes = ("--model", "random:llama", "--layers", 4, "--context", 200, "--batch", 1, "--steps", 5, "--generate", 6)
    baselines = [part for name in ("eager", "flash") for part in ("--baseline", name)]
    printed = quick("bench", "decode", *sizes, *baselines, "--budget", 64, "--out", tmp_path)
    result = result_of(tmp_path)
    names = ["eager", "flash", "tidal: full", "tidal: tidal 64"]
    assert [one["name"] for one in result["decode"]] == names and all(name in printed for name in names)
    assert all(one["relative_error"] < 1e-3 and one["ms"]["p10"] <= one["ms"]["p90"] for one in result["decode"])
    assert all(one["steps"] == 5 and one["cudagraph_skips"] == 0 for one in result["decode"])
    assert result["device"] and result["commit"] and result["versions"]["torch"] and result["command"]
    *dense, sparse = result["decode"]
    assert {one["kv_bytes"] for one in dense} == {dense[0]["kv_bytes"]} and sparse["kv_bytes"] < dense[0]["kv_bytes"]
    assert {name for name, one in zip(names, result["decode"], strict=True) if "generate_ms" in one} == {
        "eager", "tidal: full", "tidal: tidal 64",
    }  # fmt: skip
    assert [name for name, one in zip(names, result["decode"], strict=True) if "own_generate_ms" in one] == names[2:]


@pytest.mark.compiled
def test_policies_share_a_cache_and_a_compilation(tmp_path):
    quick(
        "bench", "decode", "--model", "random:llama", "--layers", 1, "--context", 100, "--context", 200, "--steps", 4,
        "--batch", 2, "--policy", "full", "--baseline", "none", "--out", tmp_path,
    )  # fmt: skip
    short, long = result_of(tmp_path)["decode"]
    assert (short["context"], long["context"]) == (100, 200) and short["compile_s"] == long["compile_s"]
    assert short["slots"] == long["slots"] > 200 and short["kv_bytes"] < long["kv_bytes"]


def test_floors_are_counted_from_the_shape():
    """Two layers of two 16-element kv heads, bfloat16: 256 bytes a token; the embedding table is read only as a head."""
    model = load_model("random:llama", "meta", torch.bfloat16, 2)
    shape = decode.read_shape(model, torch.bfloat16)
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2 and shape.group == 2
    parameters = sum(one.numel() for one in model.parameters())
    assert shape.weight_bytes == 2 * parameters and shape.streamed_bytes == 2 * (parameters - 128 * 64)
    assert decode.floor_bytes(shape, Variant("eager"), 3, 100) == (shape.streamed_bytes, 3 * 100 * 256)

    tied = load_model("random:smollm2-135m", "meta", torch.bfloat16, 2)
    assert decode.read_shape(tied, torch.bfloat16).streamed_bytes == 2 * sum(one.numel() for one in tied.parameters())


@pytest.mark.parametrize("policy", ["full", "tidal"])
def test_steps_over_a_float8_cache_are_checked_and_timed(policy):
    """At two lengths, the shorter one in slots that the longer one's steps don't see; scales that are wrong are noticed."""
    model = load_model("random:llama", DEVICE.type, torch.float32, 4)
    shape = decode.read_shape(load_model("random:llama", "meta", torch.float32, 4), torch.float32, "fp8")
    assert shape.kv_bytes_per_token == 4 * 2 * 2 * (16 + 2)
    (case,) = decode.cases_of(shape, [], [Options.parse({"policy": policy, "budget": 64, "sinks": 1, "recent": 2})])
    cache, saved = decode.make_cache(model, 1, 60, 90, "fp8")
    token = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
    records = list(decode.run_case(model, shape, case, cache, [60, 40], token, 4, 1e9, saved))
    assert [record["context"] for record in records] == [61, 41]
    right = decode._results(torch.zeros(1, 1, 4), cache, 10)
    cache.layers[1].scales[:, :, 10, 0] *= 8
    wrong = decode._results(torch.zeros(1, 1, 4), cache, 10)
    assert not torch.equal(right[1], wrong[1]) and torch.equal(right[0], wrong[0])


def small_bench(policy=None):
    """The model, its shape, a variant, the cache and a token, as `run_case` takes them."""
    model = load_model("random:llama", DEVICE.type, torch.float32, 4)
    shape = decode.read_shape(load_model("random:llama", "meta", torch.float32, 4), torch.float32)
    asked = [] if policy is None else [Options.parse({"policy": policy, "budget": 8, "sinks": 1, "recent": 2})]
    (case,) = decode.cases_of(shape, ["eager"] if policy is None else [], asked)
    return model, shape, case, decode.make_cache(model, 1, 50, 80)[0], torch.ones(1, 1, dtype=torch.long, device=DEVICE)


@pytest.mark.parametrize("policy", [None, "flat"])
def test_wrong_logits_are_not_timed(monkeypatch, policy):
    model, shape, case, cache, token = small_bench(policy)
    right = decode.expected_results
    for wrong, what in ((-1, "the logits"), (2, "the keys of layer 2")):

        def broken(*args, wrong=wrong, **options):
            results = right(*args, **options)
            results[0][wrong] += results[0][wrong].abs().max()
            return results

        monkeypatch.setattr(decode, "expected_results", broken)
        with pytest.raises(Exception, match=f"{what} of {case.name} after 50 tokens are off"):
            list(decode.run_case(model, shape, case, cache, [50], token, 4, 1e9, {}))


def test_what_a_rounding_may_do_to_a_policy_is_not_judged():
    """Results beyond a layer that magnifies roundings say nothing; those before it are still judged."""
    case = small_bench("flat")[2]
    right = [torch.ones(1, 4)] * 5
    near = [torch.ones(1, 4)] * 2 + [torch.ones(1, 4) * 1.4] * 3
    far = [torch.ones(1, 4)] * 2 + [torch.ones(1, 4) * 1.9] * 3
    checked = decode.check(case, 4, decode.ROUNDING[torch.float32], 50, far, right, near)
    assert checked["layers_checked"] == 2 and checked["relative_error"] == pytest.approx(0.9)
    with pytest.raises(Exception, match="keys of layer 1"):
        decode.check(case, 4, decode.ROUNDING[torch.float32], 50, [far[0], far[4], *far[2:]], right, near)
    with pytest.raises(Exception, match="logits .* aren't finite"):
        decode.check(case, 4, decode.ROUNDING[torch.float32], 50, [*far[:4], far[4] * torch.nan], right, near)


def test_how_far_a_rounding_leads():
    """Noise in the embeddings moves logits about as much, where it moves no token, and leaves the cache as it was."""
    model, _, case, cache, token = small_bench("flat")
    before = cache.layers[0].keys.clone()
    exact, same, nudged, far = (
        decode.expected_results(model, case, cache, [50], token, {}, nudge)[0][-1] for nudge in (0.0, 0.0, 1e-6, 0.3)
    )
    assert torch.equal(exact, same) and 0 < relative_error(nudged, exact) < 1e-4 < relative_error(far, exact)
    assert torch.equal(cache.layers[0].keys, before)


def test_what_cannot_fit_is_refused_with_the_bytes(fails):
    model = ("--model", "random:llama-2-7b", "--layers", 2, "--context", 130000, "--batch", 1024)
    code, _, error = fails("bench", "decode", *model)
    assert code == 2 and re.search(r"needs [\d,]{16,} bytes \(weights [\d,]+, KV cache [\d,]+, .* are free", error)
    code, _, error = fails("bench", "kernels", "--context", 10**9)
    assert code == 2 and "bytes" in error
    code, _, error = fails("bench", "kernels", "--heads", 10, "--kv-heads", 4)
    assert code == 2 and "10 query heads can't share 4 kv heads" in error


@pytest.mark.parametrize("share", ["query_head", "kv_head", "layer"])
def test_kernels_are_checked_and_timed(share):
    size = kernels.Size(**{**vars(SIZE), "share": share})
    records = kernels.run_size(size, DEVICE, torch.float32, rate=1e9)
    by_name = {one["op"]: one for one in records}
    assert {"dense", "dense, no mask", "select", "select, no mask", "sparse"} < set(by_name)
    assert by_name["dense"]["bytes"] == 2 * 2 * 2 * 300 * 32 * 4
    sets = {"query_head": 10, "kv_head": 2, "layer": 2}[share]
    assert by_name["sparse"]["bytes"] == 2 * 2 * sets * 64 * 32 * 4


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    full = kernels.ops.full_attention
    monkeypatch.setattr(kernels.ops, "full_attention", lambda *args: full(*args) * 1.01)
    with pytest.raises(Exception, match="dense is off by 0.01"):
        kernels.run_size(SIZE, DEVICE, torch.float32, rate=1e9)


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    run_size, measured = kernels.run_size, []

    def interrupted(*args):
        if measured:
            raise KeyboardInterrupt
        measured.append(run_size(*args))
        return measured[0]

    monkeypatch.setattr(kernels, "run_size", interrupted)
    sizes = ["--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--budget", 32, "--context", 200, "--context", 300]
    command = ["bench", "kernels", *sizes, "--out", tmp_path]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 130 and "wrote" in result.stdout
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert record["interrupted"] and record["kernels"] == measured[0] and record["versions"]


def test_kernels_command(tmp_path):
    sizes = ("--heads", 14, "--kv-heads", 2, "--head-dim", 16, "--context", 100, "--context", 150, "--budget", 24)
    printed = quick(
        "bench", "kernels", *sizes, "--budget", 48, "--share", "kv_head", "--share", "layer", "--out", tmp_path
    )
    at = [
        (one["context"], one["budget"], one["share"]) for one in result_of(tmp_path)["kernels"] if one["op"] == "select"
    ]
    assert at == [(100, 24, "kv_head"), (150, 24, "kv_head"), (150, 48, "kv_head"), (150, 24, "layer")]
    assert "| select | 1 | 14/2 | 150 | 48 | kv_head |" in printed


def test_figures(tmp_path):
    options = ("--model", "random:llama", "--layers", 4, "--context", 100, "--context", 200, "--steps", 4)
    quick("bench", "figures", *options, "--budget", 32, "--out", tmp_path)
    result = result_of(tmp_path)
    assert [(one["name"], one["context"]) for one in result["decode"]] == [
        (name, context) for name in ("tidal: full", "tidal: tidal 32", "tidal: quest 32") for context in (100, 200)
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_attention_shares():
    records = [
        {"op": op, "context": 10, "budget": 4, "us": {"median": us}}
        for op, us in (("dense", 100.0), ("select", 130.0), ("sparse", 10.0), ("by pages, sparse output", 40.0))
    ]
    shares = figures.attention_shares(records, layers=32)
    assert shares == {(10, 4): pytest.approx((2 * 100 + 2 * 130 + 28 * 10) / 3200)}
    shares = figures.attention_shares(records, layers=64, method="quest")
    assert shares == {(10, 4): pytest.approx((2 * 100 + 62 * 40) / 6400)}


def test_readmes_have_the_tables_of_the_committed_results():
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import tables as written

    for file in written.READMES:
        assert written.with_tables(file.read_text()) == file.read_text(), "run python benchmarks/tables.py"
    assert all(one["commit"] != "unknown" for kind in ("decode", "kernels") for one in written.results(kind).values())


def test_a_deeper_model_rounds_more_often():
    shallow, deep = (decode.tolerance(Variant("eager"), layers, 1.5e-2) for layers in (16, 64))
    assert shallow == pytest.approx(0.06) and deep == pytest.approx(0.12)


def test_small_numbers():
    assert summary([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0}
    spread = summary([float(number) for number in range(101)])
    assert spread == {"median": 50.0, "p10": 10.0, "p90": 90.0}
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert fitting(32, 4, 64) == {"budget": 32, "sinks": 4, "recent": 16}
    assert fitting(1024, 4, 64) == {"budget": 1024, "sinks": 4, "recent": 64}
    assert markdown.markdown(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"

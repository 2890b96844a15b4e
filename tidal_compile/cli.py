"""The command line: `tidal-compile run | explain | policy | bench`."""

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import presets, report
from .errors import TidalError
from .models import FORMS
from .policy import Policy, is_preset, load_any, resolve, shipped

app = typer.Typer(
    help="Long-context decoding with sparse attention, by policy file: a torch.compile backend and its tools.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
policies = typer.Typer(help="List, show, check and start policy files.", no_args_is_help=True)
app.add_typer(policies, name="policy")
bench = typer.Typer(help="Measure latency beside the baselines; every output is checked first.", no_args_is_help=True)
app.add_typer(bench, name="bench")

out = Console()
err = Console(stderr=True)

ModelOption = Annotated[str, typer.Option("--model", help=f"{FORMS}.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
BudgetOption = Annotated[int | None, typer.Option(help="Tokens a selection keeps, in place of the policy's default.")]


class Baseline(StrEnum):
    """What the policies are compared with."""

    eager = "eager"
    inductor = "inductor"
    none = "none"


class StepBaseline(StrEnum):
    """What `bench decode` compares with: `inductor` is its default mode, `flash` dense at its best (see its help)."""

    eager = "eager"
    inductor = "inductor"
    reduce_overhead = "reduce-overhead"
    flash = "flash"
    none = "none"


class Share(StrEnum):
    """Who shares a token set."""

    kv_head = "kv_head"
    query_head = "query_head"
    layer = "layer"


class DType(StrEnum):
    """Number format of weights and cache."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
DTypeOption = Annotated[DType, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")]


@app.command()
def run(
    model: ModelOption = "smollm2",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Preset, shipped name or file; repeat to compare several.",
            show_default="full, tidal and, if one is shipped for the model, its file",
        ),
    ] = None,
    baseline: Annotated[list[Baseline], typer.Option(help="Repeat for several; `none` for none.")] = (
        Baseline.eager, Baseline.inductor,
    ),
    context: Annotated[int, typer.Option(min=64, help="Tokens of the prompt, about.")] = 4000,
    new_tokens: Annotated[int, typer.Option(min=8, help="Tokens to decode with each variant.")] = 32,
    depth: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where the pass key stands: 0 start, 1 end.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Chooses the pass key.")] = 0,
    budget: BudgetOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    results: Annotated[Path, typer.Option("--out", help="Folder for the JSON and PNG results.")] = Path("out"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Decode one long pass-key prompt under several policies; compare answers and latency with eager and Inductor.

    The prompt is prefilled densely; the answer is decoded greedily, every variant from the same cache.
    """
    import torch
    from transformers.utils import logging as hf_logging

    from .backend import Options
    from .evaluate.tasks import make_sample
    from .models import is_random, load_config, load_model, load_tokenizer
    from .policy import shipped
    from .run import Variant, measure, prefill, random_cache, rewind, windows

    hf_logging.disable_progress_bar()  # its stages are shown here
    device, number = _where(device, dtype)
    report.need_matplotlib()
    _make_folder(results)
    policy = policy or ["full", "tidal", *({model} & set(shipped()))]
    # A bad name or file is an error before the model is loaded
    asked = [Options.parse({"policy": name, **_overrides(budget)}) for name in policy]
    _check_positions(load_config(model), model, context, "--new-tokens", new_tokens)

    with _progress() as progress:

        def stage(title: str, steps: int) -> Callable[[], None]:
            return _stage(progress, title, steps)

        done = stage(f"load {model}", 1)
        net, tokenizer = load_model(model, device, number), load_tokenizer(model)
        variants = [Variant(kind.value, kind.value) for kind in baseline if kind != Baseline.none]
        variants += _policy_variants(net, asked)
        done()
        if is_random(model):
            key, ids = None, torch.randint(net.config.vocab_size, (1, context), generator=torch.manual_seed(seed))
        else:
            sample = make_sample("passkey", tokenizer, "", context, depth, seed)
            key, ids = sample.answers[0], torch.tensor([sample.context + sample.question])
        ids = ids.to(device)
        length = ids.shape[1] - 1
        if is_random(model):
            cache = random_cache(net, length, length + new_tokens)
        else:
            advance = stage("prefill", -(-length // 1024))
            for cache in prefill(net, ids[:, :-1], length + new_tokens):  # noqa: B007  the last one is complete
                advance()
        measured, saved = [], windows(cache)
        for variant in variants:
            advance = stage(f"{variant.name} (compile, decode)", new_tokens)
            rewind(cache, length, saved)
            measured.append(measure(net, variant, cache, ids[:, -1:], length, new_tokens, tokenizer, advance))

    record = report.run_record(
        measured, model=model, key=key, context=length + 1, dtype=str(number).removeprefix("torch.")
    )
    record |= _provenance(device)
    name = _file_name("run", Path(model).name, record["device"])
    files = [results / f"{name}.json", results / f"{name}.png"]
    files[0].write_text(json.dumps(record, indent=1) + "\n")
    report.run_chart(record, files[1])
    if as_json:
        print(json.dumps(record))
        return
    for variant in variants:
        if variant.policy is not None:
            out.print(report.roles_line(variant.policy), markup=False, highlight=False)
    if key is None:
        out.print("random weights: the latency means something, the answers don't")
    out.print(report.run_table(record))
    for file in files:
        out.print(f"wrote {file}", markup=False, highlight=False)


@app.command()
def explain(
    model: ModelOption,
    policy: Annotated[str, typer.Option(help="Preset, shipped name or file.")] = "tidal",
    budget: BudgetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show, for every attention call of a model, what a policy makes of it, or why it is left alone. Runs no kernel."""
    from .explain import explain as explain_model
    from .models import load_model

    with _progress() as progress:
        progress.add_task(f"trace one decode step of {model}", total=None)
        explanation = explain_model(load_model(model, device="meta"), policy, **_overrides(budget))
    if as_json:
        print(json.dumps(explanation.to_dict()))
        return
    report.print_explanation(out, explanation)


@app.command()
def calibrate(
    model: ModelOption = "smollm2",
    text: Annotated[
        list[Path] | None, typer.Option(help="Text files; repeat.", show_default="the King James text, extra `eval`")
    ] = None,
    selections: Annotated[
        int | None, typer.Option(min=1, help="Layers that select.", show_default="3, without a quality to reach")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Or: the KL to the dense model to reach, in nats.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Or: how often the likeliest token must stay the same.")
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Tokens that a selection keeps.")] = 1024,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens, always kept.")] = 4,
    recent: Annotated[int, typer.Option(min=0, help="Last tokens, always kept.")] = 32,
    share: Annotated[Share, typer.Option(help="Who shares a token set.")] = Share.kv_head,
    context: Annotated[int, typer.Option(min=64, help="Tokens of a context, about.")] = 4096,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts; half hide their facts in filler.")] = 6,
    dense: Annotated[int, typer.Option(min=0, help="Layers before the first selection, at most.")] = 2,
    weight: Annotated[
        list[str] | None, typer.Option(help="What counts: kind=number of text, answer, copy.", show_default="1 each")
    ] = None,
    tries: Annotated[int, typer.Option(min=1, help="Policies tried for a number of selections, at most.")] = 80,
    seed: Annotated[int, typer.Option(help="Chooses the hidden facts.")] = 0,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    file: Annotated[
        Path, typer.Option("--out", help="The policy file; scores go beside it, and a rerun goes on.")
    ] = Path("tidal_policy.yaml"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Find the selection layers for a model: those whose answers stay closest to the dense model's on your text.

    Ctrl-C ends the search and writes the best policy so far; the same command again goes on from there.
    """
    from transformers.utils import logging as hf_logging

    from .calibrate import Progress as Step
    from .calibrate import calibrate as run_calibration
    from .calibrate.tasks import TEXT_TOKENS
    from .models import is_random, load_config, load_model, load_tokenizer
    from .text import default_text

    hf_logging.disable_progress_bar()
    device, number = _where(device, dtype)
    if is_random(model):
        raise TidalError(f"calibrate: {model} has random weights, which have nothing to find")
    _check_positions(load_config(model), model, context, "blocks of", TEXT_TOKENS)
    weights = _weights(weight or [])
    goal = {"selections": selections, "max_kl": max_kl, "min_agreement": min_agreement}
    if not any(value is not None for value in goal.values()):
        goal["selections"] = 3
    corpus = default_text() if not text else "\n".join(_read_text(path) for path in text)
    with _progress() as progress:
        done = _stage(progress, f"load {model}", 1)
        net, tokenizer = load_model(model, device, number), load_tokenizer(model)
        done()
        tasks: dict[str, Any] = {}

        def show(step: Step) -> None:
            if step.stage not in tasks:
                if not err.is_terminal:
                    err.print(f"{step.stage} ...", markup=False, highlight=False)
                tasks[step.stage] = progress.add_task(step.stage, total=step.total)
            best = "" if step.best is None else f": best {list(step.best.selections)}, loss {step.best.score.loss:.4f}"
            progress.update(tasks[step.stage], completed=step.done, description=step.stage + best)

        policy = run_calibration(
            net, tokenizer, corpus, **goal, budget=budget, sinks=sinks, recent=recent, share=share.value,
            context=context, contexts=contexts, dense=dense, weights=weights, tries=tries, seed=seed, name=file.stem,
            memory=file.with_suffix(".scores.json"), report=show,
        )  # fmt: skip
    try:
        file.write_text(policy.to_yaml())
    except OSError as error:
        raise TidalError(f"--out {file}: can't write: {error.strerror}") from None
    if as_json:
        print(json.dumps(policy.to_dict()))
        return
    out.print(report.calibration_table(policy))
    out.print(f"wrote {file}: {report.roles_line(policy)}", markup=False, highlight=False, soft_wrap=True)


def _weights(given: list[str]) -> dict[str, float]:
    """`kind=number` options as a mapping."""
    weights = {}
    for one in given:
        kind, _, value = one.partition("=")
        try:
            weights[kind] = float(value)
        except ValueError:
            raise TidalError(f"--weight {one!r}: give kind=number, such as answer=2") from None
    return weights


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TidalError(f"--text {path}: can't read: {error}") from None


@policies.command("list")
def list_policies(as_json: JsonOption = False) -> None:
    """List presets, which fit any model, and shipped policy files, each made for one."""
    rows = [(name, "preset", (make.__doc__ or "").partition("\n")[0]) for name, make in presets.PRESETS.items()]
    rows += [(name, "file", Policy.load(path).description) for name, path in shipped().items()]
    if as_json:
        print(json.dumps([dict(zip(("name", "kind", "description"), row, strict=True)) for row in rows]))
        return
    out.print(report.table(("name", "kind", "description"), rows))


NumLayersOption = Annotated[int | None, typer.Option(min=1, help="Layers of the model that a preset is made for.")]
ForModelOption = Annotated[str | None, typer.Option("--model", help=f"The model that it is for: {FORMS}.")]


@policies.command("show")
def show(
    policy: str, num_layers: NumLayersOption = None, model: ForModelOption = None, budget: BudgetOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Print a policy as a file, with the role of each layer as a comment."""
    found = _find(policy, num_layers, model, budget)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print(f"# {report.roles_line(found)}\n{found.to_yaml()}", end="")  # rich would wrap lines


@policies.command("validate")
def validate(policy: str, model: ForModelOption = None, as_json: JsonOption = False) -> None:
    """Check a policy file: its form and, with --model, whether it fits. Exit code 2 and the reason if not."""
    from .explain import explain as explain_model
    from .models import load_model

    if model is None and is_preset(policy):
        raise TidalError(f"preset {policy!r} fits any model, or say which with --model")
    if model is None:
        found = load_any(policy)
    else:
        explanation = explain_model(load_model(model, device="meta"), policy)
        if explanation.problems:
            raise TidalError(f"{policy} does not fit {model}: {'; '.join(explanation.problems)}")
        found = explanation.policy
    if as_json:
        print(json.dumps({"valid": True, "name": found.name, "num_layers": found.num_layers}))
        return
    out.print(f"{policy}: valid. {report.roles_line(found)}", markup=False, highlight=False, soft_wrap=True)


@policies.command("init")
def init(
    file: Path,
    preset: Annotated[str, typer.Option(help="The preset to start from.")] = "tidal",
    num_layers: NumLayersOption = None,
    model: ForModelOption = None,
    budget: BudgetOption = None,
    force: Annotated[bool, typer.Option(help="Overwrite the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a policy file to edit, from a preset, for --model or --num-layers."""
    found = _find(preset, num_layers, model, budget)
    if file.exists() and not force:
        raise TidalError(f"{file} exists; --force overwrites it")
    try:
        file.write_text(found.to_yaml())
    except OSError as error:
        raise TidalError(f"{file}: can't write: {error.strerror}") from None
    if as_json:
        print(json.dumps({"file": str(file), "policy": found.to_dict()}))
        return
    out.print(f"wrote {file}: {report.roles_line(found)}", markup=False, highlight=False)


ResultsOption = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
ContextsOption = Annotated[list[int], typer.Option("--context", min=2, help="Live tokens; repeat for several.")]
BatchesOption = Annotated[list[int], typer.Option("--batch", min=1, help="Sequences; repeat for several.")]
NameOption = Annotated[str, typer.Option(help="Part of the result's file name.")]
LayersOption = Annotated[int | None, typer.Option(min=1, help="Another depth, for random weights.")]


@bench.command("decode")
def bench_decode(
    model: Annotated[str, typer.Option(help=f"Weights don't matter: {FORMS}.")] = "random:llama-3.1-8b",
    policy: Annotated[list[str], typer.Option(help="Preset, shipped name or file; repeat.")] = ("full", "tidal"),
    baseline: Annotated[
        list[StepBaseline],
        typer.Option(
            help="Repeat; `none` for none. `flash`: reduce-overhead, SDPA flash on the live cache without a mask."
        ),
    ] = (StepBaseline.reduce_overhead, StepBaseline.flash),
    context: ContextsOption = (100_000,),
    batch: BatchesOption = (1,),
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Budgets of each sparse policy; repeat.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Steps to time.")] = 50,
    generate: Annotated[int, typer.Option(help="Tokens through model.generate, too, at batch 1; 0: none.")] = 0,
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    name: NameOption = "",
    results: ResultsOption = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Time decode steps under policies beside their baselines: ms, GB/s and the fraction of the policy's byte floor.

    The floor is what a step must read, weights and the policy's share of the KV cache, at the rate of a device copy.
    """
    device, number = _where(device, dtype)
    baselines = [kind.value for kind in baseline if kind != StepBaseline.none]
    result = {"model": model, "layers": layers} | _measure_decode(
        model, _options(policy, budget), baselines, context, batch, steps, generate, layers, device, number
    )
    _finish("decode", result, results, f"{Path(model).name}-{name}", device, as_json)


@bench.command("kernels")
def bench_kernels(
    context: ContextsOption = (10_000, 32_000, 100_000),
    batch: BatchesOption = (1,),
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[list[int], typer.Option(min=1, help="Key/value heads; repeat.")] = (8, 32),
    head_dim: Annotated[int, typer.Option(min=8)] = 128,
    budget: Annotated[list[int], typer.Option(min=1, help="Tokens of a selection; repeat.")] = (1024,),
    share: Annotated[list[Share], typer.Option(help="Who shares a token set; repeat.")] = (Share.kv_head,),
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    name: NameOption = "",
    results: ResultsOption = Path("out"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Time the attention ops beside SDPA, torch.topk and, if installed, FlashInfer: us, GB/s, share of the copy rate.

    Contexts, batches and kv heads are combined at the first budget and share; the others run at the last context.
    """
    from .bench.kernels import sizes

    device, number = _where(device, dtype)
    cases = sizes(context, batch, heads, kv_heads, head_dim, budget, [one.value for one in share])
    _finish("kernels", _measure_kernels(cases, device, number), results, name, device, as_json)


@bench.command("figures")
def bench_figures(
    model: Annotated[str, typer.Option(help="The shape to decode with.")] = "random:llama-2-7b",
    context: ContextsOption = (10_000, 32_000, 100_000),
    budget: Annotated[list[int], typer.Option(min=1, help="Repeat.")] = (32, 128, 512, 1024, 4096),
    steps: Annotated[int, typer.Option(min=4, help="Steps to time.")] = 30,
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    results: ResultsOption = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Draw the TidalDecode paper's Figures 1 (latency of a step) and 2 (of attention) as measured: JSON and PNG."""
    from .bench import figures
    from .bench.kernels import sizes
    from .models import load_config

    device, number = _where(device, dtype)
    report.need_matplotlib()
    config = load_config(model).get_text_config(decoder=True)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    asked = [*_options(["full"], None), *_options(["tidal"], budget)]
    result = {"model": model} | _measure_decode(model, asked, [], context, [1], steps, 0, layers, device, number)
    cases = [size for one in budget for size in sizes(context, [1], heads, [kv_heads], head_dim, [one], ["kv_head"])]
    result |= _measure_kernels(cases, device, number)
    path, result = _finish("figures", result, results, Path(model).name, device, as_json)
    for number, draw in enumerate((figures.draw_latency, figures.draw_attention), 1):
        draw(result, path.with_name(f"{path.stem}-{number}.png"))


def _options(names: list[str], budgets: list[int] | None) -> list:
    """The backend's options for each policy, and for each budget if it is one that chooses tokens."""
    from .backend import Options

    asked = []
    for policy in names:
        for budget in [None] if policy == "full" or not budgets else budgets:
            # What is always kept must fit into a small budget
            kept = {"sinks": budget // 8, "recent": budget // 2} if budget and budget < 128 else {}
            asked.append(Options.parse({"policy": policy, **_overrides(budget), **kept}))
    return asked


def _measure_decode(
    model: str, asked: list, baselines: list[str], contexts: list[int], batches: list[int], steps: int, generate: int,
    layers: int | None, device: str, number: Any,
) -> dict[str, Any]:  # fmt: skip
    """The records of `bench decode`, with progress."""
    import torch
    from transformers.utils import logging as hf_logging

    from .bench import decode
    from .bench.timing import copy_rate
    from .models import load_config, load_model

    hf_logging.disable_progress_bar()
    place = torch.device(device)
    extra = decode.WARM_UP + max(steps, generate + 1)
    shape = decode.read_shape(load_model(model, "meta", number, layers), number)
    cases = decode.cases_of(shape, baselines, asked)
    config = load_config(model)
    for context in contexts:
        _check_positions(config, model, context, "warm-up and --steps", extra)
        for batch in batches:
            decode.need_memory(shape, cases, batch, context + extra, decode.free_memory(place))
    records = []
    with _progress() as progress:
        done = _stage(progress, f"load {model}", 1)
        net, rate = load_model(model, device, number, layers), copy_rate(place)
        done()
        # What we compile reads the live part of any cache; what others do reads all of it, and needs one that fits
        shared = not baselines and decode.keeps_everything(net)
        for batch, group in itertools.product(batches, [contexts] if shared else [[context] for context in contexts]):
            advance = _stage(progress, f"batch {batch}, {', '.join(map(str, group))} tokens", len(cases))
            cache, saved = decode.make_cache(net, batch, max(group) - 1, max(group) + extra)
            token = torch.randint(net.config.vocab_size, (batch, 1), device=place)
            lengths = [context - 1 for context in group]
            for case in cases:
                found = list(decode.run_case(net, shape, case, cache, lengths, token, steps, rate, saved))[::-1]
                for record in found:
                    record["slots"] = max(group) + extra
                    if generate and batch == 1 and case.name not in ("inductor", "flash"):
                        length = record["context"] - 1
                        record["generate_ms"] = decode.generate_ms(net, case, cache, length, token, generate, saved)
                records += found
                advance()
            del cache, saved
    return {"copy_bytes_per_s": rate, "dtype": str(number).removeprefix("torch."), "decode": records}


def _measure_kernels(cases: list, device: str, number: Any) -> dict[str, Any]:
    """The records of `bench kernels`, with progress."""
    import torch

    from .bench import decode, kernels
    from .bench.timing import copy_rate

    place = torch.device(device)
    for size in cases:
        kernels.need_memory(size, place, decode.free_memory(place))
    rate, records = copy_rate(place), []
    with _progress() as progress:
        advance = _stage(progress, "kernels", len(cases))
        for size in cases:
            records += kernels.run_size(size, place, number, rate)
            advance()
    return {"copy_bytes_per_s": rate, "dtype": str(number).removeprefix("torch."), "kernels": records}


def _finish(
    kind: str, result: dict[str, Any], folder: Path, name: str, device: str, as_json: bool
) -> tuple[Path, dict[str, Any]]:
    """Write a result with its provenance, and print it; the file, and what is in it."""
    from .bench import tables

    _make_folder(folder)
    result = {"kind": kind, **result, **_provenance(device)}
    path = folder / f"{_file_name(kind, name, result['device'])}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        print(json.dumps(result))
        return path, result
    for key, columns, rows in (
        ("decode", tables.DECODE_COLUMNS, tables.decode_rows),
        ("kernels", tables.KERNEL_COLUMNS, tables.kernel_rows),
    ):
        if key in result:
            print(tables.markdown(columns, rows(result)))
    out.print(tables.about(result), markup=False, highlight=False, soft_wrap=True)
    out.print(f"wrote {path}", markup=False, highlight=False)
    return path, result


def _where(device: str, dtype: DType) -> tuple[str, Any]:
    """The device and number format that are meant."""
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    _check_device(device)
    return device, getattr(torch, ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype.value)


def _check_positions(config: Any, model: str, context: int, option: str, more: int) -> None:
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and context + more > positions:
        raise TidalError(f"--context {context} + {option} {more}: {model} has {positions} positions")


def _stage(progress: Progress, title: str, steps: int) -> Callable[[], None]:
    """A new bar; returns what moves it on."""
    if not err.is_terminal:  # a log shows no bars: a line a stage
        err.print(f"{title} ...", markup=False, highlight=False)
    task = progress.add_task(title, total=steps)
    return lambda: progress.advance(task)


def _file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-").lower()


def _find(policy: str, num_layers: int | None, model: str | None, budget: int | None) -> Policy:
    """A policy by name or file, for a model if one is named."""
    from .explain import decode_calls
    from .models import load_model
    from .passes.match import policy_layers

    overrides = _overrides(budget)
    if model is not None:
        calls, num_layers = decode_calls(load_model(model, device="meta"))
        return resolve(policy, num_layers, attention_layers=policy_layers(calls), model=model, **overrides)
    if num_layers is not None:
        return resolve(policy, num_layers, **overrides)
    if is_preset(policy):
        raise TidalError(f"preset {policy!r} fits any model: say which with --model or --num-layers")
    found = load_any(policy)
    return found.with_defaults(**overrides) if overrides else found


def _overrides(budget: int | None) -> dict[str, Any]:
    return {} if budget is None else {"budget": budget}


def _policy_variants(model: Any, asked: list) -> list:
    """A `tidal` variant of the model for each `Options`; raises if the model can't follow one."""
    from .backend import followed
    from .explain import decode_calls
    from .run import Variant

    calls, num_layers = decode_calls(model)
    variants = []
    for options in asked:
        found, plan = followed(calls, num_layers, options)
        variants.append(Variant(f"tidal: {Path(options.policy).stem}", "tidal", found, plan))
    return variants


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise TidalError(f"--device {device!r}: valid devices are auto, cpu and cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise TidalError("--device cuda: no CUDA device is available; valid here: auto, cpu")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TidalError(f"--out {folder}: can't make this folder: {error.strerror}") from None


def _progress() -> Progress:
    """Progress on standard error, so that --json leaves standard output clean."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=err)


def _provenance(device: str) -> dict[str, Any]:
    """Where and with what a result was made."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    # Where a result was written is no part of it
    command = re.sub(r" --out[ =]\S+", "", " ".join(["tidal-compile", *sys.argv[1:]]))
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions("torch", "triton", "transformers")},
        "commit": _commit(),
        "command": command,
        "date": datetime.date.today().isoformat(),
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a CPU build of torch has no triton
            found[package] = importlib.metadata.version(package)
    return found


def _commit() -> str:
    """The commit of the checkout that runs, unless TIDAL_COMPILE_COMMIT says what a copy of it was made from."""
    if named := os.environ.get("TIDAL_COMPILE_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if names:
            return f"{names[0].strip()} ({os.cpu_count()} cores)"
    return platform.machine()


def main() -> None:
    """Entry point: what tidal_compile refuses ends with one line and exit code 2, not with a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of a GGUF's conversion, beside ours
    warnings.filterwarnings("ignore", module="torch")
    try:
        app()
    except TidalError as error:
        err.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

"""The command line: `tidal-compile run | explain | policy`."""

import contextlib
import datetime
import json
import os
import platform
import re
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
from .errors import TidalError, UnsupportedModelError
from .models import FORMS
from .policy import Policy, is_preset, load_any, resolve, shipped

app = typer.Typer(
    help="Long-context decoding with sparse attention, by policy file: a torch.compile backend and its tools.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
policies = typer.Typer(help="List, show, check and start policy files.", no_args_is_help=True)
app.add_typer(policies, name="policy")

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


class DType(StrEnum):
    """Number format of weights and cache."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


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
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")] = DType.auto,
    results: Annotated[Path, typer.Option("--out", help="Folder for the JSON and PNG results.")] = Path("out"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Decode one long pass-key prompt under several policies; compare answers and latency with eager and Inductor.

    The prompt is prefilled densely; the answer is decoded greedily, every variant from the same cache.
    """
    import torch
    from transformers.utils import logging as hf_logging

    from .backend import Options
    from .evaluate.passkey import passkey_prompt
    from .models import is_random, load_config, load_model, load_tokenizer
    from .policy import shipped
    from .run import Variant, measure, prefill, random_cache, rewind, windows

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    hf_logging.disable_progress_bar()  # its stages are shown here
    _check_device(device)
    report.need_matplotlib()
    _make_folder(results)
    number = getattr(torch, ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype.value)
    policy = policy or ["full", "tidal", *({model} & set(shipped()))]
    # A bad name or file is an error before the model is loaded
    asked = [Options.parse({"policy": name, **_overrides(budget)}) for name in policy]
    positions = getattr(load_config(model).get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and context + new_tokens > positions:
        raise TidalError(f"--context {context} + --new-tokens {new_tokens}: {model} has {positions} positions")

    with _progress() as progress:

        def stage(title: str, steps: int) -> Callable[[], None]:
            if not err.is_terminal:  # a log shows no bars: a line a stage
                err.print(f"{title} ...", markup=False, highlight=False)
            task = progress.add_task(title, total=steps)
            return lambda: progress.advance(task)

        done = stage(f"load {model}", 1)
        net, tokenizer = load_model(model, device, number), load_tokenizer(model)
        variants = [Variant(kind.value, kind.value) for kind in baseline if kind != Baseline.none]
        variants += _policy_variants(net, asked)
        done()
        if is_random(model):
            key, ids = None, torch.randint(net.config.vocab_size, (1, context), generator=torch.manual_seed(seed))
        else:
            prompt = passkey_prompt(tokenizer, context, depth, seed)
            key, ids = prompt.key, prompt.input_ids
        ids = ids.to(device)
        length = ids.shape[1] - 1
        if is_random(model):
            cache = random_cache(net, length, length + new_tokens)
        else:
            advance = stage("prefill", -(-length // 1024))
            for cache in prefill(net, ids, length + new_tokens):  # noqa: B007  the last one is complete
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
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"run-{Path(model).name}-{record['device']}").strip("-").lower()
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
    from .backend import lay_over
    from .explain import decode_calls
    from .run import Variant

    calls, num_layers = decode_calls(model)
    variants = []
    for options in asked:
        found, plan = lay_over(calls, num_layers, options)
        if plan.problems:
            raise UnsupportedModelError(f"the model can't follow policy {options.policy!r}: {'; '.join(plan.problems)}")
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
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    # Where a result was written is no part of it
    command = re.sub(r" --out[ =]\S+", "", " ".join(["tidal-compile", *sys.argv[1:]]))
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": command,
        "date": datetime.date.today().isoformat(),
    }


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

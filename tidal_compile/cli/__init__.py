"""The command line: `tidal-compile run | explain | calibrate | eval | policy | bench`, a module each."""

import json
import os
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import report
from ..errors import TidalError
from ..provenance import provenance
from . import bench, calibrate, evaluate, policy
from .common import (
    BudgetOption,
    DeviceOption,
    DType,
    DTypeOption,
    JsonOption,
    ModelOption,
    add_stage,
    budget_override,
    check_positions,
    err,
    file_name,
    load,
    make_folder,
    out,
    show_progress,
    where,
)  # fmt: skip

app = typer.Typer(
    help="Long-context decoding with sparse attention, by policy file: a torch.compile backend and its tools.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip


class Baseline(StrEnum):
    """What the policies are compared with."""

    eager = "eager"
    inductor = "inductor"
    none = "none"


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

    from ..backend import Options
    from ..evaluate.tasks import make_sample
    from ..models import load_config
    from ..shapes import is_random
    from ..policy import shipped
    from ..run import Variant, measure, prefill, random_cache, rewind, windows

    hf_logging.disable_progress_bar()  # its stages are shown here
    device, number = where(device, dtype)
    report.need_matplotlib()
    make_folder(results)
    policy = policy or ["full", "tidal", *({model} & set(shipped()))]
    # A bad name or file is an error before the model is loaded
    asked = [Options.parse({"policy": name, **budget_override(budget)}) for name in policy]
    check_positions(load_config(model), model, context, "--new-tokens", new_tokens)

    with show_progress() as progress:

        def stage(title: str, steps: int) -> Callable[[], None]:
            return add_stage(progress, title, steps)

        net, tokenizer = load(progress, model, device, number)
        variants = [Variant(kind.value, kind.value) for kind in baseline if kind != Baseline.none]
        variants += _policy_variants(net, asked)
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
    record |= provenance(device)
    name = file_name("run", Path(model).name, record["device"])
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
    from ..explain import explain as explain_model
    from ..models import load_model

    with show_progress() as progress:
        progress.add_task(f"trace one decode step of {model}", total=None)
        explanation = explain_model(load_model(model, device="meta"), policy, **budget_override(budget))
    if as_json:
        print(json.dumps(explanation.to_dict()))
        return
    report.print_explanation(out, explanation)


def _policy_variants(model: Any, asked: list) -> list:
    """A `tidal` variant of the model for each `Options`; raises if the model can't follow one."""
    from ..backend import followed
    from ..explain import decode_calls
    from ..run import Variant

    calls, num_layers = decode_calls(model)
    variants = []
    for options in asked:
        found, plan = followed(calls, num_layers, options)
        variants.append(Variant(f"tidal: {Path(options.policy).stem}", "tidal", found, plan))
    return variants


app.command()(calibrate.calibrate)
app.add_typer(evaluate.app, name="eval")
app.add_typer(policy.app, name="policy")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point: what tidal_compile refuses ends with one line and exit code 2, not with a traceback."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of a GGUF's conversion, beside ours
    _run(app)


def lm_eval() -> None:
    """Entry point `tidal-lm-eval`: the lm-evaluation-harness's own command, with the model class `tidal`."""
    _run(evaluate.run_harness)


def _run(command: Callable[[], None]) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    warnings.filterwarnings("ignore", module="torch")
    try:
        command()
    except TidalError as error:
        err.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None

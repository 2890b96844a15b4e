"""The command line: `tidal-compile run | chat | explain | calibrate | eval | policy | bench`, a module each."""

import json
import os
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__, report
from ..errors import TidalError
from ..provenance import provenance, versions
from . import bench, calibrate, chat, evaluate, policy
from .common import (
    BudgetOption,
    CacheKind,
    CacheOption,
    DeviceOption,
    DType,
    DTypeOption,
    JsonOption,
    ModelOption,
    Weights,
    WeightsOption,
    add_stage,
    budget_override,
    check_positions,
    check_weights,
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
    invoke_without_command=True, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
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
    context: Annotated[int, typer.Option(min=64, help="Tokens of a prompt, about.")] = 4000,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts, with other numbers at other depths; the first one is timed.")
    ] = 5,
    new_tokens: Annotated[int, typer.Option(min=8, help="Tokens to decode after the first prompt.")] = 32,
    seed: Annotated[int, typer.Option(help="Chooses the hidden numbers.")] = 0,
    budget: BudgetOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    cache: CacheOption = CacheKind.auto,
    weights: WeightsOption = Weights.auto,
    tp: Annotated[
        bool, typer.Option("--tp", help="Divide the model among the processes that torchrun started.")
    ] = False,
    results: Annotated[Path, typer.Option("--out", help="Folder for the JSON and PNG results.")] = Path("out"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Decode a few long prompts under several policies; compare answers and latency with eager and Inductor.

    A prompt hides a number in filler text and asks for it. It is prefilled densely, and the answer is decoded greedily,
    by every variant from the same cache.
    """
    import torch
    from transformers.utils import logging as hf_logging

    from ..backend import Options
    from ..evaluate.tasks import FILLER, make_sample
    from ..models import load_config
    from ..policy import shipped
    from ..ranks import join
    from ..run import Prompt, measure, prefill, random_cache, windows
    from ..shapes import is_random
    from ..variant import Variant

    hf_logging.disable_progress_bar()  # its stages are shown here
    device, number = where(device, dtype)
    check_weights(weights, number)
    report.need_matplotlib()
    rank, ranks = 0, 1
    if tp:
        device, rank, ranks = join(device)
        out.quiet = err.quiet = rank > 0
    make_folder(results)
    policy = policy or ["full", "tidal", *({model} & set(shipped()))]
    # A bad name or file is an error before the model is loaded
    asked = [Options.parse({"policy": name, **budget_override(budget)}) for name in policy]
    check_positions(load_config(model), model, context, "--new-tokens", new_tokens)

    with show_progress() as progress:

        def stage(title: str, steps: int) -> Callable[[], None]:
            return add_stage(progress, title, steps)

        net, tokenizer = load(progress, model, device, number, ranks, weights)
        variants = [Variant(kind.value) for kind in baseline if kind != Baseline.none]
        variants += _policy_variants(net, asked)
        made: list[Prompt] = []
        if is_random(model):
            ids = torch.randint(net.config.vocab_size, (1, context), generator=torch.manual_seed(seed)).to(device)
            filled = random_cache(net, context - 1, context + new_tokens, kind=cache.value)
            made.append(Prompt(ids[:, -1:], context, filled, windows(filled), None))
        for place in [] if is_random(model) else range(prompts):
            sample = make_sample("needle", tokenizer, FILLER, context, (place + 0.5) / prompts, seed + place)
            ids = torch.tensor([sample.context + sample.question], device=device)
            advance = stage(f"prefill prompt {place + 1} of {prompts}", -(-ids.shape[1] // 1024))
            # All caches have one size, or the step would be compiled anew for each prompt
            parts = prefill(net, ids[:, :-1], context + new_tokens, kind=cache.value)
            for filled in parts:  # noqa: B007  the last one is complete
                advance()
            made.append(Prompt(ids[:, -1:], ids.shape[1], filled, windows(filled), sample.answers[0]))
        measured = []
        for variant in variants:
            advance = stage(f"{variant.name} (compile, decode)", new_tokens + len(made) - 1)
            torch._dynamo.reset()  # guards of other variants on the same forward would only slow this one down
            measured.append(measure(net, variant, made, new_tokens, tokenizer, advance))

    record = report.run_record(
        measured, model=model, prompts=[prompt.answer for prompt in made if prompt.answer],
        context=made[0].length, dtype=str(number).removeprefix("torch."),
    )  # fmt: skip
    record |= provenance(device) | {"ranks": ranks, "cache": cache.value, "weights": weights.value}
    if rank:
        return
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
    if not record["prompts"]:
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
    from ..variant import Variant

    calls, num_layers = decode_calls(model)
    variants = []
    for options in asked:
        found, plan = followed(calls, num_layers, options)
        variants.append(Variant(f"tidal: {Path(options.policy).stem}", found, plan))
    return variants


app.command()(chat.chat)
app.command()(calibrate.calibrate)
app.add_typer(evaluate.app, name="eval")
app.add_typer(policy.app, name="policy")
app.add_typer(bench.app, name="bench")


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version, and that of what it runs on.")] = False,
) -> None:
    """Options of the command itself."""
    if version:
        packages = ", ".join(f"{name} {number}" for name, number in versions("torch", "triton", "transformers").items())
        print(f"tidal-compile {__version__} ({packages})")
        raise typer.Exit


def main() -> None:
    """The command: what tidal_compile refuses ends with one line and exit code 2, an interrupt with one and 130."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of a GGUF's conversion, beside ours
    _run(app)


def lm_eval() -> None:
    """`tidal-lm-eval`: the lm-evaluation-harness's own command, with the model class `tidal`."""
    _run(evaluate.run_harness)


def _run(command: Callable[[], None]) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    warnings.filterwarnings("ignore", module="torch|transformers")
    try:
        command()
    except TidalError as error:
        err.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None

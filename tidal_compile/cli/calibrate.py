"""The command `tidal-compile calibrate`, which finds the selection layers for a model."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import report
from ..errors import TidalError
from ..provenance import provenance
from ..settings import CALIBRATION as DEFAULT
from ..settings import CalibrationSettings
from .common import (
    DeviceOption,
    DType,
    DTypeOption,
    JsonOption,
    ModelOption,
    check_positions,
    err,
    load,
    make_folder,
    out,
    read_corpus,
    show_progress,
    where,
)  # fmt: skip


class CalibratedOutput(StrEnum):
    """What selections return; `auto` is `sparse` where that costs no quality, otherwise `full`."""

    auto = "auto"
    full = "full"
    sparse = "sparse"


class CalibratedMethod(StrEnum):
    """How selections choose; `auto` is the scores of all keys, or bounds of pages, whichever loses less."""

    scores = "scores"
    pages = "pages"
    auto = "auto"


class CalibratedShare(StrEnum):
    """Which heads share a token set; `auto` is `kv_head` or `layer`, whichever loses less."""

    auto = "auto"
    kv_head = "kv_head"
    query_head = "query_head"
    layer = "layer"


def calibrate(
    model: ModelOption = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file; repeat for several.", show_default="the King James text, extra `eval`"),
    ] = None,
    selections: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Number of layers that select; repeat for several.",
            show_default="3, or a third of a shallow model's layers, without a quality to reach",
        ),
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Instead of --selections: the KL to reach, in nats.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Or: how often the likeliest token must stay the same, 0 to 1.")
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens a selection keeps; repeat for several.", show_default="1024")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="How many of the first tokens are always kept.")] = DEFAULT.sinks,
    recent: Annotated[int, typer.Option(min=0, help="How many of the last tokens are always kept.")] = DEFAULT.recent,
    share: Annotated[
        CalibratedShare, typer.Option(help="Who shares a token set; auto: kv_head or layer, whichever loses less.")
    ] = CalibratedShare[DEFAULT.share],
    output: Annotated[
        CalibratedOutput,
        typer.Option(help="What selections return; auto: sparse attention where that costs no quality, else full."),
    ] = CalibratedOutput[DEFAULT.output],
    by: Annotated[
        CalibratedMethod,
        typer.Option(help="How selections choose: by all keys, bounds of pages (size and `keep` are found) or auto."),
    ] = CalibratedMethod[DEFAULT.by],
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="K,L", help="Layers may also sample by L hashes of K bits, where that loses less than reuse.",
            show_default="none",
        ),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of weights and cache that a step may read.", show_default="any")
    ] = None,
    max_bytes_at: Annotated[
        int | None, typer.Option(min=1, help="The live tokens at which it may.", show_default="--context")
    ] = None,
    vary_budgets: Annotated[
        bool, typer.Option(help="Also try another budget for each selection, with as many tokens in all.")
    ] = False,
    context: Annotated[int, typer.Option(min=64, help="Tokens of each context, about.")] = DEFAULT.context,
    contexts: Annotated[
        int, typer.Option(min=1, help="Number of contexts; half hide their facts in filler.")
    ] = DEFAULT.contexts,
    dense: Annotated[
        int | None,
        typer.Option(
            min=0, help="How many layers may stay dense before the first selection.",
            show_default="2, or an eighth of a shallow model's layers",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="kind=number: the weight of text, answer or copy; repeat.", show_default="1 each"),
    ] = None,
    tries: Annotated[
        int, typer.Option(min=1, help="Policies to try for each number of selections, before refining the best one.")
    ] = DEFAULT.tries,
    seed: Annotated[int, typer.Option(help="The seed that chooses the hidden facts.")] = DEFAULT.seed,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    file: Annotated[
        Path, typer.Option("--out", help="The policy file, YAML or JSON; scores, kept for a rerun, go beside it.")
    ] = Path("tidal_policy.yaml"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Find the selection layers with which a model's predictions on your text stay closest to the dense model's.

    For several budgets or numbers of selections, a policy file is written for each, named by both, and the Pareto curve
    of KL against bytes read, as JSON and PNG. For a quality to reach, the policy that reaches it and reads the fewest
    bytes is written. Ctrl-C ends the search and writes the best policies so far; the same command again continues it.
    """
    from transformers.utils import logging as hf_logging

    from ..calibrate import Goal, calibrate_curve, check_settings
    from ..calibrate import calibrate as run_calibration
    from ..calibrate.tasks import TEXT_TOKENS
    from ..models import load_config
    from ..progress import Progress
    from ..shapes import is_random

    hf_logging.disable_progress_bar()
    device, torch_dtype = where(device, dtype)
    if is_random(model):
        raise TidalError(f"calibrate: {model} has random weights, whose predictions say nothing about selections")
    quality = {"max_kl": max_kl, "min_agreement": min_agreement}
    has_quality = any(value is not None for value in quality.values())
    budgets, numbers = budget or [1024], selections or []
    goals = [Goal(number, **quality) for number in numbers or [None]]
    settings = CalibrationSettings(
        context=context, contexts=contexts, dense=dense, sinks=sinks, recent=recent, share=share.value,
        output=output.value, by=by.value, sample=_sizes(sample), max_bytes=max_bytes,
        max_bytes_at=max_bytes_at, vary_budgets=vary_budgets, weights=_weights(weight or []), tries=tries, seed=seed,
    )  # fmt: skip
    check_settings(budgets, settings, goals)
    check_positions(load_config(model), model, context, "blocks of", TEXT_TOKENS)
    several = len(numbers) > 1 or (len(budgets) > 1 and not has_quality)  # policies
    if file.suffix not in (".yaml", ".yml", ".json") or file.is_dir():
        raise TidalError(f"--out {file}: name a file that ends in .yaml, .yml or .json")
    make_folder(file.parent)
    if several:
        report.need_matplotlib()
    corpus = read_corpus(text)
    with show_progress() as progress:
        net, tokenizer = load(progress, model, device, torch_dtype)
        tasks: dict[str, Any] = {}

        def show(step: Progress) -> None:
            if step.stage not in tasks:
                if not err.is_terminal:
                    err.print(f"{step.stage} ...", markup=False, highlight=False)
                tasks[step.stage] = progress.add_task(step.stage, total=step.total)
            best = step.best
            so_far = "" if best is None else f": best {list(best.candidate.selections)}, loss {best.score.loss:.4f}"
            progress.update(tasks[step.stage], completed=step.done, total=step.total, description=step.stage + so_far)

        more = {
            "settings": settings, "name": file.stem, "memory": file.with_name(f"{file.name}.scores.json"),
            "report": show,
        }  # fmt: skip
        if several:
            policies = calibrate_curve(net, tokenizer, corpus, budgets=budgets, selections=numbers or None, **more)
        else:
            goal = {"selections": numbers[0] if numbers else None, **quality}
            budget = budgets if len(budgets) > 1 else budgets[0]
            policies = [run_calibration(net, tokenizer, corpus, budget=budget, **goal, **more)]
    files = [file.with_stem(policy.name) for policy in policies]
    for policy, path in zip(policies, files, strict=True):
        policy.save(path)
    points = report.pareto_points(policies)
    if several:
        files += [file.with_name(f"{file.stem}-pareto.json"), file.with_name(f"{file.stem}-pareto.png")]
        files[-2].write_text(json.dumps({"points": points, **provenance(device)}, indent=1) + "\n")
        report.pareto_chart(points, files[-1])
    missing = len(budgets) * max(1, len(numbers)) - len(policies) if several else 0
    # Fewer than asked for: interrupted between two searches, unless none reads so few bytes
    interrupted = policies[-1].calibration["interrupted"] or (missing > 0 and max_bytes is None)
    if as_json:
        print(json.dumps([policy.to_dict() for policy in policies] if several else policies[0].to_dict()))
        if interrupted:
            raise typer.Exit(130)
        return
    for policy in policies:
        out.print(report.calibration_table(policy))
        out.print(report.roles_line(policy), markup=False, highlight=False, soft_wrap=True)
    if missing and not interrupted:
        out.print(
            f"{missing} of the combinations have no policy that reads at most {max_bytes:,} bytes", highlight=False
        )
    for path in files:
        out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if interrupted:
        out.print(
            "interrupted: these are the best policies so far; the same command continues", markup=False, highlight=False
        )
        raise typer.Exit(130)


def _sizes(option: str | None) -> tuple[int, int] | None:
    """Return K,L as numbers."""
    if option is None:
        return None
    try:
        k, l = map(int, option.split(","))
    except ValueError:
        raise TidalError(f"--sample {option!r}: give the bits and tables, such as 8,75") from None
    return k, l


def _weights(options: list[str]) -> dict[str, float]:
    """Return `kind=number` options as a mapping."""
    weights = {}
    for option in options:
        kind, _, value = option.partition("=")
        try:
            weights[kind] = float(value)
        except ValueError:
            raise TidalError(f"--weight {option!r}: give kind=number, such as answer=2") from None
    return weights

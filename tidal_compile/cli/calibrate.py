"""`tidal-compile calibrate`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import report
from ..errors import TidalError
from ..provenance import provenance
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


class CalibratedShare(StrEnum):
    """Who shares a token set; `auto`: `kv_head` or `layer`, whichever loses less."""

    auto = "auto"
    kv_head = "kv_head"
    query_head = "query_head"
    layer = "layer"


def calibrate(
    model: ModelOption = "smollm2",
    text: Annotated[
        list[Path] | None, typer.Option(help="Text files; repeat.", show_default="the King James text, extra `eval`")
    ] = None,
    selections: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Layers that select; repeat.",
            show_default="3, or a third of a shallow model's layers, without a quality to reach",
        ),
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Or: the KL to the dense model to reach, in nats.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Or: how often the likeliest token must stay the same.")
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens that a selection keeps; repeat.", show_default="1024")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens, always kept.")] = 4,
    recent: Annotated[int, typer.Option(min=0, help="Last tokens, always kept.")] = 32,
    share: Annotated[
        CalibratedShare, typer.Option(help="Who shares a token set; auto: kv_head or layer, whichever loses less.")
    ] = CalibratedShare.auto,
    vary_budgets: Annotated[bool, typer.Option(help="Budgets of their own, as many tokens in all.")] = False,
    context: Annotated[int, typer.Option(min=64, help="Tokens of a context, about.")] = 4096,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts; half hide their facts in filler.")] = 6,
    dense: Annotated[
        int | None,
        typer.Option(
            min=0, help="Layers before the first selection, at most.",
            show_default="2, or an eighth of a shallow model's layers",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="What counts: kind=number of text, answer, copy.", show_default="1 each")
    ] = None,
    tries: Annotated[
        int, typer.Option(min=1, help="Policies tried for a number of selections, before the best one is refined.")
    ] = 60,
    seed: Annotated[int, typer.Option(help="Chooses the hidden facts.")] = 0,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    file: Annotated[
        Path, typer.Option("--out", help="The policy file, YAML or JSON; scores go beside it, and a rerun goes on.")
    ] = Path("tidal_policy.yaml"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Find the selection layers for a model: those whose answers stay closest to the dense model's on your text.

    With several budgets or selections: a policy file for each, named by both, and the Pareto curve of what a step reads
    against the KL, as JSON and PNG. With a quality to reach: the policy that reaches it and reads least. Ctrl-C ends
    the search and writes the best policies so far; the same command again goes on from there.
    """
    from transformers.utils import logging as hf_logging

    from ..calibrate import Goal, calibrate_curve, check_settings
    from ..calibrate import Progress as Step
    from ..calibrate import calibrate as run_calibration
    from ..calibrate.tasks import TEXT_TOKENS
    from ..models import load_config
    from ..shapes import is_random

    hf_logging.disable_progress_bar()
    device, number = where(device, dtype)
    if is_random(model):
        raise TidalError(f"calibrate: {model} has random weights, which have nothing to find")
    goal = {"max_kl": max_kl, "min_agreement": min_agreement}
    to_reach = any(value is not None for value in goal.values())
    budgets, numbers = budget or [1024], selections or []
    goals = [Goal(number, **goal) for number in numbers or [None]]
    check_settings(budgets, context, contexts, tries, goals)
    check_positions(load_config(model), model, context, "blocks of", TEXT_TOKENS)
    several = len(numbers) > 1 or (len(budgets) > 1 and not to_reach)
    weights = _weights(weight or [])
    if file.suffix not in (".yaml", ".yml", ".json") or file.is_dir():
        raise TidalError(f"--out {file}: name a file that ends in .yaml, .yml or .json")
    make_folder(file.parent)
    if several:
        report.need_matplotlib()
    corpus = read_corpus(text)
    with show_progress() as progress:
        net, tokenizer = load(progress, model, device, number)
        tasks: dict[str, Any] = {}

        def show(step: Step) -> None:
            if step.stage not in tasks:
                if not err.is_terminal:
                    err.print(f"{step.stage} ...", markup=False, highlight=False)
                tasks[step.stage] = progress.add_task(step.stage, total=step.total)
            best = step.best
            said = "" if best is None else f": best {list(best.candidate.selections)}, loss {best.score.loss:.4f}"
            progress.update(tasks[step.stage], completed=step.done, total=step.total, description=step.stage + said)

        common = {
            "sinks": sinks, "recent": recent, "share": share.value, "vary_budgets": vary_budgets, "context": context,
            "contexts": contexts, "dense": dense, "weights": weights, "tries": tries, "seed": seed,
            "name": file.stem, "memory": file.with_name(f"{file.name}.scores.json"), "report": show,
        }  # fmt: skip
        if several:
            found = calibrate_curve(net, tokenizer, corpus, budgets=budgets, selections=numbers or None, **common)
        else:
            one = {"selections": numbers[0] if numbers else None, **goal}
            budget = budgets if len(budgets) > 1 else budgets[0]
            found = [run_calibration(net, tokenizer, corpus, budget=budget, **one, **common)]
    files = [file.with_stem(policy.name) for policy in found]
    for policy, path in zip(found, files, strict=True):
        policy.save(path)
    points = report.pareto_points(found)
    if several:
        files += [file.with_name(f"{file.stem}-pareto.json"), file.with_name(f"{file.stem}-pareto.png")]
        files[-2].write_text(json.dumps({"points": points, **provenance(device)}, indent=1) + "\n")
        report.pareto_chart(points, files[-1])
    interrupted = found[-1].calibration["interrupted"] or (several and len(found) < len(budgets) * max(1, len(numbers)))
    if as_json:
        print(json.dumps(found[0].to_dict() if not several else [policy.to_dict() for policy in found]))
        if interrupted:
            raise typer.Exit(130)
        return
    for policy in found:
        out.print(report.calibration_table(policy))
        out.print(report.roles_line(policy), markup=False, highlight=False, soft_wrap=True)
    for path in files:
        out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if interrupted:
        out.print("the best policies so far; the same command goes on", markup=False, highlight=False)
        raise typer.Exit(130)


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

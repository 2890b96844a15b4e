"""The tables and charts that the commands show and write."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .errors import TidalError

if TYPE_CHECKING:
    from .explain import Explanation, Row
    from .policy import Policy
    from .run import Result


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Make a table of plain text."""
    rich_table = Table(*columns)
    for row in rows:
        rich_table.add_row(*row)
    return rich_table


def explanation_table(explanation: "Explanation") -> Table:
    """Make a table with a row for each attention call: its layer, role, source of tokens, method and budget.

    The last column says why a call was left as it was; it is there only if one was.
    """
    rows = []
    for row in explanation.rows:
        layer = "?" if row.layer is None else str(row.layer)
        rows.append((layer, row.role or "-", _tokens_from(row), row.by, row.budget, row.share, row.output, row.reason))
    columns = ("layer", "role", "tokens from", "chosen by", "budget", "shared by", "output", "left alone because")
    shown = len(columns) if any(row.reason for row in explanation.rows) else len(columns) - 1
    return table(columns[:shown], [row[:shown] for row in rows])


def _tokens_from(row: "Row") -> str:
    """Where the tokens of a row of `explain` come from, in words."""
    if row.role is None:
        return ""
    if row.role == "reuse":
        return f"layer {row.source}" + (f", heads {' '.join(map(str, row.heads))}" if row.heads else "")
    return "whole cache" if row.role == "full" or row.by == "scores" else "itself"


def print_explanation(console: Console, explanation: "Explanation") -> None:
    """Print the policy's name, the table of `explanation_table`, and a line for each problem."""
    policy = explanation.policy
    console.print(f"policy {policy.name}: {policy.description}".rstrip(": "), markup=False, highlight=False)
    console.print(explanation_table(explanation))
    if kept := sum(row.kept_bytes for row in explanation.rows):
        console.print(f"kept beside the cache: {kept:,.0f} bytes for each slot of a sequence", highlight=False)
    for problem in explanation.problems:
        console.print(f"can't follow the policy: {problem}", markup=False, highlight=False, soft_wrap=True)


def explanation_text(explanation: "Explanation") -> str:
    """Return as plain text what `print_explanation` prints."""
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        print_explanation(console, explanation)
    return capture.get().rstrip()


def roles_line(policy: "Policy") -> str:
    """Return one line that lists the layers of each role."""
    from .policy import ROLES

    layers_by_role = {name: [role.layer for role in policy.roles if role.role == name] for name in ROLES}
    return f"policy {policy.name}: " + "; ".join(
        f"{name} {_spans(layers)}" for name, layers in layers_by_role.items() if layers
    )


def calibration_table(policy: "Policy") -> Table:
    """Make a table of what a calibrated policy, and one with the published layers, cost in quality."""
    calibration = policy.calibration
    kinds = list(calibration["kl"])
    rows = []
    for name, score in (("calibrated", calibration), ("published", calibration["published"])):
        by_kind = [f"{score['kl'][kind]:.4f} ({score['agreement'][kind]:.0%})" for kind in kinds]
        answers_kept = "-" if score["answered"] is None else f"{score['answered']:.0%}"
        rows.append((name, f"{score['loss']:.4f}", *by_kind, answers_kept, f"{score['kv_share']:.0%}"))
    kind_columns = [f"{kind}: KL (agreement)" for kind in kinds]
    return table(("policy", "loss", *kind_columns, "answers kept", "KV cache read"), rows)


def pareto_points(policies: Sequence["Policy"]) -> list[dict[str, Any]]:
    """Return a point for each calibrated policy: its costs, and whether it is on the Pareto front.

    A policy is on the `front` if no other policy is better in bytes per step or loss, and at least as good in both.
    """
    keys = ("budget", "bytes_per_step", "kv_share", "loss", "kl", "estimated_speedup")
    points = []
    for policy in policies:
        costs = {key: policy.calibration[key] for key in keys}
        selections = [role.layer for role in policy.roles if role.role == "select"]
        points.append({"policy": policy.name, "selections": selections, "share": policy.defaults.share, **costs})
    for point in points:
        point["front"] = not any(
            (rival["bytes_per_step"], rival["loss"]) != (point["bytes_per_step"], point["loss"])
            and rival["bytes_per_step"] <= point["bytes_per_step"]
            and rival["loss"] <= point["loss"]
            for rival in points
        )
    return points


def pareto_chart(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the KL against the bytes that a step reads, as a PNG; a line joins the policies on the Pareto front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    front = sorted((point["bytes_per_step"] / 1e6, point["loss"]) for point in points if point["front"])
    axes.plot(*zip(*front, strict=True), color="#3b7ea1", linewidth=1)
    for point in points:
        position = (point["bytes_per_step"] / 1e6, point["loss"])
        axes.plot(*position, "o", color="#3b7ea1" if point["front"] else "#bbbbbb")
        label = f"{point['budget']}: {', '.join(map(str, point['selections']))}"
        axes.annotate(label, position, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("MB read a step, weights and KV cache")
    axes.set_ylabel("mean KL to dense, nats")
    axes.set_title("calibrated policies (budget: selections)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def run_record(measured: Sequence["Result"], **about: Any) -> dict[str, Any]:
    """Return the JSON of a run: `about` it, and for each variant what was measured and the roles of the layers."""
    from .bench.timing import summary  # imported here because it imports torch, which most commands start without

    return {
        **about,
        "variants": [
            {
                "name": result.variant.name,
                "answers": list(result.texts),
                "found": result.found,
                "kv_share": result.kv_share,
                "median_ms": result.median_ms,
                "p10_ms": summary(result.milliseconds)["p10"],
                "p90_ms": summary(result.milliseconds)["p90"],
                "first_step_s": result.compile_seconds,
                "tokens": list(result.tokens),
                "policy": result.variant.policy and result.variant.policy.to_dict(),
                "roles": result.variant.policy and [role.role for role in result.variant.policy.roles],
            }
            for result in measured
        ],
    }


def run_table(record: dict[str, Any]) -> Table:
    """Make a table of the main results of each variant of a run; the JSON has more."""
    rows = []
    for variant in record["variants"]:
        answer = " ".join((variant["answers"] or [""])[0].split())
        rows.append((
            variant["name"].removeprefix("tidal: "), f"{variant['kv_share']:.0%}", found_of(record, variant),
            f"{variant['median_ms']:.2f}", f"{variant['first_step_s']:.1f}",
            answer if len(answer) <= 24 else answer[:23] + "…",
        ))  # fmt: skip
    first = f"answer ({record['prompts'][0]})" if record["prompts"] else "answer"
    return table(("variant", "KV read", "found", "ms/token", "compile s", first), rows)


def found_of(record: dict[str, Any], variant: dict[str, Any]) -> str:
    """Return how many of the hidden numbers a variant of a run found, such as "3 of 4"."""
    return "-" if variant["found"] is None else f"{variant['found']} of {len(record['prompts'])}"


def need_matplotlib() -> None:
    """Raise `TidalError` if matplotlib is missing: before a long measurement, instead of at the chart after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TidalError("the chart needs matplotlib: pip install 'tidal-compile[plot]'")


def run_chart(record: dict[str, Any], file: Path) -> None:
    """Draw a PNG with a bar for each variant: its median ms per token, labelled with the KV cache share it reads."""
    from matplotlib.figure import Figure

    variants = record["variants"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(variants)), layout="constrained")
    axes = figure.subplots()
    medians = [variant["median_ms"] for variant in variants]
    bars = axes.barh(range(len(variants)), medians, color="#3b7ea1")
    axes.set_yticks(range(len(variants)), [variant["name"] for variant in variants])
    labels = [
        f"{variant['median_ms']:.2f} ms, {variant['kv_share']:.0%} of KV, {found_of(record, variant)} found"
        for variant in variants
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_xlim(0, max(medians) * 1.5)
    axes.set_xlabel("median ms per token")
    axes.set_title(f"{record['model']}, {record['context']} tokens, {record['dtype']}\n{record['device']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _spans(layers: Sequence[int]) -> str:
    """Return a list of layers with neighbours joined: [0, 1, 5] -> "0-1, 5"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)

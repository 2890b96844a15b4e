"""Tables and charts of what the command line finds."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .errors import TidalError

if TYPE_CHECKING:
    from .explain import Explanation
    from .policy import Policy
    from .run import Result


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table of text."""
    filled = Table(*columns)
    for row in rows:
        filled.add_row(*row)
    return filled


def explanation_table(explanation: "Explanation") -> Table:
    """One row an attention call: layer, role, source of its tokens, budget, or why it was left alone."""
    rows = []
    for row in explanation.rows:
        layer = "?" if row.layer is None else str(row.layer)
        source = f"layer {row.source}" if row.role == "reuse" else "whole cache" if row.role else ""
        source += f", heads {' '.join(map(str, row.heads))}" if row.heads else ""
        rows.append((layer, row.role or "-", source, row.budget, row.share, row.reason))
    columns = ("layer", "role", "tokens from", "budget", "shared by", "left alone because")
    shown = len(columns) if any(row.reason for row in explanation.rows) else len(columns) - 1
    return table(columns[:shown], [row[:shown] for row in rows])


def print_explanation(console: Console, explanation: "Explanation") -> None:
    """The policy, the table, and a line for each problem."""
    policy = explanation.policy
    console.print(f"policy {policy.name}: {policy.description}".rstrip(": "), markup=False, highlight=False)
    console.print(explanation_table(explanation))
    for problem in explanation.problems:
        console.print(f"can't follow the policy: {problem}", markup=False, highlight=False, soft_wrap=True)


def explanation_text(explanation: "Explanation") -> str:
    """What `print_explanation` prints, as plain text."""
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        print_explanation(console, explanation)
    return capture.get().rstrip()


def roles_line(policy: "Policy") -> str:
    """The layers of each role in one line."""
    from .policy import ROLES

    groups = {kind: [role.layer for role in policy.roles if role.role == kind] for kind in ROLES}
    return f"policy {policy.name}: " + "; ".join(
        f"{kind} {_spans(layers)}" for kind, layers in groups.items() if layers
    )


def calibration_table(policy: "Policy") -> Table:
    """What a calibrated policy costs in quality, beside the published layers."""
    found = policy.calibration
    rows = []
    for name, score in (("calibrated", found), ("published", found["published"])):
        kinds = [f"{score['kl'][kind]:.4f} ({score['agreement'][kind]:.0%})" for kind in found["kl"]]
        kept = "-" if score["answered"] is None else f"{score['answered']:.0%}"
        rows.append((name, f"{score['loss']:.4f}", *kinds, kept, f"{score['kv_share']:.0%}"))
    kinds = [f"{kind}: KL (agreement)" for kind in found["kl"]]
    return table(("policy", "loss", *kinds, "answers kept", "KV cache read"), rows)


def pareto_points(policies: Sequence["Policy"]) -> list[dict[str, Any]]:
    """Each calibrated policy: bytes of a step, KL, and whether no other one is better in both."""
    points = []
    for policy in policies:
        found = policy.calibration
        chosen = {
            key: found[key] for key in ("budget", "bytes_per_step", "kv_share", "loss", "kl", "estimated_speedup")
        }
        selections = [role.layer for role in policy.roles if role.role == "select"]
        points.append({"policy": policy.name, "selections": selections, "share": policy.defaults.share, **chosen})
    for one in points:
        one["front"] = not any(
            (other["bytes_per_step"], other["loss"]) != (one["bytes_per_step"], one["loss"])
            and other["bytes_per_step"] <= one["bytes_per_step"]
            and other["loss"] <= one["loss"]
            for other in points
        )
    return points


def pareto_chart(points: Sequence[dict[str, Any]], file: Path) -> None:
    """KL against what a step reads, into a PNG; the front is joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    front = sorted((one["bytes_per_step"] / 1e6, one["loss"]) for one in points if one["front"])
    axes.plot(*zip(*front, strict=True), color="#3b7ea1", linewidth=1)
    for one in points:
        where = (one["bytes_per_step"] / 1e6, one["loss"])
        axes.plot(*where, "o", color="#3b7ea1" if one["front"] else "#bbbbbb")
        label = f"{one['budget']}: {', '.join(map(str, one['selections']))}"
        axes.annotate(label, where, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("MB read a step, weights and KV cache")
    axes.set_ylabel("mean KL to dense, nats")
    axes.set_title("calibrated policies (budget: selections)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def run_record(measured: Sequence["Result"], **about: Any) -> dict[str, Any]:
    """The JSON of a run: what was measured, with the layers' roles."""
    from .bench.timing import summary  # with torch, which the rest of the command line starts without

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
    """Variant, share of the KV cache read a step, numbers found, latency, first answer; the JSON has more."""
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
    """How many of the hidden numbers a variant of a run found."""
    return "-" if variant["found"] is None else f"{variant['found']} of {len(record['prompts'])}"


def need_matplotlib() -> None:
    """Raises `TidalError` where no chart can be drawn; asked before a long measurement, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TidalError("the chart needs matplotlib: pip install 'tidal-compile[plot]'")


def run_chart(record: dict[str, Any], file: Path) -> None:
    """Median ms/token of every variant as bars, and the share of the KV cache read, into a PNG."""
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
    """[0, 1, 5] -> "0-1, 5"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)

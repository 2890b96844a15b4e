"""The figures of the TidalDecode paper (https://arxiv.org/abs/2410.05076), measured on our system.

Figure 1: end-to-end latency of a decode step, dense and sparse over budgets, at several contexts. Figure 2: latency of
attention alone, as a share of dense attention, at 32 and 64 layers: two dense layers, two selections, all others
sparse.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DENSE_LAYERS, SELECTIONS = 2, 2  # of the preset `tidal`


def attention_shares(records: Sequence[dict[str, Any]], layers: int) -> dict[tuple[int, int], float]:
    """{(context, budget): share of dense attention's time} from records of `bench kernels` at batch 1."""
    us = {(one["op"], one["context"], one["budget"]): one["us"]["median"] for one in records}
    sparse_layers = layers - DENSE_LAYERS - SELECTIONS
    shares = {}
    for one in records:
        at = one["context"], one["budget"]
        dense = us["dense", *at]
        total = DENSE_LAYERS * dense + SELECTIONS * us["select", *at] + sparse_layers * us["sparse", *at]
        shares[at] = total / (layers * dense)
    return shares


def draw_latency(result: dict[str, Any], file: Path) -> None:
    """Figure 1 from a result of `bench figures`: a group of bars a context, a bar a variant."""
    from matplotlib.figure import Figure

    records = result["decode"]
    contexts = sorted({one["context"] for one in records})
    names = list(dict.fromkeys(one["name"] for one in records))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(names)
    for place, name in enumerate(names):
        ms = {one["context"]: one["ms"]["median"] for one in records if one["name"] == name}
        at = [number + place * width for number, context in enumerate(contexts) if context in ms]
        bars = axes.bar(at, list(ms.values()), width, label=name.removeprefix("tidal: "))
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    axes.set_xticks([number + 0.4 for number in range(len(contexts))], [f"{context:,}" for context in contexts])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("ms per token")
    axes.set_title(f"{result['model']}, batch 1, {result['device']}", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=150)


def draw_attention(result: dict[str, Any], file: Path) -> None:
    """Figure 2 from a result of `bench figures`: time of attention over dense attention, by context and budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, layers in zip(figure.subplots(1, 2, sharey=True), (32, 64), strict=True):
        shares = attention_shares(result["kernels"], layers)
        for budget in sorted({budget for _, budget in shares}):
            points = sorted((context, share) for (context, other), share in shares.items() if other == budget)
            axes.plot(*zip(*points, strict=True), marker="o", label=f"budget {budget}")
        axes.set_xscale("log")
        axes.set_xlabel("context, tokens")
        axes.set_title(f"{layers} layers", fontsize=10)
        axes.axhline(1.0, color="grey", linewidth=0.8)
    figure.axes[0].set_ylabel("attention time / dense attention time")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"heads as in {result['model']}, {result['device']}", fontsize=10)
    figure.savefig(file, dpi=150)

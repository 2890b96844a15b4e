"""The figures of the TidalDecode paper (https://arxiv.org/abs/2410.05076), measured on our system.

Figure 1 shows the latency of a whole decode step at several contexts, dense and with several budgets, under TidalDecode
and Quest. Figure 2 shows the latency of attention alone as a share of dense attention, for models of 32 and 64 layers.
Two are dense. Of the others, TidalDecode has two that select, and all others are sparse; in Quest, every one selects.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DENSE_LAYERS, SELECTIONS = 2, 2  # of the preset `tidal`; `quest` has as many dense layers
METHODS = {"tidal": "-", "quest": "--"}  # and how their lines are drawn


def attention_shares(
    records: Sequence[dict[str, Any]], layers: int, method: str = "tidal"
) -> dict[tuple[int, int], float]:
    """{(context, budget): share of dense attention's time} from records of `bench kernels` at batch 1."""
    us = {(record["op"], record["context"], record["budget"]): record["us"]["median"] for record in records}
    shares = {}
    for record in records:
        size = record["context"], record["budget"]
        dense = us["dense", *size]
        if method == "tidal":
            sparse_layers = layers - DENSE_LAYERS - SELECTIONS
            others = SELECTIONS * us["select", *size] + sparse_layers * us["sparse", *size]
        else:
            others = (layers - DENSE_LAYERS) * us["by pages, sparse output", *size]
        shares[size] = (DENSE_LAYERS * dense + others) / (layers * dense)
    return shares


def draw_latency(result: dict[str, Any], file: Path) -> None:
    """Draw Figure 1 from a result of `bench figures`: a group of bars for each context, a bar for each variant."""
    from matplotlib.figure import Figure

    records = result["decode"]
    contexts = sorted({record["context"] for record in records})
    names = list(dict.fromkeys(record["name"] for record in records))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(names)
    for bar, name in enumerate(names):
        ms = {record["context"]: record["ms"]["median"] for record in records if record["name"] == name}
        x = [group + bar * width for group, context in enumerate(contexts) if context in ms]
        bars = axes.bar(x, list(ms.values()), width, label=name.removeprefix("tidal: "))
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    axes.set_xticks([group + 0.4 for group in range(len(contexts))], [f"{context:,}" for context in contexts])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("ms per token")
    axes.set_title(f"{result['model']}, batch 1, {result['device']}", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=150)


def draw_attention(result: dict[str, Any], file: Path) -> None:
    """Draw Figure 2 from a result of `bench figures`: time of attention over dense attention, by context and budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, layers in zip(figure.subplots(1, 2, sharey=True), (32, 64), strict=True):
        for method, line in METHODS.items():
            shares = attention_shares(result["kernels"], layers, method)
            for number, budget in enumerate(sorted({budget for _, budget in shares})):
                points = sorted((context, share) for (context, size), share in shares.items() if size == budget)
                label = f"{method}, budget {budget}"
                axes.plot(*zip(*points, strict=True), line, marker="o", color=f"C{number}", label=label)
        axes.set_xscale("log")
        axes.set_xlabel("context, tokens")
        axes.set_title(f"{layers} layers", fontsize=10)
        axes.axhline(1.0, color="grey", linewidth=0.8)
    figure.axes[0].set_ylabel("attention time / dense attention time")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"heads as in {result['model']}, {result['device']}", fontsize=10)
    figure.savefig(file, dpi=150)

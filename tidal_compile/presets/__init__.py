"""Ready-made policies: methods that fit any model (the functions here) and files made for one model (`*.yaml` beside).

A preset takes the number of full-attention layers, the model's name if it is known, and the budget if the user gives
one, and writes an entry for each layer and the policy's defaults.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Where TidalDecode selects for the second time, by model: arXiv 2410.05076 and, for others, 2508.07101
PUBLISHED_SELECTION = {
    "longchat-7b": 7,
    "llama-2-7b": 7,
    "llama-3-8b": 13,
    "llama-3.1-8b": 13,
    "deepseek-r1-distill-llama-8b": 12,
    "qwen3-4b": 20,
    "qwen3-8b": 12,
    "qwen3-14b": 12,
}
# Kascade's anchor layers, by model: arXiv 2512.16391 and its code
PUBLISHED_ANCHORS = {
    "llama-3.1-8b": (0, 2, 8, 13, 14),
    "deepseek-r1-distill-llama-8b": (0, 2, 8, 13, 14),
    "qwen3-8b": (0, 2, 7, 14, 23),
}


@dataclass(frozen=True)
class Preset:
    """An entry for each full-attention layer, and the defaults, as a policy file has them."""

    layers: list[Any]
    defaults: dict[str, Any] = field(default_factory=dict)


def full(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """Every layer attends to the whole cache: the exact model."""
    return Preset(["full"] * num_layers)


def tidal(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """TidalDecode: dense 0-1, selections at 2 and at the published layer (else at 0.4 x layers), reuse elsewhere.

    https://arxiv.org/abs/2410.05076. Its correction of the cache is `correct_every` of `generate`. A shallow model
    drops what doesn't fit: 4 layers are dense 0-1, selection 2, reuse 3.
    """
    published = [layer for layer in _published(PUBLISHED_SELECTION, model) if layer < num_layers]
    second = published[0] if published else round(0.4 * num_layers)
    return Preset(
        ["full" if layer < 2 else "select" if layer in (2, second) else "reuse" for layer in range(num_layers)]
    )


def topk(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """Top-k attention: every layer attends to its own most important tokens, each query head to others. The oracle.

    https://arxiv.org/abs/2106.06899. Every layer scans its keys, so this is a bound of quality, not of speed. Left out:
    nothing in decode steps; a prefill is dense.
    """
    return Preset(["select"] * num_layers, {"output": "sparse", "share": "query_head", "sinks": 0, "recent": 0})


def window(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """StreamingLLM: every layer attends to the first 4 tokens and the most recent ones, as many as the budget says.

    https://arxiv.org/abs/2309.17453. Left out: tokens keep their positions, where the paper numbers those of its cache
    anew, and nothing is dropped from the cache.
    """
    layers = [{"role": "select", "by": "window"}, *["reuse"] * (num_layers - 1)]
    return Preset(layers, {"sinks": 4, "recent": 0})


def quest(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """Quest: dense 0-1; every other layer chooses the best pages of 16 tokens for each query head, by bounds of keys.

    https://arxiv.org/abs/2406.10774. `share: kv_head` gives the form for grouped heads. The newest page is always kept,
    as in its kernels. Left out: whole pages, where ours fill the budget with a part of the last one.
    """
    layers = ["full" if layer < 2 else {"role": "select", "by": "pages"} for layer in range(num_layers)]
    return Preset(layers, {"share": "query_head", "sinks": 0, "recent": 0})


def lessismore(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """LessIsMore: TidalDecode's layers; one token set for all heads, joined by rank, a quarter of it recent tokens.

    https://arxiv.org/abs/2508.07101, with 4 sinks, which come out of the share of recent tokens, and a budget of 2,048
    (the paper has 1K to 8K). Left out: nothing in decode steps. Another budget by `with_budget` keeps no exact quarter.
    """
    size = budget if isinstance(budget, int) and budget > 0 else 2048
    recent = max(0, size // 4 - 4)
    defaults = {"budget": 2048, "share": "layer", "pool": "union", "sinks": min(4, size // 4), "recent": recent}
    return Preset(tidal(num_layers, model).layers, defaults)


def kascade(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """Kascade: published anchor layers (else at the same depths) select, with sparse output from the second on.

    https://arxiv.org/abs/2512.16391: a tenth of the tokens, at least 128, no sinks, no recent tokens. Left out: its
    head maps (`policy import --kascade` reads them), the rounding of budgets to 128, and its sparse prefill.
    """
    published = [anchors for anchors in _published(PUBLISHED_ANCHORS, model) if anchors[-1] < num_layers]
    scaled = {round(anchor * num_layers / 32) for anchor in PUBLISHED_ANCHORS["llama-3.1-8b"]}
    anchors = published[0] if published else scaled
    layers = [
        "select" if layer == 0 else {"role": "select", "output": "sparse"} if layer in anchors else "reuse"
        for layer in range(num_layers)
    ]
    return Preset(layers, {"budget": {"ratio": 0.1, "min": 128}, "sinks": 0, "recent": 0})


def omnikv(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """OmniKV: filter layers 2, 8, 18 of 32 (else at these depths) select one set for all heads, by their maximum.

    https://openreview.net/forum?id=ulCAPXYXfa: 6.7% of the tokens. The layers before the first filter and the one after
    each stay dense. Left out: the cache in host memory, and that generated tokens are always kept.
    """
    filters = sorted({round(layer * num_layers / 32) for layer in (2, 8, 18)})
    layers = [
        "select" if layer in filters else "full" if layer < filters[0] or layer - 1 in filters else "reuse"
        for layer in range(num_layers)
    ]
    defaults = {"budget": {"ratio": 0.067, "min": 128}, "sinks": 0, "recent": 0, "share": "layer", "pool": "max"}
    return Preset(layers, defaults)


def flat(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """No layer scans the cache: `tidal`'s selections, and layers 0 and 1, by bounds of pages and scores inside them.

    This project's own, after Quest and TidalDecode: pages of 16 tokens keep 4 times the budget, whose best tokens are
    chosen. `calibrate --by pages` finds better layers for a model.
    """
    select = {"role": "select", "by": "pages", "keep": 4}
    return Preset(["reuse" if entry == "reuse" else select for entry in tidal(num_layers, model).layers])


def magicpig(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """MagicPIG, (10, 150): layers 0, 16, 32... stay dense; others attend to a sample, drawn by 150 hashes of 10 bits.

    https://arxiv.org/abs/2410.16179. 4 sinks and 64 recent tokens. Each layer has hyperplanes of its own, and decoded
    tokens are hashed, too. `budget` has no say: how many are sampled is random.
    """
    return _by_hashes(num_layers, 10, 150)


def magicpig_9_120(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """MagicPIG, (9, 120): as `magicpig`, with 120 hashes of 9 bits."""
    return _by_hashes(num_layers, 9, 120)


def magicpig_8_75(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """MagicPIG, (8, 75): as `magicpig`, with 75 hashes of 8 bits. The one that reads the fewest bytes on a GPU."""
    return _by_hashes(num_layers, 8, 75)


def magicpig_cpu(num_layers: int, model: str | None = None, budget: Any = None) -> Preset:
    """MagicPIG's whole system: as `magicpig`, with a `HostCache` that leaves the other layers in host memory.

    Their samples are looked up and attended to by the CPU, and decoded tokens are attended to as they are.
    """
    return _by_hashes(num_layers, 10, 150, place="cpu", decoded="exact")


def _by_hashes(num_layers: int, k: int, l: int, **more: str) -> Preset:
    layers = [
        "full" if layer % 16 == 0 else {"role": "select", "by": "lsh", "k": k, "l": l, "seed": layer, **more}
        for layer in range(num_layers)
    ]
    return Preset(layers, {"sinks": 4, "recent": 64})


def _published(table: dict[str, Any], model: str | None) -> list[Any]:
    """What is published for models with this name."""
    name = (model or "").lower()
    return [value for part, value in table.items() if part in name]


PRESETS: dict[str, Callable[..., Preset]] = {
    make.__name__: make for make in (
        full, tidal, topk, window, quest, lessismore, kascade, omnikv, flat, magicpig, magicpig_9_120, magicpig_8_75,
        magicpig_cpu,
    )
}  # fmt: skip

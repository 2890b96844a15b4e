"""Ready-made policies: methods that fit any model (the functions here) and files made for one model (`*.yaml` beside).

A preset maps a number of full-attention layers, and the model's name if it is known, to a role for each layer.
"""

from collections.abc import Callable

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


def full(num_layers: int, model: str | None = None) -> list[str]:
    """Every layer attends to the whole cache: the exact model."""
    return ["full"] * num_layers


def tidal(num_layers: int, model: str | None = None) -> list[str]:
    """TidalDecode: dense 0-1, selections at 2 and at the published layer (else at 0.4 x layers), reuse elsewhere.

    A shallow model drops what doesn't fit: 4 layers are dense 0-1, selection 2, reuse 3.
    """
    name = (model or "").lower()
    published = [layer for part, layer in PUBLISHED_SELECTION.items() if part in name and layer < num_layers]
    second = published[0] if published else round(0.4 * num_layers)
    return ["full" if layer < 2 else "select" if layer in (2, second) else "reuse" for layer in range(num_layers)]


PRESETS: dict[str, Callable[[int, str | None], list[str]]] = {"full": full, "tidal": tidal}

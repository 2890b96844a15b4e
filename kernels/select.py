"""`select_attention` in Triton: the dense scan, which also writes its scores, then `topk`.

Reference: `reference.select_attention`.
"""

from torch import Tensor

from .dense import scan
from .topk import choose_tokens, merge_and_prepare


def select_attention(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, mask: Tensor | None, scale: float,
    budget: int, ratio: float, sinks: int, recent: int, share: str, sink: Tensor | None = None, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.select_attention`."""
    sets = {"query_head": q.shape[1], "kv_head": k.shape[1], "layer": 1}[share]
    out = q.new_empty(q.shape)
    splits = scan(q, k, v, length, mask, scale, softcap, write_scores=True)
    prepared = merge_and_prepare(splits, sink, out, sets, k.shape[2], length, mask)
    return out, choose_tokens(splits.scores, prepared, length, k.shape[2], budget, ratio, sinks, recent)

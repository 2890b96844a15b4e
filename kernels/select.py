"""`select_attention` in Triton: the dense scan, which also writes its scores, between the launches of `topk`.

Reference: `reference.select_attention`.
"""

from torch import Tensor

from .dense import scan
from .topk import choose_tokens, prepare


def select_attention(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, mask: Tensor | None, scale: float,
    budget: int, ratio: float, sinks: int, recent: int, share: str, sink: Tensor | None = None, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.select_attention`."""
    sets = {"query_head": q.shape[1], "kv_head": k.shape[1], "layer": 1}[share]
    slots = k.shape[2]
    prepared = prepare(q.shape[0], sets, slots, length, mask)
    out, lse, scores = scan(q, k, v, length, mask, scale, sink, softcap, write_scores=True)
    return out, choose_tokens(scores, lse, length, slots, prepared, budget, ratio, sinks, recent)

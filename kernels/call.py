"""What the ops are given, said once: an attention call, and what a selection is to keep. Needs no torch.

`B` batch, `Hq` query heads, `Hkv` key/value heads (`g = Hq / Hkv` query heads share one), `T` query tokens, `S` slots
of the static cache, `D` head size, `G` token sets (1, `Hkv` or `Hq`), `K` slots of a set.

Most decode steps have one query token. Several are the last of the live tokens, and each sees those up to itself.

A token set is an `index [B, G, K]` int32 (`[B, T, G, K]` for T > 1): positions, ascending, padded with -1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

SHARES = ("query_head", "kv_head", "layer")
POOLS = ("sum", "max", "union")
MOST_TOKENS = 16  # T of a decode step; more are a prefill

T = TypeVar("T")  # of a call: a Tensor, or an fx.Node where a graph is rewritten


@dataclass(frozen=True)
class Call(Generic[T]):
    """One attention call, in the order of the ops' arguments: attention of query to key and value.

    The output is softmax(cap(q k^T scale) + mask) v `[B, Hq, T, D]` over the live tokens, where a softcap c turns a
    score into c tanh(score / c), as in Gemma 2 (https://arxiv.org/abs/2408.00118).
    """

    query: T  # [B, Hq, T, D] in float32, float16 or bfloat16
    key: T  # [B, Hkv, S, D]: the static cache, read in place; the bytes of float8 (e4m3) where there are `scales`
    value: T  # [B, Hkv, S, D]
    length: T  # 0-d int64 on the device: the number of live slots, with the new tokens
    mask: T | None  # [B or 1, 1, 1 or T, S]: bool (which tokens count), or floating (added to the scores)
    scale: float
    sink_logit: T | None = None  # [Hq]: the score of a token without a value, as in GPT-OSS (arXiv 2508.10925)
    softcap: float = 0.0  # 0: none
    scales: T | None = None  # [B, Hkv, S, 2] bfloat16: what keys, and what values, in float8 are multiplied by


@dataclass(frozen=True)
class Selection:
    """What a selection keeps, however it chooses: max(budget, ratio x valid tokens) of them, or all if there are fewer.

    The first `sinks` and the last `recent` valid tokens are always kept, and count towards the budget. `share`: each
    `query_head` has a token set of its own (as in TidalDecode), the query heads of a `kv_head` share one, or all of a
    `layer` do. `pool`, how heads that share a set are joined: by the `sum` or the `max` of their probabilities, or in
    turn: the best token of each head, then the second best (`union`).
    """

    budget: int
    ratio: float = 0.0
    sinks: int = 0
    recent: int = 0
    share: str = "kv_head"
    pool: str = "sum"

    @property
    def parts_per_million(self) -> int:
        """The ratio as an integer, so that host and device round alike."""
        return round(self.ratio * 1_000_000)

    def by_ratio(self, valid: Any) -> Any:
        """ratio x valid tokens, rounded up: of an int or an integer Tensor."""
        return -(-valid * self.parts_per_million // 1_000_000)

    def keep(self, valid: int) -> int:
        """How many tokens are kept of so many valid ones."""
        return min(valid, max(self.budget, self.by_ratio(valid)))

    def width(self, slots: int) -> int:
        """`K`, the slots of a token set over a cache of `slots`: what is kept when the cache is full."""
        return self.keep(slots)

    def num_sets(self, num_heads: int, num_kv_heads: int) -> int:
        """`G`, how many token sets the heads of a layer have."""
        return {"query_head": num_heads, "kv_head": num_kv_heads, "layer": 1}[self.share]


def arguments(of: Any) -> tuple:
    """The fields of a `Call`, a `Selection` or a method in order, as the ops take them."""
    return tuple(getattr(of, field.name) for field in fields(of))


def fitting(budget: int, sinks: int, recent: int) -> dict[str, int]:
    """The settings of a selection at this budget: sinks take at most an eighth of it, recent tokens at most half."""
    return {"budget": budget, "sinks": min(sinks, budget // 8), "recent": min(recent, budget // 2)}

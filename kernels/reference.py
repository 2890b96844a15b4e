"""The ops in plain PyTorch: their definition, and what a CPU runs.

`B` batch, `Hq` query heads, `Hkv` key/value heads (`g = Hq / Hkv` query heads share one), `S` slots of the static
cache, `n` live slots, `D` head size, `G` token sets (1, `Hkv` or `Hq`), `K` slots of a token set.

Sums and softmax are float32 whatever the dtype of the input is. The reference reads the live length on the host, which
costs nothing on a CPU, and slices `[:n]` to keep out the garbage beyond it. The Triton kernels read it on the device.

The score of a token is `q @ k * scale`; under a `softcap` c it becomes c tanh(score / c), as in Gemma 2
(https://arxiv.org/abs/2408.00118). A bool `mask` says which tokens count. A floating mask is added to the scores, and
hides tokens at `HIDES` or below: models write the lowest value of the dtype, -1e9 or -1e4. `sink [Hq]` is the score of
a token without a value, which takes its share of every softmax, as in GPT-OSS (https://arxiv.org/abs/2508.10925).
"""

import torch
from torch import Tensor

SHARES = ("query_head", "kv_head", "layer")
HIDES = -9000.0  # leaves no weight to a score that it is added to; above -9984, which is -1e4 in bfloat16


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    mask: Tensor | None,
    scale: float,
    sink: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend to every live token: `q [B, Hq, 1, D]` over `k, v [B, Hkv, S, D]` -> `[B, Hq, 1, D]`."""
    scores, live_v = _score_live_tokens(q, k, v, length, mask, scale, softcap)
    return (probabilities(scores, sink) @ live_v).view(q.shape).to(q.dtype)


def select_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    mask: Tensor | None,
    scale: float,
    budget: int,
    ratio: float,
    sinks: int,
    recent: int,
    share: str,
    sink: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend to every live token, and choose the most important ones: -> `[B, Hq, 1, D]`, `index [B, G, K]` int32.

    TidalDecode's selection layer (https://arxiv.org/abs/2410.05076). See `choose_tokens` for which ones.
    """
    scores, live_v = _score_live_tokens(q, k, v, length, mask, scale, softcap)
    out = (probabilities(scores, sink) @ live_v).view(q.shape).to(q.dtype)
    width = index_width(budget, ratio, k.shape[2])
    return out, choose_tokens(
        importance(scores, share, sink), scores[:, 0, 0] > -torch.inf, width, budget, ratio, sinks, recent
    )


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    length: Tensor,
    mask: Tensor | None,
    scale: float,
    sink: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend to the tokens in `index [B, G, K]` only, exactly: -> `[B, Hq, 1, D]`."""
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    pairs = max(index.shape[1], num_kv_heads)  # of a token set and a kv head: each gathers rows of the cache once
    live = (index >= 0) & (index < length)
    token = index.clamp(0, slots - 1).long()
    bias = None
    if mask is not None:
        token_mask = mask.expand(batch, 1, 1, slots)[:, 0].expand(-1, index.shape[1], -1).gather(2, token)
        live = live & ~hidden(token_mask)
        bias = token_mask if mask.is_floating_point() else None
    kv_head = torch.arange(pairs, device=q.device) // (pairs // num_kv_heads)
    first_row = (torch.arange(batch, device=q.device)[:, None] * num_kv_heads + kv_head)[..., None] * slots
    rows = first_row + token  # [B, pairs, K] of the cache as [B * Hkv * S, D]
    keys = torch.nn.functional.embedding(rows, k.reshape(-1, head_dim)).float()
    values = torch.nn.functional.embedding(rows, v.reshape(-1, head_dim)).float()
    grouped = q.float().reshape(batch, pairs, num_heads // pairs, head_dim)
    scores = _cap(grouped @ keys.mT * scale, softcap)
    if bias is not None:
        scores = scores + bias[:, :, None]
    if not live.all():  # a padded, dead or hidden entry of the index may have gathered garbage
        scores = scores.masked_fill(~live[:, :, None], -torch.inf)
        values = values.masked_fill(~live[..., None], 0.0)
    return (probabilities(scores, sink) @ values).view(q.shape).to(q.dtype)


def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Up to 3 linear layers of a few tokens: `x [..., K]`, weights `[Ni, K]` -> joined `[..., N1 + N2 + N3]`."""
    outputs = [torch.nn.functional.linear(x, *layer) for layer in zip(weights, biases or [None] * 3, strict=False)]
    return torch.cat(outputs, -1)


def most_tokens(dtype: torch.dtype) -> int:
    """The most tokens that `linear` takes: a tile of the tensor cores, or 1 in float32, which these don't multiply."""
    return 16 if dtype.itemsize == 2 else 1


def index_width(budget: int, ratio: float, slots: int) -> int:
    """`K`, the slots of a token set over a cache of `slots`: what the budget grants when the cache is full."""
    return min(slots, max(budget, -(-slots * parts_per_million(ratio) // 1_000_000)))


def parts_per_million(ratio: float) -> int:
    """A ratio as an integer, so that host and device round a ratio budget alike."""
    return round(ratio * 1_000_000)


def hidden(mask: Tensor) -> Tensor:
    """Which tokens a mask hides: those that are False or, in an additive mask, at `HIDES` or below."""
    return mask <= HIDES if mask.is_floating_point() else ~mask


def importance(scores: Tensor, share: str, sink: Tensor | None = None) -> Tensor:
    """How important each token is for each token set: scores `[B, Hkv, g, n]` -> `[B, G, n]`.

    A set of one query head ranks tokens by score, which orders them as probabilities do and doesn't underflow. A set of
    several heads ranks them by the sum of probabilities, since the scores of different heads have no common scale.
    """
    members = {"query_head": 1, "kv_head": scores.shape[2], "layer": scores.shape[1] * scores.shape[2]}[share]
    if members == 1:
        return scores.flatten(1, 2)
    probs = probabilities(scores, sink)
    return probs.sum(2) if share == "kv_head" else probs.sum((1, 2))[:, None]


def choose_tokens(
    importance: Tensor, valid: Tensor, width: int, budget: int, ratio: float, sinks: int, recent: int
) -> Tensor:
    """The chosen positions, ascending and padded with -1: importance `[B, G, n]`, valid `[B, n]` -> `[B, G, K]` int32.

    Of `num_valid` tokens, max(budget, ratio * num_valid) are chosen, or all if there are fewer: the first `sinks` and
    the last `recent` valid ones, then the most important ones. Equal ones are chosen from the lowest position up.
    """
    index = valid.new_full((*importance.shape[:2], width), -1, dtype=torch.int32)
    if valid.shape[-1] == 0:
        return index
    ordinal = valid.cumsum(-1)  # [B, n]: 1 for the first valid token, 2 for the second
    num_valid = ordinal[:, -1:]
    always = valid & ((ordinal <= sinks) | (ordinal > num_valid - recent))
    ranked = importance.masked_fill(always[:, None], torch.inf).masked_fill(~valid[:, None], -torch.inf)

    by_ratio = -(-num_valid * parts_per_million(ratio) // 1_000_000)  # rounded up
    keep = by_ratio.clamp(min=budget).minimum(num_valid)[:, None]  # [B, 1, 1]
    largest = ranked.topk(min(width, ranked.shape[-1])).values
    threshold = largest.gather(-1, (keep - 1).clamp(min=0).expand(-1, largest.shape[1], 1))  # [B, G, 1]: the last kept
    above, tied = ranked > threshold, ranked == threshold
    chosen = above | (tied & (tied.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))  # [B, G, n]
    batch, token_set, position = chosen.nonzero(as_tuple=True)
    column = chosen.cumsum(-1)[batch, token_set, position] - 1
    index[batch, token_set, column] = position.int()
    return index


def probabilities(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """Softmax over the tokens of `[B, Hkv, g, n]`, less the sink's share; zeros where no token is left to attend to."""
    if scores.shape[-1] == 0:
        return scores
    if sink is not None:
        sink_scores = sink.float().view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink_scores], -1).softmax(-1)[..., :-1]
    no_token = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.softmax(-1).masked_fill(no_token, 0.0)


def _score_live_tokens(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Scores `[B, Hkv, g, n]` in float32, -inf for hidden tokens, and the live values `[B, Hkv, n, D]`."""
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    n = min(int(length), slots)
    keys, values = k[:, :, :n].float(), v[:, :, :n].float()
    grouped = q.float().reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = _cap(grouped @ keys.mT * scale, softcap)
    if mask is not None:
        live_mask = mask.expand(batch, 1, 1, slots)[..., :n]
        if mask.is_floating_point():
            scores = scores + live_mask
        masked = hidden(live_mask)
        if masked.any():  # a weight of 0 is not enough: padding may hold NaN
            scores = scores.masked_fill(masked, -torch.inf)
            values = values.masked_fill(masked.mT, 0.0)
    return scores, values


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return softcap * (scores / softcap).tanh() if softcap else scores

"""The three attention ops in plain PyTorch: their definition, and what a CPU runs.

`B` batch, `Hq` query heads, `Hkv` key/value heads (`g = Hq / Hkv` query heads share one), `S` slots of the static
cache, `n` live slots, `D` head size, `G` token sets (1, `Hkv` or `Hq`), `K` slots of a token set.

Sums and softmax are float32 whatever the input is. The live length is read on the host: on a CPU that costs nothing,
and the slice `[:n]` is what keeps the garbage beyond it out. The Triton kernels read it on the device.

The score of a token is `q @ k * scale`; under a `softcap` c it becomes c tanh(score / c), as in Gemma 2
(https://arxiv.org/abs/2408.00118). `mask` says which tokens count (bool), or is added to the scores (float), where
`HIDES` or less hides a token: models write the lowest value of the dtype, -1e9 or -1e4. `sink [Hq]` is the score of a token
without a value that takes its share of every softmax, as in GPT-OSS (https://arxiv.org/abs/2508.10925).
"""

import torch
from torch import Tensor

SHARES = ("query_head", "kv_head", "layer")
HIDES = -9000.0  # added to a score, it leaves no weight; bfloat16 writes -1e4 as -9984


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
    """Attend to every live token, and choose the ones that matter: -> `[B, Hq, 1, D]`, `index [B, G, K]` int32.

    TidalDecode's selection layer (https://arxiv.org/abs/2410.05076). The first `sinks` and the last `recent` live
    tokens are always chosen, inside the budget; the rest by `importance`, ties to the lower position.
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
    heads = max(index.shape[1], num_kv_heads)  # one gather a head of this many
    live = (index >= 0) & (index < length)
    token = index.clamp(0, slots - 1).long()
    bias = None
    if mask is not None:
        here = mask.expand(batch, 1, 1, slots)[:, 0].expand(-1, index.shape[1], -1).gather(2, token)
        live = live & ~hidden(here)
        bias = here if mask.is_floating_point() else None
    kv_head = torch.arange(heads, device=q.device) // (heads // num_kv_heads)
    first_row = (torch.arange(batch, device=q.device)[:, None] * num_kv_heads + kv_head)[..., None] * slots
    rows = first_row + token  # [B, heads, K] of the cache as [B * Hkv * S, D]
    keys = torch.nn.functional.embedding(rows, k.reshape(-1, head_dim)).float()
    values = torch.nn.functional.embedding(rows, v.reshape(-1, head_dim)).float()
    grouped = q.float().reshape(batch, heads, num_heads // heads, head_dim)
    scores = _cap(grouped @ keys.mT * scale, softcap)
    if bias is not None:
        scores = scores + bias[:, :, None]
    if not live.all():  # what a dead slot names may be garbage
        scores = scores.masked_fill(~live[:, :, None], -torch.inf)
        values = values.masked_fill(~live[..., None], 0.0)
    return (probabilities(scores, sink) @ values).view(q.shape).to(q.dtype)


def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Up to 3 linear layers of a few tokens side by side: `x [..., K]`, weights `[Ni, K]` -> `[..., N1 + N2 + N3]`."""
    outs = [torch.nn.functional.linear(x, *layer) for layer in zip(weights, biases or [None] * 3, strict=False)]
    return torch.cat(outs, -1)


def most_tokens(dtype: torch.dtype) -> int:
    """Tokens that `linear` takes: a tile of the tensor cores, which have no float32."""
    return 16 if dtype.itemsize == 2 else 1


def index_width(budget: int, ratio: float, slots: int) -> int:
    """`K`, the slots that a token set needs in a cache of `slots`: the budget at a full cache, at most all."""
    return min(slots, max(budget, -(-slots * parts_per_million(ratio) // 1_000_000)))


def parts_per_million(ratio: float) -> int:
    """A ratio as an integer, so that host and device round a ratio budget alike."""
    return round(ratio * 1_000_000)


def hidden(mask: Tensor) -> Tensor:
    """Which tokens a mask hides: those that are False or, in an additive mask, at `HIDES` or below."""
    return mask <= HIDES if mask.is_floating_point() else ~mask


def importance(scores: Tensor, share: str, sink: Tensor | None = None) -> Tensor:
    """How much each token set wants each token: scores `[B, Hkv, g, n]` -> `[B, G, n]`.

    Within one head raw scores rank as probabilities do; across heads only probabilities may be added.
    """
    members = {"query_head": 1, "kv_head": scores.shape[2], "layer": scores.shape[1] * scores.shape[2]}[share]
    if members == 1:
        return scores.flatten(1, 2)
    probs = probabilities(scores, sink)
    return probs.sum(2) if share == "kv_head" else probs.sum((1, 2))[:, None]


def choose_tokens(
    importance: Tensor, valid: Tensor, width: int, budget: int, ratio: float, sinks: int, recent: int
) -> Tensor:
    """The positions of the chosen tokens, ascending, padded with -1: `[B, G, n]`, valid `[B, n]` -> `[B, G, K]`."""
    index = valid.new_full((*importance.shape[:2], width), -1, dtype=torch.int32)
    if valid.shape[-1] == 0:
        return index
    rank = valid.cumsum(-1)  # 1-based among the valid tokens
    count = rank[:, -1:]
    always = valid & ((rank <= sinks) | (rank > count - recent))
    wish = importance.masked_fill(always[:, None], torch.inf).masked_fill(~valid[:, None], -torch.inf)

    live = (-(-count * parts_per_million(ratio) // 1_000_000)).clamp(min=budget).minimum(count)[:, None]  # [B, 1, 1]
    best = wish.topk(min(width, wish.shape[-1])).values
    last = best.gather(-1, (live - 1).clamp(min=0).expand(-1, best.shape[1], 1))  # the least important that is kept
    better, tie = wish > last, wish == last
    chosen = better | (tie & (tie.cumsum(-1) <= live - better.sum(-1, keepdim=True)))
    b, g, token = chosen.nonzero(as_tuple=True)
    index[b, g, chosen.cumsum(-1)[b, g, token] - 1] = token.int()
    return index


def probabilities(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """Softmax over the tokens `[B, H, g, n]`, less what the sink takes; zeros where no token is left to attend to."""
    if scores.shape[-1] == 0:
        return scores
    if sink is not None:
        beside = sink.float().view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    nothing = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.softmax(-1).masked_fill(nothing, 0.0)


def _score_live_tokens(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Scores `[B, Hkv, g, n]` in float32, -inf where masked, and the live values `[B, Hkv, n, D]`."""
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
        dead = hidden(live_mask)
        if dead.any():  # padding: nothing that stands there may count, not even NaN
            scores = scores.masked_fill(dead, -torch.inf)
            values = values.masked_fill(dead.mT, 0.0)
    return scores, values


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return softcap * (scores / softcap).tanh() if softcap else scores

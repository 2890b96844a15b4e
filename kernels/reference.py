"""The ops in plain PyTorch: their definition, and what a CPU runs. Letters and shapes are those of `call`.

Sums and softmax are float32 whatever the dtype of the input is. T query tokens are the last T of the live ones, and
each sees those up to itself, and of these what its row of the mask shows: several tokens of a decode step, or many
decode steps that are replayed in one pass. A bool mask says which tokens count. A floating mask is added to the scores,
and hides tokens at `HIDES` or below: models write the lowest value of the dtype, -1e9 or -1e4.

The reference reads the live length on the host, which costs nothing on a CPU, and slices `[:n]` to keep out the garbage
beyond it. What is marked "on any device" doesn't, and is captured in CUDA graphs.
"""

import math

import torch
from torch import Tensor

from .call import Call, Selection

HIDES = -9000.0  # leaves no weight to a score that it is added to; above -9984, which is -1e4 in bfloat16


def full_attention(call: Call[Tensor]) -> Tensor:
    """Attend to every live token: -> `[B, Hq, T, D]`."""
    scores = score_live_tokens(call)
    return weigh_live_tokens(call, scores)


def select_attention(call: Call[Tensor], selection: Selection) -> tuple[Tensor, Tensor]:
    """Attend to every live token, and choose the most important ones: -> `[B, Hq, T, D]`, index `[B, G, K]`.

    TidalDecode's selection layer (https://arxiv.org/abs/2410.05076). See `choose_by_scores` for which ones.
    """
    scores = score_live_tokens(call)
    return weigh_live_tokens(call, scores), _choose(call, selection, scores)


def choose_by_scores(call: Call[Tensor], selection: Selection) -> Tensor:
    """Choose the most important tokens by exact scores: -> index `[B, G, K]`. See `importance`."""
    return _choose(call, selection, score_live_tokens(call))


def rank_and_attend(call: Call[Tensor], selection: Selection, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """`select_attention` up to the choice, where the heads of a layer are divided among `ranks`, of which this is one:
    -> `[B, Hq, T, D]`, worth `[B, T, 1, S]`.
    """
    scores = score_live_tokens(call)
    return weigh_live_tokens(call, scores), worth(call, selection, scores, rank, ranks)


def rank_by_scores(call: Call[Tensor], selection: Selection, rank: int, ranks: int) -> Tensor:
    """What each slot is worth to the heads of this rank: -> `[B, T, 1, S]` in float32, anything where it isn't seen.

    The ranks' sum of it (of `pool: sum`), or else their maximum, orders tokens as `importance` does for all heads.
    """
    return worth(call, selection, score_live_tokens(call), rank, ranks)


def choose_ranked(call: Call[Tensor], selection: Selection, worth: Tensor, page: int) -> Tensor:
    """Choose the most important tokens by what they are worth to all ranks `[B, T, 1, S]`: -> index `[B, 1, K]`.

    The newest page's tokens come first, if pages have a size.
    """
    n = min(int(call.length), call.key.shape[2])
    live, worth = seen(call)[..., :n], worth[..., :n]
    if page and n:
        worth = worth.masked_fill(in_newest_page(live, page)[:, :, None], torch.finfo(worth.dtype).max)
    return pick(worth, live, selection, call.key.shape[2])


def in_newest_page(seen: Tensor, page: int) -> Tensor:
    """Which slots stand in the page of the newest token that is seen: `[..., n]` bool of `seen [..., n]`."""
    slot = torch.arange(seen.shape[-1], device=seen.device)
    newest = torch.where(seen, slot, -1).amax(-1, keepdim=True) if len(slot) else slot
    return slot // page == newest // page


def sparse_attention(call: Call[Tensor], index: Tensor) -> Tensor:
    """Attend to the tokens in `index [B, G, K]` (`[B, T, G, K]` for T > 1) only, exactly: -> `[B, Hq, T, D]`."""
    batch, num_heads, num_tokens, head_dim = call.query.shape
    num_kv_heads, slots = call.key.shape[1:3]
    index = index.view(batch, num_tokens, *index.shape[-2:])
    pairs = max(index.shape[2], num_kv_heads)  # of a token set and a kv head: each gathers rows of the cache once
    live = (index >= 0) & (index < live_until(call)[:, None, None])
    token = index.clamp(0, slots - 1).long()  # [B, T, G, K]
    bias = None
    if call.mask is not None:
        token_mask = call.mask.expand(batch, 1, num_tokens, slots)[:, 0, :, None].expand(-1, -1, index.shape[2], -1)
        token_mask = token_mask.gather(3, token)
        live = live & ~hidden(token_mask)
        bias = token_mask if call.mask.is_floating_point() else None
    kv_head = torch.arange(pairs, device=token.device) // (pairs // num_kv_heads)
    first_row = (torch.arange(batch, device=token.device)[:, None] * num_kv_heads + kv_head) * slots
    rows = first_row[:, None, :, None] + token  # [B, T, pairs, K] of the cache as [B * Hkv * S, D]
    keys, values = _rows(call.key, rows), _rows(call.value, rows)
    if call.scales is not None:
        scales = _rows(call.scales, rows).float()
        keys, values = dequantised(keys, scales[..., 0]), dequantised(values, scales[..., 1])
    keys, values = keys.float(), values.float()
    grouped = call.query.float().transpose(1, 2).reshape(batch, num_tokens, pairs, num_heads // pairs, head_dim)
    scores = _cap(grouped @ keys.mT * call.scale, call.softcap)
    if bias is not None:
        scores = scores + bias[:, :, :, None]
    if not live.all():  # a padded, dead or hidden entry of the index may have gathered garbage
        scores = scores.masked_fill(~live[:, :, :, None], -torch.inf)
        values = values.masked_fill(~live[..., None], 0.0)
    sink = None if call.sink_logit is None else call.sink_logit.float().view(pairs, -1, 1)
    out = probabilities(scores, sink) @ values  # [B, T, pairs, g', D]
    return out.reshape(batch, num_tokens, num_heads, head_dim).transpose(1, 2).to(call.query.dtype).contiguous()


def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor]) -> Tensor:
    """Up to 3 linear layers of a few tokens: `x [..., K]`, weights `[Ni, K]` -> joined `[..., N1 + N2 + N3]`.

    Weights in int8 have `scales`, one tensor `[N]` or `[N, 1]` each: what every row is multiplied by. Those in int4
    are int16 `[N / 16, K' / 128, 512]`, and so are their scales (see `packed`).
    """
    if scales:
        weights = [
            dense_weight(held, scale, x.shape[-1]).to(x.dtype) for held, scale in zip(weights, scales, strict=True)
        ]
    outputs = [torch.nn.functional.linear(x, *layer) for layer in zip(weights, biases or [None] * 3, strict=False)]
    return torch.cat(outputs, -1)


def dense_weight(held: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The weight `[N, K]` in float32 that int8 or int4 numbers stand for, of `linear`. On any device."""
    if held.dtype == torch.int8:
        return held.float() * scales.float().view(-1, 1)
    return unpacked(held, scales)[:, :columns]


def num_rows(held: Tensor) -> int:
    """Rows of a weight as it is held: in int4, of whole tiles (see `packed`)."""
    return len(held) * (16 if held.dtype == torch.int16 else 1)


def group_of(held: Tensor, scales: Tensor) -> int:
    """How many columns of a weight in int4 have one scale: 32, 64, or divided by 128. See `packed`."""
    groups, in_block = scales.shape[1], scales.shape[3]
    return 128 // in_block if in_block > 1 else held.shape[1] // groups * 128


def packed(numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from 0 to 15 `[N, K]`, and pairs of scale and offset `[N, groups, 2]`, for (number - 8) * scale + offset.

    As kernels read them: int16 `[N / 16, K / 128, 512]`, and the pairs `[N / 16, groups, 16, 1, 2]`, or `[N / 16,
    K / 128, 16, 2 or 4, 2]` where a block of 128 columns has 2 or 4 groups. N is filled up to whole tiles of 16 rows,
    and K to whole blocks and groups. On any device.

    Words stand as the tensor cores take 16 rows and columns, of which lane 4 g + t has columns 2 t, 2 t + 1 and those 8
    later of rows g and g + 8: word 8 (4 (8 h + g) + t) + 4 u + 2 v + w of a tile and block is of row 8 h + g, and has
    the number of column 32 j + 16 u + 8 v + 2 t + w in the bits from 4 j on.
    """
    groups = scales.shape[1]
    group = numbers.shape[1] // groups
    in_block, whole = max(1, 128 // group), math.lcm(128, group)
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % whole, 0, -len(numbers) % 16))
    scales = torch.nn.functional.pad(scales, (0, 0, 0, -groups % (whole // group), 0, -len(scales) % 16))
    tiles = numbers.to(torch.int32).view(-1, 2, 8, numbers.shape[1] // 128, 4, 2, 2, 4, 2)
    tiles = tiles.permute(0, 3, 1, 2, 7, 5, 6, 8, 4)  # [., ., h, g, t, u, v, w, j]
    words = sum(tiles[..., place] << (4 * place) for place in range(4))
    words = torch.where(words < 2**15, words, words - 2**16).to(torch.int16)
    pairs = scales.view(len(scales) // 16, 16, -1, in_block, 2).transpose(1, 2)
    return words.reshape(len(words), -1, 512), pairs.contiguous()


def unpacked(words: Tensor, scales: Tensor) -> Tensor:
    """The weight `[N, K]` in float32 of numbers that are `packed`. On any device."""
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=words.device)
    numbers = (words.view(*words.shape[:2], 2, 8, 4, 2, 2, 2, 1) >> shifts) & 15
    numbers = numbers.permute(0, 2, 3, 1, 8, 5, 6, 4, 7).reshape(len(words) * 16, -1, group_of(words, scales))
    scale, offset = scales.float().transpose(1, 2).reshape(len(numbers), -1, 2, 1).unbind(2)
    return ((numbers - 8) * scale + offset).flatten(1)


def most_tokens(dtype: torch.dtype) -> int:
    """The most tokens that `linear` takes: a tile of the tensor cores, or 1 in float32, which these don't multiply."""
    return 16 if dtype.itemsize == 2 else 1


def keys_of(call: Call[Tensor], some: slice | Tensor) -> Tensor:
    """The keys of some slots `[B, Hkv, n, D]` in float32. On any device."""
    keys = call.key[:, :, some]
    return (keys if call.scales is None else dequantised(keys, call.scales[:, :, some, 0])).float()


def model_keys(call: Call[Tensor], some: slice | Tensor) -> Tensor:
    """The keys of some slots `[B, Hkv, n, D]` as the model would have them, in its dtype. On any device."""
    return keys_of(call, some).to(call.query.dtype)


def values_of(call: Call[Tensor], some: slice) -> Tensor:
    """The values of some slots `[B, Hkv, n, D]` in float32. On any device."""
    values = call.value[:, :, some]
    return (values if call.scales is None else dequantised(values, call.scales[:, :, some, 1])).float()


def dequantised(rows: Tensor, scales: Tensor) -> Tensor:
    """Bytes of float8 `[..., n, D]` and their scales `[..., n]`, as numbers in float32."""
    return rows.view(torch.float8_e4m3fn).float() * scales.float()[..., None]


def _rows(cache: Tensor, rows: Tensor) -> Tensor:
    """Rows `[...]` of a cache `[B, Hkv, S, D]`, as one of `[B * Hkv * S, D]`: `[..., D]`."""
    return torch.nn.functional.embedding(rows, cache.reshape(-1, cache.shape[3]))  # several times as fast as an index


def hidden(mask: Tensor) -> Tensor:
    """Which tokens a mask hides: those that are False or, in an additive mask, at `HIDES` or below."""
    return mask <= HIDES if mask.is_floating_point() else ~mask


def live_until(call: Call[Tensor]) -> Tensor:
    """How many of the first slots each query token sees, but for the mask: `[T]`. On any device."""
    num_tokens = call.query.shape[2]
    return call.length.reshape(1) - torch.arange(num_tokens - 1, -1, -1, device=call.length.device)


def seen(call: Call[Tensor]) -> Tensor:
    """Which slots hold a token that a query sees: `[B, T, S]` bool. On any device."""
    batch, _, num_tokens, _ = call.query.shape
    slots = call.key.shape[2]
    live = (torch.arange(slots, device=call.key.device) < live_until(call)[:, None]).expand(batch, num_tokens, slots)
    return live if call.mask is None else live & ~hidden(call.mask.expand(batch, 1, num_tokens, slots)[:, 0])


def score_live_tokens(call: Call[Tensor]) -> Tensor:
    """Scores of the n live tokens `[B, Hkv, g, T, n]` in float32, -inf for those that are hidden."""
    batch, num_heads, num_tokens, head_dim = call.query.shape
    num_kv_heads, slots = call.key.shape[1:3]
    n = min(int(call.length), slots)
    rows = call.query.float().reshape(batch, num_kv_heads, -1, head_dim)  # [B, Hkv, g T, D]
    products = rows @ keys_of(call, slice(n)).mT
    return as_scores(call, products.view(batch, num_kv_heads, num_heads // num_kv_heads, num_tokens, n))


def as_scores(call: Call[Tensor], products: Tensor) -> Tensor:
    """Scores of products `[B, Hkv, g, T, n]` of queries and the first n keys: scaled, capped, masked. On any device."""
    scores = _cap(products * call.scale, call.softcap)
    if call.query.shape[2] > 1:  # one token sees all that are live
        later = torch.arange(products.shape[-1], device=products.device) >= live_until(call)[:, None]  # [T, n]
        scores = scores.masked_fill(later, -torch.inf)
    if call.mask is not None:
        live_mask = call.mask[..., : products.shape[-1]].unsqueeze(1)  # [B or 1, 1, 1, 1 or T, n]
        if call.mask.is_floating_point():
            scores = scores + live_mask
        scores = scores.masked_fill(hidden(live_mask), -torch.inf)
    return scores


def importance(scores: Tensor, selection: Selection, kept: Tensor, sink_logit: Tensor | None = None) -> Tensor:
    """How important each token is for each token set: scores `[B, Hkv, g, T, n]` -> `[B, T, G, n]`.

    A set of one query head ranks tokens by score, which orders them as probabilities do and doesn't underflow. A set of
    several heads ranks them by the sum or the maximum of probabilities, since the scores of different heads have no
    common scale; or by turns: the best of each head, then the second best, `kept [B, T, n]` aside, which are kept
    anyway (LessIsMore, https://arxiv.org/abs/2508.07101).
    """
    batch, num_kv_heads, group, num_tokens, n = scores.shape
    num_sets = selection.num_sets(num_kv_heads * group, num_kv_heads)
    members = num_kv_heads * group // num_sets
    if members == 1:
        ranked = scores
    elif selection.pool == "union":
        ranked = scores.masked_fill(kept[:, None, None], -torch.inf)
    else:
        ranked = probabilities(scores, _by_head(sink_logit, scores))
    by_set = ranked.reshape(batch, num_sets, members, num_tokens, n)
    if members == 1:
        return by_set[:, :, 0].transpose(1, 2)
    if selection.pool == "union":
        rank = by_set.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        turn = rank * members + torch.arange(members, device=rank.device)[:, None, None]
        return -turn.amin(2).transpose(1, 2).float()
    return (by_set.sum(2) if selection.pool == "sum" else by_set.amax(2)).transpose(1, 2)


def always_kept(seen: Tensor, selection: Selection) -> Tensor:
    """The first and the last valid tokens, which a selection keeps: `[..., n]` bool of `seen [..., n]`."""
    ordinal = seen.cumsum(-1)  # 1 for the first valid token, 2 for the second
    return seen & ((ordinal <= selection.sinks) | (ordinal > ordinal[..., -1:] - selection.recent))


def num_kept(selection: Selection, num_valid: Tensor) -> Tensor:
    """`Selection.keep` of numbers of valid tokens on the device. On any device."""
    return selection.by_ratio(num_valid).clamp(min=selection.budget).minimum(num_valid)


def pick(
    importance: Tensor, seen: Tensor, selection: Selection, slots: int, num_valid: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The chosen positions: importance `[B, T, G, n]`, seen `[B, T, n]` -> index `[B, G, K]`, with T `[B, T, G, K]`.

    On any device.

    Chosen are the tokens that are always kept, then the most important ones, as many as `Selection` says. Equal ones
    are chosen from the lowest position up. Importance that is not seen may be anything, NaN as well. `num_valid
    [B, T]`: how many tokens are valid, if some of them aren't among the n.
    """
    width = selection.width(slots)
    if importance.shape[-1] == 0:
        return as_index(seen.new_full((*importance.shape[:3], width), -1, dtype=torch.int32))
    num_valid = (seen.sum(-1) if num_valid is None else num_valid)[:, :, None, None]  # [B, T, 1, 1]
    keep = num_kept(selection, num_valid)
    kept = always_kept(seen, selection)[:, :, None]
    ranked = importance.masked_fill(kept, torch.inf).masked_fill(~seen[:, :, None], -torch.inf)

    largest = ranked.topk(min(width, ranked.shape[-1])).values
    last = (keep - 1).clamp(min=0).expand(-1, -1, largest.shape[2], 1)
    threshold = largest.gather(-1, last)  # [B, T, G, 1]: the importance of the last one kept
    above, tied = ranked > threshold, ranked == threshold
    chosen = above | (tied & (tied.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))  # [B, T, G, n]
    column = torch.where(chosen, chosen.cumsum(-1) - 1, width)  # what is not chosen goes to a column of no use
    position = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device).expand(column.shape)
    index = seen.new_full((*importance.shape[:3], width + 1), -1, dtype=torch.int32)
    return as_index(index.scatter_(-1, column, position)[..., :width])


def attention_weights(call: Call[Tensor]) -> Tensor:
    """The attention probabilities of the n live tokens `[B, Hkv, g, T, n]`."""
    scores = score_live_tokens(call)
    return probabilities(scores, _by_head(call.sink_logit, scores))


def probabilities(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """Softmax over the tokens of `[..., n]`, less the share of a sink that broadcasts to `[..., 1]`.

    Zeros where no token is left to attend to.
    """
    if scores.shape[-1] == 0:
        return scores
    if sink is not None:
        return torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
    no_token = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.softmax(-1).masked_fill(no_token, 0.0)


def _choose(call: Call[Tensor], selection: Selection, scores: Tensor) -> Tensor:
    """The index by scores `[B, Hkv, g, T, n]`."""
    valid = scores[:, 0, 0] > -torch.inf  # [B, T, n]
    kept = always_kept(valid, selection)
    worth = importance(scores, selection, kept, call.sink_logit)
    return pick(worth, valid, selection, call.key.shape[2])


def worth(
    call: Call[Tensor], selection: Selection, scores: Tensor, rank: int, ranks: int, aside: Tensor | None = None
) -> Tensor:
    """See `rank_by_scores`; by scores `[B, Hkv, g, T, n]`. `aside [B, T, n]`: tokens that need no turn."""
    by_head = scores.flatten(1, 2)  # [B, Hq, T, n]
    if selection.pool == "union":
        kept = always_kept(by_head[:, 0] > -torch.inf, selection)[:, None]
        kept = kept if aside is None else kept | aside[:, None]
        order = by_head.masked_fill(kept, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        heads = by_head.shape[1]
        head = rank * heads + torch.arange(heads, device=order.device)[:, None, None]
        found = -(order * heads * ranks + head).amin(1).float()
    else:
        weights = probabilities(scores, _by_head(call.sink_logit, scores)).flatten(1, 2)
        found = weights.sum(1) if selection.pool == "sum" else weights.amax(1)
    return torch.nn.functional.pad(found[:, :, None], (0, call.key.shape[2] - found.shape[-1]))


def weigh_live_tokens(call: Call[Tensor], scores: Tensor) -> Tensor:
    """The live values, weighted by scores `[B, Hkv, g, T, n]`: `[B, Hq, T, D]`."""
    values = values_of(call, slice(scores.shape[-1]))
    if call.mask is not None:
        masked = hidden(call.mask[..., : scores.shape[-1]]).all(2, keepdim=True)  # [B or 1, 1, 1, n]
        if masked.any():  # a weight of 0 is not enough: padding may hold NaN
            values = values.masked_fill(masked.mT, 0.0)
    weights = probabilities(scores, _by_head(call.sink_logit, scores))
    return (weights.flatten(2, 3) @ values).view(call.query.shape).to(call.query.dtype)


def as_index(chosen: Tensor) -> Tensor:
    """Positions `[B, T, G, K]` as the ops have them for a decode step, whose T is 1: `[B, G, K]`. On any device."""
    return (chosen[:, 0] if chosen.shape[1] == 1 else chosen).contiguous()


def _by_head(sink_logit: Tensor | None, scores: Tensor) -> Tensor | None:
    """A logit a query head `[Hq]`, if there is one, to go with scores `[B, Hkv, g, T, n]`."""
    return None if sink_logit is None else sink_logit.float().view(*scores.shape[1:3], 1, 1)


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return softcap * (scores / softcap).tanh() if softcap else scores

"""Selections by bounds of pages in Triton. Definition: `methods/pages.py`.

score pages    bounds -> scores of pages; the newest page's bounds are stored
pick           the best pages, and their tokens
score chosen   with two levels: the exact scores of the tokens that were chosen
pick           the best of these

An additive mask gives the tokens of a page scores of their own, and `pool: union` gives them turns: then the scores are
spread over the tokens, and these are chosen as by exact ones (`select.choose`).
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Selection, arguments
from ..reference import seen
from .pick import Picked, pick
from .select import choose, takes_turns, worth
from .split import (
    LOG2E,
    Splits,
    after_previous,
    as_float16,
    cap,
    dot,
    empty_scores,
    load_group,
    load_keys,
    load_numbers,
    load_scales,
    mask_args,
    mask_tile,
    multiply,
    num_splits,
    overlap,
    padded_rows,
    rows_of,
    score_tile,
    store_split,
    sum_tile,
    tile_tokens,
    unmasked,
)


@triton.jit
def _count_tokens(page, length, mask_ptr, stride_mn, PAGE: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr):
    """How many tokens of pages `[N]` count: `[N]`."""
    if MASK == "none":
        return tl.minimum(tl.maximum(length - page * PAGE, 0), PAGE)
    token = page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    valid, _ = mask_tile(mask_ptr, token * stride_mn, token < length, MASK, HIDES)
    return tl.sum(valid.to(tl.int32), 1)


@triton.jit
def _add_page(m, l, score, count):
    """Add `count` tokens of one score a row `[ROWS]` to the softmax's m and l."""
    new_m = tl.maximum(m, score)
    shift = tl.where(new_m == float("-inf"), 0.0, new_m)
    return new_m, l * tl.exp2(m - shift) + count.to(tl.float32) * tl.exp2(score - shift)


@triton.jit
def _score_by_bounds(
    q, bounds, mask_ptr, score_ptr, count_ptr, scale, stride_s, stride_mn, begin, end, counted, length,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The scores of the pages from `begin` to `end` -> m, l; but not of those that are seen in part.

    How many tokens count is written for the pages up to `counted`.
    """
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_P)
    up = tl.maximum(q.to(tl.float32), 0.0).to(q.dtype)
    down = tl.minimum(q.to(tl.float32), 0.0).to(q.dtype)
    bounds += begin.to(tl.int64) * 2 * D
    for start in range(begin, end, BLOCK_P):
        page = start + lane
        inside = page < end
        low = load_keys(bounds, lane * 2 * D, inside, D, BLOCK_D)
        high = load_keys(bounds + D, lane * 2 * D, inside, D, BLOCK_D)
        count = _count_tokens(page, length, mask_ptr, stride_mn, PAGE, MASK, HIDES)
        score = cap((dot(up, high) + dot(down, low)) * scale, CAP) * LOG2E
        score = tl.where((inside & (count == PAGE))[None, :], score, float("-inf"))
        rows = score_ptr + row.to(tl.int64)[:, None] * stride_s + page[None, :]
        stored = inside & ((count == PAGE) | (count == 0))
        tl.store(rows, score, mask=(row[:, None] < GROUP) & stored[None, :], eviction_policy="evict_last")
        tl.store(count_ptr + page, count, mask=page < counted)
        m, l = sum_tile(score, m, l)
        bounds += BLOCK_P * 2 * D
    return m, l * PAGE


@triton.jit
def _score_by_keys(
    q, keys, scales, mask_ptr, scale, stride_kn, stride_xn, stride_mn, page, length, slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr,
    CAP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Of one page: its score by the tokens that count `[ROWS]`, how many count, and the bounds of all its slots."""
    token = page * PAGE + tl.arange(0, PAGE)
    valid, _ = mask_tile(mask_ptr, token * stride_mn, token < length, MASK, HIDES)
    place = token.to(tl.int64)
    k = load_numbers(keys, scales, place, stride_kn, stride_xn, token < slots, D, BLOCK_D, q.dtype, FP8)
    k = k.to(tl.float32)  # [BLOCK_D, PAGE]
    lowest = tl.min(tl.where(valid[None, :], k, float("inf")), 1)
    highest = tl.max(tl.where(valid[None, :], k, float("-inf")), 1)
    query = q.to(tl.float32)
    best = tl.where(query > 0.0, query * highest[None, :], query * lowest[None, :])
    best = tl.where((tl.arange(0, BLOCK_D) < D)[None, :] & (query != 0.0), best, 0.0)
    count = tl.sum(valid.to(tl.int32), 0)
    score = tl.where(count > 0, cap(tl.sum(best, 1) * scale, CAP) * LOG2E, float("-inf"))
    return score, count, tl.min(k, 1), tl.max(k, 1)


@triton.jit
def _score_pages(
    q_ptr, k_ptr, scale_ptr, bounds_ptr, mask_ptr, length_ptr, stat_ptr, score_ptr, count_ptr, valid_ptr, scale, slots,
    pages, splits, stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_xb, stride_xh, stride_xn,
    stride_mb, stride_mn, stride_s,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_P: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, CAP: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the query group of one kv head, and one split of its pages, by their bounds.

    Pages that are seen in part are judged by the keys that are seen, and so is the newest one, by the last program.
    """
    after_previous(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    head = (batch * NUM_KV_HEADS + kv_head) * GROUP
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    newest = tl.cdiv(length, PAGE) - 1
    chunk = tl.cdiv(tl.cdiv(newest, BLOCK_P), splits - 1) * BLOCK_P
    begin = split * chunk
    end = tl.minimum(begin + chunk, newest)
    q = load_group(
        q_ptr + batch * stride_qb + kv_head * GROUP * stride_qh, stride_qh, stride_qd, GROUP, ROWS, D, BLOCK_D
    )
    keys = k_ptr + batch * stride_kb + kv_head * stride_kh
    scales = scale_ptr
    if FP8:
        scales += batch * stride_xb + kv_head * stride_xh
    bounds = bounds_ptr + (batch * NUM_KV_HEADS + kv_head) * pages * 2 * D
    scores = score_ptr + head * stride_s
    counts = count_ptr + batch * tl.cdiv(slots, PAGE)
    masks = mask_ptr
    if MASK != "none":
        masks += batch * stride_mb
    counted = tl.where(kv_head == 0, end, 0)
    if split == splits - 1:
        m = tl.full([ROWS], float("-inf"), tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        num_valid = length * 0
        if newest >= 0:
            m, num_valid, lowest, highest = _score_by_keys(
                q, keys, scales, masks, scale, stride_kn, stride_xn, stride_mn, newest, length, slots, D, BLOCK_D, PAGE,
                MASK, HIDES, CAP, FP8,
            )  # fmt: skip
            l += num_valid.to(tl.float32)
            tl.store(scores + row * stride_s + newest, m, mask=row < GROUP)
            if kv_head == 0:
                tl.store(counts + newest, num_valid)
            if newest < pages:
                stored = bounds + newest.to(tl.int64) * 2 * D + dim
                tl.store(stored, lowest.to(bounds_ptr.dtype.element_ty), mask=dim < D)
                tl.store(stored + D, highest.to(bounds_ptr.dtype.element_ty), mask=dim < D)
    elif MASK == "none" or unmasked(masks, stride_mn, begin * PAGE, end * PAGE, MASK, HIDES, 4096):
        m, l = _score_by_bounds(
            q, bounds, masks, scores, counts, scale, stride_s, stride_mn, begin, end, counted, length,
            GROUP, ROWS, D, BLOCK_D, PAGE, BLOCK_P, "none", HIDES, CAP,
        )  # fmt: skip
        num_valid = tl.maximum(end - begin, 0) * PAGE
    else:
        m, l = _score_by_bounds(
            q, bounds, masks, scores, counts, scale, stride_s, stride_mn, begin, end, counted, length,
            GROUP, ROWS, D, BLOCK_D, PAGE, BLOCK_P, MASK, HIDES, CAP,
        )  # fmt: skip
        num_valid = length * 0
        number = tl.arange(0, BLOCK_P)
        for start in range(begin, end, BLOCK_P):
            page = start + number
            count = tl.where(page < end, _count_tokens(page, length, masks, stride_mn, PAGE, MASK, HIDES), 0)
            num_valid += tl.sum(count, 0)
            in_part = (count > 0) & (count < PAGE)
            here = tl.min(tl.where(in_part, number, BLOCK_P), 0)
            while here < BLOCK_P:
                score, seen_here, _, _ = _score_by_keys(
                    q, keys, scales, masks, scale, stride_kn, stride_xn, stride_mn, start + here, length, slots,
                    D, BLOCK_D, PAGE, MASK, HIDES, CAP, FP8,
                )  # fmt: skip
                tl.store(scores + row * stride_s + start + here, score, mask=row < GROUP)
                m, l = _add_page(m, l, score, seen_here)
                here = tl.min(tl.where(in_part & (number > here), number, BLOCK_P), 0)
    if kv_head == 0:
        tl.store(valid_ptr + batch * splits + split, num_valid)
    store_split(m, l, m, m, stat_ptr, stat_ptr, head, split, splits, GROUP, ROWS, D, BLOCK_D, False, False)


@triton.jit
def _spread(
    page_score_ptr, mask_ptr, length_ptr, stat_ptr, score_ptr, slots, splits, stride_p, stride_mb, stride_mn, stride_s,
    NUM_HEADS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: the scores that stand in for those of TILE tokens of one query head."""
    after_previous(PDL)
    batch = tl.program_id(2).to(tl.int64)
    head = batch * NUM_HEADS + tl.program_id(1)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid, bias = mask_tile(mask_ptr, batch * stride_mb + token * stride_mn, token < length, MASK, HIDES)
    score = tl.load(page_score_ptr + head * stride_p + token // PAGE, mask=token < length, other=0.0)
    score = tl.where(valid, score + bias * LOG2E, float("-inf"))
    tl.store(score_ptr + head * stride_s + token, score, mask=token < length)
    m = tl.max(score, 0)
    l = tl.sum(tl.exp2(score - tl.where(m == float("-inf"), 0.0, m)), 0)
    tl.store(stat_ptr + (head * splits + tl.program_id(0)) * 2, m)
    tl.store(stat_ptr + (head * splits + tl.program_id(0)) * 2 + 1, l)


@triton.jit
def _score_chosen(
    q_ptr, k_ptr, scale_ptr, index_ptr, mask_ptr, stat_ptr, score_ptr, scale, width, splits,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_xb, stride_xh, stride_xn, stride_ib,
    stride_ig, stride_mb, stride_mn, stride_s,
    PAIRS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAIRS_PER_KV_HEAD: tl.constexpr,
    ONE_SET: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HIDES: tl.constexpr, CAP: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N of the chosen tokens of a pair of a token set and a kv head."""
    after_previous(PDL)
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = pair // PAIRS_PER_KV_HEAD
    token_set = 0 if ONE_SET else pair
    row = tl.arange(0, ROWS)
    head = (batch * PAIRS + pair) * GROUP
    q = load_group(q_ptr + batch * stride_qb + pair * GROUP * stride_qh, stride_qh, stride_qd, GROUP, ROWS, D, BLOCK_D)
    q, unit = as_float16(q, FP8)
    column = split * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(index_ptr + batch * stride_ib + token_set * stride_ig + column, mask=column < width, other=-1)
    k = load_keys(
        k_ptr + batch * stride_kb + kv_head * stride_kh, token.to(tl.int64) * stride_kn, token >= 0, D, BLOCK_D
    )
    valid, bias = mask_tile(mask_ptr, batch * stride_mb + token * stride_mn, token >= 0, MASK, HIDES)
    key_scale = unit  # in FP8 alone it is read
    if FP8:
        places = scale_ptr + batch * stride_xb + kv_head * stride_xh
        key_scale, _values = load_scales(places, token.to(tl.int64) * stride_xn, token >= 0)
    score = score_tile(multiply(q, unit, k, key_scale, FP8), valid[None, :], bias[None, :], scale, CAP)
    scores = score_ptr + (head + row)[:, None] * stride_s + column[None, :]
    tl.store(scores, score, mask=(row < GROUP)[:, None] & (column < width)[None, :])
    m, l = sum_tile(score, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32))
    store_split(m, l, m, m, stat_ptr, stat_ptr, head, split, splits, GROUP, ROWS, D, BLOCK_D, False, False)


def choose_pages(call: Call[Tensor], selection: Selection, bounds: Tensor, page: int) -> Picked:
    """The tokens of the best pages. Also brings `bounds [B, Hkv, P, 2, D]` up to date."""
    num_heads, (num_kv_heads, slots) = call.query.shape[1], call.key.shape[1:3]
    num_sets = selection.num_sets(num_heads, num_kv_heads)
    scores, stats, counts, valid = _scores_of_pages(call, bounds, page)
    if _has_own_scores(call.mask) or takes_turns(selection, num_sets, num_heads):
        index = choose(_by_token(scores, call, page), call, selection, page=page)
        return Picked(index, torch.stack([(index[:, 0] >= 0).sum(1), seen(call).sum((1, 2))], 1).int())
    units = triton.cdiv(slots, page)
    return pick(
        scores, stats, call.sink_logit, selection, units, slots, num_sets, page, counts, valid, call.mask, call.length
    )


def rank_by_pages(call: Call[Tensor], selection: Selection, bounds: Tensor, page: int, rank: int, ranks: int) -> Tensor:
    """`choose_pages` up to the choice: see `Pages.weigh`."""
    scores, *_ = _scores_of_pages(call, bounds, page)
    return worth(_by_token(scores, call, page), call, selection, rank, ranks, page=page)


def _scores_of_pages(call: Call[Tensor], bounds: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of pages by their bounds `[B, Hq, >= P]`, and of splits: m and l, and how many tokens count."""
    q, _, _, length, mask, scale, _, softcap, _ = arguments(call)
    rows = rows_of(call)
    k = rows.key
    batch, num_heads = q.shape[:2]
    num_kv_heads, slots = k.shape[1:3]
    units = triton.cdiv(slots, page)
    large = batch * num_kv_heads * units >= 2**14
    block_p = tile_tokens(q, stage_bytes=2**15 if large else 2**14)
    warps, stages, per_processor = (4, 3, 2) if large else (2, 3, 4)
    tiles = triton.cdiv(units, block_p)
    splits = num_splits(q.device, batch * num_kv_heads, tiles, per_processor) + 1  # one is the newest page
    stats = q.new_empty(batch, num_heads, splits, 2, dtype=torch.float32)
    counts, valid = (q.new_empty(batch, number, dtype=torch.int32) for number in (units, splits))
    scores = empty_scores(q, units)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _score_pages[(splits, num_kv_heads, batch)](
        q, k, rows.scales, bounds, mask_data, length, stats, scores, counts, valid, scale, slots, bounds.shape[2],
        splits, q.stride(0), q.stride(1), q.stride(3), *k.stride()[:3], *rows.strides, *stride_m, scores.stride(1),
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, ROWS=padded_rows(num_heads // num_kv_heads),
        **rows.sizes, PAGE=page, BLOCK_P=block_p, **mask_kind, CAP=softcap,
        num_warps=warps, num_stages=stages, **overlap(q.device),
    )  # fmt: skip
    return scores, stats, counts, valid


def _by_token(scores: Tensor, call: Call[Tensor], page: int) -> Splits:
    """Scores of pages, spread over their tokens."""
    batch, num_heads = call.query.shape[:2]
    slots = call.key.shape[2]
    (mask_data, *stride_m), mask_kind = mask_args(call.mask, batch, slots)
    splits = triton.cdiv(slots, 1024)
    stats = scores.new_empty(batch, num_heads, splits, 2)
    by_token = empty_scores(call.query, slots)
    _spread[(splits, num_heads, batch)](
        scores, mask_data, call.length, stats, by_token, slots, splits, scores.stride(1), *stride_m, by_token.stride(1),
        NUM_HEADS=num_heads, PAGE=page, TILE=1024, **mask_kind, **overlap(scores.device),
    )  # fmt: skip
    return Splits(stats, None, by_token)


def choose_again(call: Call[Tensor], selection: Selection, of: Picked) -> Tensor:
    """The best tokens by exact scores of those that were picked: an index `[B, G, K]`."""
    q, _, _, _, mask, scale, sink_logit, softcap, _ = arguments(call)
    rows = rows_of(call)
    k = rows.key
    batch, num_heads = q.shape[:2]
    num_kv_heads, slots = k.shape[1:3]
    sets, wide = of.index.shape[1:]
    pairs = max(sets, num_kv_heads)
    group, block_n = num_heads // pairs, 64
    splits = triton.cdiv(wide, block_n)
    stats, scores = q.new_empty(batch, num_heads, splits, 2, dtype=torch.float32), empty_scores(q, wide)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _score_chosen[(splits, pairs, batch)](
        q, k, rows.scales, of.index, mask_data, stats, scores, scale, wide, splits,
        q.stride(0), q.stride(1), q.stride(3), *k.stride()[:3], *rows.strides, *of.index.stride()[:2], *stride_m,
        scores.stride(1),
        PAIRS=pairs, GROUP=group, ROWS=padded_rows(group), PAIRS_PER_KV_HEAD=pairs // num_kv_heads, ONE_SET=sets == 1,
        **rows.sizes, BLOCK_N=block_n, **mask_kind, CAP=softcap, num_warps=4,
        **overlap(q.device),
    )  # fmt: skip
    if takes_turns(selection, sets, num_heads):
        live = (of.index[:, :1, None] >= 0).contiguous()  # [B, 1, 1, wide K]: as many in every set
        candidates = replace(call, mask=live, length=torch.full_like(call.length, wide))
        num_valid = of.tally[:, 1].contiguous() if selection.ratio else None
        return choose(Splits(stats, None, scores), candidates, selection, of=of.index, num_valid=num_valid)
    return pick(scores, stats, sink_logit, selection, wide, slots, sets, of=of).index


def _has_own_scores(mask: Tensor | None) -> bool:
    """Whether tokens of one page may differ."""
    return mask is not None and mask.is_floating_point()

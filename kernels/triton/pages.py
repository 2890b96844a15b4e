"""Selections by bounds of pages in Triton. Definition: `methods/pages.py`.

score pages    bounds -> the scores that stand in for those of the tokens; the newest page's bounds are stored
choose         the tokens with the best of these: `select.choose`
score chosen   with two levels: the exact scores of the tokens that were chosen, of which the best are chosen again
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Selection, arguments
from ..reference import seen
from .select import choose
from .split import (
    LOG2E,
    Splits,
    after_previous,
    cap,
    check_rows,
    dot,
    empty_scores,
    load_group,
    load_keys,
    mask_args,
    mask_tile,
    overlap,
    padded_dim,
    padded_rows,
    score_tile,
    store_split,
    sum_tile,
)


@triton.jit
def _score_pages(
    q_ptr, k_ptr, bounds_ptr, mask_ptr, length_ptr, stat_ptr, score_ptr, scale, slots, pages, splits,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_mb, stride_mn, stride_s,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_P: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, CAP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pages of one kv head, and its group of query heads."""
    after_previous(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    head = (batch * NUM_KV_HEADS + kv_head) * GROUP
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    first = split * BLOCK_P
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    if first * PAGE < length:
        q = load_group(
            q_ptr + batch * stride_qb + kv_head * GROUP * stride_qh, stride_qh, stride_qd, GROUP, ROWS, D, BLOCK_D
        )
        query = q.to(tl.float32)
        number = tl.arange(0, BLOCK_P)
        page = first + number
        token = page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
        valid, bias = mask_tile(
            mask_ptr, batch * stride_mb + token * stride_mn, token < length, MASK, HIDES
        )  # [BLOCK_P, PAGE]
        bounds = bounds_ptr + (batch * NUM_KV_HEADS + kv_head) * pages * 2 * D
        low = load_keys(bounds, page * 2 * D, page < pages, D, BLOCK_D)
        high = load_keys(bounds + D, page * 2 * D, page < pages, D, BLOCK_D)
        product = dot(tl.maximum(query, 0.0).to(q.dtype), high) + dot(tl.minimum(query, 0.0).to(q.dtype), low)

        # The newest page, and pages that are seen in part: by their keys
        newest = (length - 1) // PAGE
        count = tl.sum(valid.to(tl.int32), 1)
        by_keys = ((count > 0) & (count < PAGE)) | (page == newest)
        here = tl.min(tl.where(by_keys, number, BLOCK_P), 0)
        while here < BLOCK_P:
            there = (first + here) * PAGE + tl.arange(0, PAGE)
            is_seen, _ = mask_tile(mask_ptr, batch * stride_mb + there * stride_mn, there < length, MASK, HIDES)
            rows = k_ptr + batch * stride_kb + kv_head * stride_kh + there.to(tl.int64)[None, :] * stride_kn
            keys = tl.load(rows + dim[:, None], mask=(there < slots)[None, :] & (dim < D)[:, None], other=0.0)
            lowest = tl.min(tl.where(is_seen[None, :], keys.to(tl.float32), float("inf")), 1)  # [BLOCK_D]
            highest = tl.max(tl.where(is_seen[None, :], keys.to(tl.float32), float("-inf")), 1)
            best = tl.where(query > 0.0, query * highest[None, :], query * lowest[None, :])
            bound = tl.sum(tl.where((dim < D)[None, :] & (query != 0.0), best, 0.0), 1)
            product = tl.where((number == here)[None, :], bound[:, None], product)
            if (first + here == newest) & (newest < pages):
                stored = bounds + newest * 2 * D + dim
                tl.store(stored, tl.min(keys.to(tl.float32), 1).to(bounds_ptr.dtype.element_ty), mask=dim < D)
                tl.store(stored + D, tl.max(keys.to(tl.float32), 1).to(bounds_ptr.dtype.element_ty), mask=dim < D)
            here = tl.min(tl.where(by_keys & (number > here), number, BLOCK_P), 0)

        of_page = cap(product * scale, CAP)
        score = (of_page[:, :, None] + bias[None, :, :]) * LOG2E
        score = tl.where(valid[None, :, :], score, float("-inf"))
        score = tl.reshape(score, [ROWS, BLOCK_P * PAGE])
        slot = first * PAGE + tl.arange(0, BLOCK_P * PAGE)
        scores = score_ptr + (head + row)[:, None] * stride_s + slot[None, :]
        tl.store(scores, score, mask=(row < GROUP)[:, None] & (slot < length)[None, :])
        if MASK == "added":
            m, l = sum_tile(score, m, l)
        else:  # the tokens of a page that count have one score
            of_page = tl.where((count > 0)[None, :], of_page * LOG2E, float("-inf"))
            m = tl.max(of_page, 1)
            shift = tl.where(m == float("-inf"), 0.0, m)
            l = tl.sum(tl.exp2(of_page - shift[:, None]) * count[None, :].to(tl.float32), 1)
    store_split(m, l, m, stat_ptr, stat_ptr, head, split, splits, GROUP, ROWS, D, BLOCK_D, False)


@triton.jit
def _score_chosen(
    q_ptr, k_ptr, index_ptr, mask_ptr, stat_ptr, score_ptr, scale, width, splits,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_ib, stride_ig, stride_mb, stride_mn,
    stride_s,
    PAIRS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAIRS_PER_KV_HEAD: tl.constexpr,
    ONE_SET: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HIDES: tl.constexpr, CAP: tl.constexpr, PDL: tl.constexpr,
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
    column = split * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(index_ptr + batch * stride_ib + token_set * stride_ig + column, mask=column < width, other=-1)
    k = load_keys(
        k_ptr + batch * stride_kb + kv_head * stride_kh, token.to(tl.int64) * stride_kn, token >= 0, D, BLOCK_D
    )
    valid, bias = mask_tile(mask_ptr, batch * stride_mb + token * stride_mn, token >= 0, MASK, HIDES)
    score = score_tile(q, k, valid, bias, scale, CAP)
    scores = score_ptr + (head + row)[:, None] * stride_s + column[None, :]
    tl.store(scores, score, mask=(row < GROUP)[:, None] & (column < width)[None, :])
    m, l = sum_tile(score, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32))
    store_split(m, l, m, stat_ptr, stat_ptr, head, split, splits, GROUP, ROWS, D, BLOCK_D, False)


def choose_by_bounds(call: Call[Tensor], selection: Selection, bounds: Tensor, page: int) -> Tensor:
    """The tokens of the best pages. Also brings `bounds [B, Hkv, P, 2, D]` up to date."""
    q, k, _, length, mask, scale, _, softcap = arguments(call)
    check_rows(k, k)
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    block_p = max(16, 512 // page)
    splits = triton.cdiv(slots, block_p * page)
    stats, scores = q.new_empty(batch, num_heads, splits, 2, dtype=torch.float32), empty_scores(q, slots)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _score_pages[(splits, num_kv_heads, batch)](
        q, k, bounds, mask_data, length, stats, scores, scale, slots, bounds.shape[2], splits,
        q.stride(0), q.stride(1), q.stride(3), *k.stride()[:3], *stride_m, scores.stride(1),
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, ROWS=padded_rows(num_heads // num_kv_heads),
        D=head_dim, BLOCK_D=padded_dim(head_dim), PAGE=page, BLOCK_P=block_p, **mask_kind, CAP=softcap,
        num_warps=4 if page <= 32 else 8, **overlap(q.device),
    )  # fmt: skip
    return choose(Splits(stats, None, scores), call, selection, page=page)


def choose_again(call: Call[Tensor], selection: Selection, index: Tensor) -> Tensor:
    """The best tokens by exact scores of those in `index [B, G, wide K]`: an index `[B, G, K]`."""
    q, k, _, _, mask, scale, _, softcap = arguments(call)
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    sets, width = index.shape[1:]
    pairs = max(sets, num_kv_heads)
    group, block_n = num_heads // pairs, 64
    splits = triton.cdiv(width, block_n)
    stats, scores = q.new_empty(batch, num_heads, splits, 2, dtype=torch.float32), empty_scores(q, width)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _score_chosen[(splits, pairs, batch)](
        q, k, index, mask_data, stats, scores, scale, width, splits,
        q.stride(0), q.stride(1), q.stride(3), *k.stride()[:3], *index.stride()[:2], *stride_m, scores.stride(1),
        PAIRS=pairs, GROUP=group, ROWS=padded_rows(group), PAIRS_PER_KV_HEAD=pairs // num_kv_heads, ONE_SET=sets == 1,
        D=head_dim, BLOCK_D=padded_dim(head_dim), BLOCK_N=block_n, **mask_kind, CAP=softcap, num_warps=4,
        **overlap(q.device),
    )  # fmt: skip
    live = (index[:, :1, None] >= 0).contiguous()  # [B, 1, 1, wide K]: as many in every set
    candidates = replace(call, mask=live, length=torch.full_like(call.length, width))
    num_valid = seen(call).sum((1, 2), dtype=torch.int32) if selection.ratio else None
    return choose(Splits(stats, None, scores), candidates, selection, of=index, num_valid=num_valid)

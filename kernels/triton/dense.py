"""`full_attention` in Triton: a split-KV scan of the whole live cache. Reference: `reference.full_attention`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, arguments
from .split import (
    Splits,
    after_previous,
    as_float16,
    empty_scores,
    live_until,
    load_group,
    load_keys,
    load_scales,
    load_values,
    mask_args,
    mask_edges,
    mask_tile,
    merge,
    multiply,
    num_splits,
    overlap,
    padded_rows,
    rows_of,
    score_tile,
    store_split,
    sum_tile,
    tile_tokens,
    token_stride,
    weigh_tile,
)

MOST_ROWS = 64  # of a tile of queries, whose sums stay in registers


@triton.jit
def _attend(
    q, unit, keys, values, scales, mask_ptr, score_ptr, m, l, acc, odd_acc, scale, stride_s, begin, end, until,
    tokens, stride_kn, stride_vn, stride_xn, stride_mt, stride_mn,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, CAP: tl.constexpr,
    WRITE_SCORES: tl.constexpr, VALUES: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Go on with the running softmax (m, l, acc, odd_acc: see split.py) of one query group from `begin` to `end`.

    Its rows are those of `tokens` query tokens, which see the slots before `until [ROWS]`.
    """
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_N)
    PACK: tl.constexpr = 2 if FP8 else 1  # values in a number
    keys += begin.to(tl.int64) * stride_kn
    values += begin.to(tl.int64) * stride_vn
    # Masks of each row take shared memory as well; a loop over what they change is short
    STAGES: tl.constexpr = 2 if TOKENS > 1 and MASK != "none" else None
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        token = start + lane
        inside = token < end
        k = load_keys(keys, lane * stride_kn, inside, D, BLOCK_D)
        if VALUES:
            v = load_values(values, lane * stride_vn, inside, D // PACK, BLOCK_D // PACK)
        key_scale, value_scale = unit, unit  # in FP8 alone they are read
        if FP8:
            key_scale, value_scale = load_scales(scales, token.to(tl.int64) * stride_xn, inside)
        product = multiply(q, unit, k, key_scale, FP8)
        if TOKENS == 1:
            valid, bias = mask_tile(mask_ptr, token * stride_mn, inside, MASK, HIDES)
            score = score_tile(product, valid[None, :], bias[None, :], scale, CAP)
        else:  # each row has its own part of the mask
            sees = inside[None, :] & (token[None, :] < until[:, None])
            offset = (row // GROUP)[:, None] * stride_mt + token[None, :] * stride_mn
            sees, bias = mask_tile(mask_ptr, offset, sees & (row < GROUP * tokens)[:, None], MASK, HIDES)
            score = score_tile(product, sees, bias, scale, CAP)
            valid = tl.max(sees.to(tl.int32), 0) != 0
        if WRITE_SCORES:
            place = (row // GROUP * NUM_HEADS + row % GROUP).to(tl.int64)
            rows = score_ptr + place[:, None] * stride_s + token[None, :]
            stored = (row[:, None] < GROUP * tokens) & inside[None, :]
            # The selection reads scores back from L2, which the much larger stream of keys and values would push out.
            tl.store(rows, score, mask=stored, eviction_policy="evict_last")
        if VALUES:
            m, l, acc, odd_acc = weigh_tile(score, v, value_scale, valid, m, l, acc, odd_acc, MASK, q.dtype, FP8)
            values += BLOCK_N * stride_vn
        else:
            m, l = sum_tile(score, m, l)
        keys += BLOCK_N * stride_kn
    return m, l, acc, odd_acc


@triton.jit
def _hide(
    score_ptr, stride_s, begin, end, tokens, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the scores of slots that are hidden from all rows."""
    row = tl.arange(0, ROWS)
    place = (row // GROUP * NUM_HEADS + row % GROUP).to(tl.int64)
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        stored = (row[:, None] < GROUP * tokens) & (slot[None, :] < end)
        hidden = tl.full([ROWS, BLOCK_N], float("-inf"), tl.float32)
        tl.store(score_ptr + place[:, None] * stride_s + slot[None, :], hidden, mask=stored)


@triton.jit
def _scan(
    q_ptr, k_ptr, v_ptr, scale_ptr, mask_ptr, length_ptr, acc_ptr, stat_ptr, score_ptr, scale, slots,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_xb, stride_xh, stride_xn, stride_mb, stride_mn, stride_mt, stride_s, splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr,
    CAP: tl.constexpr, WRITE_SCORES: tl.constexpr, VALUES: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the query group of one kv head, of PER query tokens, against one split of its cache."""
    after_previous(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first = batch * 0  # query token
    if TOKENS > PER:
        first = batch % tl.cdiv(TOKENS, PER) * PER
        batch = batch // tl.cdiv(TOKENS, PER)
    tokens = tl.minimum(PER, TOKENS - first).to(tl.int32)
    head = ((batch * TOKENS + first) * NUM_KV_HEADS + kv_head) * GROUP

    length = live_until(length_ptr, slots, 0, 1)
    until = live_until(length_ptr, slots, first + tl.arange(0, ROWS) // GROUP, TOKENS)  # [ROWS]
    tiles = tl.cdiv(length, BLOCK_N)
    chunk = tl.cdiv(tiles, splits) * BLOCK_N  # equal splits of the live length, which only the device knows
    begin = split * chunk
    end = tl.minimum(begin + chunk, length)

    queries = q_ptr + batch * stride_qb + kv_head * GROUP * stride_qh + first * stride_qt
    q = load_group(queries, stride_qh, stride_qd, GROUP, ROWS, D, BLOCK_D, stride_qt, tokens)
    q, unit = as_float16(q, FP8)
    keys = k_ptr + batch * stride_kb + kv_head * stride_kh
    values = v_ptr + batch * stride_vb + kv_head * stride_vh
    scales = scale_ptr
    if FP8:
        scales += batch * stride_xb + kv_head * stride_xh
    scores = score_ptr
    if WRITE_SCORES:
        scores += head * stride_s
    masks = mask_ptr
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    PACK: tl.constexpr = 2 if FP8 else 1
    acc = tl.zeros([ROWS, BLOCK_D // PACK], tl.float32)
    odd_acc = acc
    plain_end = end  # up to here the mask changes nothing
    if MASK != "none":
        masks += batch * stride_mb + first * stride_mt
        visible, changed = mask_edges(masks, stride_mn, begin, end, MASK, HIDES, stride_mt, tokens, PER)
        if WRITE_SCORES:
            _hide(scores, stride_s, begin, visible, tokens, NUM_KV_HEADS * GROUP, GROUP, ROWS, BLOCK_N)
        begin = visible
        if changed < end:
            plain_end = begin + (changed - begin) // BLOCK_N * BLOCK_N
    m, l, acc, odd_acc = _attend(
        q, unit, keys, values, scales, masks, scores, m, l, acc, odd_acc, scale, stride_s, begin, plain_end, until,
        tokens, stride_kn, stride_vn, stride_xn, stride_mt, stride_mn, NUM_KV_HEADS * GROUP, GROUP, TOKENS, ROWS, D,
        BLOCK_D, BLOCK_N, "none", HIDES, CAP, WRITE_SCORES, VALUES, FP8,
    )  # fmt: skip
    if MASK != "none":
        m, l, acc, odd_acc = _attend(
            q, unit, keys, values, scales, masks, scores, m, l, acc, odd_acc, scale, stride_s, plain_end, end,
            until, tokens, stride_kn, stride_vn, stride_xn, stride_mt, stride_mn, NUM_KV_HEADS * GROUP, GROUP, TOKENS,
            ROWS, D, BLOCK_D, BLOCK_N, MASK, HIDES, CAP, WRITE_SCORES, VALUES, FP8,
        )  # fmt: skip
    store_split(
        m, l, acc, odd_acc, acc_ptr, stat_ptr, head, split, splits, GROUP, ROWS, D, BLOCK_D, VALUES, FP8,
        NUM_KV_HEADS * GROUP, tokens,
    )  # fmt: skip


def scan(call: Call[Tensor], write_scores: bool = False, values: bool = True) -> Splits:
    """Attend to the whole live cache, in splits; without `values`, only score its keys."""
    q, _, _, length, mask, scale, _, softcap, _ = arguments(call)
    rows = rows_of(call)
    k, v = rows.key, rows.value
    batch, num_heads, tokens, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    group = num_heads // num_kv_heads
    per = min(tokens, max(1, MOST_ROWS // group))  # query tokens a program
    programs = batch * triton.cdiv(tokens, per)
    # A large cache keeps every processor busy with one program of long tiles; a small one needs more, shorter programs.
    large = head_dim > 64 and batch * num_kv_heads * slots >= 2**17
    block_n = tile_tokens(k, stage_bytes=2**16 if large else 2**15)
    warps, stages = (8, 3) if large and values else (4, 3 if values else 4)
    per_processor = 1 if large else 2
    if large and rows.scales is not None and tokens == 1:  # half the bytes, and more to compute for each
        warps, stages, per_processor = 4, 2 if values else 3, 3 if values else 4
    splits = num_splits(q.device, programs * num_kv_heads, triton.cdiv(slots, block_n), per_processor)
    if mask is not None and batch > 1:  # rows may differ: padding is skipped, and short programs share what is left
        splits = min(4 * splits, triton.cdiv(slots, block_n))
    acc = q.new_empty(batch * tokens, num_heads, splits, head_dim, dtype=torch.float32) if values else None
    stats = q.new_empty(batch * tokens, num_heads, splits, 2, dtype=torch.float32)
    scores = empty_scores(q, slots) if write_scores else None
    stride_s = 0 if scores is None else scores.stride(1)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _scan[(splits, num_kv_heads, programs)](
        q, k, v, rows.scales, mask_data, length, acc, stats, scores, scale, slots,
        *q.stride(), *k.stride()[:3], *v.stride()[:3], *rows.strides, *stride_m, token_stride(mask), stride_s, splits,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, TOKENS=tokens, PER=per, ROWS=padded_rows(group * per),
        BLOCK_N=block_n, **rows.sizes, **mask_kind, CAP=softcap,
        WRITE_SCORES=write_scores, VALUES=values, num_warps=warps, num_stages=stages, **overlap(q.device),
    )  # fmt: skip
    return Splits(stats, acc, scores)


def full_attention(call: Call[Tensor]) -> Tensor:
    """See `reference.full_attention`."""
    out = call.query.new_empty(call.query.shape)
    merge(scan(call), call.sink_logit, out)
    return out

"""`sparse_attention` in Triton: a split-K gather of the chosen cache rows. Reference: `reference.sparse_attention`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, arguments
from .split import (
    Splits,
    after_previous,
    as_float16,
    live_until,
    load_group,
    load_keys,
    load_scales,
    load_values,
    mask_args,
    mask_tile,
    merge,
    multiply,
    num_splits,
    overlap,
    padded_rows,
    rows_of,
    score_tile,
    store_split,
    tile_tokens,
    token_stride,
    weigh_tile,
)


@triton.jit
def _gather(
    q_ptr, k_ptr, v_ptr, scale_ptr, index_ptr, mask_ptr, length_ptr, acc_ptr, stat_ptr, scale, slots,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_xb, stride_xh, stride_xn, stride_ir, stride_ig, stride_ik, stride_mb, stride_mn, stride_mt, width, splits,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAIRS_PER_KV_HEAD: tl.constexpr,
    ONE_SET: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HIDES: tl.constexpr, CAP: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the GROUP query heads of one pair of a token set and a kv head, against one split of that set.

    Of several query tokens, each has token sets of its own, and programs of its own.
    """
    after_previous(PDL)
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    batch = row // TOKENS
    kv_head = pair // PAIRS_PER_KV_HEAD
    token_set = 0 if ONE_SET else pair
    length = live_until(length_ptr, slots, row % TOKENS, TOKENS)

    queries = q_ptr + batch * stride_qb + pair * GROUP * stride_qh + row % TOKENS * stride_qt
    q = load_group(queries, stride_qh, stride_qd, GROUP, ROWS, D, BLOCK_D)
    q, unit = as_float16(q, FP8)
    masks = batch * stride_mb + row % TOKENS * stride_mt
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    PACK: tl.constexpr = 2 if FP8 else 1
    acc = tl.zeros([ROWS, BLOCK_D // PACK], tl.float32)
    odd_acc = acc
    keys = k_ptr + batch * stride_kb + kv_head * stride_kh
    values = v_ptr + batch * stride_vb + kv_head * stride_vh
    scales = scale_ptr
    if FP8:
        scales += batch * stride_xb + kv_head * stride_xh
    chunk = tl.cdiv(width, splits)
    end = tl.minimum(split * chunk + chunk, width)
    for start in range(split * chunk, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < end
        entry = index_ptr + row * stride_ir + token_set * stride_ig + column * stride_ik
        token = tl.load(entry, mask=inside, other=-1)
        alive = (token >= 0) & (token < length)
        cache_row = token.to(tl.int64)
        k = load_keys(keys, cache_row * stride_kn, alive, D, BLOCK_D)
        v = load_values(values, cache_row * stride_vn, alive, D // PACK, BLOCK_D // PACK)
        key_scale, value_scale = unit, unit  # in FP8 alone they are read
        if FP8:
            key_scale, value_scale = load_scales(scales, cache_row * stride_xn, alive)
        valid, bias = mask_tile(mask_ptr, masks + token * stride_mn, alive, MASK, HIDES)
        product = multiply(q, unit, k, key_scale, FP8)
        score = score_tile(product, valid[None, :], bias[None, :], scale, CAP)
        m, l, acc, odd_acc = weigh_tile(score, v, value_scale, valid, m, l, acc, odd_acc, MASK, q.dtype, FP8)
    head = (row * PAIRS + pair) * GROUP
    store_split(m, l, acc, odd_acc, acc_ptr, stat_ptr, head, split, splits, GROUP, ROWS, D, BLOCK_D, True, FP8)


def sparse_attention(call: Call[Tensor], index: Tensor) -> Tensor:
    """See `reference.sparse_attention`."""
    q, _, _, length, mask, scale, sink_logit, softcap, _ = arguments(call)
    stored = rows_of(call)
    k, v = stored.key, stored.value
    batch, num_heads, tokens, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    rows, (sets, width) = batch * tokens, index.shape[-2:]
    index = index.reshape(rows, sets, width)
    pairs = max(sets, num_kv_heads)
    group = num_heads // pairs
    # Few pairs: short programs, whose loads are all in flight at once. Many pairs: longer programs, with a pipeline.
    most, stages, per_processor = (64, 1, 8) if rows * pairs < 32 else (128, 2, 2)
    if stored.scales is not None and rows * pairs >= 32:
        most, per_processor = 64, 4
    block_n = tile_tokens(k, most * 2**9, most)
    splits = num_splits(q.device, rows * pairs, triton.cdiv(width, block_n), per_processor)
    acc = q.new_empty(rows, num_heads, splits, head_dim, dtype=torch.float32)
    stats = q.new_empty(rows, num_heads, splits, 2, dtype=torch.float32)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _gather[(splits, pairs, rows)](
        q, k, v, stored.scales, index, mask_data, length, acc, stats, scale, slots,
        *q.stride(), *k.stride()[:3], *v.stride()[:3], *stored.strides, *index.stride(), *stride_m, token_stride(mask),
        width, splits,
        TOKENS=tokens, PAIRS=pairs, GROUP=group, ROWS=padded_rows(group), PAIRS_PER_KV_HEAD=pairs // num_kv_heads,
        ONE_SET=sets == 1, BLOCK_N=block_n, **stored.sizes,
        **mask_kind, CAP=softcap, num_warps=4, num_stages=stages, **overlap(q.device),
    )  # fmt: skip
    out = q.new_empty(q.shape)
    merge(Splits(stats, acc), sink_logit, out)
    return out

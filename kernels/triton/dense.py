"""`full_attention` in Triton: a split-KV scan of the whole live cache. Reference: `reference.full_attention`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, arguments
from .split import (
    Splits,
    after_previous,
    check_rows,
    empty_scores,
    load_group,
    load_keys,
    load_values,
    mask_args,
    mask_tile,
    merge,
    num_splits,
    overlap,
    padded_dim,
    padded_rows,
    score_tile,
    store_split,
    sum_tile,
    tile_tokens,
    unmasked,
    weigh_tile,
)


@triton.jit
def _attend(
    q, keys, values, mask_ptr, score_ptr, scale, stride_s, begin, end, stride_kn, stride_vn, stride_mn,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, HIDES: tl.constexpr, CAP: tl.constexpr, WRITE_SCORES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The running softmax (m, l, acc: see split.py) of one query group over the tokens from `begin` to `end`."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_N)
    keys += begin.to(tl.int64) * stride_kn
    values += begin.to(tl.int64) * stride_vn
    for start in range(begin, end, BLOCK_N):
        token = start + lane
        inside = token < end
        k = load_keys(keys, lane * stride_kn, inside, D, BLOCK_D)
        if VALUES:
            v = load_values(values, lane * stride_vn, inside, D, BLOCK_D)
        valid, bias = mask_tile(mask_ptr, token * stride_mn, inside, MASK, HIDES)
        score = score_tile(q, k, valid, bias, scale, CAP)
        if WRITE_SCORES:
            rows = score_ptr + row.to(tl.int64)[:, None] * stride_s + token[None, :]
            stored = (row[:, None] < GROUP) & inside[None, :]
            # The selection reads scores back from L2, which the much larger stream of keys and values would push out.
            tl.store(rows, score, mask=stored, eviction_policy="evict_last")
        if VALUES:
            m, l, acc = weigh_tile(score, v, valid, m, l, acc, MASK)
            values += BLOCK_N * stride_vn
        else:
            m, l = sum_tile(score, m, l)
        keys += BLOCK_N * stride_kn
    return m, l, acc


@triton.jit
def _scan(
    q_ptr, k_ptr, v_ptr, mask_ptr, length_ptr, acc_ptr, stat_ptr, score_ptr, scale, slots,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mn, stride_s, splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, CAP: tl.constexpr,
    WRITE_SCORES: tl.constexpr, VALUES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the query group of one kv head against one split of its cache."""
    after_previous(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    head = (batch * NUM_KV_HEADS + kv_head) * GROUP

    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    tiles = tl.cdiv(length, BLOCK_N)
    chunk = tl.cdiv(tiles, splits) * BLOCK_N  # equal splits of the live length, which only the device knows
    begin = split * chunk
    end = tl.minimum(begin + chunk, length)

    q = load_group(
        q_ptr + batch * stride_qb + kv_head * GROUP * stride_qh, stride_qh, stride_qd, GROUP, ROWS, D, BLOCK_D
    )
    keys = k_ptr + batch * stride_kb + kv_head * stride_kh
    values = v_ptr + batch * stride_vb + kv_head * stride_vh
    scores = score_ptr
    if WRITE_SCORES:
        scores += head * stride_s
    masks = mask_ptr
    if MASK != "none":
        masks += batch * stride_mb
    if MASK == "none" or unmasked(masks, stride_mn, begin, end, MASK, HIDES, 4096):
        m, l, acc = _attend(
            q, keys, values, masks, scores, scale, stride_s, begin, end, stride_kn, stride_vn, stride_mn,
            GROUP, ROWS, D, BLOCK_D, BLOCK_N, "none", HIDES, CAP, WRITE_SCORES, VALUES,
        )  # fmt: skip
    else:
        m, l, acc = _attend(
            q, keys, values, masks, scores, scale, stride_s, begin, end, stride_kn, stride_vn, stride_mn,
            GROUP, ROWS, D, BLOCK_D, BLOCK_N, MASK, HIDES, CAP, WRITE_SCORES, VALUES,
        )  # fmt: skip
    store_split(m, l, acc, acc_ptr, stat_ptr, head, split, splits, GROUP, ROWS, D, BLOCK_D, VALUES)


def scan(call: Call[Tensor], write_scores: bool = False, values: bool = True) -> Splits:
    """Attend to the whole live cache, in splits; without `values`, only score its keys."""
    q, k, v, length, mask, scale, _, softcap = arguments(call)
    check_rows(k, v)
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    # A large cache keeps every processor busy with one program of long tiles; a small one needs more, shorter programs.
    large = head_dim > 64 and batch * num_kv_heads * slots >= 2**17
    block_n = tile_tokens(k, stage_bytes=2**16 if large else 2**15)
    warps, stages = (8, 3) if large and values else (4, 3 if values else 4)
    splits = num_splits(q.device, batch * num_kv_heads, triton.cdiv(slots, block_n), per_processor=1 if large else 2)
    acc = q.new_empty(batch, num_heads, splits, head_dim, dtype=torch.float32) if values else None
    stats = q.new_empty(batch, num_heads, splits, 2, dtype=torch.float32)
    scores = empty_scores(q, slots) if write_scores else None
    stride_s = 0 if scores is None else scores.stride(1)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _scan[(splits, num_kv_heads, batch)](
        q, k, v, mask_data, length, acc, stats, scores, scale, slots,
        q.stride(0), q.stride(1), q.stride(3), *k.stride()[:3], *v.stride()[:3], *stride_m, stride_s, splits,
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, ROWS=padded_rows(num_heads // num_kv_heads),
        D=head_dim, BLOCK_D=padded_dim(head_dim), BLOCK_N=block_n, **mask_kind, CAP=softcap,
        WRITE_SCORES=write_scores, VALUES=values, num_warps=warps, num_stages=stages, **overlap(q.device),
    )  # fmt: skip
    return Splits(stats, acc, scores)


def full_attention(call: Call[Tensor]) -> Tensor:
    """See `reference.full_attention`."""
    out = call.query.new_empty(call.query.shape)
    merge(scan(call), call.sink_logit, out)
    return out

"""Choosing tokens in Triton: scores -> ordered keys -> the K-th largest key by radix -> positions in ascending order.

No sort and no host read: the live length and count stay on the device. Reference: `reference.choose_tokens`.
A key is an unsigned integer that orders as its importance does; 0 means never, the largest key means always.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import index_width, parts_per_million
from .split import mask_args, mask_tile

NEVER = tl.constexpr(0)
ALWAYS = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _window(
    mask_ptr, length_ptr, window_ptr, slots, sinks, recent, stride_mb, stride_mn,
    MASK: tl.constexpr, HIDES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence: how many tokens are valid, where its sinks end, and where its recent tokens begin."""
    batch = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    count = length
    sinks_end = tl.minimum(length, sinks)
    recent_begin = tl.maximum(length - recent, 0)
    if MASK != "none":
        count = length * 0
        for start in range(0, length, BLOCK):
            token = start + tl.arange(0, BLOCK)
            valid, _ = mask_tile(mask_ptr, batch * stride_mb + token * stride_mn, token < length, MASK, HIDES)
            count += tl.sum(valid.to(tl.int32), 0)
        seen = length * 0
        sinks_end = length * 0
        recent_begin = length
        for start in range(0, length, BLOCK):
            token = start + tl.arange(0, BLOCK)
            valid, _ = mask_tile(mask_ptr, batch * stride_mb + token * stride_mn, token < length, MASK, HIDES)
            rank = seen + tl.cumsum(valid.to(tl.int32), 0)  # 1-based among the valid tokens
            sinks_end = tl.maximum(sinks_end, tl.max(tl.where(valid & (rank <= sinks), token + 1, 0), 0))
            recent_begin = tl.minimum(recent_begin, tl.min(tl.where(valid & (rank > count - recent), token, length), 0))
            seen += tl.sum(valid.to(tl.int32), 0)
    tl.store(window_ptr + batch * 3, count)
    tl.store(window_ptr + batch * 3 + 1, sinks_end)
    tl.store(window_ptr + batch * 3 + 2, recent_begin)


@triton.jit
def _rank(
    score_ptr, lse_ptr, window_ptr, length_ptr, key_ptr, slots,
    SETS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the keys of BLOCK tokens for one token set of MEMBERS query heads."""
    start = tl.program_id(0) * BLOCK
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    if start >= length:
        return
    row = tl.program_id(2).to(tl.int64) * SETS + tl.program_id(1)
    token = start + tl.arange(0, BLOCK)
    inside = token < length
    worth = tl.load(score_ptr + row * MEMBERS * slots + token, mask=inside, other=float("-inf"))
    valid = worth > float("-inf")
    if MEMBERS > 1:  # only probabilities may be added across heads
        worth = tl.zeros([BLOCK], tl.float32)
        for member in range(MEMBERS):
            head = row * MEMBERS + member
            score = tl.load(score_ptr + head * slots + token, mask=inside, other=float("-inf"))
            worth += tl.exp2(score - tl.load(lse_ptr + head))
    bits = (worth + 0.0).to(tl.uint32, bitcast=True)  # + 0.0: -0.0 ties with 0.0
    key = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    window = window_ptr + tl.program_id(2) * 3
    always = (token < tl.load(window + 1)) | (token >= tl.load(window + 2))
    key = tl.where(always, ALWAYS, key)
    key = tl.where(valid, key, NEVER)
    tl.store(key_ptr + row * slots + token, key.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _choose(
    key_ptr, window_ptr, length_ptr, index_ptr, slots, budget, ratio_ppm, SETS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token set: find the K-th largest key eight bits at a time, then write the positions in order."""
    batch = tl.program_id(1).to(tl.int64)
    row = batch * SETS + tl.program_id(0)
    keys = key_ptr + row * slots
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    count = tl.load(window_ptr + batch * 3)
    by_ratio = ((count.to(tl.int64) * ratio_ppm + 999999) // 1000000).to(tl.int32)
    live = tl.minimum(tl.maximum(by_ratio, budget), count)

    lane = tl.arange(0, BLOCK)
    bin_id = tl.arange(0, 256)
    prefix = (count * 0).to(tl.uint32)  # the leading bits of the live-th largest key
    ties = live  # how many keys with that prefix are still wanted
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, length, BLOCK):
            token = start + lane
            key = tl.load(keys + token, mask=token < length, other=0).to(tl.uint32, bitcast=True)
            counted = token < length
            if step > 0:
                counted = counted & ((key >> (shift + 8)) == prefix)
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=counted)
        at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram  # keys in this bin or above
        crossing = tl.maximum(tl.sum((at_least >= ties).to(tl.int32), 0) - 1, 0)
        ties -= tl.sum(tl.where(bin_id > crossing, histogram, 0), 0)
        prefix = (prefix << 8) | crossing.to(tl.uint32)

    written = count * 0
    tied = count * 0
    for start in range(0, length, BLOCK):
        token = start + lane
        key = tl.load(keys + token, mask=token < length, other=0).to(tl.uint32, bitcast=True)
        tie = (key == prefix) & (token < length)
        tie_rank = tied + tl.cumsum(tie.to(tl.int32), 0)
        chosen = ((key > prefix) & (token < length)) | (tie & (tie_rank <= ties))
        slot = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(index_ptr + row * WIDTH + slot, token, mask=chosen)
        written += tl.sum(chosen.to(tl.int32), 0)
        tied += tl.sum(tie.to(tl.int32), 0)
    for start in range(0, WIDTH, BLOCK):
        slot = start + lane
        tl.store(index_ptr + row * WIDTH + slot, -1, mask=(slot >= live) & (slot < WIDTH))


def choose_tokens(
    scores: Tensor,
    lse: Tensor,
    length: Tensor,
    mask: Tensor | None,
    sets: int,
    budget: int,
    ratio: float,
    sinks: int,
    recent: int,
) -> Tensor:
    """Base-2 scores `[B, Hq, S]` and log2-sum-exp `[B, Hq]` of a scan -> `index [B, G, K]` int32 for G = `sets`."""
    batch, num_heads, slots = scores.shape
    window = scores.new_empty(batch, 3, dtype=torch.int32)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _window[(batch,)](mask_data, length, window, slots, sinks, recent, *stride_m, **mask_kind, BLOCK=4096)

    keys = scores.new_empty(batch, sets, slots, dtype=torch.int32)
    grid = (triton.cdiv(slots, 1024), sets, batch)
    _rank[grid](scores, lse, window, length, keys, slots, SETS=sets, MEMBERS=num_heads // sets, BLOCK=1024)

    width = index_width(budget, ratio, slots)
    index = scores.new_empty(batch, sets, width, dtype=torch.int32)
    _choose[(sets, batch)](
        keys,
        window,
        length,
        index,
        slots,
        budget,
        parts_per_million(ratio),
        SETS=sets,
        WIDTH=width,
        BLOCK=4096,
        num_warps=16,
    )
    return index

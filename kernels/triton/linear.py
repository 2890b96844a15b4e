"""`linear` in Triton: products of weights and a few tokens, at the speed of memory. Reference: `reference.linear`.

A linear layer of a few tokens takes as long as reading its weight once. For one token, a program computes one output
row: its loads don't depend on each other, and are all in flight at once. For several tokens, a program computes a tile
of rows on the tensor cores. On Hopper the first weights are loaded while the previous kernel still runs, which is safe
because no kernel writes weights. Weights in int8 and int4 are dequantised on the way (`reference.dense_weight`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import COLUMNS, most_tokens
from .split import dot, may_launch_next, overlap, wait_for_previous


@triton.jit
def _row(
    x_ptr, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, bias_0, bias_1, bias_2, out_ptr, rows_0, rows_01,
    columns, BLOCK: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one row of one of three weights, times x. `rows_01` are the rows of the first two."""
    row = tl.program_id(0)
    weight, scale, bias, within = weight_0, scale_0, bias_0, row
    if row >= rows_01:
        weight, scale, bias, within = weight_2, scale_2, bias_2, row - rows_01
    elif row >= rows_0:
        weight, scale, bias, within = weight_1, scale_1, bias_1, row - rows_0
    weight += within.to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < columns, other=0, eviction_policy="evict_first").to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    product = w * x  # summed once, at the end, because a sum over threads is slow
    for first in range(BLOCK, columns, BLOCK):
        inside = first + column < columns
        w = tl.load(weight + first + column, mask=inside, other=0).to(tl.float32)
        product += w * tl.load(x_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    may_launch_next(PDL)
    out = tl.sum(product, 0)
    if HAS_SCALE:
        out *= tl.load(scale + within).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + within).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _high(word, mask):
    """A number from 128 to 143, times 2^16, in float32: bits 16 to 19 of a word in those of 2^23."""
    return ((word & (mask << 4)) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _low(word, mask):
    """A number from 2048 to 2063, times 2^12: bits 12 to 15. Without a shift, at the price of four bits."""
    return ((word & mask) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _row_int4(
    x_ptr, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, bias_0, bias_1, bias_2, out_ptr, rows_0, rows_1,
    rows_2, columns, k_tiles, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: 8 rows of one of three weights in int4, times x, whose pairs are int32 (see `reference.unpacked`).

    A tile is `[8, 4 * BLOCK_K, 4]` words of 8 nibbles: rows, lanes, and words of a lane.
    """
    first_row = tl.program_id(0) * 8
    weight, scale, bias, rows, within = weight_0, scale_0, bias_0, rows_0, first_row
    if first_row >= rows_0 + rows_1:
        weight, scale, bias, rows, within = weight_2, scale_2, bias_2, rows_2, first_row - rows_0 - rows_1
    elif first_row >= rows_0:
        weight, scale, bias, rows, within = weight_1, scale_1, bias_1, rows_1, first_row - rows_0
    row = tl.arange(0, 8)
    lane = tl.arange(0, 4 * BLOCK_K)
    number = tl.arange(0, 4)[None, :]
    place = row[:, None, None] * 16 + (lane // 4 * 128 + lane % 4 * 4)[None, :, None] + number[None, :, :]
    column = (lane // 4 * 128 + lane % 4 * 2)[:, None] + number * 32  # of the first nibble of a word
    mask = 0xF000 + tl.program_id(1)  # which is 0, but the compiler would write a constant anew for each use
    weight += within.to(tl.int64) * k_tiles * 16 + place
    w = tl.load(weight, mask=(lane // 4 < k_tiles)[None, :, None], other=0, eviction_policy="evict_first")
    wait_for_previous(PDL)
    total = tl.zeros([8, 4 * BLOCK_K], tl.float32)
    for first in range(0, k_tiles, BLOCK_K):
        k_tile = first + lane // 4
        there = (k_tile + BLOCK_K < k_tiles)[None, :, None]
        ahead = tl.load(weight + (first + BLOCK_K) * 128, mask=there, other=0, eviction_policy="evict_first")
        here = first * 128 + column
        x = x_ptr + here // 2
        pair_0 = tl.load(x, mask=here < columns, other=0)
        pair_1 = tl.load(x + 4, mask=here + 8 < columns, other=0)
        pair_2 = tl.load(x + 8, mask=here + 16 < columns, other=0)
        pair_3 = tl.load(x + 12, mask=here + 24 < columns, other=0)
        # By the bits where their nibbles stand: 0 to 15, 16 to 31. Those that `_low` reads are 16 times as large
        x_0, x_4, x_8, x_12 = _even(pair_0) * 16.0, _even(pair_1), _even(pair_2), _even(pair_3) * 16.0
        x_16, x_20, x_24, x_28 = _odd(pair_0), _odd(pair_1) * 16.0, _odd(pair_2), _odd(pair_3)
        left = w << 12
        right = w >> 8
        products = x_0[None] * _low(left, mask)
        products += x_4[None] * _high(left, mask)
        products += x_8[None] * _high(w << 8, mask)
        products += x_12[None] * _low(w, mask)
        products += x_16[None] * _high(w, mask)
        products += x_20[None] * _low(right, mask)
        products += x_24[None] * _high(right, mask)
        products += x_28[None] * _high(w >> 12, mask)
        high, low = x_4 + x_8 + x_16 + x_24 + x_28, x_0 + x_12 + x_20
        plain = high + low * 0.0625
        products = products * 0.0000152587890625 - (high * 136.0 + low * 128.5)[None]  # 128 + 8, and (2048 + 8) / 16
        if GROUP >= 128:
            products = tl.sum(products, 2)
            plain = tl.sum(plain, 1)
            group = (k_tile * 128 // GROUP)[None, :] * rows + within + row[:, None]
            both = tl.load(scale + group, mask=(k_tile < k_tiles)[None, :], other=0)
            total += _even(both) * products + _odd(both) * plain[None]
        else:
            group = ((k_tile[:, None] * 128 + number * 32) // GROUP)[None] * rows + within + row[:, None, None]
            both = tl.load(scale + group, mask=(k_tile < k_tiles)[None, :, None], other=0)
            total += tl.sum(_even(both) * products + _odd(both) * plain[None], 2)
        w = ahead
    may_launch_next(PDL)
    out = tl.sum(total, 1)
    if HAS_BIAS:
        out += tl.load(bias + within + row).to(tl.float32)
    tl.store(out_ptr + first_row + row, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _even(pair):
    """The first of two numbers in bfloat16, which are an int32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _odd(pair):
    """The second one."""
    return (pair & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _as(w, LIKE: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Weights as x is, where they are int8. By float32, since the interpreter holds 16 bits as integers."""
    if HAS_SCALE:
        w = w.to(tl.float32).to(LIKE)
    return w


@triton.jit
def _rows(
    x_ptr, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, bias_0, bias_1, bias_2, out_ptr, tokens, rows_0,
    rows_1, rows_2, columns, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of one of three weights, times up to TOKENS rows of x."""
    tile = tl.program_id(0)
    tiles_0 = tl.cdiv(rows_0, BLOCK_N)
    tiles_1 = tl.cdiv(rows_1, BLOCK_N)
    weight, scale, bias, rows, begin = weight_0, scale_0, bias_0, rows_0, 0
    if tile >= tiles_0 + tiles_1:
        weight, scale, bias, rows, begin = weight_2, scale_2, bias_2, rows_2, rows_0 + rows_1
        tile -= tiles_0 + tiles_1
    elif tile >= tiles_0:
        weight, scale, bias, rows, begin = weight_1, scale_1, bias_1, rows_1, rows_0
        tile -= tiles_0
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    weights = weight + row.to(tl.int64)[:, None] * columns + column[None, :]
    xs = x_ptr + token[:, None] * columns + column[None, :]
    w = tl.load(weights, mask=(row[:, None] < rows) & (column[None, :] < columns), other=0)
    wait_for_previous(PDL)
    x = tl.load(xs, mask=(token[:, None] < tokens) & (column[None, :] < columns), other=0.0)
    out = dot(x, tl.trans(_as(w, x.dtype, HAS_SCALE)))  # [TOKENS, BLOCK_N]
    for first in range(BLOCK, columns, BLOCK):
        inside = (first + column < columns)[None, :]
        w = tl.load(weights + first, mask=(row[:, None] < rows) & inside, other=0)
        x = tl.load(xs + first, mask=(token[:, None] < tokens) & inside, other=0.0)
        out += dot(x, tl.trans(_as(w, x.dtype, HAS_SCALE)))
    may_launch_next(PDL)
    if HAS_SCALE:
        out *= tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    outs = out_ptr + token[:, None] * (rows_0 + rows_1 + rows_2) + begin + row[None, :]
    tl.store(outs, out.to(out_ptr.dtype.element_ty), mask=(token[:, None] < tokens) & (row[None, :] < rows))


def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor]) -> Tensor:
    """See `reference.linear`."""
    columns = x.shape[-1]
    tokens = x.numel() // columns
    spare = 3 - len(weights)  # the kernels take three weights, of which the last may have no rows
    in_int4 = weights[0].dtype == torch.int32
    rows = [weight.shape[0] * (8 if in_int4 else 1) for weight in weights] + [0] * spare
    out = x.new_empty(*x.shape[:-1], sum(rows))
    x = x.contiguous()
    tensors = *weights, *weights[:1] * spare, *(scales or [None] * 3), *scales[:1] * spare
    tensors = *tensors, *(biases or [None] * 3), *biases[:1] * spare
    given = {"HAS_BIAS": bool(biases), **overlap(x.device)}
    if in_int4:
        words = [one if one is None else one.view(torch.int32) for one in tensors[3:6]]
        group = weights[0].shape[1] * COLUMNS // scales[0].shape[0]
        _row_int4[(sum(rows) // 8,)](
            x.view(torch.int32), *tensors[:3], *words, *tensors[6:], out, *rows, columns, weights[0].shape[1],
            GROUP=group, BLOCK_K=16, num_warps=2, **given,
        )  # fmt: skip
        return out
    given["HAS_SCALE"] = bool(scales)
    if tokens == 1:
        block, warps = (max(128, triton.next_power_of_2(columns)), 4) if columns <= 4096 else (2048, 8)
        _row[(sum(rows),)](
            x, *tensors, out, rows[0], sum(rows[:2]), columns, BLOCK=block, num_warps=warps if block > 1024 else 1,
            **given,
        )  # fmt: skip
        return out
    block_n, stages = (64, 5) if sum(rows) >= 6144 else (32, 8)  # small tiles leave no processor idle if rows are few
    _rows[(sum(triton.cdiv(n, block_n) for n in rows),)](
        x, *tensors, out, tokens, *rows, columns, TOKENS=most_tokens(x.dtype), BLOCK_N=block_n, BLOCK=128,
        num_warps=4, num_stages=stages, **given,
    )  # fmt: skip
    return out

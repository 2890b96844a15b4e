"""The kernels of `linear` for weights in int4, which hold 8 numbers a word (`reference.packed`).

A number is never converted: a shift and a mask put its 4 bits into the mantissa of a float that is 16, 256 or 4,096 and
the number. What that adds to a product is the same for all rows, and is taken off once. So a weight costs less than
three instructions.

For one token, there are as many programs as fit on the device. Each holds its part of x in registers, since loading x
anew for every row takes longer than loading the row, and goes from row to row; the next one is on its way meanwhile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import block_of, most_tokens
from .split import dot, may_launch_next, wait_for_previous

WARPS = 16  # that a processor runs of `_row_int4`: its registers hold x, and two rows


@triton.jit
def _row_int4(
    x_ptr, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, bias_0, bias_1, bias_2, out_ptr, rows_0, rows_01,
    rows, columns, parts, GROUP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SEVERAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: every so many rows of three weights, times x. `rows_01` are the rows of the first two.

    A row is `[PARTS, 4]` words, of which the weight has `parts`. A thread has four words, and a group's scale.
    """
    first, step = tl.program_id(0), tl.num_programs(0)
    part = tl.arange(0, PARTS)
    mask = 0x7800 + tl.program_id(1)  # which is 0, but the compiler would write a constant anew for each use
    words, pairs = _load_row(
        first, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, rows_0, rows_01, rows, part, parts, GROUP,
        SEVERAL,
    )  # fmt: skip
    wait_for_previous(PDL)
    may_launch_next(PDL)
    place = part[:, None] * 4 + tl.arange(0, 4)[None, :]
    column = place // (BLOCK // 8) * BLOCK + place % (BLOCK // 8)  # of a word's first number
    x_0 = _load_x(x_ptr, column, columns)
    x_1 = _load_x(x_ptr, column + BLOCK // 8, columns)
    x_2 = _load_x(x_ptr, column + BLOCK // 4, columns)
    x_3 = _load_x(x_ptr, column + BLOCK // 8 * 3, columns)
    x_4 = _load_x(x_ptr, column + BLOCK // 2, columns)
    x_5 = _load_x(x_ptr, column + BLOCK // 8 * 5, columns)
    x_6 = _load_x(x_ptr, column + BLOCK // 8 * 6, columns)
    x_7 = _load_x(x_ptr, column + BLOCK // 8 * 7, columns)
    by_16, by_256, by_4096 = x_1 + x_4 + x_7, x_0 + x_3 + x_6, x_2 + x_5  # what `_float` adds
    total = tl.sum(by_16 + by_256 + by_4096, 1)
    added = tl.sum(by_16 * 24.0 + by_256 * 264.0 + by_4096 * 4104.0, 1)  # and the 8 that numbers are held too large
    for row in range(first, rows, step):
        next_words, next_pairs = _load_row(
            row + step, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, rows_0, rows_01, rows, part, parts,
            GROUP, SEVERAL,
        )  # fmt: skip
        product = x_0 * _float(words, mask, 0)
        product += x_1 * _float(words, mask, 1)
        product += x_2 * _float(words, mask, 2)
        product += x_3 * _float(words, mask, 3)
        product += x_4 * _float(words, mask, 4)
        product += x_5 * _float(words, mask, 5)
        product += x_6 * _float(words, mask, 6)
        product += x_7 * _float(words, mask, 7)
        factor, offset = _as_pair(pairs, x_ptr.dtype.element_ty)
        out = tl.sum(factor * (tl.sum(product, 1) - added) + offset * total, 0)
        if HAS_BIAS:
            bias = bias_0 + row
            if row >= rows_01:
                bias = bias_2 + (row - rows_01)
            elif row >= rows_0:
                bias = bias_1 + (row - rows_0)
            out += tl.load(bias).to(tl.float32)
        tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty))
        words, pairs = next_words, next_pairs


@triton.jit
def _load_row(
    row, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, rows_0, rows_01, rows, part, parts,
    GROUP: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Words `[PARTS, 4]` of a row of three weights, and the pair of scale and offset of each four; 0 beyond the end."""
    inside = part < tl.where(row < rows, parts, 0)
    weight, scale = weight_0, scale_0
    if SEVERAL:
        if row >= rows_01:
            weight, scale, row = weight_2, scale_2, row - rows_01
        elif row >= rows_0:
            weight, scale, row = weight_1, scale_1, row - rows_0
    words = weight + row.to(tl.int64) * parts * 4 + part[:, None] * 4 + tl.arange(0, 4)[None, :]
    pairs = scale + row * (parts // (GROUP // 32)) + part // (GROUP // 32)
    words = tl.load(words, mask=inside[:, None], other=0, eviction_policy="evict_first")
    return words, tl.load(pairs, mask=inside, other=0)


@triton.jit
def _load_x(x_ptr, column, columns):
    """A number of x for each word."""
    return tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def _float(words, mask, NUMBER: tl.constexpr):
    """Number 0 to 7 of each word as a float: plus 16 (numbers 1, 4 and 7), plus 256 (0, 3 and 6) or plus 4,096."""
    if NUMBER < 2:
        words = words << 15
    elif NUMBER < 5:
        words = words << 3
    else:
        words = words >> 9
    if NUMBER % 3 == 1:
        bits = (words & (mask << 8)) | 0x41800000
    elif NUMBER % 3 == 0:
        bits = (words & (mask << 4)) | 0x43800000
    else:
        bits = (words & mask) | 0x45800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _as_pair(pairs, LIKE: tl.constexpr):
    """The two 16-bit numbers of an int32, in float32."""
    first = pairs.to(tl.int16).to(LIKE, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(LIKE, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _rows_int4(
    x_ptr, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, bias_0, bias_1, bias_2, out_ptr, tokens, rows_0,
    rows_1, rows_2, columns, parts, TOKENS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of one of three weights, times up to TOKENS rows of x; PARTS of a row at a time."""
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
    part = tl.arange(0, PARTS)
    row_words = weight + row.to(tl.int64)[:, None] * parts * 4
    row_pairs = scale + row[:, None] * (parts // (GROUP // 32))
    inside = (row < rows)[:, None]
    mask = 0x7800 + tl.program_id(1)
    wait_for_previous(PDL)
    out = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for first in range(0, parts, PARTS):
        there = inside & (first + part < parts)[None, :]
        places = row_words + (first + part)[None, :] * 4
        words = tl.load(places[:, :, None] + tl.arange(0, 4)[None, None, :], mask=there[:, :, None], other=0)
        pairs = tl.load(row_pairs + ((first + part) // (GROUP // 32))[None, :], mask=there, other=0)
        column = (first * 32 + tl.arange(0, 32 * PARTS))[:, None]
        xs = x_ptr + token[None, :] * columns + column
        x = tl.load(xs, mask=(token[None, :] < tokens) & (column < columns), other=0.0)
        out += dot(_dequantised(words, pairs, mask, BLOCK, x.dtype), x)
    may_launch_next(PDL)
    if HAS_BIAS:
        out += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    outs = out_ptr + token[None, :] * (rows_0 + rows_1 + rows_2) + begin + row[:, None]
    tl.store(outs, out.to(out_ptr.dtype.element_ty), mask=(token[None, :] < tokens) & inside)


@triton.jit
def _dequantised(words, pairs, mask, BLOCK: tl.constexpr, LIKE: tl.constexpr):
    """Words `[N, PARTS, 4]`, with a pair of scale and offset of each four, as weights `[N, 32 * PARTS]`."""
    factor, offset = _as_pair(pairs[:, :, None], LIKE)
    after_16, after_256, after_4096 = offset - 24.0 * factor, offset - 264.0 * factor, offset - 4104.0 * factor
    w_0 = (_float(words, mask, 0) * factor + after_256).to(LIKE)
    w_1 = (_float(words, mask, 1) * factor + after_16).to(LIKE)
    w_2 = (_float(words, mask, 2) * factor + after_4096).to(LIKE)
    w_3 = (_float(words, mask, 3) * factor + after_256).to(LIKE)
    w_4 = (_float(words, mask, 4) * factor + after_16).to(LIKE)
    w_5 = (_float(words, mask, 5) * factor + after_4096).to(LIKE)
    w_6 = (_float(words, mask, 6) * factor + after_256).to(LIKE)
    w_7 = (_float(words, mask, 7) * factor + after_16).to(LIKE)
    even = tl.join(tl.join(w_0, w_4), tl.join(w_2, w_6))  # [N, PARTS, 4, 2, 2], by the highest bit of a number's place
    odd = tl.join(tl.join(w_1, w_5), tl.join(w_3, w_7))
    N: tl.constexpr = words.shape[0]
    PARTS: tl.constexpr = words.shape[1]
    blocks = tl.reshape(tl.join(even, odd), [N, PARTS * 32 // BLOCK, BLOCK // 8, 8])
    return tl.reshape(tl.permute(blocks, (0, 1, 3, 2)), [N, 32 * PARTS])


@triton.jit
def _dense_int4(
    weight_ptr, scale_ptr, out_ptr, rows, columns, parts, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows and PARTS parts of a weight `[rows, columns]`."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    inside = (row < rows)[:, None] & (part < parts)[None, :]
    place = row.to(tl.int64)[:, None] * parts + part[None, :]
    words = weight_ptr + place[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    words = tl.load(words, mask=inside[:, :, None], other=0)
    group = row[:, None] * (parts // (GROUP // 32)) + part[None, :] // (GROUP // 32)
    pairs = tl.load(scale_ptr + group, mask=inside, other=0)
    column = tl.program_id(1) * PARTS * 32 + tl.arange(0, PARTS * 32)
    out = _dequantised(words, pairs, 0x7800, BLOCK, out_ptr.dtype.element_ty)
    outs = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(outs, out, mask=(row < rows)[:, None] & (column < columns)[None, :])


def dense_weight(held: Tensor, scales: Tensor, columns: int) -> Tensor:
    """See `reference.dense_weight`; in the scales' dtype."""
    rows, parts = held.shape[0], held.shape[1] // 4
    group = parts * 32 // scales.shape[1]
    out = scales.new_empty(rows, columns)
    _dense_int4[(triton.cdiv(rows, 8), triton.cdiv(parts, 8))](
        held, scales.view(torch.int32), out, rows, columns, parts, GROUP=group, BLOCK=block_of(group), BLOCK_N=8,
        PARTS=8, num_warps=2,
    )  # fmt: skip
    return out


def launch(
    x: Tensor, tensors: tuple, out: Tensor, tokens: int, rows: list[int], columns: int, given: dict[str, Any]
) -> None:
    """Of `linear.linear`, for int4: `tensors` are three weights, scales and biases each."""
    weights, scales, biases = tensors[:3], tensors[3:6], tensors[6:] if given["HAS_BIAS"] else (x, x, x)
    parts = weights[0].shape[1] // 4
    group = parts * 32 // scales[0].shape[1]
    pairs = [scale.view(torch.int32) for scale in scales]
    tensors = x, *weights, *pairs, *biases, out
    given |= {"GROUP": group, "BLOCK": block_of(group)}
    if tokens == 1:
        wide = max(32, triton.next_power_of_2(parts))
        warps = min(WARPS, max(1, wide // 64))
        _row_int4[(min(sum(rows), _processors(x.device) * (WARPS // warps)),)](
            *tensors, rows[0], sum(rows[:2]), sum(rows), columns, parts, PARTS=wide, SEVERAL=rows[1] > 0,
            num_warps=warps, **given,
        )  # fmt: skip
        return
    block_n, warps, stages = (16, 1, 3) if sum(rows) >= 6144 else (32, 4, 4)
    _rows_int4[(sum(triton.cdiv(n, block_n) for n in rows),)](
        *tensors, tokens, *rows, columns, parts, TOKENS=most_tokens(x.dtype), BLOCK_N=block_n, PARTS=4, num_warps=warps,
        num_stages=stages, **given,
    )  # fmt: skip


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

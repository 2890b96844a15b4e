"""`linear` in Triton: products of weights and a few tokens, at the speed of memory. Reference: `reference.linear`.

A linear layer of a few tokens takes as long as reading its weight once. For one token, a program computes one output
row: its loads don't depend on each other, and are all in flight at once. For several tokens, a program computes a tile
of rows on the tensor cores. On Hopper the first weights are loaded while the previous kernel still runs, which is safe
because no kernel writes weights. Weights in int8 are dequantised on the way.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import most_tokens, num_rows
from . import int4
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


def linear(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor], ahead: Sequence[Tensor] = ()
) -> Tensor:
    """See `reference.linear`; `ahead` is for int4 (see `ops.linear`)."""
    columns = x.shape[-1]
    tokens = x.numel() // columns
    spare = 3 - len(weights)  # the kernels take three weights, of which the last may have no rows
    rows = [*map(num_rows, weights), *[0] * spare]
    out = x.new_empty(*x.shape[:-1], sum(rows))
    x = x.contiguous()
    tensors = *weights, *weights[:1] * spare, *(scales or [None] * 3), *scales[:1] * spare
    tensors = *tensors, *(biases or [None] * 3), *biases[:1] * spare
    given = {"HAS_BIAS": bool(biases), **overlap(x.device)}
    if weights[0].dtype == torch.int16:
        int4.launch(x, tensors, out, tokens, rows, columns, ahead, given)
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

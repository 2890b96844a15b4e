"""`linear` in Triton: matrix-vector products at the speed of memory. Reference: `reference.linear`.

For one token a linear layer is bound by reading its weight once. One program an output row: its loads are independent
and all in flight at once; on Hopper the first ones start while the kernel before still runs, as that writes no weight.
"""

import triton
import triton.language as tl
from torch import Tensor

from .split import may_launch_next, overlap, wait_for_previous


@triton.jit
def _row(
    x_ptr, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_ptr, rows_0, rows_01, columns,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one row of one of three weights, times x."""
    row = tl.program_id(0)
    weight, bias, within = weight_0, bias_0, row
    if row >= rows_01:
        weight, bias, within = weight_2, bias_2, row - rows_01
    elif row >= rows_0:
        weight, bias, within = weight_1, bias_1, row - rows_0
    weight += within.to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < columns, other=0.0, eviction_policy="evict_first").to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    product = w * x  # summed at the end: a sum over threads is slow
    for first in range(BLOCK, columns, BLOCK):
        inside = first + column < columns
        w = tl.load(weight + first + column, mask=inside, other=0.0).to(tl.float32)
        product += w * tl.load(x_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    may_launch_next(PDL)
    out = tl.sum(product, 0)
    if HAS_BIAS:
        out += tl.load(bias + within).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty))


def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """See `reference.linear`."""
    rows = [weight.shape[0] for weight in weights]
    columns = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], sum(rows))
    block, warps = (max(128, triton.next_power_of_2(columns)), 4) if columns <= 4096 else (2048, 8)
    spare = 3 - len(weights)
    _row[(sum(rows),)](
        x, *weights, *weights[:1] * spare, *(biases or [None] * len(weights)), *(biases[:1] or [None]) * spare, out,
        rows[0], sum(rows[:2]), columns, BLOCK=block, HAS_BIAS=bool(biases),
        num_warps=warps if block > 1024 else 1, **overlap(x.device),
    )  # fmt: skip
    return out

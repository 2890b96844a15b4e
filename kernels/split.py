"""Split-KV: a decode query has one row, so the cache is cut into splits to fill the GPU (FlashDecoding).

A split keeps a running softmax in base 2: the largest score m, the sum l of 2^(score - m), and acc, the values weighted
by it. `merge` joins the splits by their log-sum-exp. An empty split has l = 0, and its acc is never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b):
    """Matrix product in float32 without tf32. The interpreter would multiply bfloat16 as the integers it stores."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_group(
    q_ptr, stride_h, stride_d, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The query heads of one group `[ROWS, BLOCK_D]`, zero beyond GROUP and D (tensor cores want 16 rows or more)."""
    row = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(q_ptr + row * stride_h + dim * stride_d, mask=(row < GROUP) & (dim < D), other=0.0)


@triton.jit
def mask_tile(mask_ptr, offset, inside, MASK: tl.constexpr, HIDES: tl.constexpr):
    """Which of N tokens count `[N]`, and what is added to their scores `[N]`. MASK: see `mask_args`."""
    valid = inside
    bias = tl.zeros(inside.shape, tl.float32)
    if MASK == "bool":
        valid = inside & (tl.load(mask_ptr + offset, mask=inside, other=0) != 0)
    if MASK == "added":
        bias = tl.load(mask_ptr + offset, mask=inside, other=0).to(tl.float32)
        valid = inside & (bias > HIDES)
    return valid, bias


@triton.jit
def _cap(score, CAP: tl.constexpr):
    """CAP * tanh(score / CAP), written with an exponential that can't overflow."""
    if CAP > 0.0:
        decay = tl.exp(-2.0 * tl.abs(score) / CAP)
        capped = CAP * (1.0 - decay) / (1.0 + decay)
        score = tl.where(score < 0.0, -capped, capped)
    return score


@triton.jit
def score_tile(q, k_ptr, offset, valid, bias, scale, CAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Base-2 scores `[ROWS, N]` of N cache rows at `offset [N]`; dead rows are never read and score -inf."""
    dim = tl.arange(0, BLOCK_D)
    k = tl.load(k_ptr + offset[None, :] + dim[:, None], mask=valid[None, :] & (dim[:, None] < D), other=0.0)
    score = (_cap(_dot(q, k) * scale, CAP) + bias[None, :]) * LOG2E
    return tl.where(valid[None, :], score, float("-inf"))


@triton.jit
def weigh_tile(score, v_ptr, offset, valid, m, l, acc, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add a scored tile to the running softmax (m `[ROWS]`, l `[ROWS]`, acc `[ROWS, BLOCK_D]`)."""
    dim = tl.arange(0, BLOCK_D)
    v = tl.load(v_ptr + offset[:, None] + dim[None, :], mask=valid[:, None] & (dim[None, :] < D), other=0.0)
    new_m = tl.maximum(m, tl.max(score, 1))
    shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing alive yet: -inf - -inf is NaN
    weight = tl.exp2(score - shift[:, None])
    decay = tl.exp2(m - shift)
    l = l * decay + tl.sum(weight, 1)
    acc = acc * decay[:, None] + _dot(weight.to(v.dtype), v)
    return new_m, l, acc


@triton.jit
def store_split(
    m, l, acc, acc_ptr, stat_ptr, head, split, GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one split of GROUP heads, the first of which is `head` (counted over the batch): acc and (m, l)."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    slot = (head + row) * SPLITS + split
    tl.store(acc_ptr + slot[:, None] * D + dim[None, :], acc, mask=(row[:, None] < GROUP) & (dim[None, :] < D))
    tl.store(stat_ptr + slot * 2, m, mask=row < GROUP)
    tl.store(stat_ptr + slot * 2 + 1, l, mask=row < GROUP)


@triton.jit
def _merge(
    acc_ptr, stat_ptr, sink_ptr, out_ptr, lse_ptr, num_heads, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, HAS_SINK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    stats = stat_ptr + head * SPLITS * 2
    split = tl.arange(0, BLOCK_SPLITS)
    m = tl.load(stats + split * 2, mask=split < SPLITS, other=float("-inf"))
    l = tl.load(stats + split * 2 + 1, mask=split < SPLITS, other=0.0)
    top = tl.max(m, 0)
    if HAS_SINK:
        sink = tl.load(sink_ptr + head % num_heads).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(l * tl.exp2(m - shift), 0)
    if HAS_SINK:
        total += tl.exp2(sink - shift)

    dim = tl.arange(0, BLOCK_D)
    out = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, SPLITS, CHUNK):
        part = first + tl.arange(0, CHUNK)
        inside = part < SPLITS
        part_m = tl.load(stats + part * 2, mask=inside, other=float("-inf"))
        used = inside & (part_m > float("-inf"))
        acc = tl.load(
            acc_ptr + (head * SPLITS + part[:, None]) * D + dim[None, :],
            mask=used[:, None] & (dim[None, :] < D),
            other=0.0,
        )
        out += tl.sum(acc * tl.exp2(part_m - shift)[:, None], 0)
    out = tl.where(total > 0.0, out / total, 0.0)  # no token to attend to: zeros
    tl.store(out_ptr + head * D + dim, out.to(out_ptr.dtype.element_ty), mask=dim < D)
    tl.store(lse_ptr + head, shift + tl.log2(total))


def merge(acc: Tensor, stats: Tensor, sink: Tensor | None, out: Tensor) -> Tensor:
    """Join splits `acc [B, Hq, P, D]`, `stats [B, Hq, P, 2]` into `out [B, Hq, 1, D]`; -> log2-sum-exp `[B, Hq]`.

    The logit `sink [Hq]` takes part in the softmax, and so in the log-sum-exp.
    """
    batch, num_heads, splits, head_dim = acc.shape
    lse = acc.new_empty(batch, num_heads)
    _merge[(batch * num_heads,)](
        acc, stats, None if sink is None else sink.contiguous(), out, lse, num_heads, SPLITS=splits,
        BLOCK_SPLITS=triton.next_power_of_2(splits), CHUNK=16, HAS_SINK=sink is not None, D=head_dim,
        BLOCK_D=padded_dim(head_dim),
    )  # fmt: skip
    return lse


def padded_dim(head_dim: int) -> int:
    """The tile width that holds a head: a power of two, at least 16 for the tensor cores."""
    return max(16, triton.next_power_of_2(head_dim))


def padded_rows(group: int) -> int:
    """The tile height that holds a group of query heads."""
    return max(16, triton.next_power_of_2(group))


def num_splits(device: torch.device, programs: int, tiles: int) -> int:
    """Splits a head, so that `programs` heads fill the GPU about four times over; the live length has no say."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(triton.cdiv(4 * processors, programs), tiles))


def mask_args(mask: Tensor | None, batch: int, slots: int) -> tuple[tuple, dict]:
    """How kernels take a mask `[B or 1, 1, 1, S]`: (data, stride along B, stride along S), and MASK and HIDES.

    MASK is "none", "bool" (data are bytes) or "added" to the scores; HIDES is the value that hides a token then.
    """
    if mask is None:
        return (None, 0, 0), {"MASK": "none", "HIDES": 0.0}
    if mask.is_floating_point():
        data, kind = mask, {"MASK": "added", "HIDES": torch.finfo(mask.dtype).min}
    else:
        data, kind = mask.view(torch.uint8), {"MASK": "bool", "HIDES": 0.0}
    data = data.expand(batch, 1, 1, slots)
    return (data, data.stride(0), data.stride(3)), kind


def check_rows(k: Tensor, v: Tensor) -> None:
    """The kernels read whole rows of the cache, so a row must be contiguous."""
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(
            f"tidal: the cache's last dimension must be contiguous, found strides {k.stride()}, {v.stride()}"
        )

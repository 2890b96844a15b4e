"""Split-KV: a decode query has one row, so the cache is cut into splits to fill the GPU (FlashDecoding).

A split keeps a running softmax in base 2: the largest score m, the sum l of 2^(score - m), and acc, the values weighted
by it. `merge` joins the splits by their log-sum-exp. An empty split has m = -inf, l = 0 and acc = 0.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..call import Call
from ..reference import HIDES

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for what earlier kernels wrote: with programmatic dependent launch, they may still run."""
    if PDL:
        gdc_wait()


@triton.jit
def may_launch_next(PDL: tl.constexpr):
    """Let the next kernel start, as far as its own `wait_for_previous`. Only after this kernel's."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def after_previous(PDL: tl.constexpr):
    """The first line of most kernels: wait, and let the next one come as far as its own wait."""
    wait_for_previous(PDL)
    may_launch_next(PDL)


@triton.jit
def dot(a, b):
    """Matrix product in float32 without tf32. The interpreter would multiply bfloat16 as the integers it stores."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_group(
    q_ptr, stride_h, stride_d, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    stride_t=0, tokens=1,
):  # fmt: skip
    """The query heads of one group `[ROWS, BLOCK_D]`, of one token after the other (`row // GROUP` is the token).

    Zero beyond GROUP * tokens and D (tensor cores want 16 rows or more).
    """
    row = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    place = row // GROUP * stride_t + row % GROUP * stride_h
    return tl.load(q_ptr + place + dim * stride_d, mask=(row < GROUP * tokens) & (dim < D), other=0.0)


@triton.jit
def live_until(length_ptr, slots, token, TOKENS: tl.constexpr):
    """How many of the first slots the query tokens `token`, of TOKENS, see."""
    return tl.minimum(tl.load(length_ptr) - (TOKENS - 1) + token, slots).to(tl.int32)


@triton.jit
def mask_tile(mask_ptr, offset, inside, MASK: tl.constexpr, HIDES: tl.constexpr):
    """Which of N tokens count `[N]`, and what is added to their scores `[N]`. MASK: see `mask_args`. Or `[ROWS, N]`."""
    valid = inside
    bias = tl.zeros(inside.shape, tl.float32)
    if MASK == "bool":
        valid = inside & (tl.load(mask_ptr + offset, mask=inside, other=0) != 0)
    if MASK == "added":
        bias = tl.load(mask_ptr + offset, mask=inside, other=0).to(tl.float32)
        valid = inside & (bias > HIDES)
    return valid, bias


@triton.jit
def unmasked(
    mask_ptr, stride_mn, begin, end, MASK: tl.constexpr, HIDES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Whether the mask changes no score from `begin` to `end`. In most models it only changes those of padding."""
    changed = begin * 0
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid, bias = mask_tile(mask_ptr, token * stride_mn, token < end, MASK, HIDES)
        changed += tl.sum((((token < end) & (valid == 0)) | (bias != 0.0)).to(tl.int32), 0)
    return changed == 0


@triton.jit
def mask_edges(
    mask_ptr, stride_mn, begin, end, MASK: tl.constexpr, HIDES: tl.constexpr, stride_mt, tokens, TOKENS: tl.constexpr
):
    """The first slot from `begin` to `end` that the mask shows to one of `tokens` query tokens, and the first one from
    there on whose score it changes for one of them. `end`: none.

    In most models a mask only hides padding, in front, and of several tokens those that a token must not see, behind.
    """
    ROWS: tl.constexpr = triton.next_power_of_2(TOKENS)
    BLOCK: tl.constexpr = (4096 if TOKENS == 1 else 8192) // ROWS
    row = tl.arange(0, ROWS)[:, None]
    visible = end
    start = begin
    while (start < end) & (visible == end):
        slot = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < tokens) & (slot < end)
        valid, _ = mask_tile(mask_ptr, row * stride_mt + slot * stride_mn, inside, MASK, HIDES)
        visible = tl.min(tl.min(tl.where(valid, slot, end), 1), 0)
        start += BLOCK
    # One reduction in all: threads that meet at every block would wait for every load
    first = tl.full([ROWS, BLOCK], 0, tl.int32) + end
    for start in range(begin + (visible - begin) // BLOCK * BLOCK, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < tokens) & (slot >= visible) & (slot < end)
        valid, bias = mask_tile(mask_ptr, row * stride_mt + slot * stride_mn, inside, MASK, HIDES)
        first = tl.minimum(first, tl.where(inside & ((valid == 0) | (bias != 0.0)), slot, end))
    return visible, tl.min(tl.min(first, 1), 0)


@triton.jit
def cap(score, CAP: tl.constexpr):
    """CAP * tanh(score / CAP), written with an exponential that can't overflow."""
    if CAP > 0.0:
        decay = tl.exp(-2.0 * tl.abs(score) / CAP)
        capped = CAP * (1.0 - decay) / (1.0 + decay)
        score = tl.where(score < 0.0, -capped, capped)
    return score


@triton.jit
def load_keys(k_ptr, offset, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys `[BLOCK_D, N]` of the cache rows at `offset [N]`, transposed for the product; zero where not inside."""
    dim = tl.arange(0, BLOCK_D)
    return tl.load(k_ptr + offset[None, :] + dim[:, None], mask=inside[None, :] & (dim[:, None] < D), other=0.0)


@triton.jit
def load_values(v_ptr, offset, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Values `[N, BLOCK_D]` of the cache rows at `offset [N]`, or pairs of them; zero where not inside."""
    dim = tl.arange(0, BLOCK_D)
    return tl.load(v_ptr + offset[:, None] + dim[None, :], mask=inside[:, None] & (dim[None, :] < D), other=0)


@triton.jit
def as_float16(q, FP8: tl.constexpr):
    """A query `[ROWS, BLOCK_D]` to be multiplied with keys in FP8, and what products `[ROWS]` are to be multiplied by.

    16 bits are divided by the largest of a row, so that float16 holds them.
    """
    unit = tl.full([q.shape[0]], 1.0, tl.float32)
    if FP8 and q.dtype != tl.float32:
        number = q.to(tl.float32)
        unit = tl.max(tl.abs(number), 1)
        q = (number * tl.where(unit > 0.0, 1.0 / unit, 0.0)[:, None]).to(tl.float16)
    return q, unit


@triton.jit
def unpack(pair, LIKE: tl.constexpr):
    """The two numbers in float8 (e4m3) of each int16, in tiles of their own: matrix products take no interleaved ones.

    The bits of float8 are those of a float16 with an exponent that is less by 8.
    """
    if INTERPRETED:
        even = (((pair & 0x80) << 8) | ((pair & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        odd = ((pair & -0x8000) | ((pair & 0x7F00) >> 1)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        even = tl.where((pair & 0x7F) == 0x7F, float("nan"), even)
        odd = tl.where((pair & 0x7F00) == 0x7F00, float("nan"), odd)
    else:
        even, odd = tl.inline_asm_elementwise(
            """{ .reg .b16 one, other; .reg .b32 a, b; mov.b32 {one, other}, $2;
            cvt.rn.f16x2.e4m3x2 a, one; cvt.rn.f16x2.e4m3x2 b, other;
            prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; }""",
            "=r,=r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return even.to(LIKE), odd.to(LIKE)


@triton.jit
def load_scales(scale_ptr, offset, inside):
    """What keys, and values, are multiplied by `[N]`: two bfloat16 numbers, which are an int32. 0 where not inside."""
    pair = tl.load(scale_ptr + offset, mask=inside, other=0)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def load_numbers(
    k_ptr, scale_ptr, row, stride_kn, stride_xn, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, LIKE: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Keys `[BLOCK_D, N]` of the cache's rows `[N]` as the model would have them, in LIKE; zero where not inside."""
    k = load_keys(k_ptr, row * stride_kn, inside, D, BLOCK_D)
    if FP8:
        key_scale, _values = load_scales(scale_ptr, row * stride_xn, inside)
        k = (k.to(tl.float32) * key_scale[None, :]).to(LIKE)
    return k


@triton.jit
def multiply(q, unit, k, key_scale, FP8: tl.constexpr):
    """Products `[ROWS, N]` of a query (see `as_float16`) and keys `[BLOCK_D, N]`, which have scales `[N]` in FP8."""
    product = dot(q, k.to(q.dtype))
    if FP8:
        product *= unit[:, None] * key_scale[None, :]
    return product


@triton.jit
def score_tile(product, valid, bias, scale, CAP: tl.constexpr):
    """Base-2 scores `[ROWS, N]` of products with keys; -inf for tokens that don't count, whatever their keys are.

    `valid` and `bias` are those of all rows `[1, N]`, or of each `[ROWS, N]`.
    """
    score = (cap(product * scale, CAP) + bias) * LOG2E
    return tl.where(valid, score, float("-inf"))


@triton.jit
def weigh_tile(
    score, v, value_scale, valid, m, l, acc, odd_acc, MASK: tl.constexpr, LIKE: tl.constexpr, FP8: tl.constexpr
):
    """Add a scored tile to the running softmax (m `[ROWS]`, l `[ROWS]`, acc `[ROWS, BLOCK_D]`).

    Rows are loaded before their mask is known, so that no load waits for another: what is masked is zeroed here, since
    a weight of zero doesn't make NaN vanish. In FP8, values are pairs and have scales `[N]`; acc are the even numbers
    of a head, and `odd_acc` the odd ones `[ROWS, BLOCK_D / 2]`. They are multiplied in LIKE.
    """
    new_m = tl.maximum(m, tl.max(score, 1))
    shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing alive yet: -inf - -inf is NaN
    weight = tl.exp2(score - shift[:, None])
    decay = tl.exp2(m - shift)
    l = l * decay + tl.sum(weight, 1)
    if MASK != "none":
        v = tl.where(valid[:, None], v, 0)
    if FP8:
        value_scale = tl.where(valid, value_scale, 0.0)
        largest = tl.max(value_scale, 0)
        # Up to 2^10 instead of 1, since float16 has fewer small numbers than large ones
        weight = (weight * (value_scale * tl.where(largest > 0.0, 1024.0 / largest, 0.0))[None, :]).to(LIKE)
        even, odd = unpack(v, LIKE)
        acc = acc * decay[:, None] + dot(weight, even) * (largest * 0.0009765625)
        odd_acc = odd_acc * decay[:, None] + dot(weight, odd) * (largest * 0.0009765625)
    else:
        acc = acc * decay[:, None] + dot(weight.to(v.dtype), v)
    return new_m, l, acc, odd_acc


@triton.jit
def sum_tile(score, m, l):
    """Add a scored tile to the softmax's m `[ROWS]` and l `[ROWS]`, without values."""
    new_m = tl.maximum(m, tl.max(score, 1))
    shift = tl.where(new_m == float("-inf"), 0.0, new_m)
    return new_m, l * tl.exp2(m - shift) + tl.sum(tl.exp2(score - shift[:, None]), 1)


@triton.jit
def store_split(
    m, l, acc, odd_acc, acc_ptr, stat_ptr, head, split, splits, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VALUES: tl.constexpr, FP8: tl.constexpr, num_heads=0, tokens=1,
):  # fmt: skip
    """Write one split of GROUP heads, the first of which is `head`, counted over batch and tokens: (m, l), any acc.

    The rows of several tokens are `num_heads` apart. See `weigh_tile` for acc.
    """
    row = tl.arange(0, ROWS)
    inside = row < GROUP * tokens
    slot = (head + row // GROUP * num_heads + row % GROUP) * splits + split
    if VALUES:
        dim = tl.arange(0, acc.shape[1])[None, :]
        stored = inside[:, None] & (dim < (D // 2 if FP8 else D))
        if FP8:
            place = acc_ptr + slot[:, None] * D + dim * 2
            tl.store(place, acc, mask=stored)
            tl.store(place + 1, odd_acc, mask=stored)
        else:
            tl.store(acc_ptr + slot[:, None] * D + dim, acc, mask=stored)
    tl.store(stat_ptr + slot * 2, m, mask=inside)
    tl.store(stat_ptr + slot * 2 + 1, l, mask=inside)


@triton.jit
def merge_part(
    head, part, acc_ptr, stat_ptr, sink_ptr, out_ptr, lse_ptr, num_heads, splits, BLOCK_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, HAS_SINK: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Join the splits of one head: the BLOCK_D values of one part, and the log-sum-exp.

    Heads are counted over batch and tokens, `[B, T, Hq]`; the output is `[B, Hq, T, D]`.
    """
    head = head.to(tl.int64)
    stats = stat_ptr + head * splits * 2
    split = tl.arange(0, BLOCK_SPLITS)
    m = tl.load(stats + split * 2, mask=split < splits, other=float("-inf"))
    l = tl.load(stats + split * 2 + 1, mask=split < splits, other=0.0)
    top = tl.max(m, 0)
    if HAS_SINK:
        sink = tl.load(sink_ptr + head % num_heads).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(l * tl.exp2(m - shift), 0)
    if HAS_SINK:
        total += tl.exp2(sink - shift)

    if VALUES:
        dim = part * BLOCK_D + tl.arange(0, BLOCK_D)
        out = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, splits, CHUNK):
            some = first + tl.arange(0, CHUNK)
            some_m = tl.load(stats + some * 2, mask=some < splits, other=float("-inf"))
            acc = tl.load(
                acc_ptr + (head * splits + some[:, None]) * D + dim[None, :],
                mask=(some[:, None] < splits) & (dim[None, :] < D),
                other=0.0,
            )
            out += tl.sum(acc * tl.exp2(some_m - shift)[:, None], 0)
        out = tl.where(total > 0.0, out / total, 0.0)  # no token to attend to: zeros
        place = head
        if TOKENS > 1:
            row = head // num_heads
            place = (row // TOKENS * num_heads + head % num_heads) * TOKENS + row % TOKENS
        tl.store(out_ptr + place * D + dim, out.to(out_ptr.dtype.element_ty), mask=dim < D)
    if part == 0:
        tl.store(lse_ptr + head, shift + tl.log2(total))


@triton.jit
def _merge(
    acc_ptr, stat_ptr, sink_ptr, out_ptr, lse_ptr, num_heads, splits, BLOCK_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, HAS_SINK: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D values of one head."""
    after_previous(PDL)
    merge_part(
        tl.program_id(0), tl.program_id(1), acc_ptr, stat_ptr, sink_ptr, out_ptr, lse_ptr, num_heads, splits,
        BLOCK_SPLITS, CHUNK, HAS_SINK, VALUES, D, BLOCK_D, TOKENS,
    )  # fmt: skip


class Splits(NamedTuple):
    """What a scan leaves behind: its splits P, to be merged, and on request its scores.

    R = B T: several query tokens are like as many rows of a batch.
    """

    stats: Tensor  # [R, Hq, P, 2]: m and l
    acc: Tensor | None  # [R, Hq, P, D]; None: keys were scored, and no values weighted
    scores: Tensor | None = None  # [R, Hq, >= S] in base 2, -inf where hidden, unwritten beyond the live length


def empty_scores(q: Tensor, slots: int) -> Tensor:
    """The scores of a scan `[R, Hq, >= slots]`, to be written: rows are aligned, for wide loads."""
    return q.new_empty(q.shape[0] * q.shape[2], q.shape[1], triton.cdiv(slots, 16) * 16, dtype=torch.float32)


def merge(splits: Splits, sink_logit: Tensor | None, out: Tensor) -> Tensor:
    """Join splits into `out [B, Hq, T, D]`; -> log2-sum-exp `[R, Hq]`. `sink_logit [Hq]` takes part in both."""
    arguments, sizes = merge_args(splits, sink_logit, out)
    _merge[(splits.stats.shape[0] * splits.stats.shape[1], parts(sizes))](*arguments, **sizes, **overlap(out.device))
    return arguments[4]


def merge_args(splits: Splits, sink_logit: Tensor | None, out: Tensor | None) -> tuple[list, dict[str, int]]:
    """The arguments of `merge_part` from `acc` on; the fifth is an empty log2-sum-exp `[R, Hq]`."""
    rows, num_heads, count, _ = splits.stats.shape
    head_dim = 1 if splits.acc is None else splits.acc.shape[3]
    lse = splits.stats.new_empty(rows, num_heads)
    sizes = {
        "BLOCK_SPLITS": triton.next_power_of_2(count), "CHUNK": min(64, triton.next_power_of_2(count)),
        "HAS_SINK": sink_logit is not None, "VALUES": splits.acc is not None, "D": head_dim,
        "BLOCK_D": min(32, padded_dim(head_dim)), "TOKENS": 1 if out is None else out.shape[2],
    }  # fmt: skip
    sink_logit = None if sink_logit is None else sink_logit.contiguous()
    return [splits.acc, splits.stats, sink_logit, out, lse, num_heads, count], sizes


def parts(sizes: dict[str, int]) -> int:
    """Programs of `merge_part` a head."""
    return triton.cdiv(sizes["D"], sizes["BLOCK_D"])


def padded_dim(head_dim: int) -> int:
    """The tile width that holds a head: a power of two, at least 16 for the tensor cores."""
    return max(16, triton.next_power_of_2(head_dim))


def padded_rows(group: int) -> int:
    """The tile height that holds a group of query heads."""
    return max(16, triton.next_power_of_2(group))


def tile_tokens(k: Tensor, stage_bytes: int, most: int = 128) -> int:
    """Tokens a tile, 16 to `most`, whose keys and values take up to `stage_bytes` of shared memory."""
    return max(16, min(most, stage_bytes // (2 * padded_dim(k.shape[3]) * k.element_size())))


def num_splits(device: torch.device, programs: int, tiles: int, per_processor: int) -> int:
    """Splits a head, so that `programs` heads fill the GPU in whole waves of `per_processor` programs each.

    The live length has no say. Fewer splits are less to merge: more than one wave only where one would be half empty.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wave = per_processor * processors
    most = max(1, min(tiles, triton.cdiv(4 * wave, programs)))
    usage = {splits: splits * programs / (triton.cdiv(splits * programs, wave) * wave) for splits in range(1, most + 1)}
    enough = min(0.9, max(usage.values()))
    return min(splits for splits, used in usage.items() if used >= enough)


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options of kernels that wait by themselves: programmatic dependent launch, from Hopper on.

    The launch of such a kernel overlaps the end of the kernel before it, whoever launched that.
    """
    possible = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if possible else {"PDL": False}


def mask_args(mask: Tensor | None, batch: int, slots: int) -> tuple[tuple, dict]:
    """How kernels take a mask `[B or 1, 1, 1 or T, S]`: (data, stride along B, stride along S), and MASK and HIDES.

    The stride along T is `token_stride`. MASK is "none", "bool" (data are bytes) or "added" to the scores; HIDES is the
    largest value that hides a token.
    """
    if mask is None:
        return (None, 0, 0), {"MASK": "none", "HIDES": 0.0}
    if mask.is_floating_point():
        data, kind = mask, {"MASK": "added", "HIDES": HIDES}
    else:
        data, kind = mask.view(torch.uint8), {"MASK": "bool", "HIDES": 0.0}
    data = data.expand(batch, 1, -1, slots)
    return (data, data.stride(0), data.stride(3)), kind


def token_stride(mask: Tensor | None) -> int:
    """How far the mask of a query token is from that of the next one."""
    return 0 if mask is None or mask.shape[2] == 1 else mask.stride(2)


class Rows(NamedTuple):
    """The cache as kernels read it: keys and values, their scales, and how far these are apart along B, Hkv and S."""

    key: Tensor  # [B, Hkv, S, D]
    value: Tensor  # [B, Hkv, S, D]; pairs of float8 [B, Hkv, S, D / 2] int16
    scales: Tensor | None  # [B, Hkv, S, 1] int32
    strides: tuple[int, int, int]

    @property
    def sizes(self) -> dict[str, Any]:
        """Of a kernel: the head, and whether the cache is in FP8."""
        head_dim = self.key.shape[3]
        return {"D": head_dim, "BLOCK_D": padded_dim(head_dim), "FP8": self.scales is not None}


def rows_of(call: Call[Tensor]) -> Rows:
    """The kernels read whole rows of the cache, so a row must be contiguous."""
    k, v, scales = call.key, call.value, call.scales
    if k.stride(3) != 1 or v.stride(3) != 1 or (scales is not None and scales.stride(3) != 1):
        raise ValueError(
            f"tidal: the cache's last dimension must be contiguous, found strides {k.stride()}, {v.stride()}"
        )
    if scales is None:
        return Rows(k, v, None, (0, 0, 0))
    pairs = scales.view(torch.int32)
    return Rows(k.view(torch.float8_e4m3fn), v.view(torch.int16), pairs, pairs.stride()[:3])

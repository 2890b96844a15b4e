"""The kernels of `linear` for weights in int4, which are held as the tensor cores take them (`reference.packed`).

A product of a few tokens is bound by reading the weight, so nothing else may take long. A thread's 16 bytes are the
numbers that it hands to the tensor cores, so no layout is converted (as in Marlin, https://arxiv.org/abs/2408.11743).
Two of them become floats in one instruction, which puts their bits where the lowest ones of 128 are, and that goes to
the tensor cores; what it adds to a product is taken off by the sum of x, which these compute as well.

The warps of a program divide the columns of its rows, so that enough is on its way where rows are few. And the last
programs bring to the L2 cache what the next launch reads first, since memory would idle until that has begun.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import most_tokens
from .split import INTERPRETED, dot, may_launch_next, wait_for_previous


def _as_floats(one: int) -> str:
    """PTX: 4 bits of two int16, from one of them on, as two floats of which 1 is the lowest bit."""
    return (
        "{ .reg .b32 bits; and.b32 bits, $2, 15; shr.u32 bits, $1, bits; "
        f"lop3.b32 $0, bits, 0x000F000F, {one}, 0xEA; }}"
    )


AHEAD = 4 * 2**20  # bytes of the next weight
AS_BFLOAT16 = tl.constexpr(_as_floats(0x43004300))
AS_FLOAT16 = tl.constexpr(_as_floats(0x64006400))


@triton.jit
def _linear_int4(
    x_ptr, weight_0, weight_1, weight_2, scale_0, scale_1, scale_2, bias_0, bias_1, bias_2, out_ptr, next_weight,
    next_scale, weight_lines, scale_lines, tokens, tiles_0, tiles_01, rows, columns, blocks, GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr, TOKENS: tl.constexpr, ONE: tl.constexpr, SPAN: tl.constexpr, WARPS: tl.constexpr,
    TILES: tl.constexpr, ALL: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: TILES tiles of 16 rows of one of three weights, times up to TOKENS rows of x, or ONE.

    A block of 128 columns has GROUPS groups, or a group has BLOCKS blocks. A warp has SPAN blocks at a time; ALL: those
    are all. `tiles_01` are the programs of the first two weights.
    """
    tile = tl.program_id(0)
    begin = tile * (16 * TILES)
    weight, scale, bias = weight_0, scale_0, bias_0
    if tile >= tiles_01:
        weight, scale, bias, tile = weight_2, scale_2, bias_2, tile - tiles_01
    elif tile >= tiles_0:
        weight, scale, bias, tile = weight_1, scale_1, bias_1, tile - tiles_0
    words = _load_words(weight, tile, 0, blocks, SPAN, WARPS, TILES)
    pairs = _load_pairs(scale, tile, 0, blocks, GROUPS, BLOCKS, SPAN, WARPS, TILES)
    wait_for_previous(PDL)
    may_launch_next(PDL)
    if ALL:
        x = _load_x(x_ptr, 0, tokens, columns, GROUPS, TOKENS, ONE, SPAN * WARPS)
        products = _product(words, pairs, x, GROUPS, SPAN, WARPS, TILES)
    else:
        products = tl.zeros([GROUPS * SPAN * WARPS, 16 * TILES, TOKENS], tl.float32)
        for block in tl.range(0, blocks, SPAN * WARPS, num_stages=1):
            x = _load_x(x_ptr, block, tokens, columns, GROUPS, TOKENS, ONE, SPAN * WARPS)
            next_words = _load_words(weight, tile, block + SPAN * WARPS, blocks, SPAN, WARPS, TILES)
            next_pairs = _load_pairs(scale, tile, block + SPAN * WARPS, blocks, GROUPS, BLOCKS, SPAN, WARPS, TILES)
            products += _product(words, pairs, x, GROUPS, SPAN, WARPS, TILES)
            words, pairs = next_words, next_pairs
    out = tl.sum(products, 0)
    row = tl.arange(0, 16 * TILES)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    if HAS_BIAS:
        out += tl.load(bias + tile * (16 * TILES) + row).to(tl.float32)
    tl.store(out_ptr + token * rows + begin + row, out.to(out_ptr.dtype.element_ty), mask=token < tokens)
    if next_weight is not None:
        _fetch(next_weight, weight_lines)
        _fetch(next_scale, scale_lines)


@triton.jit
def _fetch(tensor, lines):
    """Bring the first `lines` of 128 bytes of a tensor to the L2 cache: 128 a program, from the last one on."""
    programs = tl.num_programs(0)
    for first in range((programs - 1 - tl.program_id(0)) * 128, lines, programs * 128):
        line = tl.minimum(first + tl.arange(0, 128), lines - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [tensor.to(tl.int64) + line.to(tl.int64) * 128],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _load_words(weight, tile, block, blocks, SPAN: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr):
    """Words `[2 TILES SPAN WARPS 256]`, of 8 rows and a block each: a warp's, of whose threads each has 16 bytes."""
    word = tl.arange(0, 2 * TILES * SPAN * WARPS * 256)
    block += word // 256 % (SPAN * WARPS)
    half = word // (SPAN * WARPS * 256)  # of a tile
    place = (tile * TILES + half // 2).to(tl.int64) * blocks + block
    words = weight + place * 512 + half % 2 * 256 + word % 256
    return tl.load(words, mask=block < blocks, other=0, eviction_policy="evict_first")


@triton.jit
def _load_pairs(
    scale, tile, block, blocks, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr, WARPS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Pairs of scale and offset `[2 TILES SPAN WARPS 32 GROUPS]` of those words: a thread has those of its row."""
    pair = tl.arange(0, 2 * TILES * SPAN * WARPS * 32 * GROUPS)
    thread = pair // GROUPS
    block += thread // 32 % (SPAN * WARPS)
    half = thread // (SPAN * WARPS * 32)
    place = (tile * TILES + half // 2) * (blocks // BLOCKS) + block // BLOCKS
    pairs = scale + (place * 16 + half % 2 * 8 + thread % 32 // 4) * GROUPS + pair % GROUPS
    return tl.load(pairs, mask=block < blocks, other=0)


@triton.jit
def _load_x(
    x_ptr, block, tokens, columns, GROUPS: tl.constexpr, TOKENS: tl.constexpr, ONE: tl.constexpr, COUNT: tl.constexpr
):
    """COUNT blocks of x by groups `[GROUPS COUNT, columns, TOKENS]`: the first one of every block, then the second."""
    WIDTH: tl.constexpr = 128 // GROUPS
    nth = tl.arange(0, GROUPS * COUNT)[:, None]
    column = (block + nth % COUNT) * 128 + nth // COUNT * WIDTH + tl.arange(0, WIDTH)[None, :]
    if ONE:  # the tensor cores want 8: all are the same one
        x = tl.load(x_ptr + column, mask=column < columns, other=0.0)
        x = tl.broadcast_to(x[:, :, None], [GROUPS * COUNT, WIDTH, TOKENS])
    else:
        token = tl.arange(0, TOKENS)[None, None, :]
        inside = (token < tokens) & (column < columns)[:, :, None]
        x = tl.load(x_ptr + token * columns + column[:, :, None], mask=inside, other=0.0)
    return x


@triton.jit
def _product(words, pairs, x, GROUPS: tl.constexpr, SPAN: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr):
    """Products `[GROUPS SPAN WARPS, 16 TILES, TOKENS]`, of each group's columns."""
    COUNT: tl.constexpr = GROUPS * SPAN * WARPS
    TOKENS: tl.constexpr = x.shape[2]
    numbers = _numbers(words, GROUPS, SPAN, WARPS, TILES, x.dtype)
    ones = tl.full([COUNT, 16 * TILES, 128 // GROUPS], 1.0, x.dtype)  # for the sum of x, in every row
    factor, offset = _as_pair(_by_row(pairs, GROUPS, SPAN * WARPS, TILES), x.dtype)
    offset -= _added(x.dtype) * factor
    return dot(numbers, x) * _for_tokens(factor, TOKENS) + dot(ones, x) * _for_tokens(offset, TOKENS)


@triton.jit
def _numbers(
    words, GROUPS: tl.constexpr, SPAN: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, dtype: tl.constexpr
):
    """The numbers of words `[GROUPS SPAN WARPS, 16 TILES, columns]`, each 128 too large, in float16 1,024."""
    words = tl.permute(tl.reshape(words, [2 * TILES, SPAN * WARPS, 8, 4, 4, 2]), (1, 0, 2, 4, 3, 5))
    words = tl.reshape(words, [1, SPAN * WARPS, 16 * TILES, 32])
    words = tl.broadcast_to(words, [4, SPAN * WARPS, 16 * TILES, 32])
    first = (tl.arange(0, 4) * 4).to(tl.int16)[:, None, None, None]
    first = tl.broadcast_to(first, [4, SPAN * WARPS, 16 * TILES, 32])
    if INTERPRETED:
        numbers = ((words >> first) & 15).to(tl.float32) + (_added(dtype) - 8.0)
    elif dtype == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            AS_BFLOAT16, "=r,r,r", [words, first], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        numbers = tl.inline_asm_elementwise(
            AS_FLOAT16, "=r,r,r", [words, first], dtype=tl.float16, is_pure=True, pack=2
        )
    numbers = tl.reshape(numbers, [GROUPS, 4 // GROUPS, SPAN * WARPS, 16 * TILES, 32])
    return tl.reshape(tl.permute(numbers, (0, 2, 3, 1, 4)), [GROUPS * SPAN * WARPS, 16 * TILES, 128 // GROUPS])


@triton.jit
def _added(dtype: tl.constexpr):
    """What `_numbers` are too large by: they are held 8 too large, and stand above 128 (1,024 in float16)."""
    return 136.0 if dtype == tl.bfloat16 else 1032.0


@triton.jit
def _by_row(pairs, GROUPS: tl.constexpr, COUNT: tl.constexpr, TILES: tl.constexpr):
    """Pairs of COUNT blocks `[GROUPS COUNT, 16 TILES, 4]`, in the order of `_numbers`; a row's 4 are the same."""
    pairs = tl.permute(tl.reshape(pairs, [2 * TILES, COUNT, 8, 4, GROUPS]), (4, 1, 0, 2, 3))
    return tl.reshape(pairs, [GROUPS * COUNT, 16 * TILES, 4])


@triton.jit
def _as_pair(pairs, dtype: tl.constexpr):
    """The two 16-bit numbers of an int32, in float32."""
    first = pairs.to(tl.int16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _for_tokens(of_row, TOKENS: tl.constexpr):
    """`[..., rows, 4]`, where a row's 4 are the same, for each of TOKENS tokens: of which a lane has two in a row."""
    wide = tl.broadcast_to(of_row[:, :, None, :, None], [of_row.shape[0], of_row.shape[1], TOKENS // 8, 4, 2])
    return tl.reshape(wide, [of_row.shape[0], of_row.shape[1], TOKENS])


@triton.jit
def _dense_int4(
    weight_ptr, scale_ptr, out_ptr, columns, blocks, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr
):
    """One program: a tile of 16 rows, and WARPS blocks of columns, of a weight `[rows, columns]`."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tile, block = tl.program_id(0), tl.program_id(1) * WARPS
    words = _load_words(weight_ptr, tile, block, blocks, 1, WARPS, 1)
    pairs = _load_pairs(scale_ptr, tile, block, blocks, GROUPS, BLOCKS, 1, WARPS, 1)
    factor, offset = _as_pair(tl.max(_by_row(pairs, GROUPS, WARPS, 1), 2)[:, :, None], dtype)
    numbers = _numbers(words, GROUPS, 1, WARPS, 1, dtype).to(tl.float32)  # [GROUPS WARPS, 16, columns]
    out = (numbers - _added(dtype)) * factor + offset
    nth = tl.arange(0, GROUPS * WARPS)[:, None, None]
    row = tile * 16 + tl.arange(0, 16)[None, :, None]
    column = (block + nth % WARPS) * 128 + nth // WARPS * (128 // GROUPS) + tl.arange(0, 128 // GROUPS)[None, None, :]
    tl.store(out_ptr + row.to(tl.int64) * columns + column, out.to(dtype), mask=column < columns)


def dense_weight(held: Tensor, scales: Tensor, columns: int) -> Tensor:
    """See `reference.dense_weight`; in the scales' dtype."""
    tiles, blocks = held.shape[:2]
    out = scales.new_empty(tiles * 16, columns)
    _dense_int4[(tiles, triton.cdiv(blocks, 4))](
        held, scales.view(torch.int32), out, columns, blocks, GROUPS=scales.shape[3], BLOCKS=blocks // scales.shape[1],
        WARPS=4, num_warps=4,
    )  # fmt: skip
    return out


def launch(
    x: Tensor, tensors: tuple, out: Tensor, tokens: int, rows: list[int], columns: int, ahead: Sequence[Tensor],
    given: dict[str, Any],
) -> None:  # fmt: skip
    """Of `linear.linear`, for int4: `tensors` are three weights, scales and biases each."""
    weights, scales, biases = tensors[:3], tensors[3:6], tensors[6:] if given["HAS_BIAS"] else (x, x, x)
    blocks, groups = weights[0].shape[1], scales[0].shape[3]
    tiles = [n // 16 for n in rows]
    sizes = _sizes(tokens, tiles, blocks, groups)
    fetched = (None, None, 0, 0)
    if ahead and given["PDL"]:
        part = min(1.0, AHEAD / ahead[0].nbytes)
        fetched = (*ahead, *(int(part * tensor.nbytes) // 128 for tensor in ahead))
    programs = [n // sizes["TILES"] for n in tiles]
    _linear_int4[(sum(programs),)](
        x, *weights, *(scale.view(torch.int32) for scale in scales), *biases, out, *fetched, tokens, programs[0],
        sum(programs[:2]), sum(rows), columns, blocks, GROUPS=groups, BLOCKS=blocks // scales[0].shape[1],
        TOKENS=8 if tokens <= 8 else most_tokens(x.dtype), ONE=tokens == 1, **sizes, num_warps=sizes["WARPS"], **given,
    )  # fmt: skip


def _sizes(tokens: int, tiles: list[int], blocks: int, groups: int) -> dict[str, Any]:
    """What was fastest on an H100, or nearly so, by the number of tiles (benchmarks/NOTES.md 14)."""
    count = sum(tiles)
    if tokens == 1 and groups == 1 and blocks <= 32:  # all that a program reads is on its way at once
        return {"WARPS": 4, "SPAN": max(1, triton.next_power_of_2(blocks) // 4), "TILES": 1, "ALL": True}
    few = count < 384
    if tokens == 1:
        warps, span, of_program = (8, 1 if groups == 4 else 2, 1) if few else (4, 2, 1)
    elif tokens > 8 or (groups == 4 and not few):
        warps, span, of_program = 4, 1, 2
    elif few:
        warps, span, of_program = 8, 2 if groups == 1 else 1, 1
    else:
        warps, span, of_program = (4, 2, 1) if count < 1024 else (2, 1, 2)
    if any(n % of_program for n in tiles):
        of_program = 1
    warps = min(warps, max(2, triton.next_power_of_2(blocks) // 2))
    return {"WARPS": warps, "SPAN": span, "TILES": of_program, "ALL": blocks <= warps * span}

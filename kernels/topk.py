"""Choosing tokens in Triton: the positions of the K most important of n, ascending, in four launches after a scan.

    merge     joins the scan's splits; beside it, counts the valid tokens of every tile, and empties the histograms
    rank      scores -> importance, and a histogram of the largest importance of every run of tokens
    sift      the K-th run bounds the K-th token from below: what reaches that bound becomes a candidate
    emit      finds the K-th among the candidates, and writes the positions from that one up

K runs reach the bound, so at least K tokens do, and few more: one token in RUN goes through the histogram, and about K
are compared. Bins are a guess at where the K-th lies, monotone in importance whatever the guess: a bad one makes more
candidates, never another answer. No sort and no host read: the live length and count stay on the device. Launches cover
the whole cache, a tile of TILE tokens a program. Reference: `reference.choose_tokens`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import index_width, parts_per_million
from .split import Splits, after_previous, mask_args, mask_tile, merge_args, merge_part, overlap, parts

NEVER = tl.constexpr(-(2**31))  # a key below all
BEYOND = tl.constexpr(2**31 - 1)  # and one above all
BINS = tl.constexpr(128)
RUN = tl.constexpr(8)
RUN_BLOCK = tl.constexpr(128)  # candidates of a tile, mostly fewer
INF = tl.constexpr(float("inf"))  # the importance of what is always chosen; -INF of what doesn't count


@triton.jit
def _encode(worth):
    """float32 -> int32 in the same order, -0.0 as 0.0."""
    bits = (worth + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _most(live, lse_ptr, row, MEMBERS: tl.constexpr):
    """The largest importance that `live` tokens can all have: probabilities of MEMBERS heads add up to MEMBERS."""
    live = tl.maximum(live, 1).to(tl.float32)
    if MEMBERS == 1:  # base-2 scores
        return tl.load(lse_ptr + row) - tl.log2(live)
    return MEMBERS / live


@triton.jit
def _bin(worth, most, MEMBERS: tl.constexpr):
    """Bins `[N]` by how far importance is below `most`, in eighths of an octave: 64 bins of 1, 32 of 2, 30 of 16.

    The first bin takes the rest, and the last one what is always chosen.
    """
    if MEMBERS == 1:  # base-2 scores: an octave is 1
        below = tl.minimum(tl.maximum((most - worth) * 8.0, 0.0), 2048.0).to(tl.int32)
    else:  # the exponent and 3 bits of the mantissa
        below = tl.maximum((most.to(tl.int32, bitcast=True) >> 20) - (worth.to(tl.int32, bitcast=True) >> 20), 0)
    below = tl.where(below < 64, below, tl.where(below < 128, 32 + below // 2, 88 + below // 16))
    return tl.where(worth == INF, BINS - 1, BINS - 2 - tl.minimum(below, BINS - 2))


@triton.jit
def _floor(bin, most, MEMBERS: tl.constexpr):
    """An importance that all of a bin and of those above it reach."""
    below = BINS - 2 - bin
    below = tl.where(below < 64, below, tl.where(below < 96, 2 * below - 63, 16 * below - 1393))
    if MEMBERS == 1:
        lowest = most - (below + 2) / 8.0  # one to spare for rounding
    else:
        lowest = (tl.maximum((most.to(tl.int32, bitcast=True) >> 20) - below, 0) << 20).to(tl.float32, bitcast=True)
    return tl.where(bin == BINS - 1, INF, tl.where(bin <= 0, -INF, lowest))


@triton.jit
def _merge_and_prepare(
    acc_ptr, stat_ptr, sink_ptr, out_ptr, lse_ptr, num_heads, splits,
    mask_ptr, length_ptr, count_ptr, histogram_ptr, total_ptr, slots, tiles, stride_mb, stride_mn,
    BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr, HAS_SINK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, SETS: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a part of one head's output; or one tile's valid tokens, and one token set's empty histogram."""
    after_previous(PDL)
    batch = tl.program_id(1).to(tl.int64)
    job = tl.program_id(0)
    if job < num_heads * PARTS:
        merge_part(
            batch * num_heads + job // PARTS, job % PARTS, acc_ptr, stat_ptr, sink_ptr, out_ptr, lse_ptr, num_heads,
            splits, BLOCK_SPLITS, CHUNK, HAS_SINK, D, BLOCK_D,
        )  # fmt: skip
        return
    job -= num_heads * PARTS
    if job < tiles:
        length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
        token = job * TILE + tl.arange(0, TILE)
        valid, _ = mask_tile(mask_ptr, batch * stride_mb + token * stride_mn, token < length, MASK, HIDES)
        tl.store(count_ptr + batch * tiles + job, tl.sum(valid.to(tl.int32), 0))
    if job < SETS:
        tl.store(histogram_ptr + (batch * SETS + job) * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(total_ptr + batch * SETS + job, 0)


@triton.jit
def _rank(
    score_ptr, lse_ptr, count_ptr, length_ptr, histogram_ptr, live_ptr, slots, stride_s, tiles,
    budget, ratio_ppm, sinks, recent,
    SETS: tl.constexpr, MEMBERS: tl.constexpr, TILE: tl.constexpr, BLOCK_TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one tile for one token set of MEMBERS query heads. Importance replaces the first one's scores."""
    after_previous(PDL)
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    row = batch * SETS + tl.program_id(1)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    if tile > 0 and tile * TILE >= length:
        return
    each = tl.arange(0, BLOCK_TILES)
    counts = tl.load(count_ptr + batch * tiles + each, mask=each < tiles, other=0)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < length
    scores = score_ptr + row * MEMBERS * stride_s + token
    worth = tl.load(scores, mask=inside, other=-INF)
    valid = worth > -INF
    if MEMBERS > 1:  # only probabilities may be added across heads
        worth = tl.exp2(worth - tl.load(lse_ptr + row * MEMBERS))
        for member in tl.range(1, MEMBERS, loop_unroll_factor=4):
            score = tl.load(scores + member * stride_s, mask=inside, other=-INF)
            worth += tl.exp2(score - tl.load(lse_ptr + row * MEMBERS + member))
        worth = tl.where(valid, worth, -INF)

    count = tl.sum(counts, 0)  # valid tokens: of the sequence, before this tile, and up to its end
    before = tl.sum(tl.where(each < tile, counts, 0), 0)
    until = tl.sum(tl.where(each <= tile, counts, 0), 0)
    by_ratio = ((count.to(tl.int64) * ratio_ppm + 999999) // 1000000).to(tl.int32)
    live = tl.minimum(tl.maximum(by_ratio, budget), count)
    tl.store(live_ptr + batch, live)
    ends = before < sinks or until > count - recent
    if ends:
        place = before + tl.cumsum(valid.to(tl.int32), 0)  # 1-based among the valid tokens
        worth = tl.where(valid & ((place <= sinks) | (place > count - recent)), INF, worth)
    if MEMBERS > 1 or ends:
        tl.store(scores, worth, mask=inside)

    most = _most(live, lse_ptr, row, MEMBERS)
    if count >= 2 * RUN * live:
        best = tl.max(tl.reshape(worth, [TILE // RUN, RUN]), 1)
        histogram = tl.histogram(_bin(best, most, MEMBERS), BINS, mask=best > -INF)
    else:  # too few runs for a bound
        histogram = tl.histogram(_bin(worth, most, MEMBERS), BINS, mask=valid)
    tl.atomic_add(histogram_ptr + row * BINS + tl.arange(0, BINS), histogram, mask=histogram > 0, sem="relaxed")


@triton.jit
def _sift(
    score_ptr, lse_ptr, length_ptr, live_ptr, histogram_ptr, total_ptr, run_ptr, bound_ptr, candidate_ptr, place_ptr,
    slots, stride_s, tiles, SETS: tl.constexpr, MEMBERS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the candidates of one tile for one token set, ascending: a run, of which slot and size are noted."""
    after_previous(PDL)
    tile = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64) * SETS + tl.program_id(1)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    if tile > 0 and tile * TILE >= length:
        return
    token = tile * TILE + tl.arange(0, TILE)
    worth = tl.load(score_ptr + row * MEMBERS * stride_s + token, mask=token < length, other=-INF)
    live = tl.load(live_ptr + tl.program_id(2))
    histogram = tl.load(histogram_ptr + row * BINS + tl.arange(0, BINS))
    at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram  # in this bin or above
    crossing = tl.sum((at_least >= live).to(tl.int32), 0) - 1
    bound = _floor(crossing, _most(live, lse_ptr, row, MEMBERS), MEMBERS)
    tl.store(bound_ptr + row, _encode(bound))

    found = (worth >= bound) & (worth > -INF)
    rank = tl.cumsum(found.to(tl.int32), 0)
    here = tl.max(rank, 0)
    first = tl.atomic_add(total_ptr + row, here, sem="relaxed")
    tl.store(run_ptr + (row * tiles + tile) * 2, first)
    tl.store(run_ptr + (row * tiles + tile) * 2 + 1, here)
    slot = row * slots + first + rank - 1
    tl.store(candidate_ptr + slot, _encode(worth), mask=found)
    tl.store(place_ptr + slot, token, mask=found)


@triton.jit
def _bisect(
    values, candidates, places, total, tied, wanted, low, high, step, BLOCK: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """A threshold from `low` to `high` that `wanted` of `total` values reach; where they tie, the last that enough do.

    The values are keys or, with PLACES, negated positions of those whose key is `tied`. The first BLOCK of them, nearly
    always all, are `values`; the rest are read again for every threshold. `step` guesses how far it is from `low`.
    -> the threshold, how many reach it, how many are above it.
    """
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    step = low * 0 + step
    reach = total
    above = total * 0
    while low < high:
        middle = tl.minimum(low + step, high - (high - low) // 2)
        threshold = middle.to(tl.int32)
        reached = tl.sum((values >= threshold).to(tl.int32), 0)
        for first in range(BLOCK, total, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            more = tl.load(candidates + slot, mask=slot < total, other=NEVER)
            if PLACES:
                more = tl.where(more == tied, -tl.load(places + slot, mask=slot < total, other=0), NEVER)
            reached += tl.sum((more >= threshold).to(tl.int32), 0)
        enough = reached >= wanted
        low = tl.where(enough, middle, low)
        reach = tl.where(enough, reached, reach)
        above = tl.where(enough, above, reached)
        high = tl.where(reached == wanted, middle, tl.where(enough, high, middle - 1))
        step *= 2
    return low.to(tl.int32), reach, above


@triton.jit
def _emit(
    length_ptr, live_ptr, total_ptr, run_ptr, bound_ptr, candidate_ptr, place_ptr, index_ptr, slots, tiles, width,
    SETS: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the positions chosen from SPAN tiles for one token set, written where they belong.

    Each program finds the threshold by itself: one more launch would take longer.
    """
    after_previous(PDL)
    tile = tl.program_id(0) * SPAN
    row = tl.program_id(2).to(tl.int64) * SETS + tl.program_id(1)
    candidates = candidate_ptr + row * slots
    places = place_ptr + row * slots
    slot = tl.arange(0, BLOCK)
    key = tl.load(candidates + slot, mask=slot < slots, other=0)  # all loads at once, whatever they say
    place = tl.load(places + slot, mask=slot < slots, other=0)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    live = tl.load(live_ptr + tl.program_id(2))
    total = tl.load(total_ptr + row)
    bound = tl.load(bound_ptr + row)
    own_tile = tile + tl.arange(0, SPAN)
    runs = run_ptr + row * tiles * 2
    here = tl.load(runs + own_tile * 2 + 1, mask=(own_tile < tiles) & (own_tile * TILE < length), other=0)
    for start in range(tile * TILE, tl.minimum((tile + SPAN) * TILE, width), TILE):
        unused = start + tl.arange(0, TILE)
        tl.store(index_ptr + row * width + unused, -1, mask=(unused >= live) & (unused < width))
    if tl.sum(here, 0) == 0:
        return
    key = tl.where(slot < total, key, NEVER)
    threshold, reach, above = _bisect(
        key, candidates, places, total, 0, live, bound, bound * 0 + BEYOND - 1, 2**19, BLOCK, False
    )
    last = slots + total * 0
    if reach > live:  # ties: the first ones
        tied = tl.where(key == threshold, -place, NEVER)
        lowest = total * 0 - slots
        place_threshold, _, _ = _bisect(
            tied, candidates, places, total, threshold, live - above, lowest, total * 0, slots, BLOCK, True
        )
        last = -place_threshold

    chosen = (key > threshold) | ((key == threshold) & (place <= last))
    offset = tl.sum((chosen & (place < tile * TILE)).to(tl.int32), 0)
    for first in range(BLOCK, total, BLOCK):
        key = tl.load(candidates + first + slot, mask=first + slot < total, other=NEVER)
        place = tl.load(places + first + slot, mask=first + slot < total, other=0)
        chosen = (key > threshold) | ((key == threshold) & (place <= last))
        offset += tl.sum((chosen & (place < tile * TILE)).to(tl.int32), 0)
    for each in range(tile, tl.minimum(tile + SPAN, tl.cdiv(length, TILE))):
        begin = tl.load(runs + each * 2)
        end = begin + tl.load(runs + each * 2 + 1)
        for first in range(begin, end, RUN_BLOCK):
            own = first + tl.arange(0, RUN_BLOCK)
            own_key = tl.load(candidates + own, mask=own < end, other=NEVER)
            own_place = tl.load(places + own, mask=own < end, other=0)
            kept = (own_key > threshold) | ((own_key == threshold) & (own_place <= last))
            rank = tl.cumsum(kept.to(tl.int32), 0)
            tl.store(index_ptr + row * width + offset + rank - 1, own_place, mask=kept)
            offset += tl.max(rank, 0)


class Prepared(NamedTuple):
    """What a selection of G token sets needs beside its scores."""

    lse: Tensor  # [B, Hq] log2-sum-exp of the scores
    count: Tensor  # [B, tiles] valid tokens
    histogram: Tensor  # [B, G, BINS], empty
    total: Tensor  # [B, G] candidates: none yet


def _tile(sequences: int, sets: int, slots: int) -> int:
    return 1024 if sequences * sets * slots < 2**19 else 2048


def merge_and_prepare(
    splits: Splits, sink: Tensor | None, out: Tensor, sets: int, slots: int, length: Tensor, mask: Tensor | None
) -> Prepared:
    """Merge the splits of a scan of `slots` into `out [B, Hq, 1, D]`, and prepare a selection of `sets` token sets."""
    batch, num_heads = out.shape[:2]
    tile = _tile(batch, sets, slots)
    tiles = triton.cdiv(slots, tile)
    count, histogram, total = (
        out.new_empty(batch, *shape, dtype=torch.int32) for shape in ((tiles,), (sets, BINS.value), (sets,))
    )
    arguments, sizes = merge_args(splits, sink, out)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _merge_and_prepare[(num_heads * parts(sizes) + max(tiles, sets), batch)](
        *arguments, mask_data, length, count, histogram, total, slots, tiles, *stride_m, **sizes, PARTS=parts(sizes),
        SETS=sets, TILE=tile, **mask_kind, **overlap(out.device),
    )  # fmt: skip
    return Prepared(arguments[4], count, histogram, total)


def choose_tokens(
    scores: Tensor, prepared: Prepared, length: Tensor, slots: int, budget: int, ratio: float, sinks: int, recent: int
) -> Tensor:
    """Base-2 scores `[B, Hq, >= S]` of a scan, which are overwritten -> `index [B, G, K]` int32."""
    lse, count, histogram, total = prepared
    batch, num_heads, stride = scores.shape
    sets = total.shape[1]
    width, tile, tiles = index_width(budget, ratio, slots), _tile(batch, sets, slots), count.shape[1]

    def empty(*shape: int) -> Tensor:
        return scores.new_empty(batch, *shape, dtype=torch.int32)

    live, index, run, bound = empty(), empty(sets, width), empty(sets, tiles, 2), empty(sets)
    candidate, place = empty(sets, slots), empty(sets, slots)
    common = {"SETS": sets, "TILE": tile, **overlap(scores.device)}
    size = {"MEMBERS": num_heads // sets, "num_warps": tile // 256}
    _rank[(tiles, sets, batch)](
        scores, lse, count, length, histogram, live, slots, stride, tiles, budget, parts_per_million(ratio), sinks,
        recent, BLOCK_TILES=max(32, triton.next_power_of_2(tiles)), **common, **size,
    )  # fmt: skip
    _sift[(tiles, sets, batch)](
        scores,
        lse,
        length,
        live,
        histogram,
        total,
        run,
        bound,
        candidate,
        place,
        slots,
        stride,
        tiles,
        **common,
        **size,
    )
    programs = batch * sets * tiles
    span = 1 if programs <= 256 else 2 if programs <= 1024 else 4
    _emit[(triton.cdiv(tiles, span), sets, batch)](
        length, live, total, run, bound, candidate, place, index, slots, tiles, width, SPAN=span, BLOCK=2048,
        num_warps=4, **common,
    )  # fmt: skip
    return index

"""Choosing tokens in Triton: the positions of the K most important of n, ascending, in five small launches.

    prepare   counts the valid tokens of every tile, and empties the histograms
    rank      scores -> integer keys that order as importance does, and a histogram of their bins
    sift      finds the bin of the K-th largest key: its keys become candidates; keys in bins above are counted
    settle    finds the K-th largest key among the candidates, and how many tokens are chosen before each tile
    emit      writes the positions from that key up

Bins are a guess at where the K-th key lies, monotone in the key whatever the guess: a bad one makes more candidates,
never another answer. No sort and no host read: the live length and count stay on the device. Every launch covers the
whole cache, a tile of TILE tokens a program. Reference: `reference.choose_tokens`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import index_width, parts_per_million
from .split import after_previous, mask_args, mask_tile, overlap

NEVER = tl.constexpr(-(2**31))  # the key of a token that does not count
ALWAYS = tl.constexpr(2**31 - 1)  # and of one that is always chosen
BINS = tl.constexpr(128)


@triton.jit
def _encode(worth):
    """float32 -> int32 in the same order, -0.0 as 0.0."""
    bits = (worth + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _bin(worth, key, live, lse_ptr, row, MEMBERS: tl.constexpr):
    """Bins `[N]` of keys by how many octaves they are below the largest importance that `live` tokens can all have.

    Probabilities of MEMBERS heads add up to MEMBERS, so no more than `live` tokens exceed MEMBERS / live. 64 bins of
    1/8 octave, 32 of 1/4, 30 of 2, the rest, and the last bin for what is always chosen.
    """
    if MEMBERS == 1:  # base-2 scores: an octave is 1
        octaves = tl.load(lse_ptr + row) - tl.log2(tl.maximum(live, 1).to(tl.float32)) - worth
        below = tl.minimum(tl.maximum(octaves * 8.0, 0.0), 2048.0).to(tl.int32)
    else:  # the exponent and 3 bits of the mantissa
        bound = (MEMBERS / tl.maximum(live, 1).to(tl.float32)).to(tl.int32, bitcast=True)
        below = tl.maximum((bound >> 20) - (worth.to(tl.int32, bitcast=True) >> 20), 0)
    below = tl.where(below < 64, below, tl.where(below < 128, 32 + below // 2, 88 + below // 16))
    return tl.where(key == ALWAYS, BINS - 1, BINS - 2 - tl.minimum(below, BINS - 2))


@triton.jit
def _prepare(
    mask_ptr, length_ptr, count_ptr, histogram_ptr, total_ptr, slots, tiles, stride_mb, stride_mn,
    SETS: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the valid tokens of one tile, and an empty histogram for one token set."""
    after_previous(PDL)
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    if tile < tiles:
        length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
        token = tile * TILE + tl.arange(0, TILE)
        valid, _ = mask_tile(mask_ptr, batch * stride_mb + token * stride_mn, token < length, MASK, HIDES)
        tl.store(count_ptr + batch * tiles + tile, tl.sum(valid.to(tl.int32), 0))
    if tile < SETS:
        tl.store(histogram_ptr + (batch * SETS + tile) * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(total_ptr + batch * SETS + tile, 0)


@triton.jit
def _rank(
    score_ptr, lse_ptr, count_ptr, length_ptr, key_ptr, bin_ptr, histogram_ptr, live_ptr, slots, tiles,
    budget, ratio_ppm, sinks, recent,
    SETS: tl.constexpr, MEMBERS: tl.constexpr, TILE: tl.constexpr, BLOCK_TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the keys of one tile for one token set of MEMBERS query heads."""
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
    scores = score_ptr + row * MEMBERS * slots + token
    worth = tl.load(scores, mask=inside, other=float("-inf"))
    valid = worth > float("-inf")
    if MEMBERS > 1:  # only probabilities may be added across heads
        worth = tl.exp2(worth - tl.load(lse_ptr + row * MEMBERS))
        for member in tl.range(1, MEMBERS, loop_unroll_factor=4):
            score = tl.load(scores + member * slots, mask=inside, other=float("-inf"))
            worth += tl.exp2(score - tl.load(lse_ptr + row * MEMBERS + member))

    count = tl.sum(counts, 0)  # valid tokens: of the sequence, before this tile, and up to its end
    before = tl.sum(tl.where(each < tile, counts, 0), 0)
    until = tl.sum(tl.where(each <= tile, counts, 0), 0)
    by_ratio = ((count.to(tl.int64) * ratio_ppm + 999999) // 1000000).to(tl.int32)
    live = tl.minimum(tl.maximum(by_ratio, budget), count)
    tl.store(live_ptr + batch, live)
    key = tl.where(valid, _encode(worth), NEVER)
    if before < sinks or until > count - recent:
        place = before + tl.cumsum(valid.to(tl.int32), 0)  # 1-based among the valid tokens
        key = tl.where(valid & ((place <= sinks) | (place > count - recent)), ALWAYS, key)
    tl.store(key_ptr + row * slots + token, key, mask=inside)
    bins = _bin(worth, key, live, lse_ptr, row, MEMBERS)
    tl.store(bin_ptr + row * slots + token, tl.where(valid, bins, -1).to(tl.int8), mask=inside)
    histogram = tl.histogram(bins, BINS, mask=valid)
    tl.atomic_add(histogram_ptr + row * BINS + tl.arange(0, BINS), histogram, mask=histogram > 0, sem="relaxed")


@triton.jit
def _sift(
    key_ptr, bin_ptr, length_ptr, live_ptr, histogram_ptr, total_ptr, wanted_ptr, above_ptr, candidate_ptr, place_ptr,
    slots, tiles, SETS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: from one tile of one token set, how many keys are above the crossing bin, and the keys inside it."""
    after_previous(PDL)
    tile = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64) * SETS + tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    bins = tl.load(bin_ptr + row * slots + token, mask=token < length, other=-1).to(tl.int32)
    live = tl.load(live_ptr + tl.program_id(2))
    histogram = tl.load(histogram_ptr + row * BINS + tl.arange(0, BINS))
    at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram  # keys in this bin or above
    crossing = tl.sum((at_least >= live).to(tl.int32), 0) - 1
    tl.store(wanted_ptr + row, live - tl.sum(tl.where(tl.arange(0, BINS) > crossing, histogram, 0), 0))

    tl.store(above_ptr + row * tiles + tile, tl.sum((bins > crossing).to(tl.int32), 0))
    found = bins == crossing
    rank = tl.cumsum(found.to(tl.int32), 0)
    here = tl.max(rank, 0)
    if here > 0:
        first = tl.atomic_add(total_ptr + row, here, sem="relaxed")
        slot = row * slots + first + rank - 1
        tl.store(candidate_ptr + slot, tl.load(key_ptr + row * slots + token, mask=found), mask=found)
        tl.store(place_ptr + slot, token, mask=found)


@triton.jit
def _values(candidates, places, first, total, tied, BLOCK: tl.constexpr, PLACES: tl.constexpr):
    """BLOCK candidates' keys; or, with PLACES, the negated positions of those whose key is `tied`; else NEVER."""
    slot = first + tl.arange(0, BLOCK)
    value = tl.load(candidates + slot, mask=slot < total, other=NEVER)
    if PLACES:
        value = tl.where((value == tied) & (slot < total), -tl.load(places + slot, mask=slot < total, other=0), NEVER)
    return value


@triton.jit
def _largest_with(
    values, candidates, places, total, tied, wanted, low, high, BLOCK: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """The largest threshold from `low` to `high` that `wanted` values reach, by bisection.

    `values` are the first BLOCK of them, nearly always all; the rest are read again for every step.
    """
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = high - (high - low) // 2
        threshold = middle.to(tl.int32)
        reached = tl.sum((values >= threshold).to(tl.int32), 0)
        for first in range(BLOCK, total, BLOCK):
            more = _values(candidates, places, first, total, tied, BLOCK, PLACES)
            reached += tl.sum((more >= threshold).to(tl.int32), 0)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached >= wanted, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _settle(
    total_ptr, wanted_ptr, above_ptr, candidate_ptr, place_ptr, threshold_ptr, offset_ptr, slots, tiles,
    TILE: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: for one token set, key and position of the last token that is chosen, and each tile's first slot."""
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(wanted_ptr + row)
    total = tl.load(total_ptr + row)
    each = tl.arange(0, BLOCK_TILES)
    chosen = tl.load(above_ptr + row * tiles + each, mask=each < tiles, other=0)
    candidates = candidate_ptr + row * slots
    places = place_ptr + row * slots
    lane = tl.arange(0, BLOCK)
    values = _values(candidates, places, 0, total, 0, BLOCK, False)
    lowest = tl.min(tl.where(lane < total, values, ALWAYS), 0)
    highest = tl.max(values, 0)
    for first in range(BLOCK, total, BLOCK):
        more = _values(candidates, places, first, total, 0, BLOCK, False)
        lowest = tl.minimum(lowest, tl.min(tl.where(first + lane < total, more, ALWAYS), 0))
        highest = tl.maximum(highest, tl.max(more, 0))
    threshold = _largest_with(values, candidates, places, total, 0, wanted, lowest, highest, BLOCK, False)

    ties = wanted * 0
    kept = wanted  # of the ties: the first ones
    for first in range(0, total, BLOCK):
        keys = _values(candidates, places, first, total, 0, BLOCK, False)
        ties += tl.sum(((keys == threshold) & (first + lane < total)).to(tl.int32), 0)
        kept -= tl.sum((keys > threshold).to(tl.int32), 0)
    last = wanted * 0 + slots
    if ties > kept:
        values = _values(candidates, places, 0, total, threshold, BLOCK, True)
        last = -_largest_with(values, candidates, places, total, threshold, kept, -last, last * 0, BLOCK, True)
    tl.store(threshold_ptr + row * 2, threshold)
    tl.store(threshold_ptr + row * 2 + 1, last)

    for first in range(0, total, BLOCK):
        slot = first + lane
        keys = _values(candidates, places, first, total, 0, BLOCK, False)
        place = tl.load(places + slot, mask=slot < total, other=0)
        among = (slot < total) & ((keys > threshold) | ((keys == threshold) & (place <= last)))
        chosen += tl.histogram(place // TILE, BLOCK_TILES, mask=among)
    tl.store(offset_ptr + row * tiles + each, tl.cumsum(chosen, 0) - chosen, mask=each < tiles)


@triton.jit
def _emit(
    key_ptr, length_ptr, live_ptr, threshold_ptr, offset_ptr, index_ptr, slots, tiles, width,
    SETS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the positions chosen from one tile of one token set, written where they belong."""
    after_previous(PDL)
    tile = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64) * SETS + tl.program_id(1)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    live = tl.load(live_ptr + tl.program_id(2))
    token = tile * TILE + tl.arange(0, TILE)
    tl.store(index_ptr + row * width + token, -1, mask=(token >= live) & (token < width))
    key = tl.load(key_ptr + row * slots + token, mask=token < length, other=NEVER)
    threshold = tl.load(threshold_ptr + row * 2)
    last = tl.load(threshold_ptr + row * 2 + 1)
    chosen = (key > threshold) | ((key == threshold) & (token <= last))
    slot = tl.load(offset_ptr + row * tiles + tile) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(index_ptr + row * width + slot, token, mask=chosen)


def choose_tokens(
    scores: Tensor, lse: Tensor, length: Tensor, mask: Tensor | None, sets: int,
    budget: int, ratio: float, sinks: int, recent: int,
) -> Tensor:  # fmt: skip
    """Base-2 scores `[B, Hq, S]` and log2-sum-exp `[B, Hq]` of a scan -> `index [B, G, K]` int32 for G = `sets`."""
    batch, num_heads, slots = scores.shape
    width, members = index_width(budget, ratio, slots), num_heads // sets
    tile, warps = (1024, 4) if batch * sets * slots < 2**19 else (2048, 8)
    tiles = triton.cdiv(slots, tile)

    def empty(*shape: int) -> Tensor:
        return scores.new_empty(batch, *shape, dtype=torch.int32)

    count, live, index = empty(tiles), empty(), empty(sets, width)
    histogram, total, wanted = empty(sets, BINS.value), empty(sets), empty(sets)
    above, offset, threshold = empty(sets, tiles), empty(sets, tiles), empty(sets, 2)
    key, candidate, place = empty(sets, slots), empty(sets, slots), empty(sets, slots)
    bins = scores.new_empty(batch, sets, slots, dtype=torch.int8)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    size = {"SETS": sets, "TILE": tile, "num_warps": warps, **overlap(scores.device)}
    of_tiles = {"BLOCK_TILES": max(32, triton.next_power_of_2(tiles))}
    _prepare[(max(tiles, sets), batch)](
        mask_data, length, count, histogram, total, slots, tiles, *stride_m, **size, **mask_kind
    )
    grid = (tiles, sets, batch)
    _rank[grid](
        scores, lse, count, length, key, bins, histogram, live, slots, tiles, budget, parts_per_million(ratio), sinks,
        recent, MEMBERS=members, **size, **of_tiles,
    )  # fmt: skip
    _sift[grid](key, bins, length, live, histogram, total, wanted, above, candidate, place, slots, tiles, **size)
    _settle[(batch * sets,)](
        total, wanted, above, candidate, place, threshold, offset, slots, tiles, TILE=tile, BLOCK=1024, num_warps=4,
        **of_tiles, **overlap(scores.device),
    )  # fmt: skip
    _emit[grid](key, length, live, threshold, offset, index, slots, tiles, width, **size)
    return index

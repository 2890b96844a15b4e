"""Token selection in Triton: the positions of the K most important of n tokens, in ascending order.

Four launches follow the scan that has written the scores:

    merge     joins the scan's splits; also counts the valid tokens of every tile, and clears the histograms
    rank      turns scores into importance; builds a histogram of the largest importance in every run of RUN tokens
    sift      finds the bin of the K-th largest of these maxima; tokens that reach the floor of that bin are candidates
    emit      finds the K-th most important candidate, and writes the positions of the K most important

K maxima reach the floor of that bin, so at least K tokens do, and not many more. This is cheap because only one token
in RUN enters the histogram, and only about K candidates are compared. Nothing is sorted, and the host reads nothing:
the live length and K stay on the device. Launches cover the whole cache, TILE tokens a program. Several query tokens
are like as many rows of a batch, which see fewer slots the earlier they are: in shapes, R = B T stands for B.

The importance of a token depends on POOL: its base-2 `score` where a token set belongs to one query head; the `sum` or
the `max` of its probabilities over the MEMBERS query heads that share the set; or what `union` makes of the `turn` that
a token has. The definitions are `reference.importance` and `reference.pick`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Selection
from .split import (
    Splits,
    after_previous,
    live_until,
    mask_args,
    mask_tile,
    merge_args,
    merge_part,
    overlap,
    parts,
    token_stride,
)

LOWEST_CODE = tl.constexpr(-(2**31))  # below what `encode` returns for any number, as HIGHEST_CODE is above
HIGHEST_CODE = tl.constexpr(2**31 - 1)
BINS = tl.constexpr(128)
RUN = tl.constexpr(8)
SEGMENT_BLOCK = tl.constexpr(128)  # candidates that are read at once: most tiles have fewer
HIGHEST = tl.constexpr(3.0e38)  # the importance of tokens of the newest page: above any other, and below INF
INF = tl.constexpr(float("inf"))  # the importance of a token that is always chosen; invalid tokens have -INF


@triton.jit
def encode(importance):
    """float32 -> int32 codes in the same order; -0.0 and 0.0 have one code."""
    bits = (importance + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# The bins of the histogram. Probabilities add up to 1 a head, so K tokens can't all be more important than a ceiling of
# MEMBERS / K. The bin of a token is given by how many octaves (factors of 2) its importance lies below that ceiling:
#
#     bin           importance                                    width of a bin
#     127           INF: sinks and recent tokens
#     126 to 63     above the ceiling, or up to 8 octaves below   1/8 octave
#     62 to 31      8 to 16 octaves below                         1/4 octave
#     30 to 1       16 to 76 octaves below                        2 octaves
#     0             anything lower
#
# For one head and K = 1024 the ceiling is a probability of 2^-10. A token of 2^-12.5 lies 20 eighths below it and falls
# into bin 126 - 20 = 106. A token of 2^-21.3 lies 90 eighths below it: bin 126 - (32 + 90 // 2) = 49.
#
# Attention that is spread out has its K-th token just below the ceiling, and very many tokens near it: bins must be
# narrow there. Attention that is concentrated on few tokens has its K-th token far below, where wide bins suffice.
#
# The ceiling is only a guess of where the K-th token lies, since it takes no account of sinks and recent tokens. Any
# guess gives the right answer: bins never decrease with importance, and no token lies below the floor of its bin, so
# the K most important tokens are always candidates. A bad guess only makes more candidates.


@triton.jit
def _ceiling(keep, lse_ptr, row, MEMBERS: tl.constexpr, POOL: tl.constexpr):
    """The largest importance that `keep` tokens can all have."""
    keep = tl.maximum(keep, 1).to(tl.float32)
    if POOL == "score":  # in base 2
        return tl.load(lse_ptr + row) - tl.log2(keep)
    return MEMBERS / keep


@triton.jit
def _eighths(probability):
    """A float32 in eighths of octaves: the exponent counts octaves, and the first 3 bits of the mantissa eighths."""
    return probability.to(tl.int32, bitcast=True) >> 20


@triton.jit
def _bin(importance, ceiling, POOL: tl.constexpr):
    """The bins `[N]` of importance `[N]`: see the table above."""
    if POOL == "score":  # an octave is a difference of 1 between base-2 scores
        eighths = tl.minimum(tl.maximum((ceiling - importance) * 8.0, 0.0), 2048.0).to(tl.int32)
    else:
        eighths = tl.maximum(_eighths(ceiling) - _eighths(importance), 0)
    steps = tl.where(eighths < 64, eighths, tl.where(eighths < 128, 32 + eighths // 2, 88 + eighths // 16))
    return tl.where(importance == INF, BINS - 1, BINS - 2 - tl.minimum(steps, BINS - 2))


@triton.jit
def _bin_floor(bin, ceiling, POOL: tl.constexpr):
    """An importance that every token in this bin, or in a higher one, reaches: `_bin` backwards, rounded down."""
    steps = BINS - 2 - bin  # 64 steps of one eighth, 32 of two, 30 of 16; `eighths` is the largest of a step
    eighths = tl.where(steps < 64, steps, tl.where(steps < 96, 2 * steps - 63, 16 * steps - 1393))
    if POOL == "score":  # + 1 for the fraction of an eighth that `_bin` cuts off, + 1 for rounding
        floor = ceiling - (eighths + 2) / 8.0
    else:
        floor = (tl.maximum(_eighths(ceiling) - eighths, 0) << 20).to(tl.float32, bitcast=True)
    return tl.where(bin == BINS - 1, INF, tl.where(bin <= 0, -INF, floor))


@triton.jit
def _merge_and_prepare(
    acc_ptr, stat_ptr, sink_ptr, out_ptr, lse_ptr, num_heads, splits,
    mask_ptr, length_ptr, valid_count_ptr, histogram_ptr, total_ptr, slots, tiles, stride_mb, stride_mn, stride_mt,
    BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr, HAS_SINK: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, SETS: tl.constexpr, TILE: tl.constexpr,
    MASK: tl.constexpr, HIDES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first programs merge one part of one head each; the others count one tile, and clear one set's histogram."""
    after_previous(PDL)
    batch = tl.program_id(1).to(tl.int64)  # R
    job = tl.program_id(0)
    if job < num_heads * PARTS:
        merge_part(
            batch * num_heads + job // PARTS, job % PARTS, acc_ptr, stat_ptr, sink_ptr, out_ptr, lse_ptr, num_heads,
            splits, BLOCK_SPLITS, CHUNK, HAS_SINK, VALUES, D, BLOCK_D, TOKENS,
        )  # fmt: skip
        return
    job -= num_heads * PARTS
    if job < tiles:
        length = live_until(length_ptr, slots, batch % TOKENS, TOKENS)
        token = job * TILE + tl.arange(0, TILE)
        masks = mask_ptr
        if MASK != "none":
            masks += batch // TOKENS * stride_mb + batch % TOKENS * stride_mt
        valid, _ = mask_tile(masks, token * stride_mn, token < length, MASK, HIDES)
        tl.store(valid_count_ptr + batch * tiles + job, tl.sum(valid.to(tl.int32), 0))
    if job < SETS:
        tl.store(histogram_ptr + (batch * SETS + job) * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(total_ptr + batch * SETS + job, 0)


@triton.jit
def _rank(
    score_ptr, lse_ptr, valid_count_ptr, length_ptr, count_ptr, histogram_ptr, keep_ptr, slots, stride_s, tiles,
    budget, ratio_ppm, sinks, recent,
    SETS: tl.constexpr, MEMBERS: tl.constexpr, POOL: tl.constexpr, TILE: tl.constexpr, BLOCK_TILES: tl.constexpr,
    HAS_COUNT: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one token set. Its importance overwrites the scores of the set's first query head."""
    after_previous(PDL)
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    row = batch * SETS + tl.program_id(1)
    length = live_until(length_ptr, slots, tl.program_id(2) % TOKENS, TOKENS)
    if tile > 0 and tile * TILE >= length:
        return
    tile_number = tl.arange(0, BLOCK_TILES)
    counts = tl.load(valid_count_ptr + batch * tiles + tile_number, mask=tile_number < tiles, other=0)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < length
    scores = score_ptr + row * MEMBERS * stride_s + token
    importance = tl.load(scores, mask=inside, other=-INF)
    valid = importance > -INF
    if MEMBERS > 1:  # only probabilities may be compared and added across heads
        importance = tl.exp2(importance - tl.load(lse_ptr + row * MEMBERS))
        for member in tl.range(1, MEMBERS, loop_unroll_factor=4):
            score = tl.load(scores + member * stride_s, mask=inside, other=-INF)
            probability = tl.exp2(score - tl.load(lse_ptr + row * MEMBERS + member))
            if POOL == "sum":
                importance += probability
            else:
                importance = tl.maximum(importance, probability)
        importance = tl.where(valid, importance, -INF)

    num_valid = tl.sum(counts, 0)
    valid_before = tl.sum(tl.where(tile_number < tile, counts, 0), 0)
    valid_until = tl.sum(tl.where(tile_number <= tile, counts, 0), 0)  # with this tile
    of = num_valid  # tokens, of which the ratio is meant
    if HAS_COUNT:
        of = tl.load(count_ptr + batch)
    by_ratio = ((of.to(tl.int64) * ratio_ppm + 999999) // 1000000).to(tl.int32)
    keep = tl.minimum(tl.maximum(by_ratio, budget), num_valid)  # K
    tl.store(keep_ptr + batch, keep)
    has_special = valid_before < sinks or valid_until > num_valid - recent  # sinks or recent tokens
    if PAGE > 0:
        is_last = valid_until == num_valid  # nothing valid comes after this tile
        newest = tl.max(tl.where(valid, token, -1), 0)
        importance = tl.where(valid & is_last & (token // PAGE == newest // PAGE), HIGHEST, importance)
        has_special = has_special or is_last
    if has_special:
        ordinal = valid_before + tl.cumsum(valid.to(tl.int32), 0)  # 1 for the first valid token
        always = valid & ((ordinal <= sinks) | (ordinal > num_valid - recent))
        importance = tl.where(always, INF, importance)
    if MEMBERS > 1 or has_special:
        tl.store(scores, importance, mask=inside)

    ceiling = _ceiling(keep, lse_ptr, row, MEMBERS, POOL)
    if PAGE == 0 and num_valid >= 2 * RUN * keep:
        largest = tl.max(tl.reshape(importance, [TILE // RUN, RUN]), 1)
        histogram = tl.histogram(_bin(largest, ceiling, POOL), BINS, mask=largest > -INF)
    else:  # every token is counted: there may be fewer than K runs, or all tokens of a run may be equal
        histogram = tl.histogram(_bin(importance, ceiling, POOL), BINS, mask=valid)
    tl.atomic_add(histogram_ptr + row * BINS + tl.arange(0, BINS), histogram, mask=histogram > 0, sem="relaxed")


@triton.jit
def _sift(
    score_ptr, lse_ptr, length_ptr, keep_ptr, histogram_ptr, total_ptr, segment_ptr, bound_ptr, code_ptr, position_ptr,
    slots, stride_s, tiles, SETS: tl.constexpr, MEMBERS: tl.constexpr, POOL: tl.constexpr, TILE: tl.constexpr,
    TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the candidates of one tile of one token set, written as a segment in ascending order of position.

    Segments of a set follow each other in any order, as programs run; the start and the size of each are stored.
    """
    after_previous(PDL)
    tile = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64) * SETS + tl.program_id(1)
    length = live_until(length_ptr, slots, tl.program_id(2) % TOKENS, TOKENS)
    if tile > 0 and tile * TILE >= length:
        return
    token = tile * TILE + tl.arange(0, TILE)
    importance = tl.load(score_ptr + row * MEMBERS * stride_s + token, mask=token < length, other=-INF)
    keep = tl.load(keep_ptr + tl.program_id(2))
    histogram = tl.load(histogram_ptr + row * BINS + tl.arange(0, BINS))
    at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram  # counted in this bin and those above
    crossing = tl.sum((at_least >= keep).to(tl.int32), 0) - 1  # the bin of the K-th
    bound = _bin_floor(crossing, _ceiling(keep, lse_ptr, row, MEMBERS, POOL), POOL)
    tl.store(bound_ptr + row, encode(bound))

    is_candidate = (importance >= bound) & (importance > -INF)
    rank = tl.cumsum(is_candidate.to(tl.int32), 0)
    size = tl.max(rank, 0)
    start = tl.atomic_add(total_ptr + row, size, sem="relaxed")
    tl.store(segment_ptr + (row * tiles + tile) * 2, start)
    tl.store(segment_ptr + (row * tiles + tile) * 2 + 1, size)
    entry = row * slots + start + rank - 1
    tl.store(code_ptr + entry, encode(importance), mask=is_candidate)
    tl.store(position_ptr + entry, token, mask=is_candidate)


@triton.jit
def _find_threshold(
    values, codes, positions, total, tied_code, wanted, low, high, step, BLOCK: tl.constexpr, OF_POSITIONS: tl.constexpr
):  # fmt: skip
    """Search for a threshold in [low, high] that exactly `wanted` of the `total` candidates' values reach.

    Where no threshold has exactly so many, because values are equal, the result is the largest that `wanted` or more
    reach. At least `wanted` must reach `low`.

    The values of candidates are their codes, or with OF_POSITIONS the negated positions of those with `tied_code`. The
    first BLOCK values, nearly always all, are given in `values`; the others are read again for every threshold tried.
    The answer is expected near `low`, so steps from there start at `step` and double, until halving the interval is
    the shorter step. Returns the threshold, how many values reach it, and, if these are more than `wanted`, how many
    are above it.
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
            entry = first + tl.arange(0, BLOCK)
            more = tl.load(codes + entry, mask=entry < total, other=LOWEST_CODE)
            if OF_POSITIONS:
                position = tl.load(positions + entry, mask=entry < total, other=0)
                more = tl.where(more == tied_code, -position, LOWEST_CODE)
            reached += tl.sum((more >= threshold).to(tl.int32), 0)
        enough = reached >= wanted
        low = tl.where(enough, middle, low)
        reach = tl.where(enough, reached, reach)
        above = tl.where(enough, above, reached)
        high = tl.where(reached == wanted, middle, tl.where(enough, high, middle - 1))
        step *= 2
    return low.to(tl.int32), reach, above


@triton.jit
def _is_chosen(code, position, threshold, last_tied):
    """Which candidates are chosen: those above the threshold, and those at it up to the position `last_tied`."""
    return (code > threshold) | ((code == threshold) & (position <= last_tied))


@triton.jit
def _emit(
    length_ptr, keep_ptr, total_ptr, segment_ptr, bound_ptr, code_ptr, position_ptr, of_ptr, index_ptr, slots, tiles,
    width, SETS: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, HAS_OF: tl.constexpr,
    TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the positions chosen from SPAN tiles of one token set, written to their place in the index.

    Every program searches for the set's threshold itself, since one more launch would take longer.
    """
    after_previous(PDL)
    first_tile = tl.program_id(0) * SPAN
    row = tl.program_id(2).to(tl.int64) * SETS + tl.program_id(1)
    codes = code_ptr + row * slots
    positions = position_ptr + row * slots
    # These loads depend on no other load, so all are in flight at once; what isn't needed is discarded afterwards.
    entry = tl.arange(0, BLOCK)
    code = tl.load(codes + entry, mask=entry < slots, other=0)
    position = tl.load(positions + entry, mask=entry < slots, other=0)
    length = live_until(length_ptr, slots, tl.program_id(2) % TOKENS, TOKENS)
    keep = tl.load(keep_ptr + tl.program_id(2))
    total = tl.load(total_ptr + row)
    bound = tl.load(bound_ptr + row)
    own_tile = first_tile + tl.arange(0, SPAN)
    segments = segment_ptr + row * tiles * 2
    sizes = tl.load(segments + own_tile * 2 + 1, mask=(own_tile < tiles) & (own_tile * TILE < length), other=0)
    for start in range(first_tile * TILE, tl.minimum((first_tile + SPAN) * TILE, width), TILE):
        unused = start + tl.arange(0, TILE)
        tl.store(index_ptr + row * width + unused, -1, mask=(unused >= keep) & (unused < width))
    if tl.sum(sizes, 0) == 0:
        return
    # A constant enters the search as `x * 0 + constant`: a loop needs variables that don't change their type.
    code = tl.where(entry < total, code, LOWEST_CODE)
    threshold, reach, above = _find_threshold(
        code, codes, positions, total, 0, keep, bound, bound * 0 + HIGHEST_CODE - 1, 2**19, BLOCK, False
    )
    last_tied = slots + total * 0
    if reach > keep:  # too many candidates are equal: those at the lowest positions are chosen
        tied = tl.where(code == threshold, -position, LOWEST_CODE)
        lowest = total * 0 - slots
        position_threshold, _, _ = _find_threshold(
            tied, codes, positions, total, threshold, keep - above, lowest, total * 0, slots, BLOCK, True
        )
        last_tied = -position_threshold

    # The first position goes behind all that are chosen from earlier tiles.
    chosen = _is_chosen(code, position, threshold, last_tied)
    offset = tl.sum((chosen & (position < first_tile * TILE)).to(tl.int32), 0)
    for first in range(BLOCK, total, BLOCK):
        code = tl.load(codes + first + entry, mask=first + entry < total, other=LOWEST_CODE)
        position = tl.load(positions + first + entry, mask=first + entry < total, other=0)
        chosen = _is_chosen(code, position, threshold, last_tied)
        offset += tl.sum((chosen & (position < first_tile * TILE)).to(tl.int32), 0)
    for tile in range(first_tile, tl.minimum(first_tile + SPAN, tl.cdiv(length, TILE))):
        begin = tl.load(segments + tile * 2)
        end = begin + tl.load(segments + tile * 2 + 1)
        for first in range(begin, end, SEGMENT_BLOCK):
            own = first + tl.arange(0, SEGMENT_BLOCK)
            own_code = tl.load(codes + own, mask=own < end, other=LOWEST_CODE)
            own_position = tl.load(positions + own, mask=own < end, other=0)
            own_chosen = _is_chosen(own_code, own_position, threshold, last_tied)
            rank = tl.cumsum(own_chosen.to(tl.int32), 0)
            if HAS_OF:
                own_position = tl.load(of_ptr + row * slots + own_position, mask=own_chosen, other=0)
            tl.store(index_ptr + row * width + offset + rank - 1, own_position, mask=own_chosen)
            offset += tl.max(rank, 0)


@triton.jit
def _take_turns(
    score_ptr, index_ptr, turn_ptr, stride_s, width,
    SETS: tl.constexpr, MEMBERS: tl.constexpr, OF: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK of the tokens that one query head chose. 1 / (their turn + 1), if larger, becomes their worth.

    The turn of a token is rank x OF + head, where its rank counts the better ones of those that the head chose, without
    those that are always kept; the heads here are those from FIRST on of the OF that take turns.
    """
    after_previous(PDL)
    member = tl.program_id(1) % MEMBERS
    batch = tl.program_id(2).to(tl.int64)
    token_set = batch * SETS + tl.program_id(1) // MEMBERS
    head = batch * SETS * MEMBERS + tl.program_id(1)
    scores = score_ptr + head * stride_s
    chosen = index_ptr + head * width
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(chosen + column, mask=column < width, other=-1)
    score = tl.load(scores + position, mask=position >= 0, other=-INF)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, width, BLOCK):
        other = first + tl.arange(0, BLOCK)
        other_position = tl.load(chosen + other, mask=other < width, other=-1)
        rival = tl.load(scores + other_position, mask=other_position >= 0, other=-INF)
        better = (rival[None, :] > score[:, None]) | (
            (rival[None, :] == score[:, None]) & (other_position[None, :] < position[:, None])
        )
        rank += tl.sum((better & (rival < INF)[None, :]).to(tl.int32), 1)
    worth = 1.0 / (rank * OF + FIRST + member + 1).to(tl.float32)
    ranked = (position >= 0) & (score < INF)
    # Positive floats are in the order of their bits
    tl.atomic_max(turn_ptr + token_set * stride_s + position, worth.to(tl.int32, bitcast=True), mask=ranked)


class Prepared(NamedTuple):
    """What a selection of G token sets needs beside its scores."""

    lse: Tensor  # [B, Hq] log2-sum-exp of the scores
    valid_counts: Tensor  # [B, tiles] valid tokens of each tile
    histogram: Tensor  # [B, G, BINS] zeros
    total: Tensor  # [B, G] zeros: the number of candidates so far


def _tile(batch: int, sets: int, slots: int) -> int:
    """Tokens a program: more where there are programs enough."""
    return 1024 if batch * sets * slots < 2**19 else 2048


def merge_and_prepare(
    splits: Splits | None, call: Call[Tensor], num_sets: int, slots: int, out: Tensor | None = None
) -> Prepared:  # fmt: skip
    """Merge the splits of a scan, if there are any, into `out [B, Hq, T, D]`, and prepare a choice of token sets."""
    num_heads, tokens = call.query.shape[1:3]
    batch = call.query.shape[0] * tokens  # R
    device = call.query.device
    tile = _tile(batch, num_sets, slots)
    tiles = triton.cdiv(slots, tile)
    valid_counts, histogram, total = (
        torch.empty(batch, *shape, dtype=torch.int32, device=device)
        for shape in ((tiles,), (num_sets, BINS.value), (num_sets,))
    )
    empty = torch.empty(batch, 0, 1, 2, device=device)
    arguments, sizes = merge_args(Splits(empty, None) if splits is None else splits, call.sink_logit, out)
    to_merge = 0 if splits is None else num_heads
    (mask_data, *stride_m), mask_kind = mask_args(call.mask, call.query.shape[0], slots)
    sizes["TOKENS"] = tokens
    _merge_and_prepare[(to_merge * parts(sizes) + max(tiles, num_sets), batch)](
        *arguments, mask_data, call.length, valid_counts, histogram, total, slots, tiles, *stride_m,
        token_stride(call.mask), **sizes, PARTS=parts(sizes), SETS=num_sets, TILE=tile, **mask_kind, **overlap(device),
    )  # fmt: skip
    return Prepared(arguments[4], valid_counts, histogram, total)


def choose_tokens(
    scores: Tensor, prepared: Prepared, length: Tensor, selection: Selection, pool: str, slots: int, width: int,
    tokens: int = 1, page: int = 0, num_valid: Tensor | None = None, of: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The chosen positions `[B, G, K]` int32 by base-2 scores `[B, Hq, >= S]`, or turns, which are overwritten.

    `width`: K; `tokens`: T. `page`, `num_valid` and `of`: see `select.choose`.
    """
    lse, valid_counts, histogram, total = prepared
    batch, num_heads, stride_s = scores.shape
    sets, tiles = total.shape[1], valid_counts.shape[1]
    tile = _tile(batch, sets, slots)

    def empty(*shape: int) -> Tensor:
        return scores.new_empty(batch, *shape, dtype=torch.int32)

    keep, index = empty(), empty(sets, width)
    segments, bound = empty(sets, tiles, 2), empty(sets)  # segments: start and size
    codes, positions = empty(sets, slots), empty(sets, slots)  # of candidates
    common = {"SETS": sets, "TILE": tile, "TOKENS": tokens, **overlap(scores.device)}
    size = {"MEMBERS": num_heads // sets, "POOL": pool, "num_warps": tile // 256}
    _rank[(tiles, sets, batch)](
        scores, lse, valid_counts, length, num_valid, histogram, keep, slots, stride_s, tiles, selection.budget,
        selection.parts_per_million, selection.sinks, selection.recent, HAS_COUNT=num_valid is not None, PAGE=page,
        BLOCK_TILES=max(32, triton.next_power_of_2(tiles)), **common, **size,
    )  # fmt: skip
    _sift[(tiles, sets, batch)](
        scores, lse, length, keep, histogram, total, segments, bound, codes, positions, slots, stride_s, tiles,
        **common, **size,
    )  # fmt: skip
    programs = batch * sets * tiles
    span = 1 if programs <= 256 else 2 if programs <= 1024 else 4
    _emit[(triton.cdiv(tiles, span), sets, batch)](
        length, keep, total, segments, bound, codes, positions, of, index, slots, tiles, width, SPAN=span, BLOCK=2048,
        HAS_OF=of is not None, num_warps=2, **common,
    )  # fmt: skip
    return index


def take_turns(scores: Tensor, index: Tensor, num_sets: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """What the tokens of each set are worth `[B, G, >= S]` by the turns in which its heads `[B, Hq, K]` chose them.

    `scores` are those that `choose_tokens` left. What no head chose is worth 0; what doesn't count, -inf. The heads of
    a set are divided among `ranks`.
    """
    batch, num_heads, stride_s = scores.shape
    members, width = num_heads // num_sets, index.shape[2]
    worth = torch.where(scores[:, ::members] > -torch.inf, 0.0, -torch.inf)
    _take_turns[(triton.cdiv(width, 64), num_heads, batch)](
        scores, index, worth.view(torch.int32), stride_s, width, SETS=num_sets, MEMBERS=members,
        OF=ranks * members, FIRST=rank * members, BLOCK=64, **overlap(scores.device),
    )  # fmt: skip
    return worth

"""The best of some thousand units, by one program a token set: pages by their bounds, or tokens that a page kept.

A launch costs more here than the work. `topk`, which is made for every token of a long cache, takes four of them; this
takes one. In a unit of PAGE slots the first tokens that count may be sinks, the last ones recent tokens; the others are
its ordinary ones, which are all as important as the unit is:

    weigh      the units' importance, and how many sinks, recent and ordinary tokens each has
    sift       which of them may be needed, to be listed: not many more than are chosen
    search     the importance of the last unit that is needed to fill the budget
    expand     the units that are chosen into their tokens

Units beyond BLOCK, and candidates beyond FINE, are read again wherever they are needed. The definitions are
`reference.importance` and `reference.pick`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Selection
from .split import LOG2E, after_previous, mask_args, mask_tile, overlap
from .topk import HIGHEST, HIGHEST_CODE, INF, LOWEST_CODE, encode

MOST = 8192  # units that a program holds
RUN = tl.constexpr(32)  # units in a row of its tile: sums along a row need no barrier


@triton.jit
def _tile(first, BLOCK: tl.constexpr):
    """BLOCK units from `first`: `[BLOCK / RUN, RUN]`."""
    return first + tl.arange(0, BLOCK // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]


@triton.jit
def running_sum(x):
    """`tl.cumsum` over a tile, row after row."""
    of_row = tl.sum(x, 1)
    return tl.cumsum(x, 1) + (tl.cumsum(of_row, 0) - of_row)[:, None]


@triton.jit
def tile_sum(x):
    """The sum of a whole tile."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _special_tokens(before, count, num_valid, sinks, recent):
    """How many of the `count` tokens that follow `before` valid ones are sinks, and how many recent tokens: `[N]`."""
    first_recent = tl.maximum(num_valid - recent, tl.minimum(sinks, num_valid))
    num_sinks = tl.minimum(tl.maximum(sinks - before, 0), count)
    return num_sinks, tl.minimum(tl.maximum(before + count - first_recent, 0), count)


@triton.jit
def _makeup(num_sinks, num_recent, ordinary):
    """How many tokens of each kind a unit has, in one integer."""
    return num_sinks | (num_recent << 8) | (ordinary << 16)


@triton.jit
def _log_sum_exp(
    stat_ptr, sink_ptr, lse_ptr, row, token_set, splits, MEMBERS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Store the base-2 log-sum-exp of the heads of a set."""
    member = tl.arange(0, ROWS)
    head = row * MEMBERS + member
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    if HAS_SINK:
        m = tl.load(sink_ptr + token_set * MEMBERS + member, mask=member < MEMBERS, other=0.0).to(tl.float32) * LOG2E
        l += 1.0
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[None, :]
        stats = stat_ptr + (head[:, None] * splits + split) * 2
        there = (member < MEMBERS)[:, None] & (split < splits)
        some_m = tl.load(stats, mask=there, other=float("-inf"))
        some_l = tl.load(stats + 1, mask=there, other=0.0)
        new_m = tl.maximum(m, tl.max(some_m, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        l = l * tl.exp2(m - shift) + tl.sum(some_l * tl.exp2(some_m - shift[:, None]), 1)
        m = new_m
    tl.store(lse_ptr + head, tl.where(m == float("-inf"), 0.0, m) + tl.log2(l), mask=member < MEMBERS)
    tl.debug_barrier()  # other threads read it


@triton.jit
def _weigh(
    scores, lses, counts, first, live, before, length, num_valid, sinks, recent, stride_s,
    MEMBERS: tl.constexpr, POOL: tl.constexpr, PAGE: tl.constexpr, HAS_OF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK units from `first`, with `before` tokens before: their codes, their makeup, and the next `before`."""
    unit = _tile(first, BLOCK)
    inside = unit < live
    importance = tl.load(scores + unit, mask=inside, other=-INF)
    if MEMBERS > 1:  # only probabilities may be compared and added across heads
        importance = tl.exp2(importance - tl.load(lses))
        for member in tl.static_range(1, MEMBERS):
            score = tl.load(scores + member * stride_s + unit, mask=inside, other=-INF)
            probability = tl.exp2(score - tl.load(lses + member))
            if POOL == "sum":
                importance += probability
            else:
                importance = tl.maximum(importance, probability)
    if HAS_OF:
        count = inside.to(tl.int32)
        until = unit + 1
    else:
        count = tl.load(counts + unit, mask=inside, other=0)
        if num_valid == length:  # no token is masked
            until = tl.minimum((unit + 1) * PAGE, length)
        else:
            until = before + running_sum(count)
            before += tile_sum(count)
        importance = tl.where((count > 0) & (until == num_valid), HIGHEST, importance)  # the newest token's page
    num_sinks, num_recent = _special_tokens(until - count, count, num_valid, sinks, recent)
    return encode(importance), _makeup(num_sinks, num_recent, count - num_sinks - num_recent), before


@triton.jit
def _list_candidates(code, makeup, low, first, live, listed, codes, makeups, units, BLOCK: tl.constexpr):
    """Append units that have special tokens, or ordinary ones and a code from `low` up, to the list: -> its length."""
    unit = _tile(first, BLOCK)
    is_candidate = (unit < live) & (((makeup & 0xFFFF) > 0) | ((makeup > 0xFFFF) & (code >= low)))
    entry = listed + running_sum(is_candidate.to(tl.int32)) - 1
    tl.store(codes + entry, code, mask=is_candidate)
    tl.store(makeups + entry, makeup, mask=is_candidate)
    tl.store(units + entry, unit, mask=is_candidate)
    return listed + tile_sum(is_candidate.to(tl.int32))


@triton.jit
def _reached(code, ordinary, threshold, codes, makeups, listed, FINE: tl.constexpr):
    """Ordinary tokens of the candidates whose codes reach a threshold. The first FINE candidates are given."""
    reached = tl.sum(tl.where(code >= threshold, ordinary, 0), 0)
    for first in range(FINE, listed, FINE):
        entry = first + tl.arange(0, FINE)
        more = tl.load(codes + entry, mask=entry < listed, other=LOWEST_CODE)
        makeup = tl.load(makeups + entry, mask=entry < listed, other=0)
        reached += tl.sum(tl.where(more >= threshold, makeup >> 16, 0), 0)
    return reached


@triton.jit
def _lowest_reaching(code, ordinary, threshold, codes, makeups, listed, FINE: tl.constexpr):
    """The lowest code, of a candidate with ordinary tokens, that reaches a threshold; above any if there is none."""
    lowest = tl.min(tl.where((ordinary > 0) & (code >= threshold), code, HIGHEST_CODE - 1), 0)
    for first in range(FINE, listed, FINE):
        entry = first + tl.arange(0, FINE)
        more = tl.load(codes + entry, mask=entry < listed, other=LOWEST_CODE)
        makeup = tl.load(makeups + entry, mask=entry < listed, other=0)
        reaches = (makeup > 0xFFFF) & (more >= threshold)
        lowest = tl.minimum(lowest, tl.min(tl.where(reaches, more, HIGHEST_CODE - 1), 0))
    return lowest


@triton.jit
def _pick(
    score_ptr, stat_ptr, sink_ptr, count_ptr, valid_ptr, tally_ptr, of_ptr, mask_ptr, length_ptr,
    lse_ptr, scratch_ptr, new_tally_ptr, index_ptr,
    units, slots, splits, width, stride_s, stride_mb, stride_mn, budget, ratio_ppm, sinks, recent,
    SETS: tl.constexpr, MEMBERS: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr, PAGE: tl.constexpr,
    HAS_OF: tl.constexpr, HAS_SINK: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, FINE: tl.constexpr,
    FEW: tl.constexpr, BLOCK_SPLITS: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one token set."""
    after_previous(PDL)
    token_set = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * SETS + token_set
    if HAS_OF:
        length = tl.load(tally_ptr + batch * 2)
        live = length
        num_valid = length
        of = tl.load(tally_ptr + batch * 2 + 1)  # tokens, of which a ratio is meant
        counts = count_ptr
    else:
        length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
        live = tl.cdiv(length, PAGE)
        num_valid = length * 0
        for first in range(0, splits, BLOCK_SPLITS):
            split = first + tl.arange(0, BLOCK_SPLITS)
            num_valid += tl.sum(tl.load(valid_ptr + batch * splits + split, mask=split < splits, other=0), 0)
        of = num_valid
        counts = count_ptr + batch * units
    by_ratio = ((of.to(tl.int64) * ratio_ppm + 999999) // 1000000).to(tl.int32)
    keep = tl.minimum(tl.maximum(by_ratio, budget), num_valid)  # K
    all_sinks, all_recent = _special_tokens(length * 0, num_valid, num_valid, sinks, recent)
    wanted = keep - all_sinks - all_recent  # ordinary tokens
    if token_set == 0:
        tl.store(new_tally_ptr + batch * 2, keep)
        tl.store(new_tally_ptr + batch * 2 + 1, of)

    # Weigh
    if MEMBERS > 1:
        _log_sum_exp(stat_ptr, sink_ptr, lse_ptr, row, token_set, splits, MEMBERS, ROWS, BLOCK_SPLITS, HAS_SINK)
    scores = score_ptr + row * MEMBERS * stride_s
    lses = lse_ptr + row * MEMBERS
    list_codes = scratch_ptr + row * 5 * units
    list_makeups = list_codes + units
    list_units = list_codes + 2 * units
    codes = list_codes + 3 * units
    makeups = list_codes + 4 * units
    before = length * 0
    if ONE_BLOCK:
        code, makeup, before = _weigh(
            scores, lses, counts, 0, live, before, length, num_valid, sinks, recent, stride_s,
            MEMBERS, POOL, PAGE, HAS_OF, BLOCK,
        )  # fmt: skip
        best, worth = code, makeup >> 16
    else:
        best = tl.full([BLOCK // RUN, RUN], LOWEST_CODE, tl.int32)  # of the units that share a place in the tile
        worth = tl.zeros([BLOCK // RUN, RUN], tl.int32)  # ordinary tokens of that one
        for first in range(0, live, BLOCK):
            code, makeup, before = _weigh(
                scores, lses, counts, first, live, before, length, num_valid, sinks, recent, stride_s,
                MEMBERS, POOL, PAGE, HAS_OF, BLOCK,
            )  # fmt: skip
            unit = _tile(first, BLOCK)
            tl.store(codes + unit, code, mask=unit < live)
            tl.store(makeups + unit, makeup, mask=unit < live)
            is_better = (makeup > 0xFFFF) & (code > best)
            best = tl.where(is_better, code, best)
            worth = tl.where(is_better, makeup >> 16, worth)
        tl.debug_barrier()

    # Sift: whoever is below `low` isn't needed, since enough tokens of the best units reach it
    reach = tile_sum(worth)
    low = tl.min(tl.min(tl.where(worth > 0, best, HIGHEST_CODE - 1), 1), 0).to(tl.int64)
    high = tl.max(tl.max(tl.where(worth > 0, best, LOWEST_CODE), 1), 0).to(tl.int64)
    low = tl.where(reach < wanted, low * 0 + LOWEST_CODE, low)
    while (low < high) & (reach > FINE * PAGE * 3 // 4) & (reach >= wanted + PAGE):
        middle = high - (high - low) // 2
        reached = tile_sum(tl.where(best >= middle.to(tl.int32), worth, 0))
        enough = reached >= wanted
        reach = tl.where(enough, reached, reach)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    listed = length * 0
    if ONE_BLOCK:
        listed = _list_candidates(
            code, makeup, low.to(tl.int32), 0, live, listed, list_codes, list_makeups, list_units, BLOCK
        )
    else:
        for first in range(0, live, BLOCK):
            unit = _tile(first, BLOCK)
            code = tl.load(codes + unit, mask=unit < live, other=LOWEST_CODE)
            makeup = tl.load(makeups + unit, mask=unit < live, other=0)
            listed = _list_candidates(
                code, makeup, low.to(tl.int32), first, live, listed, list_codes, list_makeups, list_units, BLOCK
            )
    for first in range(keep, width, BLOCK):
        unused = first + tl.arange(0, BLOCK)
        tl.store(index_ptr + row * width + unused, -1, mask=unused < width)
    tl.debug_barrier()

    # Search: no candidate from `low` up can be left out, and `reach` ordinary tokens stand there
    entry = tl.arange(0, FINE)
    fine_code = tl.load(list_codes + entry, mask=entry < listed, other=LOWEST_CODE)
    ordinary = tl.load(list_makeups + entry, mask=entry < listed, other=0) >> 16
    reach = _reached(fine_code, ordinary, low.to(tl.int32), list_codes, list_makeups, listed, FINE)
    high = low * 0 + HIGHEST_CODE - 2
    if listed <= FINE:
        high = tl.max(tl.where(ordinary > 0, fine_code, LOWEST_CODE), 0).to(tl.int64)
    while (low < high) & (reach >= wanted + PAGE):
        middle = high - (high - low) // 2
        reached = _reached(fine_code, ordinary, middle.to(tl.int32), list_codes, list_makeups, listed, FINE)
        enough = reached >= wanted
        reach = tl.where(enough, reached, reach)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    last = _lowest_reaching(fine_code, ordinary, low.to(tl.int32), list_codes, list_makeups, listed, FINE)
    above = _reached(fine_code, ordinary, last + 1, list_codes, list_makeups, listed, FINE)
    while above > wanted:  # the lowest one that is left isn't needed after all
        last = _lowest_reaching(fine_code, ordinary, last + 1, list_codes, list_makeups, listed, FINE)
        above = _reached(fine_code, ordinary, last + 1, list_codes, list_makeups, listed, FINE)

    # Expand: of candidates as important as the last one, those at the lowest positions
    left = wanted - above
    num_sure = length * 0
    num_tied = length * 0
    for first in range(0, listed, FEW):
        candidate = first + tl.arange(0, FEW)
        few_code = tl.load(list_codes + candidate, mask=candidate < listed, other=LOWEST_CODE)
        few_makeup = tl.load(list_makeups + candidate, mask=candidate < listed, other=0)
        unit = tl.load(list_units + candidate, mask=candidate < listed, other=0)
        num_sinks, num_recent, few_ordinary = few_makeup & 255, (few_makeup >> 8) & 255, few_makeup >> 16
        sure = num_sinks + num_recent + tl.where(few_code > last, few_ordinary, 0)
        tied = tl.where(few_code == last, few_ordinary, 0)
        sums = tl.cumsum((sure.to(tl.int64) << 32) | tied.to(tl.int64), 0)
        sure_before = num_sure + (sums >> 32).to(tl.int32) - sure
        tied_before = num_tied + (sums & 0xFFFFFFFF).to(tl.int32) - tied
        offset = sure_before + tl.minimum(left, tied_before)
        taken = sure + tl.minimum(tl.maximum(left - tied_before, 0), tied)
        num_sure += tl.sum(sure, 0)
        num_tied += tl.sum(tied, 0)
        if HAS_OF:
            unit = tl.load(of_ptr + row * units + unit, mask=taken > 0, other=0)
        if PAGE == 1:
            tl.store(index_ptr + row * width + offset, unit, mask=taken > 0)
        else:  # tokens from the front of the page, and recent ones from its end
            count = (num_sinks + num_recent + few_ordinary)[:, None]
            lead = (taken - num_recent)[:, None]
            slot = tl.arange(0, PAGE)[None, :]
            position = unit[:, None] * PAGE + slot
            valid = slot < count
            number = slot + count * 0  # of a token among those of its page that count
            if MASK != "none":  # noqa: SIM102
                if num_valid != length:
                    inside = (position < length) & (taken > 0)[:, None]
                    valid, _ = mask_tile(mask_ptr, batch * stride_mb + position * stride_mn, inside, MASK, HIDES)
                    number = tl.cumsum(valid.to(tl.int32), 1) - 1
            is_recent = number >= count - num_recent[:, None]
            column = offset[:, None] + number - tl.where(is_recent, count - num_recent[:, None] - lead, 0)
            chosen = valid & (taken > 0)[:, None] & ((number < lead) | is_recent)
            tl.store(index_ptr + row * width + column, position, mask=chosen)


class Picked(NamedTuple):
    """Token sets, and what a choice among their tokens needs to know."""

    index: Tensor  # [B, G, K] int32
    tally: Tensor  # [B, 2] int32: how many tokens each set has, and how many are valid at all


def pick(
    scores: Tensor, stats: Tensor, sink_logit: Tensor | None, selection: Selection, units: int, slots: int,
    num_sets: int, page: int = 1, counts: Tensor | None = None, valid: Tensor | None = None,
    mask: Tensor | None = None, length: Tensor | None = None, of: Picked | None = None,
) -> Picked:  # fmt: skip
    """The best units by base-2 scores `[B, Hq, >= units]`, with the splits' sums `stats [B, Hq, splits, 2]`.

    Units are pages, of which `counts [B, units]` says how many tokens count, and `valid [B, splits]` in all, up to the
    live `length`; or the tokens of the sets `of` an earlier choice. `mask`: none, or bool.
    """
    batch, num_heads, stride_s = scores.shape
    members, splits, width = num_heads // num_sets, stats.shape[2], selection.width(slots)

    def empty(*shape: int) -> Tensor:
        return scores.new_empty(batch, *shape, dtype=torch.int32)

    index, tally = empty(num_sets, width), empty(2)
    block = min(MOST, max(128, triton.next_power_of_2(units)))
    fine = min(block, max(128, triton.next_power_of_2(2 * triton.cdiv(width, page))))
    rows = triton.next_power_of_2(members)
    (mask_data, *stride_m), mask_kind = mask_args(mask, batch, slots)
    _pick[(num_sets, batch)](
        scores, stats, None if sink_logit is None else sink_logit.contiguous(), counts, valid,
        None if of is None else of.tally, None if of is None else of.index, mask_data, length,
        stats.new_empty(batch, num_heads), empty(num_sets, 5, units), tally, index,
        units, slots, splits, width, stride_s, *stride_m, selection.budget, selection.parts_per_million,
        selection.sinks, selection.recent,
        SETS=num_sets, MEMBERS=members, ROWS=rows, POOL=selection.pool, PAGE=page, HAS_OF=of is not None,
        HAS_SINK=sink_logit is not None, ONE_BLOCK=units <= block, BLOCK=block, FINE=fine, FEW=max(32, 2048 // page),
        BLOCK_SPLITS=min(triton.next_power_of_2(splits), max(16, 4096 // rows)), **mask_kind,
        num_warps=8 if block > 1024 else 4, **overlap(scores.device),
    )  # fmt: skip
    return Picked(index, tally)

"""`by: lsh` in Triton: attention to a random sample of tokens. Definition: `methods/lsh.py`.

prepare    which tokens are neither sinks nor recent; at the first step also their mean key
hash       on which side of each hyperplane the queries are, and the newest key (at the first step: all keys; and those
           that have no bits yet, where a counter was set forth)
sample     for 32 tokens at once, whether a query head's code equals theirs in enough tables: a bit a token; and a list
           of the tokens that any head samples, of sinks and of recent tokens
attend     to those on the list
merge      joins the splits

A key takes a bit for each hyperplane, stored by hyperplane: one int32 holds that bit of 32 tokens. A code equals the
query's where no bit of it differs, and "in at least two tables" takes two such words, so that a table costs an
instruction or two a bit for 32 tokens and a query head. Nothing is gathered to look for tokens, and no list has a
length that data could exceed: a program lists what it finds among its own tokens, in as many places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Selection, arguments
from ..methods.lsh import WORD, Lsh
from .pick import running_sum, tile_sum
from .split import (
    LOG2E,
    Splits,
    after_previous,
    as_float16,
    cap,
    dot,
    load_group,
    load_keys,
    load_numbers,
    load_scales,
    load_values,
    mask_args,
    mask_tile,
    merge,
    multiply,
    num_splits,
    overlap,
    padded_rows,
    rows_of,
    store_split,
    tile_tokens,
    weigh_tile,
)

BITS = tl.constexpr(WORD)
PARTS = tl.constexpr(4)  # of the tables: each of as many warps takes one
STATIC = tl.constexpr(-(2**31))  # of a listed token: every head attends to it as it is
MOST_HEADS = 16  # query heads of a program: a listed token has a bit for each


@triton.jit
def _edges(masks, stride_mn, length, sinks, recent, BLOCK: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr):
    """The slots from which on, and up to which, tokens are neither sinks nor recent."""
    lane = tl.arange(0, BLOCK)
    first, last, start, left = length * 0, length, length * 0, sinks
    while (left > 0) & (start < length):
        valid, _ = mask_tile(masks, (start + lane) * stride_mn, start + lane < length, MASK, HIDES)
        count = tl.cumsum(valid.to(tl.int32), 0)
        first = start + tl.sum((count < left).to(tl.int32), 0) + 1
        left -= tl.max(count, 0)
        start += BLOCK
    end, left = length, recent
    while (left > 0) & (end > 0):
        token = end - 1 - lane
        valid, _ = mask_tile(masks, token * stride_mn, token >= 0, MASK, HIDES)
        count = tl.cumsum(valid.to(tl.int32), 0)
        last = end - 1 - tl.sum((count < left).to(tl.int32), 0)
        left -= tl.max(count, 0)
        end -= BLOCK
    first = tl.minimum(first, length)
    return first, tl.maximum(last, first)


@triton.jit
def _prepare(
    k_ptr, scale_ptr, mask_ptr, length_ptr, since_ptr, center_ptr, edge_ptr, slots,
    stride_kb, stride_kh, stride_kn, stride_xb, stride_xh, stride_xn, stride_mb, stride_mn, sinks, recent,
    NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    HIDES: tl.constexpr, EXACT: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one kv head."""
    after_previous(PDL)
    kv_head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    masks = mask_ptr
    if MASK != "none":
        masks += batch * stride_mb
    first, last = _edges(masks, stride_mn, length, sinks, recent, 256, MASK, HIDES)
    if EXACT:
        last = tl.maximum(first, tl.minimum(last, length - 1))  # the newest token is a decoded one
    if kv_head == 0:
        tl.store(edge_ptr + batch * 2, first)
        tl.store(edge_ptr + batch * 2 + 1, last)
    if tl.load(since_ptr) == 0:
        total = tl.zeros([BLOCK_D], tl.float32)
        count = length * 0
        keys = k_ptr + batch * stride_kb + kv_head.to(tl.int64) * stride_kh
        scales = scale_ptr
        if FP8:
            scales += batch * stride_xb + kv_head.to(tl.int64) * stride_xh
        for start in range(first, last, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            valid, _ = mask_tile(masks, token * stride_mn, token < last, MASK, HIDES)
            row = token.to(tl.int64)
            k = load_numbers(keys, scales, row, stride_kn, stride_xn, valid, D, BLOCK_D, tl.float32, FP8)
            total += tl.sum(k.to(tl.float32), 1)
            count += tl.sum(valid.to(tl.int32), 0)
        dim = tl.arange(0, BLOCK_D)
        center = total / tl.maximum(count, 1).to(tl.float32)
        tl.store(center_ptr + (batch * NUM_KV_HEADS + kv_head) * D + dim, center, mask=dim < D)


@triton.jit
def _hash(
    q_ptr, k_ptr, scale_ptr, plane_ptr, center_ptr, length_ptr, since_ptr, code_ptr, query_code_ptr, slots, words,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_xb, stride_xh, stride_xn,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    K: tl.constexpr, L: tl.constexpr, TABLES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the hyperplanes of TABLES tables, and one kv head with its query heads."""
    after_previous(PDL)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = batch * NUM_KV_HEADS + kv_head
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    number = tl.arange(0, TABLES * BLOCK_K)
    table, bit = tl.program_id(0) * TABLES + number // BLOCK_K, number % BLOCK_K
    there = (table < L) & (bit < K)
    plane = table * K + bit
    dim = tl.arange(0, BLOCK_D)
    normal = tl.load(plane_ptr + plane[:, None] * D + dim[None, :], mask=there[:, None] & (dim[None, :] < D), other=0.0)
    center = tl.load(center_ptr + group * D + dim, mask=dim < D, other=0.0)
    offset = tl.sum(normal.to(tl.float32) * center[None, :], 1)  # keys beyond it are on the positive side

    row = tl.arange(0, ROWS)
    queries = q_ptr + batch * stride_qb + kv_head.to(tl.int64) * GROUP * stride_qh
    q = load_group(queries, stride_qh, stride_qd, GROUP, ROWS, D, BLOCK_D)
    bits = (dot(normal, tl.trans(q)) > 0.0).to(tl.int32) << bit[:, None]  # [TABLES BLOCK_K, ROWS]
    code = tl.sum(bits.reshape(TABLES, BLOCK_K, ROWS), 1)
    of = tl.program_id(0) * TABLES + tl.arange(0, TABLES)[:, None]
    code_at = query_code_ptr + (group * GROUP + row[None, :]) * L + of
    tl.store(code_at, code, mask=(of < L) & (row[None, :] < GROUP))

    keys = k_ptr + batch * stride_kb + kv_head.to(tl.int64) * stride_kh
    scales = scale_ptr
    if FP8:
        scales += batch * stride_xb + kv_head.to(tl.int64) * stride_xh
    codes = code_ptr + (group * L * K + plane.to(tl.int64)) * words
    first = tl.load(since_ptr) == 0
    hashed = tl.where(first, 0, tl.load(since_ptr + 1))
    if first | (hashed < length - 1):
        lane = tl.arange(0, BITS)
        for start in range(hashed // BLOCK_N * BLOCK_N, length, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            place = token.to(tl.int64)
            k = load_numbers(keys, scales, place, stride_kn, stride_xn, token < length, D, BLOCK_D, normal.dtype, FP8)
            positive = (dot(normal, k) > offset[:, None]) & (token < length)[None, :]
            by_word = positive.to(tl.int32).reshape(TABLES * BLOCK_K, BLOCK_N // BITS, BITS) << lane[None, None, :]
            word = start // BITS + tl.arange(0, BLOCK_N // BITS)
            tl.store(codes[:, None] + word[None, :], tl.sum(by_word, 2), mask=there[:, None] & (word < words)[None, :])
    elif length > 0:
        newest = length - 1
        k = tl.load(keys + newest.to(tl.int64) * stride_kn + dim, mask=dim < D, other=0.0).to(tl.float32)
        if FP8:
            key_scale, _values = load_scales(scales, newest.to(tl.int64) * stride_xn, True)
            k = (k * key_scale).to(normal.dtype).to(tl.float32)
        positive = (tl.sum(normal.to(tl.float32) * k[None, :], 1) > offset).to(tl.int32)
        place = codes + newest // BITS
        word = tl.load(place, mask=there, other=0) & ~(1 << newest % BITS)
        tl.store(place, word | (positive << newest % BITS), mask=there)


@triton.jit
def _arccos(x):
    """For x from 0 to 1, within 2e-8: Abramowitz and Stegun, 4.4.46."""
    series = -0.0012624911 * x + 0.0066700901
    series = series * x - 0.0170881256
    series = series * x + 0.0308918810
    series = series * x - 0.0501743046
    series = series * x + 0.0889789874
    series = series * x - 0.2145988016
    series = series * x + 1.5707963050
    return tl.sqrt(1.0 - x) * series


@triton.jit
def _log_weight(cosine, weight_ptr, STEPS: tl.constexpr):
    """Of a sampled token, base 2: looked up by the probability that a hyperplane has it and the query on one side."""
    angle = _arccos(tl.minimum(tl.abs(cosine), 1.0)) * 0.3183098861837907  # of pi
    at = tl.where(cosine < 0.0, angle, 1.0 - angle) * STEPS
    step = tl.minimum(at.to(tl.int32), STEPS - 1)
    before = tl.load(weight_ptr + step)
    return before + (at - step.to(tl.float32)) * (tl.load(weight_ptr + step + 1) - before)


@triton.jit
def _hits_of_both(a1, a2, a3, a4, b1, b2, b3, b4):
    """Who has 1, 2, 3 and 4 hits or more, from who has as many in some tables and in others."""
    return (
        a1 | b1,
        a2 | b2 | (a1 & b1),
        a3 | b3 | (a2 & b1) | (a1 & b2),
        a4 | b4 | (a3 & b1) | (a2 & b2) | (a1 & b3),
    )


@triton.jit
def _sample(
    code_ptr, query_code_ptr, since_ptr, edge_ptr, mask_ptr, length_ptr, list_ptr, who_ptr, count_ptr, slots, words,
    stride_mb, stride_mn,
    PAIRS: tl.constexpr, PAIRS_PER_KV_HEAD: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr,
    K: tl.constexpr, L: tl.constexpr, THRESHOLD: tl.constexpr, EXACT: tl.constexpr, NUM_WORDS: tl.constexpr,
    MASK: tl.constexpr, HIDES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: GROUP query heads of one kv head, and NUM_WORDS words of 32 tokens, of which it lists those to read.

    Each warp looks at a part of the tables. Codes are loaded as `[PARTS, 1, NUM_WORDS]`, so that a thread has all heads
    of its words, loads them once, and takes no barrier.
    """
    after_previous(PDL)
    pair = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = batch * (PAIRS // PAIRS_PER_KV_HEAD) + pair // PAIRS_PER_KV_HEAD
    head = (batch * PAIRS + pair) * GROUP
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    word = tl.program_id(0) * NUM_WORDS + tl.arange(0, NUM_WORDS)
    if tl.program_id(0) * NUM_WORDS * BITS >= length:
        return
    part = tl.arange(0, PARTS)[:, None, None]
    member = tl.arange(0, MEMBERS)[None, :, None]
    there = (word // 16 * 16 < words)[None, None, :]  # rows have a multiple of 16: so that loads are wide
    once = tl.zeros([PARTS, MEMBERS, NUM_WORDS], tl.int32)
    twice = once
    thrice = once
    often = once
    if L > 0:  # or only static tokens are listed
        codes = code_ptr + group * L * K * words
        queries = query_code_ptr + head * L
        for first in range(0, L, PARTS):
            table = first + part
            query = tl.load(queries + member * L + table, mask=(member < GROUP) & (table < L), other=0)  # its code
            miss = tl.zeros([PARTS, MEMBERS, NUM_WORDS], tl.int32) - (table >= L).to(tl.int32)
            for bit in tl.static_range(0, K):
                plane = codes + (table * K + bit).to(tl.int64) * words
                code = tl.load(plane + word[None, None, :], mask=there & (table < L), other=0)
                miss |= code ^ (0 - ((query >> bit) & 1))
            hit = ~miss
            if THRESHOLD > 3:
                often |= thrice & hit
            if THRESHOLD > 2:
                thrice |= twice & hit
            if THRESHOLD > 1:
                twice |= once & hit
            once |= hit
    once, twice, thrice, often = tl.reduce((once, twice, thrice, often), 0, _hits_of_both)
    sampled = once if THRESHOLD == 1 else twice if THRESHOLD == 2 else thrice if THRESHOLD == 3 else often

    first_dynamic = tl.load(edge_ptr + batch * 2)
    first_recent = tl.load(edge_ptr + batch * 2 + 1)
    since = tl.load(since_ptr)
    since = tl.where(since == 0, length, tl.minimum(since, length))
    masks = mask_ptr
    if MASK != "none":
        masks += batch * stride_mb
    token = word[:, None] * BITS + tl.arange(0, BITS)[None, :]  # [NUM_WORDS, 32]
    valid, _ = mask_tile(masks, token * stride_mn, token < length, MASK, HIDES)
    is_static = (token < first_dynamic) | (token >= first_recent)
    if EXACT:
        is_static |= token >= since - 1
    member = tl.arange(0, MEMBERS)[:, None, None]
    by_member = ((sampled[:, :, None] >> tl.arange(0, BITS)[None, None, :]) & 1) << member
    who = tl.where(is_static, STATIC, tl.sum(tl.where(member < GROUP, by_member, 0), 0))
    found = valid & (who != 0)
    chunk = (batch * PAIRS + pair) * tl.cdiv(words, NUM_WORDS) + tl.program_id(0)
    entry = chunk * NUM_WORDS * BITS + running_sum(found.to(tl.int32)) - 1
    tl.store(list_ptr + entry, token, mask=found)
    tl.store(who_ptr + entry, who, mask=found)
    tl.store(count_ptr + chunk, tile_sum(found.to(tl.int32)))


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, scale_ptr, center_ptr, since_ptr, weight_ptr, mask_ptr, length_ptr, list_ptr, who_ptr,
    count_ptr, acc_ptr, stat_ptr, scale, slots, chunks, splits, all_splits,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_xb,
    stride_xh, stride_xn, stride_mb, stride_mn,
    PAIRS: tl.constexpr, PAIRS_PER_KV_HEAD: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, PLACES: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, CAP: tl.constexpr, FP8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: GROUP query heads of one kv head, and a split of the chunks of PLACES tokens that were listed."""
    after_previous(PDL)
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = pair // PAIRS_PER_KV_HEAD
    group = batch * (PAIRS // PAIRS_PER_KV_HEAD) + kv_head
    head = (batch * PAIRS + pair) * GROUP
    length = tl.minimum(tl.load(length_ptr), slots).to(tl.int32)
    if (split == 0) & (pair == 0) & (batch == 0):
        since = tl.load(since_ptr)
        tl.store(since_ptr, tl.where(since == 0, length, tl.minimum(since, length)))
        tl.store(since_ptr + 1, length)

    q = load_group(q_ptr + batch * stride_qb + pair * GROUP * stride_qh, stride_qh, stride_qd, GROUP, ROWS, D, BLOCK_D)
    dim = tl.arange(0, BLOCK_D)
    center = tl.load(center_ptr + group * D + dim, mask=dim < D, other=0.0)
    query = q.to(tl.float32)
    query_norm = tl.sqrt(tl.sum(query * query, 1))  # [ROWS]
    query_center = tl.sum(query * center[None, :], 1)
    q, unit = as_float16(q, FP8)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    PACK: tl.constexpr = 2 if FP8 else 1  # values in a number
    acc = tl.zeros([ROWS, BLOCK_D // PACK], tl.float32)
    odd_acc = acc
    row = tl.arange(0, ROWS)
    keys = k_ptr + batch * stride_kb + kv_head * stride_kh
    values = v_ptr + batch * stride_vb + kv_head * stride_vh
    scales = scale_ptr
    if FP8:
        scales += batch * stride_xb + kv_head * stride_xh
    masks = mask_ptr
    if MASK != "none":
        masks += batch * stride_mb

    live = tl.cdiv(length, PLACES)
    each = tl.cdiv(live, splits)
    for chunk in range(split * each, tl.minimum(split * each + each, live)):
        place = (batch * PAIRS + pair) * chunks + chunk
        listed = tl.load(count_ptr + place)
        for at in range(0, listed, BLOCK_N):
            listing = at + tl.arange(0, BLOCK_N)
            inside = listing < listed
            found_token = tl.load(list_ptr + place * PLACES + listing, mask=inside, other=0)
            found_by = tl.load(who_ptr + place * PLACES + listing, mask=inside, other=0)
            cache_row = found_token.to(tl.int64)
            k = load_keys(keys, cache_row * stride_kn, inside, D, BLOCK_D)
            v = load_values(values, cache_row * stride_vn, inside, D // PACK, BLOCK_D // PACK)
            key_scale, value_scale = unit, unit  # in FP8 alone they are read
            if FP8:
                key_scale, value_scale = load_scales(scales, cache_row * stride_xn, inside)
            _visible, bias = mask_tile(masks, found_token * stride_mn, inside, MASK, HIDES)
            product = multiply(q, unit, k, key_scale, FP8)
            score = (cap(product * scale, CAP) + bias[None, :]) * LOG2E
            number = k.to(tl.float32)
            if FP8:
                number *= key_scale[None, :]
            from_center = number - center[:, None]
            norms = query_norm[:, None] * tl.sqrt(tl.sum(from_center * from_center, 0))[None, :]
            cosine = tl.where(norms > 0.0, (product - query_center[:, None]) / norms, 0.0)
            weighted = score + _log_weight(cosine, weight_ptr, STEPS)
            mine = inside[None, :] & (((found_by[None, :] >> row[:, None]) & 1) != 0)
            score = tl.where((inside & (found_by == STATIC))[None, :], score, tl.where(mine, weighted, float("-inf")))
            m, l, acc, odd_acc = weigh_tile(
                score, v, value_scale, inside, m, l, acc, odd_acc, "none", q.dtype, FP8
            )  # fmt: skip
    store_split(m, l, acc, odd_acc, acc_ptr, stat_ptr, head, split, all_splits, GROUP, ROWS, D, BLOCK_D, True, FP8)


def attend(
    call: Call[Tensor], selection: Selection, method: Lsh, planes: Tensor, center: Tensor, codes: Tensor,
    since: Tensor, log_weights: Tensor,
) -> Tensor:  # fmt: skip
    """Attention to a sample `[B, Hq, 1, D]`. Also brings what is kept up to date: see `Lsh.summarize`."""
    q, rows = call.query, rows_of(call)
    k = rows.key
    batch, num_heads = q.shape[:2]
    num_kv_heads, slots = k.shape[1:3]
    group, words, device = num_heads // num_kv_heads, codes.shape[4], q.device

    edge = edges(call, selection, method, center, since)
    query_codes = q.new_empty(batch, num_heads, method.l, dtype=torch.int32)
    block_k = triton.next_power_of_2(method.k)
    tables = 64 // block_k
    _hash[(triton.cdiv(method.l, tables), num_kv_heads, batch)](
        q, k, rows.scales, planes, center, call.length, since, codes, query_codes, slots, words,
        q.stride(0), q.stride(1), q.stride(3), *k.stride()[:3], *rows.strides,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, ROWS=padded_rows(group), **rows.sizes,
        K=method.k, L=method.l, TABLES=tables, BLOCK_K=block_k,
        BLOCK_N=max(WORD, tile_tokens(q, stage_bytes=2**16)), num_warps=4, num_stages=2, **overlap(device),
    )  # fmt: skip
    out = q.new_empty(q.shape)
    merge(_attend_to(call, method, center, since, log_weights, edge, codes, query_codes), call.sink_logit, out)
    return out


def edges(call: Call[Tensor], selection: Selection, method: Lsh, center: Tensor, since: Tensor) -> Tensor:
    """The first slot of each row behind its sinks, and the first one of its recent tokens: `[B, 2]` int32.

    At the first step (`since`) also the mean of the keys between them, into `center`.
    """
    rows = rows_of(call)
    k = rows.key
    batch, num_kv_heads, slots, _ = k.shape
    (mask, *stride_m), mask_kind = mask_args(call.mask, batch, slots)
    edge = torch.empty(batch, 2, dtype=torch.int32, device=k.device)
    _prepare[(num_kv_heads, batch)](
        k, rows.scales, mask, call.length, since, center, edge, slots, *k.stride()[:3], *rows.strides, *stride_m,
        selection.sinks, selection.recent, NUM_KV_HEADS=num_kv_heads, **rows.sizes, BLOCK_N=64, **mask_kind,
        EXACT=method.decoded == "exact", num_warps=4, **overlap(k.device),
    )  # fmt: skip
    return edge


def attend_to_static(
    call: Call[Tensor], method: Lsh, center: Tensor, since: Tensor, log_weights: Tensor, edge: Tensor
) -> Splits:
    """Attention to sinks, recent and decoded tokens, and room for one split more: see `merge_with`."""
    return _attend_to(call, method, center, since, log_weights, edge, more=1)


def merge_with(splits: Splits, out: Tensor, lse: Tensor, call: Call[Tensor]) -> Tensor:
    """Join splits, and attention to other tokens: its output `[B, Hq, D]` and natural log-sum-exp `[B, Hq]`."""
    splits.acc[:, :, -1] = out
    splits.stats[:, :, -1, 0] = lse * LOG2E.value
    splits.stats[:, :, -1, 1] = 1.0
    both = call.query.new_empty(call.query.shape)
    merge(splits, call.sink_logit, both)
    return both


def _attend_to(
    call: Call[Tensor], method: Lsh, center: Tensor, since: Tensor, log_weights: Tensor, edge: Tensor,
    codes: Tensor | None = None, query_codes: Tensor | None = None, more: int = 0,
) -> Splits:  # fmt: skip
    """Attention to static tokens and, with codes, to the sample; `more` splits are empty."""
    q, _, _, length, mask, scale, _, softcap, _ = arguments(call)
    rows = rows_of(call)
    k, v = rows.key, rows.value
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    group, device = num_heads // num_kv_heads, q.device
    words = triton.cdiv(slots, WORD) if codes is None else codes.shape[4]
    (mask, *stride_m), mask_kind = mask_args(mask, batch, slots)
    heads = max(few for few in range(1, MOST_HEADS + 1) if group % few == 0)  # of a program
    pairs, members = num_heads // heads, triton.next_power_of_2(heads)
    sizes = {"PAIRS": pairs, "PAIRS_PER_KV_HEAD": pairs // num_kv_heads, "GROUP": heads, "MEMBERS": members}

    num_words = 64 if members <= 8 else WORD
    chunks = triton.cdiv(words, num_words)
    listed, who = q.new_empty(2, batch, pairs, chunks * num_words * WORD, dtype=torch.int32)
    counts = q.new_empty(batch, pairs, chunks, dtype=torch.int32)
    _sample[(chunks, pairs, batch)](
        codes, query_codes, since, edge, mask, length, listed, who, counts, slots, words, *stride_m,
        **sizes, K=method.k, L=0 if codes is None else method.l, THRESHOLD=method.threshold,
        EXACT=method.decoded == "exact", NUM_WORDS=num_words, **mask_kind, num_warps=PARTS.value, **overlap(device),
    )  # fmt: skip
    splits = num_splits(device, batch * pairs, chunks, per_processor=6)
    acc = q.new_empty(batch, num_heads, splits + more, head_dim, dtype=torch.float32)
    stats = q.new_empty(batch, num_heads, splits + more, 2, dtype=torch.float32)
    _attend[(splits, pairs, batch)](
        q, k, v, rows.scales, center, since, log_weights, mask, length, listed, who, counts, acc, stats, scale, slots,
        chunks, splits, splits + more,
        q.stride(0), q.stride(1), q.stride(3), *k.stride()[:3], *v.stride()[:3], *rows.strides, *stride_m,
        **sizes, ROWS=padded_rows(heads), **rows.sizes, STEPS=log_weights.shape[0] - 1,
        PLACES=num_words * WORD, BLOCK_N=min(32, tile_tokens(k, stage_bytes=2**15)), **mask_kind, CAP=softcap,
        num_warps=4, num_stages=1, **overlap(device),
    )  # fmt: skip
    return Splits(stats, acc)

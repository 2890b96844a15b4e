"""Reference ops and Triton kernels against the oracle. The kernels are interpreted on a CPU and compiled on a GPU."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from attention import DEVICE, IMPLEMENTATIONS, SHARES, TOLERANCE, check_index, make_case, on_device
from tiers import sampled

from tidal_compile.kernels import ops, reference
from tidal_compile.kernels.call import POOLS, Call, Selection, arguments
from tidal_compile.kernels.methods import METHODS

HEADS = [(4, 4), (4, 2), (6, 2), (8, 2), (4, 1), (10, 2), (6, 1), (7, 1), (8, 1)]  # MHA, groups 2 to 8, MQA
CASES = {f"heads{hq}-{hkv}": {"heads": (hq, hkv)} for hq, hkv in HEADS}
CASES |= {f"dim{d}": {"head_dim": d} for d in (64, 80, 96, 128, 256)}
CASES |= {f"{str(dtype)[6:]}": {"dtype": dtype} for dtype in (torch.float16, torch.bfloat16)}
CASES |= {
    f"bf16-dim{d}-group{g}": {"dtype": torch.bfloat16, "head_dim": d, "heads": (2 * g, 2)}
    for d, g in ((80, 3), (128, 5))
}
CASES |= {f"length{n}": {"length": n} for n in (1, 23, 24, 25, 150)}  # budget 24
CASES |= {
    "padding": {"padding": 30, "batch": 3},
    "padding-fp16-mqa": {"padding": 41, "dtype": torch.float16, "heads": (3, 1)},
}
# Several tiles, splits and chunks, and one selection of more tokens than are read at once (2048)
SLOTS, LONG = (6500, 6100) if DEVICE == "cpu" else (9000, 8500)
CASES |= {"long": {"slots": SLOTS, "length": LONG, "heads": (2, 1), "batch": 1, "head_dim": 64}}
CASES |= {
    "added-mask": {"bias": True},
    "added-mask-padding-bf16": {"bias": True, "padding": 30, "dtype": torch.bfloat16},
    "added-mask-padding-fp16": {"bias": True, "padding": 30, "dtype": torch.float16},
    "softcap": {"softcap": 1.5},
    "softcap-padding-mqa": {"softcap": 0.7, "padding": 30, "heads": (3, 1)},
    "sink": {"sink": True},
    "sink-padding-bf16": {"sink": True, "padding": 30, "dtype": torch.bfloat16},
    "all-three": {"bias": True, "sink": True, "softcap": 2.0, "padding": 20, "heads": (6, 2)},
    "sink-nothing-live": {"sink": True, "length": 0},
}
CASES |= {"one-slot": {"slots": 1, "length": 1, "batch": 1}, "nothing-live": {"length": 0}}


def slack_of_turns(scores):
    """Turns are whole numbers: none may differ, unless scores of one head are so close that rounding swaps their ranks."""
    rows = scores.flatten(0, 1).sort(-1).values
    gaps = (rows[:, 1:] - rows[:, :-1])[rows[:, :-1] > -math.inf]
    return 0.0 if gaps.numel() == 0 or gaps.min() > 1e-6 else 1.0


INTERPRETED = (
    "heads4-2", "heads6-2", "heads7-1", "dim80", "bfloat16", "bf16-dim80-group3", "length1", "length24", "padding", "long",
    "added-mask-padding-bf16", "softcap-padding-mqa", "all-three", "sink-nothing-live", "one-slot", "nothing-live",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    sampled(
        [(name, case) for name in IMPLEMENTATIONS for case in CASES],
        [*(("reference", case) for case in CASES), *(("triton", case) for case in INTERPRETED)],
    ),
)
def test_ops_match_the_oracle(name, case):
    impl, (args, extra) = IMPLEMENTATIONS[name], make_case(**CASES[case])
    q, k, v, length, mask, scale = args
    sink, extra_here = extra["sink"], on_device(extra)
    close = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    scores, valid = oracle.scores_of(q, k, int(length), mask, scale, extra["softcap"])

    full = impl.full_attention(*on_device(args), **extra_here)
    dense = oracle.attend(scores, v, sink=sink)
    assert full.dtype == q.dtype and full.shape == q.shape
    torch.testing.assert_close(full.cpu().double(), dense, **close)

    budget, sinks, recent = 24, 3, 5
    settings = [("query_head", 0.0, "sum"), ("kv_head", 0.35, "sum"), ("layer", 0.3, "max")]
    if not case.startswith(("dim", "bf16", "float16")):  # what a selection sees are scores in float32
        settings += [("layer", 0.0, "sum"), ("kv_head", 0.0, "union")]
    for share, ratio, pool in settings:
        chosen = (budget, ratio, sinks, recent, share, pool)
        out, index = impl.select_attention(*on_device(args), *chosen, **extra_here)
        torch.testing.assert_close(out, full, rtol=0, atol=0)
        if pool != "sum":
            index = impl.choose_by_scores(*on_device(args), *chosen, **extra_here)
        sets = {"query_head": q.shape[1], "kv_head": k.shape[1], "layer": 1}[share]
        width = min(k.shape[2], max(budget, math.ceil(ratio * k.shape[2])))
        assert index.dtype == torch.int32 and index.shape == (q.shape[0], sets, width)
        importance = oracle.importance_of(scores, k.shape[1], share, sink, pool, sinks, recent)
        slack = 1e-5 if pool != "union" else slack_of_turns(scores)
        check_index(index, importance, valid, budget, ratio, sinks, recent, slack)

        sparse = impl.sparse_attention(*on_device((q, k, v)), index, *on_device((length, mask, scale)), **extra_here)
        rows = [[[p for p in row if p >= 0] for row in sets] for sets in index.tolist()]
        allowed = oracle.sets_as_mask(rows, q.shape[1], scores.shape[2])
        torch.testing.assert_close(sparse.cpu().double(), oracle.attend(scores, v, allowed, sink), **close)
        if int(length) <= budget:  # nothing left out: sparse is full
            torch.testing.assert_close(sparse.cpu().double(), dense, **close)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("share", SHARES)
def test_ties_go_to_the_lower_position(name, share):
    """All keys are equal, so all scores are: beside sinks and recent tokens, the first ones are chosen."""
    q = torch.ones(1, 4, 1, 64)
    k = torch.ones(1, 2, 200, 64)
    v = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    mask[..., 2:7] = False
    args = on_device((q, k, v, torch.tensor(180), mask, 0.125))
    _, index = IMPLEMENTATIONS[name].select_attention(*args, 12, 0.0, 3, 2, share)
    expected = [0, 1, 7, 8, 9, 10, 11, 12, 13, 14, 178, 179]
    assert index.tolist() == [[expected] * index.shape[1]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_signed_zeros_tie_and_negative_scores_rank(name):
    """Raw scores of one head: positive, zero of both signs, negative, in the order of the numbers."""
    k = torch.zeros(1, 1, 64, 64)
    k[0, 0, :, 0] = torch.tensor([-3.0, -0.0, 0.0, 2.0, -1.0, 1.0, -2.0, -0.0] + [-9.0] * 56)
    q = torch.zeros(1, 1, 1, 64)
    q[..., 0] = 1.0
    args = on_device((q, k, torch.randn(1, 1, 64, 64), torch.tensor(64), None, 1.0))
    for budget, expected in (
        (1, [3]),
        (3, [1, 3, 5]),
        (4, [1, 2, 3, 5]),
        (6, [1, 2, 3, 4, 5, 7]),
        (9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ):
        _, index = IMPLEMENTATIONS[name].select_attention(*args, budget, 0.0, 0, 0, "query_head")
        assert index[0, 0].tolist() == expected


SPREADS = [(0.0, 0), (0.0, 700), (1e-3, 0), (1.0, 700), (6.0, 0)]


@pytest.mark.parametrize(
    ("share", "spread", "padding"),
    sampled(
        [(share, *spread) for share in SHARES for spread in SPREADS],
        [*(("kv_head", *spread) for spread in SPREADS), ("query_head", 1e-3, 0), ("layer", 0.0, 0)],
    ),
)
def test_a_selection_is_exact_wherever_its_threshold_lies(share, spread, padding):
    """All scores equal, within a thousandth, over a few and over many octaves: few candidates or all, ties or none."""
    (q, k, v, length, mask, scale), _ = make_case(
        batch=2 if padding else 1, heads=(4, 2), slots=2600, length=2500, padding=padding, seed=round(spread)
    )
    q = q * spread
    scores, valid = oracle.scores_of(q, k, int(length), mask, scale)
    importance = oracle.importance_of(scores, 2, share)
    args = on_device((q, k, v, length, mask, scale))
    for budget, sinks, recent in ((1, 0, 0), (90, 4, 8), (2200, 4, 1048)):
        index = IMPLEMENTATIONS["triton"].select_attention(*args, budget, 0.0, sinks, recent, share)[1]
        check_index(index, importance, valid, budget, 0.0, sinks, recent, slack=1e-5)
        if spread == 0.0:
            expected = IMPLEMENTATIONS["reference"].select_attention(*args, budget, 0.0, sinks, recent, share)[1]
            assert torch.equal(index, expected)


def test_a_tile_counts_all_that_is_chosen_before_it():
    """More candidates than are read at once (2048), from tiles before the last one, which begins at 4096.

    One of 4150 tokens that tie is left out: the last. The row is wider, where one too many would show.
    """
    q, k, v = torch.ones(1, 1, 1, 16), torch.ones(1, 1, 4200, 16), torch.ones(1, 1, 4200, 16)
    args = on_device((q, k, v, torch.tensor(4150), None, 0.25))
    _, index = IMPLEMENTATIONS["triton"].select_attention(*args, 1, 0.9997, 0, 0, "layer")
    assert index[0, 0].tolist() == [*range(4149), *[-1] * 50]


# Two tiles a program that writes positions, and four: the interpreter would take minutes
@pytest.mark.slow
@pytest.mark.parametrize("batch", [8] if DEVICE == "cpu" else [8, 28])
def test_a_selection_of_many_sets(batch):
    (q, k, v, length, mask, scale), _ = make_case(batch=batch, heads=(8, 8), head_dim=16, slots=5000, length=4900)
    scores, valid = oracle.scores_of(q, k, int(length), mask, scale)
    args = on_device((q, k, v, length, mask, scale))
    index = IMPLEMENTATIONS["triton"].select_attention(*args, 300, 0.0, 4, 64, "kv_head")[1]
    check_index(index, oracle.importance_of(scores, 8, "kv_head"), valid, 300, 0.0, 4, 64, slack=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_index_may_name_dead_tokens(name):
    """Padding in the index, tokens beyond the length and masked ones count for nothing; an empty set gives zeros."""
    (q, k, v, length, mask, scale), _ = make_case(padding=30)
    index = torch.tensor(
        [[[5, 31, 60, 120, -1], [-1] * 5], [[0, 96, 97, 149, -1], [2, 3, -1, -1, -1]]], dtype=torch.int32
    )
    out = IMPLEMENTATIONS[name].sparse_attention(*on_device((q, k, v, index, length, mask, scale)))
    scores, _ = oracle.scores_of(q, k, int(length), mask, scale)
    allowed = oracle.sets_as_mask([[[31, 60], []], [[0, 96], [2, 3]]], 4, 97)
    torch.testing.assert_close(out.cpu().double(), oracle.attend(scores, v, allowed), atol=2e-6, rtol=2e-6)
    assert (out[0, 2:] == 0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_fully_masked_row_gives_zeros_and_an_empty_set(name):
    (q, k, v, length, _, scale), _ = make_case()
    mask = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    mask[0] = False
    out, index = IMPLEMENTATIONS[name].select_attention(
        *on_device((q, k, v, length, mask, scale)), 24, 0.0, 3, 5, "kv_head"
    )
    assert (out[0] == 0).all() and (index[0] == -1).all() and (index[1] >= 0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_inputs(name):
    """A query that is a transposed view, caches that are slices, one mask row for the whole batch."""
    (q, k, v, length, _, scale), _ = make_case(batch=3)
    mask = torch.ones(1, 1, 1, 150, dtype=torch.bool)
    mask[..., :11] = False
    args = on_device((q, k, v, length, mask, scale))
    expected = IMPLEMENTATIONS[name].select_attention(*args, 24, 0.0, 3, 5, "kv_head")
    q, k, v = args[:3]
    args[0] = q.transpose(1, 2).contiguous().transpose(1, 2)
    args[0] = torch.stack([args[0], args[0]], -1)[..., 0]
    args[1] = torch.cat([k, k], 1)[:, : k.shape[1]]
    args[2] = torch.cat([v, v], 3)[..., : v.shape[3]]
    out, index = IMPLEMENTATIONS[name].select_attention(*args, 24, 0.0, 3, 5, "kv_head")
    torch.testing.assert_close(out, expected[0])
    assert torch.equal(index, expected[1])
    for token_set in (index, index[:, :1], index.repeat_interleave(2, 1)):
        sparse = IMPLEMENTATIONS[name].sparse_attention(*args[:3], token_set, *args[3:])
        rows = token_set.tolist()
        scores, _ = oracle.scores_of(*[arg.cpu() for arg in (q, k)], int(length), mask, scale)
        expected_sparse = oracle.attend(scores, v.cpu(), oracle.sets_as_mask(rows, 4, 97))
        torch.testing.assert_close(sparse.cpu().double(), expected_sparse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("share", SHARES)
def test_a_single_head_ranks_by_scores_where_probabilities_underflow(name, share):
    k = torch.zeros(1, 1, 64, 64)
    k[0, 0, :, 0] = torch.arange(64) * 5.0  # the softmax of all but the last few is zero in float32
    q = torch.zeros(1, 1, 1, 64)
    q[..., 0] = 1.0
    args = on_device((q, k, torch.randn(1, 1, 64, 64), torch.tensor(64), None, 1.0))
    _, index = IMPLEMENTATIONS[name].select_attention(*args, 40, 0.0, 0, 0, share)
    assert index[0, 0].tolist() == list(range(24, 64))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("share", ["kv_head", "layer"])
def test_a_head_that_looks_at_its_sink_has_no_say(name, share):
    """Two heads of one group want other tokens; the first gives all but nothing of its attention to tokens."""
    k = torch.zeros(1, 1, 64, 64)
    k[0, 0, :8, 0], k[0, 0, 8:16, 1] = 9.0, 8.0
    q = torch.zeros(1, 2, 1, 64)
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 1.0, 1.0
    call = on_device((q, k, torch.randn(1, 1, 64, 64), torch.tensor(64), None, 1.0))
    for sink, expected in ((None, range(8)), (torch.tensor([30.0, 0.0]), range(8, 16))):
        sink = None if sink is None else sink.to(DEVICE)
        _, index = IMPLEMENTATIONS[name].select_attention(*call, 8, 0.0, 0, 0, share, sink=sink)
        assert index[0, 0].tolist() == list(expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_budget_beyond_the_cache_is_no_wider_than_the_cache(name):
    args = on_device(make_case()[0])
    _, index = IMPLEMENTATIONS[name].select_attention(*args, 2**31 - 1, 0.0, 3, 5, "kv_head")
    assert index.shape == (2, 2, 150) and (index[..., :97] == torch.arange(97, device=index.device)).all()


LINEAR = {
    "one": ([37], 64, False), "biased": ([64], 96, True), "joined": ([48, 16, 16], 200, False),
    "long-rows": ([5, 7], 5000, False), "joined-biased": ([8, 24], 4096, True),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, torch.float32), *((n, dtype) for n in (1, 3, 16) for dtype in (torch.bfloat16, torch.float16))],
)
@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_linear_layers_side_by_side(name, tokens, case, dtype):
    from tidal_compile.kernels.triton import linear

    rows, columns, biased = LINEAR[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 1, columns, generator=generator).to(dtype)
    weights = [(torch.randn(n, columns, generator=generator) / columns**0.5).to(dtype) for n in rows]
    biases = [torch.randn(n, generator=generator).to(dtype) for n in rows] if biased else []
    impl = reference.linear if name == "reference" else linear.linear
    out = impl(x.to(DEVICE), on_device(weights), on_device(biases), [])
    expected = torch.cat([x.double() @ weight.double().T for weight in weights], -1)
    expected += torch.cat(biases).double() if biased else 0.0
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_linear_layers_in_int8(name, tokens, case):
    """Beside products in float64 of what the numbers and the scales mean."""
    from tidal_compile.kernels.triton import linear

    rows, columns, biased = LINEAR[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 1, columns, generator=generator).bfloat16()
    weights = [torch.randint(-128, 128, (n, columns), generator=generator, dtype=torch.int8) for n in rows]
    scales = [torch.rand(n, 1, generator=generator) * 1e-3 for n in rows]
    biases = [torch.randn(n, generator=generator).bfloat16() for n in rows] if biased else []
    impl = reference.linear if name == "reference" else linear.linear
    given = x.to(DEVICE), on_device(weights), on_device(biases), on_device(scales)
    means = [weight.double() * scale.double() for weight, scale in zip(weights, scales, strict=True)]
    expected = torch.cat([x.double() @ mean.T for mean in means], -1) + (torch.cat(biases).double() if biased else 0.0)
    torch.testing.assert_close(impl(*given).cpu().double(), expected, atol=3e-2, rtol=1.6e-2)
    torch.library.opcheck(ops.linear, (*given, []))


def test_opcheck():
    """Schemas, fakes and autograd registration agree with what the ops do, on this machine's device.

    Each method meets each kind of call and each share, one of them at a time.
    """
    for turn, options in enumerate(({}, {"padding": 30}, {"bias": True, "sink": True, "softcap": 3.0})):
        args, extra = make_case(**options)
        q, k, v, *rest = on_device(args)
        call = Call(*(x.nan_to_num(0) for x in (q, k, v)), *rest, *on_device(extra).values())
        torch.library.opcheck(ops.full_attention, arguments(call))
        chosen = [arguments(Selection(24, 0.3, 3, 5, share, pool)) for share, pool in zip(SHARES, POOLS, strict=True)]
        for one in chosen:
            torch.library.opcheck(ops.select_attention, (*arguments(call), *one))
        for number, (name, kind) in enumerate(METHODS.items(), turn):
            of_method = (*chosen[number % 3], *arguments(kind()), *kind().summarize(call.key))
            torch.library.opcheck(ops.by_method[name], (*arguments(call), *of_method))
            if name in ops.weigh_by_method:  # kernels write no worth beyond the live length
                whole = replace(call, length=torch.full_like(call.length, call.key.shape[2]))
                torch.library.opcheck(ops.weigh_by_method[name], (*arguments(whole), *of_method, 0, 2))
        index = ops.select_attention(*arguments(call), *arguments(Selection(24)))[1]
        torch.library.opcheck(ops.sparse_attention, (*arguments(call), index))
    x, weights, biases = torch.ones(1, 8), [torch.ones(4, 8), torch.ones(6, 8)], [torch.ones(4), torch.ones(6)]
    torch.library.opcheck(ops.linear, (on_device([x])[0], on_device(weights), on_device(biases), [], []))


def test_bad_arguments_are_named():
    call, selection = Call(*on_device(make_case(padding=30)[0])), Selection(24, 0.0, 3, 5)
    q, k = call.query, call.key
    bad = [
        (ops.full_attention, arguments(replace(call, **changes)), message)
        for changes, message in (
            ({"query": q.repeat(1, 1, 17, 1)}, "query must be"),
            ({"value": call.value[..., :16]}, "key and value must be"),
            ({"query": q[:, :3]}, "3 query heads"),
            ({"key": k.half()}, "must share one of"),
            ({"length": call.length.int()}, "length must be"),
            ({"mask": call.mask.int()}, "mask must be bool or floating"),
            ({"sink_logit": torch.zeros(2, device=DEVICE)}, "sink_logit must be one number a query head"),
            ({"softcap": -1.0}, "softcap must be positive"),
            ({"mask": call.mask[..., :9]}, "mask must be bool"),
            ({"query": q.repeat(1, 1, 3, 1), "mask": call.mask.repeat(1, 1, 2, 1)}, "mask must be bool"),
        )
    ]
    bad += [
        (op, (*arguments(call), *arguments(replace(selection, **changes))), message)
        for op in (ops.select_attention, ops.by_method["scores"])
        for changes, message in (
            ({"share": "head"}, "share must be one of"),
            ({"pool": "mean"}, "pool must be one of sum, max, union"),
            ({"budget": 7}, "budget 7"),
            ({"ratio": 1.5}, "ratio"),
        )
    ]
    index = torch.zeros(2, 3, 4, dtype=torch.int32, device=DEVICE)
    bad.append((ops.sparse_attention, (*arguments(call), index), "index must be"))
    x, weight = torch.zeros(1, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    bad += [
        (ops.linear, (x.repeat(17, 1), [weight], [], [], []), "x must be 1 to 1 tokens"),
        (ops.linear, (x.half().repeat(17, 1), [weight.half()], [], [], []), "x must be 1 to 16 tokens"),
        (ops.linear, (x, [weight] * 4, [], [], []), "1 to 3 weights"),
        (ops.linear, (x, [weight, weight.T], [], [], []), "a weight must be contiguous"),
        (ops.linear, (x, [weight], [x[0]], [], []), "a bias must be contiguous"),
        (ops.linear, (x, [weight], [weight[:, :1].clone()], [], []), "a bias must be contiguous"),
        (ops.linear, (x, [weight], [], [x[0, :4]], []), "a weight must be contiguous torch.int8"),
        (ops.linear, (x, [weight.char()], [], [x[0]], []), "a scale must be contiguous"),
    ]
    for op, args, message in bad:
        with pytest.raises(ValueError, match=message):
            op(*args)

"""Several query tokens a step: each op against the oracle, token by token, and the policies of whole steps."""

import math

import oracle
import pytest
import torch
from attention import DEVICE, IMPLEMENTATIONS, TOLERANCE, check_index, make_case, on_device
from models import prefilled, random_tokens, small_model
from tiers import sampled
from torch._dynamo.utils import counters

from tidal_compile.kernels import ops
from tidal_compile.kernels.call import MOST_TOKENS, Call, Selection, arguments
from tidal_compile.kernels.methods.pages import Pages
from tidal_compile.prefill import positions

CASES = {
    "plain": (5, {}),
    "groups-of-3": (2, {"heads": (6, 2)}),
    "two-blocks": (16, {"heads": (7, 1), "batch": 1}),  # 9 tokens of a tile of 64 rows, and 7
    "mqa-bf16": (8, {"heads": (8, 1), "dtype": torch.bfloat16}),
    "dim80-fp16": (3, {"head_dim": 80, "dtype": torch.float16}),
    "padding": (4, {"padding": 30, "batch": 3}),
    "rows-of-a-mask": (4, {"padding": 20, "rows": True}),
    "added-rows-bf16": (3, {"bias": True, "padding": 20, "rows": True, "dtype": torch.bfloat16}),
    "softcap": (2, {"softcap": 1.5}),
    "sink": (4, {"sink": True, "heads": (4, 4)}),
    "all-three": (3, {"bias": True, "sink": True, "softcap": 2.0, "padding": 20, "heads": (6, 2)}),
    "long": (3, {"slots": 6500, "length": 6100, "heads": (2, 1), "batch": 1, "head_dim": 64}),
    "fewer-live-than-tokens": (4, {"length": 2}),
    "nothing-live": (2, {"length": 0, "sink": True}),
    "budget-at-the-last": (2, {"length": 25}),  # the first token sees 24, which are all kept
}


def several(tokens, rows=False, **options):
    """A case whose query has T tokens, and whose mask, with `rows`, is another one for each."""
    (q, k, v, length, mask, scale), extra = make_case(**options)
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(q.shape[0], q.shape[1], tokens, q.shape[3], generator=generator).to(q.dtype)
    if rows:
        mask = mask.repeat(1, 1, tokens, 1)
        hides = torch.rand(mask.shape, generator=generator) < 0.1
        mask = mask & ~hides if mask.dtype == torch.bool else mask.masked_fill(hides, torch.finfo(mask.dtype).min)
    return (q, k, v, length, mask, scale), extra


def of_token(args, number):
    """The call of one token by itself: what it sees is live, and nothing else."""
    q, k, v, length, mask, scale = args
    live = max(0, int(length) - q.shape[2] + 1 + number)
    own = mask if mask is None or mask.shape[2] == 1 else mask[:, :, number : number + 1]
    return q[:, :, number : number + 1], k, v, live, own, scale


@pytest.mark.parametrize(
    ("name", "case"),
    sampled(
        [(name, case) for name in IMPLEMENTATIONS for case in CASES],
        [*(("reference", case) for case in CASES)]
        + [("triton", case) for case in ("two-blocks", "rows-of-a-mask", "all-three", "fewer-live-than-tokens")],
    ),
)
def test_ops_match_the_oracle(name, case):
    tokens, options = CASES[case]
    impl, (args, extra) = IMPLEMENTATIONS[name], several(tokens, **options)
    q, k, v = args[:3]
    sink, extra_here = extra["sink"], on_device(extra)
    close = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    full = impl.full_attention(*on_device(args), **extra_here)
    assert full.dtype == q.dtype and full.shape == q.shape and full.is_contiguous()

    settings = [("query_head", 0.0, "sum"), ("kv_head", 0.35, "sum"), ("layer", 0.3, "max"), ("kv_head", 0.0, "union")]
    for turn, (share, ratio, pool) in enumerate(settings):
        if pool == "union" and q.dtype != torch.float32:
            continue
        chosen = (24, ratio, 3, 5, share, pool)
        out, index = impl.select_attention(*on_device(args), *chosen, **extra_here)
        torch.testing.assert_close(out, full, rtol=0, atol=0)
        if turn % 2:
            assert torch.equal(index, impl.choose_by_scores(*on_device(args), *chosen, **extra_here))
        sets = {"query_head": q.shape[1], "kv_head": k.shape[1], "layer": 1}[share]
        assert index.dtype == torch.int32
        assert index.shape == (q.shape[0], tokens, sets, min(k.shape[2], max(24, math.ceil(ratio * k.shape[2]))))
        sparse = impl.sparse_attention(*on_device(args[:3]), index, *on_device(args[3:]), **extra_here)
        for number in range(tokens):
            q_own, _, _, live, mask, scale = of_token(args, number)
            scores, valid = oracle.scores_of(q_own, k, live, mask, scale, extra["softcap"])
            if turn == 0:
                dense = oracle.attend(scores, v, sink=sink)
                torch.testing.assert_close(full[:, :, number].cpu().double(), dense[:, :, 0], **close)
            importance = oracle.importance_of(scores, k.shape[1], share, sink, pool, 3, 5)
            check_index(
                index[:, number], importance, valid, 24, ratio, 3, 5, 1e-5 if q.dtype == torch.float32 else 1e-3
            )
            rows = [[[p for p in row if p >= 0] for row in heads] for heads in index[:, number].tolist()]
            allowed = oracle.sets_as_mask(rows, q.shape[1], scores.shape[2])
            expected = oracle.attend(scores, v, allowed, sink)[:, :, 0]
            torch.testing.assert_close(sparse[:, :, number].cpu().double(), expected, **close)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_index_that_names_later_tokens(name):
    """Each query token leaves out those behind it, whatever its token set says."""
    args, _ = several(3)
    q, k, v, length, _, scale = args
    index = torch.tensor([4, 40, 94, 95, 96, -1], dtype=torch.int32).expand(2, 3, 2, 6).contiguous()
    out = IMPLEMENTATIONS[name].sparse_attention(*on_device((q, k, v, index, length, None, scale)))
    for number, sees in enumerate(([4, 40, 94], [4, 40, 94, 95], [4, 40, 94, 95, 96])):
        scores, _ = oracle.scores_of(q[:, :, number : number + 1], k, 97, None, scale)
        expected = oracle.attend(scores, v, oracle.sets_as_mask([[sees] * 2] * 2, 4, 97))
        torch.testing.assert_close(out[:, :, number].cpu().double(), expected[:, :, 0], atol=2e-6, rtol=2e-6)


def test_opcheck():
    """Schemas and fakes, strides with them, for several tokens; methods that take one token say so."""
    for options in ({}, {"padding": 30, "rows": True}):
        args, extra = several(3, **options)
        q, k, v, *rest = on_device(args)
        call = Call(*(x.nan_to_num(0) for x in (q, k, v)), *rest, *on_device(extra).values())
        selection = arguments(Selection(24, 0.3, 3, 5, "kv_head", "sum"))
        torch.library.opcheck(ops.full_attention, arguments(call))
        torch.library.opcheck(ops.select_attention, (*arguments(call), *selection))
        torch.library.opcheck(ops.by_method["scores"], (*arguments(call), *selection))
        index = ops.select_attention(*arguments(call), *selection)[1]
        torch.library.opcheck(ops.sparse_attention, (*arguments(call), index))
    with pytest.raises(ValueError, match="takes one query token"):
        ops.by_method["pages"](*arguments(call), *selection, 16, 0.0, *Pages().summarize(call.key))
    with pytest.raises(ValueError, match=f"T from 1 to {MOST_TOKENS}"):
        long = torch.zeros(1, 4, MOST_TOKENS + 1, 32, device=DEVICE)
        ops.full_attention(long, *arguments(call)[1:])
    with pytest.raises(ValueError, match="index must be"):
        ops.sparse_attention(*arguments(call), index[:, 0])


POLICIES = {
    "full": "full",
    "scores": {"num_layers": 3, "layers": {"0": "select", "1-2": "reuse"}, "defaults": {"budget": 20, "sinks": 2, "recent": 4}},
    "sparse-output": {
        "num_layers": 3, "layers": {"0": {"role": "select", "output": "sparse"}, "1": "reuse", "2": "full"},
        "defaults": {"budget": 20, "sinks": 2, "recent": 4},
    },
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_a_step_of_several_tokens_is_as_many_steps(name, padded):
    """What it returns and what it leaves in the cache, from one step to the next."""
    model, policy = small_model(num_hidden_layers=3), POLICIES[name]
    prompt, tokens = random_tokens(2, 50), random_tokens(2, 8, seed=3)
    mask = torch.ones(2, 96, dtype=torch.bool)
    mask[0, :7] = not padded
    caches = [prefilled(model, prompt, 96, mask[:, :50] if padded else None) for _ in range(2)]
    given = {"attention_mask": mask} if padded else {}
    step = torch.compile(model.forward, backend="tidal", fullgraph=True, dynamic=False, options={"policy": policy})
    one_by_one, at_once = [], []
    counters.clear()
    with torch.no_grad():
        for number in range(8):
            places = {"position_ids": positions(mask)[:, 50 + number : 51 + number].clone()}
            token = tokens[:, number : number + 1].clone()
            one_by_one.append(step(input_ids=token, past_key_values=caches[0], **given, **places).logits)
        for first in (0, 4):
            places = {"position_ids": positions(mask)[:, 50 + first : 54 + first].clone()}
            some = tokens[:, first : first + 4].clone()
            at_once.append(step(input_ids=some, past_key_values=caches[1], **given, **places).logits)
    assert counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(torch.cat(at_once, 1), torch.cat(one_by_one, 1), atol=1e-4, rtol=1e-4)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert int(one.cumulative_length) == int(other.cumulative_length) == 58
        torch.testing.assert_close(one.keys[:, :, 7:58], other.keys[:, :, 7:58], atol=1e-4, rtol=1e-4)


@pytest.mark.uncompiled
def test_methods_that_take_one_token_are_exact_for_several():
    model = small_model(num_hidden_layers=3)
    method = {"role": "select", "by": "pages", "page": 4}
    policy = {
        "num_layers": 3,
        "layers": {"0": method, "1-2": "reuse"},
        "defaults": {"budget": 8, "sinks": 1, "recent": 2},
    }
    prompt, tokens = random_tokens(1, 50), random_tokens(1, 3, seed=3)
    results = []
    for run in (
        model.forward,
        torch.compile(model.forward, backend="tidal", fullgraph=True, options={"policy": policy}),
    ):
        with torch.no_grad():
            results.append(run(input_ids=tokens, past_key_values=prefilled(model, prompt, 64)).logits)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.uncompiled
def test_a_number_of_tokens_means_the_same_whatever_came_before():
    """Dynamo takes the second number that it sees for any number; each still gets its own graph, by the policy."""
    model, results = small_model(num_hidden_layers=3), []
    for before in ((), (3,), (3, 20)):
        torch._dynamo.reset()
        step = torch.compile(model.forward, backend="tidal", fullgraph=True, options={"policy": POLICIES["scores"]})
        for number in (*before, 5):
            cache = prefilled(model, random_tokens(1, 50), 96)
            with torch.no_grad():
                logits = step(input_ids=random_tokens(1, number, seed=3), past_key_values=cache).logits
        results.append(logits)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=1e-4)

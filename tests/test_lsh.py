"""`by: lsh` against MagicPIG's definition in float64, its statistics over many hyperplanes, and whole models."""

import math
from dataclasses import replace

import oracle_lsh
import pytest
import torch
from attention import TOLERANCE, make_case, on_device
from lsh_statistics import check_against_baselines
from models import decode_logits, prefilled, random_tokens, tiny_model
from oracle import OracleModel, roles_of
from recorder import Recorder

import tidal_compile as tc
from tidal_compile.kernels.call import Call, Selection, arguments
from tidal_compile.kernels.methods.lsh import Lsh, normals
from tidal_compile.passes import state
from tidal_compile.replay import Block, make_context, replay
from tidal_compile.run import filled

CASES = {
    "no-mask": {},
    "padding-sink": {"padding": 20, "sink": True, "seed": 1},
    "all-three": {"bias": True, "softcap": 2.0, "padding": 11},
    "group7": {"heads": (14, 2)},
    "group17": {"heads": (17, 1), "head_dim": 16},
    "a-word": {"slots": 64, "length": 32},
    "last-slot": {"slots": 75, "length": 75},
    "several-programs": {"slots": 5000, "length": 4333, "padding": 70, "heads": (2, 1), "head_dim": 16},
    "all-static": {"length": 8},
    "a-token": {"length": 1},
    "nothing-live": {"length": 0},
    "bf16": {"dtype": torch.bfloat16, "heads": (10, 2), "head_dim": 80},
}
SIZES = [Lsh(4, 20), Lsh(3, 16, threshold=1, seed=3), Lsh(2, 10, threshold=3), Lsh(5, 40, threshold=4, epsilon=0.0)]
SELECTION = Selection(12, 0.0, 3, 5)


def as_call(case):
    args, extra = make_case(**CASES[case])
    return Call(*args, extra["sink"], extra["softcap"])


def expected(call, method, selection=SELECTION, **more):
    """The oracle's layer."""
    planes = torch.tensor(normals(method.l, method.k, call.key.shape[3], method.seed))
    sizes = (selection.sinks, selection.recent, method.threshold, method.epsilon)
    return oracle_lsh.layer(
        call.query, call.key, call.value, int(call.length), call.mask, planes, call.scale, *sizes,
        softcap=call.softcap, sink_logit=call.sink_logit, **more,
    )  # fmt: skip


def check(found, right, dtype):
    bound = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(found.cpu().double(), right, atol=bound, rtol=bound)


@pytest.mark.parametrize("case", CASES)
def test_the_definition_and_the_kernels_equal_the_oracle(case):
    """From the keys alone, with what is kept, at the first step and at the next one."""
    call = as_call(case)
    there = Call(*(on_device([one])[0] for one in arguments(call)))
    for number, method in enumerate(SIZES if case == "no-mask" else SIZES[:1]):
        selection = Selection(12, 0.0, 0, 0) if (case, number) == ("no-mask", 1) else SELECTION
        right = expected(call, method, selection)
        check(method.step(call, selection), right, call.query.dtype)
        by_definition, by_kernel = method.summarize(call.key), method.summarize(there.key)
        for _ in range(2):
            check(method.step(call, selection, *by_definition), right, call.query.dtype)
            check(method.step_on_gpu(there, selection, *by_kernel), right, call.query.dtype)
        same = zip(by_definition, by_kernel, strict=True)
        assert all(torch.allclose(one.float(), other.cpu().float(), atol=1e-2) for one, other in same)
        assert torch.equal(by_definition[2], by_kernel[2].cpu())


def test_decoded_tokens_are_hashed_as_they_come_or_kept():
    """Over several words; the mean stays that of the first step, and a slot that is written again gets other bits."""
    call, selection = as_call("padding-sink"), Selection(12, 0.0, 3, 1)
    for method in (Lsh(4, 20), Lsh(4, 20, decoded="exact")):
        kept = [method.summarize(on_device([call.key])[0]) for _ in range(2)]
        key = call.key.clone()
        key[:, :, 90:] = torch.randn(key[:, :, 90:].shape, generator=torch.Generator().manual_seed(7))
        for number, length in enumerate([126, 127, 126, 127, 128, 129]):
            key[:, :, length - 1] = torch.randn(2, 2, key.shape[3], generator=torch.Generator().manual_seed(number))
            mask = call.mask.clone()
            mask[..., 90:length] = True
            now = replace(call, key=key, value=key, length=torch.tensor(length), mask=mask)
            there = Call(*(on_device([one])[0] for one in arguments(now)))
            if number == 0:
                _, dynamic, _ = oracle_lsh.roles(length, mask, 2, key.shape[2], 3, 1)
                mean = torch.stack([key[b, :, dynamic[b]].double().mean(1) for b in range(2)])
            right = expected(now, method, selection, mean=mean, exact_from=125 if method.decoded == "exact" else None)
            check(method.step(there, selection, *kept[0]), right, torch.float32)
            check(method.step_on_gpu(there, selection, *kept[1]), right, torch.float32)
        assert torch.equal(kept[0][2], kept[1][2]) and kept[1][3].tolist() == kept[0][3].tolist() == [126, 129]


def test_who_is_sampled():
    """T0, T6: exactly those with equal codes in enough tables; hardly anybody where the mean is not taken off."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 700, 24, generator=generator) + 3.0 * torch.randn(24, generator=generator)
    query = torch.randn(1, 6, 1, 24, generator=generator) - 2.0 * keys.mean((0, 1, 2))
    call = Call(query, keys, keys, torch.tensor(700), None, 1.0)
    counts = []
    for method in (Lsh(4, 50), Lsh(8, 100), Lsh(6, 30, threshold=3), Lsh(1, 1, threshold=1)):
        planes, center, codes, *_ = kept = method.summarize(keys)
        method.update(call, Selection(1), *kept)
        found = method._sampled(call, planes, codes, 700)[0, :, :, 0].flatten(0, 1)
        for head in range(6):
            own = keys[0, head // 3], center[0, head // 3], planes, method.threshold
            right = oracle_lsh.sampled(query[0, head, 0], *own)
            unsure = oracle_lsh.doubtful(query[0, head, 0], *own, slack=1e-5)
            assert torch.equal(found[head] & ~unsure, right & ~unsure) and unsure.sum() < 5
        raw = oracle_lsh.sampled(query[0, 0, 0], keys[0, 0], torch.zeros(24), planes, method.threshold)
        counts.append((found[0].sum().item(), raw.sum().item()))
    assert counts[1][0] > 5 * max(1, counts[1][1]), counts


def test_how_often_a_token_is_sampled():
    """T1, T2: u is the share of seeds that sample a token, and sums with weights 1 / (u + epsilon) are what they promise."""
    generator = torch.Generator().manual_seed(1)
    keys, trials = torch.randn(1, 1, 400, 64, generator=generator), 500
    query = 2.0 * torch.randn(1, 1, 1, 64, generator=generator)
    call = Call(query, keys, keys, torch.tensor(400), None, 64**-0.5)
    method = Lsh(6, 20)
    cosines = oracle_lsh.cosines(query[0, 0, 0], keys[0, 0], keys[0, 0].mean(0))
    u = method.inclusion(cosines)
    torch.testing.assert_close(u, oracle_lsh.inclusion(cosines, 6, 20, 2), rtol=1e-8, atol=0.0)
    hits, total, epsilon = torch.zeros(400), [], 0.05
    weights = (keys[0, 0].double() @ query[0, 0, 0].double() * call.scale).exp()
    for seed in range(trials):
        kept = replace(method, seed=seed).summarize(keys)
        method.update(call, Selection(1), *kept)
        sampled = method._sampled(call, kept[0], kept[2], 400)[0, 0, 0, 0]
        hits += sampled
        total.append((weights / (u + epsilon))[sampled].sum())
    often = trials * u > 5
    z = (hits - trials * u)[often] / (trials * u * (1 - u))[often].sqrt()
    assert z.abs().max() < 4.5 and 0.85 < z.std() < 1.15
    total = torch.stack(total)
    right = (weights * u / (u + epsilon)).sum()
    assert abs(total.mean() - right) < 4 * total.std() / trials**0.5
    assert abs(weights.sum() - right) > 10 * total.std() / trials**0.5  # so the weights are felt


def test_what_sampling_is_good_for():
    """T9: with flat scores, and values that go with them, it beats the best tokens threefold at as many of them."""

    def estimate(corrected):
        def run(queries, keys, values, planes):
            method = Lsh(planes.shape[1], planes.shape[0])
            call = Call(
                queries[None, :, None],
                keys[None, None],
                values[None, None],
                torch.tensor(len(keys)),
                None,
                keys.shape[1] ** -0.5,
            )
            kept = method.summarize(call.key)
            kept[0].copy_(planes)
            method.update(call, Selection(1), *kept)
            sampled = method._sampled(call, planes, kept[2], len(keys))[0, 0, :, 0]
            if corrected:
                return method.attend(call, Selection(1), *kept)[0, :, 0], sampled.sum(1)
            scores = (queries @ keys.mT * call.scale).masked_fill(~sampled, -math.inf)
            return scores.softmax(-1).nan_to_num() @ values, sampled.sum(1)

        return run

    check_against_baselines(estimate(True), estimate(False), k=8, l=75, trials=3)


def test_more_tables_come_closer():
    """T4."""
    call = as_call("no-mask")
    dense = expected(call, Lsh(1, 1, threshold=1, epsilon=0.0), Selection(97, 0.0, 97))
    errors = []
    for tables in (10, 40, 160, 640):
        outputs = [Lsh(6, tables, seed=seed).step(call, Selection(1)) for seed in range(10)]
        errors.append(sum((one.double() - dense).norm().item() for one in outputs))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]


def test_extremes_are_finite():
    """T8: nobody collides; a query of zeros; keys along the query; all keys alike; huge scores; rows without a token."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 1, 90, 16, generator=generator)
    query = torch.randn(2, 2, 1, 16, generator=generator)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    mask[0] = False
    cases = {
        "nobody": (Lsh(16, 4, threshold=4), query, keys, None),
        "zeros": (Lsh(4, 20), torch.zeros_like(query), keys, None),
        "along": (Lsh(4, 20), query, query[:, :1] * torch.linspace(-2, 2, 90)[None, None, :, None], None),
        "against": (Lsh(4, 20, epsilon=0.0), query, torch.cat([keys[:, :, :1], keys[:, :, :1] - query[:, :1] * 1e-3] * 45, 2), None),
        "alike": (Lsh(4, 20), query, keys[:, :, :1].expand(-1, -1, 90, -1).contiguous(), None),
        "huge": (Lsh(4, 20), 1e4 * query, keys, None),
        "no-token": (Lsh(4, 20), query, keys, mask),
    }  # fmt: skip
    for name, (method, q, k, hides) in cases.items():
        call = Call(*on_device([q, k, k.clone(), torch.tensor(90), hides]), 0.25)
        for sizes in ((0, 0), (2, 3)) if name in ("nobody", "no-token") else ((0, 0),):
            selection = Selection(5, 0.0, *sizes)
            for run in (method.step, method.step_on_gpu):
                out = run(call, selection, *method.summarize(call.key)).cpu()
                assert out.isfinite().all(), (name, sizes)
                if name == "no-token":
                    assert (out[0] == 0).all() and (out[1] != 0).any()
                if name == "nobody":  # only static tokens are left
                    right = expected(
                        Call(*(one.cpu() if torch.is_tensor(one) else one for one in arguments(call))),
                        method,
                        selection,
                    )
                    check(out, right, torch.float32)


MODEL = tiny_model(num_hidden_layers=3)
LAYERS = {
    "alone": {"0": "full", "1": {"role": "select", "by": "lsh", "k": 4, "l": 20, "seed": 1}, "2": {"role": "select", "by": "lsh", "k": 3, "l": 20}},
    "mixed": {"0": {"role": "select", "budget": 20}, "1": {"role": "select", "by": "lsh", "k": 4, "l": 20, "decoded": "exact"}, "2": "reuse"},
}  # fmt: skip


def oracle_planes(settings, head_dim):
    return torch.tensor(normals(settings["l"], settings["k"], head_dim, settings.get("seed", 0)))


def policy_of(name):
    defaults = {"budget": 20, "sinks": 2, "recent": 3}
    return tc.Policy.from_dict({"num_layers": 3, "layers": LAYERS[name], "defaults": defaults})


@pytest.mark.uncompiled
@pytest.mark.shares_traces
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_whole_models_equal_the_oracle_and_their_replay(name, padded):
    policy, prompt, tokens = policy_of(name), random_tokens(2, 60), random_tokens(2, 9, seed=2)
    mask, masks = None, None
    if padded:
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[0, :23] = 0
        wide = torch.cat([mask, torch.ones(2, 36, dtype=torch.long)], 1).bool()
        masks = [(wide & (torch.arange(96) <= 60 + i))[:, None, None] for i in range(9)]
    step = torch.compile(MODEL, backend=Recorder(policy=policy), fullgraph=True, dynamic=False)
    got = decode_logits(step, prefilled(MODEL, prompt, 96, mask), tokens, masks)
    right = OracleModel(MODEL, roles_of(policy), oracle_planes).logits(prompt, tokens, mask)
    torch.testing.assert_close(got, right, atol=2e-4, rtol=2e-4)
    dense = decode_logits(MODEL, prefilled(MODEL, prompt, 96, mask), tokens, masks)
    assert (got - dense).abs().max() > 1e-2
    if not padded:
        blocks = [Block("text", tokens[:1]), Block("text", random_tokens(1, 7, seed=3))]
        rows = replay(MODEL, make_context(MODEL, filled(MODEL, prompt[:1], 96), 60, blocks), policy.roles)
        torch.testing.assert_close(rows[0], right[0].float(), atol=2e-4, rtol=2e-4)


@pytest.mark.uncompiled
@pytest.mark.shares_traces
def test_what_is_kept_follows_the_cache():
    """A cache that is filled again, as long and longer; two in turn; a counter set back; a batch that is reordered."""
    policy, tokens = policy_of("alone"), random_tokens(2, 5, seed=2)
    step = torch.compile(MODEL, backend=Recorder(policy=policy), fullgraph=True, dynamic=False)

    def right(prompt, tokens):
        return OracleModel(MODEL, roles_of(policy), oracle_planes).logits(prompt, tokens)

    def same(found, expected):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)

    prompts = [random_tokens(2, 50, seed=seed) for seed in (3, 4)]
    caches = [prefilled(MODEL, prompt, 96) for prompt in prompts]
    for part in (slice(0, 2), slice(2, 5)):
        for cache, prompt in zip(caches, prompts, strict=True):
            same(decode_logits(step, cache, tokens[:, part]), right(prompt, tokens[:, : part.stop])[:, part])
    for length in (50, 63):
        caches[0].reset()
        prompt = random_tokens(2, length, seed=length)
        with torch.no_grad():
            MODEL(input_ids=prompt, past_key_values=caches[0])
        same(decode_logits(step, caches[0], tokens), right(prompt, tokens))
    for layer in caches[0].layers:
        layer.cumulative_length.fill_(63)
    other = random_tokens(2, 3, seed=9)
    same(decode_logits(step, caches[0], other), right(prompt, other))
    order = torch.tensor([1, 1])
    caches[0].reorder_cache(order)
    reordered = decode_logits(step, caches[0], tokens[:, :2])
    for layer in caches[0].layers:
        layer.cumulative_length.fill_(66)
        state._kept.pop(layer.keys, None)
    same(decode_logits(step, caches[0], tokens[:, :2]), reordered)


def test_policies():
    explained = tc.explain(MODEL, policy_of("mixed"))
    assert explained.rows[1].by.startswith("lsh, k 4, l 20") and explained.rows[2].source == 0
    assert explained.rows[1].kept_bytes > 0
    wrong = {
        "what by: lsh attends to can't be reused": {"0": {"role": "select", "by": "lsh"}, "1": "reuse"},
        "budget: by: lsh attends by itself and has no budget; its own keys are k, l": {"0": {"role": "select", "by": "lsh", "budget": 90}, "1": "full"},
        "k must be 1 to 16; found 17": {"0": {"role": "select", "by": "lsh", "k": 17}, "1": "full"},
        "threshold must be 1 to 4; found 5": {"0": {"role": "select", "by": "lsh", "threshold": 5}, "1": "full"},
        "decoded must be sampled or exact; found no": {"0": {"role": "select", "by": "lsh", "decoded": "no"}, "1": "full"},
        "output: by: lsh returns sparse": {"0": {"role": "select", "by": "lsh", "output": "full"}, "1": "full"},
    }  # fmt: skip
    for message, layers in wrong.items():
        with pytest.raises(tc.PolicyError, match=message):
            tc.Policy.from_dict({"num_layers": 2, "layers": layers})
    for name, sizes in (("magicpig", (10, 150)), ("magicpig_9_120", (9, 120)), ("magicpig_8_75", (8, 75))):
        roles = tc.Policy.preset(name, 32).roles
        assert [role.layer for role in roles if role.role == "full"] == [0, 16]
        assert {(role.method.k, role.method.l) for role in roles if role.role == "select"} == {sizes}
        assert len({role.method.seed for role in roles if role.role == "select"}) == 30
    assert 0.014 < Lsh().tokens_kept(Selection(1), 100_000) / 100_000 < 0.018  # the note's 1.6%
    assert 0.04 < Lsh(8, 75).tokens_kept(Selection(1), 100_000) / 100_000 < 0.055


def test_a_counter_that_is_set_forth_without_a_write():
    """Keys that were live at no step before have no bits yet; a counter that is set back makes decoded tokens prompt."""
    generator = torch.Generator().manual_seed(0)
    key, query = torch.randn(1, 1, 400, 16, generator=generator), torch.randn(1, 2, 1, 16, generator=generator)
    method, selection = Lsh(4, 20), Selection(5, 0.0, 2, 3)
    kept = [method.summarize(on_device([key])[0]) for _ in range(2)]
    for length, since in ((100, 100), (101, 100), (400, 100), (60, 60), (61, 60), (300, 60)):
        call = Call(*on_device([query, key, key, torch.tensor(length), None]), 0.25)
        outputs = [method.step(call, selection, *kept[0]), method.step_on_gpu(call, selection, *kept[1])]
        right = expected(
            Call(query, key, key, torch.tensor(length), None, 0.25), method, selection, mean=kept[0][1].cpu()
        )
        for out in outputs:
            check(out, right, torch.float32)
        assert kept[0][3].tolist() == kept[1][3].tolist() == [since, length]

"""A KV cache in float8: what it stores, every op that reads it against the oracle, and whole models over it."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from attention import DEVICE, HEAD_DIM, TOLERANCE, check_index, make_case, on_device
from families import FAMILIES
from models import decode_logits, family_model, prefilled, random_tokens, tiny_model
from recorder import Recorder
from tiers import sampled

import tidal_compile as tc
from tidal_compile.bench.decode import reference_backend
from tidal_compile.cache import Fp8Cache, as_float8, new_cache
from tidal_compile.cli.common import CacheKind
from tidal_compile.kernels import reference
from tidal_compile.kernels.call import Call, Selection
from tidal_compile.kernels.methods.lsh import Lsh
from tidal_compile.kernels.methods.pages import Pages
from tidal_compile.models import with_cache
from tidal_compile.policy import Policy
from tidal_compile.replay import replay_text
from tidal_compile.run import decode_given, filled, rewind
from tidal_compile.variant import Variant

pytestmark = pytest.mark.uncompiled

SPARSE = {
    "num_layers": 4, "layers": {"0": "full", "1": "select", "2-3": "reuse"},
    "defaults": {"budget": 24, "sinks": 2, "recent": 4},
}  # fmt: skip


def number_of(byte):
    """What a byte means in e4m3, by its definition: sign, 4 bits of exponent with a bias of 7, 3 bits of fraction."""
    sign, exponent, fraction = (-1 if byte >> 7 else 1), byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2 ** (exponent - 7))


NUMBERS = torch.tensor([number_of(byte) for byte in range(256)], dtype=torch.float64)


def meant(rows, scales):
    """The numbers of bytes `[..., D]` in float64, by the table; `scales [...]`."""
    return NUMBERS[rows.long()] * scales.double()[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_the_nearest_number(dtype):
    """Of those that float8 has times the scale; the largest of a row is 448 times its scale, and zeros stay zeros."""
    rows = (
        torch.randn(7, 5, 32, generator=torch.Generator().manual_seed(0)) * 10 ** torch.arange(-3.0, 4)[:, None, None]
    ).to(dtype)
    rows[2, 3] = 0.0
    found, scales = as_float8(rows)
    assert found.dtype == torch.uint8 and scales.dtype == torch.bfloat16 and scales.shape == (7, 5)
    values = meant(found, scales)
    finite = NUMBERS[~NUMBERS.isnan()] * scales.double()[..., None, None]
    nearest = (finite - rows.double()[..., None]).abs().amin(-1)
    assert ((values - rows.double()).abs() <= nearest * (1 + 1e-5)).all()
    largest = NUMBERS[found.long()].abs().amax(-1)
    assert (largest[rows.abs().amax(-1) > 0] >= 416).all() and (values[2, 3] == 0).all()


def fp8_case(**settings):
    """A case of `attention.make_case` over a cache in float8, whose garbage is NaN in the bytes and in the scales.

    Also the keys and values that it holds, in float64.
    """
    (q, k, v, length, mask, scale), extra = make_case(**settings)
    if mask is not None and mask.dtype == torch.bool:  # hidden tokens behind others, as of a draft that did not hold
        mask[..., 40:45] = False
        k[:, :, 40:45] = math.nan
    (keys, key_scales), (values, value_scales) = as_float8(k), as_float8(v)
    garbage = ~(k.isfinite().all(-1) & v.isfinite().all(-1) & (k.abs() < 1e4).all(-1))
    for rows, scales in ((keys, key_scales), (values, value_scales)):
        rows[garbage] = 0x7F
        scales[garbage] = math.nan
    scales = torch.stack([key_scales, value_scales], -1)
    call = Call(*on_device((q, keys, values, length, mask, scale, extra["sink"], extra["softcap"], scales)))
    held = [
        meant(rows, of).masked_fill(garbage[..., None], math.nan)
        for rows, of in ((keys, key_scales), (values, value_scales))
    ]
    return call, held, (q, int(length), mask, scale), extra


CASES = {
    "plain": {},
    "groups-of-3": {"heads": (6, 2), "dtype": torch.bfloat16},
    "dim80": {"head_dim": 80},
    "padding": {"padding": 30, "batch": 3},
    "all-three": {"bias": True, "sink": True, "softcap": 2.0, "padding": 20, "heads": (6, 2)},
    "all-three-fp16": {"bias": True, "sink": True, "padding": 20, "dtype": torch.float16},
    "nothing-live": {"length": 0},
    "one-slot": {"slots": 1, "length": 1, "batch": 1},
    "long": {"slots": 3000, "length": 2900, "heads": (2, 1), "batch": 1, "head_dim": 64, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize(
    ("name", "case"),
    sampled(
        [(name, case) for name in ("reference", "triton") for case in CASES],
        [
            *(("reference", case) for case in CASES),
            *(("triton", one) for one in ("plain", "groups-of-3", "padding", "all-three")),
        ],
    ),
)
def test_ops_match_the_oracle(name, case):
    """Attention to everything, a selection and attention to it, over what the bytes and scales mean."""
    from tidal_compile.kernels.triton import dense, select, sparse  # after conftest has chosen how kernels run

    impl = {
        "reference": (reference.full_attention, reference.select_attention, reference.choose_by_scores, reference.sparse_attention),
        "triton": (dense.full_attention, select.select_attention, select.choose_by_scores, sparse.sparse_attention),
    }[name]  # fmt: skip
    call, (keys, values), (q, length, mask, scale), extra = fp8_case(**CASES[case])
    close = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    scores, valid = oracle.scores_of(q, keys, length, mask, scale, extra["softcap"])
    expected = oracle.attend(scores, values, sink=extra["sink"])
    full = impl[0](call)
    assert full.dtype == q.dtype
    torch.testing.assert_close(full.cpu().double(), expected, **close)
    for share, pool in (("query_head", "sum"), ("kv_head", "sum"), ("layer", "max")):
        selection = Selection(24, 0.0, 3, 5, share, pool)
        out, index = impl[1](call, selection)
        torch.testing.assert_close(out, full, rtol=0, atol=0)
        importance = oracle.importance_of(scores, keys.shape[1], share, extra["sink"], pool, 3, 5)
        check_index(index, importance, valid, 24, 0.0, 3, 5, 1e-5 if q.dtype == torch.float32 else 2e-3)
        check_index(
            impl[2](call, selection), importance, valid, 24, 0.0, 3, 5, 1e-5 if q.dtype == torch.float32 else 2e-3
        )
        sparse = impl[3](call, index)
        rows = [[[p for p in row if p >= 0] for row in sets] for sets in index.tolist()]
        allowed = oracle.sets_as_mask(rows, q.shape[1], scores.shape[2])
        torch.testing.assert_close(
            sparse.cpu().double(), oracle.attend(scores, values, allowed, extra["sink"]), **close
        )


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_several_query_tokens(name):
    """Each sees what one token would see: the ops of T = 3 beside three calls of T = 1."""
    from tidal_compile.kernels.triton import dense, sparse

    full, attend = (
        (reference.full_attention, reference.sparse_attention)
        if name == "reference"
        else (dense.full_attention, sparse.sparse_attention)
    )
    call, *_ = fp8_case(length=90)
    query = torch.randn(2, 4, 3, HEAD_DIM, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    several = replace(call, query=query)
    index = torch.arange(0, 88, 4, dtype=torch.int32, device=DEVICE).expand(2, 2, -1).contiguous()
    both = full(several), attend(several, index[:, None].expand(-1, 3, -1, -1).contiguous())
    for token in range(3):
        one = replace(call, query=query[:, :, token : token + 1], length=call.length - 2 + token)
        for got, alone in zip(both, (full(one), attend(one, index)), strict=True):
            torch.testing.assert_close(got[:, :, token : token + 1], alone, atol=2e-6, rtol=2e-6)


def fp8_prefilled(model, ids, slots, mask=None):
    cache = Fp8Cache(model.config, slots)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, **with_cache(model, cache))
    return cache


PLAIN = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "phi", "mixtral", "granite")


@pytest.mark.parametrize(
    "family", sampled(sorted(set(FAMILIES) - {"deepseek_v3"}), [name for name in PLAIN if name in FAMILIES])
)
@torch.no_grad()
def test_families(family):
    """A step that reads the bytes says what the eager model says, whose cache hands it numbers; windows stay as they are."""
    model = family_model(family, 4, **({} if family != "gemma2" else {"attn_implementation": "eager"}))
    prompt, tokens = random_tokens(2, 60), random_tokens(2, 4, seed=1)
    caches = [fp8_prefilled(model, prompt, 80) for _ in range(2)]
    expected = decode_logits(model, caches[0], tokens)
    recorder = Recorder(policy="full")
    step = torch.compile(model, backend=recorder, fullgraph=True, dynamic=False)
    torch.testing.assert_close(decode_logits(step, caches[1], tokens), expected, atol=1e-4, rtol=1e-4)
    with_keys = [layer for layer in caches[0].layers if hasattr(layer, "keys")]
    assert recorder.after[-1].get("full_attention.default", 0) == sum(not layer.is_sliding for layer in with_keys)
    for layer in with_keys:
        assert layer.keys.dtype == (torch.float32 if layer.is_sliding else torch.uint8)


@torch.no_grad()
def test_padding_and_token_sets():
    """A batch with padding under a policy, beside replayed steps, which attend to numbers; one graph for all tokens."""
    model = tiny_model(num_hidden_layers=4)
    ids, tokens = random_tokens(1, 90), random_tokens(1, 6, seed=3)
    policy = Policy.from_dict(SPARSE)
    cache = filled(model, ids, 128, kind="fp8")
    stepped = torch.cat(list(decode_given(model, Variant("sparse", policy), cache, tokens)))
    again = filled(model, ids, 128, kind="fp8")
    replayed = torch.cat(list(replay_text(model, again, 90, tokens, policy.roles)))
    torch.testing.assert_close(stepped, replayed, atol=1e-4, rtol=1e-4)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    rows = random_tokens(2, 40)
    own = Fp8Cache(model.config, 64)
    expected = model.generate(
        rows, attention_mask=mask, past_key_values=own, max_new_tokens=8, do_sample=False, disable_compile=True
    )
    got = tc.generate(
        model,
        rows,
        "full",
        attention_mask=mask,
        past_key_values=Fp8Cache(model.config, 64),
        max_new_tokens=8,
        do_sample=False,
    )
    assert got.tolist() == expected.tolist()


@torch.no_grad()
def test_a_prompt_in_chunks_is_a_prompt():
    """Bytes and scales do not depend on how a prompt is read, but for rounding; both hold half of the bytes."""
    model = tiny_model(num_hidden_layers=2, head_dim=64)
    ids = random_tokens(1, 60)
    whole, parts = fp8_prefilled(model, ids, 64), Fp8Cache(model.config, 64)
    for part in ids.split(25, 1):
        model(input_ids=part, **with_cache(model, parts))
    for one, other in zip(whole.layers, parts.layers, strict=True):
        same = (one.keys == other.keys).float().mean(), (one.values == other.values).float().mean()
        assert min(same) > 0.99
    layer, plain = whole.layers[0], prefilled(model, ids, 64).layers[0]
    size = sum(tensor.nbytes for tensor in (layer.keys, layer.values, layer.scales))
    in_16_bits = (plain.keys.numel() + plain.values.numel()) * 2
    assert size == in_16_bits * (64 + 2) // (64 * 2)


@torch.no_grad()
def test_rows_are_reordered_with_their_scales():
    model = tiny_model(num_hidden_layers=2)
    cache = fp8_prefilled(model, random_tokens(2, 30), 40)
    before = [layer.scales.clone() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 0]))
    for layer, scales in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.scales, scales[[1, 0]])


@torch.no_grad()
def test_a_cache_that_was_reset_is_as_new():
    """Whatever stood in it: zero times a scale that is no number would be none."""
    model = tiny_model(num_hidden_layers=2)
    cache = fp8_prefilled(model, random_tokens(1, 30), 40)
    for layer in cache.layers:
        layer.scales.fill_(math.inf)
    cache.reset()
    tokens = random_tokens(1, 3)
    torch.testing.assert_close(
        decode_logits(model, cache, tokens), decode_logits(model, Fp8Cache(model.config, 40), tokens)
    )


@pytest.mark.compiled
@torch.no_grad()
def test_inductor_compiles_one_graph():
    """Through Inductor a step differs by what is rounded to another byte only; no token makes it compile anew."""
    model = tiny_model(num_hidden_layers=4)
    prompt, tokens = random_tokens(2, 90), random_tokens(2, 5, seed=3)
    plain = torch.compile(model, backend=reference_backend(Policy.from_dict(SPARSE)), fullgraph=True)
    expected = decode_logits(plain, fp8_prefilled(model, prompt, 128), tokens)
    torch._dynamo.reset()
    step = torch.compile(model, backend="tidal", fullgraph=True, dynamic=False, options={"policy": SPARSE})
    cache = fp8_prefilled(model, prompt, 128)
    got = [decode_logits(step, cache, tokens[:, :1])]
    with torch.compiler.set_stance("fail_on_recompile"):
        got.append(decode_logits(step, cache, tokens[:, 1:]))
    got = torch.cat(got, 1)
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["definition", "triton"])
@pytest.mark.parametrize(
    ("case", "page", "keep", "share"),
    [
        ("plain", 16, 0.0, "kv_head"),
        ("padding", 8, 2.0, "kv_head"),
        ("all-three", 4, 2.0, "layer"),
        ("one-slot", 4, 0, "layer"),
    ],
)
def test_pages_by_bounds_of_what_the_bytes_mean(name, case, page, keep, share):
    """The token sets of a cache of numbers, of which the oracle's tests say what they are."""
    call, (keys, values), *_ = fp8_case(**CASES[case])
    selection, method = Selection(24, 0.0, 3, 5, share), Pages(page, keep)
    numbers = [one.nan_to_num().to(call.query.dtype).to(DEVICE) for one in (keys, values)]
    plain = replace(call, key=numbers[0], value=numbers[1], scales=None)
    expected = method.step(plain, selection, *method.summarize(plain.key))
    kept = method.summarize(reference.dequantised(call.key, call.scales[..., 0]).nan_to_num().to(call.query.dtype))
    run = method.step if name == "definition" else method.step_on_gpu
    assert torch.equal(run(call, selection, *kept), expected)
    assert torch.equal(method.step(call, selection), expected)


@torch.no_grad()
def test_pages_follow_what_is_written():
    """Steps under a policy by pages, beside the same steps by scores of everything: the budget is above the context."""
    model = tiny_model(num_hidden_layers=4)
    layers = {"0-3": {"role": "select", "by": "pages", "output": "sparse", "page": 8}}
    policy = {"num_layers": 4, "layers": layers, "defaults": {"budget": 128, "sinks": 2, "recent": 4}}
    prompt, tokens = random_tokens(2, 90), random_tokens(2, 6, seed=3)
    expected = decode_logits(model, fp8_prefilled(model, prompt, 128), tokens)
    step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy})
    cache = fp8_prefilled(model, prompt, 128)
    torch.testing.assert_close(decode_logits(step, cache, tokens), expected, atol=1e-4, rtol=1e-4)
    sparse = {**policy, "defaults": {**policy["defaults"], "budget": 24}}
    found = []
    for _ in range(2):  # the second time from a cache that somebody set back
        step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": sparse})
        rewind(cache, 90)
        found.append(decode_logits(step, cache, tokens))
    fresh = decode_logits(step, fp8_prefilled(model, prompt, 128), tokens)
    torch.testing.assert_close(found[1], fresh, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0], fresh, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["definition", "triton"])
@pytest.mark.parametrize("case", ["plain", "padding", "all-three", "dim80", "one-slot"])
def test_samples_of_what_the_bytes_mean(name, case):
    """Beside a cache of numbers, of which the tests of `by: lsh` say what is sampled; two steps, as the first hashes."""
    call, (keys, values), *_ = fp8_case(**CASES[case])
    selection, method = Selection(24, 0.0, 3, 5), Lsh(3, 20)
    numbers = [one.nan_to_num().to(call.query.dtype).to(DEVICE) for one in (keys, values)]
    plain = replace(call, key=numbers[0], value=numbers[1], scales=None)
    kept = [method.summarize(plain.key) for _ in range(2)]
    run = method.step if name == "definition" else method.step_on_gpu
    length = int(call.length)
    for live in (length - 1, length):
        shorter = [replace(one, length=torch.tensor(max(1, live), device=DEVICE)) for one in (plain, call)]
        expected = method.step(shorter[0], selection, *kept[0])
        torch.testing.assert_close(run(shorter[1], selection, *kept[1]), expected, atol=1e-5, rtol=1e-5)


def test_a_host_that_attends_is_refused():
    model = tiny_model(num_hidden_layers=4)
    role = {"role": "select", "by": "lsh", "output": "sparse", "place": "cpu", "decoded": "exact"}
    policy = {"num_layers": 4, "layers": {"0-3": role}, "defaults": {"budget": 24, "sinks": 2, "recent": 4}}
    step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy})
    with pytest.raises(tc.UnsupportedModelError, match="place: cpu reads no cache in float8; use a HostCache"):
        decode_logits(step, fp8_prefilled(model, random_tokens(1, 30), 40), random_tokens(1, 1))


def test_kinds_of_caches():
    """The command line names those that `new_cache` makes."""
    config = tiny_model(num_hidden_layers=2).config
    assert isinstance(new_cache(config, 8, CacheKind.fp8.value), Fp8Cache)
    assert not isinstance(new_cache(config, 8, CacheKind.auto.value), Fp8Cache)
    with pytest.raises(tc.TidalError, match="cache must be one of auto, fp8; found 'int4'"):
        new_cache(config, 8, "int4")

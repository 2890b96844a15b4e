"""MagicPIG's half on the host, by the definition of its paper in float64."""

import ctypes
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import numpy
import pytest
import torch

from tidal_compile.kernels import host

SMALLEST = float(numpy.finfo(numpy.float32).tiny)


@pytest.fixture(scope="module", autouse=True)
def _built():
    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"to compile it takes {program}")
    host.library()


def oracle_u(t, tables, tau):
    """P[Binomial(tables, t) >= tau], term by term: no term is negative, so none cancels."""
    return sum(math.comb(tables, j) * t**j * (1 - t) ** (tables - j) for j in range(tau, tables + 1))


def oracle_hits(case, span=None):
    """[B, Hq, S]: in how many tables a token that is indexed, and of interest, has the query's code."""
    hits = numpy.zeros((case.batch, case.heads, case.slots), int)
    for b, h in numpy.ndindex(case.batch, case.heads):
        codes = case.codes[b, h // case.group].numpy()
        hits[b, h] = (codes == case.query_codes[b, h].numpy()).sum(-1)
        first, last = (case.first[b], case.last[b]) if span is None else span[b].tolist()
        hits[b, h, :first] = hits[b, h, max(first, last) :] = 0
    return hits


def oracle(case, scale, softcap=0.0, tau=2, epsilon=1e-4, valid=None, bias=None, span=None):
    """The definition: out [B, Hq, D] and lse [B, Hq]."""
    query, keys, values, mean = (x.double().numpy() for x in (case.query, case.keys, case.values, case.mean))
    out = numpy.zeros((case.batch, case.heads, query.shape[-1]))
    lse = numpy.full((case.batch, case.heads), -math.inf)
    hits = oracle_hits(case, span)
    for b, h in numpy.ndindex(case.batch, case.heads):
        found = hits[b, h] >= tau
        if valid is not None:
            found &= valid[b].numpy().astype(bool)
        if not found.any():
            continue
        q, mu, k = query[b, h], mean[b, h // case.group], keys[b, h // case.group][found]
        norms = numpy.linalg.norm(q) * numpy.linalg.norm(k - mu, axis=-1)
        cosine = numpy.divide(k @ q - mu @ q, norms, out=numpy.zeros(len(k)), where=norms > 0).clip(-1, 1)
        u = oracle_u((1 - numpy.arccos(cosine) / math.pi) ** case.store.bits, case.store.tables, tau)
        score = k @ q * scale
        if softcap:
            score = softcap * numpy.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b].double().numpy()[found]
        logit = score - numpy.log(numpy.maximum(u + epsilon, SMALLEST))
        weight = numpy.exp(logit - logit.max())
        lse[b, h] = logit.max() + math.log(weight.sum())
        out[b, h] = weight @ values[b, h // case.group][found] / weight.sum()
    return torch.from_numpy(out), torch.from_numpy(lse)


def make_case(
    slots=501, bits=4, tables=20, batch=2, kv_heads=2, group=2, dim=64, first=None, last=None, dtype=torch.float32,
    query_dtype=torch.float32, seed=0,
):  # fmt: skip
    """Keys about a mean that is far from 0, hashed as MagicPIG does; each query is near some of them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    mean = 2 * normal(batch, kv_heads, dim)
    keys = (normal(batch, kv_heads, slots, dim) + mean[:, :, None]).to(dtype)
    values = normal(batch, kv_heads, slots, dim).to(dtype)
    near = (keys.float() - mean[:, :, None])[:, :, slots // 5 :: max(slots // 2, 1)].mean(2)
    query = (near.repeat_interleave(group, 1) + 0.2 * normal(batch, kv_heads * group, dim)).to(query_dtype)
    planes, powers = normal(dim, tables, bits), 2 ** torch.arange(bits)

    def hashed(x):
        return ((torch.einsum("...d,dlk->...lk", x, planes) > 0) * powers).sum(-1).to(torch.int16)

    codes, query_codes = hashed(keys.float() - mean[:, :, None]), hashed(query.float())
    store = host.make_store(keys, values, bits, tables)
    case = SimpleNamespace(
        batch=batch, heads=kv_heads * group, group=group, slots=slots, store=store, keys=keys, values=values, mean=mean,
        query=query, codes=codes, query_codes=query_codes, scale=dim**-0.5,
    )  # fmt: skip
    refill(case, first or [0] * batch, last or [slots] * batch)
    return case


def refill(case, first, last):
    case.first, case.last = first, last
    host.fill(case.store, case.codes.contiguous(), first, last, threads=2)


def run(case, scale=None, valid=None, threads=2, **options):
    out, lse = torch.full(case.query.shape, 7.0), torch.full(case.query.shape[:2], 7.0)
    host.attend(
        case.store, case.query, case.query_codes, case.mean, valid, out, lse, scale or case.scale, threads=threads, **options
    )  # fmt: skip
    return out, lse


def check(case, tolerance=1e-5, threads=2, **options):
    """Every path gives the oracle's numbers."""
    expected = oracle(case, case.scale, **options)
    for path in host.paths():
        got = run(case, threads=threads, path=path, **options)
        for name, a, b in zip(("out", "lse"), got, expected, strict=True):
            torch.testing.assert_close(
                a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda text, n=name, p=path: f"{p} {n}: {text}"
            )
    return expected


@pytest.mark.parametrize("tau", [1, 2, 3])
@pytest.mark.parametrize(
    "bits, tables, group", [(4, 20, 1), (4, 50, 7), (8, 20, 5), (8, 50, 4), (10, 20, 4), (10, 50, 5)]
)
def test_tokens_are_those_of_a_comparison_with_all(bits, tables, group, tau):
    """With equal keys all tokens count alike, and a value is a unit vector: the output says which were found."""
    case = make_case(301, bits, tables, group=group, dim=301, first=[3, 0], last=[299, 301], seed=bits)
    expected = oracle_hits(case) >= tau
    assert expected.any() and not expected.all()
    case.keys.zero_()
    case.values.copy_(torch.eye(301).expand_as(case.values))
    for path in host.paths():
        out, lse = run(case, tau=tau, epsilon=0.5, path=path)
        assert ((out > 0).numpy() == expected).all()
        counts = torch.from_numpy(expected.sum(-1))
        torch.testing.assert_close(out.sum(-1), (counts > 0).float())
        assert (torch.isinf(lse) == (counts == 0)).all()


def test_tables_list_the_tokens_of_a_code_in_order():
    case = make_case(70, bits=3, tables=17, first=[0, 9], last=[70, 64])
    for b, h, l in numpy.ndindex(2, 2, 17):
        starts, ids = case.store.starts[b, h, l].tolist(), case.store.ids[b, h, l].tolist()
        codes = case.codes[b, h, :, l].tolist()
        for code in range(8):
            expected = [i for i in range(case.first[b], case.last[b]) if codes[i] == code]
            assert ids[starts[code] : starts[code + 1]] == expected


@pytest.mark.parametrize("dim", [1, 64, 80, 128, 131])
@pytest.mark.parametrize(
    "dtype, query_dtype",
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
def test_attention_is_that_of_the_definition(dim, dtype, query_dtype):
    dtypes = {"dtype": getattr(torch, dtype), "query_dtype": getattr(torch, query_dtype)}
    case = make_case(701, dim=dim, first=[0, 11], last=[701, 650], **dtypes)
    check(case)
    check(
        case,
        tau=3,
        epsilon=0.0,
        softcap=0.7,
        valid=torch.rand(2, 701, generator=torch.Generator().manual_seed(1)) > 0.4,
    )


@pytest.mark.parametrize("bits, tables, tau", [(1, 3, 2), (4, 300, 30), (8, 75, 1), (10, 150, 2), (15, 20, 1)])
def test_bits_tables_and_tau(bits, tables, tau):
    case = make_case(601, bits, tables, dim=16, seed=3)
    _, lse = check(case, tau=tau)
    assert torch.isfinite(lse).any()


def test_more_hits_than_a_byte_holds():
    case = make_case(65, bits=1, tables=700, batch=1, dim=16)
    case.codes.zero_()
    case.query_codes.zero_()
    refill(case, [0], [65])
    for tau in (1, 188, 255):  # 700 hits are 188 beyond two bytes of 256
        out, _ = run(case, tau=tau, epsilon=1e30)  # which makes all tokens count alike
        expected = torch.softmax((case.query[0, 0] @ case.keys[0, 0].T) * case.scale, -1) @ case.values[0, 0]
        torch.testing.assert_close(out[0, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads, group", [(1, 1), (2, 4)])
def test_any_number_of_threads(kv_heads, group):
    case = make_case(5003, 6, 20, 2, kv_heads, group, first=[40, 0], last=[5003, 900], dtype=torch.bfloat16)
    expected = check(case, threads=1)
    for threads in (2, 3, 16, 64):
        for got, right in zip(run(case, threads=threads), expected, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    valid = torch.zeros(2, 5003, dtype=torch.uint8)
    valid[:, 100:300] = valid[:, 4000:4010] = 1  # most parts of a head are empty
    check(case, threads=16, valid=valid)


def test_calls_at_once_and_without_python():
    """What a host function does: the entry point, on a thread of its own, without the GIL."""
    cases = [make_case(3001 + 500 * i, dim=32, seed=i) for i in range(4)]
    entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(host.entry_point())

    def steps(case):
        out, lse = torch.empty(case.query.shape), torch.empty(case.query.shape[:2])
        call = host.arguments(
            case.store, case.query, case.query_codes, case.mean, None, out, lse, case.scale, threads=2
        )  # fmt: skip
        for _ in range(5):
            entry(ctypes.addressof(call))
            assert call.status == 0
        return out, lse

    with ThreadPoolExecutor(4) as pool:
        for case, got in zip(cases, pool.map(steps, cases), strict=True):
            for a, b in zip(got, oracle(case, case.scale), strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_rows_without_tokens():
    case = make_case(first=[0, 20], last=[0, 501])
    out, lse = check(case)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and torch.isfinite(lse[1]).all()
    for valid in (None, torch.zeros(2, 501, dtype=torch.bool)):
        if valid is None:
            fresh = host.make_store(case.keys, case.values, 4, 20)  # never filled
        for threads in (1, 16):
            out, lse = torch.full(case.query.shape, 7.0), torch.full(case.query.shape[:2], 7.0)
            store = fresh if valid is None else case.store
            host.attend(store, case.query, case.query_codes, case.mean, valid, out, lse, 1.0, threads=threads)
            assert (out == 0).all() and (lse == -math.inf).all()


def test_codes_of_a_query_that_are_none():
    case = make_case()
    case.query_codes[:, :, ::2] = torch.tensor([-1, 16, -32768, 32767, 17]).repeat(2).to(torch.int16)
    check(case)


def test_vectors_without_a_direction():
    """A query of 0, a key that is the mean, keys along the query and against it: always finite, and the definition."""
    case = make_case(300, 4, 20, group=3, dim=80)
    case.query[:, 0] = 0
    case.keys[:, :, 5] = case.mean
    for h in (1, 4):
        for i, length in ((7, 1.0), (8, -1.0), (9, 1e-3), (10, -40.0)):
            case.keys[:, h // 3, i] = case.mean[:, h // 3] + length * case.query[:, h]
    case.codes[:, :, 5:11] = case.query_codes[:, ::3, None]  # they are found
    refill(case, [0, 0], [300, 300])
    check(case, tolerance=2e-5)
    valid = torch.zeros(2, 300, dtype=torch.bool)
    valid[:, 8] = valid[:, 10] = True  # of these alone u is as good as 0, and epsilon doesn't help
    for path in host.paths():
        out, lse = run(case, epsilon=0.0, valid=valid, path=path)
        assert torch.isfinite(out).all() and not lse.isnan().any() and not (lse == math.inf).any()


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e12, 1e17, 1e20])
def test_huge_and_tiny_logits(size):
    case = make_case(dtype=torch.bfloat16, query_dtype=torch.bfloat16)
    found = torch.from_numpy(oracle_hits(case).max(-1) >= 2)
    case.query.mul_(size)
    if size == 1e17:
        case.keys.mul_(1e17)
        case.mean.mul_(1e17)
    if size == 1e20:  # products that float32 doesn't hold
        for tensor in (case.query, case.keys):
            tensor.copy_(tensor.abs().clamp(min=1) * 1e20)
    for path in host.paths():
        out, lse = run(case, path=path)
        assert torch.isfinite(out).all() and torch.isfinite(lse[found]).all() and found.any()
    if size == 1e4:  # one token has all the weight
        expected, _ = oracle(case, case.scale)
        torch.testing.assert_close(run(case)[0].double(), expected, rtol=1e-2, atol=1e-2)


def test_garbage_elsewhere_is_not_read():
    case = make_case(first=[30, 100], last=[400, 480], dtype=torch.bfloat16)
    valid = torch.rand(2, 501, generator=torch.Generator().manual_seed(2)) > 0.3
    expected = oracle(case, case.scale, valid=valid)
    for b in range(2):
        outside = ~valid[b]
        outside[: case.first[b]] = outside[case.last[b] :] = True
        case.keys[b, :, outside] = case.values[b, :, outside] = math.nan
        case.codes[b, :, : case.first[b]] = -1
        case.codes[b, :, case.last[b] :] = 32767
    refill(case, case.first, case.last)
    for path in host.paths():
        for threads in (1, 16):
            for got, right in zip(run(case, valid=valid, threads=threads, path=path), expected, strict=True):
                torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots, threads", [(501, 1), (9001, 1), (9001, 16)])
def test_fewer_tokens_than_are_indexed_and_a_bias(slots, threads):
    """The last ones, which become recent ones no more one by one, and any; in one part or several."""
    case = make_case(slots, bits=5, group=1, first=[4, 30])
    bias = torch.randn(2, slots, generator=torch.Generator().manual_seed(1))
    for first, last in ((4, slots - 1), (40, slots - 64), (4, slots // 3), (slots // 2, slots // 2), (90, 80)):
        span = torch.tensor([[first, last], [30, slots]])
        check(case, threads=threads, span=span, bias=bias, softcap=3.0)


def test_a_store_is_filled_again():
    case = make_case(2001, bits=6)
    for first, last in (([0, 4], [100, 9]), ([4, 4], [2001, 1500]), ([7, 0], [7, 301])):
        case.codes = case.codes.roll(1, 2)
        refill(case, first, last)
        check(case)
        check(case, threads=16)


def test_ids_of_more_slots_than_16_bits_count():
    case = make_case(70000, 6, 20, 1, 1, 2, 32, first=[65400], last=[66100], dtype=torch.bfloat16)
    assert case.store.ids.dtype == torch.uint32
    check(case)
    case = make_case(65536, 6, 20, 1, 1, 2, 32, first=[65000], last=[65536], dtype=torch.bfloat16)
    assert case.store.ids.dtype == torch.uint16
    check(case)


@pytest.mark.parametrize("tables, tau", [(20, 1), (150, 2), (200, 3), (75, 20), (5, 5)])
def test_inclusion_is_exact_however_small(tables, tau):
    t = [1e-12, 3e-9, 1e-6, 1e-3, 0.01, tau / tables / 1.001, min(tau / tables * 1.001, 0.9), 0.5, 0.97, 1 - 1e-9]
    expected = torch.tensor([float(oracle_u(Fraction(x), tables, tau)) for x in t], dtype=torch.float64)
    got = host.inclusion(torch.tensor(t, dtype=torch.float64), tables, tau)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)
    assert host.inclusion(torch.tensor([0.0, 1.0], dtype=torch.float64), tables, tau).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("bits, tables, tau", [(10, 150, 2), (8, 75, 1), (10, 300, 3), (14, 20, 2)])
def test_weight_of_each_cosine(bits, tables, tau, epsilon):
    """Head h finds token h alone: its lse is the token's logit, and tells -log(u) down to 1e-30."""
    cosines = torch.linspace(-0.998, 0.9999, 128, dtype=torch.float64)
    case = make_case(128, bits, tables, 1, 1, 128, dim=32)
    case.mean.zero_()
    case.query.copy_(case.query[:, :1].clone())
    q = case.query[0, 0].double() / case.query[0, 0].double().norm()
    other = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    other -= other @ q * q
    other /= other.norm()
    case.keys[0, 0] = (cosines[:, None] * q + (1 - cosines[:, None] ** 2).sqrt() * other).float()
    case.codes[0, 0] = torch.arange(128, dtype=torch.int16)[:, None]
    case.query_codes[0] = torch.arange(128, dtype=torch.int16)[:, None]
    refill(case, [0], [128])
    check(case, tolerance=1e-5 if epsilon else 1e-4, tau=tau, epsilon=epsilon)  # acos of a float32 cosine near -1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(2, 3, 64)}, r"query: shape \[2, 3, 64\]; valid: \[B, Hq, D\], Hq a multiple of 2"),
        ({"query": torch.zeros(2, 4, 32)}, r"query: shape \[2, 4, 32\]; valid: \[2, 4, 64\]"),
        ({"query": torch.zeros(2, 4, 64).half()}, "query: dtype torch.float16; valid: torch.bfloat16 or torch.float32"),
        ({"query": torch.zeros(2, 64, 4).mT}, r"query: strides \[256, 1, 4\]; valid: contiguous"),
        ({"query_codes": torch.zeros(2, 4, 20)}, "query_codes: dtype torch.float32; valid: torch.int16"),
        ({"mean": torch.zeros(2, 4, 64)}, "mean: shape"),
        ({"valid": torch.zeros(2, 500, dtype=torch.bool)}, "valid: shape"),
        ({"out": torch.zeros(2, 4, 64).bfloat16()}, "out: dtype"),
        ({"lse": torch.zeros(2, 4, 1)}, "lse: shape"),
        ({"tau": 0}, "tau: 0; valid: 1 to 20"),
        ({"tau": 21}, "tau: 21; valid: 1 to 20"),
        ({"threads": 0}, "threads: 0"),
        ({"softcap": -1.0}, "softcap: -1.0"),
        ({"epsilon": math.nan}, "epsilon: nan"),
        ({"path": "mmx"}, "path: 'mmx'; valid on this processor: portable"),
        ({"mean": torch.zeros(2, 2, 64, device="meta")}, "mean: on meta; valid: cpu"),
    ],
)
def test_wrong_arguments(change, message):
    case = make_case()
    arguments = {
        "query": case.query, "query_codes": case.query_codes, "mean": case.mean, "valid": None,
        "out": torch.empty(2, 4, 64), "lse": torch.empty(2, 4), "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        host.attend(case.store, **{**arguments, **change})


def test_wrong_stores_and_codes():
    case = make_case()
    for change, message in (
        ({"keys": case.keys[0]}, r"keys: shape \[2, 501, 64\]; valid: \[B, Hkv, S, D\]"),
        ({"values": case.values.bfloat16()}, "values: dtype torch.bfloat16; valid: torch.float32"),
        ({"bits": 16}, "bits: 16; valid: 1 to 15"),
        ({"tables": 0}, "tables: 0; valid: 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            host.make_store(**{"keys": case.keys, "values": case.values, "bits": 4, "tables": 20, **change})
    for first, last in (([0, 0], [0, 502]), ([-1, 0], [5, 5]), ([6, 0], [5, 5])):
        with pytest.raises(ValueError, match="first, last: .* valid: 0 <= first <= last <= 501"):
            host.fill(case.store, case.codes, first, last)
    with pytest.raises(ValueError, match=r"first: shape \[\]; valid: \[2\]"):
        host.fill(case.store, case.codes, 0, [501, 501])
    with pytest.raises(ValueError, match="codes: shape"):
        host.fill(case.store, case.codes[:, :, :500], [0, 0], [5, 5])
    for wrong in (16, -1):
        case.codes[1, 1, 77, 19] = wrong
        with pytest.raises(ValueError, match="codes: not all that are to be indexed are codes; valid: 0 to 15"):
            host.fill(case.store, case.codes, [0, 0], [501, 501])
        assert (run(case)[0] == 0).all()


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"a C\+\+17 compiler with OpenMP .*no-such-compiler.* install GCC"):
        host.library.__wrapped__()

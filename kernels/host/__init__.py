"""MagicPIG's half on the host (https://arxiv.org/abs/2410.16179): hash tables of a layer's keys, and attention by them.

Keys and values stay in the host's memory, where there is more of it than on a GPU. A query reads only the tokens that
share a bucket with it in `tau` tables or more, a few of a hundred, and weighs each by how likely it was to be found:

    store = make_store(keys, values, bits=10, tables=150)
    fill(store, codes, first, last)                             after the prompt
    attend(store, query, query_codes, mean, ..., out, lse, ...)   at each step

`lsh.cpp` does the work. It is built at first use, into PyTorch's folder of extensions, for any processor of this
architecture: see `paths`. `B` batch, `Hq` query heads, `Hkv` key/value heads, `S` slots, `D` head size, `L` tables.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PATHS = ("portable", "avx2", "avx512", "avx512bf16")  # as `Path` in lsh.cpp
FLOATS = (torch.bfloat16, torch.float32)
MAX_TAU = 255  # a token's hits are counted in a byte
MAX_THREADS = 1024
NO_MEMORY, WRONG_CODE = 1, 2  # as `Status` in lsh.cpp
# Sums may be taken in any order, and nothing minds errno, traps or the sign of a 0. NaN and infinity remain
VECTORIZE = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")


class _Fill(ctypes.Structure):
    """`TidalLshFill` in lsh.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "span", "starts", "ids")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "slots", "tables", "bits", "wide", "threads")),
        ("status", ctypes.c_int64),
    ]


class Arguments(ctypes.Structure):
    """`TidalLshAttend` in lsh.cpp: an `attend` that is ready to run, and to run again. It keeps its tensors alive."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "starts", "ids", "span", "query", "codes", "mean")),
        *((name, ctypes.c_void_p) for name in ("filled", "valid", "bias", "corrections", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("batch", "query_heads", "kv_heads", "slots", "head_dim", "tables")),
        *((name, ctypes.c_int64) for name in ("bits", "tau", "keys_bf16", "query_bf16", "wide", "threads", "path")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        ("status", ctypes.c_int64),
    ]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Store:
    """What the host keeps of one layer: see `make_store`. `fill` writes the last three.

    The tokens of a bucket are `ids[b, h, l, starts[b, h, l, code] : starts[b, h, l, code + 1]]`, in ascending order.
    """

    keys: Tensor  # [B, Hkv, S, D] bfloat16 or float32
    values: Tensor  # the same
    bits: int  # of a code
    tables: int
    starts: Tensor  # [B, Hkv, L, 2^bits + 1] uint32
    ids: Tensor  # [B, Hkv, L, S] uint16, or uint32 where S > 65536
    span: Tensor  # [B, 2] int64: the first slot that is indexed, and the one after the last


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `lsh.cpp`, built if it has changed. A RuntimeError says what is missing."""
    try:
        from torch.utils.cpp_extension import load  # imports setuptools

        path = load(
            name="tidal_lsh",
            sources=[str(Path(__file__).resolve().with_name("lsh.cpp"))],
            extra_cflags=["-O3", "-fopenmp", *VECTORIZE],
            extra_ldflags=["-fopenmp"],
            with_cuda=False,
            is_python_module=False,
        )
        built = ctypes.CDLL(path)  # lets go of the GIL while a function runs
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        cause = str(error).partition("\n")[0]  # the rest is the compiler's output, which the chained error shows
        raise RuntimeError(
            "attention on the host is compiled at first use, which failed. It needs a C++17 compiler with OpenMP "
            f"(looked for {os.environ.get('CXX', 'c++')!r}, which the environment variable CXX names) and ninja: "
            f"install GCC 11 or later, for example the package g++, and ninja-build. The cause: {cause}"
        ) from error
    for name in ("tidal_lsh_paths", "tidal_lsh_num_corrections"):
        getattr(built, name).restype = ctypes.c_int64
    return built


def paths() -> tuple[str, ...]:
    """Instruction sets that the inner loops can use on this processor, the fastest one last."""
    available = library().tidal_lsh_paths()
    return tuple(name for bit, name in enumerate(PATHS) if available >> bit & 1)


def entry_point() -> int:
    """The address of `void tidal_lsh_attend(void* args)`: with that of an `Arguments`, a host function of a stream."""
    address = ctypes.cast(library().tidal_lsh_attend, ctypes.c_void_p).value
    assert address is not None
    return address


def make_store(keys: Tensor, values: Tensor, bits: int, tables: int) -> Store:
    """A store of keys and values `[B, Hkv, S, D]`, bfloat16 or float32, which it doesn't copy. No token is indexed yet.

    It asks the kernel for large pages, which save a quarter of a step's time. Memory that was never written gets them
    at once: make the store of empty tensors, and then write the keys and values.

    Args:
        keys: as they are in the cache: not centred. On the CPU, contiguous, pinned or not.
        values: as the keys.
        bits: of a code, 1 to 15.
        tables: 1 or more. Each takes 2 bytes a slot and kv head, or 4 for more than 65536 slots.

    Raises:
        ValueError: An argument is wrong. It names the argument.
        RuntimeError: There is no compiler: see `library`.
    """
    if keys.ndim != 4 or keys.shape[-1] == 0:
        raise ValueError(f"keys: shape {list(keys.shape)}; valid: [B, Hkv, S, D] with D > 0")
    batch, kv_heads, slots, _ = keys.shape
    _check("keys", keys, keys.shape, FLOATS)
    _check("values", values, keys.shape, (keys.dtype,))
    _check_number("bits", bits, 1, 15)
    _check_number("tables", tables, 1)
    starts = torch.zeros(batch, kv_heads, tables, 2**bits + 1, dtype=torch.uint32)
    ids = torch.empty(batch, kv_heads, tables, slots, dtype=torch.uint16 if slots <= 65536 else torch.uint32)
    for tensor in (keys, values, ids):
        library().tidal_lsh_advise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes))
    return Store(keys, values, bits, tables, starts, ids, torch.zeros(batch, 2, dtype=torch.int64))


def fill(
    store: Store, codes: Tensor, first: Tensor | Sequence[int], last: Tensor | Sequence[int],
    threads: int | None = None,
) -> None:  # fmt: skip
    """Index the tokens `first[b] <= i < last[b]` of each batch row, instead of those that were indexed before.

    Args:
        store: of `make_store`.
        codes: `[B, Hkv, S, L]` int16, below 2^bits. Those of other slots may be anything.
        first: `[B]`: slots.
        last: `[B]`: slots. A row may be empty.
        threads: as many as PyTorch uses, if it isn't given.

    Raises:
        ValueError: An argument is wrong, or a code is: then no token is indexed.
        MemoryError: There is no room to sort.
    """
    batch, kv_heads, slots, _ = store.keys.shape
    threads = torch.get_num_threads() if threads is None else threads
    _check("codes", codes, (batch, kv_heads, slots, store.tables), (torch.int16,))
    _check_number("threads", threads, 1, MAX_THREADS)
    ends = [torch.as_tensor(end).to("cpu", torch.int64) for end in (first, last)]
    for name, end in zip(("first", "last"), ends, strict=True):
        if end.shape != (batch,):
            raise ValueError(f"{name}: shape {list(end.shape)}; valid: {[batch]}")
    if not ((ends[0] >= 0) & (ends[0] <= ends[1]) & (ends[1] <= slots)).all():
        raise ValueError(f"first, last: {ends[0].tolist()}, {ends[1].tolist()}; valid: 0 <= first <= last <= {slots}")
    store.span.copy_(torch.stack(ends, 1))
    call = _Fill(
        *(tensor.data_ptr() for tensor in (codes, store.span, store.starts, store.ids)),
        *(batch, kv_heads, slots, store.tables, store.bits, store.ids.dtype == torch.uint32, threads),
    )
    library().tidal_lsh_fill(ctypes.byref(call))
    if call.status:
        store.span.zero_()
        store.starts.zero_()
    _raise_for(call.status, f"codes: not all that are to be indexed are codes; valid: 0 to {2**store.bits - 1}")


def attend(
    store: Store, query: Tensor, query_codes: Tensor, mean: Tensor, valid: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, softcap: float = 0.0, tau: int = 2, epsilon: float = 1e-4, threads: int = 1, path: str | None = None,
    bias: Tensor | None = None, span: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of each query head to the valid tokens that share its code in `tau` tables or more.

    A token i whose centred key k_i - mean has cosine c with the query counts with its inclusion probability u:

        t = (1 - acos(c) / pi)^bits,  u = P[Binomial(tables, t) >= tau],  logit = cap(q k_i scale) - log(u + epsilon)

    where c is 0 if a vector is, and u + epsilon at least the smallest normal float32.

    Args:
        store: as `fill` left it.
        query: `[B, Hq, D]` bfloat16 or float32. Query head h reads kv head h // (Hq / Hkv).
        query_codes: `[B, Hq, L]` int16. A code that isn't one, below 0 or from 2^bits up, finds nothing.
        mean: `[B, Hkv, D]` float32: what was taken from the keys before they were hashed.
        valid: `[B, S]` bool or uint8: the tokens that may be attended to. None: all.
        out: `[B, Hq, D]` float32, written: 0 for a head without tokens.
        lse: `[B, Hq]` float32, written: the natural log of the sum of exp(logit), -inf for a head without tokens.
        scale: of the scores.
        softcap: turns a score into softcap tanh(score / softcap). 0: none.
        tau: 1 to 255, and not above the number of tables.
        epsilon: 0 for an unbiased sum; 1e-4 in the paper's code. It bounds the weight of an unlikely token.
        threads: any number.
        path: one of `paths`. The last one of them, if it isn't given.
        bias: `[B, S]` float32, added to the scores after the softcap.
        span: `[B, 2]` int64: the first slot of interest, and the one after the last, of those that are indexed. If it
            isn't given, all of these.

    Raises:
        ValueError: An argument is wrong. It names the argument.
        MemoryError: A thread has no room for the tokens that it finds.
    """
    call = arguments(
        store, query, query_codes, mean, valid, out, lse, scale, softcap, tau, epsilon, threads, path, bias, span,
    )  # fmt: skip
    library().tidal_lsh_attend(ctypes.byref(call))
    _raise_for(call.status, "")


def arguments(
    store: Store, query: Tensor, query_codes: Tensor, mean: Tensor, valid: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, softcap: float = 0.0, tau: int = 2, epsilon: float = 1e-4, threads: int = 1, path: str | None = None,
    bias: Tensor | None = None, span: Tensor | None = None,
) -> Arguments:  # fmt: skip
    """What `attend` gives to the `entry_point`, checked: with it, a step needs no Python. Its `status` is 0 if done."""
    batch, kv_heads, slots, head_dim = store.keys.shape
    if query.ndim != 3 or query.shape[1] % max(kv_heads, 1):
        raise ValueError(f"query: shape {list(query.shape)}; valid: [B, Hq, D], Hq a multiple of {kv_heads}")
    heads = query.shape[1]
    _check("query", query, (batch, heads, head_dim), FLOATS)
    _check("query_codes", query_codes, (batch, heads, store.tables), (torch.int16,))
    _check("mean", mean, (batch, kv_heads, head_dim), (torch.float32,))
    if valid is not None:
        _check("valid", valid, (batch, slots), (torch.bool, torch.uint8))
    if bias is not None:
        _check("bias", bias, (batch, slots), (torch.float32,))
    span = store.span if span is None else span
    _check("span", span, (batch, 2), (torch.int64,))
    _check("out", out, (batch, heads, head_dim), (torch.float32,))
    _check("lse", lse, (batch, heads), (torch.float32,))
    _check_number("tau", tau, 1, min(MAX_TAU, store.tables))
    _check_number("threads", threads, 1, MAX_THREADS)
    if not softcap >= 0:
        raise ValueError(f"softcap: {softcap}; valid: above 0, or 0 for none")
    if not epsilon >= 0:
        raise ValueError(f"epsilon: {epsilon}; valid: 0 or more")
    if path is None:
        path = paths()[-1]
    elif path not in paths():
        raise ValueError(f"path: {path!r}; valid on this processor: {', '.join(paths())}")
    corrections = _corrections(store.bits, store.tables, tau, float(epsilon))
    tensors = (
        *(store.keys, store.values, store.starts, store.ids, span, query, query_codes, mean),
        *(store.span, valid, bias, corrections, out, lse),
    )
    call = Arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(batch, heads, kv_heads, slots, head_dim, store.tables, store.bits, tau),
        *(store.keys.dtype == torch.bfloat16, query.dtype == torch.bfloat16, store.ids.dtype == torch.uint32),
        *(threads, PATHS.index(path), scale, softcap),
    )
    call.tensors = tensors
    return call


def inclusion(agreement: Tensor, tables: int, tau: int) -> Tensor:
    """u = P[Binomial(tables, t) >= tau] of each t, float64 of any shape, to 12 digits or so however small it is."""
    _check("agreement", agreement, agreement.shape, (torch.float64,))
    _check_number("tables", tables, 1)
    _check_number("tau", tau, 1)
    result = torch.empty_like(agreement)
    library().tidal_lsh_inclusion(
        ctypes.c_void_p(agreement.data_ptr()), ctypes.c_int64(agreement.numel()), ctypes.c_int64(tables),
        ctypes.c_int64(tau), ctypes.c_void_p(result.data_ptr()),
    )  # fmt: skip
    return result


@functools.lru_cache(maxsize=16)
def _corrections(bits: int, tables: int, tau: int, epsilon: float) -> Tensor:
    """-log(u + epsilon) for all probabilities that a bit agrees. A value takes longer to find than a token to read."""
    result = torch.empty(library().tidal_lsh_num_corrections(), dtype=torch.float32)
    library().tidal_lsh_corrections(
        ctypes.c_int64(bits), ctypes.c_int64(tables), ctypes.c_int64(tau), ctypes.c_double(epsilon),
        ctypes.c_void_p(result.data_ptr()),
    )  # fmt: skip
    return result


def _check(name: str, tensor: Tensor, shape: Sequence[int], dtypes: tuple[torch.dtype, ...]) -> None:
    """A ValueError if the C++ code can't read the tensor."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: on {tensor.device}; valid: cpu")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name}: shape {list(tensor.shape)}; valid: {list(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {tensor.dtype}; valid: {' or '.join(str(dtype) for dtype in dtypes)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {list(tensor.stride())}; valid: contiguous")


def _check_number(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}: {value}; valid: {f'{least} or more' if most is None else f'{least} to {most}'}")


def _raise_for(status: int, wrong_code: str) -> None:
    if status == NO_MEMORY:
        raise MemoryError("a thread of the attention on the host got no memory")
    if status == WRONG_CODE:
        raise ValueError(wrong_code)

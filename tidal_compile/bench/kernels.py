"""The attention ops one by one, beside what else does the same: us, GB/s, and the share of the device's copy rate.

Data is random. Calls rotate through copies of it that are together larger than any L2 cache. Each op is compared with
the reference op on the same inputs before it is timed.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import TidalError
from ..kernels import ops, reference
from ..kernels.call import Call, Selection, arguments, fitting
from ..kernels.methods import METHODS, Method
from ..kernels.methods.lsh import Lsh
from ..kernels.methods.pages import Pages
from .timing import relative_error, summary, time_calls

ROTATE_BYTES = 400 * 10**6  # read between two calls on the same copy, so that none of it is left in a cache
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
SINKS, RECENT = 4, 64


@dataclass(frozen=True)
class Size:
    """The sizes of one attention call, and the budget of a selection and who shares its token sets."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    budget: int
    share: str

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values, in 16 bits."""
        return 2 * self.batch * self.kv_heads * self.context * self.head_dim * 2

    @property
    def selection(self) -> Selection:
        """What a selection is to keep; a small budget has fewer sinks and recent tokens."""
        return Selection(**fitting(min(self.budget, self.context), SINKS, RECENT), share=self.share)

    @property
    def sets(self) -> int:
        """Token sets of a selection."""
        return self.selection.num_sets(self.heads, self.kv_heads)


# Every method with its default keys, and what is worth a look beside these
TIMED: dict[str, Method] = {name: kind() for name, kind in METHODS.items()}
TIMED["pages, keep 4"] = Pages(keep=4.0)
TIMED["lsh, 9 bits, 120 tables"] = Lsh(k=9, l=120)
TIMED["lsh, 8 bits, 75 tables"] = Lsh(k=8, l=75)


@dataclass(frozen=True)
class Inputs:
    """Random inputs of one attention call; `index` holds scattered positions, the worst that a selection can choose.

    `kept`: what methods keep beside the cache, by `TIMED`.
    """

    call: Call[Tensor]
    index: Tensor
    kept: dict[str, tuple[Tensor, ...]]

    @property
    def unmasked(self) -> Call[Tensor]:
        """The same call without its mask, which hides nothing."""
        return replace(self.call, mask=None)


def need_memory(size: Size, device: torch.device, free: int) -> None:
    """Raise `TidalError` with the bytes where the inputs and a float32 reference can't fit into `free` bytes."""
    rotated = max(3 * size.kv_bytes, ROTATE_BYTES) if device.type == "cuda" else size.kv_bytes
    needed = rotated + 6 * size.kv_bytes + 16 * size.batch * size.heads * size.context
    if needed > free:
        raise TidalError(f"bench: {size} needs {needed:,} bytes, and {free:,} are free; take a smaller --context")


def make_inputs(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Inputs with normal q, k and v, a mask that hides nothing, as `generate` passes one, and a full cache."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, device=device, dtype=dtype, generator=generator)
    kv = (size.batch, size.kv_heads, size.context, size.head_dim)
    keep = min(size.budget, size.context)
    chosen = torch.rand(size.batch * size.sets, size.context, device=device, generator=generator).topk(keep).indices
    call = Call(
        query=normal(size.batch, size.heads, 1, size.head_dim),
        key=normal(kv),
        value=normal(kv),
        length=torch.tensor(size.context, device=device),
        mask=torch.ones(size.batch, 1, 1, size.context, dtype=torch.bool, device=device),
        scale=size.head_dim**-0.5,
    )
    kept = {name: method.summarize(call.key) for name, method in TIMED.items()}
    return Inputs(call, chosen.sort().values.int().view(size.batch, size.sets, keep), kept)


def run_size(size: Size, device: torch.device, dtype: torch.dtype, rate: float) -> list[dict[str, Any]]:
    """Check and time every op at one size: records for the results. Raises `TidalError` if an op is wrong."""
    # Three at least: the chosen tokens of two might fit into a cache together
    copies = max(3, min(12, -(-ROTATE_BYTES // size.kv_bytes))) if device.type == "cuda" else 1
    data = [make_inputs(size, device, dtype, seed) for seed in range(copies)]
    _check(size, data[0], dtype)
    keep = data[0].index.shape[2]
    gathered = 2 * size.batch * max(size.kv_heads, size.sets) * keep * size.head_dim * dtype.itemsize
    scanned = size.kv_bytes * dtype.itemsize // 2
    records = []
    for name, call in variants(size, device).items():
        calls = [functools.partial(call, inputs) for inputs in data]
        timing = summary(time_calls(calls * max(1, 8 // copies), device))
        moved = _bytes_moved(name, scanned, gathered, size)
        records.append({
            "op": name, **vars(size), "us": timing, "bytes": moved,
            "gb_per_s": moved / timing["median"] / 1e3 or None,
            "fraction_of_copy_rate": moved / (timing["median"] * 1e-6) / rate or None,
        })  # fmt: skip
    return records


def _bytes_moved(name: str, scanned: int, gathered: int, size: Size) -> int:
    """Bytes of keys and values that a variant reads: everything is `scanned` bytes, the chosen tokens `gathered`."""
    if name.startswith("by "):
        method = TIMED[name.removeprefix("by ").removesuffix(", sparse output")]
        keys = method.keys_read(size.selection, size.context, 2 * size.head_dim)
        if method.attends:
            sampled = size.heads // size.kv_heads * method.tokens_kept(size.selection, size.context)
            gathered = round(scanned * min(1.0, sampled / size.context))
        return round(scanned / 2 * keys / size.context) + gathered
    return gathered if name.startswith("sparse") else 0 if name.startswith("top-k") else scanned


def variants(size: Size, device: torch.device) -> dict[str, Callable[[Inputs], object]]:
    """What is timed at a size, by name: our ops with and without a mask, and what else does the same."""
    grouped = size.heads != size.kv_heads
    chosen = arguments(size.selection)

    def sdpa(x: Inputs, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                x.call.query, x.call.key, x.call.value, enable_gqa=grouped
            )

    def choose_and_attend(x: Inputs, name: str) -> Tensor:
        result = _by_method(x, size, name)
        return result if TIMED[name].attends else ops.sparse_attention(*arguments(x.unmasked), result)

    timed = {
        "dense": lambda x: ops.full_attention(*arguments(x.call)),
        "dense, no mask": lambda x: ops.full_attention(*arguments(x.unmasked)),
        "select": lambda x: ops.select_attention(*arguments(x.call), *chosen),
        "select, no mask": lambda x: ops.select_attention(*arguments(x.unmasked), *chosen),
        "sparse": lambda x: ops.sparse_attention(*arguments(x.unmasked), x.index),
    }
    for name in TIMED:
        timed[f"by {name}, sparse output"] = functools.partial(choose_and_attend, name=name)
    if device.type != "cuda":
        return timed | {"SDPA": lambda x: sdpa(x, SDPBackend.MATH)}
    timed |= {
        "SDPA flash": lambda x: sdpa(x, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": lambda x: sdpa(x, SDPBackend.CUDNN_ATTENTION),
        "dense + torch.topk": lambda x: _dense_and_topk(x, size),
    }
    rows = torch.randn(size.batch * size.sets, size.context, device=device)
    timed["top-k alone, torch.topk"] = lambda _: rows.topk(size.selection.budget)
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        timed["top-k alone, FlashInfer"] = lambda _: flashinfer.top_k(rows, size.selection.budget)
    return timed


def _by_method(x: Inputs, size: Size, name: str) -> Tensor:
    """What a method of `TIMED` chooses, or its attention."""
    by, keys = name.partition(",")[0], arguments(TIMED[name])
    return ops.by_method[by](*arguments(x.call), *arguments(size.selection), *keys, *x.kept[name])


def _dense_and_topk(x: Inputs, size: Size) -> tuple[Tensor, Tensor]:
    """The dense scan with its scores, and PyTorch's top-k of them, summed over the heads that share a token set."""
    from ..kernels.triton.dense import scan
    from ..kernels.triton.split import merge

    out = torch.empty_like(x.call.query)
    splits = scan(x.call, write_scores=True)
    lse = merge(splits, None, out)
    scores = splits.scores[..., : size.context]
    if size.sets < size.heads:
        scores = (scores - lse[..., None]).exp2().view(size.batch, size.sets, -1, size.context).sum(2)
    return out, scores.topk(min(size.budget, size.context)).indices


def _check(size: Size, x: Inputs, dtype: torch.dtype) -> None:
    """Compare our ops with the reference. Selections may differ where float32 sums make near-ties."""
    chosen = arguments(size.selection)
    out, index = ops.select_attention(*arguments(x.call), *chosen)
    expected_out, expected_index = reference.select_attention(x.call, size.selection)
    sparse = ops.sparse_attention(*arguments(x.unmasked), x.index)
    errors = {
        "dense": relative_error(ops.full_attention(*arguments(x.call)), expected_out),
        "select": relative_error(out, expected_out),
        "sparse": relative_error(sparse, reference.sparse_attention(x.unmasked, x.index)),
        "tokens": _count_unexpected(index, expected_index) / expected_index.numel(),
    }
    for name, method in TIMED.items():
        found, expected = _by_method(x, size, name), method.step(x.call, size.selection)
        if method.attends:
            errors[f"by {name}"] = relative_error(found, expected)
        else:
            errors[f"tokens by {name}"] = _count_unexpected(found, expected) / expected.numel()
    limits = {name: 0.01 if name.startswith("tokens") else TOLERANCE[dtype] for name in errors}
    for name, error in errors.items():
        if not error <= limits[name]:
            raise TidalError(f"bench: {name} is off by {error:.3g} (relative; at most {limits[name]}) at {size}")


def _count_unexpected(index: Tensor, expected: Tensor) -> int:
    """How many chosen tokens are not among those expected."""
    rows = zip(index.flatten(0, 1), expected.flatten(0, 1), strict=True)
    return sum(int((~torch.isin(row, expected_row)).sum()) for row, expected_row in rows)


def sizes(
    contexts: Sequence[int], batches: Sequence[int], heads: int, kv_heads: Sequence[int], head_dim: int,
    budgets: Sequence[int], shares: Sequence[str],
) -> list[Size]:  # fmt: skip
    """All contexts, batches and kv heads with the first budget and share; other budgets and shares at the last context.

    Raises `TidalError` where the number of query heads is not a multiple of the number of kv heads.
    """
    for kv in kv_heads:
        if heads % kv:
            raise TidalError(f"bench: {heads} query heads can't share {kv} kv heads, which must divide them")
    combined = [
        Size(batch, heads, kv, head_dim, context, budgets[0], shares[0])
        for batch in batches
        for kv in kv_heads
        for context in contexts
    ]
    settings = [(budget, shares[0]) for budget in budgets[1:]] + [(budgets[0], share) for share in shares[1:]]
    return combined + [
        Size(batches[0], heads, kv_heads[0], head_dim, contexts[-1], budget, share) for budget, share in settings
    ]

"""Decode steps of a whole model: the backend's policies beside what else a user could run, at one context and batch.

Weights and cache are random, so that only the latency means something. Every variant's logits are compared with an
uncompiled run of the same computation before the variant is timed: those of dense variants with the eager model, those
of a policy with its rewritten graph over the reference ops.
"""

import contextlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import tensorrt
from ..backend import Options, followed, past_dynamo, plan_graph
from ..cache import as_numbers
from ..errors import TidalError
from ..explain import decode_calls
from ..kernels.ops import DEFINITIONS
from ..models import with_cache
from ..passes import compat
from ..passes.match import AttentionSite
from ..passes.plan import make_plan
from ..passes.rewrite import apply_plan
from ..passes.state import take_out_inputs
from ..policy import Policy
from ..run import random_cache, rewind, windows
from ..variant import Variant
from .timing import relative_error, summary, time_steps

WARM_UP = 6  # steps that are not timed: compilation, CUDA-graph warm-up and recording
WRONG = 0.5  # a relative error of logits that no rounding explains
ROUNDING = {torch.float32: 5e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}  # relative error of logits from one layer
FLIPPED = 0.04  # over a cache in float8, where a rounding before it moves a number to the next one that float8 has


@dataclass(frozen=True)
class Shape:
    """A model's attention calls, and what its decode step must read: bytes of weights, and of the KV cache a token."""

    calls: tuple[Any, ...]
    num_layers: int
    weight_bytes: int
    streamed_bytes: int  # of the weights, those that every step reads
    kv_bytes_per_token: int
    largest_layer_numbers_per_token: int  # of its keys and values
    group: int  # query heads a kv head
    width: int  # bytes of one number
    rounding: float  # a relative error that a layer may add


def read_shape(model: nn.Module, dtype: torch.dtype, kind: str = "auto") -> Shape:
    """The shape of a model on the meta device, over a cache of this kind (see `cache.CACHES`).

    An untied embedding table is not streamed, since a step reads one row of it. Experts count as if all were read.
    """
    calls, num_layers = decode_calls(model)
    sites = [call for call in calls if isinstance(call, AttentionSite)]
    if not sites:
        raise TidalError("bench: the model has no attention call over a static cache that could be rewritten")
    tensors = [tensor.meta["example_value"].shape for site in sites for tensor in (site.call.key, site.call.value)]
    kv_bytes = [
        heads * (head_dim + 2 if kind == "fp8" else head_dim * dtype.itemsize) for _, heads, _, head_dim in tensors
    ]
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    not_streamed = 0 if head is not None and head.weight is table else table.numel() * dtype.itemsize
    return Shape(
        calls=tuple(calls), num_layers=num_layers, weight_bytes=weights, streamed_bytes=weights - not_streamed,
        kv_bytes_per_token=sum(kv_bytes),
        largest_layer_numbers_per_token=2 * max(heads * head_dim for _, heads, _, head_dim in tensors),
        group=sites[0].num_heads // sites[0].num_kv_heads, width=dtype.itemsize,
        rounding=FLIPPED if kind == "fp8" else ROUNDING[dtype],
    )  # fmt: skip


def cases_of(
    shape: Shape, baselines: Sequence[str], asked: Sequence[Options], budgets: Sequence[int] = ()
) -> list[Variant]:
    """The variants to run: `baselines` by name, and a policy for each of the options that are `asked` for.

    A policy that chooses tokens runs at each of the `budgets`, or else at its own. Raises `TidalError` where the model
    can't follow a policy.
    """
    if "tensorrt" in baselines:
        tensorrt.check()
    cases = [Variant(name) for name in baselines]
    calls = list(shape.calls)
    for options in asked:
        policy, plan = followed(calls, shape.num_layers, options)
        case = Variant(f"tidal: {policy.name}", policy, plan)
        for chosen in [policy.with_budget(budget) for budget in budgets] if case.chooses and budgets else [policy]:
            own = {role.selection.budget for role in chosen.roles if role.role == "select" and not role.method.attends}
            name = case.name + (f" {max(own)}" if own else "")
            cases.append(Variant(name, chosen, make_plan(calls, chosen.roles)))
    return cases


def need_memory(shape: Shape, cases: Sequence[Variant], batch: int, slots: int, free: int) -> None:
    """Raise `TidalError` with the bytes, before anything is allocated, where a case can't fit into `free` bytes."""
    cache = batch * slots * shape.kv_bytes_per_token
    layer = batch * slots * shape.largest_layer_numbers_per_token
    repeated = 2 * layer * shape.group * shape.width  # repeat_kv copies keys and values for every query head
    in_float32 = 3 * layer * 4  # the reference ops copy a layer's cache to float32
    kept = round(max(map(_kept_bytes, cases), default=0) * batch * slots)
    working = (
        kept + max(repeated if any(case.policy is None for case in cases) else 0, in_float32) + 2**30 * (free > 2**35)
    )
    needed = shape.weight_bytes + cache + working
    if needed > free:
        raise TidalError(
            f"bench: batch {batch} with {slots} tokens needs {needed:,} bytes (weights {shape.weight_bytes:,}, "
            f"KV cache {cache:,}, working memory {working:,}), and {free:,} are free; take a smaller --context or "
            "--batch, fewer --layers, or fewer baselines"
        )


def _kept_bytes(case: Variant) -> float:
    """Bytes on the device that methods of a policy keep beside the cache, for each slot of a sequence."""
    total, slots = 0.0, 1024
    for decision in case.plan.decisions if case.plan is not None else ():
        if decision.role is not None and decision.role.keeps and not decision.role.method.prepares:
            _, heads, _, head_dim = decision.call.call.key.meta["example_value"].shape
            empty = torch.empty(1, heads, slots, head_dim, device="meta", dtype=torch.bfloat16)
            total += sum(tensor.nbytes for tensor in decision.role.method.summarize(empty)) / slots
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # it counts droppable caches as available, which `sysconf` doesn't
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        return int(available[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def floor_bytes(shape: Shape, case: Variant, batch: int, length: int) -> tuple[int, int]:
    """The fewest bytes that a step can read: of weights, and of the KV cache under the policy."""
    return shape.streamed_bytes, round(batch * length * shape.kv_bytes_per_token * case.kv_share(length))


@torch.no_grad()
def run_case(
    model: nn.Module, shape: Shape, case: Variant, cache: Any, lengths: Sequence[int], token: Tensor, steps: int,
    rate: float, saved: dict[int, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Compile one variant, then check and time it from `token [B, 1]` after each number of cached tokens: records.

    `rate`: bytes a second that the device's memory moves. `saved`: copies of the cache layers that forget tokens, from
    `make_cache`. Raises `TidalError` where the logits are wrong; a recompilation while steps are timed raises, too.
    """
    lengths = sorted(lengths, reverse=True)  # longest first: steps write beyond their length, where no later one reads
    expected = expected_results(model, case, cache, lengths, token, saved)
    nudged = expected
    if case.is_sparse:
        nudged = expected_results(model, case, cache, lengths, token, saved, nudge=torch.finfo(model.dtype).eps)
    torch._dynamo.reset()
    start = time.perf_counter()
    with _as_baseline(model, case, lengths[0] + 1) as forward:
        step = _compiled(forward, case, model.device)

        def decode_step() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return step(input_ids=token, **with_cache(model, cache)).logits

        compile_seconds = None
        for length, right, near in zip(lengths, expected, nudged, strict=True):
            rewind(cache, length, saved)
            found = _results(decode_step(), cache, length)
            compile_seconds = compile_seconds or time.perf_counter() - start
            checked = check(case, shape.num_layers, shape.rounding, length, found, right, near)
            for _ in range(WARM_UP - 1):
                decode_step()
            yield {
                "name": case.name,
                "batch": len(token),
                "context": length + 1,
                **_timed(decode_step, shape, case, length, len(token), steps, rate, model.device),
                **checked,
                "compile_s": compile_seconds,
                "policy": case.policy and case.policy.to_dict(),
            }


def check(
    case: Variant, num_layers: int, rounding: float, length: int,
    found: Sequence[Tensor], right: Sequence[Tensor], near: Sequence[Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Compare a step's results with the `right` ones, layer after layer: what a record says of it.

    `near`: the right results of embeddings that differ by a rounding. Random weights attend almost evenly, so that a
    rounding also moves tokens in and out of a token set, and where the first layers choose already, every later layer
    goes on from there. So twice as much as such a rounding makes is allowed, and where that is more than `WRONG`, which
    other tokens would make too, nothing can be said. Raises `TidalError` where a result is off by more.
    """
    judged = 0
    error = limit = 0.0
    for number, results in enumerate(zip(found, right, near, strict=True)):
        if not results[0].numel():  # a layer that forgets tokens
            continue
        is_last = number == len(found) - 1
        error, spread = (relative_error(result, results[1]) for result in (results[0], results[2]))
        limit = max(tolerance(case, num_layers if is_last else number + 1, rounding), 2 * spread)
        if limit <= WRONG and not error <= limit:
            raise TidalError(
                f"bench: {'the logits' if is_last else f'the keys of layer {number}'} of {case.name} after {length} "
                f"tokens are off by a relative error of {error:.3g}; at most {limit:.3g} is expected"
            )
        judged += limit <= WRONG and not is_last
    if not math.isfinite(error):
        raise TidalError(f"bench: the logits of {case.name} after {length} tokens aren't finite")
    return {"relative_error": error, "relative_error_limit": limit, "layers_checked": judged}


def tolerance(case: Variant, num_layers: int, rounding: float) -> float:
    """The relative error between two right runs, at most: rounding in layers adds up as a random walk does.

    A sparse policy gets three times as much. Wrong sets, or wrong attention, are off by more: the logits of different
    policies by 0.6 to 1.3.
    """
    return rounding * num_layers**0.5 * (3 if case.is_sparse else 1)


def _timed(
    decode_step: Callable[[], Tensor], shape: Shape, case: Variant, length: int, batch: int, steps: int, rate: float,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Time warm steps: ms, the bytes that a step must read, and counts of what should not happen in the meantime."""
    counters = compat.inductor_counts()
    before = counters["cudagraph_skips"], _recorded(counters), _allocated(device)
    with torch.compiler.set_stance("fail_on_recompile") if case.name != "eager" else contextlib.nullcontext():
        ms = time_steps(decode_step, steps, device)
    after = counters["cudagraph_skips"], _recorded(counters), _allocated(device)
    skips, recorded, grown = (end - start for start, end in zip(before, after, strict=True))
    weights, kv = floor_bytes(shape, case, batch, length + WARM_UP + steps // 2)
    timing, tenth = summary(ms), max(1, steps // 10)
    return {
        "ms": timing,
        "first_tenth_ms": summary(ms[:tenth])["median"],
        "last_tenth_ms": summary(ms[-tenth:])["median"],
        "steps": steps,
        "weight_bytes": weights,
        "kv_bytes": kv,
        "floor_ms": (weights + kv) / rate * 1e3,
        "gb_per_s": (weights + kv) / timing["median"] / 1e6,
        "fraction_of_floor": (weights + kv) / rate * 1e3 / timing["median"],
        "cudagraph_skips": skips,
        "rerecorded": recorded,
        "memory_growth_bytes": grown,
    }


@torch.no_grad()
def expected_results(
    model: nn.Module, case: Variant, cache: Any, lengths: Sequence[int], token: Tensor, saved: dict[int, Any],
    nudge: float = 0.0,
) -> list[list[Tensor]]:  # fmt: skip
    """A step's results at each length, uncompiled: eager for dense cases, the reference ops for a policy.

    `nudge`: the relative size of noise that is added to the embeddings.
    """
    torch._dynamo.reset()
    forward = model.forward
    if case.policy is not None:
        forward = torch.compile(forward, backend=reference_backend(case.policy), fullgraph=True)
    tokens = {"inputs_embeds": _nudged(model, token, nudge)} if nudge else {"input_ids": token}
    expected = []
    for length in lengths:
        rewind(cache, length, saved)
        with _restored(cache, length):
            expected.append(_results(forward(**tokens, **with_cache(model, cache)).logits, cache, length))
    return expected


def _results(logits: Tensor, cache: Any, slot: int) -> list[Tensor]:
    """What a step leaves: the keys `[B, H, 1, D]` that each layer wrote to this slot, and the last logits `[B, V]`."""
    keys = []
    for layer in cache.layers:
        for one in _at_slot([layer], slot, "keys"):
            (scales,) = _at_slot([layer], slot, "scales") or (None,)
            keys.append(one.clone() if scales is None else as_numbers(one, scales[..., 0:1], torch.float32))
    return [*keys, logits[:, -1].clone()]


def _at_slot(layers: Sequence[Any], slot: int, *names: str) -> list[Tensor]:
    """What cache layers hold in a slot: `keys [B, H, 1, D]`, `values` or `scales`. No slot of those with fewer."""
    tensors = [getattr(layer, name, None) for layer in layers for name in names]
    return [tensor[:, :, slot : slot + 1] for tensor in tensors if tensor is not None and tensor.dim() == 4]


def _nudged(model: nn.Module, token: Tensor, nudge: float) -> Tensor:
    """The embeddings of `token [B, 1]` with noise of this relative size, the same each time."""
    embeddings = model.get_input_embeddings()(token)
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)).to(embeddings)
    return embeddings * (1 + nudge * noise)


@contextlib.contextmanager
def _restored(cache: Any, slot: int) -> Iterator[None]:
    """Restore one slot of a static cache at the end, whatever a step writes to it."""
    views = _at_slot(cache.layers, slot, "keys", "values", "scales")
    copies = [view.clone() for view in views]
    yield
    for view, copy in zip(views, copies, strict=True):
        view.copy_(copy)


def reference_backend(policy: Policy) -> Callable:
    """A backend that rewrites by the policy, puts the ops' definitions in their place, and compiles nothing."""

    @past_dynamo
    def run_uncompiled(gm: fx.GraphModule, _: Sequence[Any]) -> Callable:
        kept = apply_plan(gm, plan_graph(gm, Options.parse({"policy": policy})))
        added = [node for one in kept for node in one.nodes]  # what methods keep: definitions read the keys instead
        for node in gm.graph.nodes:
            if node.op == "call_function" and str(node.target).startswith("tidal."):
                node.target = DEFINITIONS[str(node.target).split(".")[1]]
                node.args = tuple(argument for argument in node.args if argument not in added)
        take_out_inputs(gm, kept)
        gm.recompile()
        return gm.forward

    return run_uncompiled


@torch.no_grad()
def generate_ms(
    model: nn.Module, case: Variant, cache: Any, length: int, token: Tensor, new_tokens: int, saved: dict[int, Any],
    own: bool = False,
) -> dict[str, float]:  # fmt: skip
    """ms a token that `model.generate`, or for a policy our `own`, takes for the same step: warm, between the tokens
    of a streamer.
    """
    from transformers import CompileConfig

    from ..backend import compile_config
    from ..generate import generate

    compat.forget_compilations(model)
    if case.policy is not None:
        options = {"compile_config": compile_config(case.policy)}
    else:
        options = {"disable_compile": True} if case.name == "eager" else {"compile_config": CompileConfig()}
    ids = torch.cat([token.new_ones(len(token), length), token], 1)
    for _ in range(2):  # the first call compiles
        rewind(cache, length, saved)
        clock = _Clock()
        common = {
            **with_cache(model, cache), "max_new_tokens": new_tokens, "do_sample": False, "streamer": clock,
            "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids),
        }  # fmt: skip
        generate(model, ids, case.policy, **common) if own else model.generate(ids, **common, **options)
    times = clock.times[3:]
    return summary([(after - before) * 1e3 for before, after in itertools.pairwise(times)])


class _Clock:
    """A streamer that records when each token arrives, by which time `generate` has brought it to the host."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.times.append(time.perf_counter())


def keeps_everything(model: nn.Module) -> bool:
    """Whether the model's cache can be rewound to any length: it has no sliding window and no recurrent state."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    return all(type(layer) is StaticLayer for layer in StaticCache(config=model.config, max_cache_len=8).layers)


def make_cache(model: nn.Module, batch: int, length: int, slots: int, kind: str = "auto") -> tuple[Any, dict[int, Any]]:
    """A cache with `length` random tokens, and copies of its layers that forget tokens, such as sliding windows."""
    cache = random_cache(model, length, slots, batch, kind)
    return cache, windows(cache)


def _compiled(forward: Callable, case: Variant, device: torch.device) -> Callable:
    if case.name == "eager":
        return forward
    if case.policy is not None:
        return torch.compile(forward, backend="tidal", fullgraph=True, options={"policy": case.policy})
    if case.name == "tensorrt":
        return torch.compile(forward, backend="tidal", fullgraph=True, options={"dense_compiler": "tensorrt"})
    graphs = case.name in ("reduce-overhead", "flash") and device.type == "cuda"
    return torch.compile(forward, fullgraph=True, mode="reduce-overhead" if graphs else None)


@contextlib.contextmanager
def _as_baseline(model: nn.Module, case: Variant, live: int) -> Iterator[Callable]:
    """The model's forward; for `flash`, with SDPA over the first `live` slots, without `repeat_kv` and without a mask.

    `flash` is the strong dense baseline: what a careful user of PyTorch could write by hand for a known length.
    """
    if case.name != "flash":
        yield model.forward
        return
    from transformers import AttentionInterface

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, :live], value[:, :, :live], scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None

    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    AttentionInterface.register("tidal_live_sdpa", attend)  # without a mask function: the mask is None
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with compat.attention_implementation(model, "tidal_live_sdpa"):
            yield model.forward
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


def _recorded(counters: dict[str, int]) -> int:
    """A count that rises with every CUDA graph that is recorded."""
    return counters["cudagraph_recorded_non_static_inputs"]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

"""Decode steps over a cache in float8, or of weights in int8 or int4: ms, and where they go.

`python benchmarks/quantised.py --weights auto --weights int4 --cache auto --cache fp8 --policy full --policy tidal`
times every combination over a cache of random tokens. Weights are packed (`tidal_compile.weights`); torchao-int8 and
torchao-int4 are as torchao holds them, the latter with PyTorch's kernel. Beside the step: the time of its attention
kernels, and of its linear layers, with the rate at which these read their weights, as a share of a device copy. Logits
of `full` are compared with the uncompiled model first. A step's kernels are read from one profile; needs a GPU.
"""

import collections
import gc
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from tidal_compile.bench.timing import copy_rate, relative_error
from tidal_compile.models import load_model, with_cache
from tidal_compile.provenance import provenance
from tidal_compile.run import random_cache, take_back
from tidal_compile.weights import PackedLinear, quantise

ATTENTION = ("_scan", "_gather", "_merge", "_merge_and_prepare", "_emit", "_sift", "_rank", "_take_turns")
LINEAR = ("_row", "_rows", "_linear_int4", "tinygemm", "gemv", "gemm")
WRONG = 0.1  # a relative error of logits that no rounding explains


def quantised(model: Any, weights: str) -> Any:
    """All linear layers, in place: packed, or as torchao holds them."""
    if not weights.startswith("torchao"):
        return quantise(model, weights)
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    tiles = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}
    quantize_(model, Int8WeightOnlyConfig() if weights == "torchao-int8" else Int4WeightOnlyConfig(**tiles))
    return model


def weight_bytes(model: Any) -> int:
    """Bytes of the linear layers, as they are stored: a step reads all of them."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            total += layer.held.nbytes + layer.scales.nbytes
        elif isinstance(layer, torch.nn.Linear):
            names = getattr(layer.weight, "tensor_data_names", None)
            parts = [layer.weight] if names is None else [getattr(layer.weight, name) for name in names]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def kernels_of(step: Callable[[], Any]) -> dict[str, float]:
    """The microseconds that each kernel of a step adds to it: what overlaps with an earlier one counts once."""
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        step()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        traced.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    spans = sorted((one["ts"], one["dur"], one["name"]) for one in events if one.get("cat") == "kernel")
    found: dict[str, float] = collections.defaultdict(float)
    end = 0.0
    for start, duration, name in spans:
        found[name] += max(0.0, start + duration - max(end, start))
        end = max(end, start + duration)
    return dict(found)


def sum_of(kernels: dict[str, float], names: tuple[str, ...]) -> float:
    """Microseconds of kernels that are called so, or have a long name with this in it."""
    long = [name for name in names if not name.startswith("_")]
    return sum(us for kernel, us in kernels.items() if kernel in names or any(name in kernel for name in long))


@torch.no_grad()
def measured(model: Any, cache: Any, policy: str, batch: int, steps: int) -> dict[str, Any]:
    """One policy: ms of a step, and its kernels."""
    torch._dynamo.reset()
    token = torch.full((batch, 1), 7, device="cuda")
    given = {"input_ids": token, **with_cache(model, cache)}
    error = None
    compiled = torch.compile(model.forward, backend="tidal", fullgraph=True, dynamic=False, options={"policy": policy})

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled(**given).logits
        take_back(cache, 1)
        return logits

    for _ in range(4):
        found = step()
    if policy == "full":
        error = relative_error(found[:, -1], model(**given).logits[:, -1])
        take_back(cache, 1)
        assert error < WRONG, f"the logits are off by a relative error of {error}"
    times = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # the host is ahead then
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {"ms": statistics.median(times), "relative_error": error, "kernels": kernels_of(step)}


def main(
    model: str = "random:llama-3.1-8b",
    weights: Annotated[
        list[str], typer.Option(help="auto, int8, int4, int4-32, torchao-int8, torchao-int4; repeat.")
    ] = ("auto", "int8", "int4"),
    cache: Annotated[list[str], typer.Option(help="auto or fp8; repeat.")] = ("auto", "fp8"),
    policy: Annotated[list[str], typer.Option(help="Repeat.")] = ("full", "tidal"),
    context: int = 100_000,
    batch: int = 1,
    layers: Annotated[int | None, typer.Option(help="Another depth.")] = None,
    steps: int = 30,
    out: Path = Path("out/quantised.json"),
) -> None:
    """Measure, and write JSON."""
    rate = copy_rate(torch.device("cuda"))
    about = {"model": model, "context": context, "batch": batch, "layers": layers, "copy_bytes_per_s": rate}
    result = {"kind": "quantised", **about, **provenance("cuda"), "records": []}
    for stored in weights:
        net = load_model(model, "cuda", torch.bfloat16, layers)
        size = weight_bytes(quantised(net, stored))
        for kind in cache:
            held = random_cache(net, context - 1, context + 8, batch, kind)
            of_layer = [getattr(held.layers[0], name, None) for name in ("keys", "values", "scales")]
            for name in policy:
                record = measured(net, held, name, batch, steps)
                kernels = record.pop("kernels")
                linear, top = sum_of(kernels, LINEAR), sorted(kernels.items(), key=lambda one: -one[1])[:14]
                record = {
                    "weights": stored, "cache": kind, "policy": name, **record,
                    "attention_us": sum_of(kernels, ATTENTION), "linear_us": linear, "weight_bytes": size,
                    "weights_share_of_copy": size / (linear * 1e-6) / rate if linear else None,
                    "cache_bytes": sum(one.nbytes for one in of_layer if one is not None) * len(held.layers),
                    "kernels_us": {kernel[:60]: round(us, 1) for kernel, us in top},
                }  # fmt: skip
                result["records"].append(record)
                print({key: value for key, value in record.items() if key != "kernels_us"}, flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n")
            del held
        del net
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)

"""What a GPU of a given size decodes with the KV cache in host memory, beside a dense cache that has to fit.

`python benchmarks/capacity.py --limit 24 --case 98304x1 --case 32768x8` holds PyTorch, and what the driver takes, to so
many GiB. Weights and cache are random, and the batch decodes greedily. Each case runs

    magicpig_cpu   MagicPIG's system: samples are looked up and attended to by the CPU
    tidal          the layers that reuse tokens are in host memory, and read these over PCIe
    full on host   every token, which the GPU reads over PCIe: what offloading a cache costs without sparsity
    full           a StaticCache on the GPU, as far as it fits

and writes tokens/s, the peaks of GPU and host memory, and what the first step after a prompt takes, which sorts tables.
`--prompt` reads a prompt of random tokens instead of filling the cache, so that the peak is that of a prefill, too.
"""

import gc
import itertools
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import StaticCache

import tidal_compile as tc
from tidal_compile.kernels.host import step as host_step
from tidal_compile.models import load_model
from tidal_compile.provenance import provenance
from tidal_compile.run import rewind

WARM_UP = 6
CHUNK = 1024  # tokens of a prompt at a time


def empty(cache: Any, batch: int, model: Any) -> Any:
    """Allocate what the cache holds."""
    config = model.config
    states = torch.zeros(
        batch, config.num_key_value_heads, 1, config.head_dim, dtype=model.dtype, device=model.device
    )  # fmt: skip
    for layer in cache.layers:
        layer.lazy_initialization(states, states)
    return cache


def fill(cache: Any, length: int) -> None:
    """Random keys and values, in place of a prompt."""
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor[:, :, :length].normal_()
        layer.cumulative_length.fill_(length)


@torch.no_grad()
def measure(
    model: Any, policy: Any, cache: Any, length: int, batch: int, steps: int, prompt: bool, threads: list[int]
) -> dict[str, Any]:
    """Prefill, and decode: times, and the peak of GPU memory."""
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    record: dict[str, Any] = {}
    start = time.perf_counter()
    empty(cache, batch, model)
    torch.cuda.synchronize()
    record["allocate_s"] = time.perf_counter() - start
    token = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
    start = time.perf_counter()
    if prompt:
        ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
        for part in ids.split(CHUNK, 1):
            model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    else:
        fill(cache, length)
    torch.cuda.synchronize()
    record["fill_s"], record["peak_of_fill_bytes"] = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    step = torch.compile(model.forward, backend="tidal", fullgraph=True, options={"policy": policy})

    def one_step() -> float:
        torch.compiler.cudagraph_mark_step_begin()
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = step(input_ids=token, past_key_values=cache).logits[:, -1]
        token.copy_(logits.argmax(-1, keepdim=True))
        torch.cuda.synchronize()
        assert logits.isfinite().all()
        return time.perf_counter() - start

    seconds = [one_step() for _ in range(WARM_UP + steps)]
    warm = statistics.median(seconds[WARM_UP:])
    for number in threads:
        for one in host_step._exchanges.values():
            one.call.threads = number
        record.setdefault("ms_by_threads", {})[number] = statistics.median(one_step() for _ in range(steps)) * 1e3
    rewind(cache, length)
    record["first_step_s"] = one_step()
    return record | {"compile_s": seconds[0], "ms": warm * 1e3, "tokens_per_s": batch / warm}


def host_peak() -> int:
    """Bytes of the host that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    case: Annotated[list[str], typer.Option(help="<context>x<batch>; repeat.")] = ("98304x1",),
    limit: Annotated[float, typer.Option(help="GiB of GPU memory; 0: all.")] = 24.0,
    model: Annotated[str, typer.Option()] = "random:llama-3.1-8b",
    variant: Annotated[list[str], typer.Option(help="Repeat.")] = (
        "magicpig_cpu",
        "tidal",
        "full on host",
        "full",
    ),
    steps: int = 30,
    prompt: Annotated[bool, typer.Option(help="Read a prompt.")] = False,
    threads: Annotated[list[int], typer.Option(help="Time the CPU's part with so many, too.")] = (),
    out: Path = Path("out/capacity.json"),
) -> None:
    """Measure, and write JSON."""
    free, total = torch.cuda.mem_get_info()
    of_driver = total - free
    if limit:
        torch.cuda.set_per_process_memory_fraction((limit * 2**30 - of_driver) / total)
    net = load_model(model, "cuda", torch.bfloat16)
    result: dict[str, Any] = {"kind": "capacity", "model": model, "limit_gib": limit, "driver_bytes": of_driver}
    result |= provenance("cuda") | {"weights_bytes": torch.cuda.memory_allocated(), "records": []}
    for one, name in itertools.product(case, variant):
        context, batch = map(int, one.split("x"))
        slots = context + WARM_UP + steps * (1 + len(threads))
        record = {"case": one, "variant": name, "context": context, "batch": batch, "prompt": prompt}
        number = net.config.num_hidden_layers
        kv_bytes = 2 * batch * slots * number * net.config.num_key_value_heads * net.config.head_dim * 2
        try:
            policy = name.removesuffix(" on host")
            if name.endswith("on host"):
                cache = tc.HostCache(net.config, slots, layers=range(number))
            elif name == "full":
                cache = StaticCache(config=net.config, max_cache_len=slots)
            else:
                cache = tc.HostCache(net.config, slots, policy)
            record |= measure(net, policy, cache, context, batch, steps, prompt, threads)
        except torch.OutOfMemoryError as error:
            record["error"] = str(error).split(". If")[0]
        peak = torch.cuda.max_memory_allocated()
        record |= {"kv_bytes": kv_bytes, "peak_gpu_bytes": peak, "reserved_gpu_bytes": torch.cuda.max_memory_reserved()}
        record["peak_gpu_bytes_with_driver"] = of_driver + torch.cuda.max_memory_reserved()
        record["peak_host_bytes_so_far"] = host_peak()
        cache = None
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        result["records"].append(record)
        print(json.dumps(record), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""Times and rates: a GPU is timed by CUDA events, a CPU by the wall clock."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    percentiles = statistics.quantiles(values, n=100, method="inclusive")  # the first is the 1st percentile
    return {"median": statistics.median(values), "p10": percentiles[9], "p90": percentiles[89]}


def time_steps(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """ms from the end of each call to the end of the next. The host doesn't wait, so that a GPU's queue stays full."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [(after - before) * 1e3 for before, after in itertools.pairwise(marks)]
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 20) -> list[float]:
    """us a call, `repeats` times. On a GPU all calls are one CUDA graph, so that the times contain no launch.

    The calls should read copies of the data that are together larger than the L2 cache; otherwise L2 is measured.
    """
    if device.type != "cuda":
        for call in calls:
            call()
        return [ms * 1e3 / len(calls) for ms in time_steps(lambda: [call() for call in calls], repeats, device)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles the kernels, which a capture doesn't allow
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    time_steps(graph.replay, 3, device)
    return [ms * 1e3 / len(calls) for ms in time_steps(graph.replay, repeats, device)]


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy on the device reads and writes: what this project calls the memory rate."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    time_steps(lambda: target.copy_(source), 3, device)
    ms = statistics.median(time_steps(lambda: target.copy_(source), 20, device))
    return 2 * source.nbytes / (ms / 1e3)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| over all elements."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return difference.item()

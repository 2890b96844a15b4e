"""The private parts of torch and transformers on which this package stands: here, and nowhere else.

Each function says what it needs of them, so that a new version can be checked in one place.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import ShortenTraceback
from torch._guards import CompileContext, detect_fake_mode
from torch._inductor import list_mode_options, list_options
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

__all__ = [
    "CompileContext",
    "FakeTensor",
    "FakeTensorMode",
    "ShortenTraceback",
    "attention_implementation",
    "batched_experts",
    "detect_fake_mode",
    "forget_compilations",
    "free_unbacked_symbols",
    "has_model",
    "inductor_counts",
    "kernels_that_wait",
    "list_mode_options",
    "list_options",
    "mark_static_input",
    "note_cache_layers",
    "rank_in",
    "source_of",
    "told_by_all",
    "traced_arguments",
]

CACHE_LAYER = "cache_layer"  # in the metadata of a graph input that is a tensor of a cache layer: the layer's class


def source_of(node: fx.Node) -> str:
    """Where Dynamo says that a graph input comes from, such as `L['past_key_values'].layers[3].keys`; else ""."""
    source = getattr(node, "_dynamo_source", None)
    return source.name if source is not None else ""


def rank_in(group: str) -> tuple[int, int]:
    """This process's rank in a process group, by the name that functional collectives have for it, and its size."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    found = _resolve_process_group(group)
    return found.rank(), found.size()


def told_by_all(group: str, mine: Any) -> list[Any]:
    """What each process of a group says, in order; each must ask. A group of fakes says what this one does."""
    from torch import distributed
    from torch.distributed.distributed_c10d import _resolve_process_group

    found = _resolve_process_group(group)
    if distributed.get_backend(found) == "fake":
        return [mine] * found.size()
    said: list[Any] = [None] * found.size()
    distributed.all_gather_object(said, mine, group=found)
    return said


def mark_static_input(node: fx.Node) -> None:
    """Mark an input that was added to Dynamo's graph as a tensor that keeps its address, as those of a static cache."""
    from torch._dynamo.source import LocalSource

    node._dynamo_source = LocalSource(node.name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def traced_arguments() -> dict[str, Any] | None:
    """The local variables of the function that Dynamo is compiling, its arguments among them; None outside of it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx.f_locals
    except AttributeError:  # a backend that was called by hand
        return None


def note_cache_layers(gm: fx.GraphModule) -> None:
    """Note, beside the graph inputs that belong to layers of a cache, which class these layers have.

    Sources are Python expressions over the local variables `L` of the function that is compiled. They can be looked up
    while Dynamo runs; what was noted stays with the nodes, and with copies of them.
    """
    local = traced_arguments()
    for node in gm.graph.nodes if local is not None else ():
        owner, _, _ = source_of(node).rpartition(".")
        if node.op == "placeholder" and ".layers[" in owner and owner.endswith("]") and owner.startswith("L["):
            with suppress(LookupError, AttributeError):  # `match` refuses a layer of which nothing is noted
                node.meta[CACHE_LAYER] = type(eval(owner, {"__builtins__": {}}, {"L": local}))


@contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    """Let a transformers model take its attention from the interface's function of this name, whatever it supports."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def batched_experts(model: Any) -> Iterator[None]:
    """Let a transformers model run its experts by batched matrix products where it would by grouped ones."""
    grouped = getattr(model.config, "_experts_implementation", None) == "grouped_mm"
    if grouped:
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        if grouped:
            model.set_experts_implementation("grouped_mm")


def has_model(auto_class: Any, config: Any) -> bool:
    """Whether one of transformers' auto classes knows a model for a config."""
    return type(config) in auto_class._model_mapping


def forget_compilations(model: Any) -> None:
    """Start anew, with what Dynamo compiles and with what the model's `generate` has compiled."""
    torch._dynamo.reset()
    model._last_compile_config = None


@contextmanager
def kernels_that_wait() -> Iterator[None]:
    """Let each of Inductor's kernels wait for the one before it, where `triton.enable_pdl` lets it begin early.

    Inductor leaves the wait out where the scheduler's node before writes nothing that is read. But that node may launch
    nothing, as an output of an operator that has several, and then the kernel could read what isn't written yet.
    Where there is no node before, it waits.
    """
    from torch._inductor.scheduler import Scheduler

    Scheduler.previous_node = property(lambda _: None, lambda *_: None)
    try:
        yield
    finally:
        del Scheduler.previous_node


def inductor_counts() -> dict[str, int]:
    """What Inductor counts in this process, by name: CUDA graphs that it skipped or recorded, for example."""
    from torch._dynamo.utils import counters

    return counters["inductor"]


class _Named(str):
    """The name of a function, equal to the function: torch 2.11 writes its configuration as JSON, functions and all."""

    function: Any = None

    def __eq__(self, other: object) -> bool:
        return other == self.function if callable(other) else str.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(self.function)


def ignore_warning_of_attention_weights() -> None:
    """Let Dynamo trace past a warning of transformers' SDPA function, which it would refuse in words of its own."""
    from transformers.integrations import sdpa_attention

    named = _Named("sdpa_attention.logger.warning_once")
    named.function = sdpa_attention.logger.warning_once
    getattr(torch._dynamo.config, "ignore_logger_methods", set()).add(named)


def compile_on_every_device(config: Any) -> Any:
    """Let `generate` compile on a CPU as well under this `CompileConfig`."""
    config._compile_all_devices = True
    return config


def has_float8(device: torch.device) -> bool:
    """Whether kernels can read float8 on a device: a CPU, or a GPU that has an instruction for it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)

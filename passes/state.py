"""Tensors that a method keeps beside the KV cache, such as bounds of pages: inputs that the decode graph updates.

Graph in: the decode graph, and for each selection whose method keeps something, the node of its keys. Graph out: the
same graph object with an input more for each such tensor, behind its own inputs,

    index = tidal::choose_by_pages(call, selection, method, bounds)      which also takes the step's key into `bounds`

and `around` wraps the compiled graph into a function that hands these tensors over. There is a set for each cache and
method, made at the first step. It lives as long as the cache's key tensor, whose memory it stays beside, so CUDA graphs
find both at the same addresses.

What is kept follows from the keys alone (`Method.summarize`), or from the call that the next step will make
(`Method.prepare`), whose mask is computed ahead by a copy of the nodes that lead to it. A tensor's version counts the
writes to it: when somebody else has written to the keys since our last step (a prefill, a reset, a reorder), it is made
anew, on the device. Writes that PyTorch doesn't count, by way of `.data` or of raw pointers, can't be seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.call import Call, Selection
from ..kernels.methods import Method
from ..kernels.reference import dequantised
from .compat import mark_static_input
from .counters import reachable


@dataclass(frozen=True)
class KeptInput:
    """What a method keeps beside the keys that are input number `key` of the graph: the inputs `nodes`.

    `scales`: the number of the input that keys in float8 are multiplied by, to be of this `dtype`. `call`: of the
    graph's inputs, the call that the step will make, for a method that `prepares`.
    """

    key: int
    scales: int | None
    dtype: torch.dtype
    method: Method
    selection: Selection
    nodes: tuple[fx.Node, ...]
    call: Callable[..., Call[Tensor]] | None


@dataclass
class _Kept:
    """The tensors of one cache layer and method, and the version of the keys that they follow from."""

    tensors: tuple[Tensor, ...]
    version: int  # -1: not made yet
    graphs: set[KeptInput]  # that have been told of them


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of each key tensor: {method: _Kept}


def add_inputs(gm: fx.GraphModule, call: Call[fx.Node], selection: Selection, method: Method) -> KeptInput:
    """Add an input for each tensor that the method keeps beside the keys of a call, behind all that the graph has."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    key = call.key
    example = key.meta["example_value"]
    scales = None if call.scales is None else call.scales.meta["example_value"]
    dtype = call.query.meta["example_value"].dtype
    ahead = _call_ahead(gm, call, inputs) if method.prepares else None
    with example.fake_mode:
        values = method.summarize(_as_numbers(example, scales, dtype))
    nodes = []
    for name, value in zip(method.keeps, values, strict=True):
        with gm.graph.inserting_after([*inputs, *nodes][-1]):
            node = gm.graph.placeholder(f"{name}_{key.name}")
        node.meta["example_value"] = value
        mark_static_input(node)
        nodes.append(node)
    of_scales = None if call.scales is None else inputs.index(call.scales)
    return KeptInput(inputs.index(key), of_scales, dtype, method, selection, tuple(nodes), ahead)


def _as_numbers(key: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys as a method takes them."""
    return key if scales is None else dequantised(key, scales[..., 0]).to(dtype)


def _call_ahead(gm: fx.GraphModule, call: Call[fx.Node], inputs: list[fx.Node]) -> Callable[..., Call[Tensor]]:
    """A function of the graph's inputs: the call that a step will make. The query is as large as it will be."""
    wanted = (call.key, call.value, call.length, call.mask, call.sink_logit)
    start = [node for node in wanted if node is not None]
    needed = {*start} | reachable(start, lambda node: node.all_input_nodes)
    graph, copies = fx.Graph(), {}
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(None if node is None else copies[node] for node in wanted))
    ahead = fx.GraphModule(gm, graph)
    taken = [number for number, node in enumerate(inputs) if node in needed]
    query_shape = tuple(map(int, call.query.meta["example_value"].shape[1:]))

    def call_of(*values: Any) -> Call[Tensor]:
        key, value, length, mask, sink_logit = ahead(*(values[number] for number in taken))
        query = torch.empty((key.shape[0], *query_shape), dtype=key.dtype, device=key.device)
        return Call(query, key, value, length + 1, mask, call.scale, sink_logit, call.softcap)

    return call_of


def examples(kept: Sequence[KeptInput]) -> list[Tensor]:
    """Example inputs for compiling the graph, for the inputs that were added."""
    return [node.meta["example_value"] for one in kept for node in one.nodes]


def take_out_inputs(gm: fx.GraphModule, kept: Sequence[KeptInput]) -> None:
    """Erase the added inputs from a graph that is compiled: Dynamo looks for a source of each input afterwards."""
    assert gm.code  # where the module itself is to run: it may put off writing its code
    for one in kept:
        for node in one.nodes:
            node.replace_all_uses_with(next(iter(gm.graph.nodes)))
            gm.graph.erase_node(node)


def around(kept: Sequence[KeptInput], compiled: Callable) -> Callable:
    """Wrap the compiled graph into a function of the inputs that the graph had before.

    It raises RuntimeError for a cache that was made under `torch.inference_mode()`.
    """
    if not kept:
        return compiled

    def run(*inputs: Any) -> Any:
        beside = [_up_to_date(one, inputs) for one in kept]
        out = compiled(*inputs, *(tensor for each in beside for tensor in each.tensors))
        for one, each in zip(kept, beside, strict=True):
            each.version = inputs[one.key]._version
        return out

    return run


@torch.no_grad()
def _up_to_date(one: KeptInput, inputs: tuple) -> _Kept:
    """What the method keeps beside the keys, as these are now."""
    key, method = inputs[one.key], one.method
    if key.is_inference():
        raise RuntimeError(
            "tidal: the cache was made under torch.inference_mode(), where PyTorch doesn't count writes to it, so "
            "nobody can tell when what is kept beside it is out of date; prefill and decode under torch.no_grad()"
        )
    scales = None if one.scales is None else inputs[one.scales]
    methods = _kept.setdefault(key, {})
    if method not in methods:
        made = method.summarize(_as_numbers(key, scales, one.dtype))
        methods[method] = _Kept(made, -1 if method.prepares else key._version, set())
    kept = methods[method]
    if one.call is None:
        if kept.version != key._version:
            method.renew(_as_numbers(key, scales, one.dtype), *kept.tensors)
    elif kept.version != key._version or one not in kept.graphs:
        call = one.call(*inputs)
        if kept.version != key._version:
            kept.version = -1
            method.prepare(call, one.selection, *kept.tensors)
        method.connect(call, *kept.tensors)
        kept.graphs.add(one)
    kept.version = key._version
    return kept

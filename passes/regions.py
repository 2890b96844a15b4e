"""Hand the dense parts of a decode step to another compiler.

Graph in: Dynamo's decode graph after `rewrite`, in which our ops and the writes to the cache stand between projections,
norms and MLPs. Graph out: the same graph object, edited in place, where these are regions, one call each,

    tidal::region(number, [activations]) -> [activations]

of what the other compiler made of a graph module with the weights in it. A region has no write, no op of ours, and
nothing that was read from a cache; what goes in and out are floating activations. All else keeps its order, and goes to
Inductor with the calls, so that the whole step is captured once.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from ..errors import UnsupportedModelError
from .compat import source_of
from .forms import target_name
from .match import CACHED
from .rewrite import insert_call

Compiler = Callable[[fx.GraphModule, Sequence[Tensor]], Callable]  # a module, and inputs such as it will get

OUT_OF_PLACE = {
    operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
}  # fmt: skip

METHODS = {"masked_fill_", "clamp_", "relu_", "scatter_", "masked_scatter_"}  # that have a form without the last letter

READS = {"sum", "lt", "le", "gt", "ge", "eq", "ne"}  # what reads a tensor and gives no view of it

NEW = {"topk", "sort", "softmax", "linear", "matmul", "mul", "add", "sub", "truediv", "sigmoid"}  # outputs, no views


@dataclass(eq=False)
class Region:
    """A part of a step: what the other compiler made of it."""

    outputs: tuple[Tensor, ...]  # fake ones
    compiled: Callable

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """Contiguous outputs that are new tensors, as those of an op must be."""
        found = self.compiled(*inputs)
        taken = {one.untyped_storage().data_ptr() for one in inputs}
        new = []
        for out in [found] if isinstance(found, Tensor) else found:
            out = out.contiguous()
            new.append(out.clone() if out.untyped_storage().data_ptr() in taken else out)
            taken.add(new[-1].untyped_storage().data_ptr())
        return new


_regions: WeakValueDictionary[int, Region] = WeakValueDictionary()  # as long as their step


@torch.library.custom_op("tidal::region", mutates_args=())
def run_region(number: int, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of a region, by its number in this process."""
    return _regions[number](inputs)


@run_region.register_fake
def _(number, inputs):
    like = inputs[0]
    return [like.new_empty(one.shape, dtype=one.dtype) for one in _regions[number].outputs]


def take_out_regions(gm: fx.GraphModule, inputs: Sequence[Any], compiler: Compiler) -> list[Region]:
    """Put every region through `compiler`; returns them, since the graph holds them by number only.

    `inputs` are the graph's. What has no fixed size is in no region. Raises `UnsupportedModelError` for a graph that
    writes into an activation.
    """
    weights = {
        node: value
        for node, value in zip(_placeholders(gm), inputs, strict=True)
        if isinstance(value, torch.nn.Parameter) and value.is_floating_point()
    }
    _spare_writes(gm)
    inside, outside = _levels(gm)
    regions = []
    for level in sorted(set(inside.values())):
        nodes = [node for node, its in inside.items() if its == level]
        later = next((node for node, its in outside.items() if its > level and node.op != "placeholder"), None)
        regions.append(_take_out(gm, nodes, later or _output(gm), weights, compiler))
    gm.graph.lint()
    gm.recompile()
    return regions


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _spare_writes(gm: fx.GraphModule) -> None:
    """Let `x /= y`, `x.masked_fill_(y, 0)` and the like make a new tensor where x has no other name."""
    for node in gm.graph.nodes:
        new = OUT_OF_PLACE.get(node.target) or (node.target[:-1] if node.target in METHODS else None)
        if new is None or not isinstance(node.args[0], fx.Node) or _promotes(node):
            continue
        before = node.args[0]
        earlier = [user for user in before.users if user < node]
        if _is_new(before) and all(target_name(user) in READS for user in earlier):
            node.target = new
            before.replace_all_uses_with(node, lambda user, write=node: user > write)


def _promotes(node: fx.Node) -> bool:
    """Whether a new tensor in place of a write could have another dtype than what was written to."""
    dtype, *others = [value.dtype for value in map(_value, node.all_input_nodes) if isinstance(value, Tensor)]
    return any(other not in (dtype, torch.bool, torch.int64) for other in others)


def _is_new(node: fx.Node) -> bool:
    """Whether a node's output is no view: of an op that is known to make one, or rows taken by an index."""
    if node.target is not operator.getitem:
        return target_name(node) in NEW or f"{target_name(node)}_" in METHODS
    source, index = node.args
    if isinstance(index, fx.Node):
        return isinstance(_value(index), Tensor)
    return isinstance(_value(source), tuple) and target_name(source) in NEW


def _output(gm: fx.GraphModule) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.op == "output")


def _levels(gm: fx.GraphModule) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """The number of each node's region, and of each other node the number of the first region that may need it.

    Region n comes behind all others up to number n, and before those with a larger one.
    """
    inside: dict[fx.Node, int] = {}
    outside: dict[fx.Node, int] = {}
    cached: set[fx.Node] = set()  # what is, or was read from, a cache
    now = 0  # nodes of no region keep their order: each is behind the regions that any before it needed
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            outside[node] = 0
            if CACHED.search(source_of(node)):
                cached.add(node)
            continue
        before = node.all_input_nodes
        into = before[0] if _writes(node) and before else None  # numbers are never in a region
        if into is not None and into.op != "placeholder" and into not in cached and _is_floating(_value(into)):
            raise UnsupportedModelError(
                f"dense_compiler: the step writes into an activation in place ({target_name(node)} of {into.name})"
            )
        reads_cache = any(one in cached for one in before)
        if reads_cache and not _attends(node):
            cached.add(node)
        if reads_cache or not _is_dense(node):
            now = max([now, *(inside[one] + 1 for one in before if one in inside)])
            outside[node] = now
        else:
            inside[node] = max([0, *(inside.get(one, outside.get(one, 0)) for one in before)])
    return inside, outside


def _writes(node: fx.Node) -> bool:
    if not node.op.startswith("call_"):
        return False
    name = target_name(node)
    return (
        node.target in OUT_OF_PLACE
        or node.target is operator.setitem
        or (name.endswith("_") and not name.endswith("__"))
    )


def _attends(node: fx.Node) -> bool:
    """Whether a node that reads a cache gives an activation: one of our ops, or attention that was left alone."""
    return _is_ours(node) or "attention" in target_name(node)


def _is_ours(node: fx.Node) -> bool:
    return str(node.target).startswith("tidal.") or (
        node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_ours(node.args[0])
    )


def _is_dense(node: fx.Node) -> bool:
    """Whether a node computes a floating tensor of fixed size from such tensors, and nothing else."""
    if node.op not in ("call_function", "call_method") or _writes(node) or _is_ours(node):
        return False
    if "c10d" in str(node.target):
        return False
    values = [_value(node), *map(_value, node.all_input_nodes)]
    return bool(node.all_input_nodes) and all(_is_floating(value) for value in values)


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _is_floating(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.is_floating_point() and all(isinstance(size, int) for size in value.shape)
    )


def _take_out(
    gm: fx.GraphModule, nodes: list[fx.Node], place: fx.Node, weights: dict[fx.Node, Tensor], compiler: Compiler
) -> Region:  # fmt: skip
    """Replace the nodes of a region by a call before `place`."""
    own = set(nodes)
    needed = dict.fromkeys(one for node in nodes for one in node.all_input_nodes if one not in own)
    activations = [one for one in needed if one not in weights]
    outputs = [node for node in nodes if any(user not in own for user in node.users)]
    graph, copies, attributes = fx.Graph(), {}, {}
    for one in activations:
        copies[one] = graph.placeholder(one.name)
    for one in needed:
        if one in weights:
            attributes[one.name] = weights[one]
            copies[one] = graph.get_attr(one.name)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    root = torch.nn.Module()
    for name, weight in attributes.items():
        root.register_parameter(name, torch.nn.Parameter(weight.detach(), requires_grad=False))
    module = fx.GraphModule(root, graph)
    examples = [_like(one.meta["example_value"]) for one in activations]
    region = Region(tuple(node.meta["example_value"] for node in outputs), compiler(module, examples))
    _regions[id(region)] = region
    with gm.graph.inserting_before(place):
        call = insert_call(gm, nodes[0], torch.ops.tidal.region.default, (id(region), activations))
        found = [insert_call(gm, node, operator.getitem, (call, number)) for number, node in enumerate(outputs)]
    for node, now in zip(outputs, found, strict=True):
        node.replace_all_uses_with(now)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    return region


def _like(fake: Tensor) -> Tensor:
    """A real tensor such as a fake one."""
    return torch.zeros_like(torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device))

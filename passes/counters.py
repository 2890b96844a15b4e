"""Take the host's token counters out of the decode graph of a model with sliding windows.

A sliding-window layer of the cache keeps a Python number beside its tensors, `...layers[i].cumulative_length_int`. It
grows by one a token, and CUDA graphs would record the step anew for every value that a graph takes as an input.

Graph in: Dynamo's graph, in which a counter is an integer input. Masks and positions may be computed from it, and the
graph returns it increased:

    mask = arange < counter + 1;  return logits, counter + 1

Graph out: the same graph object, edited in place, in which the counter is a 0-d int64 tensor on the device, and which
doesn't return it any more:

    mask = arange < counter + 1;  return logits

The rest is for the host: `Counters.around` wraps the compiled graph into a function that takes and returns numbers as
the graph did before.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .compat import detect_fake_mode, source_of
from .forms import target_name

COUNTER = ".cumulative_length_int"
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.neg, torch.sym_max, torch.sym_min)
ELEMENTWISE = (
    operator.add, operator.sub, operator.mul, operator.lt, operator.le, operator.gt, operator.ge, operator.eq,
)  # fmt: skip


@dataclass(frozen=True)
class Counters:
    """What was taken out of a graph. `placeholders`, `devices` and `read` have an item for each input of the graph.

    `devices`: the device of the tensor that replaces the input, None for an input that stays what it was;
    `read`: whether the edited graph reads the input;
    `arithmetic`: how to compute the numbers that are not returned any more, as (node, function, arguments), in order;
    `outputs`: for each output that the graph had, its node if it is one of these numbers, otherwise None.
    """

    placeholders: tuple[fx.Node, ...]
    devices: tuple[torch.device | None, ...]
    read: tuple[bool, ...]
    arithmetic: tuple[tuple[fx.Node, Callable, tuple], ...]
    outputs: tuple[fx.Node | None, ...]

    def as_tensors(self, inputs: Sequence[Any]) -> list[Any]:
        """The example inputs of the graph before, as example inputs for compiling the edited graph."""
        pairs = zip(inputs, self.devices, strict=True)
        return [value if device is None else _tensor(0, device) for value, device in pairs]

    def around(self, compiled: Callable) -> Callable:
        """Wrap the compiled edited graph into a function with the inputs and outputs of the graph before."""
        counters = [i for i, device in enumerate(self.devices) if device is not None]
        unread = {i: _tensor(0, self.devices[i]) for i in counters if not self.read[i]}  # made once: any value will do
        needed = {argument for _, _, arguments in self.arithmetic for argument in arguments} | set(self.outputs)
        numbers = [(i, node) for i, node in enumerate(self.placeholders) if node in needed]

        def run(*inputs: Any) -> list[Any]:
            values = {node: inputs[i] for i, node in numbers}
            for node, function, arguments in self.arithmetic:
                values[node] = function(*(values.get(argument, argument) for argument in arguments))
            edited = list(inputs)
            for i in counters:
                edited[i] = unread[i] if i in unread else _tensor(inputs[i], self.devices[i])
            returned = iter(compiled(*edited))
            return [next(returned) if node is None else values[node] for node in self.outputs]

        return run


@dataclass(frozen=True)
class _Flow:
    """The nodes of a graph that its counters lead to, each group in the order of the graph.

    `derived`: numbers computed from counters, directly or through other numbers;
    `consumers`: nodes other than numbers that read a counter or a derived number, without the output node;
    `returned`: the counters and derived numbers that the graph returns;
    `host`: the calls that compute `returned` from the inputs of the graph.
    """

    counters: list[fx.Node]
    derived: list[fx.Node]
    consumers: list[fx.Node]
    returned: list[fx.Node]
    host: list[fx.Node]

    @property
    def unknown(self) -> list[fx.Node]:
        """The calls that may not work with tensors in place of numbers or, of `host`, outside the graph."""
        odd = [node for node in (*self.derived, *self.host) if node.target not in ARITHMETIC]
        return odd + [node for node in self.consumers if not _is_tensor(node) or node.target not in ELEMENTWISE]


def take_out_counters(gm: fx.GraphModule) -> Counters | None:
    """Edit the graph in place, in three steps:

    1. The graph no longer returns counters and derived numbers; the result says how the host computes them.
    2. Derived numbers that only the outputs needed are erased.
    3. Counters, and the derived numbers that are left, become 0-d tensors.

    Returns None, and edits nothing, if the graph has no counter, or does `unknown_arithmetic` with one.
    """
    flow = _follow_counters(gm)
    if not flow.counters or flow.unknown:
        return None
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    device = next(node.meta["example_value"].device for node in placeholders if _is_tensor(node))
    arithmetic = tuple((node, node.target, node.args) for node in flow.host)  # read before the nodes are edited
    output = _output(gm)
    outputs = tuple(node if node in flow.returned else None for node in output.args[0])

    output.args = (tuple(node for node in output.args[0] if node not in flow.returned),)
    for node in reversed(flow.derived):
        if not node.users:
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if node in flow.counters or node in flow.derived:
            _make_tensor(node, device)
    gm.graph.lint()
    gm.recompile()
    return Counters(
        placeholders=tuple(placeholders),
        devices=tuple(device if node in flow.counters else None for node in placeholders),
        read=tuple(bool(node.users) for node in placeholders),
        arithmetic=arithmetic,
        outputs=outputs,
    )


def unknown_arithmetic(gm: fx.GraphModule) -> list[str]:
    """What a graph does with token counters beside positions and masks: the names of functions. They keep it from CUDA
    graphs, which would be recorded anew for every token.
    """
    flow = _follow_counters(gm)
    return sorted({target_name(node) for node in flow.unknown}) if flow.counters else []


def _follow_counters(gm: fx.GraphModule) -> _Flow:
    """Find the counters of a graph, and follow them to what is computed from them."""
    output, nodes = _output(gm), list(gm.graph.nodes)
    counters = [node for node in nodes if node.op == "placeholder" and _is_counter(node)]
    derived = reachable(counters, lambda node: [user for user in node.users if _is_number(user)])
    users = {user for node in (*counters, *derived) for user in node.users}
    returned = [node for node in output.args[0] if node in derived or node in counters]
    needed = {*returned} | reachable(returned, lambda node: node.all_input_nodes)
    return _Flow(
        counters=counters,
        derived=[node for node in nodes if node in derived],
        consumers=[node for node in nodes if node in users and node not in derived and node is not output],
        returned=returned,
        host=[node for node in nodes if node in needed and node.op != "placeholder"],
    )


def _make_tensor(node: fx.Node, device: torch.device) -> None:
    """Turn a counter, or a number derived from what is already turned, into a 0-d tensor."""
    if node.target in (torch.sym_max, torch.sym_min):
        largest = node.target is torch.sym_max
        first, second = node.args
        tensor, limit = (first, second) if _is_tensor(first) else (second, first)
        if _is_tensor(limit):
            node.target = torch.maximum if largest else torch.minimum
        else:  # a number, which `maximum` and `minimum` don't take
            node.target, node.args, node.kwargs = torch.clamp, (tensor,), {"min" if largest else "max": limit}
    node.type = None
    with detect_fake_mode():
        if node.op == "placeholder":
            node.meta["example_value"] = _tensor(0, device)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["example_value"])
            node.meta["example_value"] = node.target(*args, **kwargs)


def _tensor(value: int, device: torch.device) -> torch.Tensor:
    """A number on the device, put there by a kernel: a copy from the host would wait for the stream."""
    return torch.full((), value, dtype=torch.int64, device=device)


def _output(gm: fx.GraphModule) -> fx.Node:
    return next(iter(gm.graph.find_nodes(op="output")))


def reachable(start: list[fx.Node], neighbours: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    """The nodes that one step or more lead to from `start`."""
    reached: set[fx.Node] = set()
    queue = list(start)
    while queue:
        fresh = [node for node in neighbours(queue.pop()) if node not in reached]
        reached.update(fresh)
        queue.extend(fresh)
    return reached


def _is_counter(node: fx.Node) -> bool:
    return _is_number(node) and source_of(node).endswith(COUNTER)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymInt)


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("example_value"), torch.Tensor)

"""Take the host's token counters out of the decode graph of a model with sliding windows.

Graph in: a graph with integer inputs `...layers[i].cumulative_length_int`, a Python number that a sliding-window layer
keeps beside its tensors. It grows by one a token, masks and positions may be computed from it, and the graph returns it
increased. CUDA graphs would record the step anew for every value.

Graph out: the same graph object, in which these inputs are 0-d int64 tensors on the device; what it returned of them is
computed on the host. `Counters.around` wraps the compiled graph, so that its caller sees no difference.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

COUNTER = ".cumulative_length_int"
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.neg, torch.sym_max, torch.sym_min)
ELEMENTWISE = (
    operator.add, operator.sub, operator.mul, operator.lt, operator.le, operator.gt, operator.ge, operator.eq,
)  # fmt: skip


@dataclass(frozen=True)
class Counters:
    """What was taken out of a graph.

    `devices`: for each input of the graph, the device of the tensor that stands in for it, None where nothing does;
    `used`: whether the graph reads it. `host`: the arithmetic for what the graph returned of counters, in order, as
    (node, function, arguments). `outputs`: for each output of the graph before, its node if it is one of those.
    """

    placeholders: tuple[fx.Node, ...]
    devices: tuple[torch.device | None, ...]
    used: tuple[bool, ...]
    host: tuple[tuple[fx.Node, Callable, tuple], ...]
    outputs: tuple[fx.Node | None, ...]

    def as_tensors(self, inputs: Sequence[Any]) -> list[Any]:
        """Example inputs for compiling the graph."""
        pairs = zip(self.devices, inputs, strict=True)
        return [one if device is None else _tensor(0, device) for device, one in pairs]

    def around(self, compiled: Callable) -> Callable:
        """A function with the inputs and outputs of the graph before."""
        counters = [i for i, device in enumerate(self.devices) if device is not None]
        unread = {i: _tensor(0, self.devices[i]) for i in counters if not self.used[i]}
        wanted = {one for _, _, inputs in self.host for one in inputs} | set(self.outputs)
        numbers = [(i, node) for i, node in enumerate(self.placeholders) if node in wanted]

        def run(*args: Any) -> list[Any]:
            values = {node: args[i] for i, node in numbers}
            for node, function, inputs in self.host:
                values[node] = function(*(values.get(one, one) for one in inputs))
            inputs = list(args)
            for i in counters:
                inputs[i] = unread[i] if i in unread else _tensor(args[i], self.devices[i])
            returned = iter(compiled(*inputs))
            return [next(returned) if one is None else values[one] for one in self.outputs]

        return run


def _tensor(value: int, device: torch.device) -> torch.Tensor:
    return torch.full((), value, dtype=torch.int64, device=device)  # a kernel, where a copy would wait for the stream


def take_out_counters(gm: fx.GraphModule) -> Counters | None:
    """Edit the graph in place; None if it has no counter, or one that is used for more than positions and masks."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    counters = [node for node in placeholders if _is_counter(node)]
    output = next(iter(gm.graph.find_nodes(op="output")))
    order = list(gm.graph.nodes)
    computed = _reachable(counters, lambda node: [user for user in node.users if _is_number(user)])
    counted = [node for node in order if node in computed]
    on_device = {user for node in (*counters, *counted) for user in node.users} - set(counted) - {output}
    returned = [node for node in output.args[0] if node in counted or node in counters]
    behind = {*returned} | _reachable(returned, lambda node: node.all_input_nodes)
    host = [node for node in order if node in behind and node.op != "placeholder"]
    known = all(node.target in ARITHMETIC for node in (*counted, *host))
    if not counters or not known or not all(_is_tensor(node) and node.target in ELEMENTWISE for node in on_device):
        return None

    outputs = tuple(node if node in returned else None for node in output.args[0])
    arithmetic = tuple((node, node.target, node.args) for node in host)
    device = next(node.meta["example_value"].device for node in placeholders if _is_tensor(node))
    output.args = (tuple(node for node in output.args[0] if node not in returned),)
    for node in reversed(counted):
        if not node.users:
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if node in counters or node in counted:
            _make_tensor(node, device)
    gm.graph.lint()
    gm.recompile()
    return Counters(
        placeholders=tuple(placeholders),
        devices=tuple(device if node in counters else None for node in placeholders),
        used=tuple(bool(node.users) for node in placeholders),
        host=arithmetic,
        outputs=outputs,
    )


def _make_tensor(node: fx.Node, device: torch.device) -> None:
    """Turn a number in the graph into a 0-d tensor."""
    if node.target in (torch.sym_max, torch.sym_min):
        bound = "min" if node.target is torch.sym_max else "max"
        first, second = node.args
        number, limit = (first, second) if _is_tensor(first) else (second, first)
        if _is_tensor(limit):
            node.target = torch.maximum if bound == "min" else torch.minimum
        else:
            node.target, node.args, node.kwargs = torch.clamp, (number,), {bound: limit}
    node.type = None
    with torch._guards.detect_fake_mode():
        if node.op == "placeholder":
            node.meta["example_value"] = _tensor(0, device)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: one.meta["example_value"])
            node.meta["example_value"] = node.target(*args, **kwargs)


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("example_value"), torch.Tensor)


def _reachable(start: list[fx.Node], following: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    """The nodes that one comes to from `start`."""
    found: set[fx.Node] = set()
    queue = list(start)
    while queue:
        fresh = [node for node in following(queue.pop()) if node not in found]
        found.update(fresh)
        queue.extend(fresh)
    return found


def _is_counter(node: fx.Node) -> bool:
    source = getattr(node, "_dynamo_source", None)
    return _is_number(node) and source is not None and source.name.endswith(COUNTER)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymInt)

"""Put the linear layers of a decode step through `tidal::linear`; those that share an input share a launch.

Graph in: Dynamo's decode graph, in which every layer calls

    linear(x, weight, bias)            x [B, 1, K], the weight [N, K] a graph input, or a rank's part of one

Graph out: the same graph object, edited in place, where up to three of them that read the same x become

    joined = tidal::linear(x, [weights], [biases], [scales]);  joined[..., :N1], joined[..., N1:N1 + N2], ...

A product with few tokens is bound by reading the weight, which the libraries' kernels do well only for large weights.
Weights that torchao holds in int8 (weight-only: `Int8WeightOnlyConfig`) are read as they are stored. Left alone are
layers with more than 16 sequences (one in float32), and those whose weight is quantised in another way, computed in the
graph, or of another dtype than x.
"""

import itertools
import operator

import torch
from torch import fx

from ..kernels.reference import most_tokens
from .compat import FakeTensor
from .forms import target_name
from .rewrite import insert_call

MOST = 3  # weights in one launch


def join_linears(gm: fx.GraphModule) -> int:
    """Rewrite every linear layer of that form; returns how many there were."""
    groups: dict[tuple, list[fx.Node]] = {}  # by input, and by whether there is a bias and int8
    for node in gm.graph.nodes:
        if _is_supported(node):
            groups.setdefault((node.args[0], _bias(node) is not None, _is_int8(node.args[1])), []).append(node)
    for nodes in groups.values():
        for first in range(0, len(nodes), MOST):
            _join(gm, nodes[first : first + MOST])
    gm.graph.lint()
    gm.recompile()
    return sum(len(nodes) for nodes in groups.values())


def _is_supported(node: fx.Node) -> bool:
    """Whether a node is a linear layer that `tidal::linear` can compute, with other layers of the same input."""
    if node.op != "call_function" or target_name(node) != "linear":
        return False
    x, weight, bias = node.args[0], node.args[1], _bias(node)
    parameters = [weight] if bias is None else [weight, bias]
    plain = [x, *parameters]
    if _is_int8(weight):
        plain.remove(weight)
    values = [argument.meta.get("example_value") for argument in plain]
    x_value = values[0]
    return (
        all(_is_input(parameter) for parameter in parameters)
        and all(_is_plain(value) and value.dtype == x_value.dtype and value.is_contiguous() for value in values)
        and x_value.numel() <= most_tokens(x_value.dtype) * x_value.shape[-1]
        and not any(user.op == "call_method" and user.target.endswith("_") for user in x.users)  # overwrites x
    )


def _is_int8(node: fx.Node) -> bool:
    """Whether a weight is torchao's in int8, with a scale a row, for an x as it is.

    Its zero points are not read: torchao's own product of such a weight doesn't read them either.
    """
    weight = node.meta.get("example_value")
    return (
        type(weight).__name__ == "Int8Tensor" and weight.dim() == 2 and weight.scale.numel() == weight.shape[0]
        and getattr(weight, "act_quant_kwargs", None) is None and getattr(weight, "act_pre_scale", None) is None
    )  # fmt: skip


def _is_input(parameter: fx.Node) -> bool:
    """Whether a node is a graph input, or what this rank has of one that is divided (a DTensor): no copy of it."""
    if _is_part(parameter):
        parameter = parameter.args[0]
    return parameter.op in ("placeholder", "get_attr")


def _is_part(node: fx.Node) -> bool:
    """Whether a node takes a rank's part out of what is divided. Before torch 2.13, Dynamo wrote a function for it."""
    return target_name(node) in ("to_local", "prim_to_local")


def _bias(node: fx.Node) -> fx.Node | None:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _is_plain(value) -> bool:
    """Whether a value is a floating tensor and no subclass of one, as quantised weights are."""
    tensor = value.data if isinstance(value, torch.nn.Parameter) else value
    return type(tensor) in (torch.Tensor, FakeTensor) and tensor.is_floating_point()


def _join(gm: fx.GraphModule, nodes: list[fx.Node]) -> None:
    """Replace linear layers of one input by one call, and slices of its output where there are several."""
    weights = [node.args[1] for node in nodes]
    biases = [_bias(node) for node in nodes if _bias(node) is not None]
    for parameter in (*weights, *biases):
        if _is_part(parameter):  # it is taken just before its layer
            nodes[0].prepend(parameter)
    scales: list[fx.Node] = []
    with gm.graph.inserting_before(nodes[0]):
        if _is_int8(weights[0]):
            scales = [insert_call(gm, nodes[0], getattr, (weight, "scale")) for weight in weights]
            weights = [insert_call(gm, nodes[0], getattr, (weight, "qdata")) for weight in weights]
        joined = insert_call(gm, nodes[0], torch.ops.tidal.linear.default, (nodes[0].args[0], weights, biases, scales))
        outputs = [joined]
        if len(nodes) > 1:
            ends = list(itertools.accumulate((node.meta["example_value"].shape[-1] for node in nodes), initial=0))
            spans = [(..., slice(begin, end)) for begin, end in itertools.pairwise(ends)]
            outputs = [
                insert_call(gm, node, operator.getitem, (joined, span)) for node, span in zip(nodes, spans, strict=True)
            ]
    for node, output in zip(nodes, outputs, strict=True):
        node.replace_all_uses_with(output)
        gm.graph.erase_node(node)

"""Put the linear layers of a decode step through `tidal::linear`; those that share an input share a launch.

Graph in: Dynamo's decode graph, in which every layer calls

    linear(x, weight, bias)                                 x [B, 1, K], the weight [N, K] a graph input
    tidal::linear(x, [held], [bias], [scales], [])          of a `PackedLinear`

Graph out: the same graph object, edited in place, where up to three of them that read the same x become

    joined = tidal::linear(x, [weights], [biases], [scales], ahead);  joined[..., :N1], joined[..., N1:N1 + N2], ...

and `ahead` is what the next call reads first, where both are in int4, and nothing between them reads a whole cache.
A product with few tokens is bound by reading the weight, which the libraries' kernels do well only for large weights.
A weight may also be a rank's part of one that is divided, or torchao's in int8 (`Int8WeightOnlyConfig`), which is read
as it is stored. Left alone are layers with more than 16 sequences (one in float32), and those whose weight is quantised
in another way, computed in the graph, or of another dtype than x.
"""

import itertools
import operator
from dataclasses import dataclass

import torch
from torch import fx

from ..kernels.reference import most_tokens
from .compat import FakeTensor
from .forms import target_name
from .rewrite import insert_call

MOST = 3  # weights in one launch
SMALL = {"tidal::linear", "tidal::sparse_attention"}  # ops that read no whole cache


@dataclass(frozen=True)
class Layer:
    """A linear layer: its node, whose x may be replaced yet, and what else `tidal::linear` takes.

    `kind` is the same for layers that can be joined.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    scale: fx.Node | None
    kind: tuple


def join_linears(gm: fx.GraphModule) -> int:
    """Rewrite every linear layer of those forms; returns how many there were."""
    groups: dict[tuple, list[Layer]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        is_packed = node.target is torch.ops.tidal.linear.default
        if (layer := _packed_layer(node) if is_packed else _layer(node)) is not None:
            groups.setdefault((node.args[0], layer.bias is not None, layer.kind), []).append(layer)
    for layers in groups.values():
        for first in range(0, len(layers), MOST):
            _join(gm, layers[first : first + MOST])
    _look_ahead(gm)
    gm.graph.lint()
    gm.recompile()
    return sum(len(layers) for layers in groups.values())


def _packed_layer(node: fx.Node) -> Layer | None:
    """The layer that a `PackedLinear` put into the graph, if others may join it."""
    x, (weight,), bias, (scale,), _ = node.args
    if _is_overwritten(x):
        return None
    values = weight.meta["example_value"], scale.meta["example_value"]
    kind = values[0].dtype, values[0].dtype == torch.int16 and tuple(values[1].shape[1:])
    return Layer(node, weight, bias[0] if bias else None, scale, kind)


def _layer(node: fx.Node) -> Layer | None:
    """The layer that a node computes, if `tidal::linear` can."""
    if not _is_supported(node):
        return None
    bias, is_int8 = _bias(node), _is_int8(node.args[1])
    return Layer(node, node.args[1], bias, None, ("int8" if is_int8 else "plain",))


def _is_supported(node: fx.Node) -> bool:
    """Whether a node is a linear layer that `tidal::linear` can compute."""
    if target_name(node) != "linear":
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
        and not _is_overwritten(x)
    )


def _is_overwritten(x: fx.Node) -> bool:
    """Whether a method writes into x, so that two layers may read other numbers in it."""
    return any(user.op == "call_method" and user.target.endswith("_") for user in x.users)


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


def _join(gm: fx.GraphModule, layers: list[Layer]) -> None:
    """Replace linear layers of one input by one call, and slices of its output where there are several."""
    first = layers[0].node
    if len(layers) == 1 and layers[0].scale is not None:
        return  # it is such a call already
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    scales = [layer.scale for layer in layers if layer.scale is not None]
    for parameter in (*weights, *biases):
        if _is_part(parameter):  # it is taken just before its layer
            first.prepend(parameter)
    with gm.graph.inserting_before(first):
        if layers[0].kind == ("int8",):
            scales = [insert_call(gm, first, getattr, (weight, "scale")) for weight in weights]
            weights = [insert_call(gm, first, getattr, (weight, "qdata")) for weight in weights]
        joined = insert_call(gm, first, torch.ops.tidal.linear.default, (first.args[0], weights, biases, scales, []))
        outputs = [joined]
        if len(layers) > 1:
            sizes = (layer.node.meta["example_value"].shape[-1] for layer in layers)
            ends = list(itertools.accumulate(sizes, initial=0))
            spans = [(..., slice(begin, end)) for begin, end in itertools.pairwise(ends)]
            outputs = [
                insert_call(gm, layer.node, operator.getitem, (joined, span))
                for layer, span in zip(layers, spans, strict=True)
            ]
    for layer, output in zip(layers, outputs, strict=True):
        layer.node.replace_all_uses_with(output)
        gm.graph.erase_node(layer.node)


def _look_ahead(gm: fx.GraphModule) -> None:
    """Tell every call in int4 what the next one reads first, if that still is in the L2 cache by then."""
    last = None
    for node in gm.graph.nodes:
        if node.target is torch.ops.tidal.linear.default:
            weight = node.args[1][0]
            is_int4 = weight.meta["example_value"].dtype == torch.int16
            if is_int4 and last is not None and _is_input(weight):
                last.args = (*last.args[:4], [weight, node.args[3][0]])
            last = node if is_int4 else None
        elif _reads_much(node):
            last = None


def _reads_much(node: fx.Node) -> bool:
    """Whether a node is attention to a whole cache, ours or another's."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tidal":
        return node.target._schema.name not in SMALL
    return "attention" in target_name(node)

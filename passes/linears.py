"""Put the linear layers of a decode step through `tidal::linear`; those that share an input share a launch.

Graph in: Dynamo's decode graph, in which every layer calls

    linear(x, weight, bias)            x [B, 1, K], the weight [N, K] a graph input, or a rank's part of one

Graph out: the same graph object, edited in place, where up to three of them that read the same x become

    joined = tidal::linear(x, [weights], [biases], [scales]);  joined[..., :N1], joined[..., N1:N1 + N2], ...

A product with few tokens is bound by reading the weight, which the libraries' kernels do well only for large weights.
Weights that torchao holds in int8 or int4 (weight-only: `Int8WeightOnlyConfig`, and `Int4WeightOnlyConfig` with
`int4_packing_format="tile_packed_to_4d"`) are read as they are stored. Left alone are layers with more than 16
sequences (one in float32 and int4), and those whose weight is quantised in another way, computed in the graph, or of
another dtype than x.
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


def join_linears(gm: fx.GraphModule) -> int:
    """Rewrite every linear layer of that form; returns how many there were."""
    groups: dict[tuple, list[fx.Node]] = {}  # by input, whether there is a bias, and how the weight is stored
    for node in gm.graph.nodes:
        if (stored := _stored(node)) is not None:
            groups.setdefault((node.args[0], _bias(node) is not None, stored), []).append(node)
    for (_, _, stored), nodes in groups.items():
        for first in range(0, len(nodes), MOST):
            _join(gm, nodes[first : first + MOST], stored)
    gm.graph.lint()
    gm.recompile()
    return sum(len(nodes) for nodes in groups.values())


@dataclass(frozen=True)
class Stored:
    """How a weight is stored: its dtype, the attributes with its numbers and scales, and the columns of a group."""

    dtype: torch.dtype
    attributes: tuple[str, str] | None = None  # None: a plain tensor
    group: int | None = None


def _stored(node: fx.Node) -> Stored | None:
    """How the weight of a linear layer is stored that `tidal::linear` can compute; None for any other node."""
    if node.op != "call_function" or target_name(node) != "linear":
        return None
    x, weight, bias = node.args[0], node.args[1], _bias(node)
    others = [x] if bias is None else [x, bias]
    x_value, weight_value = x.meta.get("example_value"), weight.meta.get("example_value")
    stored = _quantised(weight_value, x_value)
    if stored is None:
        others.append(weight)
        stored = Stored(x_value.dtype)
    values = [argument.meta.get("example_value") for argument in others]
    supported = (
        all(_is_input(parameter) for parameter in {weight, *others} - {x})
        and all(_is_plain(value) and value.dtype == x_value.dtype and value.is_contiguous() for value in values)
        and x_value.numel() <= most_tokens(x_value.dtype, stored.dtype) * x_value.shape[-1]
        and not any(user.op == "call_method" and user.target.endswith("_") for user in x.users)  # overwrites x
    )
    return stored if supported else None


def _quantised(weight: object, x: torch.Tensor) -> Stored | None:
    """How a weight of torchao's is stored, if the op can read it for such an x."""
    kind = type(weight).__name__
    if kind == "Int8Tensor":
        unknown = ("act_quant_kwargs", "act_pre_scale")  # its zeros are for what is not weight-only
        if weight.dim() == 2 and weight.scale.numel() == weight.shape[0] and _has_none(weight, unknown):
            return Stored(torch.int8, ("qdata", "scale"))
    if kind == "Int4TilePackedTo4dTensor":
        is_whole = weight.qdata.dim() == 4 and weight.shape[0] == weight.qdata.shape[0] * 8
        fits = x.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0 and weight.block_size[-1] % 32 == 0
        if is_whole and fits and _has_none(weight, ("act_pre_scale",)):
            return Stored(torch.int32, ("qdata", "scale_and_zero"), weight.block_size[-1])
    return None


def _has_none(weight: object, names: tuple[str, ...]) -> bool:
    return all(getattr(weight, name, None) is None for name in names)


def _is_input(parameter: fx.Node) -> bool:
    """Whether a node is a graph input, or what this rank has of one that is divided (a DTensor): no copy of it."""
    if parameter.op == "call_method" and parameter.target == "to_local":
        parameter = parameter.args[0]
    return parameter.op in ("placeholder", "get_attr")


def _bias(node: fx.Node) -> fx.Node | None:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _is_plain(value) -> bool:
    """Whether a value is a floating tensor and no subclass of one, as quantised weights are."""
    tensor = value.data if isinstance(value, torch.nn.Parameter) else value
    return type(tensor) in (torch.Tensor, FakeTensor) and tensor.is_floating_point()


def _join(gm: fx.GraphModule, nodes: list[fx.Node], stored: Stored) -> None:
    """Replace linear layers of one input by one call, and slices of its output where there are several."""
    weights = [node.args[1] for node in nodes]
    biases = [_bias(node) for node in nodes if _bias(node) is not None]
    for parameter in (*weights, *biases):
        if parameter.op == "call_method":  # a rank's part is taken just before its layer
            nodes[0].prepend(parameter)
    scales: list[fx.Node] = []
    with gm.graph.inserting_before(nodes[0]):
        if stored.attributes is not None:
            numbers, steps = stored.attributes
            scales = [insert_call(gm, nodes[0], getattr, (weight, steps)) for weight in weights]
            weights = [insert_call(gm, nodes[0], getattr, (weight, numbers)) for weight in weights]
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

"""Put the linear layers of a decode step through `tidal::linear`, those of one input in one launch.

Graph in: Dynamo's decode graph, in which every layer calls

    linear(x, weight, bias)            x [B, 1, K], the weight [N, K] a graph input

Graph out: the same graph object, edited in place, where up to three of them that read the same x are

    joined = tidal::linear(x, [weights], [biases]);  joined[..., :N1], joined[..., N1:N1 + N2], ...

A product with few tokens is bound by reading the weight, which the libraries' kernels do well only for large weights.
Left alone: more than 16 sequences (one in float32), weights that are quantized, computed or of another dtype than x.
"""

import itertools
import operator

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ..kernels.reference import most_tokens
from .forms import target_name
from .rewrite import insert_call

MOST = 3  # weights a launch


def join_linears(gm: fx.GraphModule) -> int:
    """Rewrite every linear layer of that form; returns how many there were."""
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if _streams_a_weight(node):
            groups.setdefault((node.args[0], _bias(node) is not None), []).append(node)
    for nodes in groups.values():
        for first in range(0, len(nodes), MOST):
            _join(gm, nodes[first : first + MOST])
    gm.graph.lint()
    gm.recompile()
    return sum(len(nodes) for nodes in groups.values())


def _streams_a_weight(node: fx.Node) -> bool:
    if node.op != "call_function" or target_name(node) != "linear":
        return False
    x, weight, bias = node.args[0], node.args[1], _bias(node)
    values = [one.meta.get("example_value") for one in (x, weight, bias) if one is not None]
    return (
        all(one.op in ("placeholder", "get_attr") for one in (weight, bias) if one is not None)
        and all(_is_plain(value) and value.dtype == values[0].dtype and value.is_contiguous() for value in values)
        and values[0].numel() <= most_tokens(values[0].dtype) * values[0].shape[-1]
        and not any(user.op == "call_method" and user.target.endswith("_") for user in x.users)
    )


def _bias(node: fx.Node) -> fx.Node | None:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _is_plain(value) -> bool:
    """Not a quantized weight, which is a tensor subclass."""
    inner = value.data if isinstance(value, torch.nn.Parameter) else value
    return type(inner) in (torch.Tensor, FakeTensor) and inner.is_floating_point()


def _join(gm: fx.GraphModule, nodes: list[fx.Node]) -> None:
    weights = [node.args[1] for node in nodes]
    biases = [_bias(node) for node in nodes if _bias(node) is not None]
    with gm.graph.inserting_before(nodes[0]):
        outs = [insert_call(gm, nodes[0], torch.ops.tidal.linear.default, (nodes[0].args[0], weights, biases))]
        if len(nodes) > 1:
            ends = list(itertools.accumulate((node.meta["example_value"].shape[-1] for node in nodes), initial=0))
            spans = [(..., slice(begin, end)) for begin, end in itertools.pairwise(ends)]
            outs = [
                insert_call(gm, node, operator.getitem, (outs[0], span))
                for node, span in zip(nodes, spans, strict=True)
            ]
    for node, out in zip(nodes, outs, strict=True):
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)

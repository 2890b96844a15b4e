"""Read the spellings of attention in a decode graph into one form.

Graph in: Dynamo's graph, and a node of it that is attention in one of two spellings,

    sdpa    scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    eager   scores = matmul(q, k.transpose(2, 3)) * scale
            scores = tanh(scores / softcap) * softcap            (Gemma 2)
            scores = scores + mask
            scores = cat([scores, sink]);  scores - scores.max()  (GPT-OSS)
            weights = dropout(softmax(scores).to(dtype))
            weights = weights[..., :-1]                           (GPT-OSS: without the sink)
            matmul(weights, v)

Out: the node of the output and a `Call`, or `NoMatch` with the reason. The graph is not changed. The call's key and
value are those of the spelling, `[B, Hkv or Hq, S, D]`, and its length is None: `match` finds the cache behind them.
"""

import operator

import torch
from torch import fx

from ..kernels.call import Call

SDPA = torch.nn.functional.scaled_dot_product_attention
CASTS = ("to", "type", "type_as", "float", "half", "bfloat16")


class NoMatch(Exception):
    """Why an attention call can't be rewritten. `kind`: see `match.Unmatched`."""

    def __init__(self, reason: str, kind: str = "unsupported"):
        super().__init__(reason)
        self.kind = kind


def query_length(node: fx.Node) -> int | None:
    """T of an attention call `[B, Hq, T, ...]`; None if the node doesn't show it."""
    if is_sdpa(node):
        return shape(_sdpa_arguments(node)["query"])[2]
    return shape(node)[2] if is_softmax(node) and len(shape(node)) == 4 else None


def read_call(node: fx.Node) -> tuple[fx.Node, Call]:
    """Read the call at an SDPA or softmax node: its output, and the call."""
    if is_sdpa(node):
        return _read_sdpa(node)
    if is_softmax(node):
        return _read_eager(node)
    raise NoMatch(f"attention through {target_name(node)}; supported are attn_implementation='sdpa' and 'eager'")


def _read_sdpa(node: fx.Node) -> tuple[fx.Node, Call]:
    arguments = _sdpa_arguments(node)
    if arguments["is_causal"] or arguments["dropout_p"]:
        raise NoMatch(
            f"attention with is_causal={arguments['is_causal']} and dropout_p={arguments['dropout_p']}: "
            "a decode step has neither"
        )
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    scale = shape(query)[3] ** -0.5 if arguments["scale"] is None else _number(arguments["scale"])
    return node, Call(query, key, value, None, arguments["attn_mask"], scale)


def _sdpa_arguments(node: fx.Node) -> dict:
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    return defaults | _arguments(node, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict:
    """The arguments of a call by name, where `names` are those of the positional ones."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _read_eager(softmax: fx.Node) -> tuple[fx.Node, Call]:
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if dim not in (-1, 3):
        raise NoMatch(f"eager attention with a softmax over dimension {dim}, not over the tokens, the last dimension")
    scores, sink_logit = _strip_sink(softmax.args[0])
    scores, mask = _strip_mask(scores)
    scores, softcap = _strip_softcap(scores)
    scores, scale = _strip_scale(scores)
    if not _is_function(scores, torch.matmul):
        raise NoMatch(f"eager attention whose scores come from {target_name(scores)}, not from matmul(q, k^T)")
    query, key = scores.args[0], _untransposed(scores.args[1])
    output, value = _weighted_sum(softmax, has_sink=sink_logit is not None)
    return output, Call(query, key, value, None, mask, scale, sink_logit, softcap)


def _strip_sink(scores: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """cat([scores, sink]) -> scores, sink `[Hq]`; a maximum that is subtracted is dropped, as it changes no softmax."""
    scores = _uncast(scores)
    if _is_function(scores, operator.sub) and _is_maximum_of(scores.args[1], scores.args[0]):
        scores = scores.args[0]
    if not _is_function(scores, torch.cat):
        return scores, None
    dim = scores.kwargs.get("dim", scores.args[1] if len(scores.args) > 1 else 0)
    parts = scores.args[0]
    if dim not in (-1, 3) or len(parts) != 2 or shape(parts[1])[3] != 1:
        raise NoMatch("eager attention over scores that are joined from parts in a way that is not an attention sink")
    sink = parts[1]
    while sink.op == "call_method" and sink.target in ("expand", "reshape", "view"):
        sink = sink.args[0]
    if shape(sink) != (shape(parts[0])[1],):
        raise NoMatch(f"an attention sink of shape {shape(sink)}; one logit a query head is supported")
    return parts[0], sink


def _is_maximum_of(node: fx.Node, scores: fx.Node) -> bool:
    """Whether a node is scores.max(dim=-1, keepdim=True).values."""
    maximum = node.args[0] if _is_function(node, operator.getitem) and node.args[1] == 0 else None
    if maximum is None or target_name(maximum) != "max" or maximum.args[0] is not scores:
        return False
    arguments = _arguments(maximum, ("input", "dim", "keepdim"))
    return arguments.get("dim") in (-1, 3) and arguments.get("keepdim") is True


def _strip_mask(scores: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """scores + mask -> scores, mask"""
    scores = _uncast(scores)
    if not _is_function(scores, operator.add):
        return scores, None
    unmasked, mask = scores.args
    if not all(isinstance(arg, fx.Node) for arg in scores.args) or shape(unmasked) != shape(scores):
        raise NoMatch("eager attention that adds something other than a mask to its scores")
    dtype = mask.meta["example_value"].dtype
    if not dtype.is_floating_point:
        raise NoMatch(f"eager attention that adds a {dtype} mask to its scores; floating masks may be added")
    return unmasked, mask


def _strip_softcap(scores: fx.Node) -> tuple[fx.Node, float]:
    """tanh(scores / cap) * cap -> scores, cap"""
    scores = _uncast(scores)
    tanh, cap = _times_number(scores)
    if tanh is None or not _is_function(tanh, torch.tanh):
        return scores, 0.0
    divided = tanh.args[0]
    if not _is_function(divided, operator.truediv) or _number(divided.args[1]) != cap:
        raise NoMatch(
            f"eager attention with a tanh that is no soft cap: tanh(x) * {cap}, where x is not scores / {cap}"
        )
    return divided.args[0], cap


def _strip_scale(scores: fx.Node) -> tuple[fx.Node, float]:
    """scores * a / b -> scores, a / b"""
    scores, scale = _uncast(scores), 1.0
    while True:
        unscaled, factor = _times_number(scores)
        if unscaled is None:
            return scores, scale
        scores, scale = _uncast(unscaled), scale * factor


def _times_number(node: fx.Node) -> tuple[fx.Node | None, float]:
    """x * number or x / number -> x, the factor; None, 1.0 for anything else."""
    if node.op == "call_function" and node.target in (operator.mul, operator.truediv, operator.itruediv):
        x, number = node.args[0], _number(node.args[1])
        read_elsewhere = node.target is operator.itruediv and len(x.users) > 1  # other users see x divided, too
        if number is not None and not read_elsewhere:
            return x, number if node.target is operator.mul else 1.0 / number
    return None, 1.0


def _number(value: object) -> float | None:
    """A number of the graph, None for a tensor. A number that Dynamo keeps symbolic is fixed by this, under a guard."""
    if isinstance(value, fx.Node):
        value = value.meta["example_value"]
    return float(value) if isinstance(value, int | float | torch.SymInt | torch.SymFloat) else None


def _untransposed(node: fx.Node) -> fx.Node:
    """k^T `[B, H, D, S]` -> k `[B, H, S, D]`"""
    dims = tuple(dim % 4 for dim in node.args[1:]) if is_method(node, "transpose") else ()
    if set(dims) != {2, 3}:
        raise NoMatch(f"eager attention that multiplies q with {target_name(node)}, not with k.transpose(2, 3)")
    return node.args[0]


def _weighted_sum(softmax: fx.Node, has_sink: bool) -> tuple[fx.Node, fx.Node]:
    """Follow the weights from the softmax to matmul(weights, v): that node, and v."""
    node, sink_dropped = softmax, False
    while True:
        if len(node.users) != 1:
            raise NoMatch("eager attention whose weights are used elsewhere too (output_attentions=True?)")
        weights, node = node, next(iter(node.users))
        if node.op == "call_method" and node.target in CASTS:
            continue
        if _is_function(node, torch.nn.functional.dropout) and _is_off(node):
            continue
        if _is_function(node, operator.getitem) and node.args[1] == (Ellipsis, slice(None, -1, None)):
            if sink_dropped or not has_sink:
                raise NoMatch("eager attention that drops the weight of a token")
            sink_dropped = True
            continue
        if _is_function(node, torch.matmul) and node.args[0] is weights and sink_dropped == has_sink:
            return node, node.args[1]
        raise NoMatch(f"eager attention that hands its weights to {target_name(node)}, not to matmul(weights, v)")


def _is_off(dropout: fx.Node) -> bool:
    arguments = _arguments(dropout, ("input", "p", "training"))
    return arguments.get("p", 0.5) == 0.0 or arguments.get("training", True) is False


def _uncast(node: fx.Node) -> fx.Node:
    """The node before any casts."""
    while node.op == "call_method" and node.target in CASTS:
        node = node.args[0]
    return node


def is_sdpa(node: fx.Node) -> bool:
    return node.target is SDPA


def is_softmax(node: fx.Node) -> bool:
    return target_name(node) == "softmax"


def is_method(node: object, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == name


def _is_function(node: object, function: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def target_name(node: fx.Node) -> str:
    """The function or method that a node calls, by name."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def shape(node: fx.Node) -> tuple:
    """The shape of what a node returns."""
    return tuple(node.meta["example_value"].shape)

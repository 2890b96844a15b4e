"""Tell a mask that says no more than the live length does: causal attention to all that a cache holds.

transformers makes a mask for every step with a static cache, padding or not:

    mask = arange(S)[None, None, None, :] <= (cumulative_length + arange(T))[None, None, :, None]

which the ops know by themselves. Reading it would cost a dense layer a sixth of its time. No spelling is searched for:
what leads to a mask is computed for several lengths, on the CPU, and compared. A mask that rests on anything but the
cache's token counters, such as a padding mask, is never taken for one.
"""

import torch
from torch import Tensor, fx

from ..kernels.reference import hidden
from .compat import source_of
from .counters import reachable

COUNTER = ".cumulative_length"


def repeats_length(mask: fx.Node, num_tokens: int, slots: int) -> bool:
    """Whether a mask `[., ., T or 1, S]` hides from each of T query tokens exactly the slots behind it.

    Sizes that are symbols, in a graph for any number of slots, can't be tried: then it may not.
    """
    if not (isinstance(num_tokens, int) and isinstance(slots, int)):
        return False
    nodes = _way_to(mask)
    counters = [node for node in nodes if node.op == "placeholder"]
    if not counters or not all(source_of(node).endswith(COUNTER) for node in counters):
        return False
    lengths = {num_tokens, num_tokens + 1, slots // 3, slots // 2 + 1, slots - 1, slots}  # with the new tokens
    for length in sorted(lengths):
        if num_tokens <= length <= slots:
            found = _compute(nodes, mask, length - num_tokens)
            if found is None or not _is_causal(found, length, num_tokens):
                return False
    return True


def _is_causal(mask: Tensor, length: int, num_tokens: int) -> bool:
    last = length - num_tokens + torch.arange(num_tokens)[:, None]  # each token sees itself
    visible = torch.arange(mask.shape[-1]) <= last  # [T, S]
    if mask.shape[-2] not in (1, num_tokens) or (mask.shape[-2] == 1 and num_tokens > 1):
        return False
    changes_scores = mask.is_floating_point() and bool(mask.where(~hidden(mask), 0.0).any())
    return not changes_scores and bool((hidden(mask) == ~visible).all())


def _way_to(mask: fx.Node) -> list[fx.Node]:
    """The nodes that lead to a mask, and what writes to them before, in the order of the graph."""

    def before(node: fx.Node) -> list[fx.Node]:
        writes = [user for user in node.users if user.op == "call_method" and str(user.target).endswith("_")]
        return node.all_input_nodes + writes

    needed = {mask} | reachable([mask], before)
    order = list(mask.graph.nodes)
    return [node for node in order[: order.index(mask) + 1] if node in needed]


def _compute(nodes: list[fx.Node], mask: fx.Node, before: int) -> Tensor | None:
    """The mask where the counters say `before`; None where a node can't be computed so."""
    values: dict[fx.Node, object] = {}
    for node in nodes:
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda one: values[one] if isinstance(one, fx.Node) else _on_cpu(one)
        )
        if node.op == "placeholder":
            values[node] = torch.tensor(before)
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            return None
    found = values[mask]
    return found if isinstance(found, Tensor) else None


def _on_cpu(argument: object) -> object:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument

"""What each layer would lose with another layer's tokens, from dense passes; and the layers that lose least.

For all pairs of layers i <= j, at the deployed budget and on the queries of the blocks: `head_maps` finds which kv head
of layer i has chosen the tokens that kv head h of layer j attends to most, and `layer_losses` the error of layer j's
attention output if it attends to those only. `best_selections` is a dynamic programme over layers on that. Both ideas
are Kascade's (https://arxiv.org/abs/2512.16391), which judges by the attention mass that is kept.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..policy import LayerRole
from ..replay import Call, Context, replay


@dataclass(frozen=True)
class Statistics:
    """Of one way to share token sets: `losses [i, j]` as from `layer_losses`, `heads` by (i, j) as from `head_maps`."""

    losses: Tensor
    heads: dict[tuple[int, int], tuple[int, ...]]


def head_maps(
    model: nn.Module, contexts: Sequence[Context], role: LayerRole, layers: Sequence[int], num_layers: int,
    weights: dict[str, float], advance: Callable[[], None] = lambda: None,
) -> dict[tuple[int, int], tuple[int, ...]]:  # fmt: skip
    """At (i, j), for each kv head of layer j, the kv head of layer i whose tokens keep most of its attention.

    `role` says how tokens are chosen; `layers` may select. Pairs with different numbers of kv heads are left out.
    """
    kept: dict[tuple[int, int], Tensor] = {}  # [Hkv of i, Hkv of j]

    def observe(call: Call, sets: dict[int, Tensor], weight: Tensor) -> None:
        mass = call.probabilities().sum(2)  # [m, Hkv, n]
        sets[call.layer] = call.choose(role)
        for source, chosen in sets.items():
            if source != call.layer and chosen.shape[1] == mass.shape[1]:
                token = chosen.clamp(min=0).long()[:, :, None].expand(-1, -1, mass.shape[1], -1)
                there = mass[:, None].expand(-1, chosen.shape[1], -1, -1).gather(3, token)
                share = (there * (chosen >= 0)[:, :, None]).sum(3)  # [m, Hkv of i, Hkv of j]
                pair = (source, call.layer)
                kept[pair] = kept.get(pair, 0.0) + (weight[:, None, None] * share).sum(0)

    _observe(model, contexts, layers, num_layers, weights, observe, advance)
    return {pair: tuple(share.argmax(0).tolist()) for pair, share in kept.items()}


def layer_losses(
    model: nn.Module, contexts: Sequence[Context], role: LayerRole, layers: Sequence[int], num_layers: int,
    weights: dict[str, float], heads: dict[tuple[int, int], tuple[int, ...]] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """`[num_layers, num_layers]`: at [i, j] the relative squared error of layer j's output with layer i's tokens.

    `role` says how tokens are chosen; `layers` may select; `heads`, which token set serves which kv head. A mean over
    the queries of each kind of block, weighted. Infinite where j can't use what i chooses.
    """
    total = torch.zeros(num_layers, num_layers, dtype=torch.float64)

    def observe(call: Call, sets: dict[int, Tensor], weight: Tensor) -> None:
        sets[call.layer] = call.choose(role)
        exact = call.attend(None)
        for source, chosen in sets.items():
            if chosen.shape[1] not in (1, sets[call.layer].shape[1]):
                total[source, call.layer] = torch.inf
                continue
            if heads and source != call.layer:
                chosen = chosen[:, heads[source, call.layer]]
            error = (call.attend(chosen) - exact).square().sum((1, 2, 3)) / exact.square().sum((1, 2, 3))
            total[source, call.layer] += (weight * error).sum().item()

    _observe(model, contexts, layers, num_layers, weights, observe, advance)
    return total


def _observe(
    model: nn.Module, contexts: Sequence[Context], layers: Sequence[int], num_layers: int, weights: dict[str, float],
    observe: Callable[[Call, dict[int, Tensor], Tensor], None], advance: Callable[[], None],
) -> None:  # fmt: skip
    """Show the dense calls of `layers`, with the sets that the earlier ones chose, and each query's weight `[m]`."""
    full = [LayerRole(layer, "full") for layer in range(num_layers)]
    count = {kind: sum(block.kind == kind for one in contexts for block in one.blocks) for kind in weights}
    for context in contexts:
        sets: dict[int, Tensor] = {}
        shares = [weights[block.kind] / count[block.kind] / block.steps for block in context.blocks]

        def see(call: Call, sets: dict[int, Tensor] = sets, shares: list[float] = shares) -> None:
            if call.layer == layers[0]:
                sets.clear()  # a new pass: where layers forget tokens, every block is one
            if call.layer in layers:
                weight = torch.tensor(shares, device=call.queries.device)[call.tokens.block]
                observe(call, sets, weight * ~call.tokens.dense)

        replay(model, context, full, see)
        advance()


def best_selections(
    losses: Tensor, layers: Sequence[int], selections: int, dense: int
) -> list[tuple[float, tuple[int, ...]]]:
    """The cheapest `selections` for each first one among the layers 0 to `dense`: (loss, selections), best first.

    Every layer between two selections reuses the tokens of the former; those before the first stay dense.
    """
    last = len(layers)

    def segment(first: int, end: int) -> float:
        """Loss of the layers that reuse layer `first`'s tokens, up to the one before `end`."""
        return sum(losses[layers[first], layers[each]].item() for each in range(first + 1, end))

    cost = {pair: segment(*pair) for pair in itertools.combinations(range(last + 1), 2)}
    best = {(1, first): (cost[first, last], (first,)) for first in range(last)}
    for number in range(2, selections + 1):
        for first in range(last - number + 1):
            best[number, first] = min(
                (cost[first, second] + best[number - 1, second][0], (first, *best[number - 1, second][1]))
                for second in range(first + 1, last - number + 2)
            )
    found = [best[selections, first] for first in range(min(dense, last - selections) + 1)]
    return sorted((loss, tuple(layers[place] for place in places)) for loss, places in found)


def total_loss(losses: Tensor, layers: Sequence[int], selections: Sequence[int]) -> float:
    """What `best_selections` minimizes, of given selections."""
    source, total = None, 0.0
    for layer in layers:
        if layer in selections:
            source = layer
        elif source is not None:
            total += losses[source, layer].item()
    return total

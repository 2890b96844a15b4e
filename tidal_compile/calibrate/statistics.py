"""What each layer would lose with another layer's tokens, from one dense pass; and the layers that lose least.

`layer_losses` measures, for all pairs of layers i <= j at the deployed budget and on the queries of the blocks, the
error of layer j's attention output if it attends only to what layer i would choose. `best_selections` is a dynamic
programme over layers on that, as Kascade's (https://arxiv.org/abs/2512.16391, there on the attention mass that is
kept).
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..policy import LayerRole
from ..replay import Call, Context, replay


def layer_losses(
    model: nn.Module, contexts: Sequence[Context], role: LayerRole, layers: Sequence[int], num_layers: int,
    weights: dict[str, float], advance: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """`[num_layers, num_layers]`: at [i, j] the relative squared error of layer j's output with layer i's tokens.

    `role` says how tokens are chosen; `layers` may select. A mean over the queries of each kind of block, weighted.
    """
    full = [LayerRole(layer, "full") for layer in range(num_layers)]
    total = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    count = {kind: sum(block.kind == kind for one in contexts for block in one.blocks) for kind in weights}
    for context in contexts:
        sets: dict[int, Tensor] = {}

        shares = [weights[block.kind] / count[block.kind] / block.steps for block in context.blocks]

        def observe(call: Call, sets: dict[int, Tensor] = sets, shares: list[float] = shares) -> None:
            if call.layer not in layers:
                return
            weight = torch.tensor(shares, device=call.queries.device)[call.tokens.block] * ~call.tokens.dense
            sets[call.layer] = call.choose(role)
            exact = call.attend(None)
            for source, chosen in sets.items():
                error = (call.attend(chosen) - exact).square().sum((1, 2, 3)) / exact.square().sum((1, 2, 3))
                total[source, call.layer] += (weight * error).sum().item()

        replay(model, context, full, observe)
        advance()
    return total


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

"""What each layer would lose with another layer's tokens, from dense passes; and the selections that lose least.

For all pairs of layers i <= j, at the deployed budget and on the queries of the blocks, `head_maps` finds which kv head
of layer i has chosen the tokens that kv head h of layer j attends to most. `layer_losses` finds the error of layer j's
attention output if it attends to layer i's tokens only. `best_selections` is a dynamic programme over these losses.

Head maps and the programme are ideas of Kascade (https://arxiv.org/abs/2512.16391), which judges by the attention mass
that is kept instead.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..kernels import reference
from ..kernels.call import Call
from ..passes.roles import LayerRole
from ..replay import Context, Tokens, replay


@dataclass(frozen=True)
class Statistics:
    """For one way to share token sets: `losses [i, j]` from `layer_losses`, and `heads` by (i, j) from `head_maps`."""

    losses: Tensor
    heads: dict[tuple[int, int], tuple[int, ...]]


def head_maps(
    model: nn.Module, contexts: Sequence[Context], role: LayerRole, layers: Sequence[int], num_layers: int,
    weights: dict[str, float], advance: Callable[[], None] = lambda: None,
) -> dict[tuple[int, int], tuple[int, ...]]:  # fmt: skip
    """At (i, j), for each kv head of layer j, the kv head of layer i whose tokens keep most of its attention.

    `role`: how tokens are chosen. `layers`: those that may select. `advance` is called after every context. Pairs with
    different numbers of kv heads are left out.
    """
    kept: dict[tuple[int, int], Tensor] = {}  # [Hkv of i, Hkv of j]: the attention of j's heads to tokens of i's heads

    def observe(layer: int, call: Call, sets: dict[int, Tensor], weight: Tensor) -> None:
        mass = _attention_mass(call)  # [m, Hkv, n]
        sets[layer] = _choose(call, role)
        for source, chosen in sets.items():
            if source != layer and chosen.shape[1] == mass.shape[1]:
                token = chosen.clamp(min=0).long()[:, :, None].expand(-1, -1, mass.shape[1], -1)
                chosen_mass = mass[:, None].expand(-1, chosen.shape[1], -1, -1).gather(3, token)
                kept_mass = (chosen_mass * (chosen >= 0)[:, :, None]).sum(3)  # [m, Hkv of i, Hkv of j]
                pair = (source, layer)
                kept[pair] = kept.get(pair, 0.0) + (weight[:, None, None] * kept_mass).sum(0)

    _observe(model, contexts, layers, num_layers, weights, observe, advance)
    return {pair: tuple(kept_mass.argmax(0).tolist()) for pair, kept_mass in kept.items()}


def layer_losses(
    model: nn.Module, contexts: Sequence[Context], role: LayerRole, layers: Sequence[int], num_layers: int,
    weights: dict[str, float], heads: dict[tuple[int, int], tuple[int, ...]] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """`[num_layers, num_layers]`: at [i, j] the relative squared error of layer j's output with layer i's tokens.

    The losses are means over the queries of each kind of block, added up with `weights`; infinite where layer j can't
    use the token sets of layer i. `role`: how tokens are chosen. `layers`: those that may select. `heads`: which token
    set of layer i serves each kv head of layer j, if not its own. `advance` is called after every context.
    """
    losses = torch.zeros(num_layers, num_layers, dtype=torch.float64)

    def observe(layer: int, call: Call, sets: dict[int, Tensor], weight: Tensor) -> None:
        sets[layer] = _choose(call, role)
        exact = reference.full_attention(call)  # [1, Hq, m, D]
        for source, chosen in sets.items():
            if chosen.shape[1] not in (1, sets[layer].shape[1]):
                losses[source, layer] = torch.inf
                continue
            if heads and source != layer:
                chosen = chosen[:, heads[source, layer]]
            difference = reference.sparse_attention(call, chosen[None]) - exact
            error = difference.square().sum((0, 1, 3)) / exact.square().sum((0, 1, 3))
            losses[source, layer] += (weight * error).sum().item()

    _observe(model, contexts, layers, num_layers, weights, observe, advance)
    return losses


def _choose(call: Call, role: LayerRole) -> Tensor:
    """The token sets of each query `[m, G, K]`."""
    index = role.method.choose(call, role.selection)
    return index.view(call.query.shape[2], *index.shape[-2:])


def _attention_mass(call: Call) -> Tensor:
    """The attention that the query heads of each kv head give to each token, added up: `[m, Hkv, n]`."""
    return reference.attention_weights(call).sum(2)[0].transpose(0, 1)  # of [1, Hkv, g, m, n]


def _observe(
    model: nn.Module, contexts: Sequence[Context], layers: Sequence[int], num_layers: int, weights: dict[str, float],
    observe: Callable[[int, Call, dict[int, Tensor], Tensor], None], advance: Callable[[], None],
) -> None:  # fmt: skip
    """Replay the contexts densely, and pass each attention call of `layers` to `observe`.

    `observe` also takes the token sets by layer, to which it adds the call's own, and the weight `[m]` of each query:
    queries of one block weigh the same, and so do blocks of one kind; tokens that belong to the prompt weigh nothing.
    """
    full = [LayerRole(layer, "full") for layer in range(num_layers)]
    blocks = [block for context in contexts for block in context.blocks]
    count = {kind: sum(block.kind == kind for block in blocks) for kind in weights}
    for context in contexts:
        sets: dict[int, Tensor] = {}
        block_weights = [weights[block.kind] / count[block.kind] / block.steps for block in context.blocks]

        def on_call(
            layer: int, call: Call, tokens: Tokens, sets: dict[int, Tensor] = sets,
            block_weights: list[float] = block_weights,
        ) -> None:  # fmt: skip
            if layer == layers[0]:
                sets.clear()  # a new pass begins: models with layers that forget tokens take one for every block
            if layer in layers:
                weight = torch.tensor(block_weights, device=call.query.device)[tokens.block]
                exact = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float())
                observe(layer, exact, sets, weight * ~tokens.dense)

        replay(model, context, full, on_call)
        advance()


def best_selections(
    losses: Tensor, layers: Sequence[int], selections: int, dense: int
) -> list[tuple[float, tuple[int, ...]]]:
    """The best `selections` layers for each first selection, one of the first `dense` + 1 layers: (loss, layers).

    Every layer between two selections reuses the tokens of the former; those before the first stay dense. The least
    loss comes first. Below, layers are counted by their place in `layers`, not by their number in the model.
    """
    last = len(layers)

    def segment_loss(first: int, end: int) -> float:
        """Loss of the layers after `first` and before `end`, which reuse the tokens of `first`."""
        return sum(losses[layers[first], layers[place]].item() for place in range(first + 1, end))

    segments = {pair: segment_loss(*pair) for pair in itertools.combinations(range(last + 1), 2)}
    # (number of selections, the first of them) -> the least loss from there on, and the selections
    best = {(1, first): (segments[first, last], (first,)) for first in range(last)}
    for number in range(2, selections + 1):
        for first in range(last - number + 1):
            best[number, first] = min(
                (segments[first, second] + best[number - 1, second][0], (first, *best[number - 1, second][1]))
                for second in range(first + 1, last - number + 2)
            )
    results = [best[selections, first] for first in range(min(dense, last - selections) + 1)]
    return sorted((loss, tuple(layers[place] for place in places)) for loss, places in results)


def total_loss(losses: Tensor, layers: Sequence[int], selections: Sequence[int]) -> float:
    """The loss of given selections, which `best_selections` minimizes."""
    source, total = None, 0.0
    for layer in layers:
        if layer in selections:
            source = layer
        elif source is not None:
            total += losses[source, layer].item()
    return total

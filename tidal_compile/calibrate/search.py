"""The search for selection layers: from what the statistics say to what the model's answers say.

Candidates are tuples of selection layers. The first come from the dynamic programme. Then, turn by turn, the best
candidate that had no turn yet has one of its selections moved, to where the statistics like it best, in a few ways. The
real loss decides: the KL divergence of the sparse model's predictions from the dense model's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..policy import LayerRole
from ..replay import Context, replay
from .statistics import best_selections, total_loss

BREADTH = 12  # moves of a candidate in one turn


@dataclass(frozen=True)
class Score:
    """How a policy's predictions differ from the dense model's, a mean over the positions of each kind of block.

    `kl` in nats; `agreement`: how often the likeliest token is the same; `answered`: of the answers that the dense
    model gets right, the share that the policy does; `loss`: the weighted mean of `kl`.
    """

    loss: float
    kl: dict[str, float]
    agreement: dict[str, float]
    answered: float


@dataclass(frozen=True)
class Found:
    """One tried candidate."""

    selections: tuple[int, ...]
    score: Score
    new: bool = True  # not from an earlier run


def dense_predictions(model: nn.Module, contexts: Sequence[Context], num_layers: int) -> list[list[Tensor]]:
    """Log-probabilities `[m - dense, vocab]` of every block of every context."""
    full = [LayerRole(layer, "full") for layer in range(num_layers)]
    return [[logits.log_softmax(-1) for logits in replay(model, one, full)] for one in contexts]


def measure(
    model: nn.Module, contexts: Sequence[Context], dense: Sequence[Sequence[Tensor]], roles: Sequence[LayerRole],
    weights: dict[str, float],
) -> Score:  # fmt: skip
    """Decode every block under these roles, and compare."""
    kl: dict[str, list[Tensor]] = {kind: [] for kind in weights}
    same: dict[str, list[Tensor]] = {kind: [] for kind in weights}
    right, kept = 0, 0
    for context, expected in zip(contexts, dense, strict=True):
        for block, wanted, logits in zip(context.blocks, expected, replay(model, context, roles), strict=True):
            got = logits.log_softmax(-1)
            kl[block.kind].append((wanted.exp() * (wanted - got)).sum(-1))
            same[block.kind].append((wanted.argmax(-1) == got.argmax(-1)).float())
            if block.labels is not None and torch.equal(wanted.argmax(-1), block.labels):
                right += 1
                kept += torch.equal(got.argmax(-1), block.labels)
    means = {kind: torch.cat(values).mean().item() for kind, values in kl.items() if values}
    return Score(
        loss=sum(weights[kind] * mean for kind, mean in means.items()) / sum(weights[kind] for kind in means),
        kl=means,
        agreement={kind: torch.cat(values).mean().item() for kind, values in same.items() if values},
        answered=kept / right if right else 1.0,
    )


def search(
    score: Callable[[tuple[int, ...]], Score], losses: Tensor, layers: Sequence[int], selections: int, dense: int,
    tries: int, known: dict[tuple[int, ...], Score] | None = None,
) -> Iterator[Found]:  # fmt: skip
    """Yields every candidate with its score as it is tried; `known` scores are not computed again.

    `layers` may select, at most `dense` of them before the first selection stay dense.
    """
    scores = dict(known or {})
    tried: set[tuple[int, ...]] = set()

    def attempt(candidate: tuple[int, ...]) -> Found:
        tried.add(candidate)
        new = candidate not in scores
        if new:
            scores[candidate] = score(candidate)
        return Found(candidate, scores[candidate], new)

    for _, candidate in best_selections(losses, layers, selections, dense):
        yield attempt(candidate)
    turns: dict[tuple[int, ...], int] = {}
    while len(tried) < tries:
        moves = {one: [move for move in _moves(one, layers, dense) if move not in tried] for one in tried}
        open_ones = [one for one in tried if moves[one]]
        if not open_ones:
            return
        origin = min(open_ones, key=lambda one: (turns.get(one, 0), scores[one].loss, one))
        turns[origin] = turns.get(origin, 0) + 1
        likely = sorted(moves[origin], key=lambda move: (total_loss(losses, layers, move), move))
        for move in likely[: min(BREADTH, tries - len(tried))]:
            yield attempt(move)


def _moves(selections: tuple[int, ...], layers: Sequence[int], dense: int) -> set[tuple[int, ...]]:
    """Every candidate that differs in one selection."""
    moved = set()
    for each in selections:
        rest = [layer for layer in selections if layer != each]
        for layer in layers:
            if layer not in selections and layers.index(min([*rest, layer])) <= dense:
                moved.add(tuple(sorted([*rest, layer])))
    return moved

"""The search for selection layers: from what the statistics say to what the model's answers say.

The first candidates come from the dynamic programme, for each way to share token sets. Then, turn by turn, the best
candidate that had no turn yet is changed in a few ways: its tokens shared another way, or one of its selections moved
to where the statistics like it best. At last the best one is refined: where each layer takes its tokens from, and how
many. The real loss decides: the KL divergence of the sparse model's predictions from the dense model's.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..policy import LayerRole
from ..replay import Context, replay
from .statistics import Statistics, best_selections, total_loss

BREADTH = 12  # moves of a candidate in one turn
SHIFTS = (0.5, 0.75, 1.25, 1.5)  # what becomes of the budget of a selection, when another one's pays for it


@dataclass(frozen=True)
class Candidate:
    """Selection layers; who shares a token set; and, if they are varied, the `budgets` of the selections.

    `nearest`: a layer reuses the tokens of the selection before it; otherwise of the one that serves it best.
    """

    selections: tuple[int, ...]
    share: str
    nearest: bool = True
    budgets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """How a policy's predictions differ from the dense model's, a mean over the positions of each kind of block.

    `kl` in nats; `agreement`: how often the likeliest token is the same; `answered`: of the answers that the dense
    model gets right, the share that the policy does, if there are any; `loss`: the weighted mean of `kl`.
    """

    loss: float
    kl: dict[str, float]
    agreement: dict[str, float]
    answered: float | None


@dataclass(frozen=True)
class Found:
    """One tried candidate."""

    candidate: Candidate
    score: Score


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
        answered=kept / right if right else None,
    )


def explore(
    score: Callable[[Candidate], Score], statistics: Mapping[str, Statistics], layers: Sequence[int], selections: int,
    dense: int, budget: int, least: int, tries: int, vary_budgets: bool,
) -> Iterator[Found]:  # fmt: skip
    """Yields every candidate with its score as it is tried: `tries` by `search`, and refinements of the best.

    `statistics` by who shares a token set. `layers` may select; at most `dense` of them before the first selection stay
    dense. `budget` of a selection, which may become `least` where budgets are varied.
    """
    best: Found | None = None

    def attempt(candidate: Candidate) -> Found:
        nonlocal best
        found = Found(candidate, score(candidate))
        best = found if best is None or found.score.loss < best.score.loss else best
        return found

    yield from search(attempt, statistics, layers, selections, dense, tries)
    if selections == 1:  # serves every layer, with the one budget that there is
        return
    yield attempt(dataclasses.replace(best.candidate, nearest=False))
    if vary_budgets:
        losses = statistics[best.candidate.share].losses
        for budgets in _shifts(best.candidate, losses, layers, budget, least):
            yield attempt(dataclasses.replace(best.candidate, budgets=budgets))


def search(
    attempt: Callable[[Candidate], Found], statistics: Mapping[str, Statistics], layers: Sequence[int],
    selections: int, dense: int, tries: int,
) -> Iterator[Found]:  # fmt: skip
    """Best first: tries the candidates of the programme, then changes of the best ones, `tries` in all."""
    tried: dict[Candidate, float] = {}
    turns: dict[Candidate, int] = {}

    def once(candidate: Candidate) -> Found:
        found = attempt(candidate)
        tried[candidate] = found.score.loss
        return found

    for share, found in statistics.items():
        for _, chosen in best_selections(found.losses, layers, selections, dense):
            if len(tried) < tries:
                yield once(Candidate(chosen, share))
    while len(tried) < tries:
        changes = {one: _changes(one, statistics, layers, dense) - tried.keys() for one in tried}
        open_ones = [one for one in tried if changes[one]]
        if not open_ones:
            return
        origin = min(open_ones, key=lambda one: (turns.get(one, 0), tried[one]))
        turns[origin] = turns.get(origin, 0) + 1

        def promise(one: Candidate, origin: Candidate = origin) -> tuple:
            loss = total_loss(statistics[one.share].losses, layers, one.selections)
            return one.share == origin.share, loss, one.selections

        for change in sorted(changes[origin], key=promise)[: min(BREADTH, tries - len(tried))]:
            yield once(change)


def _changes(
    candidate: Candidate, statistics: Mapping[str, Statistics], layers: Sequence[int], dense: int
) -> set[Candidate]:
    """Every candidate that shares its tokens another way, or differs in one selection."""
    selections, share = candidate.selections, candidate.share
    changed = {Candidate(selections, other) for other in statistics if other != share}
    for each in selections:
        rest = [layer for layer in selections if layer != each]
        for layer in layers:
            if layer not in selections and layers.index(min([*rest, layer])) <= dense:
                changed.add(Candidate(tuple(sorted([*rest, layer])), share))
    return changed


def sources(candidate: Candidate, losses: Tensor, layers: Sequence[int]) -> dict[int, int]:
    """The selection that each reuse layer takes its tokens from."""
    found = {}
    for layer in layers:
        before = [one for one in candidate.selections if one < layer]
        if before and layer not in candidate.selections:
            found[layer] = before[-1] if candidate.nearest else min(before, key=lambda one: losses[one, layer].item())
    return found


def _shifts(
    candidate: Candidate, losses: Tensor, layers: Sequence[int], budget: int, least: int
) -> Iterator[tuple[int, ...]]:
    """Budgets of the selections that read as many tokens in all: one gets more or less, another one pays for it."""
    from_ = list(sources(candidate, losses, layers).values())
    users = [from_.count(selection) for selection in candidate.selections]
    for one, other in itertools.permutations(range(len(users)), 2):
        for factor in SHIFTS:
            budgets = [budget] * len(users)
            budgets[one] = round(budget * factor)
            if users[one] and users[other]:
                budgets[other] -= round(users[one] * (budgets[one] - budget) / users[other])
                if min(budgets) >= max(least, budget // 4):
                    yield tuple(budgets)

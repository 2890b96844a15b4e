"""The search for selection layers, judged by the model's own predictions.

A candidate's loss is the KL divergence of the sparse model's predictions from the dense model's. The first candidates
come from the dynamic programme over the statistics, one set of them for each way to share token sets. From there the
search goes on, best first, by small changes of the candidates tried so far: tokens are shared another way, or one
selection moves to another layer, in the order in which the statistics expect the least loss. Finally the best candidate
is refined: where each layer takes its tokens from, how large the budget of each selection is, how each one chooses, and
which layers had better sample by hashes than reuse tokens.
Candidates that read more bytes a step than allowed aren't tried.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.roles import LayerRole
from ..replay import Context, replay
from ..settings import CalibrationSettings
from .statistics import Statistics, best_selections, total_loss

NOTHING = 1.01  # times the loss: less than what another text changes
BREADTH = 12  # changes of a candidate that are tried in one turn
SHIFTS = (0.5, 0.75, 1.25, 1.5)  # factors of one selection's budget, where another selection's makes up the difference

Form = tuple[int, float]  # how a selection chooses: `page` and `keep` of `by: pages`
EXACT: Form = (0, 0.0)  # or `by: scores`
FORMS: tuple[Form, ...] = (  # the most exact ones first
    EXACT, (8, 8.0), (16, 8.0), (16, 4.0), (16, 2.0), (32, 4.0), (16, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """What a policy is made of: the selection layers, who shares a token set, and the budget of each selection.

    `nearest`: a layer reuses the tokens of the nearest selection before it, otherwise those of the earlier selection
    that costs it the least loss. `budgets`: empty where all selections have the policy's default. `sparse`: the
    selections whose output is sparse, though the policy's default is full. `forms`: how each selection chooses; empty
    where all of them score every key. `sampled`: the layers that sample by hashes instead of reusing tokens.
    """

    selections: tuple[int, ...]
    share: str
    nearest: bool = True
    budgets: tuple[int, ...] = ()
    sparse: tuple[int, ...] = ()
    forms: tuple[Form, ...] = ()
    sampled: tuple[int, ...] = ()

    @property
    def every_form(self) -> tuple[Form, ...]:
        """How each selection chooses, one by one."""
        return self.forms or (EXACT,) * len(self.selections)


@dataclass(frozen=True)
class Score:
    """How a policy's predictions differ from the dense model's.

    `kl`, in nats, and `agreement`, how often the likeliest token is the same, are means over the positions of each kind
    of block. `loss` is the weighted mean of `kl`. `answered` is the share of the dense model's right answers that the
    policy gives, too; None if the dense model gives none.
    """

    loss: float
    kl: dict[str, float]
    agreement: dict[str, float]
    answered: float | None


@dataclass(frozen=True)
class Found:
    """A candidate that was tried, with its score, and the bytes that it reads a step.

    `anchor`: the least loss so far of the chain of candidates with the same layers that led here.
    """

    candidate: Candidate
    score: Score
    cost: int
    anchor: float


def is_better(tried: Found, best: Found | None) -> bool:
    """Whether a candidate loses less than the best so far, or nothing and reads fewer bytes with the same layers."""
    if best is None:
        return True
    saves = _has_layers_of(tried.candidate, best.candidate) and tried.cost < best.cost
    return tried.score.loss <= best.anchor * NOTHING if saves else tried.score.loss < best.score.loss


def _has_layers_of(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates differ in nothing but how their selections choose, and in what these return."""
    return dataclasses.replace(one, sparse=other.sparse, forms=other.forms) == other


def dense_predictions(model: nn.Module, contexts: Sequence[Context], num_layers: int) -> list[list[Tensor]]:
    """The dense model's log-probabilities `[decoded tokens, vocab]` for every block of every context."""
    full = [LayerRole(layer, "full") for layer in range(num_layers)]
    return [[logits.log_softmax(-1) for logits in replay(model, context, full)] for context in contexts]


def measure(
    model: nn.Module, contexts: Sequence[Context], dense: Sequence[Sequence[Tensor]], roles: Sequence[LayerRole],
    weights: dict[str, float],
) -> Score:  # fmt: skip
    """Decode every block under these roles, and compare with the `dense` predictions."""
    kl: dict[str, list[Tensor]] = {kind: [] for kind in weights}
    agreement: dict[str, list[Tensor]] = {kind: [] for kind in weights}
    dense_right = both_right = 0
    for context, predictions in zip(contexts, dense, strict=True):
        for block, exact, logits in zip(context.blocks, predictions, replay(model, context, roles), strict=True):
            sparse = logits.log_softmax(-1)
            kl[block.kind].append((exact.exp() * (exact - sparse)).sum(-1))
            exact_tokens, sparse_tokens = exact.argmax(-1), sparse.argmax(-1)
            agreement[block.kind].append((exact_tokens == sparse_tokens).float())
            if block.labels is not None and torch.equal(exact_tokens, block.labels):
                dense_right += 1
                both_right += torch.equal(sparse_tokens, block.labels)
    means = {kind: torch.cat(values).mean().item() for kind, values in kl.items() if values}
    return Score(
        loss=sum(weights[kind] * mean for kind, mean in means.items()) / sum(weights[kind] for kind in means),
        kl=means,
        agreement={kind: torch.cat(values).mean().item() for kind, values in agreement.items() if values},
        answered=both_right / dense_right if dense_right else None,
    )


def explore(
    score: Callable[[Candidate], Score], cost: Callable[[Candidate], int], statistics: Mapping[str, Statistics],
    layers: Sequence[int], selections: int, dense: int, budget: int, least: int, settings: CalibrationSettings,
) -> Iterator[Found]:  # fmt: skip
    """Yield every candidate with its score as it is tried: some by `search`, then refinements of the best one.

    `cost`: the bytes that a candidate reads a step. `statistics`: for each way to share token sets, by the name of who
    shares them. `layers`: those that may select, of which up to `dense` before the first selection stay dense.
    `budget`: of every selection, no smaller than `least` where the settings ask for refinements with other budgets.

    Yields nothing if the settings limit the bytes, and no candidate of the dynamic programme reads so few.
    """
    best: Found | None = None
    limit = math.inf if settings.max_bytes is None else settings.max_bytes
    cost = functools.cache(cost)  # it makes a policy of the candidate

    def fits(candidate: Candidate) -> bool:
        return cost(candidate) <= limit

    def attempt(candidate: Candidate) -> Found:
        nonlocal best
        tried = score(candidate)
        follows = best is not None and _has_layers_of(candidate, best.candidate)
        result = Found(candidate, tried, cost(candidate), min(tried.loss, best.anchor) if follows else tried.loss)
        best = result if is_better(result, best) else best
        return result

    def refine(**changes: Any) -> Iterator[Found]:
        change = dataclasses.replace(best.candidate, **changes)
        if fits(change):
            yield attempt(change)

    forms = forms_of(settings.by)
    for form, is_sparse in itertools.product(forms, (False, True) if settings.output == "auto" else (False,)):
        starts = [one for one in _starts(statistics, layers, selections, dense, form, is_sparse) if fits(one)]
        if starts:
            break
    else:
        return
    yield from search(attempt, starts, statistics, layers, dense, settings.tries, fits)
    if selections > 1:  # one is the only source of tokens, with the whole budget
        yield from refine(nearest=False)
    if selections > 1 and settings.vary_budgets:
        losses = statistics[best.candidate.share].losses
        for budgets in _shifts(best.candidate, losses, layers, budget, least):
            yield from refine(budgets=budgets)
    for number, selection in enumerate(best.candidate.selections):
        now = best.candidate.every_form
        for form in forms:
            if form != now[number]:
                kept = tuple(one for one in best.candidate.sparse if one != selection)
                yield from refine(forms=(*now[:number], form, *now[number + 1 :]), sparse=kept)
    if settings.output == "auto":
        for selection, form in zip(best.candidate.selections, best.candidate.every_form, strict=True):
            if form == EXACT and selection not in best.candidate.sparse:
                yield from refine(sparse=(*best.candidate.sparse, selection))
    if settings.sample is not None:
        losses = statistics[best.candidate.share].losses
        reusing = sources(best.candidate, losses, layers)
        for layer in sorted(reusing, key=lambda layer: -losses[reusing[layer], layer])[:BREADTH]:
            yield from refine(sampled=tuple(sorted((*best.candidate.sampled, layer))))


def forms_of(by: str) -> Sequence[Form]:
    """The forms that a setting allows."""
    return {"scores": [EXACT], "pages": FORMS[1:], "auto": FORMS}[by]


def _starts(
    statistics: Mapping[str, Statistics], layers: Sequence[int], selections: int, dense: int, form: Form,
    is_sparse: bool,
) -> list[Candidate]:  # fmt: skip
    """The candidates of the dynamic programme, whose selections all choose in one form, and return one output."""
    forms = () if form == EXACT else (form,) * selections
    return [
        Candidate(chosen, share, forms=forms, sparse=chosen if is_sparse and form == EXACT else ())
        for share in statistics
        for _, chosen in best_selections(statistics[share].losses, layers, selections, dense)
    ]


def search(
    attempt: Callable[[Candidate], Found], starts: Sequence[Candidate], statistics: Mapping[str, Statistics],
    layers: Sequence[int], dense: int, tries: int, fits: Callable[[Candidate], bool] = lambda _: True,
) -> Iterator[Found]:  # fmt: skip
    """Try up to `tries` candidates, and yield each as it is tried: first the `starts`, then changes that `fit`.

    The frontier is every tried candidate that has untried changes. In each turn, its member with the fewest turns so
    far, and among these the one with the least loss, has its BREADTH most promising changes tried. So a turn goes to
    the best candidate that had none yet, and no candidate holds up the search by changes that lead nowhere.
    """
    losses: dict[Candidate, float] = {}  # of the candidates that were tried
    turns: dict[Candidate, int] = {}
    unfit: set[Candidate] = set()

    def attempt_once(candidate: Candidate) -> Found:
        result = attempt(candidate)
        losses[candidate] = result.score.loss
        return result

    for start in starts[:tries]:
        yield attempt_once(start)
    while len(losses) < tries:
        untried = {one: _changes(one, statistics, layers, dense) - losses.keys() - unfit for one in losses}
        frontier = [candidate for candidate in losses if untried[candidate]]
        if not frontier:
            return
        origin = min(frontier, key=lambda candidate: (turns.get(candidate, 0), losses[candidate]))
        turns[origin] = turns.get(origin, 0) + 1
        promising = sorted(untried[origin], key=functools.partial(_promise, origin, statistics, layers))
        turn_ends = min(tries, len(losses) + BREADTH)
        for candidate in promising:
            if len(losses) == turn_ends:
                break
            if fits(candidate):
                yield attempt_once(candidate)
            else:
                unfit.add(candidate)


def _changes(
    candidate: Candidate, statistics: Mapping[str, Statistics], layers: Sequence[int], dense: int
) -> set[Candidate]:
    """Every candidate that shares its tokens another way, or has one selection in another layer."""
    selections = candidate.selections
    changed = {dataclasses.replace(candidate, share=share) for share in statistics if share != candidate.share}
    for moved in selections:
        others = [layer for layer in selections if layer != moved]
        for layer in layers:
            if layer not in selections and layers.index(min([*others, layer])) <= dense:
                moved_to = tuple(sorted([*others, layer]))
                sparse = moved_to if candidate.sparse else ()
                changed.add(dataclasses.replace(candidate, selections=moved_to, sparse=sparse))
    return changed


def _promise(
    origin: Candidate, statistics: Mapping[str, Statistics], layers: Sequence[int], change: Candidate
) -> tuple:
    """The place of a change among the changes of `origin`, as a key to sort by: the most promising come first.

    The few changes of the way to share come before the many moves of a selection. Beyond that, changes are in the order
    of the loss that the statistics expect of them.
    """
    expected_loss = total_loss(statistics[change.share].losses, layers, change.selections)
    return change.share == origin.share, expected_loss, change.selections


def sources(candidate: Candidate, losses: Tensor, layers: Sequence[int]) -> dict[int, int]:
    """For each reuse layer, the selection that it takes its tokens from."""
    chosen = {}
    for layer in layers:
        earlier = [selection for selection in candidate.selections if selection < layer]
        if earlier and layer not in (*candidate.selections, *candidate.sampled):
            best = min(earlier, key=lambda selection: losses[selection, layer].item())
            chosen[layer] = earlier[-1] if candidate.nearest else best
    return chosen


def _shifts(
    candidate: Candidate, losses: Tensor, layers: Sequence[int], budget: int, least: int
) -> Iterator[tuple[int, ...]]:
    """Other budgets of the selections, with which a step reads as many tokens in all.

    One selection gets more or fewer tokens, and another one makes up for it, in proportion to the layers that reuse
    their tokens. No budget falls below `least` or a quarter of `budget`.
    """
    reused = list(sources(candidate, losses, layers).values())
    users = [reused.count(selection) for selection in candidate.selections]
    for shifted, payer in itertools.permutations(range(len(users)), 2):
        for factor in SHIFTS:
            budgets = [budget] * len(users)
            budgets[shifted] = round(budget * factor)
            if users[shifted] and users[payer]:
                budgets[payer] -= round(users[shifted] * (budgets[shifted] - budget) / users[payer])
                if min(budgets) >= max(least, budget // 4):
                    yield tuple(budgets)

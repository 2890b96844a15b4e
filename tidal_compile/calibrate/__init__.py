"""Choose selection layers for a model: `calibrate`, and `calibrate_curve` for several costs.

The way through: text -> `tasks` (contexts and blocks) -> `statistics` (head maps, and a dynamic programme on what
layers lose, for each way to share token sets) -> `search` (the real loss, on `replay`, which decodes a block at once)
-> a policy that says how it was found.
"""

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import TidalError, UnsupportedModelError
from ..explain import decode_calls
from ..models import describe, name_of
from ..passes.match import Unmatched, policy_layers
from ..passes.plan import kv_share, make_plan
from ..policy import LayerRole, Policy, fitting
from ..provenance import check_same, versions
from ..replay import Context, cannot_replay
from ..text import default_text, digest
from .search import Candidate, Found, Score, dense_predictions, explore, measure, sources
from .statistics import Statistics, head_maps, layer_losses
from .tasks import make_contexts

KINDS = ("text", "answer", "copy")


@dataclass(frozen=True)
class Progress:
    """Where a calibration stands: the stage, what of it is done, and the best policy so far."""

    stage: str
    done: int
    total: int
    best: Found | None = None


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Goal:
    """A number of selections; or the quality to reach with as few as possible, and with fewer than all layers."""

    selections: int | None = None
    max_kl: float | None = None
    min_agreement: float | None = None

    @property
    def to_reach(self) -> str | None:
        """The quality, in words."""
        if self.max_kl is not None:
            return f"max_kl {self.max_kl}"
        return None if self.min_agreement is None else f"min_agreement {self.min_agreement}"

    def numbers(self, layers: Sequence[int]) -> Sequence[int]:
        """The numbers of selections to try, in order."""
        return range(1, len(layers)) if self.selections is None else [self.selections]

    def reached(self, score: Score, weights: Mapping[str, float]) -> bool:
        """Whether a score has the quality; never, if there is none to reach."""
        if self.max_kl is not None:
            return score.loss <= self.max_kl
        agreement = [value for kind, value in score.agreement.items() if weights[kind]]
        return self.min_agreement is not None and min(agreement) >= self.min_agreement


@dataclass(frozen=True)
class Ground:
    """What a model is calibrated on, prefilled: contexts, and what the dense model predicts there."""

    model: PreTrainedModel
    calls: list
    num_layers: int
    layers: tuple[int, ...]  # that may select
    contexts: list[Context]
    expected: list[list[Tensor]]
    about: dict[str, Any]

    @property
    def weights(self) -> dict[str, float]:
        """What each kind of loss counts."""
        return self.about["weights"]


@dataclass(frozen=True)
class Stage:
    """One budget: the policies' defaults, and the scores known with them, which `memory` keeps."""

    settings: dict[str, int]
    memory: Path | None
    known: dict[Candidate, Score]


@dataclass(frozen=True)
class Effort:
    """What a search may try."""

    dense: int | None
    vary_budgets: bool
    tries: int
    share: str


def calibrate(
    model: PreTrainedModel, tokenizer: Any, text: str | None = None, *, budget: int | Sequence[int] = 1024,
    selections: int | None = None, max_kl: float | None = None, min_agreement: float | None = None,
    context: int = 4096, contexts: int = 6, dense: int | None = None, sinks: int = 4, recent: int = 32,
    share: str = "auto", vary_budgets: bool = False, weights: Mapping[str, float] | None = None, tries: int = 60,
    seed: int = 0, name: str = "calibrated", memory: str | Path | None = None,
    report: Report = lambda progress: None,
) -> Policy:  # fmt: skip
    """The policy with the best selection layers for a model, by its own predictions on the user's text.

    `text` (default: `default_text`) is cut into `contexts` of about `context` tokens, in which facts are hidden; see
    `tasks`. Give `selections`, a number of layers that select (default: 3, or a third of a shallow model's layers), or
    a quality to reach with as few as possible: `max_kl`, the mean KL divergence from the dense model in nats, or
    `min_agreement`, how often the likeliest token stays the same; of several budgets, the policy that reaches it and
    reads least is returned. Up to `dense` layers before the first selection stay dense (default: 2, or an eighth of a
    shallow model's layers). `budget`, `sinks` and `recent` are the policy's defaults. `share` says who shares a token
    set, with a map of heads for `kv_head`; `auto` tries `kv_head` and `layer`. `vary_budgets` gives selections budgets
    of their own, as many tokens in all. `weights` of the kinds of loss, text, answer and copy, are 1 each. `tries`
    bounds the policies tried for each number of selections, before the best one is refined. `memory` is a file that
    keeps the scores, from which a second run goes on. `report` is told about every step. An interrupt (Ctrl-C) ends
    the search, and the best policy so far is returned.

    Raises `TidalError` for a text that is too short, a quality that no number of selections reaches, or a `memory` of
    another calibration; `UnsupportedModelError` for a model whose attention can't be rewritten.
    """
    goal = Goal(selections, max_kl, min_agreement)
    several = not isinstance(budget, int)
    check_settings(budget if several else [budget], context, contexts, tries, [goal])
    if several and (not budget or goal.to_reach is None):
        raise TidalError("calibrate: several budgets go with a quality to reach; `calibrate_curve` makes a policy each")
    text = default_text() if text is None else text
    about = _about(model, text, context, contexts, weights, seed)
    budgets = sorted(budget, reverse=True) if several else [budget]  # the largest is the likeliest to reach it
    stages = [_stage(about, one, sinks, recent, memory, several) for one in budgets]
    ground = _prepare(model, tokenizer, text, about, [] if selections is None else [selections], report)
    goal = Goal(_few(ground.layers)) if goal == Goal() else goal
    found = _run(ground, stages, [goal], Effort(dense, vary_budgets, tries, share), lambda *_: name, report)
    reaching = [policy for policy in found if policy.calibration["reached"]]
    if goal.to_reach is None or (found[-1].calibration["interrupted"] and not reaching):
        return found[-1]
    if not reaching:
        nearest = min(found, key=lambda policy: policy.calibration["loss"]).calibration
        raise TidalError(
            f"calibrate: no number of selections under {len(ground.layers)} reaches {goal.to_reach} at budget "
            f"{', '.join(map(str, budgets))}; the nearest, at {nearest['budget']}, has a loss of {nearest['loss']:.4f} "
            f"and an agreement of {min(nearest['agreement'].values()):.3f}"
        )
    return min(reaching, key=lambda policy: policy.calibration["bytes_per_step"])


def calibrate_curve(
    model: PreTrainedModel, tokenizer: Any, text: str | None = None, *, budgets: Sequence[int],
    selections: Sequence[int] | None = None, context: int = 4096, contexts: int = 6, dense: int | None = None,
    sinks: int = 4, recent: int = 32, share: str = "auto", vary_budgets: bool = False,
    weights: Mapping[str, float] | None = None, tries: int = 60, seed: int = 0, name: str = "calibrated",
    memory: str | Path | None = None, report: Report = lambda progress: None,
) -> list[Policy]:  # fmt: skip
    """`calibrate` at every budget with every number of selections, on the same contexts.

    Policies are named by both, and a `memory` file gets the budget into its name. Small budgets have fewer sinks and
    recent tokens. An interrupt ends the whole; what was found till then is returned.
    """
    check_settings(budgets, context, contexts, tries, [Goal(number) for number in selections or [None]])
    text = default_text() if text is None else text
    about = _about(model, text, context, contexts, weights, seed)
    stages = [_stage(about, budget, sinks, recent, memory, True) for budget in budgets]
    ground = _prepare(model, tokenizer, text, about, selections or [], report)
    goals = [Goal(number) for number in selections or [_few(ground.layers)]]

    def title(budget: int, number: int) -> str:
        return f"{name}-{budget}-{number}"

    return _run(ground, stages, goals, Effort(dense, vary_budgets, tries, share), title, report)


def check_settings(budgets: Sequence[int], context: int, contexts: int, tries: int, goals: Sequence[Goal]) -> None:
    """Raises `TidalError` for settings that no calibration can follow, whatever the model."""
    for budget in budgets:
        if not 1 <= budget < context:
            raise TidalError(
                f"calibrate: budget {budget}; valid are 1 to {context - 1}, below the context of {context}"
            )
    for name, number in (("contexts", contexts), ("tries", tries)):
        if number < 1:
            raise TidalError(f"calibrate: {name} {number}; at least 1 is needed")
    for goal in goals:
        if sum(value is not None for value in dataclasses.astuple(goal)) > 1:
            raise TidalError("calibrate: give one of selections, max_kl and min_agreement")
        if goal.max_kl is not None and not goal.max_kl > 0:
            raise TidalError(f"calibrate: max_kl {goal.max_kl}; a KL divergence to reach is above 0")
        if goal.min_agreement is not None and not 0 <= goal.min_agreement <= 1:
            raise TidalError(f"calibrate: min_agreement {goal.min_agreement}; valid are 0 to 1")


def _run(
    ground: Ground, stages: Sequence[Stage], goals: Sequence[Goal], effort: Effort,
    title: Callable[[int, int | None], str], report: Report,
) -> list[Policy]:  # fmt: skip
    """The best policy of each stage for each goal; after one that reaches a quality, only cheaper ones.

    An interrupt ends it; what was found till then is returned.
    """
    found: list[Policy] = []
    try:
        for stage in stages:
            statistics = _statistics(ground, stage.settings, effort.share, report)
            published = _published(ground, stage.settings)
            for goal in goals:
                reaching = [one.calibration["bytes_per_step"] for one in found if one.calibration["reached"]]
                name = title(stage.settings["budget"], goal.selections)
                limit = min(reaching, default=math.inf)
                policy = _find(ground, stage, statistics, goal, effort, limit, name, published, report)
                if policy is not None:
                    found.append(policy)
                    if policy.calibration["interrupted"]:
                        return found
    except KeyboardInterrupt:
        if not found:
            raise
    return found


def _stage(
    about: dict[str, Any], budget: int, sinks: int, recent: int, memory: str | Path | None, several: bool
) -> Stage:
    """A budget, one of several or the only one, and what an earlier run has found with it."""
    settings = {"budget": budget, "sinks": sinks, "recent": recent}
    if several:
        settings = fitting(**settings)
    elif sinks + recent > budget:
        raise TidalError(f"calibrate: budget {budget} is smaller than sinks + recent ({sinks} + {recent})")
    file = None if memory is None else Path(memory)
    if several and file is not None:
        file = file.with_stem(f"{file.stem}-{budget}")
    return Stage(settings, file, _read(file, {**about, **settings}))


def _few(layers: Sequence[int]) -> int:
    """How many layers select if nobody says it."""
    return min(3, max(1, len(layers) // 3))


def _about(
    model: PreTrainedModel, text: str, context: int, contexts: int, weights: Mapping[str, float] | None, seed: int
) -> dict[str, Any]:
    """What scores depend on, besides the policy."""
    weighed = dict.fromkeys(KINDS, 1.0) | dict(weights or {})
    if unknown := set(weighed) - set(KINDS):
        raise TidalError(f"calibrate: unknown kind of loss {sorted(unknown)[0]!r}; kinds are {', '.join(KINDS)}")
    if not all(0 <= one < math.inf for one in weighed.values()) or not any(weighed.values()):
        raise TidalError(f"calibrate: weights must be numbers from 0 on, and one above it; found {weighed}")
    return describe(model) | {
        "text": digest(text), "context": context, "contexts": contexts, "seed": seed, "weights": weighed,
    }  # fmt: skip


def _layers(model: PreTrainedModel, selections: Sequence[int]) -> tuple[list, int, tuple[int, ...]]:
    """The model's attention calls, its depth, and the layers that may select."""
    calls, num_layers = decode_calls(model)
    layers = policy_layers(calls)
    stuck = {call.reason: call.layer for call in calls if isinstance(call, Unmatched) and call.layer in layers}
    if stuck:
        reasons = "; ".join(f"layer {layer}: {reason}" for reason, layer in stuck.items())
        raise UnsupportedModelError(f"calibrate: the attention of {type(model).__name__} can't be rewritten: {reasons}")
    if not all(1 <= number < len(layers) for number in selections or [1]):
        asked = ", ".join(map(str, selections or [1]))
        raise TidalError(
            f"calibrate: {asked} selections, but the model has {len(layers)} layers that could select, and one at "
            "least must reuse"
        )
    if reason := cannot_replay(model, calls):
        raise UnsupportedModelError(f"calibrate: {type(model).__name__} can't be calibrated: {reason}")
    return calls, num_layers, layers


@torch.no_grad()
def _prepare(
    model: PreTrainedModel, tokenizer: Any, text: str, about: dict[str, Any], selections: Sequence[int], report: Report
) -> Ground:
    """Prefill the contexts, and see what the dense model predicts, if it has layers for the `selections`."""
    calls, num_layers, layers = _layers(model, selections)
    made = []
    for one in make_contexts(model, tokenizer, text, about["context"], about["contexts"], seed=about["seed"]):
        made.append(one)
        report(Progress("prefill", len(made), about["contexts"]))
    return Ground(model, calls, num_layers, layers, made, dense_predictions(model, made, num_layers), about)


@torch.no_grad()
def _find(
    ground: Ground, stage: Stage, statistics: dict[str, Statistics], goal: Goal, effort: Effort, limit: float,
    name: str, published: dict[str, Any], report: Report,
) -> Policy | None:  # fmt: skip
    """The best policy of a stage for a goal; None if all that could be would read `limit` bytes a step or more.

    It says what is `published` beside it.
    """
    layers, settings = ground.layers, stage.settings
    about = {**ground.about, **settings}
    dense = min(2, len(layers) // 8) if effort.dense is None else effort.dense

    def score(candidate: Candidate) -> Score:
        if candidate not in stage.known:
            stage.known[candidate] = _score(ground, _policy(ground, candidate, statistics, settings).roles)
            _write(stage.memory, about, stage.known)
        return stage.known[candidate]

    def cheapest(number: int) -> int:
        candidate = Candidate(layers[:number], next(iter(statistics)))
        return _cost(ground, _policy(ground, candidate, statistics, settings).roles)["bytes_per_step"]

    best: Found | None = None
    trace: dict[Candidate, float] = {}
    interrupted = reached = False
    least = settings["sinks"] + settings["recent"]
    try:
        for number in itertools.takewhile(lambda number: cheapest(number) < limit, goal.numbers(layers)):
            for found in explore(
                score, statistics, layers, number, dense, settings["budget"], least, effort.tries, effort.vary_budgets
            ):
                trace[found.candidate] = round(found.score.loss, 6)
                reached = goal.reached(found.score, ground.weights)
                if best is None or reached or found.score.loss < best.score.loss:
                    best = found
                title = f"search at {settings['budget']}, {number} selections"
                report(Progress(title, len(trace), max(effort.tries, len(trace)), best))
                if reached:
                    break
            if reached:
                break
    except KeyboardInterrupt:
        if best is None:
            raise
        interrupted = True
    if best is None:
        return None
    policy = _policy(ground, best.candidate, statistics, settings, name)
    provenance = {
        **about, "goal": goal.to_reach, "reached": reached, "date": datetime.date.today().isoformat(),
        "versions": versions("torch", "transformers"), "interrupted": interrupted, **dataclasses.asdict(best.score),
        **_cost(ground, policy.roles), "published": published,
        "trace": [{**dataclasses.asdict(one), "loss": loss} for one, loss in trace.items()],
    }  # fmt: skip
    return policy.model_copy(update={"calibration": json.loads(json.dumps(provenance))})  # tuples as lists


def _published(ground: Ground, settings: dict[str, int]) -> dict[str, Any]:
    """Score and cost of the layers that are published for the model, or of those that the preset takes otherwise."""
    roles = Policy.preset(
        "tidal", ground.num_layers, attention_layers=ground.layers, model=name_of(ground.model), **settings
    ).roles  # fmt: skip
    selections = [role.layer for role in roles if role.role == "select"]
    return {"selections": selections, **dataclasses.asdict(_score(ground, roles)), **_cost(ground, roles)}


@torch.no_grad()
def _statistics(ground: Ground, settings: dict[str, Any], share: str, report: Report) -> dict[str, Statistics]:
    """What layers lose with each other's tokens, for each way to share token sets that is to be tried."""
    heads = {call.key.meta["example_value"].shape[1] for call in ground.calls if call.layer in ground.layers}
    ways = (["layer"] if heads == {1} else ["kv_head", "layer"]) if share == "auto" else [share]
    found = {}
    for way in ways:
        role = Policy.from_dict({
            "num_layers": 1, "layers": {0: "select"}, "defaults": {**settings, "share": way}
        }).roles[0]  # fmt: skip
        what = (ground.model, ground.contexts, role, ground.layers, ground.num_layers, ground.weights)
        maps = way == "kv_head" and heads != {1}
        steps, total = itertools.count(1), len(ground.contexts) * (2 if maps else 1)

        def advance(title: str = f"statistics, {way}", steps: Any = steps, total: int = total) -> None:
            report(Progress(title, next(steps), total))

        mapped = head_maps(*what, advance) if maps else {}
        found[way] = Statistics(layer_losses(*what, mapped, advance), mapped)
    return found


def _score(ground: Ground, roles: Sequence[LayerRole]) -> Score:
    return measure(ground.model, ground.contexts, ground.expected, roles, ground.weights)


def _policy(
    ground: Ground, candidate: Candidate, statistics: Mapping[str, Statistics], settings: dict[str, Any],
    name: str = "candidate",
) -> Policy:  # fmt: skip
    """Selections, full layers before the first, reuse after it; layers that can't select stay full."""
    found = statistics[candidate.share]
    layers: dict[int, Any] = dict.fromkeys(range(ground.num_layers), "full")
    for number, layer in enumerate(candidate.selections):
        own = {"budget": candidate.budgets[number]} if candidate.budgets else {}
        layers[layer] = {"role": "select", **own}
    for layer, source in sources(candidate, found.losses, ground.layers).items():
        heads = found.heads.get((source, layer))
        mapped = {"heads": list(heads)} if heads and heads != tuple(range(len(heads))) else {}
        layers[layer] = {"role": "reuse", **({} if candidate.nearest else {"from": source}), **mapped}
    data = {
        "name": name, "num_layers": ground.num_layers, "layers": layers,
        "description": f"Selections {', '.join(map(str, candidate.selections))}, calibrated.",
        "defaults": {**settings, "share": candidate.share},
    }  # fmt: skip
    return Policy.from_dict(data)


def _cost(ground: Ground, roles: Sequence[LayerRole]) -> dict[str, Any]:
    """What a step reads at the contexts' length, and what that would make of its time if reading were all of it."""
    share = kv_share(make_plan(ground.calls, roles), ground.about["context"])
    keys = [call.key.meta["example_value"] for call in ground.calls if call.layer in ground.layers]
    cache = sum(2 * key.shape[1] * key.shape[3] * key.element_size() for key in keys) * ground.about["context"]
    weights = sum(one.numel() * one.element_size() for one in ground.model.parameters())
    return {
        "kv_share": share,
        "bytes_per_step": round(weights + share * cache),
        "estimated_speedup": round((weights + cache) / (weights + share * cache), 3),
    }


def _read(memory: Path | None, about: dict[str, Any]) -> dict[Candidate, Score]:
    """Scores of an earlier run of the same calibration. Raises `TidalError` for a file of another one."""
    if memory is None or not memory.exists():
        return {}
    try:
        data = json.loads(memory.read_text())
    except (OSError, ValueError) as error:
        raise TidalError(f"{memory}: can't read the scores of an earlier run: {error}") from None
    check_same(memory, "the scores of another calibration", data.get("about", {}), about)
    return {_candidate(**one["candidate"]): Score(**one["score"]) for one in data["scores"]}


def _candidate(selections: list[int], share: str, nearest: bool, budgets: list[int]) -> Candidate:
    return Candidate(tuple(selections), share, nearest, tuple(budgets))


def _write(memory: Path | None, about: dict[str, Any], known: dict[Candidate, Score]) -> None:
    if memory is None:
        return
    scores = [{"candidate": dataclasses.asdict(one), "score": dataclasses.asdict(its)} for one, its in known.items()]
    part = Path(f"{memory}.part")
    part.write_text(json.dumps({"about": about, "scores": scores}))
    part.replace(memory)  # whole or not at all

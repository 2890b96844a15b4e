"""Choose selection layers for a model: `calibrate` makes one policy, `calibrate_curve` one for each of several costs.

A calibration goes through these steps:

1. `tasks` makes contexts and blocks of a text, and prefills the contexts.
2. `statistics` estimates, for each way to share token sets, what a layer loses with another layer's tokens.
3. `search` proposes candidates, and measures their real loss with `replay`, which decodes a whole block at once.
4. The best candidate becomes a policy, whose `calibration` says how it was found and what it costs.
"""

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import TidalError, UnsupportedModelError
from ..explain import decode_calls
from ..kernels.call import SHARES, fitting
from ..kernels.methods.lsh import Lsh
from ..models import describe, name_of
from ..passes.match import Unmatched, policy_layers
from ..passes.plan import kv_share, make_plan
from ..passes.roles import LayerRole
from ..policy import Policy
from ..progress import Progress
from ..provenance import check_same, versions
from ..replay import PAGE, Context, cannot_replay
from ..settings import CALIBRATION, CalibrationSettings, changed
from ..text import default_text, digest
from .search import (
    EXACT,
    Candidate,
    Found,
    Score,
    dense_predictions,
    explore,
    forms_of,
    is_better,
    measure,
    sources,
)
from .statistics import Statistics, head_maps, layer_losses
from .tasks import make_contexts

KINDS = ("text", "answer", "copy")


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Goal:
    """What a calibration aims at: a number of selections, or a quality to reach with as few selections as possible."""

    selections: int | None = None
    max_kl: float | None = None
    min_agreement: float | None = None

    @property
    def to_reach(self) -> str | None:
        """The quality to reach, in words; None if the goal is a number of selections."""
        if self.max_kl is not None:
            return f"max_kl {self.max_kl}"
        return None if self.min_agreement is None else f"min_agreement {self.min_agreement}"

    def numbers(self, layers: Sequence[int]) -> Sequence[int]:
        """The numbers of selections to try, in order; at least one layer must be left to reuse tokens."""
        return range(1, len(layers)) if self.selections is None else [self.selections]

    def reached(self, score: Score, weights: Mapping[str, float]) -> bool:
        """Whether a score has the quality to reach; always False if the goal is a number of selections."""
        if self.max_kl is not None:
            return score.loss <= self.max_kl
        agreement = [value for kind, value in score.agreement.items() if weights[kind]]
        return self.min_agreement is not None and min(agreement) >= self.min_agreement


@dataclass(frozen=True)
class Ground:
    """What every search of a calibration shares: the model, the prefilled contexts, and the dense predictions there.

    `layers` are those that may select. `about` is what scores depend on, besides the policy.
    """

    model: PreTrainedModel
    calls: list
    num_layers: int
    layers: tuple[int, ...]
    contexts: list[Context]
    expected: list[list[Tensor]]
    about: dict[str, Any]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each kind of block in the loss."""
        return self.about["weights"]


@dataclass(frozen=True)
class Memory:
    """The scores that are known at one budget, and the file that keeps them for a later run, if there is one.

    `settings` are the defaults of the policies at this budget. `about` is what the scores depend on: a file with
    another `about` belongs to another calibration.
    """

    settings: dict[str, Any]
    about: dict[str, Any]
    file: Path | None
    scores: dict[Candidate, Score]

    def add(self, candidate: Candidate, score: Score) -> None:
        """Remember a score, and write all of them to the file."""
        self.scores[candidate] = score
        if self.file is None:
            return
        rows = [
            {"candidate": dataclasses.asdict(known), "score": dataclasses.asdict(known_score)}
            for known, known_score in self.scores.items()
        ]
        part = Path(f"{self.file}.part")
        part.write_text(json.dumps({"about": self.about, "scores": rows}))
        part.replace(self.file)  # an interrupt leaves the old file or the new one, never half of one


def calibrate(
    model: PreTrainedModel, tokenizer: Any, text: str | None = None, *, budget: int | Sequence[int] = 1024,
    selections: int | None = None, max_kl: float | None = None, min_agreement: float | None = None,
    settings: CalibrationSettings = CALIBRATION, name: str = "calibrated", memory: str | Path | None = None,
    report: Report = lambda progress: None, **changes: Any,
) -> Policy:  # fmt: skip
    """Return the policy with the best selection layers for a model, judged by its own predictions on the user's text.

    `text` (default: `default_text`) is cut into contexts, in which facts are hidden; see `tasks`. Give `selections`, a
    number of layers that select (default: 3, or a third of a shallow model's layers), or a quality to reach with as few
    selections as possible: `max_kl`, the mean KL divergence from the dense model in nats, or `min_agreement`, how often
    the likeliest token stays the same. Several budgets go with a quality only: the policy that reaches it and reads the
    fewest bytes is returned. `settings`, or single ones by name (`tries=20`), say how contexts are made and what the
    search may try. `memory` is a file that keeps the scores, so that a second run needn't measure them again. `report`
    is called after every step. An interrupt (Ctrl-C) ends the search, and the best policy so far is returned.

    Raises `TidalError` for a text that is too short, a quality that no number of selections reaches, or a `memory` of
    another calibration; `UnsupportedModelError` for a model whose attention can't be rewritten.
    """
    settings = changed("calibrate", settings, changes)
    goal = Goal(selections, max_kl, min_agreement)
    several = not isinstance(budget, int)
    check_settings(budget if several else [budget], settings, [goal])
    if several and (not budget or goal.to_reach is None):
        raise TidalError("calibrate: several budgets go with a quality to reach; `calibrate_curve` makes a policy each")
    text = default_text() if text is None else text
    about = _about_scores(model, text, settings)
    budgets = sorted(budget, reverse=True) if several else [budget]  # the largest is the likeliest to reach the goal
    memories = [_open_memory(about, tokens, settings, memory, several) for tokens in budgets]
    ground = _prepare(model, tokenizer, text, about, [] if selections is None else [selections], report)
    goal = Goal(_default_selections(ground.layers)) if goal == Goal() else goal
    policies = _search_budgets(ground, memories, [goal], settings, lambda *_: name, report)
    reaching = [policy for policy in policies if policy.calibration["reached"]]
    if goal.to_reach is None or (policies[-1].calibration["interrupted"] and not reaching):
        return policies[-1]
    if not reaching:
        nearest = min(policies, key=lambda policy: policy.calibration["loss"]).calibration
        raise TidalError(
            f"calibrate: no number of selections under {len(ground.layers)} reaches {goal.to_reach} at budget "
            f"{', '.join(map(str, budgets))}; the nearest, at {nearest['budget']}, has a loss of {nearest['loss']:.4f} "
            f"and an agreement of {min(nearest['agreement'].values()):.3f}"
        )
    return min(reaching, key=lambda policy: policy.calibration["bytes_per_step"])


def calibrate_curve(
    model: PreTrainedModel, tokenizer: Any, text: str | None = None, *, budgets: Sequence[int],
    selections: Sequence[int] | None = None, settings: CalibrationSettings = CALIBRATION,
    name: str = "calibrated", memory: str | Path | None = None, report: Report = lambda progress: None, **changes: Any,
) -> list[Policy]:  # fmt: skip
    """Return a policy for every budget and every number of selections, calibrated on the same contexts.

    The arguments are those of `calibrate`. A policy's name ends in its budget and number of selections, and there is a
    `memory` file for each budget, with the budget in its name. Small budgets get fewer sinks and recent tokens. An
    interrupt (Ctrl-C) ends all of the searches, and the policies found so far are returned.
    """
    settings = changed("calibrate", settings, changes)
    check_settings(budgets, settings, [Goal(number) for number in selections or [None]])
    text = default_text() if text is None else text
    about = _about_scores(model, text, settings)
    memories = [_open_memory(about, budget, settings, memory, True) for budget in budgets]
    ground = _prepare(model, tokenizer, text, about, selections or [], report)
    goals = [Goal(number) for number in selections or [_default_selections(ground.layers)]]

    def policy_name(budget: int, number: int) -> str:
        return f"{name}-{budget}-{number}"

    return _search_budgets(ground, memories, goals, settings, policy_name, report)


def check_settings(budgets: Sequence[int], settings: CalibrationSettings, goals: Sequence[Goal]) -> None:
    """Raise `TidalError` for settings that are wrong for every model."""
    for budget in budgets:
        if not 1 <= budget < settings.context:
            raise TidalError(
                f"calibrate: budget {budget}; valid are 1 to {settings.context - 1}, below the context of "
                f"{settings.context}"
            )
    for name in ("contexts", "tries"):
        if getattr(settings, name) < 1:
            raise TidalError(f"calibrate: {name} {getattr(settings, name)}; at least 1 is needed")
    choices = {"share": ("auto", *SHARES), "output": ("auto", "full", "sparse"), "by": ("scores", "pages", "auto")}
    for name, valid in choices.items():
        if getattr(settings, name) not in valid:
            raise TidalError(f"calibrate: {name} {getattr(settings, name)!r}; valid are {', '.join(valid)}")
    if settings.by == "pages" and settings.output == "full":
        raise TidalError("calibrate: selections by pages return sparse output; output 'full' goes with by 'scores'")
    if settings.sample is not None:
        k, l = settings.sample
        try:
            Lsh(k, l)
        except ValueError as error:
            raise TidalError(f"calibrate: sample {k},{l}: {error}") from None
    for name in ("max_bytes", "max_bytes_at"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise TidalError(f"calibrate: {name} {value}; at least 1 is needed")
    if settings.max_bytes_at is not None and settings.max_bytes is None:
        raise TidalError("calibrate: max_bytes_at says where max_bytes counts; give both")
    for goal in goals:
        if sum(value is not None for value in dataclasses.astuple(goal)) > 1:
            raise TidalError("calibrate: give one of selections, max_kl and min_agreement, not several")
        if goal.max_kl is not None and not goal.max_kl > 0:
            raise TidalError(f"calibrate: max_kl {goal.max_kl}; a KL divergence to reach is above 0")
        if goal.min_agreement is not None and not 0 <= goal.min_agreement <= 1:
            raise TidalError(f"calibrate: min_agreement {goal.min_agreement}; valid are 0 to 1")


def _search_budgets(
    ground: Ground, memories: Sequence[Memory], goals: Sequence[Goal], settings: CalibrationSettings,
    policy_name: Callable[[int, int | None], str], report: Report,
) -> list[Policy]:  # fmt: skip
    """Return the best policy at each budget for each goal; once one reaches a quality, only cheaper ones are tried.

    An interrupt ends all of the searches. The policies found so far are returned; if there are none, it is raised.
    Raises `TidalError` if no policy reads as few bytes as the settings ask for.
    """
    policies: list[Policy] = []
    try:
        for memory in memories:
            statistics = _statistics(ground, memory.settings, settings.share, report)
            search = BudgetSearch(ground, memory, statistics, settings, _published(ground, memory.settings))
            for goal in goals:
                reaching = [
                    policy.calibration["bytes_per_step"] for policy in policies if policy.calibration["reached"]
                ]
                name = policy_name(memory.settings["budget"], goal.selections)
                policy = search.best_policy(goal, min(reaching, default=math.inf), name, report)
                if policy is not None:
                    policies.append(policy)
                    if policy.calibration["interrupted"]:
                        return policies
    except KeyboardInterrupt:
        if not policies:
            raise
    if not policies:
        raise TidalError(
            f"calibrate: no policy reads at most {settings.max_bytes:,} bytes at "
            f"{settings.max_bytes_at or settings.context:,} tokens; fewer selections, a smaller budget, by pages or no "
            "dense layers (dense 0) read less"
        )
    return policies


@dataclass(frozen=True)
class BudgetSearch:
    """A search at one budget; `published` is the score and cost of the layers that are published for the model."""

    ground: Ground
    memory: Memory
    statistics: dict[str, Statistics]
    effort: CalibrationSettings
    published: dict[str, Any]

    @torch.no_grad()
    def best_policy(self, goal: Goal, byte_limit: float, name: str, report: Report) -> Policy | None:
        """Return the best policy for a goal; None if even the cheapest one would read `byte_limit` bytes a step, or
        more than the settings allow.

        An interrupt ends the search, and the best policy so far is returned; if there is none, it is raised.
        """
        best: Found | None = None
        trace: dict[Candidate, float] = {}
        interrupted = False
        try:
            for tried in self._try_candidates(goal, byte_limit):
                trace[tried.candidate] = round(tried.score.loss, 6)
                reached = goal.reached(tried.score, self.ground.weights)
                if reached or is_better(tried, best):
                    best = tried
                stage = f"search at {self.memory.settings['budget']}, {len(tried.candidate.selections)} selections"
                report(Progress(stage, len(trace), max(self.effort.tries, len(trace)), best))
                if reached:
                    break
        except KeyboardInterrupt:
            if best is None:
                raise
            interrupted = True
        return None if best is None else self._policy_with_provenance(best, goal, name, trace, interrupted)

    def _try_candidates(self, goal: Goal, byte_limit: float) -> Iterator[Found]:
        """Try candidates with more and more selections, while a policy with so many can read less than `byte_limit`."""
        layers, settings, effort = self.ground.layers, self.memory.settings, self.effort
        dense = min(2, len(layers) // 8) if effort.dense is None else effort.dense
        always_kept = settings["sinks"] + settings["recent"]
        for number in goal.numbers(layers):
            if self._least_bytes(number) >= byte_limit:
                return
            yield from explore(
                self._score, self._cost, self.statistics, layers, number, dense, settings["budget"], always_kept, effort
            )

    def _least_bytes(self, selections: int) -> int:
        """The fewest bytes that a step with so many selections can read: if the first layers select."""
        first, share = self.ground.layers[:selections], next(iter(self.statistics))
        sparse = () if self.effort.output == "full" else first
        every = [
            Candidate(first, share, sparse=sparse)
            if form == EXACT
            else Candidate(first, share, forms=(form,) * selections)
            for form in forms_of(self.effort.by)
        ]
        return min(_cost(self.ground, self._policy(one).roles)["bytes_per_step"] for one in every)

    def _score(self, candidate: Candidate) -> Score:
        """Return the score of a candidate, which is measured only if it isn't remembered."""
        if candidate not in self.memory.scores:
            self.memory.add(candidate, _measure(self.ground, self._policy(candidate).roles))
        return self.memory.scores[candidate]

    def _cost(self, candidate: Candidate) -> int:
        """The bytes that a candidate reads a step, at the length at which they count."""
        return _cost(self.ground, self._policy(candidate).roles, self.effort.max_bytes_at)["bytes_per_step"]

    def _policy(self, candidate: Candidate, name: str = "candidate") -> Policy:
        return _make_policy(
            self.ground, candidate, self.statistics[candidate.share], self.memory.settings, name, self.effort.sample
        )

    def _limit(self, roles: Sequence[LayerRole]) -> dict[str, Any]:
        """What limits the bytes of a step, and what these roles read there; nothing if nothing does."""
        if self.effort.max_bytes is None:
            return {}
        length = self.effort.max_bytes_at or self.ground.about["context"]
        read = _cost(self.ground, roles, length)["bytes_per_step"]
        return {"max_bytes": self.effort.max_bytes, "max_bytes_at": length, "bytes_per_step_there": read}

    def _policy_with_provenance(
        self, best: Found, goal: Goal, name: str, trace: Mapping[Candidate, float], interrupted: bool
    ) -> Policy:
        """Make the best candidate a policy, whose `calibration` says how it was found, and what else was tried."""
        policy = self._policy(best.candidate, name)
        provenance = {
            **self.memory.about, "goal": goal.to_reach, "reached": goal.reached(best.score, self.ground.weights),
            "date": datetime.date.today().isoformat(), "versions": versions("torch", "transformers"),
            "interrupted": interrupted, **dataclasses.asdict(best.score), **_cost(self.ground, policy.roles),
            **self._limit(policy.roles), "published": self.published,
            "trace": [{**dataclasses.asdict(candidate), "loss": loss} for candidate, loss in trace.items()],
        }  # fmt: skip
        as_in_a_file = json.loads(json.dumps(provenance))  # so that a saved and loaded policy equals this one
        return policy.model_copy(update={"calibration": as_in_a_file})


def _open_memory(
    about: dict[str, Any], budget: int, asked: CalibrationSettings, file: str | Path | None, several: bool
) -> Memory:
    """Return the scores that an earlier run has measured at a budget, from the budget's own file if it has `several`.

    Sinks and recent tokens must fit into the only budget; of several, small ones get as many as fit.
    """
    settings: dict[str, Any] = {"budget": budget, "sinks": asked.sinks, "recent": asked.recent}
    if several:
        settings = fitting(**settings)
    elif asked.sinks + asked.recent > budget:
        raise TidalError(f"calibrate: budget {budget} is smaller than sinks + recent ({asked.sinks} + {asked.recent})")
    if asked.output == "sparse":
        settings["output"] = "sparse"
    path = None if file is None else Path(file)
    if several and path is not None:
        path = path.with_stem(f"{path.stem}-{budget}")
    about = {**about, **settings}
    return Memory(settings, about, path, _read_scores(path, about))


def _read_scores(file: Path | None, about: dict[str, Any]) -> dict[Candidate, Score]:
    """Read the scores of an earlier run. Raises `TidalError` for a file of another calibration."""
    if file is None or not file.exists():
        return {}
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise TidalError(f"{file}: can't read the scores of an earlier run: {error}") from None
    check_same(file, "the scores of another calibration", data.get("about", {}), about)
    return {_candidate(**row["candidate"]): Score(**row["score"]) for row in data["scores"]}


def _candidate(**fields: Any) -> Candidate:
    """A candidate as JSON holds it, with tuples in place of lists again."""
    return Candidate(**{name: _hashable(value) for name, value in fields.items()})


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _default_selections(layers: Sequence[int]) -> int:
    """How many layers select if the user doesn't say it."""
    return min(3, max(1, len(layers) // 3))


def _about_scores(model: PreTrainedModel, text: str, settings: CalibrationSettings) -> dict[str, Any]:
    """Describe all that scores depend on, besides the policy. Raises `TidalError` for weights that can't be used."""
    all_weights = dict.fromkeys(KINDS, 1.0) | dict(settings.weights or {})
    if unknown := set(all_weights) - set(KINDS):
        raise TidalError(f"calibrate: unknown kind of loss {sorted(unknown)[0]!r}; kinds are {', '.join(KINDS)}")
    if not all(0 <= weight < math.inf for weight in all_weights.values()) or not any(all_weights.values()):
        raise TidalError(
            f"calibrate: weights must be finite numbers, none below 0 and at least one above; found {all_weights}"
        )
    return describe(model) | {
        "text": digest(text), "context": settings.context, "page": PAGE, "contexts": settings.contexts,
        "seed": settings.seed,
        "weights": all_weights, **({} if settings.sample is None else {"sample": list(settings.sample)}),
    }  # fmt: skip


def _layers(model: PreTrainedModel, selections: Sequence[int]) -> tuple[list, int, tuple[int, ...]]:
    """Return the model's attention calls, its number of layers, and the layers that may select.

    Raises an error for a model that can't be calibrated, or that has too few layers for one of the `selections`.
    """
    calls, num_layers = decode_calls(model)
    layers = policy_layers(calls)
    unmatched = {call.reason: call.layer for call in calls if isinstance(call, Unmatched) and call.layer in layers}
    if unmatched:
        reasons = "; ".join(f"layer {layer}: {reason}" for reason, layer in unmatched.items())
        raise UnsupportedModelError(f"calibrate: the attention of {type(model).__name__} can't be rewritten: {reasons}")
    if not all(1 <= number < len(layers) for number in selections or [1]):
        asked = ", ".join(map(str, selections or [1]))
        raise TidalError(
            f"calibrate: {asked} selections, but the model has {len(layers)} layers that could select, and at "
            "least one of them must reuse tokens"
        )
    if reason := cannot_replay(model, calls):
        raise UnsupportedModelError(f"calibrate: {type(model).__name__} can't be calibrated: {reason}")
    return calls, num_layers, layers


@torch.no_grad()
def _prepare(
    model: PreTrainedModel, tokenizer: Any, text: str, about: dict[str, Any], selections: Sequence[int], report: Report
) -> Ground:
    """Check the model, prefill the contexts, and decode their blocks with the dense model.

    `selections` are the numbers of selections that the user asks for; the model must have layers enough for each.
    """
    calls, num_layers, layers = _layers(model, selections)
    contexts = []
    for context in make_contexts(model, tokenizer, text, about["context"], about["contexts"], seed=about["seed"]):
        contexts.append(context)
        report(Progress("prefill", len(contexts), about["contexts"]))
    return Ground(model, calls, num_layers, layers, contexts, dense_predictions(model, contexts, num_layers), about)


def _published(ground: Ground, settings: dict[str, int]) -> dict[str, Any]:
    """Return the score and cost of the preset `tidal`: the published layers, or its default ones for other models."""
    roles = Policy.preset(
        "tidal", ground.num_layers, attention_layers=ground.layers, model=name_of(ground.model), **settings
    ).roles  # fmt: skip
    selections = [role.layer for role in roles if role.role == "select"]
    return {"selections": selections, **dataclasses.asdict(_measure(ground, roles)), **_cost(ground, roles)}


@torch.no_grad()
def _statistics(ground: Ground, settings: dict[str, Any], share: str, report: Report) -> dict[str, Statistics]:
    """Estimate what layers lose with each other's tokens, for each way to share token sets that is to be tried."""
    kv_heads = {call.num_kv_heads for call in ground.calls if call.layer in ground.layers}
    shares = (["layer"] if kv_heads == {1} else ["kv_head", "layer"]) if share == "auto" else [share]
    statistics = {}
    for way in shares:
        # By exact scores, whatever method the policy will use: that is what a layer would choose at best
        role = Policy.from_dict({
            "num_layers": 1, "layers": {0: "select"}, "defaults": {**settings, "share": way}
        }).roles[0]  # fmt: skip
        inputs = (ground.model, ground.contexts, role, ground.layers, ground.num_layers, ground.weights)
        has_maps = way == "kv_head" and kv_heads != {1}
        steps, total = itertools.count(1), len(ground.contexts) * (2 if has_maps else 1)

        def advance(stage: str = f"statistics, {way}", steps: Any = steps, total: int = total) -> None:
            report(Progress(stage, next(steps), total))

        heads = head_maps(*inputs, advance) if has_maps else {}
        statistics[way] = Statistics(layer_losses(*inputs, heads, advance), heads)
    return statistics


def _measure(ground: Ground, roles: Sequence[LayerRole]) -> Score:
    return measure(ground.model, ground.contexts, ground.expected, roles, ground.weights)


def _make_policy(
    ground: Ground, candidate: Candidate, statistics: Statistics, settings: dict[str, Any], name: str,
    sample: tuple[int, int] | None,
) -> Policy:  # fmt: skip
    """Make a candidate a policy: layers before its first selection, and layers that may not select, stay full."""
    layers: dict[int, Any] = dict.fromkeys(range(ground.num_layers), "full")
    for number, layer in enumerate(candidate.selections):
        budget = {"budget": candidate.budgets[number]} if candidate.budgets else {}
        output = {"output": "sparse"} if layer in candidate.sparse else {}
        page, keep = candidate.every_form[number]
        form = {"by": "pages", "output": "sparse", "page": page, "keep": keep} if page else {}
        layers[layer] = {"role": "select", **budget, **output, **form}
    for layer, source in sources(candidate, statistics.losses, ground.layers).items():
        heads = statistics.heads.get((source, layer))
        head_map = {"heads": list(heads)} if heads and heads != tuple(range(len(heads))) else {}
        said = {} if candidate.nearest and not candidate.sampled else {"from": source}
        layers[layer] = {"role": "reuse", **said, **head_map}
    for layer in candidate.sampled:
        k, l = sample
        layers[layer] = {"role": "select", "by": "lsh", "k": k, "l": l, "seed": layer}
    data = {
        "name": name, "num_layers": ground.num_layers, "layers": layers,
        "description": f"Selections {', '.join(map(str, candidate.selections))}, calibrated."
        + (f" Layers {', '.join(map(str, candidate.sampled))} sample." if candidate.sampled else ""),
        "defaults": {**settings, "share": candidate.share},
    }  # fmt: skip
    return Policy.from_dict(data)


def _cost(ground: Ground, roles: Sequence[LayerRole], length: int | None = None) -> dict[str, Any]:
    """The bytes that a step reads at this length, or the contexts', and the speedup if it did nothing but read."""
    length = length or ground.about["context"]
    share = kv_share(make_plan(ground.calls, roles), length)
    keys = [call.call.key.meta["example_value"] for call in ground.calls if call.layer in ground.layers]
    cache = sum(2 * key.shape[1] * key.shape[3] * key.element_size() for key in keys) * length
    weights = sum(weight.numel() * weight.element_size() for weight in ground.model.parameters())
    return {
        "kv_share": share,
        "bytes_per_step": round(weights + share * cache),
        "estimated_speedup": round((weights + cache) / (weights + share * cache), 3),
    }

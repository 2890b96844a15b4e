"""Choose selection layers for a model: `calibrate`, and `calibrate_curve` for several costs.

The way through: text -> `tasks` (contexts and blocks) -> `statistics` (head maps, and a dynamic programme on what
layers lose, for each way to share token sets) -> `search` (the real loss, on `replay`, which decodes a block at once)
-> a policy that says how it was found.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TidalError, UnsupportedModelError
from ..explain import decode_calls
from ..models import fingerprint
from ..passes.match import Unmatched, policy_layers
from ..passes.plan import kv_share, make_plan
from ..policy import LayerRole, Policy
from ..provenance import versions
from ..replay import Context
from ..text import default_text
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

    model: nn.Module
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


def calibrate(
    model: nn.Module, tokenizer: Any, text: str | None = None, *, budget: int = 1024, selections: int | None = None,
    max_kl: float | None = None, min_agreement: float | None = None, context: int = 4096, contexts: int = 6,
    dense: int | None = None, sinks: int = 4, recent: int = 32, share: str = "auto", vary_budgets: bool = False,
    weights: Mapping[str, float] | None = None, tries: int = 60, seed: int = 0, name: str = "calibrated",
    memory: str | Path | None = None, report: Report = lambda progress: None,
) -> Policy:  # fmt: skip
    """The policy with the best selection layers for a model, by its own predictions on the user's text.

    `text` (default: `default_text`) is cut into `contexts` of about `context` tokens, in which facts are hidden; see
    `tasks`. Give `selections`, a number of layers that select (default: 3, or a third of a shallow model's layers), or
    a quality to reach with as few as possible: `max_kl`, the mean KL divergence from the dense model in nats, or
    `min_agreement`, how often the likeliest token stays the same. Up to `dense` layers before the first selection stay
    dense (default: 2, or an eighth of a shallow model's layers). `budget`, `sinks` and `recent` are the policy's
    defaults. `share` says who shares a token set, with a map of heads for `kv_head`; `auto` tries `kv_head` and
    `layer`. `vary_budgets` gives selections budgets of their own, as many tokens in all. `weights` of the kinds of
    loss, text, answer and copy, are 1 each. `tries` bounds the policies tried for each number of selections, before the
    best one is refined. `memory` is a file that keeps the scores, from which a second run goes on. `report` is told
    about every step. An interrupt (Ctrl-C) ends the search, and the best policy so far is returned.

    Raises `TidalError` for a text that is too short, a quality that no number of selections reaches, or a `memory` of
    another calibration; `UnsupportedModelError` for a model whose attention can't be rewritten.
    """
    goal = Goal(selections, max_kl, min_agreement)
    if sum(one is not None for one in dataclasses.astuple(goal)) > 1:
        raise TidalError("calibrate: give one of selections, max_kl and min_agreement")
    text = default_text() if text is None else text
    settings = _settings(budget, sinks, recent)
    about = _about(model, text, context, contexts, weights, seed)
    known = _read(memory, {**about, **settings})
    calls, num_layers, layers = _layers(model, [] if selections is None else [selections])
    if goal == Goal():
        goal = Goal(_few(layers))
    ground = _prepare(model, tokenizer, text, about, calls, num_layers, layers, report)
    statistics = _statistics(ground, settings, share, report)
    return _find(ground, settings, statistics, goal, dense, vary_budgets, tries, name, memory, known, report)


def calibrate_curve(
    model: nn.Module, tokenizer: Any, text: str | None = None, *, budgets: Sequence[int],
    selections: Sequence[int] | None = None, context: int = 4096, contexts: int = 6, dense: int | None = None,
    sinks: int = 4, recent: int = 32, share: str = "auto", vary_budgets: bool = False,
    weights: Mapping[str, float] | None = None, tries: int = 60, seed: int = 0, name: str = "calibrated",
    memory: str | Path | None = None, report: Report = lambda progress: None,
) -> list[Policy]:  # fmt: skip
    """`calibrate` at every budget with every number of selections, on the same contexts.

    Policies are named by both, and a `memory` file gets the budget into its name. Small budgets have fewer sinks and
    recent tokens. An interrupt ends the whole; what was found till then is returned.
    """
    text = default_text() if text is None else text
    about = _about(model, text, context, contexts, weights, seed)
    stages = []
    for budget in budgets:
        settings = _settings(budget, min(sinks, budget // 8), min(recent, budget // 2))
        file = None if memory is None else Path(memory).with_stem(f"{Path(memory).stem}-{budget}")
        stages.append((settings, file, _read(file, {**about, **settings})))
    calls, num_layers, layers = _layers(model, selections or [])
    selections = selections or [_few(layers)]
    ground = _prepare(model, tokenizer, text, about, calls, num_layers, layers, report)
    found: list[Policy] = []
    try:
        for settings, file, known in stages:
            statistics = _statistics(ground, settings, share, report)
            for number in selections:
                title, goal = f"{name}-{settings['budget']}-{number}", Goal(number)
                found.append(
                    _find(ground, settings, statistics, goal, dense, vary_budgets, tries, title, file, known, report)
                )
                if found[-1].calibration["interrupted"]:
                    return found
    except KeyboardInterrupt:
        if not found:
            raise
    return found


def _few(layers: Sequence[int]) -> int:
    """How many layers select if nobody says it."""
    return min(3, max(1, len(layers) // 3))


def _settings(budget: int, sinks: int, recent: int) -> dict[str, int]:
    if sinks + recent > budget:
        raise TidalError(f"calibrate: budget {budget} is smaller than sinks + recent ({sinks} + {recent})")
    return {"budget": budget, "sinks": sinks, "recent": recent}


def _about(
    model: nn.Module, text: str, context: int, contexts: int, weights: Mapping[str, float] | None, seed: int
) -> dict[str, Any]:
    """What scores depend on, besides the policy."""
    weighed = dict.fromkeys(KINDS, 1.0) | dict(weights or {})
    if unknown := set(weighed) - set(KINDS):
        raise TidalError(f"calibrate: unknown kind of loss {sorted(unknown)[0]!r}; kinds are {', '.join(KINDS)}")
    if not all(0 <= one < math.inf for one in weighed.values()) or not any(weighed.values()):
        raise TidalError(f"calibrate: weights must be numbers from 0 on, and one above it; found {weighed}")
    return {
        "model": Path(_name(model)).name, "fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": "sha256:" + hashlib.sha256(text.encode()).hexdigest(), "context": context, "contexts": contexts,
        "seed": seed, "weights": weighed,
    }  # fmt: skip


def _name(model: nn.Module) -> str:
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def _layers(model: nn.Module, selections: Sequence[int]) -> tuple[list, int, tuple[int, ...]]:
    """The model's attention calls, its depth, and the layers that may select."""
    calls, num_layers = decode_calls(model)
    layers = policy_layers(calls)
    stuck = {call.reason: call.layer for call in calls if isinstance(call, Unmatched) and call.layer in layers}
    if stuck:
        reasons = "; ".join(f"layer {layer}: {reason}" for reason, layer in stuck.items())
        raise UnsupportedModelError(f"calibrate: the attention of {type(model).__name__} can't be rewritten: {reasons}")
    if not layers or not all(1 <= number < len(layers) for number in selections):
        asked = ", ".join(map(str, selections))
        raise TidalError(
            f"calibrate: {asked} selections, but the model has {len(layers)} layers that could select, and one at "
            "least must reuse"
        )
    return calls, num_layers, layers


@torch.no_grad()
def _prepare(
    model: nn.Module, tokenizer: Any, text: str, about: dict[str, Any], calls: list, num_layers: int,
    layers: tuple[int, ...], report: Report,
) -> Ground:  # fmt: skip
    """Prefill the contexts, and see what the dense model predicts."""
    made = []
    for one in make_contexts(model, tokenizer, text, about["context"], about["contexts"], seed=about["seed"]):
        made.append(one)
        report(Progress("prefill", len(made), about["contexts"]))
    return Ground(model, calls, num_layers, layers, made, dense_predictions(model, made, num_layers), about)


@torch.no_grad()
def _find(
    ground: Ground, settings: dict[str, Any], statistics: dict[str, Statistics], goal: Goal, dense: int | None,
    vary_budgets: bool, tries: int, name: str, memory: str | Path | None, known: dict[Candidate, Score],
    report: Report,
) -> Policy:  # fmt: skip
    """The best policy of these settings. See `calibrate`."""
    layers = ground.layers
    about = {**ground.about, **settings}
    dense = min(2, len(layers) // 8) if dense is None else dense
    least = settings["sinks"] + settings["recent"]
    published = Policy.preset(
        "tidal", ground.num_layers, attention_layers=layers, model=_name(ground.model), **settings
    ).roles  # fmt: skip
    beside = {
        "selections": [role.layer for role in published if role.role == "select"],
        **dataclasses.asdict(_score(ground, published)), **_cost(ground, published),
    }  # fmt: skip

    def score(candidate: Candidate) -> Score:
        if candidate not in known:
            known[candidate] = _score(ground, _policy(ground, candidate, statistics, settings).roles)
            _write(memory, about, known)
        return known[candidate]

    best: Found | None = None
    trace: dict[Candidate, float] = {}
    interrupted = reached = False
    try:
        for number in goal.numbers(layers):
            for found in explore(
                score, statistics, layers, number, dense, settings["budget"], least, tries, vary_budgets
            ):
                trace[found.candidate] = round(found.score.loss, 6)
                reached = goal.reached(found.score, ground.weights)
                if best is None or reached or found.score.loss < best.score.loss:
                    best = found
                report(Progress(f"search, {number} selections", len(trace), max(tries, len(trace)), best))
                if reached:
                    break
            if reached:
                break
    except KeyboardInterrupt:
        if best is None:
            raise
        interrupted = True
    if goal.selections is None and not reached and not interrupted:
        wish = f"max_kl {goal.max_kl}" if goal.max_kl is not None else f"min_agreement {goal.min_agreement}"
        raise TidalError(
            f"calibrate: no number of selections under {len(layers)} reaches {wish} at budget {settings['budget']}; "
            f"the nearest has a loss of {best.score.loss:.4f} and an agreement of "
            f"{min(best.score.agreement.values()):.3f}"
        )
    policy = _policy(ground, best.candidate, statistics, settings, name)
    provenance = {
        **about, "date": datetime.date.today().isoformat(), "versions": versions("torch", "transformers"),
        "interrupted": interrupted, **dataclasses.asdict(best.score), **_cost(ground, policy.roles),
        "published": beside, "trace": [{**dataclasses.asdict(one), "loss": loss} for one, loss in trace.items()],
    }  # fmt: skip
    return policy.model_copy(update={"calibration": json.loads(json.dumps(provenance))})  # tuples as lists


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


def _read(memory: str | Path | None, about: dict[str, Any]) -> dict[Candidate, Score]:
    """Scores of an earlier run of the same calibration. Raises `TidalError` for a file of another one."""
    if memory is None or not Path(memory).exists():
        return {}
    try:
        data = json.loads(Path(memory).read_text())
    except (OSError, ValueError) as error:
        raise TidalError(f"{memory}: can't read the scores of an earlier run: {error}") from None
    before = data.get("about", {})
    for key in about:
        if before.get(key) != about[key]:
            raise TidalError(
                f"{memory}: holds the scores of another calibration ({key} {before.get(key)!r}, now {about[key]!r}); "
                "remove it, or name another file"
            )
    return {_candidate(**one["candidate"]): Score(**one["score"]) for one in data["scores"]}


def _candidate(selections: list[int], share: str, nearest: bool, budgets: list[int]) -> Candidate:
    return Candidate(tuple(selections), share, nearest, tuple(budgets))


def _write(memory: str | Path | None, about: dict[str, Any], known: dict[Candidate, Score]) -> None:
    if memory is None:
        return
    scores = [{"candidate": dataclasses.asdict(one), "score": dataclasses.asdict(its)} for one, its in known.items()]
    part = Path(f"{memory}.part")
    part.write_text(json.dumps({"about": about, "scores": scores}))
    part.replace(memory)  # whole or not at all

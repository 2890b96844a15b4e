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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TidalError
from ..explain import decode_calls
from ..passes.match import policy_layers
from ..passes.plan import kv_share, make_plan
from ..policy import LayerRole, Policy
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
class Ground:
    """What a model is calibrated on, prefilled: contexts, and what the dense model predicts there."""

    model: nn.Module
    calls: list
    num_layers: int
    layers: tuple[int, ...]  # that may select
    contexts: list[Context]
    expected: list[list[Tensor]]
    weights: dict[str, float]
    about: dict[str, Any]


def calibrate(
    model: nn.Module, tokenizer: Any, text: str | None = None, *, budget: int = 1024, selections: int | None = None,
    max_kl: float | None = None, min_agreement: float | None = None, context: int = 4096, contexts: int = 6,
    dense: int = 2, sinks: int = 4, recent: int = 32, share: str = "auto", vary_budgets: bool = False,
    weights: Mapping[str, float] | None = None, tries: int = 60, seed: int = 0, name: str = "calibrated",
    memory: Path | None = None, report: Report = lambda progress: None,
) -> Policy:  # fmt: skip
    """The policy with the best selection layers for a model, by its own predictions on the user's text.

    `text` (default: `default_text`) is cut into `contexts` of about `context` tokens, in which facts are hidden; see
    `tasks`. Give `selections`, a number of layers that select, or a quality to reach with as few as possible:
    `max_kl`, the mean KL divergence from the dense model in nats, or `min_agreement`, how often the likeliest token
    stays the same. Up to `dense` layers before the first selection stay dense. `budget`, `sinks` and `recent` are the
    policy's defaults. `share` says who shares a token set, with a map of heads for `kv_head`; `auto` tries `kv_head`
    and `layer`. `vary_budgets` gives selections budgets of their own, as many tokens in all. `weights` of the kinds
    of loss, text, answer and copy, are 1 each. `tries` bounds the policies tried for each number of selections.
    `memory` is a file that keeps the scores, from which a second run goes on. `report` is told about every step. An
    interrupt (Ctrl-C) ends the search, and the best policy so far is returned.

    Raises `TidalError` for a text that is too short, or a quality that no number of selections reaches.
    """
    goals = [goal for goal in (selections, max_kl, min_agreement) if goal is not None]
    if len(goals) != 1:
        raise TidalError("calibrate: give one of selections, max_kl and min_agreement")
    ground = _prepare(model, tokenizer, text, [selections or 1], context, contexts, weights, seed, report)
    settings = {"budget": budget, "sinks": sinks, "recent": recent}
    statistics = _statistics(ground, settings, share, report)
    goal = (selections, max_kl, min_agreement)
    return _find(ground, settings, statistics, goal, dense, vary_budgets, tries, name, memory, report)


def calibrate_curve(
    model: nn.Module, tokenizer: Any, text: str | None = None, *, budgets: Sequence[int], selections: Sequence[int],
    context: int = 4096, contexts: int = 6, dense: int = 2, sinks: int = 4, recent: int = 32, share: str = "auto",
    vary_budgets: bool = False, weights: Mapping[str, float] | None = None, tries: int = 60, seed: int = 0,
    name: str = "calibrated", memory: Path | None = None, report: Report = lambda progress: None,
) -> list[Policy]:  # fmt: skip
    """`calibrate` at every budget with every number of selections, on the same contexts.

    Policies are named by both, and a `memory` file gets the budget into its name. An interrupt ends the whole; what
    was found till then is returned.
    """
    ground = _prepare(model, tokenizer, text, selections, context, contexts, weights, seed, report)
    found: list[Policy] = []
    for budget in budgets:
        settings = {"budget": budget, "sinks": min(sinks, budget // 8), "recent": min(recent, budget // 2)}
        file = memory and memory.with_stem(f"{memory.stem}-{budget}")
        statistics = _statistics(ground, settings, share, report)
        for number in selections:
            title, goal = f"{name}-{budget}-{number}", (number, None, None)
            found.append(_find(ground, settings, statistics, goal, dense, vary_budgets, tries, title, file, report))
            if found[-1].calibration["interrupted"]:
                return found
    return found


@torch.no_grad()
def _prepare(
    model: nn.Module, tokenizer: Any, text: str | None, selections: Sequence[int], context: int, contexts: int,
    weights: Mapping | None, seed: int, report: Report,
) -> Ground:  # fmt: skip
    """Prefill the contexts, and see what the dense model predicts."""
    weighed = dict.fromkeys(KINDS, 1.0) | dict(weights or {})
    if unknown := set(weighed) - set(KINDS):
        raise TidalError(f"calibrate: unknown kind of loss {sorted(unknown)[0]!r}; kinds are {', '.join(KINDS)}")
    text = default_text() if text is None else text
    calls, num_layers = decode_calls(model)
    layers = policy_layers(calls)
    if not layers or not 1 <= min(selections) <= max(selections) <= len(layers):
        asked = ", ".join(map(str, selections))
        raise TidalError(f"calibrate: {asked} selections, but the model has {len(layers)} layers that could select")
    made = []
    for one in make_contexts(model, tokenizer, text, context, contexts, seed=seed):
        made.append(one)
        report(Progress("prefill", len(made), contexts))
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    about = {
        "model": Path(name).name, "text": "sha256:" + hashlib.sha256(text.encode()).hexdigest(), "context": context,
        "contexts": contexts, "seed": seed, "weights": weighed,
    }  # fmt: skip
    expected = dense_predictions(model, made, num_layers)
    return Ground(model, calls, num_layers, layers, made, expected, weighed, about)


@torch.no_grad()
def _find(
    ground: Ground, settings: dict[str, Any], statistics: dict[str, Statistics],
    goal: tuple[int | None, float | None, float | None], dense: int, vary_budgets: bool, tries: int, name: str,
    memory: Path | None, report: Report,
) -> Policy:  # fmt: skip
    """The best policy of these settings; the goal is selections, max_kl or min_agreement. See `calibrate`."""
    selections, max_kl, min_agreement = goal
    layers = ground.layers
    about = {**ground.about, **settings}
    known = _read(memory, about)

    def score(candidate: Candidate) -> Score:
        if candidate not in known:
            known[candidate] = _score(ground, _policy(ground, candidate, statistics, settings).roles)
            _write(memory, about, known)
        return known[candidate]

    best: Found | None = None
    trace: dict[Candidate, float] = {}
    interrupted = False
    try:
        for number in [selections] if selections is not None else range(1, len(layers) + 1):
            tried = explore(score, statistics, layers, number, dense, settings["budget"], tries, vary_budgets)
            for found in tried:
                trace[found.candidate] = round(found.score.loss, 6)
                best = found if best is None or found.score.loss < best.score.loss else best
                report(Progress(f"search, {number} selections", len(trace), max(tries, len(trace)), best))
                if selections is None and _reached(best.score, max_kl, min_agreement):
                    break
            if selections is not None or _reached(best.score, max_kl, min_agreement):
                break
        else:
            raise TidalError(
                f"calibrate: no number of selections reaches {max_kl or min_agreement} at budget {settings['budget']}"
            )
    except KeyboardInterrupt:
        if best is None:
            raise
        interrupted = True
    policy = _policy(ground, best.candidate, statistics, settings, name)
    published = Policy.preset("tidal", ground.num_layers, attention_layers=layers, **settings).roles
    provenance = {
        **about, "date": datetime.date.today().isoformat(), "versions": _versions(), "interrupted": interrupted,
        **dataclasses.asdict(best.score), **_cost(ground, policy.roles),
        "published": {
            "selections": [role.layer for role in published if role.role == "select"],
            **dataclasses.asdict(_score(ground, published)), **_cost(ground, published),
        },
        "trace": [{**dataclasses.asdict(one), "loss": loss} for one, loss in trace.items()],
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


def _reached(score: Score, max_kl: float | None, min_agreement: float | None) -> bool:
    return score.loss <= max_kl if max_kl is not None else min(score.agreement.values()) >= min_agreement


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _read(memory: Path | None, about: dict[str, Any]) -> dict[Candidate, Score]:
    """Scores of an earlier run of the same calibration. Raises `TidalError` for a file of another one."""
    if memory is None or not memory.exists():
        return {}
    try:
        data = json.loads(memory.read_text())
    except (OSError, ValueError) as error:
        raise TidalError(f"{memory}: can't read the scores of an earlier run: {error}") from None
    if data.get("about") != about:
        raise TidalError(f"{memory}: holds the scores of another calibration; remove it, or name another file")
    return {_candidate(**one["candidate"]): Score(**one["score"]) for one in data["scores"]}


def _candidate(selections: list[int], share: str, nearest: bool, budgets: list[int]) -> Candidate:
    return Candidate(tuple(selections), share, nearest, tuple(budgets))


def _write(memory: Path | None, about: dict[str, Any], known: dict[Candidate, Score]) -> None:
    if memory is None:
        return
    scores = [{"candidate": dataclasses.asdict(one), "score": dataclasses.asdict(its)} for one, its in known.items()]
    part = memory.with_suffix(".part")
    part.write_text(json.dumps({"about": about, "scores": scores}))
    part.replace(memory)  # whole or not at all

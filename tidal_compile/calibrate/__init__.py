"""Choose selection layers for a model: `calibrate`.

The way through: text -> `tasks` (contexts and blocks) -> `statistics` (a dynamic programme on what layers lose) ->
`search` (the real loss, on `replay`, which decodes a block at once) -> a policy that says how it was found.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import TidalError
from ..explain import decode_calls
from ..passes.match import policy_layers
from ..passes.plan import kv_share, make_plan
from ..policy import Policy
from ..text import default_text
from .search import Found, Score, dense_predictions, measure, search
from .statistics import layer_losses
from .tasks import make_contexts

KINDS = ("text", "answer", "copy")


@dataclass(frozen=True)
class Progress:
    """Where a calibration stands: the stage, what of it is done, and the best policy so far."""

    stage: str
    done: int
    total: int
    best: Found | None = None


@torch.no_grad()
def calibrate(
    model: nn.Module, tokenizer: Any, text: str | None = None, *, budget: int = 1024, selections: int | None = None,
    max_kl: float | None = None, min_agreement: float | None = None, context: int = 4096, contexts: int = 6,
    dense: int = 2, sinks: int = 4, recent: int = 32, share: str = "kv_head",
    weights: Mapping[str, float] | None = None, tries: int = 80, seed: int = 0,
    name: str = "calibrated", memory: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Policy:  # fmt: skip
    """The policy with the best selection layers for a model, by its own predictions on the user's text.

    `text` (default: `default_text`) is cut into `contexts` of about `context` tokens, in which facts are hidden; see
    `tasks`. Give `selections`, a number of layers that select, or a quality to reach with as few as possible:
    `max_kl`, the mean KL divergence from the dense model in nats, or `min_agreement`, how often the likeliest token
    stays the same. Up to `dense` layers before the first selection stay dense. `budget`, `sinks`, `recent` and
    `share` are the policy's defaults. `weights` of the kinds of loss, text, answer and copy, are 1 each. `tries`
    bounds the policies tried for each number of selections. `memory` is a file that keeps the scores, from which a
    second run goes on. `report` is told about every step. An interrupt (Ctrl-C) ends the search, and the best policy
    so far is returned.

    Raises `TidalError` for a text that is too short, or a quality that no number of selections reaches.
    """
    weighed = dict.fromkeys(KINDS, 1.0) | dict(weights or {})
    if unknown := set(weighed) - set(KINDS):
        raise TidalError(f"calibrate: unknown kind of loss {sorted(unknown)[0]!r}; kinds are {', '.join(KINDS)}")
    goals = [goal for goal in (selections, max_kl, min_agreement) if goal is not None]
    if len(goals) != 1:
        raise TidalError("calibrate: give one of selections, max_kl and min_agreement")
    text = default_text() if text is None else text
    calls, num_layers = decode_calls(model)
    layers = policy_layers(calls)
    if not layers or (selections is not None and not 1 <= selections <= len(layers)):
        raise TidalError(
            f"calibrate: {selections} selections, but the model has {len(layers)} layers that could select"
        )
    settings = {"budget": budget, "sinks": sinks, "recent": recent, "share": share}

    role = _policy(num_layers, layers, layers[:1], settings).roles[layers[0]]

    made = []
    for one in make_contexts(model, tokenizer, text, context, contexts, seed=seed):
        made.append(one)
        report(Progress("prefill", len(made), contexts))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        report(Progress("statistics", done, contexts))

    losses = layer_losses(model, made, role, layers, num_layers, weighed, advance)
    expected = dense_predictions(model, made, num_layers)

    model_name = getattr(model.config, "name_or_path", "") or type(model).__name__
    about = {
        "model": Path(model_name).name, "text": _digest(text), **settings, "context": context,
        "contexts": contexts, "seed": seed, "weights": weighed,
    }  # fmt: skip
    known = _read(memory, about)

    def score(candidate: tuple[int, ...]) -> Score:
        found = measure(model, made, expected, _policy(num_layers, layers, candidate, settings).roles, weighed)
        known[candidate] = found
        _write(memory, about, known)
        return found

    best: Found | None = None
    trace: list[dict[str, Any]] = []
    interrupted = False
    try:
        for number in [selections] if selections is not None else range(1, len(layers) + 1):
            for count, found in enumerate(search(score, losses, layers, number, dense, tries, known), 1):
                trace.append({"selections": list(found.selections), "loss": round(found.score.loss, 6)})
                best = found if best is None or found.score.loss < best.score.loss else best
                report(Progress(f"search, {number} selections", count, tries, best))
                if selections is None and _reached(best.score, max_kl, min_agreement):
                    break
            if selections is not None or _reached(best.score, max_kl, min_agreement):
                break
        else:
            raise TidalError(f"calibrate: no number of selections reaches {max_kl or min_agreement} at budget {budget}")
    except KeyboardInterrupt:
        if best is None:
            raise
        interrupted = True

    policy = _policy(num_layers, layers, best.selections, settings, name)
    published = Policy.preset("tidal", num_layers, attention_layers=layers, **settings).roles
    provenance = {
        **about, "date": datetime.date.today().isoformat(), "versions": _versions(), "interrupted": interrupted,
        **dataclasses.asdict(best.score), "kv_share": kv_share(make_plan(calls, policy.roles), context),
        "published": {
            "selections": [role.layer for role in published if role.role == "select"],
            **dataclasses.asdict(measure(model, made, expected, published, weighed)),
            "kv_share": kv_share(make_plan(calls, published), context),
        },
        "trace": trace,
    }  # fmt: skip
    return policy.model_copy(update={"calibration": provenance})


def _policy(
    num_layers: int, layers: Sequence[int], selections: Sequence[int], settings: dict[str, Any], name: str = "candidate"
) -> Policy:
    """Selections, full layers before the first, reuse after it; layers that can't select stay full."""
    roles = {
        layer: "select" if layer in selections else "reuse" if layer in layers and layer > min(selections) else "full"
        for layer in range(num_layers)
    }
    data = {"name": name, "num_layers": num_layers, "defaults": settings, "layers": roles}
    return Policy.from_dict({**data, "description": f"Selections {', '.join(map(str, selections))}, calibrated."})


def _reached(score: Score, max_kl: float | None, min_agreement: float | None) -> bool:
    agreement = min(score.agreement.values())
    return score.loss <= max_kl if max_kl is not None else agreement >= min_agreement


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _read(memory: Path | None, about: dict[str, Any]) -> dict[tuple[int, ...], Score]:
    """Scores of an earlier run of the same calibration. Raises `TidalError` for a file of another one."""
    if memory is None or not memory.exists():
        return {}
    try:
        data = json.loads(memory.read_text())
    except (OSError, ValueError) as error:
        raise TidalError(f"{memory}: can't read the scores of an earlier run: {error}") from None
    if data.get("about") != about:
        raise TidalError(f"{memory}: holds the scores of another calibration; remove it, or name another file")
    return {tuple(one["selections"]): Score(**one["score"]) for one in data["scores"]}


def _write(memory: Path | None, about: dict[str, Any], known: dict[tuple[int, ...], Score]) -> None:
    if memory is None:
        return
    scores = [
        {"selections": list(selections), "score": dataclasses.asdict(score)} for selections, score in known.items()
    ]
    part = memory.with_suffix(".part")
    part.write_text(json.dumps({"about": about, "scores": scores}))
    part.replace(memory)  # whole or not at all

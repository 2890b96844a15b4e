"""What policies cost in quality, beside the dense model: `evaluate`.

The way through: tasks -> batches of questions, each with one dense prefill -> every policy at every budget -> records.
Answers are decoded greedily with the ops of deployment (`decode`); predictions are compared token by token (`quality`).
`records` keeps and sums up what was found, `report` draws it.
"""

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import TidalError
from ..explain import decode_calls
from ..models import describe
from ..passes.match import policy_layers
from ..passes.plan import Plan, kv_share, make_plan
from ..policy import FILE as POLICY_FILE
from ..policy import Policy, is_preset, resolve
from ..provenance import provenance
from ..text import default_text, digest
from . import records
from .decode import answer, prepare
from .quality import answer_trial, judge, log_probabilities, text_trial
from .tasks import HAS_DEPTH, TASKS, make_sample

PREDICTIONS = ("text", "text_steps", "answers")
QUESTIONS = ("dense", "sparse")


@dataclass(frozen=True)
class Subject:
    """A policy at one budget, the name under which it is compared, and a digest of what it says."""

    name: str
    digest: str
    policy: Policy
    plan: Plan


@dataclass(frozen=True)
class Place:
    """One prompt: what is asked, at which length, where its fact stands, and which of several it is."""

    task: str
    length: int
    depth: float | None
    seed: int


@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands: what is done of all its records."""

    stage: str
    done: int
    total: int


def evaluate(
    model: nn.Module, tokenizer: Any, policies: Sequence[Policy | str | Path | dict], *,
    tasks: Sequence[str] = ("needle", "text", "answers"), text: str | None = None,
    lengths: Sequence[int] = (1024, 2048, 4096), budgets: Sequence[int] = (), depths: int = 5, seeds: int = 1,
    questions: Sequence[str] = QUESTIONS, text_tokens: int = 128, batch: int = 8, first_seed: int = 0,
    model_name: str | None = None, folder: str | Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare policies with the dense model: one record a task, length, depth, seed, question, policy and budget.

    `tasks` are those of `evaluate.tasks`, whose answers are decoded greedily and matched, and `PREDICTIONS`, see
    `evaluate.quality`. `lengths` of the prompts in tokens; each policy runs at its own budget, or at each of `budgets`.
    Facts stand at `depths` places from the start to the end, `seeds` times; tasks without a place are asked `seeds`
    times, and passages, whose last `text_tokens` are decoded, taken at `seeds` places. `questions`: read densely with
    the prompt, as in the papers, or decoded under the policy. `batch` prompts share a prefill. `text` (default:
    `default_text`) is what facts are hidden in. `model_name` finds a preset's published layers. In `folder`,
    `records.jsonl` keeps what was found, from which a second run goes on.

    Raises `TidalError` for what can't be asked, `PolicyError` for a policy that doesn't fit.
    """
    _check("task", tasks, (*TASKS, *PREDICTIONS))
    _check("question", questions, QUESTIONS)
    text = default_text() if text is None else text
    if not text.split():
        raise TidalError("evaluate: the text is empty")
    folder = None if folder is None else Path(folder)
    subjects = compared(model, policies, budgets, model_name)
    about = about_model(model, model_name) | {"text": digest(text), "text_tokens": text_tokens}
    known = {} if folder is None else {records.name_of(one): one for one in records.read(folder, about)}
    found: list[dict[str, Any]] = []
    batches = [
        places[start : start + (batch if task in TASKS else 1)]
        for task in tasks
        for length in lengths
        for places in [_places(task, length, depths, range(first_seed, first_seed + seeds))]
        for start in range(0, len(places), batch if task in TASKS else 1)
    ]
    total = sum(len(places) * len(subjects) * (len(questions) if places[0].task in TASKS else 1) for places in batches)
    for places in batches:
        ask = _answers if places[0].task in TASKS else _predictions
        asked = [
            (subject, question)
            for subject in subjects
            for question in (questions if places[0].task in TASKS else [None])
        ]
        names = [[_name(place, *pair) for place in places] for pair in asked]
        missing = [any(name not in known for name in each) for each in names]
        to_ask = [pair for pair, lacks in zip(asked, missing, strict=True) if lacks]
        new = ask(model, tokenizer, text, places, to_ask, subjects[0].policy, text_tokens) if to_ask else iter(())
        for each, lacks in zip(names, missing, strict=True):
            fresh = next(new) if lacks else []
            if folder is not None and fresh:
                records.append(folder, about, fresh)
            found += fresh or [known[name] for name in each]
            report(Progress(f"{places[0].task}, {places[0].length} tokens", len(found), total))
    return found


def about_model(model: nn.Module, name: str | None) -> dict[str, Any]:
    """What records are made with: those of another model, format, device or library are not gone on from."""
    made = provenance(model.device.type)
    return describe(model, name) | {"device": made["device"], "versions": made["versions"]}


def _check(kind: str, given: Sequence[str], valid: Sequence[str]) -> None:
    if unknown := [one for one in given if one not in valid]:
        raise TidalError(f"evaluate: unknown {kind} {unknown[0]!r}; valid are: {', '.join(valid)}")


def compared(
    model: nn.Module, policies: Sequence[Any], budgets: Sequence[int], model_name: str | None
) -> list[Subject]:
    """Dense, then each policy at each budget. Raises `PolicyError` and `TidalError`."""
    calls, num_layers = decode_calls(model)
    layers = policy_layers(calls)
    subjects: list[Subject] = []
    titles: set[str] = set()
    for given in ("full", *policies):
        found = resolve(given, num_layers, attention_layers=layers, model=model_name)
        title = _title(given) if isinstance(given, str | Path) and not is_preset(given) else found.name
        if all(role.role == "full" for role in found.roles):
            if subjects:
                continue
            title, variants = "dense", [found]
        else:
            variants = [found.with_budget(budget) for budget in dict.fromkeys(budgets)] or [found]
        if title in titles:
            raise TidalError(f"evaluate: two policies have the same name, {title!r}; give their files different ones")
        titles.add(title)
        for policy in variants:
            plan = make_plan(calls, policy.roles)
            if plan.problems:
                raise TidalError(f"evaluate: the model can't follow policy {title!r}: {'; '.join(plan.problems)}")
            roles = json.dumps([dataclasses.asdict(role) for role in policy.roles])
            said = hashlib.sha256(roles.encode()).hexdigest()[:12]
            name = f"{title} @{_budget(policy)}" if any(role.role == "select" for role in policy.roles) else title
            subjects.append(Subject(name, said, policy, plan))
    return subjects


def _title(given: str | Path) -> str:
    """A policy file's name, or that of the folder or repository that it lies in."""
    path = Path(given)
    name = path.stem if path.suffix in (".yaml", ".yml", ".json") else path.name
    return path.parent.name or name if path.name == POLICY_FILE else name


def _budget(policy: Policy) -> str:
    roles = [role for role in policy.roles if role.role == "select"]
    return "/".join(dict.fromkeys(f"{role.ratio:g}" if role.ratio else str(role.budget) for role in roles))


def _places(task: str, length: int, depths: int, seeds: range) -> list[Place]:
    if task not in (*HAS_DEPTH, "answers"):
        return [Place(task, length, None, seed) for seed in seeds]
    steps = [0.5] if depths == 1 else [round(step / (depths - 1), 4) for step in range(depths)]
    return [Place(task, length, depth, seed) for seed in seeds for depth in steps]


def _record(place: Place, subject: Subject, question: str | None) -> dict[str, Any]:
    """The part of a record that says what it is about."""
    said = {"question": question, "subject": subject.name, "policy": subject.digest}
    return {**dataclasses.asdict(place), **said, "kv_share": round(kv_share(subject.plan, place.length), 4)}


def _name(place: Place, subject: Subject, question: str | None) -> tuple:
    return records.name_of(_record(place, subject, question))


def _answers(
    model: nn.Module, tokenizer: Any, text: str, places: Sequence[Place], asked: Sequence[tuple[Subject, str]], *_: Any
) -> Iterator[list[dict[str, Any]]]:
    """The records of each pair that is asked: greedy answers to the prompts at these places, and their scores."""
    samples = [make_sample(one.task, tokenizer, text, one.length, one.depth or 0.0, one.seed) for one in places]
    groups: dict[int, list[int]] = {}  # questions of a batch are equally long
    for number, sample in enumerate(samples):
        groups.setdefault(len(sample.question), []).append(number)
    prompts = {
        tuple(group): prepare(
            model, [samples[i].context for i in group], [samples[i].question for i in group], samples[0].new_tokens
        )
        for group in groups.values()
    }
    stop = _stop_tokens(model)
    for subject, question in asked:
        rows: dict[int, dict[str, Any]] = {}
        for group, made in prompts.items():
            for number, tokens in zip(
                group, answer(model, made, subject.policy.roles, question == "sparse", stop), strict=True
            ):
                output = tokenizer.decode(tokens)
                rows[number] = _record(places[number], subject, question) | {
                    "score": samples[number].score(output), "output_tokens": len(tokens), "output": output,
                    "answers": list(samples[number].answers),
                }  # fmt: skip
        yield [rows[number] for number in range(len(places))]


def _predictions(
    model: nn.Module, tokenizer: Any, text: str, places: Sequence[Place], asked: Sequence[tuple[Subject, None]],
    full: Policy, text_tokens: int,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """The record of each policy that is asked, at one place."""
    (place,) = places
    if place.task == "answers":
        sample = make_sample("passkey", tokenizer, text, place.length, place.depth, place.seed)
        trial = answer_trial(model, tokenizer, sample)
    else:
        ids = _passage(tokenizer, text, place.length, place.seed)
        trial = text_trial(model, ids, max(1, place.length - text_tokens), place.task == "text_steps")
    dense = log_probabilities(trial, full)
    for subject, question in asked:
        parts = [dense] if subject.policy == full else trial.logits(subject.policy)
        yield [_record(place, subject, question) | dataclasses.asdict(judge(parts, dense, trial.labels))]


def _passage(tokenizer: Any, text: str, length: int, seed: int) -> list[int]:
    """`length + 1` tokens from some place of a text, behind what the tokenizer puts before every text."""
    head, ids = list(tokenizer("").input_ids), _all_ids(tokenizer, text)
    needed = length + 1 - len(head)
    if len(ids) < needed:
        raise TidalError(f"evaluate: passages of {length} tokens need a longer text than the {len(ids)} tokens found")
    start = random.Random(f"{length} {seed}").randrange(len(ids) - needed + 1)
    return head + ids[start : start + needed]


@functools.lru_cache(maxsize=1)
def _all_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _stop_tokens(model: nn.Module) -> list[int]:
    """The tokens that end an answer."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True)):
        stop = getattr(config, "eos_token_id", None)
        if stop is not None:
            return [stop] if isinstance(stop, int) else list(stop)
    return []

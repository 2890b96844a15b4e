"""What policies cost in quality, beside the dense model: `evaluate`.

The way through: tasks -> batches of questions, each with one dense prefill -> every policy at every budget -> records.
Answers are decoded greedily by the step of deployment (`decode`); predictions are compared token by token (`quality`).
`records` keeps and sums up what was found, `report` draws it.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import TidalError
from ..explain import decode_calls
from ..models import describe, is_recurrent_model
from ..passes.match import AttentionSite, Unmatched, policy_layers
from ..passes.plan import make_plan
from ..policy import FILE as POLICY_FILE
from ..policy import Policy, is_preset, resolve
from ..progress import Progress
from ..provenance import provenance
from ..replay import cannot_replay
from ..settings import EVALUATION, EvaluationSettings, changed
from ..step import PolicyStep
from ..text import default_text, digest
from ..variant import Variant
from . import records
from .decode import answer, prepare
from .quality import Decoder, answer_trial, judge, log_probabilities, text_trial
from .tasks import HAS_DEPTH, TASKS, make_sample

PREDICTIONS = ("text", "text_steps", "answers")
QUESTIONS = ("dense", "sparse")


@dataclass(frozen=True)
class Place:
    """One prompt: what is asked, at which length, where its fact stands, and which of several it is."""

    task: str
    length: int
    depth: float | None
    seed: int


@dataclass(frozen=True)
class Exam:
    """What every prompt of an evaluation shares; `dense` is the policy that everything is compared with."""

    model: PreTrainedModel
    tokenizer: Any
    text: str
    text_tokens: int
    decoder: Decoder
    dense: Policy


def evaluate(
    model: PreTrainedModel, tokenizer: Any, policies: Sequence[Policy | str | Path | dict], *,
    text: str | None = None, settings: EvaluationSettings = EVALUATION, model_name: str | None = None,
    folder: str | Path | None = None, report: Callable[[Progress], None] = lambda progress: None, **changes: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare policies with the dense model: one record a task, length, depth, seed, question, policy and budget.

    `settings`, or single ones by name (`lengths=[4096]`), say what is asked. The answers of `evaluate.tasks` are
    decoded greedily and matched; `PREDICTIONS` are compared token by token, see `evaluate.quality`. `text` (default:
    `default_text`) is what facts are hidden in. `model_name` finds a preset's published layers. In `folder`,
    `records.jsonl` keeps what was found, from which a second run goes on.

    Raises `TidalError` for what can't be asked, `PolicyError` for a policy that doesn't fit.
    """
    settings = changed("evaluate", settings, changes)
    _check("task", settings.tasks, (*TASKS, *PREDICTIONS))
    _check("question", settings.questions, QUESTIONS)
    text = default_text() if text is None else text
    if not text.split():
        raise TidalError("evaluate: the text is empty")
    calls, num_layers = decode_calls(model)
    subjects = compared(calls, num_layers, policies, settings.budgets, model_name)
    decoder = Decoder(PolicyStep(model), replays=not cannot_replay(model, calls))
    exam = Exam(model, tokenizer, text, settings.text_tokens, decoder, subjects[0].policy)
    about = about_model(model, model_name) | {"text": digest(text), "text_tokens": settings.text_tokens}
    folder = None if folder is None else Path(folder)
    known = {} if folder is None else {records.name_of(record): record for record in records.read(folder, about)}

    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    jobs = [
        (ask, places, [(subject, question) for subject in subjects for question in asked])
        for task in settings.tasks
        for length in settings.lengths
        for ask, size, asked in [
            (_answers, settings.batch, settings.questions) if task in TASKS else (_predictions, 1, (None,))
        ]
        for places in _batches(_places(task, length, settings.depths, seeds), size)
    ]
    total = sum(len(places) * len(pairs) for _, places, pairs in jobs)
    results: list[dict[str, Any]] = []
    for ask, places, pairs in jobs:
        names = [[_name(place, *pair) for place in places] for pair in pairs]
        is_known = [known.keys() >= set(of_pair) for of_pair in names]
        missing = [pair for pair, there in zip(pairs, is_known, strict=True) if not there]
        measured = ask(exam, places, missing) if missing else iter(())
        for of_pair, there in zip(names, is_known, strict=True):
            rows = [known[name] for name in of_pair] if there else next(measured)
            if folder is not None and not there:
                records.append(folder, about, rows)
            results += rows
            report(Progress(f"{places[0].task}, {places[0].length} tokens", len(results), total))
    return results


def _batches(places: list[Place], size: int) -> list[list[Place]]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def about_model(model: PreTrainedModel, name: str | None) -> dict[str, Any]:
    """What records are made with: those of another model, format, device or library are not gone on from."""
    made = provenance(model.device.type)
    return describe(model, name) | {"device": made["device"], "versions": made["versions"]}


def _check(kind: str, given: Sequence[str], valid: Sequence[str]) -> None:
    if unknown := [one for one in given if one not in valid]:
        raise TidalError(f"evaluate: unknown {kind} {unknown[0]!r}; valid are: {', '.join(valid)}")


def compared(
    calls: list[AttentionSite | Unmatched], num_layers: int, policies: Sequence[Any], budgets: Sequence[int],
    model_name: str | None,
) -> list[Variant]:  # fmt: skip
    """Dense, then each policy at each budget, for a model with these attention calls.

    Raises `PolicyError` and `TidalError`.
    """
    layers = policy_layers(calls)
    subjects: list[Variant] = []
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
            subject = Variant(title, policy, plan)
            subjects.append(replace(subject, name=f"{title} @{_budget(policy)}") if subject.chooses else subject)
    return subjects


def _title(given: str | Path) -> str:
    """A policy file's name, or that of the folder or repository that it lies in."""
    path = Path(given)
    name = path.stem if path.suffix in (".yaml", ".yml", ".json") else path.name
    return path.parent.name or name if path.name == POLICY_FILE else name


def _budget(policy: Policy) -> str:
    chosen = [role.selection for role in policy.roles if role.role == "select"]
    return "/".join(dict.fromkeys(f"{one.ratio:g}" if one.ratio else str(one.budget) for one in chosen))


def _places(task: str, length: int, depths: int, seeds: range) -> list[Place]:
    if task not in (*HAS_DEPTH, "answers"):
        return [Place(task, length, None, seed) for seed in seeds]
    steps = [0.5] if depths == 1 else [round(step / (depths - 1), 4) for step in range(depths)]
    return [Place(task, length, depth, seed) for seed in seeds for depth in steps]


def _record(place: Place, subject: Variant, question: str | None) -> dict[str, Any]:
    """The part of a record that says what it is about."""
    said = {"question": question, "subject": subject.name, "policy": subject.digest}
    return {**dataclasses.asdict(place), **said, "kv_share": round(subject.kv_share(place.length), 4)}


def _name(place: Place, subject: Variant, question: str | None) -> tuple:
    return records.name_of(_record(place, subject, question))


def _answers(
    exam: Exam, places: Sequence[Place], asked: Sequence[tuple[Variant, str]]
) -> Iterator[list[dict[str, Any]]]:
    """The records of each pair that is asked: greedy answers to the prompts at these places, and their scores."""
    model, tokenizer = exam.model, exam.tokenizer
    samples = [
        make_sample(place.task, tokenizer, exam.text, place.length, place.depth or 0.0, place.seed) for place in places
    ]
    groups: dict[tuple[int, int], list[int]] = {}  # questions of a batch are equally long; recurrent layers see padding
    unpadded = is_recurrent_model(model)
    for number, sample in enumerate(samples):
        size = len(sample.question), len(sample.context) if unpadded else 0
        groups.setdefault(size, []).append(number)
    prompts = {
        tuple(group): prepare(
            model, [samples[i].context for i in group], [samples[i].question for i in group], samples[0].new_tokens
        )
        for group in groups.values()
    }
    stop = _stop_tokens(model)
    for subject, question in asked:
        rows: dict[int, dict[str, Any]] = {}
        for group, prompt in prompts.items():
            answers = answer(model, exam.decoder.step, prompt, subject.policy.roles, question == "sparse", stop)
            for number, tokens in zip(group, answers, strict=True):
                output = tokenizer.decode(tokens)
                rows[number] = _record(places[number], subject, question) | {
                    "score": samples[number].score(output), "output_tokens": len(tokens), "output": output,
                    "answers": list(samples[number].answers),
                }  # fmt: skip
        yield [rows[number] for number in range(len(places))]


def _predictions(
    exam: Exam, places: Sequence[Place], asked: Sequence[tuple[Variant, None]]
) -> Iterator[list[dict[str, Any]]]:
    """The record of each policy that is asked, at one place."""
    (place,) = places
    model, tokenizer = exam.model, exam.tokenizer
    if place.task == "answers":
        sample = make_sample("passkey", tokenizer, exam.text, place.length, place.depth, place.seed)
        trial = answer_trial(model, tokenizer, sample, exam.decoder)
    else:
        ids = _passage(tokenizer, exam.text, place.length, place.seed)
        start = max(1, place.length - exam.text_tokens)
        trial = text_trial(model, ids, start, exam.decoder, compiled=place.task == "text_steps")
    dense = log_probabilities(trial, exam.dense)
    for subject, question in asked:
        parts = [dense] if subject.policy == exam.dense else trial.logits(subject.policy)
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


def _stop_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end an answer."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True)):
        stop = getattr(config, "eos_token_id", None)
        if stop is not None:
            return [stop] if isinstance(stop, int) else list(stop)
    return []

"""What a calibration and an evaluation can be told, said once for Python and the command line. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from .errors import TidalError


@dataclass(frozen=True)
class CalibrationSettings:
    """How `calibrate` makes its contexts, and what its search may try."""

    context: int = 4096  # tokens of a context, about
    contexts: int = 6  # how many of them
    dense: int | None = (
        None  # layers that may stay dense before the first selection; None: 2, or an eighth of few layers
    )
    sinks: int = 4  # of the policy
    recent: int = 32  # of the policy
    share: str = "auto"  # of the policy; auto: kv_head, with a map of heads, or layer, whichever loses less
    output: str = "auto"  # of the selections; auto: sparse where it costs no quality, otherwise full
    by: str = "scores"  # of the selections: scores, pages (their size and `keep` are found), or auto for either
    sample: tuple[int, int] | None = (
        None  # bits and tables of `by: lsh`, by which a layer may sample instead of reusing tokens, if it loses less
    )
    max_bytes: int | None = None  # that a step may read of weights and cache
    max_bytes_at: int | None = None  # the live tokens at which it may; None: the context
    vary_budgets: bool = False  # also try another budget for each selection, with the same number of tokens in all
    weights: Mapping[str, float] | None = None  # of the kinds of loss: text, answer, copy; None: 1 each
    tries: int = 60  # policies to try for each number of selections, before the best one is refined
    seed: int = 0


@dataclass(frozen=True)
class EvaluationSettings:
    """What `evaluate` asks, and how often."""

    tasks: Sequence[str] = ("needle", "text", "answers")  # those of `evaluate.tasks` and `evaluate.PREDICTIONS`
    lengths: Sequence[int] = (1024, 2048, 4096)  # of the prompts, in tokens
    budgets: Sequence[int] = ()  # each policy runs at each of these; none: at its own
    depths: int = 5  # places of a fact, from the start of a prompt to its end
    seeds: int = 1  # prompts at each place
    first_seed: int = 0
    questions: Sequence[str] = (
        "dense",
        "sparse",
    )  # read with the prompt, or decoded under the policy
    text_tokens: int = 128  # the last tokens of a passage, which are decoded
    batch: int = 8  # prompts that share a prefill


CALIBRATION, EVALUATION = CalibrationSettings(), EvaluationSettings()  # the defaults

Settings = TypeVar("Settings", CalibrationSettings, EvaluationSettings)


def changed(what: str, settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with changes by name. Raises `TidalError` for a name that is no setting."""
    names = [field.name for field in fields(settings)]
    if unknown := [name for name in changes if name not in names]:
        raise TidalError(f"{what}: unknown setting {unknown[0]!r}; valid settings are {', '.join(names)}")
    return replace(settings, **changes)

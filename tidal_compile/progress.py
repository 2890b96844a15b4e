"""How far a long piece of work is."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """A stage, how many of its steps are done, and, in a calibration, the best candidate so far (`search.Found`)."""

    stage: str
    done: int
    total: int
    best: Any = None

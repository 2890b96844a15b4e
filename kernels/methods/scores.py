"""`by: scores`: the tokens to which the layer attends most, by exact scores of all tokens.

TidalDecode (https://arxiv.org/abs/2410.05076) with `output: full`. With `output: sparse` it is the oracle of top-k
attention, and what the anchor layers of Kascade (https://arxiv.org/abs/2512.16391) do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..call import Call, Selection


@dataclass(frozen=True)
class Scores(Method):
    """No keys of its own: `share` and `pool` say how the scores of heads are joined."""

    outputs: ClassVar[tuple[str, ...]] = ("full", "sparse")
    several: ClassVar[bool] = True

    def choose(self, call: Call[Tensor], selection: Selection) -> Tensor:
        """See `reference.importance`."""
        from .. import reference

        return reference.choose_by_scores(call, selection)

    def step_on_gpu(self, call: Call[Tensor], selection: Selection) -> Tensor:
        """A scan of the keys, and a search for the best."""
        from ..triton import select

        return select.choose_by_scores(call, selection)

    def keys_read(self, selection: Selection, length: int, key_bytes: int) -> int:
        """All of them."""
        return length

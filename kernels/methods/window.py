"""`by: window`: the first tokens and the last ones, whatever they say. It reads no keys.

StreamingLLM (https://arxiv.org/abs/2309.17453): `sinks` first tokens, and as many recent ones as fill the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..call import Call, Selection


@dataclass(frozen=True)
class Window(Method):
    """No keys of its own: `budget` and `sinks` say it all, and all token sets are the same."""

    by_heads: ClassVar[bool] = False

    def choose(self, call: Call[Tensor], selection: Selection) -> Tensor:
        """The first `sinks` valid tokens and the last budget - sinks."""
        import torch

        from .. import reference

        ordinal = reference.seen(call).long().cumsum(-1)  # [B, T, S]: 1 for the first valid token, 2 for the second
        num_valid = ordinal[..., -1:]
        keep = reference.num_kept(selection, num_valid)  # [B, T, 1]
        kept = torch.arange(1, selection.width(ordinal.shape[-1]) + 1, device=ordinal.device)  # the first, the second
        wanted = torch.where(kept <= selection.sinks, kept, num_valid - keep + kept)  # [B, T, K]: its ordinal
        index = torch.where(kept <= keep, torch.searchsorted(ordinal, wanted), -1).int()
        num_sets = selection.num_sets(call.query.shape[1], call.key.shape[1])
        return reference.as_index(index[:, :, None].expand(-1, -1, num_sets, -1))

    def keys_read(self, selection: Selection, length: int, key_bytes: int) -> int:
        """None."""
        return 0

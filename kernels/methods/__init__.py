"""Ways for a selection to choose tokens: one file each, named as the policy key `by` names it.

A file `key_norm.py` holds a frozen dataclass `KeyNorm`, a `Method`: its fields, with their types and defaults, are the
method's own keys in a policy file, and its `choose` is its definition. Nothing else needs to know of it: `METHODS` is
what is in this folder, `ops` makes an operator `tidal::choose_by_<name>` (or `attend_by_<name>`) of each, and policies,
`explain`, calibration and evaluation take the rest from here. Policy files are read without torch: methods import it
where they need it.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from ..call import Call, Selection


@dataclass(frozen=True)
class Method:
    """A way to choose tokens. A wrong value of a key is a ValueError of `__post_init__`, which names the key.

    `outputs`: what a selection layer may return, the default first. `sparse`: attention to the tokens that it chose;
    `full`, to all tokens, is for `scores` alone, whose op does both in one pass.
    `attends`: whether it attends by itself instead of choosing a token set that other layers could reuse.
    `by_slot`: whether a choice depends on the slots in which tokens stand, not only on their order.
    `by_heads`: whether a choice depends on what the heads that share a set hold, and not on places alone.
    `several`: whether its step takes several query tokens, as `choose` and `attend` always do.
    `keeps`: names of the tensors that it keeps beside the keys of a layer, so as not to read all of these at each step.
    `summarize` makes them of the keys, and `update` takes in what a step knows: its keys, and which slots are live.
    """

    outputs: ClassVar[tuple[str, ...]] = ("sparse",)
    attends: ClassVar[bool] = False
    by_slot: ClassVar[bool] = False
    by_heads: ClassVar[bool] = True
    several: ClassVar[bool] = False
    keeps: ClassVar[tuple[str, ...]] = ()

    @property
    def weighs(self) -> bool:
        """Whether `weigh` can say what each token is worth to some of a layer's heads, the others being elsewhere."""
        return False

    @property
    def prepares(self) -> bool:
        """Whether what is kept is made before a step, by `prepare`, and not by `summarize` and in the step."""
        return False

    def choose(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """The token sets: index `[B, G, K]` int32, and `[B, T, G, K]` for T > 1 query tokens (see `call`).

        In plain PyTorch, without a wait for the host and without a shape that depends on data, so that it also runs in
        CUDA graphs. `reference.pick` turns the importance of tokens into an index. Without `kept`, from the keys alone.
        """
        raise NotImplementedError

    def attend(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """In place of `choose`, for a method that `attends`: its attention `[B, Hq, T, D]`."""
        raise NotImplementedError

    def step(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """`update` what is kept, if it is given, and then `choose` or `attend`."""
        if kept:
            self.update(call, selection, *kept)
        return (self.attend if self.attends else self.choose)(call, selection, *kept)

    def step_on_gpu(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """`step` as kernels, for T = 1 and, if `several`, more."""
        return self.step(call, selection, *kept)

    def weigh(self, call: Call[Tensor], selection: Selection, rank: int, ranks: int, *kept: Tensor) -> Tensor:
        """`step` up to the choice, for `share: layer`, of heads that are divided among ranks: see `rank_by_scores`."""
        raise NotImplementedError

    def weigh_on_gpu(self, call: Call[Tensor], selection: Selection, rank: int, ranks: int, *kept: Tensor) -> Tensor:
        """`weigh` as kernels."""
        return self.weigh(call, selection, rank, ranks, *kept)

    def summarize(self, key: Tensor) -> tuple[Tensor, ...]:
        """What it keeps, made of the keys of a layer `[B, Hkv, S, D]`. Slots that aren't live may hold anything."""
        return ()

    def renew(self, key: Tensor, *kept: Tensor) -> None:
        """Make what is kept anew, in place, after somebody else wrote to the cache."""
        for tensor, now in zip(kept, self.summarize(key), strict=True):
            tensor.copy_(now)

    def update(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> None:
        """Take the keys of a decode step's new token into what is kept, in place."""

    def prepare(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> None:
        """Make what is kept, before the first step after somebody else wrote to the cache, and outside of any graph.

        `call` is the one that the step will make, where the newest token is not in the cache yet, and the query is only
        as large as it will be.
        """
        raise NotImplementedError

    def connect(self, call: Call[Tensor], *kept: Tensor) -> None:
        """Before the first step of each compiled graph over a cache, for a method that `prepares`: see `prepare`."""

    def keys_read(self, selection: Selection, length: int, key_bytes: int) -> float:
        """How many keys, of `key_bytes` each, are read to choose, of so many live ones: for the bytes of a step."""
        raise NotImplementedError

    def tokens_kept(self, selection: Selection, length: int) -> int:
        """How many tokens a set has, of so many live ones."""
        return selection.keep(length)


METHODS: dict[str, type[Method]] = {
    name: getattr(import_module(f".{name}", __name__), name.title().replace("_", ""))
    for _, name, _ in pkgutil.iter_modules(__path__)
}

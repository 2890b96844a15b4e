"""What a role does, said once: for the graph of a decode step, for its uncompiled ops, and for many steps in a pass.

    full    attention to everything
    select  chooses a token set; attention to everything, or to what it chose
    reuse   attention to the token set of an earlier selection

`follow` writes an attention call as calls of ops, over tensors or over nodes of a graph alike. Needs no torch until
then, since policy files are read without it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Generic

from ..kernels.call import Call, Selection, T, arguments
from ..kernels.methods import METHODS, Method

if TYPE_CHECKING:
    from torch import Tensor, fx

ROLES = ("full", "select", "reuse")


@dataclass(frozen=True)
class LayerRole:
    """What one layer does, with all defaults of its policy filled in.

    A selection chooses by the method `by`, whose keys are `method`, and returns its `output`. `source` is the select
    layer whose tokens a reuse layer attends to, and whose `selection` and method it has, too. `heads`: for each kv head
    of a reuse layer, the kv head of its source whose tokens it takes; None: the one of the same number.
    """

    layer: int
    role: str
    source: int | None = None
    selection: Selection | None = None
    by: str = "scores"
    method: Method = field(default_factory=METHODS["scores"])
    output: str = "full"
    heads: tuple[int, ...] | None = None

    @property
    def keeps(self) -> bool:
        """Whether its method keeps tensors beside the cache."""
        return self.role == "select" and bool(self.method.keeps)

    @property
    def is_sparse(self) -> bool:
        """Whether its output is attention to a token set."""
        return self.role == "reuse" or (self.role == "select" and self.output == "sparse")

    def describe_method(self) -> str:
        """The method by which its tokens are chosen, and its keys: "pages, page 16"."""
        keys = [f"{one.name} {getattr(self.method, one.name)}" for one in fields(self.method)]
        return ", ".join([self.by, *keys])

    def tokens_read(self, length: int, group: int, key_bytes: int) -> float:
        """How many tokens' keys and values a decode step reads at `length` live tokens, for each kv head.

        `group`: query heads a kv head; `key_bytes`: of a token's key. Token sets of query heads count as if they had no
        token in common.
        """
        if not self.is_sparse:
            return length
        sets = group if self.selection.share == "query_head" or self.method.attends else 1
        chosen = min(length, sets * self.method.tokens_kept(self.selection, length))
        scanned = self.method.keys_read(self.selection, length, key_bytes) if self.role == "select" else 0
        return min(length, scanned / 2 + chosen)


@dataclass(frozen=True)
class TokenSet(Generic[T]):
    """The tokens that a selection chose, and the mask under which it did."""

    index: T
    mask: T | None


@dataclass(frozen=True)
class Ranks:
    """The processes among which the heads of a layer are divided in order, under tensor parallelism: `rank` of `size`,
    in the process group that PyTorch's functional collectives know as `group`.
    """

    group: str
    rank: int
    size: int


Sets = dict[tuple[int, tuple[int, ...] | None], TokenSet]  # by selection, and the head map under which it is used
Run = Callable[..., Any]  # run(op or function, *arguments): an op is given by name


def follow(
    role: LayerRole, call: Call[T], sets: Sets, run: Run, kept: Sequence[T] = (), ranks: Ranks | None = None
) -> T:  # fmt: skip
    """The attention of a layer by its role; a selection leaves what it chose in `sets`, for the layers after it.

    `kept`: the tensors that its method keeps beside the cache; without them it chooses by the keys themselves. `ranks`:
    who has the other heads of the layer.
    """
    if role.role == "full":
        return run("full_attention", *arguments(call))
    if role.role == "select" and ranks is not None and asks_all_ranks(role):
        return _choose_together(role, call, sets, run, kept, ranks)
    if role.role == "select" and role.output == "full":
        both = run("select_attention", *arguments(call), *arguments(role.selection))
        sets[role.layer, None] = TokenSet(run(operator.getitem, both, 1), call.mask)
        return run(operator.getitem, both, 0)
    if role.role == "select":
        settings = (*arguments(role.selection), *arguments(role.method), *kept)
        if role.method.attends:
            return run(f"attend_by_{role.by}", *arguments(call), *settings)
        index = run(f"choose_by_{role.by}", *arguments(call), *settings)
        chosen = sets[role.layer, None] = TokenSet(index, call.mask)
    else:
        if (role.source, role.heads) not in sets:
            sets[role.source, role.heads] = _mapped(sets[role.source, None], role.heads, run, ranks)
        chosen = sets[role.source, role.heads]
    return _attend_to(chosen, call, run)


def _attend_to(chosen: TokenSet, call: Call[T], run: Run) -> T:
    if chosen.mask is call.mask and _is_bool(call.mask):
        call = replace(call, mask=None)  # it hides none of the tokens that were chosen under it
    return run("sparse_attention", *arguments(call), chosen.index)


def asks_all_ranks(role: LayerRole) -> bool:
    """Whether a selection ranks tokens by all heads of its layer, some of which other ranks may have."""
    return role.selection.share == "layer" and role.method.by_heads and not role.method.attends


def _choose_together(role: LayerRole, call: Call[T], sets: Sets, run: Run, kept: Sequence[T], ranks: Ranks) -> T:
    """A selection by the heads of all ranks. Each chooses by the same numbers, which a reduction leaves on all of them,
    so that they can't disagree.
    """
    import torch

    collectives = torch.ops._c10d_functional
    settings = (*arguments(call), *arguments(role.selection))
    if role.by == "scores":
        name = "rank_and_attend" if role.output == "full" else "rank_by_scores"
        both = run(name, *settings, ranks.rank, ranks.size)
    else:
        both = run(f"weigh_by_{role.by}", *settings, *arguments(role.method), *kept, ranks.rank, ranks.size)
    worth = run(operator.getitem, both, 1) if role.output == "full" else both
    reduction = "sum" if role.selection.pool == "sum" else "max"
    worth = run(collectives.all_reduce.default, worth, reduction, ranks.group)
    page = getattr(role.method, "page", 0)  # of a method that has pages, the newest one comes first
    index = run("choose_ranked", *settings, run(collectives.wait_tensor.default, worth), page)
    chosen = sets[role.layer, None] = TokenSet(index, call.mask)
    return run(operator.getitem, both, 0) if role.output == "full" else _attend_to(chosen, call, run)


def _mapped(tokens: TokenSet[T], heads: tuple[int, ...], run: Run, ranks: Ranks | None) -> TokenSet[T]:
    """The same set with row heads[h] in row h. Slices, not an index: that would be a constant on the CPU.

    Of ranks, each has as many heads; where one needs another's rows, all of them exchange theirs.
    """
    import torch

    if ranks is None:
        rows = [run(torch.select, tokens.index, -2, head) for head in heads]
        return TokenSet(run(torch.stack, rows, -2), tokens.mask)
    here = len(heads) // ranks.size
    own = range(ranks.rank * here, (ranks.rank + 1) * here)
    if all(head // here == source // here for head, source in enumerate(heads)):
        return _mapped(tokens, tuple(heads[head] % here for head in own), run, None)
    collectives = torch.ops._c10d_functional
    everywhere = run(collectives.all_gather_into_tensor.default, tokens.index, ranks.size, ranks.group)
    everywhere = run(collectives.wait_tensor.default, everywhere)  # [ranks B, ...]
    of_rank = run(torch.chunk, everywhere, ranks.size)
    rows = [
        run(torch.select, run(operator.getitem, of_rank, heads[head] // here), -2, heads[head] % here) for head in own
    ]
    return TokenSet(run(torch.stack, rows, -2), tokens.mask)


def _is_bool(mask: Tensor | fx.Node | None) -> bool:
    import torch

    value = mask.meta["example_value"] if isinstance(mask, torch.fx.Node) else mask
    return value is not None and value.dtype == torch.bool

"""`by: pages`: the tokens of the most promising pages, judged by bounds of their keys instead of the keys.

Quest (https://arxiv.org/abs/2406.10774): the largest and the smallest key of a page, channel by channel, say how high
a score in the page can be at most. That bound stands in for the score of every token of the page: ranks, shares and
pools are then those of `by: scores`. So a token set has as many tokens as its budget, whatever the size of a page; of
the last page that it takes, the first ones. The page of the newest token is always taken. (Quest's code takes whole
pages only, and drops one that is not full.)

With `keep`, two levels: the bounds keep `keep` times as many tokens, of which those with the best exact scores are
chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from . import Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..call import Call, Selection


SIZES = (4, 8, 16, 32, 64)  # of a page, each a part of the next


@dataclass(frozen=True)
class Pages(Method):
    """`page`: slots of the cache in a page, a power of two. `keep`: 0, or how many times the budget the bounds keep."""

    by_slot: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("bounds",)

    page: int = 16
    keep: float = 0.0

    def __post_init__(self) -> None:
        if self.page not in SIZES:
            raise ValueError(f"page must be 4, 8, 16, 32 or 64; found {self.page}")
        if self.keep != 0.0 and not 1.0 <= self.keep <= 1024.0:
            raise ValueError(f"keep must be 0 for one level, or 1 to 1024 times the budget; found {self.keep}")

    @property
    def weighs(self) -> bool:
        """With one level: a second one would rank what all ranks have chosen."""
        return not self.keep

    def step_on_gpu(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """A scan of the bounds, and a search for the best; with `keep`, exact scores and another search."""
        from ..triton import pages

        if not self.keep:
            return pages.choose_pages(call, selection, *kept, self.page).index
        return pages.choose_again(call, selection, pages.choose_pages(call, self._wide(selection), *kept, self.page))

    def weigh(self, call: Call[Tensor], selection: Selection, rank: int, ranks: int, *kept: Tensor) -> Tensor:
        """By the bounds of their pages. That the newest page comes first is left to `choose_ranked`."""
        from .. import reference

        if kept:
            self.update(call, selection, *kept)
        scores = reference.as_scores(call, self._bound_products(call, *kept))
        newest = reference.in_newest_page(scores[:, 0, 0] > -math.inf, self.page)
        return reference.worth(call, selection, scores, rank, ranks, newest)

    def weigh_on_gpu(self, call: Call[Tensor], selection: Selection, rank: int, ranks: int, *kept: Tensor) -> Tensor:
        """A scan of the bounds, whose scores are spread over the tokens."""
        from ..triton import pages

        return pages.rank_by_pages(call, selection, *kept, self.page, rank, ranks)

    def _wide(self, selection: Selection) -> Selection:
        """What the bounds keep: `keep` times as many tokens."""
        budget, ratio = math.ceil(self.keep * selection.budget), min(1.0, self.keep * selection.ratio)
        return replace(selection, budget=budget, ratio=ratio)

    def summarize(self, key: Tensor) -> tuple[Tensor, ...]:
        """The smallest and the largest keys of the pages `[B, Hkv, P, 2, D]`: of all their slots, live or not.

        P counts whole pages. Of a cache that ends within a page, the rest is never more than the page of the newest.
        """
        import torch

        pages = key.shape[2] // self.page
        by_page = key[:, :, : pages * self.page].unflatten(2, (pages, self.page))
        return (torch.stack([by_page.amin(3), by_page.amax(3)], 3),)

    def update(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> None:
        """The bounds of the page in which the newest token stands."""
        import torch

        from .. import reference

        (bounds,) = kept
        newest = (call.length - 1) // self.page  # 0-d on the device
        page = newest.clamp(0, max(0, bounds.shape[2] - 1)).view(1)
        if bounds.shape[2]:
            slots = page * self.page + torch.arange(self.page, device=page.device)
            keys = reference.model_keys(call, slots)
            bounds.index_copy_(2, page, torch.stack([keys.amin(2), keys.amax(2)], 2)[:, :, None])

    def choose(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """The best pages' tokens; with `keep`, the best tokens of these."""
        import torch

        from .. import reference

        if not self.keep or int(call.length) == 0:
            return self._by_bounds(call, selection, *kept)
        num_valid = reference.seen(call).sum(-1)  # [B, T]
        index = self._by_bounds(call, self._wide(selection), *kept)
        index = index.view(*num_valid.shape, *index.shape[-2:])  # [B, T, G, wide K]
        live = index[:, :, 0] >= 0  # [B, T, wide K]: as many in every set
        scores = reference.score_live_tokens(call)
        members = call.query.shape[1] // index.shape[2]
        by_set = scores.reshape(index.shape[0], index.shape[2], members, *scores.shape[3:])  # [B, G, members, T, n]
        column = index.clamp(min=0).long().transpose(1, 2)[:, :, None].expand(-1, -1, members, -1, -1)
        by_head = by_set.gather(4, column).masked_fill(~live[:, None, None], -torch.inf)
        by_head = by_head.view(*scores.shape[:4], -1)  # [B, Hkv, g, T, wide K]
        aside = reference.always_kept(live, selection)  # candidates are in order, and hold sinks and recent tokens
        worth = reference.importance(by_head, selection, aside, call.sink_logit)
        chosen = reference.pick(worth, live, selection, call.key.shape[2], num_valid).view(*index.shape[:3], -1)
        return reference.as_index(index.gather(3, chosen.clamp(min=0).long()).where(chosen >= 0, -1))

    def keys_read(self, selection: Selection, length: int, key_bytes: int) -> int:
        """Two bounds a page; with `keep`, the keys of the tokens that they keep."""
        kept = min(length, math.ceil(self.keep * selection.keep(length)))
        return min(length, 2 * math.ceil(length / self.page) + kept)

    def _by_bounds(self, call: Call[Tensor], selection: Selection, *kept: Tensor) -> Tensor:
        """The tokens of the pages with the highest bounds: an index."""
        import torch

        from .. import reference

        scores = reference.as_scores(call, self._bound_products(call, *kept))
        seen = scores[:, 0, 0] > -torch.inf  # [B, T, n]
        if seen.shape[-1] == 0:  # nothing is live
            return reference.choose_by_scores(call, selection)
        in_newest = reference.in_newest_page(seen, self.page)
        aside = reference.always_kept(seen, selection) | in_newest
        worth = reference.importance(scores, selection, aside, call.sink_logit)
        worth = worth.masked_fill(in_newest[:, :, None], torch.finfo(torch.float32).max)
        return reference.pick(worth, seen, selection, call.key.shape[2])

    def _bound_products(self, call: Call[Tensor], *kept: Tensor) -> Tensor:
        """The most that query times key can be for the tokens of each page: `[B, Hkv, g, T, n]`, alike in a page.

        Of a page that a query sees in part, the bounds are those of what it sees: they are made anew.
        """
        import torch

        from .. import reference

        batch, _, num_tokens, head_dim = call.query.shape
        num_kv_heads, slots = call.key.shape[1:3]
        (bounds,) = kept or self.summarize(reference.model_keys(call, slice(slots)))
        n = min(int(call.length), slots)
        query = call.query.float().view(batch, num_kv_heads, -1, num_tokens, head_dim)
        low, high = bounds.float()[:, :, None].unbind(4)  # [B, Hkv, 1, P, D]
        products = query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT  # [B, Hkv, g, T, P]

        pages = math.ceil(n / self.page)
        products = torch.nn.functional.pad(products[..., :pages], (0, max(0, pages - products.shape[-1])))
        seen = torch.nn.functional.pad(reference.seen(call), (0, -slots % self.page))
        seen = seen.unflatten(2, (-1, self.page))  # [B, T, pages, page]
        in_part = seen.any(-1) & ~seen.all(-1)
        for page in in_part.any(0).any(0).nonzero()[:, 0].tolist():
            begin = page * self.page
            own = slice(begin, begin + self.page)
            keys = reference.model_keys(call, own).float()[:, :, None]  # [B, Hkv, 1, page, D]
            hides = ~seen[:, None, :, page, : keys.shape[3], None]  # [B, 1, T, page, 1]
            low = keys.masked_fill(hides, torch.inf).amin(3)[:, :, None]  # [B, Hkv, 1, T, D]
            high = keys.masked_fill(hides, -torch.inf).amax(3)[:, :, None]
            bound = (query * torch.where(query > 0, high, low)).sum(-1)  # [B, Hkv, g, T]
            products[..., page] = torch.where(in_part[:, None, None, :, page], bound, products[..., page])
        return products.repeat_interleave(self.page, -1)[..., :n]

"""Selections by exact scores in Triton: the scan of `dense`, which also writes its scores, then `topk`.

References: `reference.select_attention` and, without an output and without a look at the values, `choose_by_scores`.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..call import Call, Selection
from ..reference import as_index
from .dense import scan
from .split import Splits
from .topk import choose_tokens, merge_and_prepare, take_turns


def select_attention(call: Call[Tensor], selection: Selection) -> tuple[Tensor, Tensor]:
    """See `reference.select_attention`."""
    out = call.query.new_empty(call.query.shape)
    return out, choose(scan(call, write_scores=True), call, selection, out)


def choose_by_scores(call: Call[Tensor], selection: Selection) -> Tensor:
    """See `reference.choose_by_scores`."""
    return choose(scan(call, write_scores=True, values=False), call, selection)


def rank_and_attend(call: Call[Tensor], selection: Selection, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """See `reference.rank_and_attend`."""
    out = call.query.new_empty(call.query.shape)
    return out, worth(scan(call, write_scores=True), call, selection, rank, ranks, out)


def rank_by_scores(call: Call[Tensor], selection: Selection, rank: int, ranks: int) -> Tensor:
    """See `reference.rank_by_scores`."""
    return worth(scan(call, write_scores=True, values=False), call, selection, rank, ranks)


def choose_ranked(call: Call[Tensor], selection: Selection, worth: Tensor, page: int) -> Tensor:
    """See `reference.choose_ranked`."""
    batch, tokens, _, slots = worth.shape
    prepared = merge_and_prepare(None, call, 1, slots)
    width = selection.width(slots)
    worth = worth.flatten(0, 1).clone()  # `choose_tokens` writes to it
    given = {"slots": slots, "width": width, "tokens": tokens, "page": page}
    index = choose_tokens(worth, prepared, call.length, selection, "turn", **given)
    return as_index(index.unflatten(0, (batch, tokens)))


def worth(
    splits: Splits, call: Call[Tensor], selection: Selection, rank: int, ranks: int, out: Tensor | None = None,
    page: int = 0,
) -> Tensor:  # fmt: skip
    """What each slot is worth to the heads of this rank `[B, T, 1, S]`, by the scores of a scan; -inf where hidden.

    What is beyond the live length is undefined. `page`: see `choose`.
    """
    num_heads, slots = call.query.shape[1], call.key.shape[2]
    batch, tokens = call.query.shape[0], call.query.shape[2]
    if selection.pool == "union":
        prepared = merge_and_prepare(splits, call, num_heads, slots, out)
        own, width = replace(selection, share="query_head"), selection.width(slots)
        given = {"slots": slots, "width": width, "tokens": tokens, "page": page}
        by_head = choose_tokens(splits.scores, prepared, call.length, own, "score", **given)
        found = take_turns(splits.scores, by_head, 1, rank, ranks)
    else:
        lse = merge_and_prepare(splits, call, 1, slots, out).lse[..., None]  # [R, Hq, 1]
        weights = (splits.scores - lse).exp2()
        pooled = weights.sum(1, keepdim=True) if selection.pool == "sum" else weights.amax(1, keepdim=True)
        least = 2.0 ** -math.ceil(math.log2(ranks * num_heads))  # one set has as much to give as one head: see `topk`
        found = torch.where(splits.scores[:, :1] > -torch.inf, pooled * least, -torch.inf)
    return found[..., :slots].unflatten(0, (batch, tokens)).contiguous()


def takes_turns(selection: Selection, num_sets: int, num_heads: int) -> bool:
    """Whether the heads that share a token set choose in turn."""
    return selection.pool == "union" and num_sets < num_heads


def choose(
    splits: Splits, call: Call[Tensor], selection: Selection, out: Tensor | None = None, page: int = 0,
    of: Tensor | None = None, num_valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The index by the scores of a scan, whose splits are merged into `out`, if it is given.

    `page`: the tokens of the newest page of this size rank above all but those that are always kept; 0: no page does.
    `of [B, G, n]`: the tokens that were scored, in order, if they are not those of the cache; `num_valid [B]`: how many
    tokens are valid, if more than these are.
    """
    num_heads, num_kv_heads, width = call.query.shape[1], call.key.shape[1], selection.width(call.key.shape[2])
    slots = call.key.shape[2] if of is None else of.shape[2]
    num_sets = selection.num_sets(num_heads, num_kv_heads)
    batch, tokens = call.query.shape[0], call.query.shape[2]
    given = {"slots": slots, "width": width, "tokens": tokens, "page": page, "num_valid": num_valid}
    by_token = given | {"of": of}
    if not takes_turns(selection, num_sets, num_heads):
        pool = "score" if num_sets == num_heads else selection.pool
        prepared = merge_and_prepare(splits, call, num_sets, slots, out)
        index = choose_tokens(splits.scores, prepared, call.length, selection, pool, **by_token)
        return as_index(index.unflatten(0, (batch, tokens)))
    prepared = merge_and_prepare(splits, call, num_heads, slots, out)
    own = replace(selection, share="query_head")
    by_head = choose_tokens(splits.scores, prepared, call.length, own, "score", **given)
    worth = take_turns(splits.scores, by_head, num_sets)
    prepared = merge_and_prepare(None, call, num_sets, slots)
    index = choose_tokens(worth, prepared, call.length, selection, "turn", **by_token)
    return as_index(index.unflatten(0, (batch, tokens)))

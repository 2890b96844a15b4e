"""Selections by exact scores in Triton: the scan of `dense`, which also writes its scores, then `topk`.

References: `reference.select_attention` and, without an output and without a look at the values, `choose_by_scores`.
"""

from dataclasses import replace

from torch import Tensor

from ..call import Call, Selection
from .dense import scan
from .topk import choose_tokens, merge_and_prepare, take_turns


def select_attention(call: Call[Tensor], selection: Selection) -> tuple[Tensor, Tensor]:
    """See `reference.select_attention`."""
    out = call.query.new_empty(call.query.shape)
    return out, _choose(call, selection, out)


def choose_by_scores(call: Call[Tensor], selection: Selection) -> Tensor:
    """See `reference.choose_by_scores`."""
    return _choose(call, selection, None)


def _choose(call: Call[Tensor], selection: Selection, out: Tensor | None) -> Tensor:
    """The index, and attention to everything in `out`, if it is given."""
    num_heads, num_kv_heads, slots = call.query.shape[1], *call.key.shape[1:3]
    num_sets = selection.num_sets(num_heads, num_kv_heads)
    splits = scan(call, write_scores=True, values=out is not None)
    if num_sets == num_heads or selection.pool != "union":
        pool = "score" if num_sets == num_heads else selection.pool
        prepared = merge_and_prepare(splits, call, num_sets, out)
        return choose_tokens(splits.scores, prepared, call.length, slots, selection, pool)
    prepared = merge_and_prepare(splits, call, num_heads, out)
    by_head = choose_tokens(
        splits.scores, prepared, call.length, slots, replace(selection, share="query_head"), "score"
    )
    worth = take_turns(splits.scores, by_head, num_sets)
    return choose_tokens(worth, merge_and_prepare(None, call, num_sets), call.length, slots, selection, "turn")

"""Put the ops in place of the attention calls.

Graph in: Dynamo's decode graph and the plan for its calls. Graph out: the same graph object, edited in place, where

    full    attention(...) -> tidal::full_attention(q, keys, values, length, mask, scale, sink, softcap)
    select                 -> tidal::select_attention(...)[0], and its [1] is the token set
    reuse                  -> tidal::sparse_attention(q, keys, values, token set, ...), less a mask that chose the set,
                              and with the set's rows in the order of the layer's head map

read the cache inputs directly; the nodes that nothing uses any more (`repeat_kv`, and what eager attention consists of)
are erased. In place, because a copy of the graph module loses what marks the cache as static, and CUDA graphs are
skipped; and never by `eliminate_dead_code`, which takes the cache writes (`index_copy_`, whose result nobody uses) for
dead.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from .forms import CASTS, target_name
from .match import AttentionSite
from .plan import Plan

VIEWS = ("expand", "reshape", "view", "transpose", "contiguous", "size", "getitem")
EAGER = ("matmul", "mul", "truediv", "itruediv", "tanh", "add", "cat", "max", "sub", "softmax", "dropout")
PURE = (*VIEWS, *EAGER, *CASTS)


def apply_plan(gm: fx.GraphModule, plan: Plan) -> int:
    """Rewrite every call that has a role; returns how many."""
    token_sets: dict[Source, TokenSet] = {}
    for decision in plan.decisions:
        if decision.role is not None:
            _replace(gm, decision.call, decision.role, token_sets)
    gm.graph.lint()
    gm.recompile()
    return plan.rewritten


Source = tuple[int, tuple[int, ...] | None]  # a selection, and the head map under which its tokens are used


@dataclass(frozen=True)
class TokenSet:
    """The tokens that a selection chose, and the mask under which it did."""

    index: fx.Node
    mask: fx.Node | None


def _replace(gm: fx.GraphModule, site: AttentionSite, role, token_sets: dict[Source, TokenSet]) -> None:
    ops = torch.ops.tidal
    cache = (site.query, site.key, site.value)
    mask = _unexpanded(site.mask)
    if role.role == "reuse" and mask is token_sets[role.source, None].mask and _is_bool(mask):
        mask = None  # it hides none of the tokens that were chosen under it
    rest, last = (site.length, mask, site.scale), (site.sink, site.softcap)
    with gm.graph.inserting_before(site.node):
        if role.role == "full":
            out = insert_call(gm, site.node, ops.full_attention.default, (*cache, *rest, *last))
        elif role.role == "select":
            settings = (role.budget, role.ratio, role.sinks, role.recent, role.share)
            both = insert_call(gm, site.node, ops.select_attention.default, (*cache, *rest, *settings, *last))
            out = insert_call(gm, site.node, operator.getitem, (both, 0))
            token_sets[site.layer, None] = TokenSet(insert_call(gm, site.node, operator.getitem, (both, 1)), mask)
        else:
            if (role.source, role.heads) not in token_sets:
                token_sets[role.source, role.heads] = _mapped(gm, site.node, token_sets[role.source, None], role.heads)
            index = token_sets[role.source, role.heads].index
            out = insert_call(gm, site.node, ops.sparse_attention.default, (*cache, index, *rest, *last))
    site.node.replace_all_uses_with(out)
    _erase_unused(gm, site.node)


def _mapped(gm: fx.GraphModule, replaced: fx.Node, tokens: TokenSet, heads: tuple[int, ...]) -> TokenSet:
    """The same set with row heads[h] in row h. Slices, not an index: that would be a constant on the CPU."""
    rows = [insert_call(gm, replaced, torch.select, (tokens.index, 1, head)) for head in heads]
    return TokenSet(insert_call(gm, replaced, torch.stack, (rows, 1)), tokens.mask)


def _unexpanded(mask: fx.Node | None) -> fx.Node | None:
    """A mask `[B or 1, 1, 1, S]` before it was expanded: Inductor would write the expanded one anew for every call."""
    while mask is not None and mask.op == "call_method" and mask.target == "expand":
        before = mask.args[0].meta["example_value"].shape
        if len(before) != 4 or before[1:] != mask.meta["example_value"].shape[1:]:
            break
        mask = mask.args[0]
    return mask


def _is_bool(mask: fx.Node | None) -> bool:
    return mask is not None and mask.meta["example_value"].dtype == torch.bool


def insert_call(gm: fx.GraphModule, replaced: fx.Node, target, args: tuple) -> fx.Node:
    """Insert a call with the metadata of the node that it replaces, and the fake value that it returns."""
    node = gm.graph.call_function(target, args)
    node.meta.update({key: value for key, value in replaced.meta.items() if key != "example_value"})
    values = fx.node.map_arg(args, lambda arg: arg.meta["example_value"])
    with replaced.meta["example_value"].fake_mode:
        node.meta["example_value"] = target(*values)
    return node


def _erase_unused(gm: fx.GraphModule, call: fx.Node) -> None:
    """Erase a replaced call, then what only it used, as far as that has no effect. Never an input or a write."""
    orphans = [call]
    while orphans:
        node = orphans.pop()
        inputs = node.all_input_nodes
        gm.graph.erase_node(node)
        for before in inputs:
            if target_name(before) in PURE and not before.users and before not in orphans:
                orphans.append(before)

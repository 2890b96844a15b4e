"""Put the ops in place of the attention calls.

Graph in: Dynamo's decode graph and the plan for its calls. Graph out: the same graph object, edited in place, where

    full    attention(...) -> tidal::full_attention(q, keys, values, length, mask, scale, sink, softcap)
    select                 -> tidal::select_attention(...)[0], and its [1] is the token set
    reuse                  -> tidal::sparse_attention(q, keys, values, token set, ...)

read the cache inputs directly; the nodes that nothing uses any more (`repeat_kv`, and what eager attention consists of)
are erased. In place, because a copy of the graph module loses what marks the cache as static, and CUDA graphs are
skipped; and never by `eliminate_dead_code`, which takes the cache writes (`index_copy_`, whose result nobody uses) for
dead.
"""

import operator

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
    token_sets: dict[int, fx.Node] = {}
    for decision in plan.decisions:
        if decision.role is not None:
            _replace(gm, decision.call, decision.role, token_sets)
    gm.graph.lint()
    gm.recompile()
    return plan.rewritten


def _replace(gm: fx.GraphModule, site: AttentionSite, role, token_sets: dict[int, fx.Node]) -> None:
    ops = torch.ops.tidal
    cache = (site.query, site.key, site.value)
    rest, last = (site.length, site.mask, site.scale), (site.sink, site.softcap)
    with gm.graph.inserting_before(site.node):
        if role.role == "full":
            out = _call(gm, site, ops.full_attention.default, (*cache, *rest, *last))
        elif role.role == "select":
            settings = (role.budget, role.ratio, role.sinks, role.recent, role.share)
            both = _call(gm, site, ops.select_attention.default, (*cache, *rest, *settings, *last))
            out = _call(gm, site, operator.getitem, (both, 0))
            token_sets[site.layer] = _call(gm, site, operator.getitem, (both, 1))
        else:
            out = _call(gm, site, ops.sparse_attention.default, (*cache, token_sets[role.source], *rest, *last))
    site.node.replace_all_uses_with(out)
    _erase_unused(gm, site.node)


def _call(gm: fx.GraphModule, site: AttentionSite, target, args: tuple) -> fx.Node:
    """Insert a call with the metadata of the node that it replaces, and the fake value that it returns."""
    node = gm.graph.call_function(target, args)
    node.meta.update({key: value for key, value in site.node.meta.items() if key != "example_value"})
    values = fx.node.map_arg(args, lambda arg: arg.meta["example_value"])
    with site.node.meta["example_value"].fake_mode:
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

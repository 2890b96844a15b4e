"""Put the ops in place of the attention calls.

Graph in: Dynamo's decode graph and the plan for its calls. Graph out: the same graph object, edited in place, where

    full    scaled_dot_product_attention(...) -> tidal::full_attention(q, keys, values, length, mask, scale)
    select                                    -> tidal::select_attention(...)[0], and its [1] is the token set
    reuse                                     -> tidal::sparse_attention(q, keys, values, token set, ...)

read the cache inputs directly; the `repeat_kv` nodes that nothing uses any more are erased. In place, because a copy of
the graph module loses what marks the cache as static, and CUDA graphs are skipped; and never by `eliminate_dead_code`,
which takes the cache writes (`index_copy_`, whose result nobody uses) for dead.
"""

import operator

import torch
from torch import fx

from .match import AttentionSite
from .plan import Plan


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
    rest = (site.length, site.mask, site.scale)
    with gm.graph.inserting_before(site.node):
        if role.role == "full":
            out = _call(gm, site, ops.full_attention.default, (*cache, *rest))
        elif role.role == "select":
            settings = (role.budget, role.ratio, role.sinks, role.recent, role.share)
            both = _call(gm, site, ops.select_attention.default, (*cache, *rest, *settings))
            out = _call(gm, site, operator.getitem, (both, 0))
            token_sets[site.layer] = _call(gm, site, operator.getitem, (both, 1))
        else:
            out = _call(gm, site, ops.sparse_attention.default, (*cache, token_sets[role.source], *rest))
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
    """Erase a replaced call, then the views before it that only it used. Never an input or a write."""
    views = ("expand", "reshape", "size")
    orphans = [call]
    while orphans:
        node = orphans.pop()
        inputs = node.all_input_nodes
        gm.graph.erase_node(node)
        for before in inputs:
            is_view = before.target is operator.getitem or (before.op == "call_method" and before.target in views)
            if is_view and not before.users and before not in orphans:
                orphans.append(before)

"""Put the ops in place of the attention calls.

Graph in: Dynamo's decode graph and the plan for its calls. Graph out: the same graph object, edited in place, where
what `roles.follow` makes of each call, such as

    full    attention(...) -> tidal::full_attention(call)
    select                 -> tidal::select_attention(call, selection)[0], and its [1] is the token set
    reuse                  -> tidal::sparse_attention(call, token set)

reads the cache inputs directly; the nodes that nothing uses any more (`repeat_kv`, and what eager attention consists
of) are erased. In place, because a copy of the graph module loses what marks the cache as static, and CUDA graphs are
skipped; and never by `eliminate_dead_code`, which takes the cache writes (`index_copy_`, whose result nobody uses) for
dead.
"""

import torch
from torch import fx

from .forms import CASTS, target_name
from .plan import Plan
from .roles import Sets, follow
from .state import KeptInput, add_inputs

VIEWS = ("expand", "reshape", "view", "transpose", "contiguous", "size", "getitem")
EAGER = ("matmul", "mul", "truediv", "itruediv", "tanh", "add", "cat", "max", "sub", "softmax", "dropout")
PURE = (*VIEWS, *EAGER, *CASTS)


def apply_plan(gm: fx.GraphModule, plan: Plan) -> list[KeptInput]:
    """Rewrite every call that has a role; returns the inputs that were added for what methods keep."""
    sets: Sets = {}
    added: list[KeptInput] = []
    for decision in plan.decisions:
        if decision.role is None:
            continue
        replaced = decision.call.node

        def insert(op, *args, replaced=replaced):
            target = getattr(torch.ops.tidal, op).default if isinstance(op, str) else op
            return insert_call(gm, replaced, target, args)

        kept: tuple[fx.Node, ...] = ()
        if decision.role.keeps:
            added.append(add_inputs(gm, decision.call.call, decision.role.selection, decision.role.method))
            kept = added[-1].nodes
        with gm.graph.inserting_before(replaced):
            out = follow(decision.role, decision.call.call, sets, insert, kept, decision.call.ranks)
        replaced.replace_all_uses_with(out)
        _erase_unused(gm, replaced)
    gm.graph.lint()
    gm.recompile()
    return added


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

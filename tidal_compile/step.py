"""The decode step that is deployed, without compiling it: for evaluations, which try one policy after another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .kernels import ops as _ops  # noqa: F401  registers the ops that `apply_plan` inserts
from .passes.compat import note_cache_layers
from .passes.match import find_attention
from .passes.plan import make_plan
from .passes.rewrite import apply_plan
from .passes.roles import LayerRole
from .passes.state import around


class PolicyStep:
    """`step(roles, **inputs)`: one decode step of a model under the roles of any policy.

    Dynamo traces the step once for each shape of its inputs. For each policy, a copy of that graph is rewritten as
    `backend="tidal"` rewrites it, and run op by op: twenty policies cost one trace and no compilation.
    """

    def __init__(self, model: PreTrainedModel):
        self._roles: tuple[LayerRole, ...] = ()
        # A reset elsewhere drops the traced graphs; the next step traces again
        self._step = torch.compile(model.forward, backend=self._follow, fullgraph=True, dynamic=False)

    def __call__(self, roles: Sequence[LayerRole], **inputs: Any) -> Any:
        """The model's output. Raises `UnsupportedModelError` where its graph can't follow the roles."""
        self._roles = tuple(roles)
        with torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20):
            return self._step(**inputs)

    def _follow(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable:
        """The function for a graph that Dynamo traced: it looks up, or makes, the graph for the roles of now."""
        note_cache_layers(gm)
        traced = _copied(gm)  # Dynamo empties its own
        rewritten: dict[tuple[LayerRole, ...], Callable] = {}

        def run(*inputs: Any) -> Any:
            if self._roles not in rewritten:
                rewritten[self._roles] = _rewritten(traced, self._roles)
            return rewritten[self._roles](*inputs)

        return run


def _rewritten(gm: fx.GraphModule, roles: tuple[LayerRole, ...]) -> Callable:
    graph = _copied(gm)
    plan = make_plan(find_attention(graph), roles)
    if plan.problems:
        raise UnsupportedModelError(f"the model's graph can't follow the policy: {'; '.join(plan.problems)}")
    return around(apply_plan(graph, plan), graph)


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same parameters, with what the passes read of a node: its metadata and its source."""
    copy, nodes = fx.Graph(), {}
    output = copy.graph_copy(gm.graph, nodes)
    copy.output(output)
    for before, after in nodes.items():
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    return fx.GraphModule(gm, copy)

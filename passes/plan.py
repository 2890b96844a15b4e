"""Decide what each attention call becomes: the policy's roles, laid over the calls that the graph has.

In: the calls that `match` found and the policy's role for each layer. Out: a `Decision` for each call, in graph order,
and the reasons why the graph can't follow the policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .match import AttentionSite, Unmatched
from .roles import LayerRole, asks_all_ranks


@dataclass(frozen=True)
class Decision:
    """One attention call: its role, or None and the reason why it stays as it is."""

    layer: int | None
    call: AttentionSite | Unmatched
    role: LayerRole | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """All decisions, and the `problems`: layers for which the policy asks what the graph can't give."""

    decisions: tuple[Decision, ...]
    problems: tuple[str, ...]

    @property
    def rewritten(self) -> int:
        """How many calls will be replaced."""
        return sum(decision.role is not None for decision in self.decisions)


def make_plan(calls: Sequence[AttentionSite | Unmatched], roles: Sequence[LayerRole]) -> Plan:
    """Give every call its role. A layer that can't follow stays exact, and so do the layers that reuse its tokens.

    Several query tokens at once get attention to everything where a method chooses for one at a time.
    """
    decisions: list[Decision] = []
    problems: list[str] = []
    selected: dict[int, AttentionSite | None] = {}  # None: a selection that is left alone
    for call in calls:
        layer = call.layer
        role = roles[layer] if layer is not None and layer < len(roles) else None
        reason = call.reason if isinstance(call, Unmatched) else ""
        if isinstance(call, AttentionSite):
            if role is not None and call.num_tokens > 1 and role.role != "full" and not role.method.several:
                role = LayerRole(role.layer, "full")
            reason = _cannot_follow(call, role, selected)
        if role is not None and role.role == "select":
            selected[layer] = None if reason else call
        if reason:
            several_tokens = isinstance(call, Unmatched) and call.kind == "tokens"
            if role is not None and role.role != "full" and not several_tokens:
                problems.append(f"layer {layer} ({role.role}): {reason}")
            role = None
        elif role.heads == tuple(range(len(role.heads or ()))):
            role = replace(role, heads=None)  # each head its own: nothing to map
        decisions.append(Decision(layer, call, role, reason))
    problems += _missing(decisions, roles)
    return Plan(tuple(decisions), tuple(problems))


def _cannot_follow(call: AttentionSite, role: LayerRole, selected: dict[int, AttentionSite | None]) -> str:
    """Why a call can't have its role, or nothing."""
    together = role.role == "select" and call.ranks is not None and asks_all_ranks(role)
    if together and role.by != "scores" and not role.method.weighs:
        return (
            f"share: layer, by: {role.describe_method()}, but its heads are divided among ranks; use share: kv_head, "
            "by: scores, or by: pages without keep"
        )
    if role.keeps and role.method.prepares and call.call.scales is not None:
        return "place: cpu reads no cache in float8; use a HostCache, or place: gpu"
    if role.role != "reuse":
        return ""
    if role.source not in selected:
        return f"its selection, layer {role.source}, is not in this graph (compile with fullgraph=True)"
    source = selected[role.source]
    if source is None:
        return f"its selection, layer {role.source}, is left alone"
    for name, dim in (("batch", 0), ("kv heads", 1), ("cache slots", 2)):
        here, there = (site.call.key.meta["example_value"].shape[dim] for site in (call, source))
        if here != there and not (name == "kv heads" and role.selection.share == "layer"):
            return f"{here} {name}, but its selection, layer {role.source}, has {there}"
    kv_heads = call.num_kv_heads * (1 if call.ranks is None else call.ranks.size)
    if role.heads is not None and (len(role.heads) != kv_heads or max(role.heads) >= kv_heads):
        return f"heads {list(role.heads)} must name, for each of its {kv_heads} kv heads, one from 0 to {kv_heads - 1}"
    if role.selection.share == "query_head" and call.num_heads != source.num_heads:
        return f"{call.num_heads} query heads, but its selection, layer {role.source}, has {source.num_heads}"
    return ""


def _missing(decisions: list[Decision], roles: Sequence[LayerRole]) -> list[str]:
    """Layers with a sparse role and no attention call in the graph."""
    present = {decision.layer for decision in decisions}
    return [
        f"layer {role.layer} ({role.role}): no attention call of this layer in the graph"
        for role in roles
        if role.role != "full" and role.layer not in present
    ]


def kv_share(plan: Plan, length: int) -> float:
    """The share of the cached tokens that one decode step reads at `length` live tokens, over the layers of the plan.

    Dense is 1. See `LayerRole.tokens_read`.
    """
    read = []
    for decision in plan.decisions:
        if decision.role is not None:
            key, group = (
                decision.call.call.key.meta["example_value"],
                decision.call.num_heads // decision.call.num_kv_heads,
            )
            read.append(decision.role.tokens_read(length, group, key.shape[3] * key.itemsize))
    return sum(read) / (len(read) * length) if read else 1.0

"""`explain`: what a policy does to a model, call by call, from its traced decode graph. No kernel runs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .backend import Options, lay_over
from .errors import TidalError, UnsupportedModelError
from .models import empty_cache, with_cache
from .passes.match import AttentionSite, Unmatched, count_layers, find_attention
from .passes.plan import Decision
from .policy import Policy

CACHE_SLOTS = 64  # of the cache that the graph is traced with: small, as nothing is ever stored in it


@dataclass(frozen=True)
class Row:
    """One attention call. `role` is None where the call is left alone, and `reason` says why; `heads`: its head map.

    `by`: the method by which its tokens are chosen, with its keys; `output`: what it returns, `full` or `sparse`
    attention. `kept_bytes`: what the method keeps beside the cache, in bytes for each slot of a sequence.
    """

    layer: int | None
    role: str | None
    source: int | None
    budget: str
    share: str
    kv_heads: int | None
    reason: str
    heads: tuple[int, ...] | None = None
    by: str = ""
    output: str = ""
    kept_bytes: float = 0.0


@dataclass(frozen=True)
class Explanation:
    """What a policy does to a model: one row an attention call, and the layers where it asks what can't be done."""

    policy: Policy
    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "policy": self.policy.name,
            "calls": [asdict(row) for row in self.rows],
            "problems": list(self.problems),
        }

    def __str__(self) -> str:
        from .report import explanation_text

        return explanation_text(self)


def explain(model: PreTrainedModel, policy: Policy | dict | str | Path, **overrides: Any) -> Explanation:
    """Match a model's decode step against a policy, without running it.

    `model` is a Hugging Face decoder on any device, `meta` included; `policy` any form that the backend takes, and
    `overrides` its defaults. Raises `PolicyError` if the policy doesn't fit, `UnsupportedModelError` if the decode
    step can't be traced as one graph, and `TidalError` for what is no model.
    """
    options = Options.parse({"policy": policy, **overrides})
    calls, num_layers = decode_calls(model)
    found, plan = lay_over(calls, num_layers, options)
    return Explanation(found, tuple(_row(decision) for decision in plan.decisions), plan.problems)


def _row(decision: Decision) -> Row:
    role, call = decision.role, decision.call
    kv_heads = call.num_kv_heads if isinstance(call, AttentionSite) else None
    if role is None:
        return Row(decision.layer, None, None, "", "", kv_heads, decision.reason)
    if role.role == "full":
        return Row(decision.layer, "full", None, "all", "", kv_heads, "", output="full")
    selection = role.selection
    budget = f"max({selection.budget}, {selection.ratio:g} x live)" if selection.ratio else str(selection.budget)
    share = selection.share + ("" if selection.pool == "sum" else f", {selection.pool}")
    if role.method.attends:
        budget, share = "sampled", "query_head"
    return Row(
        decision.layer, role.role, role.source, budget, share, kv_heads, "", role.heads, role.describe_method(),
        role.output, _kept_bytes(decision),
    )  # fmt: skip


def _kept_bytes(decision: Decision) -> float:
    """What a selection's method keeps beside its cache, in bytes for each slot of a sequence."""
    if not decision.role.keeps:
        return 0.0
    key, slots = decision.call.call.key.meta["example_value"], 8192
    sizes = []
    for size in (slots, 2 * slots):
        empty = torch.empty(1, key.shape[1], size, key.shape[3], dtype=key.dtype, device="meta")
        sizes.append(sum(tensor.nbytes for tensor in decision.role.method.summarize(empty)))
    return (sizes[1] - sizes[0]) / slots


def decode_calls(model: PreTrainedModel) -> tuple[list[AttentionSite | Unmatched], int]:
    """The attention calls of one decode step, and the model's number of layers. Dynamo traces, nothing is compiled."""
    captured = []

    def stop_here(gm: torch.fx.GraphModule, example_inputs: list) -> None:
        captured.append((find_attention(gm), count_layers(gm)))
        raise _Traced

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):  # PEFT's are no PreTrainedModel
        raise TidalError(
            f"a loaded Hugging Face decoder is needed, found {type(model).__name__} {str(model)[:40]!r}; "
            "tidal_compile.models.load_model loads one by its name"
        )
    cache = empty_cache(model, CACHE_SLOTS)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    # Some models count their tokens by the mask (OPT); others branch on what it says, which can't be traced (Jamba)
    masked = {"attention_mask": token.new_ones(1, CACHE_SLOTS), "position_ids": token}
    problems = []
    for mask in ({}, masked):
        try:
            with torch.no_grad():
                torch.compile(model, backend=stop_here, fullgraph=True)(
                    input_ids=token, **with_cache(model, cache), **mask
                )
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Traced):
                raise
        except torch._dynamo.exc.TorchDynamoException as error:
            problems.append(error)
        if captured:
            return captured[0]
    if problems:
        said = str(problems[0]).partition("\n\n")[0]
        raise UnsupportedModelError(f"the decode step can't be traced as one graph: {said}") from problems[0]
    raise UnsupportedModelError("Dynamo traced no graph (is TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE set?)")


class _Traced(Exception):
    """Raised by the tracing backend in place of a compiled graph, so that nothing is installed or run."""

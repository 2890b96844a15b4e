"""The `torch.compile` backend: policy + graph -> calls -> plan -> rewritten graph -> Inductor.

Registered by the entry point in pyproject.toml alone: `torch.compile(model, backend="tidal")` finds it unimported.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._inductor
from torch import fx

from .errors import TidalError, UnsupportedModelError
from .kernels import ops as _ops  # noqa: F401  registers the ops that `rewrite` inserts
from .passes.counters import COUNTER, take_out_counters
from .passes.linears import join_linears
from .passes.match import AttentionSite, Unmatched, count_layers, find_attention, policy_layers
from .passes.plan import Plan, make_plan
from .passes.rewrite import apply_plan
from .policy import Defaults, Policy, is_preset, load_any, resolve

if TYPE_CHECKING:
    from transformers import CompileConfig

log = logging.getLogger(__name__)

# A sliding-window layer counts tokens in a Python int, for which Dynamo would compile anew at every value
_sources = (torch.compiler.config.dynamic_sources, rf".*\{COUNTER}$")
torch.compiler.config.dynamic_sources = ",".join(filter(None, _sources))

OWN_OPTIONS = ("policy", "strict", "cuda_graphs", "linears", "inductor")


@dataclass(frozen=True)
class Options:
    """The options of `torch.compile(..., backend="tidal", options={...})`, checked.

    A policy file is read when a graph is compiled; torch.compile does not notice that the file changed afterwards.
    """

    policy: Any
    strict: bool = True
    cuda_graphs: bool | None = None  # None: on a CUDA device
    linears: bool | None = None  # through our own kernel, for up to 16 sequences; None: on a CUDA device
    inductor: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)  # of the policy's defaults

    @classmethod
    def parse(cls, options: dict[str, Any]) -> "Options":
        """Raises `TidalError` for an unknown option or a value of the wrong type."""
        known = (*OWN_OPTIONS, *Defaults.model_fields)
        for name in options:
            if name not in known:
                raise TidalError(f"unknown option {name!r} for backend 'tidal'; valid options are: {', '.join(known)}")
        own = {name: options[name] for name in OWN_OPTIONS if name in options}
        for name, kind, valid in (
            ("strict", bool, "true or false"),
            ("cuda_graphs", bool | None, "true, false or none"),
            ("linears", bool | None, "true, false or none"),
            ("inductor", dict, "a mapping of Inductor settings"),
        ):
            if name in own and not isinstance(own[name], kind):
                raise TidalError(f"option {name!r} must be {valid}, found {own[name]!r}")
        unknown = sorted(set(own.get("inductor", {})) - set(torch._inductor.list_options()))
        if unknown:
            raise TidalError(
                f"option 'inductor': no Inductor setting {unknown[0]!r}; see torch._inductor.list_options()"
            )
        if not is_preset(own.setdefault("policy", "full")):
            load_any(own["policy"])  # a bad file is an error now, not at the first decode step
        return cls(**own, overrides={name: options[name] for name in Defaults.model_fields if name in options})


def tidal(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable:
    """Compile one graph that Dynamo captured: follow the policy in decode steps, leave all else to Inductor.

    Raises `PolicyError` for a policy that doesn't fit the model and, if strict, `UnsupportedModelError` where the graph
    can't give what it asks for.
    """
    from torch._inductor.compile_fx import compile_fx

    parsed = Options.parse(options or {})
    plan = plan_graph(gm, parsed)
    if plan is not None:
        log.info("tidal: %d attention calls, %d rewritten", len(plan.decisions), apply_plan(gm, plan))

    decodes_on_cuda = plan is not None and any(getattr(value, "is_cuda", False) for value in example_inputs)
    if plan is not None and (decodes_on_cuda if parsed.linears is None else parsed.linears):
        log.info("tidal: %d linear layers joined", join_linears(gm))

    # A prefill would record another CUDA graph for every prompt length
    settings = {"triton.cudagraphs": decodes_on_cuda if parsed.cuda_graphs is None else parsed.cuda_graphs}
    if decodes_on_cuda:
        settings["combo_kernels"] = True  # a decode step is full of small kernels that can share a launch
    settings |= torch._inductor.list_mode_options(mode or "default") | parsed.inductor
    counters = take_out_counters(gm) if plan is not None else None
    if counters is None:
        return compile_fx(gm, example_inputs, config_patches=settings)
    return counters.around(compile_fx(gm, counters.as_tensors(example_inputs), config_patches=settings))


def plan_graph(gm: fx.GraphModule, options: Options) -> Plan | None:
    """The plan for a decode step, even if it changes nothing; None for other graphs. Raises, or warns if not strict."""
    calls = find_attention(gm)
    if not calls:
        _refuse(options, "no attention call of the graph can be rewritten: it has none (compile with fullgraph=True)")
        return None
    if all(isinstance(call, Unmatched) and call.kind == "tokens" for call in calls):
        return None
    policy, plan = lay_over(calls, count_layers(gm), options)
    if plan.problems:
        _refuse(options, f"the model's graph can't follow policy {policy.name!r}: {'; '.join(plan.problems)}")
    asks_for_more = is_preset(options.policy) and options.policy != "full"
    if not plan.rewritten:
        reasons = "; ".join(dict.fromkeys(decision.reason for decision in plan.decisions))
        if asks_for_more or any(call.kind == "unsupported" for call in calls):
            _refuse(options, f"no attention call of the graph can be rewritten: {reasons}")
        return plan
    if asks_for_more and not any(role.role == "reuse" for role in policy.roles):
        found = len(policy_layers(calls))
        warnings.warn(f"tidal: preset {policy.name!r} is exact here: {found} full-attention layers", stacklevel=2)
    if torch.is_grad_enabled() and _wants_gradients(gm):
        raise UnsupportedModelError("a decode step has no gradient: call it under torch.no_grad() or inference_mode()")
    return plan


def lay_over(calls: list[AttentionSite | Unmatched], num_layers: int, options: Options) -> tuple[Policy, Plan]:
    """The policy that the options mean for a model with these attention calls, and the plan that follows."""
    layers = policy_layers(calls)
    policy = resolve(options.policy, num_layers, attention_layers=layers, **options.overrides)
    return policy, make_plan(calls, policy.roles)


def followed(calls: list[AttentionSite | Unmatched], num_layers: int, options: Options) -> tuple[Policy, Plan]:
    """`lay_over` that raises `UnsupportedModelError` where the model can't follow the policy."""
    policy, plan = lay_over(calls, num_layers, options)
    if plan.problems:
        raise UnsupportedModelError(f"the model can't follow policy {options.policy!r}: {'; '.join(plan.problems)}")
    return policy, plan


def _wants_gradients(gm: fx.GraphModule) -> bool:
    inputs = (node.meta.get("example_value") for node in gm.graph.nodes if node.op == "placeholder")
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs)


def _refuse(options: Options, problem: str) -> None:
    if options.strict:
        raise UnsupportedModelError(f"{problem} (strict=False leaves such layers exact)")
    warnings.warn(f"tidal: {problem}; left exact", stacklevel=2)


def compile_config(policy: Policy | dict | str | Path = "full", **options: Any) -> "CompileConfig":
    """The `compile_config` for `model.generate(..., cache_implementation="static")`; `options` are the backend's.

    Takes effect on a CPU as well, where `generate` by itself never compiles; but `generate` ignores it without a static
    cache, and in beam search. A policy file is read now. Raises `PolicyError` and `TidalError`.
    """
    from transformers import CompileConfig

    Options.parse({"policy": policy, **options})
    plain = policy if is_preset(policy) else load_any(policy).to_dict()  # generate prints its configuration as JSON
    options = {"policy": plain, **options}
    # mode=None: torch.compile takes a mode or options, and CompileConfig's default is a mode
    config = CompileConfig(backend="tidal", mode=None, fullgraph=True, options=options)
    config._compile_all_devices = True
    return config

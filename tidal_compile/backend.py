"""The `torch.compile` backend: policy + graph -> calls -> plan -> rewritten graph -> Inductor.

Registered by the entry point in pyproject.toml alone: `torch.compile(model, backend="tidal")` finds it unimported.
"""

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import tensorrt
from .errors import TidalError, UnsupportedModelError
from .kernels import ops as _ops  # noqa: F401  registers the ops that `rewrite` inserts
from .kernels.methods import METHODS
from .passes import compat
from .passes.compat import ShortenTraceback
from .passes.counters import COUNTER, take_out_counters, unknown_arithmetic
from .passes.linears import join_linears
from .passes.match import AttentionSite, Unmatched, count_layers, find_attention, policy_layers, rank_group
from .passes.plan import Plan, make_plan
from .passes.regions import Compiler, Region, take_out_regions
from .passes.rewrite import apply_plan
from .passes.state import around, examples, take_out_inputs
from .policy import Defaults, Policy, is_preset, load_any, resolve

if TYPE_CHECKING:
    from transformers import CompileConfig

log = logging.getLogger(__name__)

# A sliding-window layer counts tokens in a Python int, for which Dynamo would compile anew at every value
_sources = (torch.compiler.config.dynamic_sources, rf".*\{COUNTER}$")
torch.compiler.config.dynamic_sources = ",".join(filter(None, _sources))

# With output_attentions=True it warns, which Dynamo would refuse in its own words before `refuse_output_attentions` can
compat.ignore_warning_of_attention_weights()

DENSE_COMPILERS = ("inductor", "tensorrt")
OWN_OPTIONS = ("policy", "strict", "cuda_graphs", "linears", "dense_compiler", "inductor")


@dataclass(frozen=True)
class Options:
    """The options of `torch.compile(..., backend="tidal", options={...})`, checked.

    A policy file is read when a graph is compiled; torch.compile does not notice that the file changed afterwards.
    """

    policy: Any
    strict: bool = True
    cuda_graphs: bool | None = None  # None: on a CUDA device
    linears: bool | None = None  # through our own kernel, for up to 16 sequences; None: on a CUDA device
    dense_compiler: str | Compiler = "inductor"  # of what stands between our ops and the writes to the cache
    inductor: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)  # of the policy's defaults

    @classmethod
    def parse(cls, options: dict[str, Any]) -> "Options":
        """Raises `TidalError` for an unknown option or a value of the wrong type."""
        of_methods = dict.fromkeys(field.name for kind in METHODS.values() for field in fields(kind))
        of_policies = (*Defaults.model_fields, *of_methods)
        known = (*OWN_OPTIONS, *of_policies)
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
        dense = own.get("dense_compiler", "inductor")
        if not callable(dense) and dense not in DENSE_COMPILERS:
            raise TidalError(
                f"option 'dense_compiler' must be one of {', '.join(DENSE_COMPILERS)}, or a function of a graph module "
                f"and its inputs that returns one of such inputs; found {dense!r}"
            )
        if dense == "tensorrt":
            tensorrt.check()
        unknown = sorted(set(own.get("inductor", {})) - set(compat.list_options()))
        if unknown:
            raise TidalError(
                f"option 'inductor': no Inductor setting {unknown[0]!r}; see torch._inductor.list_options()"
            )
        overrides = {name: options[name] for name in of_policies if name in options}
        # What is wrong with a policy is an error now, not at the first decode step
        if is_preset(own.setdefault("policy", "full")):
            Policy.preset(own["policy"], 32, **overrides)
        else:
            load_any(own["policy"]).with_defaults(**overrides)
        return cls(**own, overrides=overrides)


def past_dynamo(backend: Callable) -> Callable:
    """A backend whose `TidalError`s reach the caller: Dynamo hands on a `ShortenTraceback`, and wraps all else."""

    @functools.wraps(backend)
    def compile_graph(*args: Any, **kwargs: Any) -> Callable:
        try:
            return backend(*args, **kwargs)
        except TidalError as error:
            raise _as_dynamos(type(error))(error.message, inspect.currentframe()) from None

    return compile_graph


@functools.cache
def _as_dynamos(kind: type[TidalError]) -> type[TidalError]:
    """A subclass of an error of ours that Dynamo takes for one of its own; it keeps the name."""

    def init(self: Any, message: str, frame: Any = None) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=frame)  # Dynamo drops the frames before
        self.message = message

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, ShortenTraceback), {"__init__": init, **names})


@past_dynamo
def tidal(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable:
    """Compile one graph that Dynamo captured: follow the policy in decode steps, leave all else to Inductor.

    Raises `PolicyError` for a policy that doesn't fit the model and, if strict, `UnsupportedModelError` where the graph
    can't give what it asks for.
    """
    from torch._inductor.compile_fx import compile_fx

    parsed = Options.parse(options or {})
    make_room(options or {})
    if parsed.strict:
        refuse_output_attentions()
    plan = plan_graph(gm, parsed)
    kept = []
    if plan is not None:
        log.info("tidal: %d attention calls, %d rewritten", len(plan.decisions), plan.rewritten)
        kept = apply_plan(gm, plan)

    decodes_on_cuda = plan is not None and any(getattr(value, "is_cuda", False) for value in example_inputs)
    inputs, regions = [*example_inputs, *examples(kept)], []
    if plan is not None and parsed.dense_compiler != "inductor":
        compiler = tensorrt.compile_region if parsed.dense_compiler == "tensorrt" else parsed.dense_compiler
        regions = take_out_regions(gm, inputs, compiler)
        log.info("tidal: %d regions compiled by %s", len(regions), parsed.dense_compiler)
    elif plan is not None and (decodes_on_cuda if parsed.linears is None else parsed.linears):
        log.info("tidal: %d linear layers joined", join_linears(gm))

    # A prefill would record another CUDA graph for every prompt length
    settings = {"triton.cudagraphs": decodes_on_cuda if parsed.cuda_graphs is None else parsed.cuda_graphs}
    if decodes_on_cuda:
        settings["combo_kernels"] = True  # a decode step is full of small kernels that can share a launch
    settings |= compat.list_mode_options(mode or "default") | parsed.inductor
    counters = take_out_counters(gm) if plan is not None else None
    if plan is not None and counters is None and (odd := unknown_arithmetic(gm)):
        settings["triton.cudagraphs"] = False
        warnings.warn(
            f"tidal: the model counts tokens of a sliding window in a way that is not known ({', '.join(odd)}); its "
            "steps run without CUDA graphs, which would be recorded anew for every token",
            stacklevel=2,
        )
    # In a CUDA graph, a kernel may begin while the one before it ends, as ours do (`overlap`)
    settings.setdefault("triton.enable_pdl", decodes_on_cuda and settings["triton.cudagraphs"])
    with compat.kernels_that_wait():
        compiled = compile_fx(gm, inputs if counters is None else counters.as_tensors(inputs), config_patches=settings)
    take_out_inputs(gm, kept)
    step = around(kept, compiled if counters is None else counters.around(compiled))
    return functools.partial(_with, regions, step) if regions else step


def _with(_: list[Region], step: Callable, *inputs: Any) -> Any:
    """The step; its graph knows its regions by their numbers, and they live as long as it does."""
    return step(*inputs)


_compiled: dict[tuple[int, str], int] = {}  # how often, by function as Dynamo numbers them, and options
_limit = {"users": torch._dynamo.config.recompile_limit, "set": torch._dynamo.config.recompile_limit}


def make_room(options: dict[str, Any]) -> None:
    """Let Dynamo compile a function for any number of policies, as often for each as its limit says.

    Dynamo keeps `recompile_limit` graphs of a function, by default 8, whatever options they were compiled with. Beyond
    it, the function runs uncompiled, that is densely, or with fullgraph=True fails without naming a reason. So the
    limit is kept one ahead of what this backend has compiled. Raises `TidalError` where one policy exceeds it.
    """
    config, here = torch._dynamo.config, compat.CompileContext.current_compile_id()
    if here is None or here.frame_id is None or here.frame_compile_id is None:  # the backend was called by hand
        return
    if config.recompile_limit != _limit["set"]:  # by somebody else
        _limit["users"] = config.recompile_limit
    if here.frame_compile_id == 0:  # a new function, or its number is given anew after torch._dynamo.reset()
        for key in [key for key in _compiled if key[0] == here.frame_id]:
            del _compiled[key]
    key = here.frame_id, repr(sorted(options.items()))
    _compiled[key] = _compiled.get(key, 0) + 1
    if _compiled[key] > _limit["users"]:
        raise TidalError(
            f"a function was compiled {_limit['users']} times under the same policy, and its inputs differ again: see "
            "TORCH_LOGS=recompiles, pass dynamic=True, or raise torch._dynamo.config.recompile_limit; "
            "torch._dynamo.reset() begins anew"
        )
    needed = here.frame_compile_id + 2  # for this graph, and for the next one
    config.recompile_limit = _limit["set"] = max(config.recompile_limit, needed)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, needed)


def refuse_output_attentions() -> None:
    """Raises `UnsupportedModelError` if the call that Dynamo traces asks for attention weights, which no op returns."""
    given = compat.traced_arguments() or {}
    if given.get("output_attentions") or (given.get("kwargs") or {}).get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions=True: a rewritten step returns no attention weights, and neither does "
            "attn_implementation='sdpa'; leave it out, or decode with set_attn_implementation('eager') uncompiled"
        )


def plan_graph(gm: fx.GraphModule, options: Options) -> Plan | None:
    """The plan for a decode step, even if it changes nothing; None for other graphs. Raises, or warns if not strict."""
    plan, problem = None, None
    try:
        plan = _plan(gm, options)
    except TidalError as error:
        problem = error
    if (group := rank_group(gm)) is not None:
        check_ranks(group, plan, problem)
    if problem is not None:
        raise problem
    return plan


def _plan(gm: fx.GraphModule, options: Options) -> Plan | None:
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
        if asks_for_more or any(isinstance(call, Unmatched) and call.kind == "unsupported" for call in calls):
            _refuse(options, f"no attention call of the graph can be rewritten: {reasons}")
        return plan
    if asks_for_more and not any(role.is_sparse for role in policy.roles):
        found = len(policy_layers(calls))
        warnings.warn(f"tidal: preset {policy.name!r} is exact here: {found} full-attention layers", stacklevel=2)
    if torch.is_grad_enabled() and _wants_gradients(gm):
        raise UnsupportedModelError("a decode step has no gradient: call it under torch.no_grad() or inference_mode()")
    return plan


def check_ranks(group: str, plan: Plan | None, problem: TidalError | None) -> None:
    """Raise `TidalError` where the ranks of a tensor-parallel model don't compile the same step: they would wait for
    each other, or for nobody. A `problem` of one is told to all.
    """
    decisions = () if plan is None else plan.decisions
    roles = "; ".join(str(decision.role) for decision in decisions)
    sites = [decision.call for decision in decisions if isinstance(decision.call, AttentionSite)]
    keys = [site.call.key.meta["example_value"] for site in sites]
    slots = {
        site.layer: f"{tuple(key.shape)} {key.dtype}, {site.num_tokens}" for site, key in zip(sites, keys, strict=True)
    }
    said = compat.told_by_all(group, (None if problem is None else problem.message, roles, slots))
    for rank, (message, its_roles, its_slots) in enumerate(said):
        if message is not None:
            raise problem or TidalError(f"rank {rank}: {message}")
        if its_slots != said[0][2]:
            layer = next(
                layer for layer in {**said[0][2], **its_slots} if said[0][2].get(layer) != its_slots.get(layer)
            )
            raise TidalError(
                f"the ranks' caches differ: keys and query tokens of layer {layer} are {said[0][2].get(layer)} on rank "
                f"0, and {its_slots.get(layer)} on rank {rank}"
            )
        if its_roles != said[0][1]:
            raise TidalError(f"the ranks' policies differ: that of rank {rank} is not that of rank 0; give all one")


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
    return compat.compile_on_every_device(CompileConfig(backend="tidal", mode=None, fullgraph=True, options=options))

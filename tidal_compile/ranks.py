"""Tensor parallelism through transformers and `torch.distributed`: what one rank has to know of the others.

transformers divides the heads of each layer among ranks, and sums what they make of it. Each rank runs the whole
program, and compiles a step over its own heads. What is chosen by the heads of all ranks is exchanged inside the graph:
see `passes/roles.py`. Here is what concerns the loop around it.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from .errors import TidalError


def group_of(model: PreTrainedModel) -> Any | None:
    """The process group of the ranks that share a model's heads; None for a model that is whole."""
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None)
    if mesh is None or (size or 1) == 1:
        return None
    return mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_group()


def share_random_state(model: PreTrainedModel) -> None:
    """Let all ranks draw the same random numbers: those of the first. Else they would go on with tokens that differ."""
    group = group_of(model)
    if group is None:
        return
    on_gpu = model.device.type == "cuda"
    states = [torch.cuda.get_rng_state(model.device) if on_gpu else torch.get_rng_state()]
    first = distributed.get_global_rank(group, 0)
    distributed.broadcast_object_list(states, src=first, group=group, device=model.device)
    if on_gpu:
        torch.cuda.set_rng_state(states[0], model.device)
    else:
        torch.set_rng_state(states[0])


def from_first_rank(model: PreTrainedModel, values: Tensor) -> Tensor:
    """Numbers that may follow from a rank's own clock, as the first rank has them."""
    group = group_of(model)
    if group is None:
        return values
    said = values.long()
    distributed.broadcast(said, src=distributed.get_global_rank(group, 0), group=group)
    return said.to(values.dtype)


def as_first_rank(model: PreTrainedModel, number: int) -> int:
    """One such number, on the host."""
    return number if group_of(model) is None else int(from_first_rank(model, torch.tensor([number]).to(model.device)))


def join(device: str) -> tuple[str, int, int]:
    """Join the processes that torchrun started: this one's device, its rank, and how many there are.

    Raises `TidalError` where torchrun did not start this process, or there are fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ:
        raise TidalError("--tp: start it by torchrun: torchrun --nproc-per-node 2 -m tidal_compile run --tp ...")
    local = int(os.environ["LOCAL_RANK"])
    if device == "cpu" and torch.cuda.is_available():
        raise TidalError("--tp --device cpu: transformers divides a model over the GPUs that it finds; hide them first")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise TidalError(f"--tp: process {local} of this machine has no GPU; there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")  # all collectives of a step are in one CUDA graph
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device, distributed.get_rank(), distributed.get_world_size()


def check_heads(config: Any, ranks: int) -> None:
    """Raise `TidalError` for a model whose heads can't be divided among so many ranks."""
    text = config.get_text_config(decoder=True)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if kv_heads % ranks:
        valid = [number for number in range(1, kv_heads + 1) if kv_heads % number == 0]
        raise TidalError(f"--tp: {kv_heads} kv heads among {ranks} processes; valid here: {', '.join(map(str, valid))}")


def divided(ranks: int) -> Any:
    """What tells transformers to divide a model among so many processes."""
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_size=ranks)


PLAIN_STYLES = ("colwise", "rowwise")  # a rank makes its part of the output; or all sum what they make of their inputs


def use_local_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Let the linear layers of a divided model hold this rank's part of their weights as plain tensors.

    A step has less to check on the host then: each weight that is a DTensor is unpacked at every call, by a function
    around the layer that is made for training. For inference alone, since nothing can gather the weights again.
    """
    from torch.distributed.tensor import DTensor

    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not isinstance(module.weight, DTensor):
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                own = weight.to_local().detach().contiguous()
                module.register_parameter(name, torch.nn.Parameter(own, requires_grad=False))
        if _style(model, path) in PLAIN_STYLES:
            divide_layer(model, path, module)
    return model


def _style(model: PreTrainedModel, path: str) -> str | None:
    """How transformers' plan divides a layer among ranks."""
    from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

    return model.tp_plan.get(replace_layer_number_by_wildcard(path))


def divide_layer(model: PreTrainedModel, path: str, part: torch.nn.Module) -> None:
    """Let a layer of this rank's part of a weight, `torch.nn.Linear` or `PackedLinear`, be summed or gathered.

    Raises `TidalError` if transformers' plan divides the layer in a way that another weight can't follow.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    style, group = _style(model, path), group_of(model)
    if style == "colwise":
        vars(part).pop("forward", None)
    elif style == "rowwise":
        part.forward = _summed(part, group)
    elif style in ("colwise_gather_output", "colwise_rep") and part.bias is None:
        part._hf_quantized_needs_local_tp = True  # it takes and makes plain tensors
        mesh = model._device_mesh
        ALL_PARALLEL_STYLES[style].install_forward(part, mesh["tp"] if mesh.ndim > 1 else mesh)
    else:
        bias = "" if part.bias is None else " with a bias"
        raise TidalError(
            f"layer {path!r}{bias} is divided among ranks as {style!r}; valid for other weights: "
            "colwise, rowwise, and colwise_gather_output without a bias"
        )


def _summed(part: torch.nn.Module, group: Any) -> Callable[[Tensor], Tensor]:
    """The `forward` of a layer that has some of a weight's columns: all ranks' sum, to which the bias is added once."""

    def forward(x: Tensor) -> Tensor:
        out = torch.nn.functional.linear(x, part.weight) if isinstance(part, torch.nn.Linear) else part.multiply(x)
        distributed.all_reduce(out, group=group)
        return out if part.bias is None else out + part.bias

    return forward


def divide(model: PreTrainedModel, ranks: int) -> PreTrainedModel:
    """Divide a model that every rank has loaded, by transformers' plan for it: for weights that no folder holds.

    Raises `TidalError` if transformers has no plan.
    """
    if not model.supports_tp_plan:
        raise TidalError(f"--tp: transformers has no plan for {type(model).__name__}")
    seen = set()
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if weight in seen:  # tied: transformers divides both uses, each in its own way
            module, _, own = name.rpartition(".")
            model.get_submodule(module).register_parameter(own, torch.nn.Parameter(weight.detach().clone()))
        seen.add(weight)
    kind = type(model)
    config, _, mesh = kind.prepare_distribute_model(divided(ranks))
    return kind.maybe_distribute_model(model, config, mesh).eval()

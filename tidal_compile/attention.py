"""A model with another attention function, and one that calls the ops of a policy without compiling anything."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .kernels import ops as _ops  # noqa: F401  registers the ops
from .policy import LayerRole

NAME = "tidal_function"


@contextlib.contextmanager
def attention_function(model: nn.Module, function: Callable) -> Iterator[None]:
    """`function` in place of the model's attention, through transformers' attention interface; masks are bool.

    Raises `UnsupportedModelError` in a forward pass that never called it: some models keep attention of their own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    called = False

    def attend(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called = True
        return function(*args, **kwargs)

    def check(*_: Any) -> None:
        if not called:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not take its attention from transformers' attention interface, through "
                "which policies are calibrated and evaluated"
            )

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()
        model.config._attn_implementation = before
        AttentionInterface.register(NAME, _gone)  # the function holds a cache


def _gone(*_: Any, **__: Any) -> None:
    raise RuntimeError(f"attention implementation {NAME!r} outside of attention_function")


@contextlib.contextmanager
def attention_ops(model: nn.Module, cache: Any, roles: Sequence[LayerRole]) -> Iterator[None]:
    """The model's decode steps on a static cache under these roles, by the ops that `backend="tidal"` compiles in.

    A layer that forgets tokens, such as a sliding window, attends to all that it still has.
    """
    from transformers.cache_utils import StaticLayer

    ops = torch.ops.tidal
    sets: dict[int, Tensor] = {}

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
        layer, role = cache.layers[module.layer_idx], roles[module.layer_idx]
        keeps_all = type(layer) is StaticLayer
        length = layer.cumulative_length if keeps_all else torch.full((), key.shape[2], device=key.device)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        rest, last = (length, mask, scale), (s_aux, softcap or 0.0)
        if role.role == "select" and keeps_all:
            settings = (role.budget, role.ratio, role.sinks, role.recent, role.share)
            out, sets[role.layer] = ops.select_attention(query, key, value, *rest, *settings, *last)
        elif role.role == "reuse" and keeps_all:
            index = sets[role.source] if role.heads is None else sets[role.source][:, role.heads]
            out = ops.sparse_attention(query, key, value, index, length, None, scale, *last)
        else:
            out = ops.full_attention(query, key, value, *rest, *last)
        return out.transpose(1, 2), None

    with attention_function(model, attend):
        yield

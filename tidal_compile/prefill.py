"""Read a prompt into a static cache: in chunks, over live tokens only, by flash attention where it can be had.

Chunks after the first attend to more keys than they have queries. PyTorch's SDPA takes flash for them only where the
mask is known to be causal and aligned to the lower right, which transformers doesn't tell it: so an attention function
of ours does (`causal_lower_right`), where nothing but causality hides a token.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel

from .cache import LiveLayer, reading
from .models import continues, with_cache
from .passes.compat import attention_implementation

CHUNK = 2048  # tokens that are read at a time
CAUSAL = "tidal_causal"  # our attention function, as transformers calls it


@torch.no_grad()
def read(
    model: PreTrainedModel, input_ids: Tensor, cache: Any, *, past: int = 0, first: int = 0, mask: Tensor | None = None,
    chunk: int | None = None,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Read what a cache, which has `past` tokens, lacks of input_ids `[B, n]`, which begin in slot `first`.

    `mask [B, S]` bool leaves out padding on the left; S is at least first + n. Yields, after every chunk, how many
    tokens the cache has, and the logits `[B, vocab]` after the last of them. A model that can't go on with several
    tokens (`models.continues`) gets all of them at once.
    """
    end = first + input_ids.shape[1]
    place = torch.arange(end, device=input_ids.device)[None] if mask is None else positions(mask)
    chunk = (chunk or CHUNK) if continues(model) else end
    for start in range(past, end, chunk):
        part = slice(start, min(start + chunk, end))
        given = {"input_ids": input_ids[:, part.start - first : part.stop - first]} | with_cache(model, cache)
        if mask is not None:
            given["attention_mask"] = mask[:, : part.stop]
        if takes(type(model), "position_ids"):
            given["position_ids"] = place[:, part].expand(len(input_ids), -1)
        if takes(type(model), "logits_to_keep"):
            given["logits_to_keep"] = 1
        try:
            with reading(cache, start), _attention(model, cache, mask):
                logits = model(**given).logits[:, -1]
        except _OwnMask:
            _with_masks.add(type(model))
            for layer in cache.layers:
                if getattr(layer, "is_initialized", False):
                    layer.cumulative_length.fill_(start)
            with reading(cache, start):
                logits = model(**given).logits[:, -1]
        yield part.stop, logits


def positions(mask: Tensor) -> Tensor:
    """The position of each slot in its sequence `[B, slots]`, where `mask [B, slots]` leaves out the padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@functools.cache
def takes(kind: type, name: str) -> bool:
    """Whether the forward of a class of models takes an argument."""
    return name in inspect.signature(kind.forward).parameters


def _attention(model: PreTrainedModel, cache: Any, mask: Tensor | None) -> contextlib.AbstractContextManager:
    """Our attention function for a model that goes by SDPA, if all layers see every token before."""
    is_sdpa = model.config.get_text_config(decoder=True)._attn_implementation == "sdpa"
    if not is_sdpa or mask is not None or not model._supports_attention_backend or type(model) in _with_masks:
        return contextlib.nullcontext()
    sees_all = all(isinstance(layer, LiveLayer) for layer in cache.layers)
    return attention_implementation(model, CAUSAL) if sees_all else contextlib.nullcontext()


class _OwnMask(Exception):
    """A model makes a mask by itself, in its attention layers, beside the one that transformers makes (Doge)."""


_with_masks: set[type] = set()  # classes of models that do


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of the last queries `[B, Hq, n, D]` to keys and values `[B, Hkv, live, D]`: `[B, n, Hq, D]`."""
    if attention_mask is not None or position_bias is not None:
        raise _OwnMask
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=causal_lower_right(query.shape[2], key.shape[2]), dropout_p=dropout,
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(CAUSAL, _attend)  # and no mask function: transformers makes no mask

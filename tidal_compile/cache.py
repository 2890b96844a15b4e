"""Static caches that read a prompt by its live tokens; in float8, or with layers in the host's memory."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

from .errors import TidalError
from .kernels.host import memory
from .policy import Policy, resolve

LARGEST = 448.0  # of float8 (e4m3)


class LiveLayer(StaticLayer):
    """A layer whose attention, while a prompt is read, gets its live tokens and not all of its slots.

    `read`: how many of them there are before the tokens that are read now; None otherwise. See `reading`.
    """

    read: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.read is None:
            return keys, values
        live = self.read + key_states.shape[-2]
        return keys[:, :, :live], values[:, :, :live]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length) if self.read is None else (self.read + query_length, 0)


@contextmanager
def reading(cache: Any, read: int) -> Iterator[None]:
    """While tokens are read, uncompiled, behind so many in the cache."""
    layers = [layer for layer in cache.layers if isinstance(layer, LiveLayer)]
    for layer in layers:
        layer.read = read
    try:
        yield
    finally:
        for layer in layers:
            layer.read = None


class LiveCache(StaticCache):
    """A `StaticCache` of `LiveLayer`s, and of what else the model has."""

    def __init__(self, config: PreTrainedConfig, max_cache_len: int) -> None:
        super().__init__(config=config, max_cache_len=max_cache_len)
        for number, layer in enumerate(self.layers):
            if type(layer) is StaticLayer:
                self.layers[number] = LiveLayer(max_cache_len=max_cache_len)


class Fp8Layer(LiveLayer):
    """A layer in float8 (e4m3), one scale a token and head: half of the memory, and half of what a step reads.

    `keys` and `values [B, Hkv, S, D]` are its bytes, uint8, and `scales [B, Hkv, S, 2]` in bfloat16 what each key and
    each value is multiplied by: its largest number, divided by the largest that float8 has. Attention gets numbers in
    the model's dtype, except in a compiled step, which reads the bytes (`passes/match.py`).
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states[:, :, :0].to(torch.uint8), value_states[:, :, :0].to(torch.uint8))
        self.scales = torch.zeros(*self.keys.shape[:3], 2, dtype=torch.bfloat16, device=self.keys.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.scales)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        (keys, key_scale), (values, value_scale) = as_float8(key_states), as_float8(value_states)
        place = torch.arange(keys.shape[2], device=keys.device) + self.cumulative_length
        self.scales.index_copy_(2, place, torch.stack([key_scale, value_scale], -1))
        keys, values = super().update(keys, values, *args, **kwargs)
        scales = self.scales if self.read is None else self.scales[:, :, : keys.shape[2]]
        return (
            as_numbers(keys, scales[..., 0:1], key_states.dtype),
            as_numbers(values, scales[..., 1:2], value_states.dtype),
        )

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.scales.zero_()  # byte 0 times what is no number is none

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            self.scales = self.scales.index_select(0, beam_idx.to(self.scales.device))


def as_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[..., D]` as the bytes of float8 (e4m3), and their scales `[...]` in bfloat16."""
    scales = (rows.abs().amax(-1).float() / LARGEST).to(torch.bfloat16).clamp(min=torch.finfo(torch.bfloat16).tiny)
    return (rows / scales[..., None].float()).to(torch.float8_e4m3fn).view(torch.uint8), scales


def as_numbers(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of float8 `[..., D]` and scales `[..., 1]` as numbers. `passes/match.py` knows this form by its calls."""
    return (rows.view(torch.float8_e4m3fn).to(dtype) * scales).to(dtype)


class Fp8Cache(LiveCache):
    """A `StaticCache` of `max_cache_len` slots whose layers are `Fp8Layer`s, but for sliding windows, which are small.

    Pass it as `past_key_values` to the model or to `generate`. For head sizes that are even.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int) -> None:
        super().__init__(config=config, max_cache_len=max_cache_len)
        for number, layer in enumerate(self.layers):
            if type(layer) is LiveLayer:
                self.layers[number] = Fp8Layer(max_cache_len=max_cache_len)


CACHES = {"auto": LiveCache, "fp8": Fp8Cache}  # by the name that the command line has for them


def new_cache(config: PreTrainedConfig, slots: int, kind: str = "auto") -> LiveCache:
    """A static cache, in the model's own dtype (`auto`) or in float8 (`fp8`). Raises `TidalError` for another kind."""
    if kind not in CACHES:
        raise TidalError(f"cache must be one of {', '.join(CACHES)}; found {kind!r}")
    return CACHES[kind](config, slots)


class HostLayer(LiveLayer):
    """A layer `[B, Hkv, S, D]` in host memory that a GPU addresses: it writes new tokens there, and reads there.

    A compiled step reads in place what it attends to. A prefill attends to a copy on the GPU, which lives as long as
    the layer's attention.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, self.max_cache_len = self.max_cache_len, 1
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = slots
        for name in ("keys", "values"):
            batch, num_kv_heads, _, head_dim = getattr(self, name).shape
            shape = batch, num_kv_heads, slots, head_dim
            setattr(self, name, memory.zeros(shape, key_states.dtype, key_states.device))
            torch._dynamo.mark_static_address(getattr(self, name))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[-2] == 1 or not keys.is_cuda or torch.compiler.is_compiling():
            return keys, values
        return keys.clone(), values.clone()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return
        if len(beam_idx) != len(self.keys):
            raise TidalError(
                f"HostCache: reorder_cache with {len(beam_idx)} rows; it has {len(self.keys)}, and stays in its memory"
            )
        for tensor in (self.keys, self.values):
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)
            here = memory.as_cpu(tensor)
            here.copy_(here[beam_idx.cpu()])
            tensor[:0].zero_()  # a write of nothing, which is counted


class HostCache(LiveCache):
    """A `StaticCache` of `max_cache_len` slots, some of whose layers are in host memory: a GPU holds only the others.

    By the policy these are the layers with `place: cpu`, whose samples the CPU attends to, and those that reuse tokens,
    which read these few over PCIe. `layers`: other ones instead, by number. Pass the cache as `past_key_values` to the
    model or to `generate`. While a prompt is read, the GPU holds one such layer at a time.

    Raises TidalError where no layer would be in host memory, or a layer that can't, and PolicyError.
    """

    def __init__(
        self, config: PreTrainedConfig, max_cache_len: int, policy: Policy | dict | str | Path | None = None,
        layers: Iterable[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config, max_cache_len=max_cache_len)
        can = tuple(number for number, layer in enumerate(self.layers) if type(layer) is LiveLayer)
        if layers is None:
            roles = () if policy is None else resolve(policy, len(self.layers), attention_layers=can).roles
            layers = [role.layer for role in roles if role.role == "reuse" or (role.keeps and role.method.prepares)]
        layers = sorted(set(layers))
        if not layers:
            raise TidalError(
                "HostCache: no layer of the policy reuses tokens or has place: cpu, so that all would be on the GPU; "
                "use StaticCache, a policy such as the preset magicpig_cpu, or layers=[...]"
            )
        for number in layers:
            if number not in can:
                raise TidalError(f"HostCache: layer {number} can't be in host memory; these can: {list(can)}")
            self.layers[number] = HostLayer(max_cache_len=max_cache_len)

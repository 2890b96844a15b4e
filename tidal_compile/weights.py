"""Linear layers whose weights are quantised, held as a decode step reads them: in int8, or in int4.

A layer that torchao or compressed-tensors made unpacks its weight on the host at every call, and its kernels read int4
at half the speed of memory. `pack_weights` puts a `PackedLinear` in the place of each: plain tensors, which
`tidal::linear` streams.
"""

import dataclasses
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TidalError
from .kernels import ops as _ops  # noqa: F401  registers the operators
from .kernels.reference import most_tokens, packed
from .ranks import divide_layer, group_of, use_local_weights


@dataclasses.dataclass(frozen=True)
class Held:
    """What `tidal::linear` takes of a weight of some shape `[N, K]`.

    That is int8 `[N, K]` and scales `[N, 1]`, or int4 (`reference.packed`).
    """

    weight: Tensor
    scales: Tensor
    shape: torch.Size


class PackedLinear(nn.Module):
    """A linear layer of a weight in int8 or int4. For inference.

    A few tokens are multiplied by the weight as it is held, in a compiled step as well, where layers of one input share
    a launch; more tokens, and those of another dtype than a weight in int4 was made for, by what it stands for.

    `rows` and `columns` are those of the weight: of a rank's part of one, where `out_features` and `in_features` are
    the whole layer's.
    """

    def __init__(self, held: Held, bias: Tensor | None = None) -> None:
        super().__init__()
        self.rows, self.columns = self.out_features, self.in_features = held.shape
        self.register_buffer("held", held.weight)
        self.register_buffer("scales", held.scales)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Tensor:
        """The weight that is stood for `[rows, columns]`, made anew at each call."""
        return torch.ops.tidal.dense_weight.default(self.held, self.scales, self.columns)[: self.rows]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., columns]` -> `[..., rows]`."""
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`forward` with another bias, or none."""
        fits = self.held.dtype == torch.int8 or x.dtype == self.scales.dtype
        if fits and 0 < x.numel() // self.columns <= most_tokens(x.dtype):
            if self.held.dtype == torch.int16 and self.rows % 16:  # the rest of a tile
                out = torch.ops.tidal.linear.default(x, [self.held], [], [self.scales], [])[..., : self.rows]
                return out if bias is None else out + bias
            biases = [] if bias is None else [bias]
            return torch.ops.tidal.linear.default(x, [self.held], biases, [self.scales], [])
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """As `torch.nn.Linear` has it, and the numbers' format."""
        kind = "int8" if self.held.dtype == torch.int8 else "int4"
        return f"{self.columns}, {self.rows}, bias={self.bias is not None}, {kind}"


@torch.no_grad()
def pack_weights(model: nn.Module) -> int:
    """Put a `PackedLinear` in the place of every linear layer whose weight is quantised, and return how many.

    Taken are, weight-only: torchao's `Int8WeightOnlyConfig` with a scale a row, `Int4WeightOnlyConfig` (plain, and
    tile_packed_to_4d) and `IntxWeightOnlyConfig` in int4; and compressed-tensors' pack-quantized in 4 bits, before the
    first call, which would decompress it. In int4, groups are a row, or of 32, 64 or columns that 128 divides, and the
    model has a 16-bit format.

    The old layers' memory is freed one by one. Raises `TidalError` where there is no such layer, one has hooks, or the
    model is divided among ranks.
    """
    if group_of(model) is not None:
        raise TidalError("pack_weights: the model is divided among ranks; valid there: tidal_compile.weights.quantise")
    found, others = 0, Counter()
    for name, module in list(model.named_modules()):
        held = of_compressed_tensors(module) if hasattr(module, "weight_packed") else of_torchao(module)
        if held is None:
            if isinstance(module, nn.Linear):
                weight = getattr(module, "weight", None)  # compressed-tensors' layers have none
                others["weight_packed" if weight is None else type(weight.data).__name__] += 1
            continue
        _replace(model, name, module, held)
        found += 1
    if not found:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in others.items()) or "none"
        raise TidalError(
            f"pack_weights: no linear layer holds weights of torchao in int8 or int4, weight-only, or of "
            f"compressed-tensors in 4 bits; found linear layers: {kinds}"
        )
    return found


def of_torchao(module: nn.Module) -> Held | None:
    """The weight of a linear layer, where torchao holds it in a way that `tidal::linear` can read."""
    if not isinstance(module, nn.Linear) or module.weight.dim() != 2:
        return None
    weight = module.weight.data
    if getattr(weight, "act_pre_scale", None) is not None or getattr(weight, "act_quant_kwargs", None) is not None:
        return None  # x is to be scaled, or quantised, first
    kind, group = type(weight).__name__, getattr(weight, "block_size", [0, 0])[-1]
    if kind == "Int8Tensor" and weight.scale.numel() == len(weight):
        return Held(weight.qdata.contiguous(), weight.scale.view(-1, 1).contiguous(), weight.shape)
    if kind == "Int4TilePackedTo4dTensor":
        scale, offset = weight.scale_and_zero.unbind(-1)  # [groups, N], of rows that are divided by 8
        return as_int4(of_tiles(weight.qdata), scale.T, offset.T, group, weight.shape)
    if kind == "Int4Tensor" and weight.activation_dtype == torch.bfloat16:
        numbers = torch.stack([weight.qdata & 15, (weight.qdata >> 4) & 15], -1).flatten(1) ^ 8  # were signed
        return as_int4(numbers, weight.scale.T, weight.zero_point.T, group, weight.shape)
    if kind == "IntxUnpackedToInt8Tensor" and weight.target_dtype == torch.int4 and not weight.activation_quantization:
        scale = weight.scale.float()
        return as_int4(weight.qdata + 8, scale, -weight.zero_point.float() * scale, group, weight.shape, weight.dtype)
    return None


def of_compressed_tensors(module: nn.Module) -> Held | None:
    """The weight of a layer that compressed-tensors holds as pack-quantized, in 4 bits."""
    scheme, order = module.quantization_scheme, getattr(module, "weight_g_idx", None)
    args = scheme.weights
    if (args.num_bits, args.type) != (4, "int") or scheme.input_activations is not None or order is not None:
        return None
    shape = torch.Size(module.weight_shape.tolist())
    scale = module.weight_scale.float()  # [N, groups]
    offset = torch.zeros_like(scale)
    if not args.symmetric:
        offset = (8 - _fours(module.weight_zero_point.T).T[: len(scale)]) * scale
    group = shape[1] // scale.shape[1]
    return as_int4(_fours(module.weight_packed), scale, offset, group, shape, module.weight_scale.dtype)


def _fours(words: Tensor) -> Tensor:
    """The 8 numbers of 4 bits in each int32 `[N, W]`, the lowest first: `[N, 8 W]`."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(1)


def as_int4(
    numbers: Tensor, scale: Tensor, offset: Tensor, group: int, shape: torch.Size, dtype: torch.dtype | None = None
) -> Held | None:
    """Numbers from 0 to 15 `[N, K]`, for (number - 8) * scale + offset, with both `[N, groups]`, as they are read.

    They may have more rows and columns than the shape, and get more columns where a block isn't full. None for groups
    and number formats that no kernel takes.
    """
    dtype = dtype or scale.dtype
    rows, columns = shape
    groups = math.ceil(columns / group)
    if groups == 1:
        group = math.ceil(columns / 128) * 128
    if (group not in (32, 64) and group % 128) or dtype.itemsize != 2:
        return None
    numbers = numbers[:rows, : groups * group]
    numbers = nn.functional.pad(numbers, (0, groups * group - numbers.shape[1]))
    pairs = torch.stack([scale[:rows, :groups], offset[:rows, :groups]], -1)
    return Held(*packed(numbers, pairs.to(dtype)), shape)


def of_tiles(tiles: Tensor) -> Tensor:
    """The numbers `[N, K]` of PyTorch's int4 tiles `[N / 8, K / 128, 32, 4]` (`_convert_weight_to_int4pack`).

    Word j of lane 4 n + l, of row n among 8, has in its bits from 16 h + 4 r on the number of column 32 j + 8 r + 2 l +
    h among 128.
    """
    words = tiles.view(*tiles.shape[:2], 8, 4, 4)  # [N / 8, K / 128, n, l, j]
    numbers = torch.stack([(words >> (16 * h + 4 * r)) & 15 for r in range(4) for h in range(2)], -1).to(torch.uint8)
    numbers = numbers.view(*words.shape, 4, 2).permute(0, 2, 1, 4, 5, 3, 6)  # [N / 8, n, K / 128, j, r, l, h]
    return numbers.reshape(len(tiles) * 8, -1)


@torch.no_grad()
def quantise(model: nn.Module, kind: str) -> nn.Module:
    """Round the weights of all linear layers to `int8` (a scale a row), `int4` (a scale and an offset for 128 columns,
    or for 64 or 32 where these divide them) or `int4-32` (for 32 columns). `auto` leaves them.

    In int4, layers whose columns 32 doesn't divide stay. Of a model that is divided among ranks, each rounds its part.
    Raises `TidalError` for another kind.
    """
    groups = {"auto": (), "int8": (1,), "int4": (128, 64, 32), "int4-32": (32,)}
    if kind not in groups:
        raise TidalError(f"weights must be {', '.join(groups)}; found {kind!r}")
    if group_of(model) is not None and groups[kind]:
        use_local_weights(model)
    for name, module in list(model.named_modules()):
        group = next((one for one in groups[kind] if _is_plain(module) and module.weight.shape[1] % one == 0), None)
        if group is not None:
            held = as_rounded_int8(module.weight) if kind == "int8" else as_rounded_int4(module.weight, group)
            _replace(model, name, module, held)
    return model


def as_rounded_int8(weight: Tensor) -> Held:
    """A weight `[N, K]` in int8: each row's largest number is 127 scales."""
    scale = (
        (weight.abs().amax(1, keepdim=True).float() / 127).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
    )
    numbers = (weight.float() / scale.float()).round().clamp(-127, 127)
    return Held(numbers.to(torch.int8), scale, weight.shape)


def as_rounded_int4(weight: Tensor, group: int) -> Held | None:
    """A weight `[N, K]` in int4: the smallest number of each group of columns is 0, and the largest 15."""
    columns = weight.float().unflatten(1, (-1, group))  # [N, groups, group]
    low, high = columns.amin(-1), columns.amax(-1)
    scale = ((high - low) / 15).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
    offset = (low + 8 * scale.float()).to(weight.dtype)
    numbers = (columns - offset.float()[..., None]) / scale.float()[..., None] + 8
    return as_int4(numbers.round().clamp(0, 15).flatten(1), scale, offset, group, weight.shape)


def _is_plain(module: Any) -> bool:
    """Whether a module is a linear layer that isn't quantised yet."""
    return isinstance(module, nn.Linear) and type(module.weight.data) is Tensor


def _replace(model: nn.Module, name: str, module: nn.Module, held: Held | None) -> None:
    """Put a `PackedLinear` in a layer's place."""
    if held is None:
        raise TidalError(f"layer {name!r}: weights in int4 want a 16-bit number format; found {module.weight.dtype}")
    is_wrapped, is_divided = "forward" in vars(module), group_of(model) is not None
    if module._forward_hooks or module._forward_pre_hooks or (is_wrapped and not is_divided):
        raise TidalError(f"layer {name!r} has hooks, as where a model is divided among devices")
    part = PackedLinear(held, module.bias)
    part.out_features, part.in_features = module.out_features, module.in_features
    if is_wrapped:
        divide_layer(model, name, part)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, part)

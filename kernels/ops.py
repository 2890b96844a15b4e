"""The `tidal::` operators: schemas, shapes and dispatch. No other file registers anything with PyTorch.

    full_attention   (q, k, v, length, mask, scale, sink, softcap)                                      -> out
    select_attention (q, k, v, length, mask, scale, budget, ratio, sinks, recent, share, sink, softcap) -> out, index
    sparse_attention (q, k, v, index, length, mask, scale, sink, softcap)                               -> out
    linear           (x, weights, biases)                                                               -> out

    q, out   [B, Hq, 1, D]
    k, v     [B, Hkv, S, D]: the static cache, read in place
    length   0-d int64 on the device: the number of live slots, with the new token
    mask     [B or 1, 1, 1, S]: bool (which tokens count), floating (added to the scores) or None
    index    [B, G, K] int32: positions, ascending, padded with -1; G is 1, Hkv or Hq
    sink     [Hq] or None: a logit of each query head that takes part in its softmax and has no value
    softcap  c turns scores into c tanh(score / c) before the mask is applied; 0 for none

Dtypes are float32, float16 and bfloat16. Outputs never alias inputs, and no shape depends on data.

The operators are `custom_op`s, which are opaque to Inductor: a `triton_op` would be traced into its Triton call even on
a CPU. A CPU runs `reference`. A GPU runs the Triton kernels, which are imported at the first call because a machine
without a GPU may have no Triton.
"""

import torch
from torch import Tensor

from . import reference


@torch.library.custom_op("tidal::full_attention", mutates_args=(), device_types="cuda")
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    mask: Tensor | None,
    scale: float,
    sink: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of one new token over the whole live cache."""
    from . import dense

    _check(q, k, v, length, mask, sink, softcap)
    return dense.full_attention(q, k, v, length, mask, scale, sink, softcap)


@full_attention.register_kernel("cpu")
def _(q, k, v, length, mask, scale, sink=None, softcap=0.0):
    _check(q, k, v, length, mask, sink, softcap)
    return reference.full_attention(q, k, v, length, mask, scale, sink, softcap)


@full_attention.register_fake
def _(q, k, v, length, mask, scale, sink=None, softcap=0.0):
    _check(q, k, v, length, mask, sink, softcap)
    return q.new_empty(q.shape)


@torch.library.custom_op("tidal::select_attention", mutates_args=(), device_types="cuda")
def select_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    mask: Tensor | None,
    scale: float,
    budget: int,
    ratio: float,
    sinks: int,
    recent: int,
    share: str,
    sink: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`full_attention`, and the positions of the most important tokens: max(budget, ratio x live tokens) of them."""
    from . import select

    _check(q, k, v, length, mask, sink, softcap)
    _check_selection(budget, ratio, sinks, recent, share)
    return select.select_attention(q, k, v, length, mask, scale, budget, ratio, sinks, recent, share, sink, softcap)


@select_attention.register_kernel("cpu")
def _(q, k, v, length, mask, scale, budget, ratio, sinks, recent, share, sink=None, softcap=0.0):
    _check(q, k, v, length, mask, sink, softcap)
    _check_selection(budget, ratio, sinks, recent, share)
    return reference.select_attention(q, k, v, length, mask, scale, budget, ratio, sinks, recent, share, sink, softcap)


@select_attention.register_fake
def _(q, k, v, length, mask, scale, budget, ratio, sinks, recent, share, sink=None, softcap=0.0):
    _check(q, k, v, length, mask, sink, softcap)
    _check_selection(budget, ratio, sinks, recent, share)
    sets = {"query_head": q.shape[1], "kv_head": k.shape[1], "layer": 1}[share]
    width = reference.index_width(budget, ratio, k.shape[2])
    return q.new_empty(q.shape), q.new_empty((q.shape[0], sets, width), dtype=torch.int32)


@torch.library.custom_op("tidal::sparse_attention", mutates_args=(), device_types="cuda")
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    length: Tensor,
    mask: Tensor | None,
    scale: float,
    sink: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of one new token over the tokens in `index`."""
    from . import sparse

    _check(q, k, v, length, mask, sink, softcap)
    _check_index(q, k, index)
    return sparse.sparse_attention(q, k, v, index, length, mask, scale, sink, softcap)


@sparse_attention.register_kernel("cpu")
def _(q, k, v, index, length, mask, scale, sink=None, softcap=0.0):
    _check(q, k, v, length, mask, sink, softcap)
    _check_index(q, k, index)
    return reference.sparse_attention(q, k, v, index, length, mask, scale, sink, softcap)


@sparse_attention.register_fake
def _(q, k, v, index, length, mask, scale, sink=None, softcap=0.0):
    _check(q, k, v, length, mask, sink, softcap)
    _check_index(q, k, index)
    return q.new_empty(q.shape)


@torch.library.custom_op("tidal::linear", mutates_args=(), device_types="cuda")
def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """The joined outputs of linear layers that share an input of a few tokens; all of them have biases, or none."""
    from . import linear

    _check_linear(x, weights, biases)
    return linear.linear(x, weights, biases)


@linear.register_kernel("cpu")
def _(x, weights, biases):
    _check_linear(x, weights, biases)
    return reference.linear(x, weights, biases)


@linear.register_fake
def _(x, weights, biases):
    _check_linear(x, weights, biases)
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


def _check_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    most = reference.most_tokens(x.dtype)
    if not 1 <= x.numel() // max(1, x.shape[-1]) <= most:
        raise ValueError(f"tidal: x must be 1 to {most} tokens [..., K] in {x.dtype}; found {tuple(x.shape)}")
    if not 1 <= len(weights) <= 3 or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"tidal: linear takes 1 to 3 weights, and as many biases or none; found {len(weights)} weights and "
            f"{len(biases)} biases"
        )
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not weight.is_contiguous() or weight.dtype != x.dtype:
            raise ValueError(
                f"tidal: a weight must be contiguous {x.dtype} [N, {x.shape[-1]}]; found {weight.dtype} "
                f"{tuple(weight.shape)} with strides {weight.stride()}"
            )
    for weight, bias in zip(weights, biases, strict=False):
        if bias.shape != weight.shape[:1] or not bias.is_contiguous():
            raise ValueError(f"tidal: a bias must be contiguous [{weight.shape[0]}]; found {tuple(bias.shape)}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, mask: Tensor | None, sink: Tensor | None, softcap: float
) -> None:
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(f"tidal: q must be [B, Hq, 1, D]; found {tuple(q.shape)}")
    if k.dim() != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"tidal: k and v must be [B, Hkv, S, D] with B and D as in q {tuple(q.shape)}; found {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"tidal: {q.shape[1]} query heads are not a multiple of {k.shape[1]} kv heads")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"tidal: q, k and v must share one of float32, float16, bfloat16; found {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if length.numel() != 1 or length.dtype != torch.int64:
        raise ValueError(f"tidal: length must be one int64; found {length.dtype} {tuple(length.shape)}")
    if mask is not None and (
        not (mask.dtype == torch.bool or mask.is_floating_point())
        or mask.dim() != 4
        or mask.shape[0] not in (1, q.shape[0])
        or mask.shape[1:] != (1, 1, k.shape[2])
    ):
        raise ValueError(
            f"tidal: mask must be bool or floating [B or 1, 1, 1, {k.shape[2]}]; found {mask.dtype} {tuple(mask.shape)}"
        )
    if sink is not None and (sink.shape != (q.shape[1],) or not sink.is_floating_point()):
        raise ValueError(
            f"tidal: sink must be one number a query head [{q.shape[1]}], floating; found {sink.dtype} "
            f"{tuple(sink.shape)}"
        )
    if softcap < 0.0:
        raise ValueError(f"tidal: softcap must be positive, or 0 for none; found {softcap}")


def _check_selection(budget: int, ratio: float, sinks: int, recent: int, share: str) -> None:
    if share not in reference.SHARES:
        raise ValueError(f"tidal: share must be one of {', '.join(reference.SHARES)}; found {share!r}")
    if budget < 1 or sinks < 0 or recent < 0 or sinks + recent > budget:
        raise ValueError(
            f"tidal: budget {budget} must be 1 or more, and at least sinks + recent, which must not be negative; found "
            f"sinks {sinks} and recent {recent}"
        )
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"tidal: ratio must be from 0 to 1; found {ratio}")


def _check_index(q: Tensor, k: Tensor, index: Tensor) -> None:
    if (
        index.dtype != torch.int32
        or index.dim() != 3
        or index.shape[0] != q.shape[0]
        or index.shape[1] not in (1, k.shape[1], q.shape[1])
    ):
        raise ValueError(
            f"tidal: index must be int32 [B, G, K] with G one of 1, {k.shape[1]} and {q.shape[1]}, and B as in q "
            f"{tuple(q.shape)}; found {index.dtype} {tuple(index.shape)}"
        )

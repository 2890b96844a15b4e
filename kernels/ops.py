"""The `tidal::` operators: schemas, shapes and dispatch. No other file registers anything with PyTorch.

    full_attention    (call)                          -> out
    select_attention  (call, selection)               -> out, index       full attention, and the best tokens by scores
    sparse_attention  (call, index)                   -> out
    rank_and_attend   (call, selection, rank, ranks)  -> out, worth       select_attention and choose_by_scores up to
    rank_by_scores    (call, selection, rank, ranks)  -> worth            the choice, by the heads that a rank has;
    choose_ranked     (call, selection, worth, page)  -> index            and the choice, by what all ranks say
    choose_by_<name>  (call, selection, method keys, what it keeps)  -> index      one for each of `methods`,
    attend_by_<name>  (call, selection, method keys, what it keeps)  -> out        or for one that attends by itself
    weigh_by_<name>   (call, selection, method keys, what it keeps, rank, ranks)  -> worth     and up to the choice
    linear            (x, weights, biases, scales, ahead) -> out
    dense_weight      (held, scales, columns)         -> weight           what int8 or int4 numbers stand for

`call` are the fields of a `Call`, `selection` those of a `Selection`, in their order: see `call` for shapes and dtypes.
A decode step has T = 1, or up to `MOST_TOKENS`; only one for methods that aren't for `several`. Outputs never alias
inputs, and no shape depends on data.

The operators are `custom_op`s, which are opaque to Inductor: a `triton_op` would be traced into its Triton call even on
a CPU. A CPU runs `reference`. A GPU runs the Triton kernels, which are imported at the first call because a machine
without a GPU may have no Triton.
"""

import re
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import reference
from .call import MOST_TOKENS, POOLS, SHARES, Call, Selection
from .methods import METHODS, Method

TYPES = {"T": "Tensor", "T | None": "Tensor?", "float": "float", "int": "int", "str": "str", "bool": "bool"}


def _schema(kind: type) -> str:
    """The fields of a dataclass as arguments of an op."""
    return ", ".join(f"{TYPES[field.type]} {field.name}" for field in fields(kind))


DEFINITIONS: dict[str, Callable] = {}  # what the ops do, by name, for any number of query tokens: see `reference`


def _define(
    name: str, groups: tuple[type, ...], tensors: str, returns: str, gpu: Callable, cpu: Callable, fake: Callable,
    check: Callable | None = None,
) -> Any:  # fmt: skip
    """Register `tidal::<name>`: its arguments are the fields of the dataclasses `groups`, and after them `tensors`.

    The functions take an object of each group, and the tensors. `check` raises for tensors that are wrong.
    """

    def unpacked(arguments: tuple) -> list:
        given, taken = [], 0
        for kind in groups:
            given.append(kind(*arguments[taken : taken + len(fields(kind))]))
            taken += len(fields(kind))
        return [*given, *arguments[taken:]]

    def checked(function: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            given = unpacked(arguments)
            for one in given[: len(groups)]:
                _check(one)
            if check is not None:
                check(*given)
            return function(*given)

        return run

    schema = f"({', '.join(filter(None, [*map(_schema, groups), tensors]))}) -> {returns}"
    mutated = re.findall(r"!\) (\w+)", tensors)
    op = torch.library.custom_op(
        f"tidal::{name}", checked(gpu), mutates_args=mutated, device_types="cuda", schema=schema
    )
    op.register_kernel("cpu")(checked(cpu))
    op.register_fake(checked(fake))

    def definition(*arguments: Any) -> Any:
        return cpu(*unpacked(arguments))

    definition.__name__ = name
    DEFINITIONS[name] = definition
    return op


def _on_gpu(module: str, name: str) -> Callable:
    """A function of `kernels/triton`, which is imported when it is first called."""

    def run(*given: Any) -> Any:
        return getattr(import_module(f".triton.{module}", __package__), name)(*given)

    return run


def _empty_out(call: Call, *_: Any) -> Tensor:
    return call.query.new_empty(call.query.shape)


def _empty_index(call: Call, selection: Selection, *_: Any) -> Tensor:
    batch, num_heads, tokens, _ = call.query.shape
    num_kv_heads, slots = call.key.shape[1:3]
    shape = batch, tokens, selection.num_sets(num_heads, num_kv_heads), selection.width(slots)
    return reference.as_index(call.query.new_empty(shape, dtype=torch.int32))


def _empty_worth(call: Call) -> Tensor:
    shape = call.query.shape[0], call.query.shape[2], 1, call.key.shape[2]
    return call.query.new_empty(shape, dtype=torch.float32)


def _check_index(call: Call, index: Tensor) -> None:
    (batch, num_heads, tokens, _), num_kv_heads = call.query.shape, call.key.shape[1]
    if (
        index.dtype != torch.int32
        or index.shape[:-2] != ((batch,) if tokens == 1 else (batch, tokens))
        or index.shape[-2] not in (1, num_kv_heads, num_heads)
    ):
        raise ValueError(
            f"tidal: index must be int32 [B, G, K], or for T > 1 [B, T, G, K], with G one of 1, {num_kv_heads} and "
            f"{num_heads}, and B and T as in query {tuple(call.query.shape)}; found {index.dtype} {tuple(index.shape)}"
        )


def _check_one_token(call: Call, *_: Any) -> None:
    if call.query.shape[2] != 1:
        raise ValueError(f"tidal: this method takes one query token; found query {tuple(call.query.shape)}")


full_attention = _define(
    "full_attention", (Call,), "", "Tensor", _on_gpu("dense", "full_attention"), reference.full_attention, _empty_out
)  # fmt: skip
select_attention = _define(
    "select_attention", (Call, Selection), "", "(Tensor, Tensor)",
    _on_gpu("select", "select_attention"), reference.select_attention,
    lambda call, selection: (_empty_out(call), _empty_index(call, selection)),
)  # fmt: skip
sparse_attention = _define(
    "sparse_attention", (Call,), "Tensor index", "Tensor", _on_gpu("sparse", "sparse_attention"),
    reference.sparse_attention, _empty_out, check=_check_index,
)  # fmt: skip
rank_and_attend = _define(
    "rank_and_attend", (Call, Selection), "int rank, int ranks", "(Tensor, Tensor)",
    _on_gpu("select", "rank_and_attend"), reference.rank_and_attend,
    lambda call, *_: (_empty_out(call), _empty_worth(call)),
)  # fmt: skip
rank_by_scores = _define(
    "rank_by_scores", (Call, Selection), "int rank, int ranks", "Tensor",
    _on_gpu("select", "rank_by_scores"), reference.rank_by_scores, lambda call, *_: _empty_worth(call),
)  # fmt: skip
choose_ranked = _define(
    "choose_ranked", (Call, Selection), "Tensor worth, int page", "Tensor", _on_gpu("select", "choose_ranked"),
    reference.choose_ranked, _empty_index,
)  # fmt: skip


def _kept(kind: type[Method]) -> list[str]:
    """What a method keeps, as arguments of an op that writes to it."""
    return [f"Tensor(a{number}!) {name}" for number, name in enumerate(kind.keeps)]


by_method = {
    name: _define(
        f"{'attend' if kind.attends else 'choose'}_by_{name}", (Call, Selection, kind),
        ", ".join(_kept(kind)), "Tensor",
        lambda call, selection, method, *kept: method.step_on_gpu(call, selection, *kept),
        lambda call, selection, method, *kept: method.step(call, selection, *kept),
        _empty_out if kind.attends else _empty_index,
        check=None if kind.several else _check_one_token,
    )
    for name, kind in METHODS.items()
}  # fmt: skip

weigh_by_method = {
    name: _define(
        f"weigh_by_{name}", (Call, Selection, kind), ", ".join([*_kept(kind), "int rank", "int ranks"]), "Tensor",
        lambda call, selection, method, *given: method.weigh_on_gpu(call, selection, *given[-2:], *given[:-2]),
        lambda call, selection, method, *given: method.weigh(call, selection, *given[-2:], *given[:-2]),
        lambda call, *_: _empty_worth(call),
        check=None if kind.several else _check_one_token,
    )
    for name, kind in METHODS.items() if kind.weigh is not Method.weigh
}  # fmt: skip


@torch.library.custom_op("tidal::linear", mutates_args=(), device_types="cuda")
def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor], ahead: list[Tensor]) -> Tensor:
    """The joined outputs of linear layers that share an input of a few tokens; all of them have biases, or none, and
    all are held in int8, or in int4 with groups of one size, or none.

    `ahead` changes no output: nothing, or the int4 weight that the next call reads first, and its scales, of which
    kernels of int4 bring the first megabytes to the L2 cache.
    """
    from .triton import linear

    _check_linear(x, weights, biases, scales)
    return linear.linear(x, weights, biases, scales, ahead)


@linear.register_kernel("cpu")
def _(x, weights, biases, scales, ahead):
    _check_linear(x, weights, biases, scales)
    return reference.linear(x, weights, biases, scales)


@linear.register_fake
def _(x, weights, biases, scales, ahead):
    _check_linear(x, weights, biases, scales)
    return x.new_empty((*x.shape[:-1], sum(map(reference.num_rows, weights))))


def _check_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor]) -> None:
    most = reference.most_tokens(x.dtype)
    if not 1 <= x.numel() // max(1, x.shape[-1]) <= most:
        raise ValueError(f"tidal: x must be 1 to {most} tokens [..., K] in {x.dtype}; found {tuple(x.shape)}")
    if not 1 <= len(weights) <= 3 or len(biases) not in (0, len(weights)) or len(scales) not in (0, len(weights)):
        raise ValueError(
            f"tidal: linear takes 1 to 3 weights, and as many biases and scales or none; found {len(weights)} weights, "
            f"{len(biases)} biases and {len(scales)} scales"
        )
    if scales and weights[0].dtype == torch.int16:
        _check_int4(x, weights, scales)
    else:
        stored = torch.int8 if scales else x.dtype
        for weight in weights:
            wrong = weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not weight.is_contiguous()
            if wrong or weight.dtype != stored:
                raise ValueError(
                    f"tidal: a weight must be contiguous {stored} [N, {x.shape[-1]}]; found {weight.dtype} "
                    f"{tuple(weight.shape)} with strides {weight.stride()}"
                )
        for weight, scale in zip(weights, scales, strict=False):
            if scale.shape not in ((weight.shape[0],), (weight.shape[0], 1)) or not scale.is_contiguous():
                raise ValueError(
                    f"tidal: a scale must be contiguous [{weight.shape[0]}] or [{weight.shape[0]}, 1]; found "
                    f"{tuple(scale.shape)}"
                )
    for rows, bias in zip(map(reference.num_rows, weights), biases, strict=False):
        if bias.shape != (rows,) or not bias.is_contiguous():
            raise ValueError(f"tidal: a bias must be contiguous [{rows}]; found {tuple(bias.shape)}")


def _check_int4(x: Tensor, weights: list[Tensor], scales: list[Tensor]) -> None:
    blocks = weights[0].shape[1]
    for weight, scale in zip(weights, scales, strict=True):
        if weight.dtype != torch.int16 or weight.shape[1:] != (blocks, 512) or not weight.is_contiguous():
            raise ValueError(
                f"tidal: weights in int4 must be contiguous int16 [tiles, {blocks}, 512]; found {weight.dtype} "
                f"{tuple(weight.shape)}"
            )
        groups, in_block = (scale.shape[1], scale.shape[3]) if scale.dim() == 5 else (0, 0)
        fits = in_block in (1, 2, 4) and groups and blocks % groups == 0 and (in_block == 1 or groups == blocks)
        alike = scale.shape == (len(weight), *scales[0].shape[1:]) and scale.shape[2:] == (16, in_block, 2)
        if not fits or not alike or scale.dtype != x.dtype or not scale.is_contiguous():
            raise ValueError(
                f"tidal: scales of int4 weights must be contiguous {x.dtype} [{len(weight)}, groups, 16, 1, 2] with "
                f"groups that divide {blocks}, or [{len(weight)}, {blocks}, 16, 2 or 4, 2], all alike; found "
                f"{scale.dtype} {tuple(scale.shape)}"
            )
    group = reference.group_of(weights[0], scales[0])
    if not blocks * 128 - max(128, group) < x.shape[-1] <= blocks * 128 or x.dtype.itemsize != 2:
        raise ValueError(
            f"tidal: x must have a 16-bit format and the {blocks * 128} columns of int4 weights, or less where their "
            f"last block isn't full; found {x.dtype} {tuple(x.shape)}"
        )


@torch.library.custom_op("tidal::dense_weight", mutates_args=(), device_types="cuda")
def dense_weight(held: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The weight `[N, columns]` that int8 or int4 numbers stand for (see `linear`), in the scales' dtype."""
    from .triton import int4

    if held.dtype == torch.int16:
        return int4.dense_weight(held, scales, columns)
    return reference.dense_weight(held, scales, columns).to(scales.dtype)


@dense_weight.register_kernel("cpu")
def _(held, scales, columns):
    return reference.dense_weight(held, scales, columns).to(scales.dtype)


@dense_weight.register_fake
def _(held, scales, columns):
    return scales.new_empty(reference.num_rows(held), columns)


def _check(given: Call | Selection | Method) -> None:
    """Raise ValueError for what an op can't take."""
    if isinstance(given, Call):
        _check_call(given)
    elif isinstance(given, Selection):
        _check_selection(given)


def _check_call(call: Call) -> None:
    q, k, v = call.query, call.key, call.value
    if q.dim() != 4 or not 1 <= q.shape[2] <= MOST_TOKENS:
        raise ValueError(f"tidal: query must be [B, Hq, T, D] with T from 1 to {MOST_TOKENS}; found {tuple(q.shape)}")
    if k.dim() != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"tidal: key and value must be [B, Hkv, S, D] with B and D as in query {tuple(q.shape)}; found "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"tidal: {q.shape[1]} query heads are not a multiple of {k.shape[1]} kv heads")
    stored = q.dtype if call.scales is None else torch.uint8
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or k.dtype != stored or v.dtype != stored:
        raise ValueError(
            f"tidal: query, key and value must share one of float32, float16, bfloat16, or with scales key and value "
            f"must be uint8, the bytes of float8; found {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if call.scales is not None and (
        call.scales.dtype != torch.bfloat16 or call.scales.shape != (*k.shape[:3], 2) or k.shape[3] % 2
    ):
        raise ValueError(
            f"tidal: scales must be bfloat16 [B, Hkv, S, 2] as in key {tuple(k.shape)}, whose last size is even; found "
            f"{call.scales.dtype} {tuple(call.scales.shape)}"
        )
    if call.length.numel() != 1 or call.length.dtype != torch.int64:
        raise ValueError(f"tidal: length must be one int64; found {call.length.dtype} {tuple(call.length.shape)}")
    mask = call.mask
    if mask is not None and (
        not (mask.dtype == torch.bool or mask.is_floating_point())
        or mask.dim() != 4
        or mask.shape[0] not in (1, q.shape[0])
        or mask.shape[1:] not in ((1, 1, k.shape[2]), (1, q.shape[2], k.shape[2]))
    ):
        raise ValueError(
            f"tidal: mask must be bool or floating [B or 1, 1, 1 or T, {k.shape[2]}] for query {tuple(q.shape)}; found "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    logit = call.sink_logit
    if logit is not None and (logit.shape != (q.shape[1],) or not logit.is_floating_point()):
        raise ValueError(
            f"tidal: sink_logit must be one number a query head [{q.shape[1]}], floating; found {logit.dtype} "
            f"{tuple(logit.shape)}"
        )
    if call.softcap < 0.0:
        raise ValueError(f"tidal: softcap must be positive, or 0 for none; found {call.softcap}")


def _check_selection(selection: Selection) -> None:
    for name, valid in (("share", SHARES), ("pool", POOLS)):
        if getattr(selection, name) not in valid:
            raise ValueError(f"tidal: {name} must be one of {', '.join(valid)}; found {getattr(selection, name)!r}")
    budget, sinks, recent = selection.budget, selection.sinks, selection.recent
    if budget < 1 or sinks < 0 or recent < 0 or sinks + recent > budget:
        raise ValueError(
            f"tidal: budget {budget} must be 1 or more, and at least sinks + recent, which must not be negative; found "
            f"sinks {sinks} and recent {recent}"
        )
    if not 0.0 <= selection.ratio <= 1.0:
        raise ValueError(f"tidal: ratio must be from 0 to 1; found {selection.ratio}")

"""`by: lsh, place: cpu`: a layer whose keys, values and hash tables are in host memory, and whose sample is read there.

prepare      after a prefill, before the step: hash the keys on the device, and sort them into tables on the host
connect      before the first step of a graph: memory through which GPU and host exchange what a step needs
attend       the sample on the host, and meanwhile sinks, recent and decoded tokens on the device; both are merged

On a GPU the host's part of a step is a function that CUDA calls between two copies, on a stream of its own: a CUDA
graph records it as a node, so that a step needs no Python.
"""

import ctypes
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import reference
from ..call import Call, Selection
from ..methods.lsh import Lsh
from . import Arguments, Store, arguments, entry_point, fill
from . import attend as attend_on_host
from .memory import as_cpu, call_driver, is_host, zeros

CHUNK = 2**24  # sides of hyperplanes that are looked at in one go


@dataclass(frozen=True)
class Exchange:
    """What the GPU and the host tell each other in a step of one layer, in page-locked memory."""

    query: Tensor  # [B, Hq, D]
    codes: Tensor  # [B, Hq, L] int16
    span: Tensor  # [B, 2] int64
    valid: Tensor | None  # [B, S] bool
    bias: Tensor | None  # [B, S] float32
    out: Tensor  # [B, Hq, D] float32
    lse: Tensor  # [B, Hq] float32
    call: Arguments


_exchanges: dict[tuple, Exchange] = {}  # by what `_seen_by_a_graph` says: for good, as graphs hold their addresses
_mirrors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of keys and values that a GPU holds, page-locked
_streams: dict[torch.device, torch.cuda.Stream] = {}


def table_words(method: Lsh, batch: int, num_kv_heads: int, slots: int) -> tuple[int, int, int]:
    """How many int32 the span, the starts and the ids of a `Store` take."""
    ids = batch * num_kv_heads * method.l * slots
    return 4 * batch, batch * num_kv_heads * method.l * (2**method.k + 1), ids if _is_wide(slots) else -(-ids // 2)


def store_of(call: Call[Tensor], method: Lsh, tables: Tensor) -> Store:
    """The store whose numbers are in `tables`, int32 of `table_words`."""
    batch, num_kv_heads, slots, _ = call.key.shape
    span, starts, ids = as_cpu(tables).split(table_words(method, batch, num_kv_heads, slots))
    of_heads = batch, num_kv_heads, method.l
    ids = ids.view(torch.uint32 if _is_wide(slots) else torch.uint16)
    return Store(
        _in_host_memory(call.key), _in_host_memory(call.value), method.k, method.l,
        starts=starts.view(torch.uint32).view(*of_heads, -1),
        ids=ids[: batch * num_kv_heads * method.l * slots].view(*of_heads, slots),
        span=span.view(torch.int64).view(batch, 2),
    )  # fmt: skip


def _in_host_memory(tensor: Tensor) -> Tensor:
    """Keys or values as the host reads them."""
    return as_cpu(tensor if is_host(tensor) else _mirrors[tensor])


def _mirror(tensor: Tensor) -> Tensor:
    """The host's copy of keys or values on the GPU: a prompt's, since later tokens are not read there."""
    if tensor not in _mirrors:
        warnings.warn(
            "place: cpu: the cache is on the GPU, so that its keys and values are held twice; tidal_compile.HostCache "
            "holds those of such layers in host memory alone",
            stacklevel=2,
        )
        _mirrors[tensor] = zeros(tuple(tensor.shape), tensor.dtype, tensor.device)
    return _mirrors[tensor]


def _is_wide(slots: int) -> bool:
    return slots > 2**16


def prepare(
    call: Call[Tensor], selection: Selection, method: Lsh, planes: Tensor, center: Tensor, tables: Tensor, since: Tensor
) -> None:
    """The mean of the keys, their tables, and from when on tokens are decoded ones.

    Raises ValueError for keys in a dtype that the host doesn't attend in.
    """
    if call.key.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"place: cpu: the cache is {call.key.dtype}; the host attends in bfloat16 or float32")
    batch, num_kv_heads, slots, _ = call.key.shape
    live = min(int(call.length), slots)
    for tensor in (call.key, call.value):
        if not is_host(tensor):
            _mirror(tensor)[:, :, :live] = tensor[:, :, :live]
    seen = reference.seen(call)[:, 0]  # [B, S]
    dynamic = seen & ~reference.always_kept(seen, selection)
    dynamic[:, max(0, live - 1) :] = False  # the newest token's key isn't there yet
    flat = planes.flatten(0, 1).float()  # [l k, D]
    size = max(1, CHUNK // (batch * num_kv_heads * flat.shape[0]))
    chunks = [slice(first, min(first + size, live)) for first in range(0, live, size)]

    total = torch.zeros_like(center)
    for some in chunks:
        total += call.key[:, :, some].float().masked_fill(~dynamic[:, None, some, None], 0.0).sum(2)
    center.copy_(total / dynamic.sum(1).clamp(min=1)[:, None, None])

    offset = (center.to(flat.device) @ flat.mT)[..., None]  # [B, Hkv, l k, 1]
    codes = torch.empty(batch, num_kv_heads, slots, method.l, dtype=torch.int16)
    for some in chunks:
        sides = flat @ call.key[:, :, some].float().mT > offset  # [B, Hkv, l k, n]
        codes[:, :, some] = _packed(sides.mT, method).cpu()
    # All of them: which ones are of interest a step says, whose mask and sinks may be others
    fill(store_of(call, method, tables), codes, [0] * batch, [max(0, live - 1)] * batch)
    since.fill_(live)


def _packed(sides: Tensor, method: Lsh) -> Tensor:
    """Codes `[..., l]` int16 of sides `[..., l k]` bool."""
    bits = torch.arange(method.k, device=sides.device, dtype=torch.int16)
    return (sides.unflatten(-1, (method.l, method.k)).to(torch.int16) << bits).sum(-1, dtype=torch.int16)


def query_codes(query: Tensor, planes: Tensor, method: Lsh) -> Tensor:
    """`[B, Hq, l]` int16, of a query `[B, Hq, 1, D]`."""
    return _packed(query[:, :, 0].float() @ planes.flatten(0, 1).float().mT > 0, method)


def connect(call: Call[Tensor], method: Lsh, center: Tensor, tables: Tensor) -> None:
    """Have an exchange ready for the steps of a graph that makes this call, which may be recorded.

    Another cache may get the memory of one that is gone, and an old graph with it, which then finds its addresses here.
    """
    if not call.key.is_cuda:
        return
    where = _seen_by_a_graph(call, method, tables)
    if where not in _exchanges:
        _exchanges[where] = _exchange(call, method)
        _streams.setdefault(call.key.device, torch.cuda.Stream(call.key.device))
    exchange = _exchanges[where]
    ready = arguments(
        store_of(call, method, tables), exchange.query, exchange.codes, as_cpu(center), exchange.valid, exchange.out,
        exchange.lse, call.scale, call.softcap, method.threshold, method.epsilon, torch.get_num_threads(),
        bias=exchange.bias, span=exchange.span,
    )  # fmt: skip
    torch.cuda.synchronize(call.key.device)  # a step may still read what is written now
    ctypes.memmove(ctypes.addressof(exchange.call), ctypes.addressof(ready), ctypes.sizeof(ready))
    exchange.call.tensors = ready.tensors


def _exchange(call: Call[Tensor], method: Lsh) -> Exchange:
    batch, num_heads, _, head_dim = call.query.shape
    slots = call.key.shape[2]

    def pinned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    return Exchange(
        query=pinned(batch, num_heads, head_dim, dtype=call.query.dtype),
        codes=pinned(batch, num_heads, method.l, dtype=torch.int16),
        span=pinned(batch, 2, dtype=torch.int64),
        valid=None if call.mask is None else pinned(batch, slots, dtype=torch.bool),
        bias=pinned(batch, slots) if call.mask is not None and call.mask.is_floating_point() else None,
        out=pinned(batch, num_heads, head_dim),
        lse=pinned(batch, num_heads),
        call=Arguments(),
    )


def _seen_by_a_graph(call: Call[Tensor], method: Lsh, tables: Tensor) -> tuple:
    """Of a layer's tensors and of the call, what a CUDA graph of it rests on."""
    addresses = tables.data_ptr(), call.key.data_ptr(), call.value.data_ptr()
    mask = call.mask is None or call.mask.dtype
    return *addresses, tuple(call.query.shape), call.key.shape, mask, call.scale, call.softcap, method


def attend(
    call: Call[Tensor], selection: Selection, method: Lsh, planes: Tensor, center: Tensor, tables: Tensor,
    since: Tensor,
) -> Tensor:  # fmt: skip
    """Attention `[B, Hq, 1, D]` on a CPU, after `prepare`."""
    batch, num_heads, _, head_dim = call.query.shape
    live = min(int(call.length), call.key.shape[2])
    since.clamp_(max=live)
    seen = reference.seen(call)[:, 0, :live]
    static = reference.always_kept(seen, selection) | (seen & (torch.arange(live) >= since[0] - 1))
    of_interest, slot = seen & ~static, torch.arange(live)
    first = slot.where(of_interest, live).amin(1) if live else torch.zeros(batch, dtype=torch.long)
    last = (slot + 1).where(of_interest, 0).amax(1) if live else first
    valid, bias = _visible(call)
    store = store_of(call, method, tables)
    span = torch.stack([first, torch.minimum(last, store.span[:, 1])], 1)
    out, lse = torch.empty(batch, num_heads, head_dim), torch.empty(batch, num_heads)
    attend_on_host(
        store, call.query[:, :, 0].contiguous(), query_codes(call.query, planes, method), center, valid, out, lse,
        call.scale, call.softcap, method.threshold, method.epsilon, torch.get_num_threads(), bias=bias, span=span,
    )  # fmt: skip
    columns = static.any(0).nonzero()[:, 0]
    some = replace(
        call, key=call.key[:, :, columns], value=call.value[:, :, columns], length=torch.tensor(len(columns)),
        mask=None if call.mask is None else call.mask[..., columns],
    )  # fmt: skip
    scores = reference.score_live_tokens(some).masked_fill(~static[:, None, None, None, columns], -torch.inf)
    scores = scores.flatten(1, 2)[:, :, 0]  # [B, Hq, m]
    values = some.value.float().repeat_interleave(num_heads // call.key.shape[1], 1)
    parts = [(lse, out), (scores.logsumexp(-1), (scores.softmax(-1).nan_to_num(0.0)[:, :, None] @ values)[:, :, 0])]
    if call.sink_logit is not None:
        parts.append((call.sink_logit.float().expand(batch, -1), torch.zeros_like(out)))
    weights = torch.stack([one for one, _ in parts]).softmax(0).nan_to_num(0.0)  # [parts, B, Hq]
    merged = sum(weight[..., None] * part for weight, (_, part) in zip(weights, parts, strict=True))
    return merged[:, :, None].to(call.query.dtype)


def _visible(call: Call[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens the mask lets see `[B, S]` bool, and what it adds to scores, float32."""
    if call.mask is None:
        return None, None
    mask = call.mask.expand(call.query.shape[0], 1, 1, call.key.shape[2])[:, 0, 0]
    bias = mask.float().contiguous() if mask.is_floating_point() else None
    return (~reference.hidden(mask)).contiguous(), bias


def attend_beside_gpu(
    call: Call[Tensor], selection: Selection, method: Lsh, planes: Tensor, center: Tensor, tables: Tensor,
    since: Tensor, log_weights: Tensor,
) -> Tensor:  # fmt: skip
    """`attend` for a cache on a GPU. A CUDA graph may record it."""
    from ..triton import lsh

    exchange, side = _exchanges[_seen_by_a_graph(call, method, tables)], _streams[call.key.device]
    edges = lsh.edges(call, selection, method, center, since)  # [B, 2]
    first, last = edges.long().unbind(1)
    span = torch.stack([first, last.minimum(since[0].minimum(call.length) - 1)], 1)
    there = [(exchange.query, call.query.contiguous()), (exchange.codes, query_codes(call.query, planes, method))]
    there += [(exchange.span, span), *zip((exchange.valid, exchange.bias), _visible(call), strict=True)]
    there = [(host, device) for host, device in there if host is not None]
    back = [(torch.empty_like(host, device=call.key.device), host) for host in (exchange.out, exchange.lse)]

    side.wait_stream(torch.cuda.current_stream())
    for host, device in there:
        _copy(host, device, side)
    call_driver(
        "cuLaunchHostFunc", ctypes.c_void_p(side.cuda_stream), entry_point(), ctypes.addressof(exchange.call)
    )  # fmt: skip
    for device, host in back:
        _copy(device, host, side)
    splits = lsh.attend_to_static(call, method, center, since, log_weights, edges)
    torch.cuda.current_stream().wait_stream(side)
    return lsh.merge_with(splits, *(device for device, _ in back), call)


def _copy(into: Tensor, of: Tensor, stream: torch.cuda.Stream) -> None:
    assert into.nbytes == of.nbytes and of.is_contiguous()
    call_driver("cuMemcpyAsync", into.data_ptr(), of.data_ptr(), of.nbytes, ctypes.c_void_p(stream.cuda_stream))

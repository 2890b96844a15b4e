"""Find the attention calls of a decode graph.

Graph in: what Dynamo captured from one decode step, of T tokens, of a Hugging Face model with a static cache,

    cumulative_length.add_(T)
    keys.index_copy_(2, position, new_key);  values.index_copy_(2, position, new_value)
    attention(q, repeat_kv(keys), repeat_kv(values), mask, scale)        in one of the spellings of `forms`

where `keys`, `values` and `cumulative_length` are graph inputs that come from `...layers[i]` of the cache. `repeat_kv`
is `reshape(expand(x[:, :, None]))`, or missing (one query head a kv head, or `enable_gqa=True`). Those of an `Fp8Cache`
are bytes, and what attention gets is `(keys.view(float8).to(dtype) * scales[..., 0:1]).to(dtype)`, for values `1:2`.

Out: an `AttentionSite` for every call of that form, an `Unmatched` with the reason for every other. Changes nothing.
A mask that only says which slots are live is left out of the call: see `masks`.
"""

import operator
import re
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..kernels.call import MOST_TOKENS, Call
from . import compat
from .compat import free_unbacked_symbols, note_cache_layers, rank_in
from .compat import source_of as _source
from .forms import NoMatch, is_method, is_sdpa, is_softmax, query_length, read_call, shape, target_name
from .masks import repeats_length
from .roles import Ranks

CACHE_LAYER = re.compile(r"\.layers\[(\d+)\]\.keys$")
LAYER = re.compile(r"\.layers\[(\d+)\]\.\w+$|(?:\.layers|\.h|\.blocks)\.(\d+)$")  # of a cache, or of a module
CACHED = re.compile(r"past_key_value|cache", re.IGNORECASE)
PROJECTIONS = {"linear", "matmul", "addmm", "bmm", "einsum", "conv1d"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ATTENTION_MODULE = re.compile(r"\.(\d+)\.(?:[a-z_.]+\.)?(?:self_attn|self_attention|attention|attn|mixer)$")


@dataclass(frozen=True)
class AttentionSite:
    """One attention call that can be rewritten, over the cache of one layer.

    `node` is what the call returns. `ranks`: who has the layer's other heads, under tensor parallelism.
    """

    layer: int
    node: fx.Node
    call: Call[fx.Node]
    ranks: Ranks | None = None

    @property
    def num_tokens(self) -> int:
        """Query tokens."""
        return int(shape(self.call.query)[2])

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return shape(self.call.query)[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cache."""
        return shape(self.call.key)[1]


@dataclass(frozen=True)
class Unmatched:
    """One attention call that is left as it is.

    `kind`: `tokens` (no decode step: many query tokens, or nothing cached yet), `sliding` (a window is small by
    itself) or `unsupported`.
    """

    layer: int | None
    node: fx.Node
    reason: str
    kind: str = "unsupported"


def find_attention(gm: fx.GraphModule) -> list[AttentionSite | Unmatched]:
    """Every attention call of the graph, in order.

    A call is numbered by the cache layer that it is the first to read: a model may run the same modules in cycles, each
    time with another cache layer (HRM). Later readers of a cache layer have their module's number: modules may share a
    cache layer, too (Gemma 4).
    """
    note_cache_layers(gm)
    found: list[AttentionSite | Unmatched] = []
    groups = _groups(gm)
    read: set[str] = set()
    useless: dict[fx.Node | None, bool] = {None: False}  # masks that say what the live length says
    for node in gm.graph.nodes:
        if not _is_attention(node):
            continue
        layer = _layer_of(node)
        try:
            _check_tokens(node)
            keys = _cached_keys(node)
            if keys not in read and (match := CACHE_LAYER.search(keys)):
                layer = int(match[1])
            read.add(keys)
            site = _match(node, layer)
            if site.layer in {one.layer for one in found if isinstance(one, AttentionSite)}:
                raise NoMatch(f"a second attention call of layer {site.layer}")
            mask = site.call.mask
            if mask not in useless:
                useless[mask] = repeats_length(mask, site.num_tokens, shape(site.call.key)[2])
            call = replace(site.call, mask=None) if useless[mask] else site.call
            group, width = groups.get(_layer_of(node), (None, 0))
            divided = group is not None and width in (None, site.num_heads * shape(site.call.value)[3])
            found.append(replace(site, call=call, ranks=Ranks(group, *rank_in(group)) if divided else None))
        except NoMatch as problem:
            found.append(Unmatched(layer, node, str(problem), problem.kind))
    return found


def rank_group(gm: fx.GraphModule) -> str | None:
    """The process group of a tensor-parallel model's graph."""
    return next((group for group, _ in _groups(gm).values()), None)


def _groups(gm: fx.GraphModule) -> dict[int | None, tuple[str, int | None]]:
    """The process group in which the attention of each layer ends by a sum, as that of a tensor-parallel model does.

    And how many features go into the product that is summed, if it can be told: those of a rank's own heads; or fewer,
    where each rank has all heads and only this product is divided (Phi 3, OLMo 2).
    """
    sums = [node for node in gm.graph.nodes if "_c10d_functional.all_reduce" in str(node.target)]
    found: dict[int | None, tuple[str, int | None]] = {}
    for node in sums:
        if (layer := _layer_of(node)) is None:
            continue
        product = node.args[0]
        while target_name(product) not in PROJECTIONS and len(product.all_input_nodes) == 1:
            product = product.all_input_nodes[0]
        width = shape(product.args[0])[-1] if target_name(product) in PROJECTIONS else None
        found[layer] = node.args[2], width
    return found


def policy_layers(calls: list[AttentionSite | Unmatched]) -> tuple[int, ...]:
    """The layers that a preset counts: those with attention that is not a sliding window."""
    found = {call.layer for call in calls if isinstance(call, AttentionSite) or call.kind != "sliding"}
    return tuple(sorted(found - {None}))


def count_layers(gm: fx.GraphModule) -> int:
    """The decoder layers of the model, by the cache layers and modules that the graph touches."""
    names = {_source(node) for node in gm.graph.nodes if node.op == "placeholder"}
    names |= {path for node in gm.graph.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
    layers = [int(next(filter(None, match.groups()))) for name in names if (match := LAYER.search(name))]
    return max(layers, default=-1) + 1


def _check_tokens(node: fx.Node) -> None:
    """Raises `NoMatch` where an attention call has more query tokens than a decode step."""
    query_len = query_length(node)
    if isinstance(query_len, torch.SymInt) and free_unbacked_symbols(query_len):
        raise NoMatch("the number of query tokens depends on data; pass attention_mask to the model")
    if query_len is not None and query_len > MOST_TOKENS:  # for a symbol, Dynamo guards the answer
        raise NoMatch(f"{query_len} query tokens, as in a prefill: left exact", "tokens")


def _match(node: fx.Node, layer: int | None) -> AttentionSite:
    """The call at a node, as one of this layer; None: of its cache layer. Raises `NoMatch`."""
    output, call = read_call(node)
    if _slides(node):
        raise NoMatch("sliding-window layer: left as it is", "sliding")
    batch, num_heads, tokens, head_dim = shape(call.query)
    tokens = int(tokens)  # each number of a few tokens is a graph of its own
    key, key_layer, scales = _cache_input(call.key, "keys", num_heads, layer)
    value, value_layer, value_scales = _cache_input(call.value, "values", num_heads, layer)
    if key_layer != value_layer or scales is not value_scales:
        raise NoMatch(f"keys of layer {key_layer}, but values of layer {value_layer}")
    if shape(key) != shape(value) or shape(key)[0] != batch or shape(key)[3] != head_dim:
        raise NoMatch(f"q {shape(call.query)}, keys {shape(key)} and values {shape(value)} don't go together")
    dtypes = [one.meta["example_value"].dtype for one in (call.query, key, value)]
    if dtypes[0] not in DTYPES or (scales is None and len(set(dtypes)) > 1):
        raise NoMatch(f"q, keys and values are {dtypes}; one of {', '.join(map(str, DTYPES))} for all is supported")
    if scales is not None and head_dim % 2:
        raise NoMatch(f"a cache in float8 with heads of {head_dim} numbers; even numbers are supported")
    if scales is not None and not compat.has_float8(key.meta["example_value"].device):
        raise NoMatch("a cache in float8 takes a GPU of compute capability 8.9 (Ada, Hopper) or more")
    mask = _checked_mask(call.mask, shape(key), tokens)
    call = replace(call, key=key, value=value, length=_live_length(node, key, tokens), mask=mask, scales=scales)
    return AttentionSite(key_layer if layer is None else layer, output, call)


def _cache_input(node: fx.Node, name: str, num_heads: int, layer: int | None) -> tuple[fx.Node, int, fx.Node | None]:
    """The cache input behind an argument of the call, `repeat_kv` stripped, its layer, and its scales in float8."""
    base = _strip_identity(_strip_repeat(_strip_identity(node)))
    base, scales = _strip_scales(base, name)
    match = re.search(rf"\.layers\[(\d+)\]\.{name}$", _source(base)) if base.op == "placeholder" else None
    if match is None:
        raise _not_from_a_static_cache(base, name, layer)
    kv_heads = shape(base)[1]
    if num_heads % kv_heads:
        raise NoMatch(f"{num_heads} query heads over {kv_heads} kv heads")
    writes = [user for user in base.users if is_method(user, "index_copy_")]
    if len(writes) != 1 or writes[0].args[1] != 2:
        raise NoMatch(f"the {name} are written by {len(writes)} index_copy_ on the token dimension, 1 is expected")
    return base, int(match[1]), scales


def _strip_scales(node: fx.Node, name: str) -> tuple[fx.Node, fx.Node | None]:
    """The bytes behind `cache.as_numbers`, and the scales; or the node itself, and None."""
    product = node.args[0] if is_method(node, "to") else node
    if not isinstance(product, fx.Node) or product.target is not operator.mul:
        return node, None
    number, scale = product.args
    viewed = number.args[0] if is_method(number, "to") else None
    of_one = scale.args if isinstance(scale, fx.Node) and scale.target is operator.getitem else (None, None)
    which = ("keys", "values").index(name)
    is_scale = of_one[1] == (Ellipsis, slice(which, which + 1, None))
    if not is_method(viewed, "view") or viewed.args[1] != torch.float8_e4m3fn or not is_scale:
        return node, None
    return viewed.args[0], of_one[0]


def _strip_identity(node: fx.Node) -> fx.Node:
    """The tensor behind `to` and `contiguous` where they change nothing."""
    while node.op == "call_method" and node.target in ("to", "contiguous"):
        before, after = (one.meta["example_value"] for one in (node.args[0], node))
        if (before.dtype, before.device, before.stride()) != (after.dtype, after.device, after.stride()):
            break
        node = node.args[0]
    return node


def _strip_repeat(node: fx.Node) -> fx.Node:
    """The tensor `[B, Hkv, S, D]` behind Hugging Face's `repeat_kv`, or the node itself."""
    expanded = node.args[0] if node.op == "call_method" and node.target == "reshape" else None
    split = expanded.args[0] if is_method(expanded, "expand") else None
    if split is None or split.op != "call_function" or split.target is not operator.getitem:
        return node
    base, where = split.args
    every = slice(None, None, None)
    if where not in ((every, every, None, every, every), (every, every, None)):
        return node
    batch, kv_heads, slots, head_dim = shape(base)
    copies = shape(expanded)[2]
    unrepeated = shape(expanded) == (batch, kv_heads, copies, slots, head_dim)
    return base if unrepeated and shape(node) == (batch, kv_heads * copies, slots, head_dim) else node


def _live_length(site: fx.Node, key: fx.Node, tokens: int) -> fx.Node:
    """The cache layer's token counter, which already counts the new tokens when attention runs."""
    wanted = re.sub(r"\.keys$", ".cumulative_length", _source(key))
    for node in site.graph.nodes:
        if node.op == "placeholder" and _source(node) == wanted:
            steps = [user for user in node.users if is_method(user, "add_")]
            added = steps[0].args[1] if len(steps) == 1 else None
            if isinstance(added, fx.Node):
                added = added.meta["example_value"]
            if added != tokens:
                raise NoMatch(f"{wanted} is not advanced by {tokens}, the number of query tokens")
            return node
    raise NoMatch(f"the cache layer has no token counter ({wanted})")


def _not_from_a_static_cache(base: fx.Node, name: str, layer: int | None) -> NoMatch:
    """Say what the keys or values of a call are instead."""
    origin = _source(base)
    if base.op != "placeholder":
        origin = f"computed in the graph ({target_name(base)})"
        way = _way_from_cache(base, layer)
        if way is None:
            return NoMatch("nothing is cached yet: left exact", "tokens")
        if "linear" in way or "matmul" in way:
            return NoMatch(f"the {name} are computed from what the cache holds (multi-head latent attention)")
        if "cat" not in way:
            return NoMatch(f"the {name} are computed from what the cache holds ({', '.join(way[:-1])})")
    return NoMatch(
        f"the {name} are not read from a static cache, but {origin}; "
        "fill a StaticCache by a prefill first, or generate(cache_implementation='static')"
    )


def _way_from_cache(node: fx.Node, layer: int | None) -> list[str] | None:
    """The operations that lead from something cached for this layer to a node; None: nothing does.

    What another layer cached counts if no projection lies between: it reaches every later layer through hidden states.
    """
    ways = {node: [target_name(node)]}
    queue = [node]
    for here in queue:
        source = _source(here)
        cached = CACHED.search(source) and not source.endswith(".cumulative_length")
        own = layer is None or LAYER.search(source) is None or f".layers[{layer}]." in source
        if cached and (own or not PROJECTIONS & set(ways[here])):
            return ways[here]
        for before in here.all_input_nodes:
            if before not in ways:
                ways[before] = [*ways[here], target_name(before)]
                queue.append(before)
    return None


def _checked_mask(mask: fx.Node | None, cache_shape: tuple, tokens: int) -> fx.Node | None:
    """The mask, if the ops can take it: bool or additive, `[B or 1, 1, 1 or T, S]`, before it was expanded.

    Inductor would write the expanded one anew for every call.
    """
    if mask is None:
        return None
    value = mask.meta["example_value"]
    if value.dtype != torch.bool and not value.is_floating_point():
        raise NoMatch(f"a {value.dtype} mask; bool and floating masks are supported")
    found = tuple(value.shape)
    fits = len(found) == 4 and found[0] in (1, cache_shape[0]) and found[2] in (1, tokens)
    if not fits or (found[1], found[3]) != (1, cache_shape[2]):
        raise NoMatch(f"a mask of shape {found} over a cache of {cache_shape[2]} slots; one for all heads is supported")
    while is_method(mask, "expand") and len(shape(mask.args[0])) == 4 and shape(mask.args[0])[1:] == found[1:]:
        mask = mask.args[0]
    return mask


def _slides(node: fx.Node) -> bool:
    """Whether an attention call reads a sliding-window layer of the cache, by the class of that layer."""
    keys = _cache_of(node)
    if keys is None:
        return False
    if compat.CACHE_LAYER not in keys.meta:
        raise NoMatch("the class of its cache layer is known only while Dynamo traces the step")
    return getattr(keys.meta[compat.CACHE_LAYER], "is_sliding", False)


def _cached_keys(node: fx.Node) -> str:
    """The source of the cache's keys that an attention call reads; "" if it can't be told."""
    keys = _cache_of(node)
    return "" if keys is None else _source(keys)


def _cache_of(node: fx.Node) -> fx.Node | None:
    """The cache's keys that an attention call reads, through views and copies; None if it can't be told."""
    try:
        keys = read_call(node)[1].key
    except NoMatch:
        return None
    for _ in range(12):  # repeat_kv, scales, casts and copies are fewer
        if keys.op == "placeholder" or not keys.all_input_nodes:
            break
        keys = keys.all_input_nodes[0]
    return keys if keys.op == "placeholder" and _source(keys).endswith(".keys") else None


def _is_attention(node: fx.Node) -> bool:
    """Attention kernels; and, as it may be eager attention, a softmax inside an attention module."""
    if node.op not in ("call_function", "call_method"):
        return False
    if is_sdpa(node) or "flex_attention" in target_name(node) or "flash_attn" in target_name(node):
        return True
    return is_softmax(node) and len(shape(node)) == 4 and _layer_of(node) is not None


def _layer_of(node: fx.Node) -> int | None:
    """The layer whose attention module the node was traced in."""
    for path, _ in reversed(node.meta.get("nn_module_stack", {}).values()):
        if match := ATTENTION_MODULE.search(path):
            return int(match[1])
    return None

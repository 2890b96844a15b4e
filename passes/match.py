"""Find the attention calls of a decode graph.

Graph in: what Dynamo captured from one decode step of a Hugging Face model with a static cache,

    cumulative_length.add_(1)
    keys.index_copy_(2, position, new_key);  values.index_copy_(2, position, new_value)
    scaled_dot_product_attention(q, repeat_kv(keys), repeat_kv(values), attn_mask=mask, scale=scale)

where `keys`, `values` and `cumulative_length` are graph inputs that come from `...layers[i]` of the cache. `repeat_kv`
is `reshape(expand(x[:, :, None]))`, or missing (one query head a kv head, or `enable_gqa=True`).

Out: an `AttentionSite` for every call of that form, an `Unmatched` with the reason for every other. Changes nothing.
"""

import operator
import re
from dataclasses import dataclass

import torch
from torch import fx

SDPA = torch.nn.functional.scaled_dot_product_attention
LAYER = re.compile(r"\.layers\[(\d+)\]\.\w+$|(?:\.layers|\.h|\.blocks)\.(\d+)$")  # of a cache, or of a module
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ATTENTION_MODULE = re.compile(r"\.(\d+)\.(?:self_attn|self_attention|attention|attn)$")


@dataclass(frozen=True)
class AttentionSite:
    """One attention call that can be rewritten: q `[B, Hq, 1, D]` over the cache `[B, Hkv, S, D]` of one layer."""

    layer: int
    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    length: fx.Node
    mask: fx.Node | None
    scale: float


@dataclass(frozen=True)
class Unmatched:
    """One attention call that is left as it is.

    `kind`: `tokens` (several query tokens, as in prefill: no decode step), `sliding` (a window is small by itself) or
    `unsupported`.
    """

    layer: int | None
    node: fx.Node
    reason: str
    kind: str = "unsupported"


class _NoMatch(Exception):
    def __init__(self, reason: str, kind: str = "unsupported"):
        super().__init__(reason)
        self.kind = kind


def find_attention(gm: fx.GraphModule) -> list[AttentionSite | Unmatched]:
    """Every attention call of the graph, in order."""
    found: list[AttentionSite | Unmatched] = []
    for node in gm.graph.nodes:
        if not _is_attention(node):
            continue
        try:
            found.append(_match(node))
        except _NoMatch as problem:
            found.append(Unmatched(_layer_of(node), node, str(problem), problem.kind))
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


def _match(node: fx.Node) -> AttentionSite:
    if node.target is not SDPA:
        form = "eager (softmax)" if _target_name(node) == "softmax" else _target_name(node)
        raise _NoMatch(
            f"attention in {form} form; load the model with attn_implementation='sdpa' if it has that "
            "(soft-capped attention and attention sinks do not, and are not supported)"
        )
    args = _sdpa_arguments(node)
    query = args["query"]
    batch, num_heads, query_len, head_dim = _shape(query)
    if query_len != 1:
        raise _NoMatch(f"{query_len} query tokens (prefill, or several tokens at once): left exact", "tokens")
    if _slides(args["key"]):
        raise _NoMatch("sliding-window layer: left as it is", "sliding")
    if args["is_causal"] or args["dropout_p"]:
        raise _NoMatch(f"is_causal={args['is_causal']}, dropout_p={args['dropout_p']}: a decode step has neither")

    key, key_layer = _cache_input(args["key"], "keys", num_heads)
    value, value_layer = _cache_input(args["value"], "values", num_heads)
    module_layer = _layer_of(node)
    if key_layer != value_layer or module_layer not in (None, key_layer):
        raise _NoMatch(
            f"keys of layer {key_layer}, values of layer {value_layer}, in the module of layer {module_layer}"
        )
    if _shape(key) != _shape(value) or _shape(key)[0] != batch or _shape(key)[3] != head_dim:
        raise _NoMatch(f"q {_shape(query)}, keys {_shape(key)} and values {_shape(value)} don't go together")
    dtypes = [one.meta["example_value"].dtype for one in (query, key, value)]
    if dtypes[0] not in DTYPES or len(set(dtypes)) > 1:
        raise _NoMatch(f"q, keys and values are {dtypes}; one of {', '.join(map(str, DTYPES))} for all is supported")
    return AttentionSite(
        layer=key_layer,
        node=node,
        query=query,
        key=key,
        value=value,
        length=_live_length(node, key),
        mask=_bool_mask(args["attn_mask"], _shape(key)),
        scale=head_dim**-0.5 if args["scale"] is None else args["scale"],
    )


def _cache_input(node: fx.Node, name: str, num_heads: int) -> tuple[fx.Node, int]:
    """The cache input behind an argument of the call, `repeat_kv` stripped, and its layer."""
    base = _strip_repeat(node)
    match = re.search(rf"\.layers\[(\d+)\]\.{name}$", _source(base)) if base.op == "placeholder" else None
    if match is None:
        origin = _source(base) if base.op == "placeholder" else f"computed in the graph ({_target_name(base)})"
        raise _NoMatch(
            f"the {name} are not read from a static cache, but {origin}; "
            "fill a StaticCache by a prefill first, or generate(cache_implementation='static')"
        )
    kv_heads = _shape(base)[1]
    if num_heads % kv_heads:
        raise _NoMatch(f"{num_heads} query heads over {kv_heads} kv heads")
    writes = [user for user in base.users if _is_method(user, "index_copy_")]
    if len(writes) != 1 or writes[0].args[1] != 2:
        raise _NoMatch(f"the {name} are written by {len(writes)} index_copy_ on the token dimension, 1 is expected")
    return base, int(match[1])


def _strip_repeat(node: fx.Node) -> fx.Node:
    """The tensor `[B, Hkv, S, D]` behind Hugging Face's `repeat_kv`, or the node itself."""
    expanded = node.args[0] if node.op == "call_method" and node.target == "reshape" else None
    split = expanded.args[0] if _is_method(expanded, "expand") else None
    if split is None or split.op != "call_function" or split.target is not operator.getitem:
        return node
    base, where = split.args
    every = slice(None, None, None)
    if where not in ((every, every, None, every, every), (every, every, None)):
        return node
    batch, kv_heads, slots, head_dim = _shape(base)
    copies = _shape(expanded)[2]
    unrepeated = _shape(expanded) == (batch, kv_heads, copies, slots, head_dim)
    return base if unrepeated and _shape(node) == (batch, kv_heads * copies, slots, head_dim) else node


def _live_length(site: fx.Node, key: fx.Node) -> fx.Node:
    """The cache layer's token counter, which already counts the new token when attention runs."""
    wanted = re.sub(r"\.keys$", ".cumulative_length", _source(key))
    for node in site.graph.nodes:
        if node.op == "placeholder" and _source(node) == wanted:
            steps = [user for user in node.users if _is_method(user, "add_")]
            if len(steps) != 1 or steps[0].args[1] != 1:
                raise _NoMatch(f"{wanted} is not advanced by one token")
            return node
    raise _NoMatch(f"the cache layer has no token counter ({wanted})")


def _bool_mask(mask: fx.Node | None, cache_shape: tuple) -> fx.Node | None:
    """The mask, if the ops can take it: bool `[B or 1, 1, 1, S]`."""
    if mask is None:
        return None
    value = mask.meta["example_value"]
    if value.dtype != torch.bool:
        raise _NoMatch(f"a {value.dtype} mask or position bias; only a bool mask is supported")
    shape = tuple(value.shape)
    if len(shape) != 4 or shape[0] not in (1, cache_shape[0]) or shape[1:] != (1, 1, cache_shape[2]):
        raise _NoMatch(f"a mask of shape {shape} over a cache of {cache_shape[2]} slots")
    return mask


def _slides(keys: fx.Node) -> bool:
    """Whether the cache layer that the keys of a call come from is a sliding window.

    Such a layer overwrites its keys with `copy_` once they are full; until then it writes the new key before it
    advances its counter, where a full-attention layer advances first.
    """
    for key in _ancestors(keys):
        if key.op != "placeholder" or not _source(key).endswith(".keys"):
            continue
        if any(_is_method(user, "copy_") for user in key.users):
            return True
        counter = re.sub(r"\.keys$", ".cumulative_length", _source(key))
        order = [
            node.target
            for node in keys.graph.nodes
            if node.op == "call_method"
            and (node.target, _source(node.args[0])) in (("index_copy_", _source(key)), ("add_", counter))
        ]
        if order == ["index_copy_", "add_"]:
            return True
    return False


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """The node and what its first arguments lead back to, through views and copies only (at most eight steps)."""
    chain = [node]
    while chain[-1].op != "placeholder" and chain[-1].all_input_nodes and len(chain) < 8:
        chain.append(chain[-1].all_input_nodes[0])
    return chain


def _is_attention(node: fx.Node) -> bool:
    """Attention kernels; and, as it may be eager attention, a softmax inside an attention module."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = _target_name(node)
    if node.target is SDPA or "flex_attention" in name or "flash_attn" in name:
        return True
    return name == "softmax" and _layer_of(node) is not None


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _sdpa_arguments(node: fx.Node) -> dict:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None} | given


def _layer_of(node: fx.Node) -> int | None:
    """The layer whose attention module the node was traced in."""
    for path, _ in reversed(node.meta.get("nn_module_stack", {}).values()):
        if match := ATTENTION_MODULE.search(path):
            return int(match[1])
    return None


def _is_method(node: object, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == name


def _shape(node: fx.Node) -> tuple:
    return tuple(node.meta["example_value"].shape)


def _source(node: fx.Node) -> str:
    """Where a graph input comes from, such as `L['kwargs']['past_key_values'].layers[3].keys`."""
    source = getattr(node, "_dynamo_source", None)
    return source.name if source is not None else ""

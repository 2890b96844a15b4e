"""Layer choices that others publish, as policies.

Their roles carry over; how each system ranks tokens does not. Here a selection's own output is always exact, tokens are
ranked by attention probability, and `defaults` (`budget`, `sinks`, `recent`, `share`) say how many are kept.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import PolicyError
from .policy import Policy


def from_kascade(file: str | Path, **defaults: Any) -> Policy:
    """Anchor layers and head map of Kascade (https://arxiv.org/abs/2512.16391), from `<model>_layers_0_2_8.npy`.

    The anchors, which select, stand in the file's name; the int array `[num_layers, num_kv_heads]` in it says which kv
    head of the anchor before serves each kv head. Kascade's own budget, a tenth and at least 128 tokens with no sinks
    and no recent ones by rule, is the default; its anchors' own output is sparse, ours is exact. Raises `PolicyError`.
    """
    import numpy

    path = Path(file)
    named = re.search(r"_layers((?:_\d+)+)$", path.stem)
    if named is None:
        raise PolicyError(f"{path}: the anchor layers stand in a Kascade file's name: <model>_layers_0_2_8.npy")
    anchors = [int(layer) for layer in named[1].strip("_").split("_")]
    try:
        heads = numpy.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path}: not a .npy file with a head map: {error}") from None
    if heads.ndim != 2 or heads.dtype.kind not in "iu":
        raise PolicyError(
            f"{path}: a head map is an int array [num_layers, num_kv_heads]; found {heads.dtype} {heads.shape}"
        )
    layers: dict[int, Any] = {}
    for layer, row in enumerate(heads.tolist()):
        mapped = {"heads": row} if row != list(range(len(row))) else {}
        layers[layer] = "select" if layer in anchors else {"role": "reuse", **mapped}
    return _policy(path.stem, f"Kascade's anchors {', '.join(map(str, anchors))}", layers, anchors, path, {
        "budget": {"ratio": 0.1, "min": 128}, "sinks": 0, "recent": 0, "share": "kv_head", **defaults
    })  # fmt: skip


def from_indexer_types(types: Sequence[str] | str, **defaults: Any) -> Policy:
    """An `indexer_types` list, `["full", "shared", ...]`, or an IndexCache pattern, `"FFSF"`, of models with DeepSeek's
    sparse attention (https://arxiv.org/abs/2603.12201): full selects, shared reuses.

    One token set a layer and 2,048 tokens, as there, are the defaults. Raises `PolicyError`.
    """
    roles = {"full": "select", "f": "select", "shared": "reuse", "s": "reuse"}
    found = [str(one).lower() for one in types]
    for layer, one in enumerate(found):
        if one not in roles:
            raise PolicyError(f"indexer_types: layer {layer} is {one!r}; valid are full and shared, or F and S")
    layers = {layer: roles[one] for layer, one in enumerate(found)}
    selects = [layer for layer, role in layers.items() if role == "select"]
    return _policy("indexer-types", "full and shared layers of a DSA model", layers, selects, "indexer_types", {
        "budget": 2048, "share": "layer", **defaults
    })  # fmt: skip


def from_omnikv(filter_layers: Sequence[int], num_layers: int, **defaults: Any) -> Policy:
    """OmniKV's filter layers (ICLR 2025, https://github.com/antgroup/OmniKV): they select one token set for all heads.

    Layers before the first stay dense, and so does the layer after each, under which OmniKV fetches the tokens. OmniKV
    ranks by the largest probability over the heads, ours by their sum. Raises `PolicyError`.
    """
    chosen = sorted(filter_layers)
    layers: dict[int, Any] = {
        layer: "select" if layer in chosen
        else "full" if layer < min(chosen, default=0) or layer - 1 in chosen
        else "reuse"
        for layer in range(num_layers)
    }  # fmt: skip
    name = f"OmniKV's filter layers {', '.join(map(str, chosen))}"
    return _policy("omnikv", name, layers, chosen, "omnikv", {"share": "layer", **defaults})


def _policy(
    name: str, description: str, layers: dict[int, Any], selections: Sequence[int], where: Any, defaults: dict[str, Any]
) -> Policy:
    if not selections or not set(selections) <= set(layers):
        raise PolicyError(
            f"{where}: selections {', '.join(map(str, selections)) or 'none'}, of the {len(layers)} layers there are"
        )
    data = {"name": name, "description": description, "num_layers": len(layers), "layers": layers, "defaults": defaults}
    return Policy.from_dict(data, where=str(where))

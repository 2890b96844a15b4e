"""Policies from the layer choices that other systems publish.

Only the roles of the layers are taken over, not how a system ranks tokens. Here the attention of a select layer itself
is always exact, tokens are ranked by attention probability, and `defaults` (`budget`, `sinks`, `recent`, `share`) say
how many tokens are kept.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import PolicyError
from .policy import Policy


def from_kascade(file: str | Path, **defaults: Any) -> Policy:
    """Make a policy of Kascade's anchor layers and head map (https://arxiv.org/abs/2512.16391).

    The file's name, `<model>_layers_0_2_8.npy`, has the anchor layers, which select. The file holds an int array
    `[num_layers, num_kv_heads]`: for each kv head, the kv head of the nearest anchor before it whose tokens it takes.
    The default budget is Kascade's own: a tenth of the tokens, at least 128, without sinks or recent tokens. In
    Kascade the output of the anchors is sparse too; here it is exact. Raises `PolicyError`.
    """
    import numpy

    path = Path(file)
    match = re.search(r"_layers((?:_\d+)+)$", path.stem)
    if match is None:
        raise PolicyError(f"{path}: the anchor layers stand in a Kascade file's name: <model>_layers_0_2_8.npy")
    anchors = [int(layer) for layer in match[1].strip("_").split("_")]
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
        head_map = {"heads": row} if row != list(range(len(row))) else {}
        layers[layer] = "select" if layer in anchors else {"role": "reuse", **head_map}
    return _policy(path.stem, f"Kascade's anchors {', '.join(map(str, anchors))}", layers, anchors, path, {
        "budget": {"ratio": 0.1, "min": 128}, "sinks": 0, "recent": 0, "share": "kv_head", **defaults
    })  # fmt: skip


def from_indexer_types(types: Sequence[str] | str, **defaults: Any) -> Policy:
    """Make a policy of the shared indexers of a model with DeepSeek's sparse attention (DSA).

    `types` is the `indexer_types` of the model, `["full", "shared", ...]`, or a pattern of IndexCache, `"FFSF"`
    (https://arxiv.org/abs/2603.12201). Full layers select, shared layers reuse. By default, as in those models, the
    heads of a layer share one set of 2,048 tokens. Raises `PolicyError`.
    """
    roles = {"full": "select", "f": "select", "shared": "reuse", "s": "reuse"}
    names = [str(name).lower() for name in types]
    for layer, name in enumerate(names):
        if name not in roles:
            raise PolicyError(f"indexer_types: layer {layer} is {name!r}; valid are full and shared, or F and S")
    layers = {layer: roles[name] for layer, name in enumerate(names)}
    selections = [layer for layer, role in layers.items() if role == "select"]
    return _policy("indexer-types", "full and shared layers of a DSA model", layers, selections, "indexer_types", {
        "budget": 2048, "share": "layer", **defaults
    })  # fmt: skip


def from_omnikv(filter_layers: Sequence[int], num_layers: int, **defaults: Any) -> Policy:
    """Make a policy of OmniKV's filter layers (ICLR 2025, https://github.com/antgroup/OmniKV).

    A filter layer selects one token set for all heads. The layers before the first filter layer stay dense, and so does
    the layer after each one: while that layer runs, OmniKV fetches the tokens. OmniKV ranks tokens by the largest
    probability over the heads, this package by the sum of the probabilities. Raises `PolicyError`.
    """
    selections = sorted(filter_layers)
    layers: dict[int, Any] = {
        layer: "select" if layer in selections
        else "full" if layer < min(selections, default=0) or layer - 1 in selections
        else "reuse"
        for layer in range(num_layers)
    }  # fmt: skip
    description = f"OmniKV's filter layers {', '.join(map(str, selections))}"
    return _policy("omnikv", description, layers, selections, "omnikv", {"share": "layer", **defaults})


def _policy(
    name: str, description: str, layers: dict[int, Any], selections: Sequence[int], where: Any, defaults: dict[str, Any]
) -> Policy:
    """Check that the selections are layers of the model, and make the policy; `where` starts an error message."""
    if not selections or not set(selections) <= set(layers):
        raise PolicyError(
            f"{where}: the selections are {', '.join(map(str, selections)) or 'none'}; at least one is needed, and all "
            f"must be of the {len(layers)} layers that there are"
        )
    data = {"name": name, "description": description, "num_layers": len(layers), "layers": layers, "defaults": defaults}
    return Policy.from_dict(data, where=str(where))

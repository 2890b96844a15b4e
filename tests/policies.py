"""Policies of every kind for models of six layers."""

import torch

import tidal_compile as tc

LAYERS = {"0-1": "full", "2": "select", "3": "reuse", "4": "select", "5": "reuse"}
POLICIES = {
    "tidal-kv_head": {"defaults": {"budget": 24, "sinks": 2, "recent": 4}},
    "tidal-query_head": {"defaults": {"budget": 24, "sinks": 0, "recent": 1, "share": "query_head"}},
    "tidal-layer": {"defaults": {"budget": 24, "sinks": 2, "recent": 4, "share": "layer"}},
    "heads": {
        "defaults": {"budget": 24, "sinks": 2, "recent": 4},
        "layers": {
            "0": "full", "1": "select", "2": {"role": "reuse", "heads": [1, 0]}, "3": {"role": "reuse", "heads": [1, 1]},
            "4": {"role": "reuse", "heads": [0, 1]}, "5": {"role": "reuse", "from": 1, "heads": [1, 0]},
        },
    },
    "sparse-output": {"defaults": {"budget": 24, "sinks": 2, "recent": 4, "output": "sparse"}},
    "max-and-union": {
        "defaults": {"budget": 24, "sinks": 2, "recent": 4, "share": "layer", "pool": "union"},
        "layers": {
            "0": {"role": "select", "pool": "max", "output": "sparse"}, "1": "reuse", "2": {"role": "select", "share": "kv_head"}, "3": "reuse",
            "4": {"role": "select", "output": "sparse"}, "5": {"role": "reuse", "from": 2, "heads": [1, 0]},
        },
    },
    "ratio": {"defaults": {"budget": {"ratio": 0.25, "min": 8}, "sinks": 2, "recent": 4}},
    "mixed": {
        "defaults": {"budget": 16, "sinks": 1, "recent": 2},
        "layers": {
            "0": {"role": "select", "share": "layer"}, "1": {"role": "select", "budget": 40}, "2": {"role": "reuse", "from": 0},
            "3": "reuse", "4": "full", "5": {"role": "reuse", "from": 1},
        },
    },
}  # fmt: skip


def one_selects(num_layers, layers, budget=12, sinks=2, recent=3):
    """Of the `layers` that can select the first one does, and the others reuse its tokens."""
    roles = dict.fromkeys(range(num_layers), "full") | dict.fromkeys(layers, "reuse") | {layers[0]: "select"}
    defaults = {"budget": budget, "sinks": sinks, "recent": recent}
    return tc.Policy.from_dict({"num_layers": num_layers, "layers": roles, "defaults": defaults})


def policy_of_six(name):
    return tc.Policy.from_dict({"num_layers": 6, "layers": LAYERS, **POLICIES[name]})


def tidal_step(model, policy, **options):
    return torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy, **options})

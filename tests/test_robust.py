"""What must hold when transformers changes, and what this package must leave alone in other people's programs."""

import json
import subprocess
import sys

import pytest
import torch
from models import decode_logits, family_pair, prefilled, random_tokens, tiny_model
from recorder import Recorder
from transformers.cache_utils import StaticLayer

from tidal_compile.passes import compat, counters


class Windowed(StaticLayer):
    """Writes a new token as full attention does, and forgets tokens nevertheless: its class says so."""

    is_sliding = True


def test_a_sliding_layer_is_told_by_its_class():
    model, recorder = tiny_model(num_hidden_layers=3), Recorder(policy="full")
    cache = prefilled(model, random_tokens(1, 20), 64)
    cache.layers[1].__class__ = Windowed
    step = torch.compile(model, backend=recorder, fullgraph=True)
    decode_logits(step, cache, random_tokens(1, 1, seed=2))
    decisions = recorder.plans[0].decisions
    assert [decision.role is not None for decision in decisions] == [True, False, True]
    assert decisions[1].reason == "sliding-window layer: left as it is"


def test_a_cache_layer_of_unknown_class_is_refused(monkeypatch):
    """As for a backend that is called by hand, outside of Dynamo."""
    monkeypatch.setattr(compat, "traced_arguments", lambda: None)
    with pytest.raises(Exception, match="known only while Dynamo traces"):
        step = torch.compile(tiny_model(num_hidden_layers=2), backend=Recorder(policy="full"), fullgraph=True)
        decode_logits(step, prefilled(tiny_model(num_hidden_layers=2), random_tokens(1, 20), 64), random_tokens(1, 1))


def test_unknown_arithmetic_on_a_windows_counter_warns(monkeypatch):
    """CUDA graphs would be recorded anew for every token: they are turned off, with a word."""
    seen = []

    def compile_nothing(gm, _, config_patches):
        seen.append(config_patches["triton.cudagraphs"])
        return gm.forward

    monkeypatch.setattr(counters, "ELEMENTWISE", ())
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_nothing)
    model, tokens = family_pair("gemma3", sliding_window=16), random_tokens(1, 3, seed=2)
    options = {"policy": "full", "cuda_graphs": True}
    step = torch.compile(model, backend="tidal", fullgraph=True, options=options)
    with pytest.warns(UserWarning, match="counts tokens of a sliding window in a way that is not known .*without CUDA"):
        got = decode_logits(step, prefilled(model, random_tokens(1, 9), 64), tokens)
    eager = decode_logits(model, prefilled(model, random_tokens(1, 9), 64), tokens)
    torch.testing.assert_close(got, eager, atol=1e-4, rtol=1e-4)
    assert set(seen) == {False}


OTHERS = """
import importlib, json, torch
from torch._dynamo.utils import counters

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.count, self.cumulative_length = 0, 0
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, n):
        self.count += 1
        self.cumulative_length += 1
        return self.linear(x) * n + self.count + self.cumulative_length

for before in ("torch", "tidal_compile.backend"):
    importlib.import_module(before)
    torch._dynamo.reset(), counters.clear()
    graphs, model = [], Model()
    step = torch.compile(model, backend=lambda gm, inputs: graphs.append(len(inputs)) or gm.forward)
    with torch.no_grad():
        for n in (2, 2, 3, 4, 5):
            step(torch.ones(2, 4), n)
        for batch in (2, 3, 5):
            step(torch.ones(batch, 4), 2)
    print(json.dumps([graphs, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]]))
"""


def test_other_compiled_models_behave_as_before():
    """`dynamic_sources` names a counter of transformers' sliding windows, and nothing else is compiled otherwise."""
    done = subprocess.run([sys.executable, "-c", OTHERS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, beside_ours = map(json.loads, done.stdout.splitlines())
    assert alone == beside_ours and alone[2] > 1


def test_the_import_graph_has_no_circle_and_no_upward_import():
    """Kernels import neither passes nor the package; passes import kernels only; nothing imports itself around a corner."""
    code = """
        import ast, json, pathlib
        root, edges = pathlib.Path("tidal_compile"), {}
        for file in root.rglob("*.py"):
            parts = list(file.with_suffix("").parts)
            package = parts[:-1]
            name = ".".join(parts if parts[-1] != "__init__" else package)
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ImportFrom) and node.level:
                    base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
                    for alias in node.names:
                        target = ".".join([*base, alias.name])
                        path = root.parent.joinpath(*target.split("."))
                        known = path.with_suffix(".py").exists() or path.is_dir()
                        edges.setdefault(name, set()).add(target if known else ".".join(base))
        print(json.dumps({name: sorted(targets) for name, targets in edges.items()}))
    """
    done = subprocess.run([sys.executable, "-c", __import__("textwrap").dedent(code)], capture_output=True, text=True)
    edges = json.loads(done.stdout)
    for name, targets in edges.items():
        for target in targets:
            if name.startswith("tidal_compile.kernels"):
                assert target.startswith("tidal_compile.kernels"), (name, target)
            if name.startswith("tidal_compile.passes"):
                assert target.startswith(("tidal_compile.kernels", "tidal_compile.passes")), (name, target)
    order = {}

    def visit(name, path=()):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in order:
            for target in edges.get(name, ()):
                if not name.startswith(f"{target}."):  # a module may name its own package
                    visit(target, (*path, name))
            order[name] = True

    for name in edges:
        visit(name)

"""The dense parts of a step through another compiler, for which stand-ins are put here: none of them is TensorRT."""

import importlib.util

import pytest
import torch
from families import FAMILIES
from models import decode_logits, family_model, prefilled, random_tokens, tiny_model
from tiers import sampled
from torch import nn

import tidal_compile as tc
from tidal_compile.bench.decode import reference_backend

pytestmark = pytest.mark.uncompiled

SPARSE = {
    "num_layers": 4, "layers": {"0": "full", "1": "select", "2-3": "reuse"},
    "defaults": {"budget": 12, "sinks": 2, "recent": 3},
}  # fmt: skip


class StandIn:
    """Runs a region as it is, and sees to it that it is one."""

    def __init__(self):
        self.regions = []

    def __call__(self, module, inputs):
        self.regions.append((module, inputs))
        assert all(one.is_floating_point() and not isinstance(one, nn.Parameter) for one in inputs)
        assert len(inputs) == sum(node.op == "placeholder" for node in module.graph.nodes)
        for node in module.graph.nodes:
            if not node.op.startswith("call_"):
                continue
            name = getattr(node.target, "__name__", str(node.target))
            assert "tidal" not in str(node.target) and not (name.endswith("_") and not name.endswith("__")), name
        return module


def step_of(model, policy, compiler):
    options = {"policy": policy, "dense_compiler": compiler}
    return torch.compile(model, backend="tidal", fullgraph=True, dynamic=False, options=options)


@pytest.mark.parametrize("exported", [False, True])
@torch.no_grad()
def test_a_step_is_split_at_our_ops_and_the_writes(exported):
    """Between them are as many regions as layers, and one: with all weights, and nothing of the cache."""
    model, stand_in = tiny_model(num_hidden_layers=4), StandIn()

    def compiler(module, inputs):
        stand_in(module, inputs)
        return torch.export.export(module, tuple(inputs)).module() if exported else module

    prompt, tokens = random_tokens(2, 60), random_tokens(2, 5, seed=1)
    plain = torch.compile(model, backend=reference_backend(tc.Policy.from_dict(SPARSE)), fullgraph=True)
    expected = decode_logits(plain, prefilled(model, prompt, 80), tokens)
    torch._dynamo.reset()
    got = decode_logits(step_of(model, SPARSE, compiler), prefilled(model, prompt, 80), tokens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert len(stand_in.regions) == 5
    held = sum(weight.numel() for module, _ in stand_in.regions for weight in module.parameters())
    embedding = model.get_input_embeddings().weight.numel()  # looked up by numbers that are no activations
    assert held == sum(weight.numel() for weight in model.parameters()) - embedding
    slots = 80 * 2 * 2 * model.config.head_dim
    assert all(one.numel() < slots for _, inputs in stand_in.regions for one in inputs)


@pytest.mark.parametrize(
    "name", sampled(sorted({*FAMILIES} - {"deepseek_v3"}), ["gemma3", "mixtral", "gpt_oss", "phi", "qwen3_moe"])
)
@torch.no_grad()
def test_families(name):
    """Exact, whatever the family's layers do between attention calls; steps may be uncompiled in between."""
    model, stand_in = family_model(name), StandIn()
    prompt, tokens = random_tokens(2, 40), random_tokens(2, 4, seed=1)
    eager = decode_logits(model, prefilled(model, prompt, 64), tokens)
    got = decode_logits(step_of(model, "full", stand_in), prefilled(model, prompt, 64), tokens)
    torch.testing.assert_close(got, eager, atol=2e-4, rtol=2e-4)
    assert len(stand_in.regions) > model.config.get_text_config().num_hidden_layers // 2


def test_generate_and_refusals():
    model = tiny_model(num_hidden_layers=4)
    ids, options = random_tokens(2, 30), {"max_new_tokens": 6, "do_sample": False}
    got = tc.generate(model, ids, SPARSE, options={"dense_compiler": StandIn()}, **options)
    assert torch.equal(got, tc.generate(model, ids, SPARSE, **options))
    with pytest.raises(tc.TidalError, match="must be one of inductor, tensorrt, or a function.*found 'xla'"):
        tc.generate(model, ids, options={"dense_compiler": "xla"}, **options)
    if importlib.util.find_spec("torch_tensorrt") is None:
        with pytest.raises(
            tc.TidalError, match="No module named 'torch_tensorrt'; pip install 'tidal-compile.tensorrt.'"
        ):
            tc.compile_config("full", dense_compiler="tensorrt")


class Writes(nn.Module):
    """An MLP's product, written to in some way before it is used."""

    def __init__(self, inner, write):
        super().__init__()
        self.inner, self.write = inner, write

    def forward(self, x):
        return self.write(self.inner(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("write", "is_taken"),
    [
        (lambda x: x.masked_fill_(x < 0, 0.0), True),
        (lambda x: x.relu_().clamp_(max=2.0), True),
        (lambda x: x.mul_(torch.ones(1, dtype=torch.float32)), False),  # would be float32 out of place
        (lambda x: x.fill_(1.0), False),  # has no such form
    ],
)
def test_writes_into_activations(write, is_taken):
    """They become new tensors where that changes nothing, and are refused elsewhere."""
    model = tiny_model(num_hidden_layers=2, dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.up_proj = Writes(layer.mlp.up_proj, write)
    prompt, tokens = random_tokens(1, 30), random_tokens(1, 2, seed=1)
    expected = decode_logits(model, prefilled(model, prompt, 64), tokens)
    step = step_of(model, "full", StandIn())
    if not is_taken:
        with pytest.raises(tc.UnsupportedModelError, match="writes into an activation in place"):
            decode_logits(step, prefilled(model, prompt, 64), tokens)
        return
    torch.testing.assert_close(decode_logits(step, prefilled(model, prompt, 64), tokens), expected, atol=0.1, rtol=0.05)

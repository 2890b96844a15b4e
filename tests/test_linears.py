"""The pass that puts linear layers of a decode step through `tidal::linear`: what it takes, and what it leaves."""

import copy

import pytest
import torch
from models import decode_logits, family_pair, prefilled, random_tokens, tiny_model
from recorder import Recorder

import tidal_compile as tc
from tidal_compile import backend

pytestmark = pytest.mark.uncompiled

PROMPT, TOKENS = 30, 4


@pytest.fixture
def joined(monkeypatch):
    """Sizes of the groups in every graph that the pass has seen."""
    seen = []

    def record(gm):
        count = join_linears(gm)
        seen.append([len(node.args[1]) for node in gm.graph.nodes if node.target is torch.ops.tidal.linear.default])
        return count

    join_linears = backend.join_linears
    monkeypatch.setattr(backend, "join_linears", record)
    return seen


def compiled(model, batch=1, **options):
    """The compiled step equals the model: in 16 bits, it is as near to the same weights in float32 as the model is."""
    step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": "full", "linears": True, **options})
    prompt, tokens = random_tokens(batch, PROMPT), random_tokens(batch, TOKENS, seed=2)
    got = decode_logits(step, prefilled(model, prompt, 64), tokens)
    eager = decode_logits(model, prefilled(model, prompt, 64), tokens)
    if model.dtype == torch.float32:
        torch.testing.assert_close(got, eager, atol=1e-4, rtol=1e-4)
        return
    exact = copy.deepcopy(model).float()
    expected = decode_logits(exact, prefilled(exact, prompt, 64), tokens)
    rounding = (eager - expected).norm() / expected.norm()
    assert 0 < rounding < 0.02 and (got - expected).norm() / expected.norm() < 1.5 * rounding


def test_layers_of_one_input_share_a_launch(joined):
    compiled(tiny_model(num_hidden_layers=3))
    assert joined == [[3, 1, 2, 1] * 3 + [1]]  # qkv, out; gate and up, down; and the head


def test_biases(joined):
    compiled(tiny_model(model_type="qwen2", num_hidden_layers=2))
    assert joined == [[3, 1, 2, 1] * 2 + [1]]


@pytest.mark.compiled
def test_several_sequences(joined):
    compiled(tiny_model(num_hidden_layers=1).half(), batch=2)
    assert joined == [[3, 1, 2, 1, 1]]


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float16, 17), (torch.float32, 2)])
def test_more_sequences_are_left_alone(joined, dtype, batch):
    compiled(tiny_model(num_hidden_layers=2).to(dtype), batch=batch)
    assert joined == [[]]


def test_adapters(joined):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    compiled(peft.get_peft_model(tiny_model(num_hidden_layers=2), config).eval())
    assert sum(joined[0]) == 15 + 8  # two small layers more for each of the four


@pytest.mark.parametrize("through_inductor", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_weights_of_torchao_in_int8(joined, through_inductor):
    """They are read as they are stored; for other ways to quantise, torchao has its own operators."""
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(num_hidden_layers=2, tie_word_embeddings=False)
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    compiled(model)
    assert joined == [[3, 1, 2, 1] * 2 + [1]]


def test_other_quantised_weights_are_left_alone(joined):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(num_hidden_layers=2, tie_word_embeddings=False)
    quantization.quantize_(model.model, quantization.Int8DynamicActivationInt8WeightConfig())
    step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": "full", "linears": True})
    decode_logits(step, prefilled(model, random_tokens(1, PROMPT), 64), random_tokens(1, 1))
    assert joined == [[1]]  # the head


def test_a_model_without_calls_to_rewrite():
    """Latent attention has linear layers of other kinds. See test_families for models with calls."""
    model, recorder = family_pair("deepseek_v3"), Recorder(policy="full", strict=False, linears=True)
    prompt, tokens = random_tokens(1, 20), random_tokens(1, 2, seed=2)
    step = torch.compile(model, backend=recorder, fullgraph=True)
    got = decode_logits(step, prefilled(model, prompt, 64), tokens)
    torch.testing.assert_close(got, decode_logits(model, prefilled(model, prompt, 64), tokens), atol=1e-4, rtol=1e-4)
    assert recorder.after[0]["linear.default"] >= 1


def test_off_on_a_cpu_unless_asked_for(joined):
    compiled(tiny_model(num_hidden_layers=2), linears=None)
    assert joined == []
    with pytest.raises(tc.TidalError, match="'linears' must be true, false or none"):
        backend.Options.parse({"linears": "yes"})

"""Weights in int8 and int4: the kernels beside the definition, and the layers that hold them, whoever quantised."""

import copy
from types import SimpleNamespace

import pytest
import torch
from models import decode_logits, prefilled, random_tokens, tiny_model
from torch import nn

import tidal_compile as tc
from tidal_compile import weights as packing
from tidal_compile.kernels import ops, reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def by_hand(numbers):
    """Words as `packed` says, number by number."""
    tiles, blocks = -(-len(numbers) // 16), -(-numbers.shape[1] // 128)
    words = torch.zeros(tiles, blocks, 512, dtype=torch.int64)
    for row in range(len(numbers)):
        tile, of_tile = divmod(row, 16)
        half, g = divmod(of_tile, 8)
        for column in range(numbers.shape[1]):
            block, of_block = divmod(column, 128)
            place, rest = divmod(of_block, 32)
            u, rest = divmod(rest, 16)
            v, rest = divmod(rest, 8)
            t, w = divmod(rest, 2)
            word = 8 * (4 * (8 * half + g) + t) + 4 * u + 2 * v + w
            words[tile, block, word] |= int(numbers[row, column]) << (4 * place)
    return torch.where(words < 2**15, words, words - 2**16).short()


def weight_of(rows, columns, group, dtype, seed=0):
    """(held, scales, the weight in float64) of random numbers, scales and offsets."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(16, (rows, columns), generator=generator)
    scale = torch.rand(rows, columns // group, generator=generator) * 0.02 + 0.01
    offset = torch.randn(rows, columns // group, generator=generator) * 0.05
    pairs = torch.stack([scale, offset], -1).to(dtype)
    held, scales = reference.packed(numbers, pairs)
    wide = pairs.double().repeat_interleave(group, 1)
    return held.to(DEVICE), scales.to(DEVICE), ((numbers - 8) * wide[..., 0] + wide[..., 1]).to(DEVICE)


@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 128, 128), (33, 320, 64), (5, 512, 256), (20, 96, 32)])
def test_how_int4_is_held(rows, columns, group):
    """Number by number, in whole tiles; and a pair for each row and group."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(16, (rows, columns), generator=generator)
    pairs = torch.randn(rows, columns // group, 2, generator=generator).bfloat16()
    held, scales = reference.packed(numbers, pairs)
    assert torch.equal(held, by_hand(numbers)) and reference.group_of(held, scales) == group
    in_block = max(1, 128 // group)
    for row in range(rows):
        for number in range(columns // group):
            found = scales[row // 16, number // in_block, row % 16, number % in_block]
            assert torch.equal(found, pairs[row, number])
    wide = pairs.float().repeat_interleave(group, 1)
    expected = (numbers - 8) * wide[..., 0] + wide[..., 1]
    torch.testing.assert_close(reference.unpacked(held, scales)[:rows, :columns], expected)


CASES = [
    (32, 1024, 32, 1000), (16, 512, 256, 500), (48, 640, 64, 600), (16, 128, 128, 128), (64, 640, 640, 576),
    (16, 4352, 128, 4352),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "group", "used"), CASES)
@pytest.mark.parametrize(
    ("dtype", "weights", "tokens"), [(torch.bfloat16, 3, 1), (torch.float16, 2, 5), (torch.float16, 1, 1)]
)
def test_products_of_int4(rows, columns, group, used, dtype, weights, tokens):
    """Of several weights that have different numbers of rows, with biases; x may lack the last columns."""
    held, scales, dense = zip(
        *(weight_of(rows + 16 * number, columns, group, dtype, number) for number in range(weights)), strict=True
    )
    x = torch.randn(1, tokens, used, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    biases = [torch.randn(len(weight), device=DEVICE).to(dtype) for weight in dense]
    exact = torch.cat([x.double() @ one[:, :used].T + bias for one, bias in zip(dense, biases, strict=True)], -1)
    found = triton_linear()(x, list(held), biases, list(scales), [held[0], scales[0]])
    rounding = torch.finfo(dtype).eps
    assert (found.double() - exact).norm() < rounding * exact.norm()
    assert (
        torch.ops.tidal.linear(x, list(held), biases, list(scales), []).double() - exact
    ).norm() < rounding * exact.norm()


def triton_linear():
    triton = pytest.importorskip("tidal_compile.kernels.triton.linear")
    return triton.linear


@pytest.mark.parametrize(("rows", "columns", "group", "used"), CASES)
def test_what_int4_numbers_stand_for(rows, columns, group, used):
    held, scales, dense = weight_of(rows, columns, group, torch.float16)
    from tidal_compile.kernels.triton import int4

    for found in (int4.dense_weight(held, scales, used), torch.ops.tidal.dense_weight(held, scales, used)):
        assert found.shape == (rows, used) and found.dtype == torch.float16
        torch.testing.assert_close(found.double(), dense[:, :used], atol=1e-5, rtol=1e-3)  # of 4,096 * 0.03


def test_a_weight_that_does_not_fit():
    held, scales, _ = weight_of(16, 256, 64, torch.float16)
    x = torch.zeros(1, 256, device=DEVICE, dtype=torch.float16)
    for bad, message in (
        ((x[:, :100].contiguous(), [held], [], [scales]), "256 columns"),
        ((x.float(), [held], [], [scales]), "must be contiguous torch.float32"),
        ((x, [held], [], [scales[:, :1].contiguous()]), "2 or 4, 2"),
        ((x, [held, held], [], [scales, scales[:, :, :, :1].contiguous()]), "all alike"),
        ((x, [held], [], [scales.float()]), "must be contiguous torch.float16"),
        ((x, [held, held.int()], [], [scales, scales]), "contiguous int16"),
        ((x, [held], [x[0, :8]], [scales]), r"a bias must be contiguous \[16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops._check_linear(*bad)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_rows_that_fill_no_tile(tokens):
    layer = nn.Linear(96, 21, dtype=torch.bfloat16, device=DEVICE)
    model = packing.quantise(nn.Sequential(layer), "int4")
    x = torch.randn(tokens, 96, device=DEVICE).bfloat16()
    expected = x.double() @ model[0].weight.double().T + layer.bias.double()
    assert model[0].weight.shape == (21, 96)
    assert (model(x).double() - expected).norm() < 0.01 * expected.norm()


def half_model(**changes):
    shape = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": False}
    return tiny_model(device=DEVICE, **shape, **changes).bfloat16()


def test_packed_layers_share_a_launch_and_equal_the_dense_model():
    """A compiled step, and a prompt of more tokens than a launch takes; weights beyond int4's."""
    model = packing.quantise(half_model(attention_bias=True), "int4")
    dense = copy.deepcopy(model).float()
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, packing.PackedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device=DEVICE)
            plain.weight.data = reference.dense_weight(layer.held, model.get_submodule(name).scales, layer.in_features)
            if layer.bias is not None:
                plain.bias.data = layer.bias
            dense.set_submodule(name, plain)
    prompt, tokens = random_tokens(1, 30).to(DEVICE), random_tokens(1, 4, seed=2).to(DEVICE)
    seen = []
    step = torch.compile(model, backend=lambda gm, inputs: seen.append(gm) or _joined(gm), fullgraph=True)
    with torch.no_grad():
        exact = decode_logits(dense, prefilled(dense, prompt, 64), tokens)
        half = decode_logits(dense.bfloat16(), prefilled(dense, prompt, 64), tokens)
        eager = decode_logits(model, prefilled(model, prompt, 64), tokens)
        found = decode_logits(step, prefilled(model, prompt, 64), tokens)
    groups = [len(node.args[1]) for node in seen[0].graph.nodes if node.target is torch.ops.tidal.linear.default]
    assert groups == [3, 1, 2, 1] * 2 + [1]
    calls = [node for node in seen[0].graph.nodes if node.target is torch.ops.tidal.linear.default]
    after = [[*call.args[1][:1], *call.args[3][:1]] for call in calls[1:]] + [[]]
    after[0] = after[4] = []  # between the projections and the output's there is attention
    assert [list(call.args[4]) for call in calls] == after
    rounding = (half - exact).norm() / exact.norm()
    assert 0 < rounding < 0.05
    for logits in (eager, found):
        assert (logits - exact).norm() < 1.5 * rounding * exact.norm()


def _joined(gm):
    from tidal_compile.passes.linears import join_linears

    join_linears(gm)
    return gm


def test_layers_around_a_write_into_their_input_stay_apart():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            held = packing.Held(*weight_of(16, 128, 128, torch.bfloat16)[:2], torch.Size([16, 128]))
            self.first, self.second = packing.PackedLinear(held), packing.PackedLinear(held)

        def forward(self, x):
            x = x * 2
            first = self.first(x)
            x.add_(1)
            return first + self.second(x)

    model, x = Around(), torch.randn(1, 128, device=DEVICE).bfloat16()
    found = torch.compile(model, backend=lambda gm, _: _joined(gm), fullgraph=True)(x)
    assert torch.equal(found, model(x)) and not torch.equal(found, model.first(2 * x) + model.second(2 * x))


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["int8", "int4-32"])
def test_a_policy_with_packed_weights(kind):
    model = packing.quantise(half_model(), kind)
    prompt, tokens = random_tokens(1, 30).to(DEVICE), random_tokens(1, 4, seed=2).to(DEVICE)
    step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": "full", "linears": True})
    with torch.no_grad():
        eager = decode_logits(model, prefilled(model, prompt, 64), tokens)
        found = decode_logits(step, prefilled(model, prompt, 64), tokens)
    assert (found - eager).norm() < 0.03 * eager.norm()
    loaded = packing.quantise(half_model(), kind)
    loaded.load_state_dict(model.state_dict())
    assert repr(loaded) == repr(model) and kind[:4] in repr(model)
    assert kind == "int8" or model.lm_head.scales.shape[3] == 4  # groups of a block
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(1, 192, device=DEVICE)
    torch.testing.assert_close(layer(x), x @ layer.weight.float().T, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127), ("int4", 7.5), ("int4-32", 7.5)])
def test_rounding(kind, levels):
    """To the nearest level: half a level off at most, beside what 16 bits round scale and offset by. A row of zeros."""
    layer = nn.Sequential(nn.Linear(192, 24, dtype=torch.float16))
    layer[0].weight.data[3] = 0
    weight = layer[0].weight.float()
    packing.quantise(layer, kind)
    groups = {"int8": 1, "int4": 3, "int4-32": 6}[kind]
    held = layer[0].held, layer[0].scales
    assert kind == "int8" or reference.group_of(*held) == 192 // groups
    wide = weight.unflatten(1, (groups, -1))
    span = wide.abs().amax(-1) * 2 if kind == "int8" else wide.amax(-1) - wide.amin(-1)
    error = (layer[0].weight.float() - weight).unflatten(1, (groups, -1)).abs().amax(-1)
    assert (error <= span / (4 * levels) * 1.05 + 2e-4).all() and error.max() > 0


def test_every_form_of_torchao():
    """The weight that a layer stands for is what torchao would multiply by."""
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.quant_primitives import MappingType

    symmetric, asymmetric = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
    for config in (
        quantization.Int8WeightOnlyConfig(),
        quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32), asymmetric),
        quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(64), symmetric),
        quantization.IntxWeightOnlyConfig(torch.int4),  # a scale a row
    ):
        layer = nn.Sequential(nn.Linear(320, 24, dtype=torch.bfloat16))
        quantization.quantize_(layer, config)
        expected = layer[0].weight.dequantize().float()
        assert tc.pack_weights(layer) == 1
        torch.testing.assert_close(
            layer[0].weight.float(), expected, atol=1e-3 * expected.abs().max().item(), rtol=0.02
        )
    bits = quantization.IntxWeightOnlyConfig(torch.int3, quantization.PerGroup(32))
    odd = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(40))
    wide = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    for config, dtype in ((bits, torch.bfloat16), (odd, torch.bfloat16), (wide, torch.float32)):
        layer = nn.Sequential(nn.Linear(320, 24, dtype=dtype))
        quantization.quantize_(layer, config)
        with pytest.raises(tc.TidalError, match="1 of IntxUnpackedToInt8Tensor"):
            tc.pack_weights(layer)


def test_int4_as_a_gpu_holds_it():
    """PyTorch's tiles, number by number, in more rows and columns than the weight has; and the plain form, signed."""
    generator = torch.Generator().manual_seed(0)
    numbers, pair = (
        torch.randint(16, (24, 1024), generator=generator),
        torch.rand(8, 24, 2, generator=generator).bfloat16(),
    )
    tiles = torch.zeros(3, 8, 32, 4, dtype=torch.int64)
    for row in range(24):
        for column in range(1024):
            block, rest = divmod(column, 128)
            word, rest = divmod(rest, 32)
            quarter, rest = divmod(rest, 8)
            lane, half = divmod(rest, 2)
            tiles[row // 8, block, row % 8 * 4 + lane, word] |= int(numbers[row, column]) << (16 * half + 4 * quarter)
    tiles = torch.where(tiles < 2**31, tiles, tiles - 2**32).int()
    assert torch.equal(packing.of_tiles(tiles).long(), numbers)
    if GPU:
        bytes_ = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(DEVICE, torch.uint8)
        assert torch.equal(torch.ops.aten._convert_weight_to_int4pack(bytes_, 8).cpu(), tiles)
    wide = pair.float().repeat_interleave(128, 0)  # [K, N, 2]
    expected = ((numbers - 8).T * wide[..., 0] + wide[..., 1]).T[:20, :900]
    signed = numbers - 8
    plain = (signed[:, ::2] & 15 | (signed[:, 1::2] & 15) << 4).to(torch.uint8)
    for form in (
        {"kind": "Int4TilePackedTo4dTensor", "qdata": tiles, "scale_and_zero": pair},
        {"kind": "Int4Tensor", "qdata": plain, "scale": pair[..., 0], "zero_point": pair[..., 1],
         "activation_dtype": torch.bfloat16},
    ):  # fmt: skip
        held = packing.of_torchao(stand_in(form.pop("kind"), block_size=[1, 128], shape=torch.Size([20, 900]), **form))
        found = reference.dense_weight(held.weight, held.scales, 900)[:20]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def stand_in(kind, **fields):
    """A linear layer whose weight looks like one of torchao's classes, which can't all be made on a CPU."""
    layer = nn.Linear(1, 1)
    weight = type(kind, (SimpleNamespace,), {"dim": lambda self: 2, "__len__": lambda self: 20})(**fields)
    del layer.weight
    layer.weight = SimpleNamespace(data=weight, dim=weight.dim)
    return layer


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(symmetric):
    """As the package packs: 8 numbers a word, the lowest first, that are 8 too large; zero points along the rows."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(16, (24, 192), generator=generator)
    scale, zero = torch.rand(24, 3, generator=generator).bfloat16(), torch.randint(16, (24, 3), generator=generator)

    def words(of):
        eights = sum(of.unflatten(1, (-1, 8))[..., place].long() << (4 * place) for place in range(8))
        return torch.where(eights < 2**31, eights, eights - 2**32).int()

    layer = nn.Linear(192, 24, dtype=torch.bfloat16)
    del layer.weight
    layer.quantization_scheme = SimpleNamespace(
        weights=SimpleNamespace(num_bits=4, type="int", symmetric=symmetric), input_activations=None
    )
    layer.weight_packed, layer.weight_shape, layer.weight_scale = words(numbers), torch.tensor([24, 192]), scale
    if not symmetric:
        layer.weight_zero_point = words(zero.T).T.contiguous()
    model = nn.Sequential(layer)
    assert tc.pack_weights(model) == 1
    zero = 8 if symmetric else zero.repeat_interleave(64, 1)
    expected = (numbers - zero) * scale.float().repeat_interleave(64, 1)
    torch.testing.assert_close(model[0].weight.float(), expected, atol=0.05, rtol=0.01)


def test_what_can_not_be_packed():
    other = nn.Linear(8, 8)
    del other.weight
    other.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(num_bits=8, type="int"), input_activations=None)
    other.weight_packed = torch.zeros(8, 2, dtype=torch.int32)
    with pytest.raises(tc.TidalError, match="found linear layers: 1 of weight_packed"):
        tc.pack_weights(nn.Sequential(other))
    with pytest.raises(tc.TidalError, match="found linear layers: 1 of Parameter|found linear layers: 1 of Tensor"):
        tc.pack_weights(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(tc.TidalError, match="weights must be auto, int8, int4, int4-32; found 'int2'"):
        packing.quantise(nn.Sequential(nn.Linear(8, 8)), "int2")
    with pytest.raises(
        tc.TidalError, match="layer '0': weights in int4 want a 16-bit number format; found torch.float32"
    ):
        packing.quantise(nn.Sequential(nn.Linear(32, 8)), "int4")
    layer = nn.Sequential(nn.Linear(64, 8, dtype=torch.bfloat16))
    layer[0].register_forward_hook(lambda *_: None)
    with pytest.raises(tc.TidalError, match="layer '0' has hooks"):
        packing.quantise(layer, "int4")
    layer = nn.Sequential(nn.Linear(64, 8, dtype=torch.bfloat16))
    layer[0].forward = lambda x: 2 * nn.functional.linear(x, layer[0].weight)  # as accelerate does
    with pytest.raises(tc.TidalError, match="layer '0' has hooks"):
        packing.quantise(layer, "int4")

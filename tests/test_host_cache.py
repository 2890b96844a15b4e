"""`place: cpu` and `HostCache`: layers in host memory, whose samples the CPU attends to, give what they do elsewhere.

Here on a CPU, where all memory is the host's; test_gpu.py has the same with a GPU.
"""

import json

import pytest
import torch
from models import decode_logits, prefilled, random_tokens, tiny_model
from oracle import OracleModel, roles_of
from recorder import Recorder

import tidal_compile as tc
from tidal_compile.kernels.host import memory
from tidal_compile.kernels.host import step as host_step
from tidal_compile.kernels.methods.lsh import Lsh, normals
from tidal_compile.models import with_cache
from tidal_compile.run import rewind
from tidal_compile.shapes import FAMILIES

MODEL = tiny_model(num_hidden_layers=3)
SAMPLED = {"role": "select", "by": "lsh", "k": 4, "l": 20, "decoded": "exact", "place": "cpu"}
LAYERS = {
    "alone": {"0": "full", "1": {**SAMPLED, "seed": 1}, "2": {**SAMPLED, "k": 3}},
    "mixed": {"0": {"role": "select", "budget": 20}, "1": SAMPLED, "2": "reuse"},
    "no-sinks": {"0": "full", "1": {**SAMPLED, "sinks": 0, "recent": 0}, "2": {**SAMPLED, "threshold": 1, "l": 9}},
}  # fmt: skip


def policy_of(layers, num_layers=3, **defaults):
    defaults = {"budget": 20, "sinks": 2, "recent": 3, **defaults}
    return tc.Policy.from_dict({"num_layers": num_layers, "layers": layers, "defaults": defaults})


def planes(settings, head_dim):
    return torch.tensor(normals(settings["l"], settings["k"], head_dim, settings.get("seed", 0)))


def step_of(policy, model=MODEL):
    return torch.compile(model, backend=Recorder(policy=policy), fullgraph=True, dynamic=False)


def host_cache(policy, prompt, slots=96, mask=None, model=MODEL):
    """Prefilled."""
    cache = tc.HostCache(model.config, slots, policy)
    with torch.no_grad():
        model(input_ids=prompt, attention_mask=mask, **with_cache(model, cache))
    return cache


@pytest.mark.uncompiled
@pytest.mark.shares_traces
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_whole_models_equal_the_oracle(name, padded):
    policy, prompt, tokens = policy_of(LAYERS[name]), random_tokens(2, 60), random_tokens(2, 9, seed=2)
    mask, masks = None, None
    if padded:
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[0, :23] = 0
        wide = torch.cat([mask, torch.ones(2, 36, dtype=torch.long)], 1).bool()
        masks = [(wide & (torch.arange(96) <= 60 + i))[:, None, None] for i in range(9)]
    cache = host_cache(policy, prompt, mask=mask)
    for layer in cache.layers:
        layer.keys[:, :, 70:], layer.values[:, :, 70:] = 1e4, torch.nan  # never live
    got = decode_logits(step_of(policy), cache, tokens, masks)
    right = OracleModel(MODEL, roles_of(policy), planes).logits(prompt, tokens, mask)
    torch.testing.assert_close(got, right, atol=2e-4, rtol=2e-4)
    dense = decode_logits(MODEL, prefilled(MODEL, prompt, 96, mask), tokens, masks)
    assert (got - dense).abs().max() > 1e-2


@pytest.mark.uncompiled
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcaps_sinks_and_added_masks(name):
    """Of eager attention, as the GPU-resident form does it."""
    model = tiny_model(**FAMILIES[name])
    model.set_attn_implementation("eager")
    full = [number for number, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    prompt, tokens, found = random_tokens(2, 40), random_tokens(2, 6, seed=2), []
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    for place in ("gpu", "cpu"):
        layers = {str(layer): "full" for layer in range(6)} | {str(full[1]): {**SAMPLED, "place": place}}
        policy = policy_of(layers, 6)
        cache = (host_cache if place == "cpu" else lambda policy, *rest: prefilled(model, *rest))(
            policy, prompt, 64, mask, **({"model": model} if place == "cpu" else {})
        )
        wide = torch.cat([mask, torch.ones(2, 24, dtype=torch.long)], 1)
        step, rows = step_of(policy, model), []
        for i in range(6):
            with torch.no_grad():
                out = step(
                    input_ids=tokens[:, i : i + 1].clone(), attention_mask=wide, **with_cache(model, cache)
                )  # fmt: skip
            rows.append(out.logits[:, -1])
        found.append(torch.stack(rows, 1))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.uncompiled
@pytest.mark.shares_traces
def test_what_is_kept_follows_the_cache():
    """Two caches in turn; filled again, longer and shorter; rewound; a counter set back; reordered; empty but for one."""
    policy, tokens = policy_of(LAYERS["alone"]), random_tokens(2, 5, seed=2)
    step = step_of(policy)

    def right(prompt, tokens):
        return OracleModel(MODEL, roles_of(policy), planes).logits(prompt, tokens)

    def same(found, expected):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)

    prompts = [random_tokens(2, 50, seed=seed) for seed in (3, 4)]
    caches = [host_cache(policy, prompt) for prompt in prompts]
    for part in (slice(0, 2), slice(2, 5)):
        for cache, prompt in zip(caches, prompts, strict=True):
            same(decode_logits(step, cache, tokens[:, part]), right(prompt, tokens[:, : part.stop])[:, part])
    cache = caches[0]
    for length in (63, 44, 1):
        cache.reset()
        prompt = random_tokens(2, length, seed=length)
        with torch.no_grad():
            MODEL(input_ids=prompt, past_key_values=cache)
        for _ in range(2):
            same(decode_logits(step, cache, tokens), right(prompt, tokens))
            rewind(cache, length)
    cache = caches[1]
    for layer in cache.layers:
        layer.cumulative_length.fill_(52)
    same(decode_logits(step, cache, tokens[:, 2:]), right(prompts[1], tokens)[:, 2:])
    with torch.no_grad():  # a second turn of a conversation
        MODEL(input_ids=random_tokens(2, 4, seed=9), past_key_values=cache)
    kept = cache.layers[1].keys.clone()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[1].keys[0], kept[1])
    found = decode_logits(step, cache, tokens[1:].expand(2, -1))
    same(found[0], found[1])


def as_on_the_gpu(layers):
    return json.loads(json.dumps(layers).replace('"cpu"', '"gpu"'))


def hidden(*slots, rows=(0, 1)):
    """A 4-D mask `[2, 1, 1, 96]` for a step after 60 tokens, without these slots of these rows."""
    mask = (torch.arange(96) <= 60).repeat(2, 1)
    for row in rows:
        mask[row, list(slots)] = False
    return mask[:, None, None]


CHANGES = {
    "more-sinks": ([{"sinks": 2}, {"sinks": 20}], [None, None]),
    "fewer-sinks": ([{"sinks": 20}, {"sinks": 2}], [None, None]),
    "padding-gone": ([{}, {}], [hidden(*range(23), rows=[0]), hidden()]),
    "padding-comes": ([{}, {}], [hidden(), hidden(*range(15))]),
    "a-row-comes": ([{}, {}], [hidden(*range(61), rows=[1]), hidden()]),
    "holes": ([{}, {}], [hidden(30, 31, 40), hidden(10, 11, 50)]),
}  # fmt: skip


@pytest.mark.uncompiled
@pytest.mark.parametrize("name", CHANGES)
def test_steps_over_one_cache_may_differ(name):
    """Other sinks, or another mask, at the second step: what was indexed before still serves."""
    defaults, masks = CHANGES[name]
    layers, prompt, tokens = LAYERS["alone"], random_tokens(2, 60), random_tokens(2, 1, seed=2)
    found = []
    for form in (layers, as_on_the_gpu(layers)):
        cache, rows = prefilled(MODEL, prompt, 96), []
        for given, mask in zip(defaults, masks, strict=True):
            given = {"budget": 30, **given}
            for layer in cache.layers:
                layer.cumulative_length.fill_(60)
            rows.append(
                decode_logits(step_of(policy_of(form, **given)), cache, tokens, None if mask is None else [mask])
            )
        found.append(torch.cat(rows, 1))
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


@pytest.mark.uncompiled
def test_a_counter_that_is_set_back_and_forth():
    """Into the prompt, whose later tokens are then written anew, and on to some that still stand there."""
    found = []
    for form in (LAYERS["alone"], as_on_the_gpu(LAYERS["alone"])):
        step, cache, rows = step_of(policy_of(form)), prefilled(MODEL, random_tokens(2, 50), 96), []
        for length, steps in ((50, 3), (30, 2), (48, 9), (20, 1), (57, 2)):
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)
            rows.append(decode_logits(step, cache, random_tokens(2, steps, seed=length)))
        found.append(torch.cat(rows, 1))
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


@pytest.mark.uncompiled
def test_batches_of_other_sizes():
    """Whose number Dynamo then keeps symbolic."""
    found = []
    for layers in (LAYERS["alone"], as_on_the_gpu(LAYERS["alone"])):
        step = torch.compile(MODEL, backend=Recorder(policy=policy_of(layers)), fullgraph=True)
        rows = []
        for batch in (2, 3, 5, 2):
            rows.append(decode_logits(step, prefilled(MODEL, random_tokens(batch, 40), 64), random_tokens(batch, 3)))
        found.append(torch.cat(rows))
        torch._dynamo.reset()
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


@pytest.mark.uncompiled
def test_a_failure_is_made_good(monkeypatch):
    """What could not be sorted is sorted at the next step."""
    policy, tokens = policy_of(LAYERS["alone"]), random_tokens(2, 3, seed=2)
    step, cache = step_of(policy), host_cache(policy, random_tokens(2, 60))
    right = decode_logits(step_of(policy), host_cache(policy, random_tokens(2, 60)), tokens)
    with monkeypatch.context() as patch:
        patch.setattr(host_step, "fill", raise_memory_error)
        with pytest.raises(MemoryError):
            decode_logits(step, cache, tokens)
    for layer in cache.layers:
        layer.cumulative_length.fill_(60)
    torch.testing.assert_close(decode_logits(step, cache, tokens), right)


def raise_memory_error(*_):
    raise MemoryError


def test_reordering():
    cache = tc.HostCache(MODEL.config, 32, layers=[1])
    cache.reorder_cache(torch.tensor([1, 0]))  # of nothing
    with torch.no_grad():
        MODEL(input_ids=random_tokens(2, 9), past_key_values=cache)
    keys = cache.layers[1].keys
    before = keys.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(keys, before.flip(0)) and cache.layers[1].keys is keys
    with pytest.raises(tc.TidalError, match="reorder_cache with 1 rows; it has 2"):
        cache.layers[1].reorder_cache(torch.tensor([1]))


def test_policies_and_layers():
    cache = tc.HostCache(MODEL.config, 32, policy_of(LAYERS["mixed"]))
    assert [type(layer).__name__ for layer in cache.layers] == ["LiveLayer", "HostLayer", "HostLayer"]
    config = tiny_model(device="meta", num_hidden_layers=18).config
    cache = tc.HostCache(config, 32, "magicpig_cpu")
    assert [number for number, layer in enumerate(cache.layers) if type(layer).__name__ == "LiveLayer"] == [0, 16]
    cache = tc.HostCache(config, 32, layers=[3])
    assert type(cache.layers[3]).__name__ == "HostLayer"
    mixed = tiny_model(**FAMILIES["gemma3"], device="meta").config
    for of_model, arguments, message in (
        (config, {"policy": "full"}, "no layer of the policy reuses tokens or has place: cpu"),
        (config, {}, "no layer of the policy"),
        (config, {"layers": [18]}, "layer 18 can't be in host memory; these can"),
        (mixed, {"layers": [0]}, r"layer 0 can't be in host memory; these can: \[1, 3, 5\]"),
    ):
        with pytest.raises(tc.TidalError, match=message):
            tc.HostCache(of_model, 32, **arguments)
    for keys, message in (
        ({"place": "disk"}, "place must be gpu or cpu; found disk"),
        ({"decoded": "sampled"}, "place: cpu takes decoded: exact, and k up to 15; found sampled, and 4"),
        ({"k": 16}, "found exact, and 16"),
    ):
        with pytest.raises(tc.PolicyError, match=message):
            policy_of({"0": {**SAMPLED, **keys}, "1-2": "full"})
    explained = tc.explain(MODEL, policy_of(LAYERS["alone"]))
    assert "place cpu" in explained.rows[1].by and explained.rows[1].kept_bytes > 0


def test_half_precision_that_the_host_lacks_is_refused():
    model = tiny_model(num_hidden_layers=3, dtype=torch.float16)
    policy = policy_of(LAYERS["alone"])
    cache = host_cache(policy, random_tokens(1, 20), 40, model=model)
    with pytest.raises(ValueError, match="place: cpu: the cache is torch.float16; the host attends in bfloat16 or"):
        decode_logits(step_of(policy, model), cache, random_tokens(1, 1))


def test_tensors_in_host_memory():
    for shape, dtype in (((2, 3, 5), torch.bfloat16), ((0, 4), torch.float32), ((2**21 + 1,), torch.uint8)):
        tensor = memory.zeros(shape, dtype, torch.device("cpu"))
        assert tensor.shape == shape and tensor.dtype == dtype and not tensor.any() and memory.is_host(tensor)
        memory.as_cpu(tensor).fill_(1)
        assert tensor.bool().all()


def test_what_a_step_reads_to_look_up():
    """A bucket of every table: ids of 2 bytes, or 4 where 2 don't suffice."""
    method = Lsh(10, 150, decoded="exact", place="cpu")
    assert method.keys_read(None, 100_000, 256) == pytest.approx(150 * 100_000 / 1024 * 4 / 256)
    assert method.keys_read(None, 50_000, 256) == pytest.approx(150 * 50_000 / 1024 * 2 / 256)

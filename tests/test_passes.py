"""The passes: what is matched, what is refused and why, and what the rewritten graph looks like. No Inductor here."""

import copy

import pytest
import torch
from models import decode_logits, family_pair, prefilled, random_tokens, tiny_model
from recorder import Recorder
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.masking_utils import sdpa_mask

import tidal_compile as tc
from tidal_compile.backend import Options, lay_over
from tidal_compile.explain import decode_calls
from tidal_compile.passes.match import AttentionSite, find_attention
from tidal_compile.passes.plan import kv_share, make_plan
from tidal_compile.passes.rewrite import apply_plan
from tidal_compile.policy import resolve


def record(model, tokens=None, slots=64, prompt=20, masks=None, **options):
    """Prefill, then decode one token through the recorder."""
    recorder = Recorder(**options)
    step = torch.compile(model, backend=recorder, fullgraph=True)
    cache = prefilled(model, random_tokens(1, prompt), slots)
    logits = decode_logits(step, cache, random_tokens(1, 1, seed=2) if tokens is None else tokens, masks)
    return recorder, logits


def test_every_call_is_matched_and_rewritten(tiny):
    recorder, _ = record(tiny, policy="tidal", budget=12, sinks=1, recent=2)
    before, after = recorder.before[0], recorder.after[0]
    assert before["scaled_dot_product_attention"] == 4 and "scaled_dot_product_attention" not in after
    assert [after[f"{kind}_attention.default"] for kind in ("full", "select", "sparse")] == [2, 1, 1]
    grouped = tiny.config.num_key_value_heads < tiny.config.num_attention_heads
    gone = before.get("expand", 0) - after.get("expand", 0)
    assert gone == 1 + (8 if grouped else 0)  # no repeat_kv is left, and the mask is not expanded
    assert after["index_copy_"] == before["index_copy_"] == 8 and after["add_"] == before["add_"]
    plan = recorder.plans[0]
    assert plan.rewritten == 4 and plan.problems == ()
    assert [decision.layer for decision in plan.decisions] == list(range(4))


def test_reuse_reads_the_token_set_of_its_source():
    layers = {0: "select", 1: "select", 2: {"role": "reuse", "from": 0}, 3: "reuse", 4: "full", 5: "reuse"}
    recorder, _ = record(tiny_model(), policy={"num_layers": 6, "layers": layers, "defaults": {"budget": 80}})
    nodes = list(recorder.graphs[0].graph.nodes)
    select = [node for node in nodes if node.target is torch.ops.tidal.select_attention.default]
    sparse = [node for node in nodes if node.target is torch.ops.tidal.sparse_attention.default]
    sources = [select.index(node.args[-1].args[0]) for node in sparse]
    assert sources == [0, 1, 1] and all(node.args[-1].args[1] == 1 for node in sparse)
    for node in select + sparse:
        key, value = node.args[1:3]
        assert key.op == value.op == "placeholder"  # the live cache itself


def test_reuse_needs_no_mask_under_which_its_set_was_chosen():
    """A bool mask hides nothing that a selection chose under it; one that is added to the scores is still needed."""
    padding = [torch.ones(1, 64, dtype=torch.bool)]
    recorder, _ = record(tiny_model(num_hidden_layers=4), masks=padding, policy="tidal", budget=80)
    nodes = list(recorder.graphs[0].graph.nodes)
    masks = {
        name: [n.args[4] for n in nodes if f"tidal.{name}_attention" in str(n.target)]
        for name in ("full", "select", "sparse")
    }
    assert len(masks["sparse"]) == 1 and set(masks["sparse"]) == {None}
    assert None not in masks["full"] + masks["select"] and len(set(masks["full"] + masks["select"])) == 1

    eager = tiny_model(num_hidden_layers=4, attn_implementation="eager")
    recorder, _ = record(eager, masks=padding, policy="tidal", budget=80)
    added = [n.args[4] for n in recorder.graphs[0].graph.nodes if "tidal.sparse_attention" in str(n.target)]
    assert len(added) == 1 and None not in added


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_mask_that_repeats_the_live_length_is_dropped(implementation, tokens):
    model = tiny_model(num_hidden_layers=2, attn_implementation=implementation)
    ids = random_tokens(1, tokens, seed=2)
    for given, is_dropped in (({}, True), ({"attention_mask": torch.ones(1, 64, dtype=torch.bool)}, False)):
        recorder, cache = Recorder(policy="full"), prefilled(model, random_tokens(1, 20), 64)
        with torch.no_grad():
            got = torch.compile(model, backend=recorder, fullgraph=True, dynamic=False)(
                input_ids=ids, past_key_values=cache, **given
            )
            expected = model(input_ids=ids, past_key_values=prefilled(model, random_tokens(1, 20), 64))
        assert {one.call.call.mask is None for one in recorder.plans[0].decisions} == {is_dropped}
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["wide-window", "window", "chunks", "without-itself", "one-hole"])
def test_other_masks_of_counters_are_kept(name):
    """What a mask of the model's own says is computed, whatever its spelling, where it rests on counters alone."""
    sees = {
        "wide-window": lambda b, h, q, k: (k <= q) & (k > q - 64),
        "window": lambda b, h, q, k: (k <= q) & (k > q - 40),
        "chunks": lambda b, h, q, k: (k <= q) & (k // 48 == q // 48),
        "without-itself": lambda b, h, q, k: k < q,
        "one-hole": lambda b, h, q, k: (k <= q) & (k != 3),
    }[name]

    def mask_of(*args, mask_function=None, **options):
        return sdpa_mask(*args, mask_function=sees, **options)

    AttentionMaskInterface.register("masked_for_a_test", mask_of)
    AttentionInterface.register("masked_for_a_test", AttentionInterface()["sdpa"])
    model = tiny_model(num_hidden_layers=2)
    model.config._attn_implementation = "masked_for_a_test"
    recorder, logits = record(model, policy="full")
    assert {one.call.call.mask is None for one in recorder.plans[0].decisions} == {name == "wide-window"}
    eager = decode_logits(model, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 1, seed=2))
    torch.testing.assert_close(logits, eager, atol=1e-4, rtol=1e-4)


def test_what_cuda_graphs_need_survives():
    recorder, _ = record(tiny_model(num_hidden_layers=4), policy="tidal", budget=80)
    gm = recorder.graphs[0]
    assert gm.meta.get("dynamo_compile_id") is not None and gm._param_name_to_source
    static = [node for node in gm.graph.nodes if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})]
    assert len([node for node in static if "past_key_values" in node.name]) == 12  # keys, values, counter of 4 layers
    for node in gm.graph.nodes:
        if "tidal" in str(node.target):
            assert "example_value" in node.meta and node.meta["nn_module_stack"]


def test_grouped_query_spelling(monkeypatch):
    """transformers can hand the unrepeated cache to SDPA with enable_gqa=True."""
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *args: True)
    recorder, _ = record(tiny_model(num_hidden_layers=2), policy="full")
    assert recorder.plans[0].rewritten == 2


def test_scale_is_read_from_the_call():
    model = tiny_model("granite", num_hidden_layers=2, attention_multiplier=0.37)
    recorder, logits = record(model, policy="full")
    assert {one.call.call.scale for one in recorder.plans[0].decisions} == {0.37}
    eager = decode_logits(model, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 1, seed=2))
    torch.testing.assert_close(logits, eager, atol=1e-4, rtol=1e-4)


def test_prefill_is_left_alone():
    model, recorder = tiny_model(num_hidden_layers=2), Recorder(policy="tidal")
    cache = prefilled(model, random_tokens(1, 5), 64)
    with torch.no_grad():
        torch.compile(model, backend=recorder, fullgraph=True)(input_ids=random_tokens(1, 17), past_key_values=cache)
    assert recorder.plans == [None] and recorder.before == recorder.after


def sliding_model():
    return tiny_model(
        "gemma3_text", head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 3
    )


@pytest.mark.parametrize("prompt", [5, 30])
def test_sliding_layers_stay_as_they_are(prompt):
    """Before and after the window is full; a preset counts the other layers only."""
    model = sliding_model()
    recorder, logits = record(model, prompt=prompt, policy="tidal", budget=80)
    decisions = recorder.plans[0].decisions
    assert [decision.role and decision.role.role for decision in decisions] == [
        None,
        "full",
        None,
        "full",
        None,
        "select",
    ]
    assert {decision.reason for decision in decisions if decision.role is None} == {
        "sliding-window layer: left as it is"
    }
    assert recorder.plans[0].problems == ()
    eager = decode_logits(model, prefilled(model, random_tokens(1, prompt), 64), random_tokens(1, 1, seed=2))
    torch.testing.assert_close(logits, eager, atol=1e-4, rtol=1e-4)


def test_a_policy_that_asks_a_sliding_layer_to_select():
    layers = {"0": "select", "1": "reuse"}
    with pytest.raises(
        tc.UnsupportedModelError, match=r"layer 0 \(select\): sliding-window.*layer 1 \(reuse\): its selection"
    ):
        record(family_pair("gemma3"), policy={"num_layers": 2, "layers": layers})


def test_not_strict_leaves_exact_what_it_cannot_follow():
    model = sliding_model()
    layers = {"0": "select", "1-2": "reuse", "3": "select", "4": "full", "5": "reuse"}
    with pytest.warns(UserWarning, match="layer 0 .select.: sliding-window"):
        recorder, _ = record(model, strict=False, policy={"num_layers": 6, "layers": layers})
    roles = [decision.role and decision.role.role for decision in recorder.plans[0].decisions]
    assert roles == [None, None, None, "select", None, "reuse"]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, None) for name in ("gemma2", "gemma3", "cohere2", "gpt_oss", "mistral")), ("gemma3", False)],
)
def test_token_counters_leave_the_graph(name, dynamic):
    """One graph before the window is full and one after, none with a number as input; the host's counters go on."""
    model = family_pair(name, **({"sliding_window": 16} if name == "mistral" else {}))
    tokens = random_tokens(2, 14, seed=2)
    recorder, prompt = Recorder(policy="full"), random_tokens(2, 9)
    step = torch.compile(model, backend=recorder, fullgraph=True, dynamic=dynamic)
    caches = [prefilled(model, prompt, 64) for _ in range(2)]
    got, eager = (decode_logits(one, cache, tokens) for one, cache in zip((step, model), caches, strict=True))
    torch.testing.assert_close(got, eager, atol=2e-4, rtol=2e-4)
    assert len(recorder.graphs) == 2
    for gm in recorder.graphs:
        inputs = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
        assert all(isinstance(value, torch.Tensor) for value in inputs)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert vars(ours).get("cumulative_length_int") == vars(theirs).get("cumulative_length_int")
        torch.testing.assert_close(ours.keys, theirs.keys, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dynamic", [None, True])
def test_token_counters_beside_a_length_that_changes(dynamic):
    """A cache shorter than the window is as long as it can be: with another cache, two numbers meet in one mask."""
    model, tokens = family_pair("gemma3", sliding_window=64), random_tokens(1, 6, seed=2)
    recorder = Recorder(policy="full")
    step = torch.compile(model, backend=recorder, fullgraph=True, dynamic=dynamic)
    for slots in (32, 48, 40):
        caches = [prefilled(model, random_tokens(1, 20), slots) for _ in range(2)]
        got, eager = (decode_logits(one, cache, tokens) for one, cache in zip((step, model), caches, strict=True))
        torch.testing.assert_close(got, eager, atol=2e-4, rtol=2e-4)
        assert caches[0].layers[0].cumulative_length_int == 26
    assert len(recorder.graphs) <= 2


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_a_number_that_dynamo_keeps_symbolic(form):
    """Two models of one class with different scales, without a reset: the second one's scale is no constant to Dynamo."""
    for head_dim in (16, 32):
        model = tiny_model(head_dim=head_dim, num_hidden_layers=2, attn_implementation=form)
        recorder, logits = record(model, policy="full")
        assert [one.call.call.scale for one in recorder.plans[0].decisions] == [head_dim**-0.5] * 2
        eager = decode_logits(model, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 1, seed=2))
        torch.testing.assert_close(logits, eager, atol=1e-4, rtol=1e-4)


def test_a_layer_may_read_the_cache_of_another():
    """Gemma 4's last layers have no keys of their own: they follow the policy under their own number."""
    shared = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
    kinds = ["sliding_attention", "full_attention"] * 2
    settings = {
        "layer_types": kinds,
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "global_head_dim": 16,
        "head_dim": 16,
    }
    model = tiny_model("gemma4_text", **shared, **settings)
    layers = {"0": "full", "1": "select", "2": "full", "3": "reuse"}
    recorder, logits = record(model, policy={"num_layers": 4, "defaults": {"budget": 80}, "layers": layers})
    decisions = recorder.plans[0].decisions
    assert [decision.layer for decision in decisions if decision.role] == [1, 3]
    assert decisions[1].call.call.key is decisions[3].call.call.key
    eager = decode_logits(model, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 1, seed=2))
    torch.testing.assert_close(logits, eager, atol=1e-4, rtol=1e-4)


def odd_attention(module, query, key, value, mask, scaling, **_):
    """Eager attention that gives every token a little more weight: no spelling that `forms` knows."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if mask is None else scores.masked_fill(~mask, -1e9)
    return ((scores.softmax(-1) + 0.01) @ value).transpose(1, 2), None


def with_odd_attention(model, layers):
    AttentionInterface.register("odd", odd_attention)
    AttentionMaskInterface.register("odd", sdpa_mask)
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        attention.config = copy.deepcopy(attention.config)
        attention.config._attn_implementation = "odd"
    return model


def test_unknown_eager_attention_is_named():
    model = with_odd_attention(tiny_model(num_hidden_layers=2), range(2))
    with pytest.raises(tc.UnsupportedModelError, match="eager attention whose scores come from masked_fill"):
        record(model, policy="full")
    with pytest.warns(UserWarning, match="left exact"):
        recorder, logits = record(model, policy="full", strict=False)
    eager = decode_logits(model, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 1, seed=2))
    torch.testing.assert_close(logits, eager, atol=1e-5, rtol=1e-5)
    assert recorder.before == recorder.after


class Eager(torch.nn.Module):
    """One attention call of a decode step in eager form, or something that resembles one."""

    def __init__(self, form):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].self_attn = EagerAttention(form)

    def forward(self, *args):
        return self.layers[0].self_attn(*args)


class EagerAttention(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.sinks = form, torch.nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, q, past_key_values, k_new, bias):
        form, layer = self.form, past_key_values.layers[0]
        position = torch.arange(1) + layer.cumulative_length
        layer.cumulative_length.add_(1)
        layer.keys.index_copy_(2, position, k_new)
        layer.values.index_copy_(2, position, k_new)
        keys, values = (x[:, :, None].expand(1, 2, 2, 8, 4).reshape(1, 4, 8, 4) for x in (layer.keys, layer.values))
        scores = torch.matmul(q, keys.transpose(-1, -2)) / 2.0
        scores = scores * 3 if form == "two-scales" else scores
        if form in ("softcap", "tanh"):
            scores = torch.tanh(scores / 5.0) * (5.0 if form == "softcap" else 4.0)
        bias = bias.expand(1, 4, 1, 8) if form == "mask-by-head" else bias > 0 if form == "bool-mask" else bias
        scores = scores + bias
        if form in ("sink", "sink-kept"):
            scores = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1)], -1)
            scores = scores - scores.max(dim=-1, keepdim=True).values
        if form == "two-sinks":
            scores = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(1, 4, 1, 2)], -1)
        weights = torch.nn.functional.softmax(scores, dim=1 if form == "over-heads" else -1, dtype=torch.float32)
        if form in ("sink", "drops-a-token"):
            weights = weights[..., :-1]
        if form == "two-sinks":
            weights = weights[..., :-2]
        if form == "dropout":
            weights = torch.nn.functional.dropout(weights, 0.1)
        if form in ("sink-kept", "drops-a-token"):
            values = torch.nn.functional.pad(values, (0, 0, 0, 1)) if form == "sink-kept" else values[:, :, :-1]
        out = torch.matmul(weights.to(q.dtype), values)
        return (out, weights) if form == "weights-returned" else out


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("plain", None),
        ("two-scales", None),
        ("softcap", None),
        ("sink", None),
        ("tanh", "tanh that is no soft cap"),
        ("mask-by-head", "a mask of shape (1, 4, 1, 8)"),
        ("two-sinks", "joined from parts in a way that is not an attention sink"),
        ("sink-kept", "not to matmul"),
        ("over-heads", "softmax over dimension 1"),
        ("drops-a-token", "drops the weight of a token"),
        ("dropout", "hands its weights to dropout"),
        ("bool-mask", "adds a torch.bool mask"),
        ("weights-returned", "weights are used elsewhere too"),
    ],
)
def test_eager_spellings(form, reason):
    """What is taken for attention computes what it did; what is not is named."""
    module, found = Eager(form), []
    q, k_new, bias = torch.randn(1, 4, 1, 4), torch.randn(1, 2, 1, 4), torch.randn(1, 1, 1, 8)
    bias[..., 4:] = torch.finfo(torch.float32).min

    def keep(gm, _):
        found.extend(find_attention(gm))
        if reason is None:
            apply_plan(gm, make_plan(found, resolve("full", 1, attention_layers=(0,)).roles))
        return gm.forward

    def cache():
        torch.manual_seed(0)
        config = tiny_model(num_hidden_layers=1).config
        cache = StaticCache(config=config, max_cache_len=8)
        cache.early_initialization(1, 2, 4, torch.float32, torch.device("cpu"))
        cache.layers[0].keys.normal_(), cache.layers[0].values.normal_()
        cache.layers[0].cumulative_length.fill_(3)
        return cache

    with torch.no_grad():
        got = torch.compile(module, backend=keep, fullgraph=True)(q, cache(), k_new, bias)
        if reason is None:
            assert [type(call) for call in found] == [AttentionSite]
            torch.testing.assert_close(got, module(q, cache(), k_new, bias))
        else:
            assert len(found) == 1 and reason in found[0].reason


def test_a_dynamic_cache_is_named():
    model = tiny_model(num_hidden_layers=2)
    step = torch.compile(model, backend=Recorder(policy="full"), fullgraph=True)
    with torch.no_grad(), pytest.raises(tc.UnsupportedModelError, match="keys are not read from a static cache"):
        past = model(input_ids=random_tokens(1, 5)).past_key_values
        step(input_ids=random_tokens(1, 1), past_key_values=past)


def test_added_masks():
    """A mask that is added to the scores is followed, whatever its numbers; one for each head is named."""
    model, bias = tiny_model(num_hidden_layers=2), torch.randn(1, 1, 1, 64)
    tokens = random_tokens(1, 1)
    step = torch.compile(model, backend=Recorder(policy="full"), fullgraph=True)
    bias[..., 6:] = torch.finfo(torch.float32).min  # what is not cached yet
    got, eager = (
        decode_logits(one, prefilled(model, random_tokens(1, 5), 64), tokens, [bias]) for one in (step, model)
    )
    torch.testing.assert_close(got, eager, atol=1e-4, rtol=1e-4)
    with pytest.raises(tc.UnsupportedModelError, match="one for all heads is supported"):
        decode_logits(step, prefilled(model, random_tokens(1, 5), 64), tokens, [bias.repeat(1, 4, 1, 1)])


def test_the_first_token_of_a_cache_is_no_decode_step():
    """Nothing is cached yet: exact under any policy, with a static cache that is yet to be allocated, or none."""
    model, recorder = tiny_model(num_hidden_layers=2), Recorder(policy="tidal", budget=80)
    cache = StaticCache(config=model.config, max_cache_len=64)
    tokens = random_tokens(1, 1)
    with torch.no_grad():
        for past in ({"past_key_values": cache}, {"use_cache": False}):
            got = torch.compile(model, backend=recorder, fullgraph=True)(input_ids=tokens, **past).logits
            torch.testing.assert_close(got, model(input_ids=tokens).logits, atol=1e-5, rtol=1e-5)
            torch._dynamo.reset()
    assert recorder.plans == [None, None]


def test_float64_is_named():
    model = tiny_model(num_hidden_layers=1).double()
    with pytest.raises(tc.UnsupportedModelError, match="torch.float64"):
        record(model, policy="full")


def test_no_attention_at_all():
    linear = torch.nn.Linear(4, 4)
    with pytest.raises(tc.UnsupportedModelError, match="no attention call of the graph can be rewritten"):
        torch.compile(linear, backend="tidal", options={"policy": "full"})(torch.randn(2, 4))
    torch._dynamo.reset()
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="no attention call"):
        out = torch.compile(linear, backend="tidal", options={"policy": "full", "strict": False})(x)
    torch.testing.assert_close(out, linear(x))


class Lookalike(torch.nn.Module):
    """SDPA over something that resembles a cached decode step, and is none."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, q, past_key_values, k_new):
        layer, other = past_key_values.layers
        position = torch.arange(1) + layer.cumulative_length
        layer.cumulative_length.add_(1)
        keys, values = layer.keys, layer.values
        keys.index_copy_(2, position, k_new)
        values.index_copy_(2, position, k_new)
        if self.form == "cross-layer":
            values = other.values
        if self.form == "written-twice":
            keys.index_copy_(2, position, k_new)
        if self.form == "causal":
            return torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True)
        if self.form == "repeat-on-other-dim":  # [B, 1, H, S, D]: heads repeated in blocks, not head by head
            keys, values = (x[:, None].expand(1, 2, 2, 8, 4).reshape(1, 4, 8, 4) for x in (keys, values))
            q = q.repeat(1, 2, 1, 1)
        if self.form == "repeat-of-tokens":  # the view of repeat_kv, folded into the tokens instead of the heads
            keys, values = (x[:, :, None].expand(1, 2, 2, 8, 4).reshape(1, 2, 16, 4) for x in (keys, values))
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("cross-layer", "values are written by 0 index_copy_"),
        ("written-twice", "keys are written by 2 index_copy_"),
        ("causal", "is_causal=True"),
        ("repeat-on-other-dim", "keys are computed from what the cache holds (reshape, expand, getitem)"),
        ("repeat-of-tokens", "keys are computed from what the cache holds (reshape, expand, getitem)"),
        ("plain", None),
    ],
)
def test_lookalikes(form, reason):
    config = tiny_model(num_hidden_layers=2).config
    cache = StaticCache(config=config, max_cache_len=8)
    cache.early_initialization(1, 2, 4, torch.float32, torch.device("cpu"))
    found = []

    def keep(gm, _):
        found.extend(find_attention(gm))
        return gm.forward

    torch.compile(Lookalike(form), backend=keep, fullgraph=True)(
        torch.randn(1, 2, 1, 4), cache, torch.randn(1, 2, 1, 4)
    )
    if reason is None:
        assert [type(call) for call in found] == [AttentionSite]
    else:
        assert len(found) == 1 and reason in found[0].reason


def test_kv_share_counts_tokens():
    model = tiny_model(num_hidden_layers=4)  # 1 layer reuses, 2 query heads a kv head
    calls, num_layers = decode_calls(model)
    for options, expected in (
        ({"budget": 100, "sinks": 4, "recent": 4}, (3 + 0.1) / 4),
        ({"budget": 100, "sinks": 4, "recent": 4, "share": "query_head"}, (3 + 0.2) / 4),
        ({"budget": {"ratio": 0.25, "min": 100}}, (3 + 0.25) / 4),
        ({"budget": 5000}, 1.0),
    ):
        _, plan = lay_over(calls, num_layers, Options.parse({"policy": "tidal", **options}))
        assert kv_share(plan, 1000) == pytest.approx(expected)
    _, plan = lay_over(*decode_calls(family_pair("gemma3")), Options.parse({"policy": "full"}))
    assert kv_share(plan, 1000) == 1.0


def test_a_model_that_only_slides():
    """Nothing is full attention: `full` is what it does anyway, and anything else can't be followed."""
    model = tiny_model("mistral", num_hidden_layers=2, sliding_window=32)
    recorder, _ = record(model, policy="full")
    assert recorder.plans[0].rewritten == 0 and recorder.before == recorder.after
    for policy in ("tidal", {"num_layers": 2, "layers": {"0": "select", "1": "reuse"}}):
        torch._dynamo.reset()
        with pytest.raises(tc.UnsupportedModelError, match="sliding-window layer"):
            record(model, policy=policy)
    torch._dynamo.reset()
    with pytest.raises(tc.PolicyError, match="num_layers is 30, but the model has 2"):
        record(model, policy="smollm2")


def test_a_preset_counts_layers_that_cannot_be_matched():
    """One odd layer among SDPA layers: the preset gives it a role, and it can't follow."""
    with pytest.raises(tc.UnsupportedModelError, match=r"layer 3 \(reuse\): eager attention whose scores"):
        record(with_odd_attention(tiny_model(num_hidden_layers=4), [3]), policy="tidal", budget=80)


def test_a_preset_that_leaves_all_exact_says_so():
    with pytest.warns(UserWarning, match="preset 'tidal' is exact here: 3 full-attention layers"):
        record(tiny_model(num_hidden_layers=3), policy="tidal", budget=80)


def test_gradients_are_refused():
    model = tiny_model(num_hidden_layers=1)
    cache = prefilled(model, random_tokens(1, 5), 64)
    with pytest.raises(tc.UnsupportedModelError, match="no_grad"):
        torch.compile(model, backend=Recorder(policy="full"))(input_ids=random_tokens(1, 1), past_key_values=cache)

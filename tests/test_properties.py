"""Properties that hold for any shape, mask, length and policy, on random ones (hypothesis)."""

import contextlib
import json
import math

import oracle
import torch
from attention import DEVICE, IMPLEMENTATIONS, check_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import decode_logits, prefilled, random_tokens, tiny_model
from oracle import OracleModel, roles_of

import tidal_compile as tc
from tidal_compile.step import PolicyStep


def examples(count):
    """The same examples in every run: a failure of CI is a failure here."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks)


@st.composite
def attention_calls(draw):
    """q, k, v, length, mask, scale; sink and softcap; budget, ratio, sinks, recent, share."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    slots, head_dim = draw(st.integers(1, 150)), draw(st.sampled_from([16, 20, 64]))
    length = draw(st.integers(0, slots))
    q = torch.randn(batch, kv_heads * group, 1, head_dim, generator=generator)
    k, v = (torch.randn(batch, kv_heads, slots, head_dim, generator=generator) for _ in range(2))
    k[:, :, length:], v[:, :, length:] = math.nan, math.inf
    kind = draw(st.sampled_from(["none", "bool", "added"]))
    mask = torch.rand(draw(st.sampled_from([1, batch])), 1, 1, slots, generator=generator) < draw(st.floats(0, 1))
    if kind == "added":
        bias = torch.randn(mask.shape, generator=generator)
        mask = bias.masked_fill(~mask, torch.finfo(torch.float32).min)
    mask = None if kind == "none" else mask
    sink = torch.randn(kv_heads * group, generator=generator) if draw(st.booleans()) else None
    extra = {"sink": sink, "softcap": draw(st.sampled_from([0.0, 0.5, 30.0]))}
    sinks, recent = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    budget = max(1, sinks + recent, draw(st.integers(1, 200)))
    ratio = draw(st.sampled_from([0.0, 0.1, 0.333, 1.0]))
    share = draw(st.sampled_from(["query_head", "kv_head", "layer"]))
    return (q, k, v, torch.tensor(length), mask, head_dim**-0.5), extra, (budget, ratio, sinks, recent, share)


def check_call(name, call):
    (q, k, v, length, mask, scale), extra, (budget, ratio, sinks, recent, share) = call
    here = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (q, k, v, length, mask, scale)]
    extra_here = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in extra.items()}
    ops = IMPLEMENTATIONS[name]
    scores, valid = oracle.scores_of(q, k, int(length), mask, scale, extra["softcap"])
    dense = oracle.attend(scores, v, sink=extra["sink"])
    close = {"atol": 5e-6, "rtol": 5e-6}
    out, index = ops.select_attention(*here, budget, ratio, sinks, recent, share, **extra_here)
    torch.testing.assert_close(out.cpu().double(), dense, **close)
    importance = oracle.importance_of(scores, k.shape[1], share, extra["sink"])
    check_index(index, importance, valid, budget, ratio, sinks, recent, slack=2e-5)
    sparse = ops.sparse_attention(*here[:3], index, *here[3:], **extra_here)
    rows = [[[p for p in row if p >= 0] for row in sets] for sets in index.tolist()]
    allowed = oracle.sets_as_mask(rows, q.shape[1], scores.shape[2])
    torch.testing.assert_close(sparse.cpu().double(), oracle.attend(scores, v, allowed, extra["sink"]), **close)


@examples(60)
@given(attention_calls())
def test_reference_ops(call):
    check_call("reference", call)


@examples(25)
@given(attention_calls())
def test_triton_ops(call):
    check_call("triton", call)


@st.composite
def policies(draw, num_layers=4):
    """Valid policy files for a model of so many layers."""
    share, pool = st.sampled_from(["query_head", "kv_head", "layer"]), st.sampled_from(["sum", "max", "union"])
    budget = st.one_of(
        st.integers(6, 60), st.fixed_dictionaries({"ratio": st.sampled_from([0.1, 0.5]), "min": st.integers(6, 20)})
    )
    defaults = {
        "budget": draw(budget),
        "sinks": draw(st.integers(0, 3)),
        "recent": draw(st.integers(0, 3)),
        "share": draw(share),
    }
    layers, selections = {}, []
    for layer in range(num_layers):
        role = draw(st.sampled_from(["full", "select", "reuse"] if selections else ["full", "select"]))
        entry = {"role": role}
        if role == "select":
            more = {"budget": budget, "share": share, "pool": pool, "output": st.sampled_from(["full", "sparse"])}
            entry |= draw(st.fixed_dictionaries({}, optional=more))
            selections.append(layer)
        if role == "reuse" and draw(st.booleans()):
            entry["from"] = draw(st.sampled_from(selections))
        layers[str(layer)] = entry
    return {"version": 1, "num_layers": num_layers, "defaults": defaults, "layers": layers}


MODEL = tiny_model(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
STEP = PolicyStep(MODEL)  # one trace with masks and one without, for all policies


@examples(20)
@given(policies(), st.integers(2, 50), st.booleans())
def test_any_policy_equals_the_oracle(data, prompt_length, padded):
    policy, prompt, tokens = tc.Policy.from_dict(data), random_tokens(2, prompt_length), random_tokens(2, 3, seed=2)
    mask = masks = None
    if padded:
        mask = torch.ones(2, prompt_length, dtype=torch.long)
        mask[0, : prompt_length // 2] = 0
        wide = torch.cat([mask, torch.ones(2, 56 - prompt_length, dtype=torch.long)], 1).bool()
        masks = [(wide & (torch.arange(56) <= prompt_length + i))[:, None, None] for i in range(3)]

    def step(**inputs):
        return STEP(policy.roles, **inputs)

    got = decode_logits(step, prefilled(MODEL, prompt, 56, mask), tokens, masks)
    expected = OracleModel(MODEL, roles_of(policy)).logits(prompt, tokens, mask)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.floats(allow_nan=True), st.text(max_size=8))
roles = st.sampled_from(["full", "select", "reuse", "dense", "quest"])
KEYS = [
    "version",
    "name",
    "num_layers",
    "defaults",
    "layers",
    "budget",
    "role",
    "from",
    "ratio",
    "share",
    "0-3",
    "2",
    "9",
]
anything = st.recursive(
    st.one_of(scalars, roles),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(KEYS), scalars), inner, max_size=5)
    ),
    max_leaves=12,
)


@examples(400)
@given(anything, policies(), st.lists(st.tuples(st.sampled_from(KEYS), anything), max_size=3))
def test_bad_policies_raise_policy_errors_only(value, data, changes):
    """Any data at all, and valid files with some keys replaced."""
    for candidate in (value, {**data, **dict(changes)}, {**data, "layers": value}, {**data, "defaults": value}):
        with contextlib.suppress(tc.PolicyError):
            policy = tc.Policy.from_dict(candidate)
            assert tc.Policy.from_dict(policy.to_dict()) == policy


@examples(200)
@given(
    st.one_of(st.text(max_size=60), anything.map(lambda value: json.dumps(value, default=str)), st.binary(max_size=40))
)
def test_bad_policy_files_raise_policy_errors_only(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("policy") / "p.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(tc.PolicyError):
        tc.Policy.load(file)

"""Policy files: what they mean, and the error for each way to get one wrong."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import tidal_compile as tc
from tidal_compile.kernels.call import Selection
from tidal_compile.policy import resolve, shipped

GOOD = {"version": 1, "num_layers": 4, "defaults": {"budget": 100}, "layers": {"0-1": "full", 2: "select", 3: "reuse"}}


def roles(policy):
    return [(role.role, role.source) for role in policy.roles]


def test_a_file_in_yaml_and_json(tmp_path):
    text = """
        version: 1
        name: example
        num_layers: 32
        defaults: {budget: 1024, sinks: 4, recent: 64, share: kv_head}
        layers:
          0-1: full
          2: select
          3-12: reuse
          13: {role: select, budget: {ratio: 0.1, min: 128}, share: layer}
          14-30: {role: reuse}
          31: {role: reuse, from: 2}
        calibration: {model: x, kl: 0.04}
    """
    file = tmp_path / "p.yaml"
    file.write_text(text)
    policy = tc.Policy.load(file)
    assert [role.source for role in policy.roles] == [None] * 3 + [2] * 10 + [None] + [13] * 17 + [2]
    at = policy.roles
    assert at[12].selection == Selection(1024, 0.0, 4, 64, "kv_head")
    assert at[20].selection == Selection(128, 0.1, 4, 64, "layer")
    for copy in (tc.Policy.from_dict(policy.to_dict()), tc.Policy.from_dict(yaml.safe_load(policy.to_yaml()))):
        assert copy == policy and copy.roles == policy.roles
    (tmp_path / "p.json").write_text(policy.model_dump_json(by_alias=True, exclude_none=True))
    assert tc.Policy.load(tmp_path / "p.json") == policy


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, "f"), (2, "ff"), (3, "ffs"), (4, "ffsr"), (6, "ffsrrr"), (10, "ffsrsrrrrr"),
        (32, "ff" + "s" + "r" * 10 + "s" + "r" * 18),
    ],
)  # fmt: skip
def test_the_tidal_preset(layers, expected):
    assert "".join(role.role[0] for role in tc.Policy.preset("tidal", layers).roles) == expected


def test_published_layers_by_model_name():
    def second(layers, model):
        return [role.layer for role in tc.Policy.preset("tidal", layers, model=model).roles if role.role == "select"][1]

    assert second(32, "meta-llama/Llama-2-7b-hf") == 7
    assert second(36, "Qwen/Qwen3-8B") == 12
    assert second(36, "Qwen/Qwen3-4B") == 20
    assert second(36, None) == 14


def test_presets_count_full_attention_layers_only():
    policy = tc.Policy.preset("tidal", 12, attention_layers=(2, 5, 8, 11))
    expected = [("full", None)] * 12
    expected[8], expected[11] = ("select", None), ("reuse", 8)
    assert roles(policy) == expected


def test_shipped_policies_are_valid():
    assert "smollm2" in shipped()
    for path in shipped().values():
        assert tc.Policy.load(path).roles
    smollm2 = resolve("smollm2", 30)
    assert [role.layer for role in smollm2.roles if role.role == "select"] == [2, 7, 17, 20]
    assert smollm2.defaults.model_dump(exclude_none=True) == {"budget": 256, "sinks": 4, "recent": 32, "share": "layer"}
    gemma = resolve("gemma3-270m", 18)
    assert {role.layer: role.role for role in gemma.roles if role.role != "full"} == {
        5: "select",
        11: "reuse",
        17: "reuse",
    }


def test_overrides_replace_defaults_only():
    data = {**GOOD, "layers": {0: {"role": "select", "budget": 300}, 1: "reuse", 2: "select", 3: "reuse"}}
    policy = resolve(data, 4, budget=200, share="layer")
    assert [(role.selection.budget, role.selection.share) for role in policy.roles] == [(300, "layer")] * 2 + [
        (200, "layer")
    ] * 2
    assert resolve("tidal", 4, budget={"ratio": 0.5, "min": 99}).roles[2].selection.ratio == 0.5


BAD = {
    "missing num_layers": ({"num_layers": ...}, "num_layers: missing"),
    "text num_layers": ({"num_layers": "4"}, "num_layers: .*found \"4\""),
    "unknown key": ({"layres": {}}, "layres: unknown key; valid keys are version, name"),
    "version": ({"version": 2}, "version: found 2; valid values are 1"),
    "gap": ({"layers": {"0-1": "full", 3: "full"}}, "no role for layer 2 of 4"),
    "overlap": ({"layers": {"0-2": "full", 2: "select", 3: "reuse"}}, "layers.2: layer 2 is already set by layers.0-2"),
    "beyond": ({"layers": {"0-4": "full"}}, "layers.0-4: the layers of this policy are 0 to 3"),
    "backwards": ({"layers": {"3-0": "full"}}, "layers.3-0: the range runs backwards"),
    "no layer": ({"layers": {"a": "full"}}, r"layers.a: a key is a layer \(2\) or an inclusive range"),
    "twice": ({"layers": {0: "full", "0": "full", "1-3": "full"}}, "given twice"),
    "reuse first": ({"layers": {"0-2": "full", 3: "reuse"}}, "layers.3: layer 3 reuses tokens, but no layer before"),
    "from": ({"layers": {"0-1": "full", 2: "select", 3: {"role": "reuse", "from": 1}}}, "layers.3.from: layer 1 is no selection"),
    "from later": ({"layers": {0: "select", 1: {"role": "reuse", "from": 2}, "2-3": "select"}}, "selections are: 0"),
    "from of full": ({"layers": {0: {"role": "full", "from": 1}, "1-3": "full"}}, "only a reuse layer"),
    "budget of reuse": ({"layers": {"0-2": "select", 3: {"role": "reuse", "budget": 9}}}, "only be set on a select layer"),
    "role": ({"layers": {"0-3": "dense"}}, "layers.0-3.role: found \"dense\"; valid values are 'full', 'select' or 'reuse'"),
    "no role": ({"layers": {"0-3": {}}}, "layers.0-3.role: missing"),
    "key of entry": ({"layers": {"0-3": {"role": "full", "bugdet": 1}}}, "layers.0-3.bugdet: unknown key; valid keys are role"),
    "entry": ({"layers": {"0-3": 5}}, "layers.0-3: an entry is a role"),
    "list": ({"layers": ["full"] * 4}, "layers: .*dictionary"),
    "budget 0": ({"defaults": {"budget": 0}}, "defaults.budget: a budget is a number of tokens >= 1"),
    "budget text": ({"defaults": {"budget": "1k"}}, "defaults.budget: a budget is.*found \"1k\""),
    "budget true": ({"defaults": {"budget": True}}, "defaults.budget: a budget is"),
    "ratio 2": ({"defaults": {"budget": {"ratio": 2}}}, "defaults.budget: a budget is"),
    "small budget": ({"defaults": {"budget": 60}}, r"layers.2: budget 60 is smaller than sinks \+ recent \(4 \+ 64\)"),
    "small minimum": ({"defaults": {"budget": {"ratio": 0.1, "min": 5}}}, "budget 5 is smaller than sinks"),
    "sinks": ({"defaults": {"sinks": -1}}, "defaults.sinks: .*found -1"),
    "recent": ({"defaults": {"recent": 1.5}}, "defaults.recent: .*found 1.5"),
    "share": ({"defaults": {"share": "head"}}, "defaults.share: found \"head\"; valid values are 'query_head', 'kv_head' or 'layer'"),
    "defaults key": ({"defaults": {"sink": 1}}, "defaults.sink: unknown key; valid keys are budget, sinks, recent, share"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_mistake_is_named(name):
    change, message = BAD[name]
    data = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    with pytest.raises(tc.PolicyError, match=f"^file.yaml: .*{message}"):
        tc.Policy.from_dict(data, where="file.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a policy is a mapping"), (b"- 1", "a policy is a mapping"), (b"a: [", "not a YAML or JSON"),
        (b"\xff\xfe\x00a", "not a YAML or JSON"), (b"num_layers: 1\nnum_layers: 2", "'num_layers' is given twice"),
        (b"layers: {0: full, 0: select}", "'0' is given twice"), (b"2020-13-45: x", "not a YAML or JSON"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(tc.PolicyError, match=f"bad.yaml: .*{message}"):
        tc.Policy.load(file)


def test_missing_files_and_unknown_names(tmp_path):
    for path in ("missing.yaml", str(tmp_path / "x"), str(tmp_path)):
        with pytest.raises(tc.PolicyError, match="can't read the policy file"):
            resolve(path, 4)
    with pytest.raises(
        tc.PolicyError,
        match="unknown policy 'quest2'.*presets are: full, tidal, .*; shipped policies are: gemma3-270m, gemma3-270m-flat, smollm2",
    ):
        resolve("quest2", 4)
    with pytest.raises(tc.PolicyError, match="unknown preset 'x'; presets are: full, tidal"):
        tc.Policy.preset("x", 4)
    with pytest.raises(tc.PolicyError, match="unknown key; valid keys are budget, sinks"):
        tc.Policy.preset("tidal", 4, bugdet=1)
    with pytest.raises(tc.PolicyError, match="num_layers is 4, but the model has 5 decoder layers"):
        resolve(GOOD, 5)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats(allow_nan=False) | st.sampled_from(["full", "select", "reuse", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "budget", "sinks", "recent", "share", "from", "ratio", "min", "0", "0-3", "2", "1-3"]), inner,
        max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("version", "name", "num_layers", "defaults", "layers", "other"), plain)
    )
)
def test_random_policies_never_fail_with_anything_but_policy_error(data):
    try:
        policy = tc.Policy.from_dict(data)
    except tc.PolicyError:
        return
    assert len(policy.roles) == policy.num_layers

"""Policies from elsewhere: other systems' layer choices, folders and Hugging Face repositories."""

import json

import numpy
import pytest
import torch
from commands import run
from models import decode_logits, prefilled, random_tokens, tiny_model
from oracle import OracleModel, roles_of
from policies import tidal_step

import tidal_compile as tc
from tidal_compile import imports
from tidal_compile.kernels.call import Selection

pytestmark = pytest.mark.uncompiled


def letters_of(policy):
    return "".join({"full": "f", "select": "S", "reuse": "r"}[role.role] for role in policy.roles)


def test_kascade_head_maps(tmp_path):
    heads = numpy.array([[0, 1], [1, 0], [0, 1], [1, 1], [0, 1], [0, 0]], dtype=numpy.int32)
    file = tmp_path / "tiny_layers_0_2.npy"
    numpy.save(file, heads)
    policy = imports.from_kascade(file, budget=24, recent=4)
    assert letters_of(policy) == "SrSrrr"
    assert [role.heads for role in policy.roles] == [None, (1, 0), None, (1, 1), None, (0, 0)]
    model, prompt, tokens = tiny_model(), random_tokens(1, 90), random_tokens(1, 8, seed=2)
    expected = OracleModel(model, roles_of(policy)).logits(prompt, tokens)
    got = decode_logits(tidal_step(model, policy), prefilled(model, prompt, 128), tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    usual = imports.from_kascade(file).roles[0]
    assert usual.selection == Selection(128, 0.1, 0, 0)

    numpy.save(tmp_path / "other.npy", heads)
    numpy.save(tmp_path / "flat_layers_0.npy", heads[0])
    numpy.save(tmp_path / "far_layers_0_9.npy", heads)
    (tmp_path / "text_layers_0.npy").write_text("heads")
    for name, message in (
        ("other", "stand in a Kascade file's name"),
        ("flat_layers_0", "num_layers, num_kv_heads"),
        ("far_layers_0_9", "of the 6 layers"),
        ("text_layers_0", "not a .npy file"),
        ("none_layers_0", "not a .npy file"),
    ):
        with pytest.raises(tc.PolicyError, match=message):
            imports.from_kascade(tmp_path / f"{name}.npy")


def test_indexer_types():
    policy = imports.from_indexer_types(["full", "shared", "shared", "full", "shared"])
    assert letters_of(policy) == "SrrSr" and policy == imports.from_indexer_types("FSSFS")
    assert policy.roles[1].selection.share == "layer" and policy.roles[1].selection.budget == 2048
    for types, message in ((["full", "half"], "layer 1 is 'half'"), ("SF", "no layer before it"), ([], "none")):
        with pytest.raises(tc.PolicyError, match=message):
            imports.from_indexer_types(types)


def test_omnikv():
    policy = imports.from_omnikv([2, 8, 18], 24, budget=512)
    assert letters_of(policy) == "ffSfrrrrSfrrrrrrrrSfrrrr"
    assert policy.roles[23].source == 18 and policy.roles[23].selection.share == "layer"
    assert policy.roles[23].selection.budget == 512
    with pytest.raises(tc.PolicyError, match="of the 10 layers"):
        imports.from_omnikv([2, 18], 10)


def test_a_head_map_must_fit():
    start = {"num_layers": 3, "defaults": {"budget": 24, "sinks": 2, "recent": 4}}
    for layers, message in (
        ({"0": {"role": "select", "heads": [0, 1]}, "1-2": "reuse"}, "only a reuse layer maps"),
        ({"0": {"role": "select", "share": "layer"}, "1-2": {"role": "reuse", "heads": [1, 0]}}, "needs kv_head"),
        ({"0": "select", "1-2": {"role": "reuse", "heads": [-1, 0]}}, "heads"),
    ):
        with pytest.raises(tc.PolicyError, match=message):
            tc.Policy.from_dict({**start, "layers": layers})
    model = tiny_model(num_hidden_layers=3)
    for heads in ([1, 0, 1], [0, 2]):
        policy = tc.Policy.from_dict({**start, "layers": {"0": "select", "1-2": {"role": "reuse", "heads": heads}}})
        assert "must name, for each of its 2 kv heads" in tc.explain(model, policy).problems[0]
    fits = tc.Policy.from_dict({**start, "layers": {"0": "select", "1-2": {"role": "reuse", "heads": [1, 0]}}})
    assert "layer 0, heads 1 0" in str(tc.explain(model, fits))


def test_another_budget_is_every_selections():
    policy = tc.Policy.from_dict({
        "num_layers": 4, "defaults": {"budget": 256, "sinks": 4, "recent": 32},
        "layers": {"0": {"role": "select", "budget": 99}, "1": "reuse", "2": {"role": "select", "recent": 40}, "3": {"role": "reuse", "from": 0}},
    })  # fmt: skip
    small = policy.with_budget(16)
    assert {(one.selection.budget, one.selection.sinks, one.selection.recent) for one in small.roles} == {(16, 2, 8)}
    assert small.roles[3].source == 0
    large = policy.with_budget(1024)
    assert {(one.selection.budget, one.selection.sinks, one.selection.recent) for one in large.roles} == {(1024, 4, 32)}


def test_folders_and_repositories(tmp_path, monkeypatch):
    import huggingface_hub

    policy = imports.from_indexer_types("FSFS")
    policy.save(tmp_path / "tidal_policy.yaml")
    policy.save(tmp_path / "policy.json")
    assert json.loads((tmp_path / "policy.json").read_text())["num_layers"] == 4
    assert tc.Policy.load(tmp_path) == tc.Policy.load(tmp_path / "policy.json") == policy
    tc.compile_config(str(tmp_path))  # any place that takes a file takes a folder
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        if repo == "someone/none":
            raise huggingface_hub.errors.LocalEntryNotFoundError("404")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert tc.Policy.load("someone/model") == policy and asked == [("someone/model", "tidal_policy.yaml")]
    assert tc.compile_config("someone/model").options["policy"]["num_layers"] == 4
    with pytest.raises(tc.PolicyError, match=r"no tidal_policy.yaml in a repository"):
        tc.Policy.load("someone/none")
    with pytest.raises(tc.PolicyError, match="can't read the policy file"):
        tc.Policy.load("policies/mine.yaml")
    assert ("policies/mine.yaml", "tidal_policy.yaml") not in asked

    sent, kinds = [], []

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, repo_type, exist_ok):
            kinds.append(repo_type)
            if repo_id == "someone/closed":
                raise OSError("403 Forbidden")

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id, commit_message, repo_type=None):
            sent.append((tc.Policy.from_dict(json.loads(json.dumps(yaml_of(path_or_fileobj)))), path_in_repo, repo_id))
            return type("Commit", (), {"commit_url": "https://example.org/commit"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert policy.push_to_hub("someone/model", token="secret") == "https://example.org/commit"
    assert sent == [(policy, "tidal_policy.yaml", "someone/model")]
    policy.push_to_hub("someone/data", token="secret", repo_type="dataset")
    assert kinds == [None, "dataset"]
    with pytest.raises(tc.PolicyError, match="someone/closed: can't push the policy: 403"):
        policy.push_to_hub("someone/closed", token="secret")


def yaml_of(data):
    import yaml

    return yaml.safe_load(data)


def test_the_command_line(tmp_path):
    file = tmp_path / "tiny_layers_0_2.npy"
    numpy.save(file, numpy.array([[0, 1], [1, 0], [0, 1]], dtype=numpy.int64))
    config = tmp_path / "config.json"
    types = tmp_path / "types.json"
    types.write_text(json.dumps(["full", "shared", "full"]))
    config.write_text(json.dumps({"indexer_types": ["full", "shared"]}))
    for options, expected in (
        (["--kascade", file], "SrS"),
        (["--indexer-types", "FSF"], "SrS"),
        (["--indexer-types", "full, shared"], "Sr"),
        (["--indexer-types", types], "SrS"),
        (["--indexer-types", config], "Sr"),
        (["--omnikv", "1,3", "--num-layers", 6], "fSfSfr"),
    ):
        assert run("policy", "import", tmp_path / "out.yaml", *options, "--budget", 300)[0] == 0
        policy = tc.Policy.load(tmp_path / "out.yaml")
        assert letters_of(policy) == expected and policy.defaults.budget == 300
    assert run("policy", "export", tmp_path / "out.yaml", tmp_path / "out.json")[0] == 0
    assert tc.Policy.load(tmp_path / "out.json") == policy
    for options, message in (
        ([], "give one of"),
        (["--omnikv", "1;3"], "give layers as 2,8,18"),
        (["--indexer-types", file], "layer 0"),
    ):
        assert message in run("policy", "import", tmp_path / "out.yaml", *options)[2].message

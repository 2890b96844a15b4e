"""The command line and `explain`, as a user runs them."""

import json
import shutil
import subprocess
import sys

import pytest
from commands import quick
from models import family_pair, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tidal_compile as tc
from tidal_compile.evaluate import tasks


def cli(*arguments):
    """Run in a process of its own, as a user does: exit code, standard output, standard error."""
    command = [sys.executable, "-m", "tidal_compile", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a word tokenizer that knows the pass-key prompt, saved as Hugging Face does."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(num_hidden_layers=4).save_pretrained(folder)
    text = tasks.FILLER + tasks.MAGIC + " ".join(map(str, range(10))) + tasks.HEAD + tasks.NEEDLE + tasks.QUESTION
    words = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)
    vocab = {word: number for number, word in enumerate(dict.fromkeys(["?", *(word for word, _ in words)]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments", [["--help"], ["policy", "list"], ["policy", "show", "smollm2"], ["nonsense"], ["--version"]]
)
def test_what_needs_no_model_starts_without_torch(arguments):
    code = (
        "import sys; from tidal_compile.__main__ import main; sys.argv[1:] = {}\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {{'torch', 'transformers', 'matplotlib'}} & sys.modules.keys(); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if arguments == ["--version"]:
        assert done.stdout.startswith(f"tidal-compile {tc.__version__} (torch ")


@pytest.mark.parametrize(
    "process",
    [
        pytest.param(False, marks=pytest.mark.uncompiled, id="uncompiled"),
        pytest.param(True, marks=pytest.mark.slow, id="a-process-of-its-own"),
    ],
)
def test_run_writes_what_it_prints(folder, tmp_path, process):
    arguments = (
        "run", "--model", folder, "--context", 200, "--new-tokens", 8, "--budget", 70, "--policy", "full", "--policy", "tidal", "--prompts", 2,
        "--baseline", "eager", "--device", "cpu", "--out", tmp_path, "--json",
    )  # fmt: skip
    code, out, err = cli(*arguments) if process else (0, quick(*arguments), "")
    assert code == 0, err
    record = json.loads(out)
    [file] = tmp_path.glob("*.json")
    assert json.loads(file.read_text()) == record
    [chart] = tmp_path.glob("*.png")
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 5000
    eager, full, tidal = record["variants"]
    assert [variant["name"] for variant in record["variants"]] == ["eager", "tidal: full", "tidal: tidal"]
    assert eager["tokens"] == full["tokens"] and len(full["tokens"]) == 8
    assert len(record["prompts"]) == 2 == len(set(record["prompts"])) and len(tidal["answers"]) == 2
    assert eager["answers"] == full["answers"] and full["found"] == 0  # random weights, whose answers are looked at
    assert full["kv_share"] == 1.0 and tidal["kv_share"] == pytest.approx((3 + 70 / (record["context"] + 7)) / 4)
    assert tidal["roles"] == ["full", "full", "select", "reuse"]
    assert all(variant["median_ms"] > 0 for variant in record["variants"]) and record["versions"]["torch"]


@pytest.mark.uncompiled
def test_run_rewinds_sliding_windows(folder, tmp_path):
    """Variants of a model with sliding layers start from the same cache, though a window forgets."""
    sliding = tmp_path / "sliding"
    shutil.copytree(folder, sliding)
    settings = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    tiny_model("gemma3_text", num_hidden_layers=2, **settings).save_pretrained(sliding)
    record = json.loads(quick(
        "run", "--model", sliding, "--context", 200, "--new-tokens", 8, "--policy", "full", "--baseline", "eager",
        "--baseline", "inductor", "--device", "cpu", "--out", tmp_path / "out", "--json",
    ))  # fmt: skip
    tokens = [variant["tokens"] for variant in record["variants"]]
    assert tokens[0] == tokens[1] == tokens[2]


def test_explain_as_table_and_json(folder):
    table = quick("explain", "--model", folder, "--policy", "tidal", "--budget", "99")
    assert "layer 2" in table and "whole cache" in table and "99" in table and "left alone" not in table
    record = json.loads(quick("explain", "--model", folder, "--json"))
    assert [call["role"] for call in record["calls"]] == ["full", "full", "select", "reuse"]
    assert record["calls"][3]["source"] == 2


def test_explain_an_8b_shape_without_its_memory():
    record = json.loads(quick("explain", "--model", "random:llama-3.1-8b", "--json"))
    assert [call["layer"] for call in record["calls"] if call["role"] == "select"] == [2, 13]
    assert {call["kv_heads"] for call in record["calls"]} == {8}


def test_explain_names_why_a_layer_is_left_alone():
    model = tiny_model(
        "gemma3_text", head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 3
    )
    explanation = tc.explain(model, "tidal")
    assert [row.role for row in explanation.rows] == [None, "full", None, "full", None, "select"]
    assert "sliding-window layer: left as it is" in str(explanation)
    latent = json.loads(quick("explain", "--model", "random:deepseek_v3", "--policy", "full", "--json"))
    assert all(row["role"] is None and "multi-head latent attention" in row["reason"] for row in latent["calls"])
    asks = tc.explain(family_pair("gemma3"), {"num_layers": 2, "layers": {"0": "select", "1": "reuse"}})
    assert len(asks.problems) == 2 and "can't follow the policy: layer 0 (select)" in str(asks)


def test_explain_leaves_the_model_as_it_was():
    model = tiny_model(num_hidden_layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tc.explain(model, "tidal")
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    with pytest.raises(tc.PolicyError, match="num_layers is 30, but the model has 2"):
        tc.explain(model, "smollm2")


def test_policy_commands(tmp_path, folder):
    names = {row["name"] for row in json.loads(quick("policy", "list", "--json"))}
    assert names == {
        "full", "tidal", "topk", "window", "quest", "lessismore", "kascade", "omnikv", "flat",
        "magicpig", "magicpig_9_120", "magicpig_8_75", "magicpig_cpu",
        "smollm2", "gemma3-270m", "smollm2-flat", "gemma3-270m-flat",
    }  # fmt: skip
    assert "smollm2" in quick("policy", "list")
    file = tmp_path / "p.yaml"
    quick("policy", "init", file, "--num-layers", 32, "--budget", 700)
    assert tc.Policy.load(file) == tc.Policy.preset("tidal", 32, budget=700)
    assert json.loads(quick("policy", "validate", file, "--json")) == {"valid": True, "name": "tidal", "num_layers": 32}
    shown = tmp_path / "shown.yaml"
    shown.write_text(quick("policy", "show", "tidal", "--model", folder))
    assert tc.Policy.load(shown) == tc.Policy.preset("tidal", 4)
    assert json.loads(quick("policy", "show", "smollm2", "--json"))["num_layers"] == 30


def test_bad_input_ends_with_one_line_and_exit_code_2(tmp_path, folder, fails):
    bad = tmp_path / "bad.yaml"
    bad.write_text("num_layers: 4\nlayers: {0-1: full, 2: selekt, 3: reuse}\n")
    deep = tmp_path / "deep.yaml"
    deep.write_text("[" * 5000)
    cases = [
        (("policy", "validate", bad), "layers.2.role: found \"selekt\"; valid values are 'full', 'select' or 'reuse'"),
        (("policy", "validate", tmp_path / "none.yaml"), "can't read the policy file"),
        (("policy", "show", "x" * 300), "unknown policy"),
        (("policy", "validate", deep), "not a YAML or JSON policy file"),
        (("run", "--model", folder, "--context", 5000), "has 512 positions"),
        (("policy", "show", "tidal"), "say which with --model or --num-layers"),
        (("policy", "init", bad, "--num-layers", 4), "--force overwrites it"),
        (("explain", "--model", "random:nope"), "unknown shape (valid: smollm2, gemma3-270m"),
        (("explain", "--model", tmp_path / "no-model"), "no such folder"),
        (("explain", "--model", folder, "--policy", "smollm2"), "num_layers is 30, but the model has 4 decoder layers"),
        (("run", "--model", folder, "--policy", "tidla"), "unknown policy 'tidla'"),
        (("run", "--model", folder, "--device", "tpu"), "valid devices are auto, cpu and cuda"),
        (("run", "--model", folder, "--out", bad), "can't make or write this folder"),
        (
            ("run", "--model", folder, "--context", 100, "--policy", "tidal", "--budget", 5),
            "budget 5 is smaller than sinks + recent",
        ),
    ]
    for arguments, message in cases:
        code, out, err = fails(*arguments)
        assert (code, out) == (2, "") and message in err, (arguments, err)
    assert fails("run", "--no-such-option")[0] == 2
    assert fails("run", "--context", "x")[0] == 2
    code, out, err = cli(*cases[0][0])
    assert (code, out) == (2, "") and cases[0][1] in err and "Traceback" not in err

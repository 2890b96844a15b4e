"""The examples, as a newcomer runs them, on a tiny model: what they print and draw."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from models import tiny_model
from oracle import OracleModel, roles_of
from texts import TEXT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tidal_compile as tc
from tidal_compile.evaluate.tasks import make_sample

EXAMPLES = Path(__file__).parent.parent / "examples"
POLICY = {
    "name": "small", "num_layers": 4, "defaults": {"budget": 24, "sinks": 2, "recent": 6},
    "layers": {"0": "full", "1": "select", "2": "reuse", "3": {"role": "select", "share": "layer"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=4, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def tokenizer():
    """A token a character, and a character a token: what is printed says which tokens were decoded."""
    characters = ["\n", *map(chr, range(32, 127)), *map(chr, range(0x3B1, 0x3B1 + 32))][:128]
    tokenizer = Tokenizer(
        models.WordLevel({character: number for number, character in enumerate(characters)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tc.Policy.from_dict(POLICY).save(folder / "small.yaml")
    return folder


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def uncompiled(monkeypatch):
    """The rewritten graph runs op by op: Inductor takes longer than all of these tests."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm.forward)


@pytest.fixture
def run(folder, capsys):
    """Run an example's main() with the tiny model: the lines that it prints."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        capsys.readouterr()
        example.main(["--model", str(folder), *map(str, arguments)])
        return capsys.readouterr().out.splitlines()

    return run


def tokens_of(line, tokenizer):
    """The tokens of the text at the end of a printed line."""
    text = ast.literal_eval(re.search(r"('.*'|\".*\")$", line)[0])
    return tokenizer(text).input_ids


def passkey(tokenizer, length, seed=0):
    sample = make_sample("passkey", tokenizer, "", length, 0.5, seed)
    return [*sample.context, *sample.question], sample.answers[0]


@torch.no_grad()
def likeliest(model, policy, prompt, tokens):
    """What a dense prefill and then the oracle's decode steps choose, given the tokens before."""
    first = model(torch.tensor([prompt])).logits[0, -1].argmax().item()
    logits = OracleModel(model, roles_of(policy)).logits(torch.tensor([prompt]), torch.tensor([tokens[:-1]]))
    return [first, *logits[0].argmax(-1).tolist()]


def test_decode_with_policy(run, model, tokenizer, folder, uncompiled):
    prompt, key = passkey(tokenizer, 300)
    shown, title, dense, sparse = run(
        "decode_with_policy", "--policy", folder / "small.yaml", "--context", 300, "--new-tokens", 9
    )
    assert key in shown and f"{len(prompt)} tokens" in title
    assert dense.startswith("full") and sparse.startswith(str(folder / "small.yaml"))
    assert all(float(re.search(r" ([\d.]+)   ['\"]", line)[1]) > 0 for line in (dense, sparse))
    answers = [tokens_of(line, tokenizer) for line in (dense, sparse)]
    assert len(answers[0]) == 9 and answers[0] != answers[1]
    for policy, answer in zip((tc.Policy.preset("full", 4), tc.Policy.from_dict(POLICY)), answers, strict=True):
        assert likeliest(model, policy, prompt, answer) == answer


def test_decode_goes_on_from_a_file(run, model, tokenizer, tmp_path, uncompiled):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:200])
    title, dense = run("decode_with_policy", "--policy", "full", "--prompt", text, "--new-tokens", 7)
    assert "200 tokens" in title
    answer = tokens_of(dense, tokenizer)
    assert likeliest(model, tc.Policy.preset("full", 4), tokenizer(TEXT[:200]).input_ids, answer) == answer
    with pytest.raises(SystemExit):
        run("decode_with_policy", "--new-tokens", 3)


def test_own_loop_under_inductor(run, tokenizer, tmp_path):
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)  # Inductor is what takes long
    tokenizer.save_pretrained(tmp_path)
    eager, full = run("own_loop", "--model", tmp_path, "--policy", "full", "--context", 250, "--new-tokens", 6)
    assert "6 of 6 as eager" in full and eager.split()[0] == "eager"
    assert full.endswith(eager[eager.index("   ") :].lstrip())


def test_own_loop_under_a_policy(run, model, tokenizer, uncompiled):
    prompt, _ = passkey(tokenizer, 300)
    lines = run("own_loop", "--budget", 70, "--context", 300, "--new-tokens", 9)
    eager, full, sparse = (tokens_of(line, tokenizer) for line in lines)
    assert eager == full and "9 of 9 as eager" in lines[1]
    assert likeliest(model, tc.Policy.preset("tidal", 4, budget=70), prompt, sparse) == sparse
    same = sum(token == other for token, other in zip(eager, sparse, strict=True))
    assert same < 9 and f"{same} of 9 as eager" in lines[2]


def test_batch(run, model, tokenizer, folder, uncompiled):
    """Every row is what the oracle gives for it alone."""
    title, *rows = run("batch", "--policy", folder / "small.yaml", "--lengths", 240, 300, 270, "--new-tokens", 7)
    assert "padding" in title and len(rows) == 3
    prompts = [passkey(tokenizer, length, seed) for seed, length in enumerate((240, 300, 270))]
    longest = max(len(prompt) for prompt, _ in prompts)
    for row, (prompt, key) in zip(rows, prompts, strict=True):
        assert row.split()[:3] == [str(len(prompt)), str(longest - len(prompt)), key]
        answer = tokens_of(row, tokenizer)
        assert likeliest(model, tc.Policy.from_dict(POLICY), prompt, answer) == answer


def test_calibrate_and_compare(run, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "mine.yaml"
    text.write_text(TEXT)
    title, *rows, last = run(
        "calibrate_and_compare", "--text", text, "--budget", 24, "--selections", 2, "--context", 400, "--tries", 4,
        "--prompts", 1, "--out", out,
    )  # fmt: skip
    assert title.split()[0] == "policy"
    table = {name.strip(): values.split() for name, values in (re.split(r"\s{2,}", row, maxsplit=1) for row in rows)}
    assert list(table) == ["dense", "tidal @24", "calibrated @24"]
    assert table["dense"][0] == "100%" and table["dense"][2:] == ["0.000", "0.000"]
    for name in ("tidal @24", "calibrated @24"):
        read, _, *losses = table[name]
        assert int(read.rstrip("%")) < 100 and all(float(loss) > 0 for loss in losses)
    policy = tc.Policy.load(out)
    selections = [role.layer for role in policy.roles if role.role == "select"]
    assert len(selections) == 2 and last == f"{out}: selections {', '.join(map(str, selections))}"
    assert policy.calibration["budget"] == 24 and len(policy.calibration["trace"]) >= 4


def test_the_notebook_draws_token_sets(model, tokenizer, folder, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    plt.close("all")
    settings = {"MODEL": folder, "POLICY": folder / "small.yaml", "CONTEXT": 300, "STEPS": 20}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    notebook = json.loads((EXAMPLES / "token_sets.ipynb").read_text())
    scope = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), scope)

    policy = tc.Policy.from_dict(POLICY)
    expected = OracleModel(model, roles_of(policy)).logits(scope["context"], scope["steps"])[0]
    torch.testing.assert_close(scope["logits"], expected, atol=1e-4, rtol=1e-4)
    assert scope["steps"].shape == (1, 20) and scope["roles"] == policy.roles

    roles, sets, kept = (plt.figure(number) for number in plt.get_fignums())
    dots = [dot.get_offsets()[0].tolist() for dot in roles.axes[0].collections]
    assert dots == [[0, 0], [1, 1], [2, 1], [3, 2]]
    images = [image for axis in sets.axes for image in axis.images]
    assert len(images) == 2 and [axis.get_title()[:11] for axis in sets.axes[:2]] == ["selection 1", "selection 3"]
    for image, (layer, chosen) in zip(images, scope["chosen"].items(), strict=True):
        shares = torch.tensor(image.get_array())
        assert torch.allclose(shares.sum(1) * scope["stretch"], torch.tensor(24.0)), "each step picks the budget"
        assert chosen.shape == (20, 2 if layer == 1 else 1, 24) and shares.max() <= 1
    assert tokenizer.decode(scope["context"][0, : scope["key_at"]]).endswith(passkey(tokenizer, 300)[1])
    heights = [bar.get_height() for bar in kept.axes[0].patches[:3]]
    assert heights == scope["mean_kept"] and scope["layers"] == [1, 2, 3]
    assert scope["mean_own"][0] == heights[0] and scope["mean_own"][2] == heights[2]
    assert 0 < heights[1] < scope["mean_own"][1] < 1, "a reuse layer keeps less than its own choice would"
    plt.close("all")


def test_every_example_is_introduced():
    page = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.iterdir():
        if file.suffix in (".py", ".ipynb"):
            assert f"]({file.name})" in page, file.name

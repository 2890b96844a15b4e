"""The lm-evaluation-harness: its model class against the oracle, and tasks from local files as a user runs them."""

import functools
import json

import pytest
import torch
from commands import run
from models import random_tokens, tiny_model
from oracle import OracleModel, roles_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tidal_compile as tc

pytest.importorskip("lm_eval")
from lm_eval.api.registry import get_model

from tidal_compile.evaluate.harness import TidalLM

pytestmark = pytest.mark.uncompiled

WORDS = [
    "the",
    "pass",
    "key",
    "is",
    "12345",
    "67890",
    "what",
    "does",
    "it",
    "say",
    "of",
    "grass",
    "sky",
    "sun",
    "and",
    "back",
    "again",
    "go",
    "on",
    ".",
    "?",
    "a",
    "b",
    "c",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a word tokenizer, saved as Hugging Face does, and a policy."""
    folder = tmp_path_factory.mktemp("harness")
    tiny_model(num_hidden_layers=3, max_position_embeddings=512).save_pretrained(folder)
    vocab = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    settings = "budget: 24, sinks: 2, recent: 4"
    policy = f"num_layers: 3\ndefaults: {{{settings}}}\nlayers: {{0: full, 1: select, 2: reuse}}\n"
    (folder / "policy.yaml").write_text(policy)
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    assert get_model("tidal") is TidalLM
    return get_model("tidal").create_from_arg_string(f"pretrained={folder},policy={folder}/policy.yaml,batch_size=2")


def test_likelihoods_are_those_of_single_steps(lm):
    given = random_tokens(1, 80, vocab=30)[0].tolist()
    wanted = [random_tokens(1, length, seed=length, vocab=30)[0].tolist() for length in (5, 1, 3)]
    other = random_tokens(1, 1, seed=9)[0].tolist()  # a context of one token, as rolling likelihoods have
    long = random_tokens(1, 300, seed=8, vocab=30)[0].tolist()
    requests = [(("", ""), given, one) for one in wanted] + [(("", ""), other, wanted[0]), (("", ""), given, long)]
    order = [3, 0, 4, 2, 1]
    found = lm._loglikelihood_tokens([requests[i] for i in order], disable_tqdm=True)
    for number, (total, greedy) in zip(order, found, strict=True):
        _, context, labels = requests[number]
        oracle = OracleModel(lm.model, roles_of(lm.policy))
        prompt, steps = torch.tensor([context[:-1]]), torch.tensor([[context[-1], *labels[:-1]]])
        if len(context) == 1:  # nothing to prefill: the first step sees itself only
            prompt, first = steps[:, :1], lm.model(steps[:, :1]).logits
            rest = oracle.logits(prompt, steps[:, 1:])
            logits = torch.cat([first, rest], 1)[0].log_softmax(-1)
        else:
            logits = oracle.logits(prompt, steps)[0].log_softmax(-1)
        expected = logits[range(len(labels)), labels].sum().item()
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == labels)
    with pytest.raises(tc.TidalError, match="the model takes 512"):
        lm._loglikelihood_tokens([(("", ""), given, [3] * 600)], disable_tqdm=True)


TASK = """
task: local_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}} what is the pass key ?"
{more}
"""
CHOICE = """doc_to_choice: ["12345", "67890", "grass sky"]
doc_to_target: 0
metric_list: [{metric: acc}]"""
GENERATE = """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["?"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]"""


def write_tasks(folder, examples):
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in examples))
    for kind, more in (("multiple_choice", CHOICE), ("generate_until", GENERATE)):
        (folder / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data, more=more))


@pytest.fixture
def of_ours_only(monkeypatch):
    """The harness neither reads its 13,000 task files nor asks pip what is installed: half of the time."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def test_tasks_from_local_files(folder, lm, tmp_path, monkeypatch, of_ours_only):
    """Generated with the compiled step, and chosen by likelihood; the harness's own command knows the class."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = ["the sky is grass and the pass key is 12345 . go on " * n for n in (6, 8)]
    prompts = [torch.tensor([lm.tok_encode(text + " what is the pass key ?")]) for text in texts]
    policy = {"policy": str(folder / "policy.yaml")}
    outputs = [
        lm.model.generate(
            ids, max_new_tokens=6, do_sample=False, cache_implementation="static", pad_token_id=1,
            compile_config=tc.compile_config(**policy),
        )[0, ids.shape[1] :].tolist()
        for ids in prompts
    ]  # fmt: skip
    truths = [lm.tok_decode(output).split("?")[0] for output in outputs]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks, [{"text": texts[0], "answer": truths[0]}, {"text": texts[1], "answer": "wrong"}])
    options = ["--model", folder, "--policy", folder / "policy.yaml", "--include", tasks, "--out", tmp_path / "out"]
    code, shown, problem = run(
        "eval", "lm", "--task", "local_multiple_choice", "--task", "local_generate_until", *options, "--json"
    )
    assert code == 0, problem
    rows = {(row["task"], row["metric"], row["subject"]): row for row in json.loads(shown[shown.index("{") :])["rows"]}
    assert {subject for _, _, subject in rows} == {"dense", "policy @24"}
    generated = rows["local_generate_until", "exact_match", "policy @24"]
    assert generated["value"] == 0.5 and generated["samples"] == 2 and generated["output_tokens"] > 0
    assert rows["local_multiple_choice", "acc", "policy @24"]["output_tokens"] is None
    assert "local_generate_until" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "harness.png").stat().st_size > 5000
    monkeypatch.setattr(TidalLM, "__init__", lambda *_, **__: pytest.fail("ran again"))
    task = ["--task", "local_generate_until", *options, "--json"]
    code, shown, problem = run("eval", "lm", *task)  # goes on from there
    assert code == 0, problem
    again = json.loads(shown[shown.index("{") :])["rows"]
    assert again == [row for row in rows.values() if row["task"] == "local_generate_until"]


@pytest.mark.slow
def test_longbench_from_local_files(folder, tmp_path, monkeypatch):
    pytest.importorskip("jieba")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    examples = [
        {"input": "what\u2028?", "context": "the sky is grass . " * 20, "answers": ["grass"], "all_classes": None}
    ] * 2
    lines = [json.dumps(one, ensure_ascii=False) for one in examples]
    (tmp_path / "qasper.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "trec.jsonl").write_text("\n".join([*lines, "{"]), encoding="utf-8")
    options = ["--data", tmp_path, "--model", folder, "--policy", folder / "policy.yaml", "--out", tmp_path / "out"]
    code, shown, problem = run("eval", "longbench", "--task", "qasper", *options, "--limit", 1, "--json")
    assert code == 0, problem
    rows = json.loads(shown[shown.index("{") :])["rows"]
    assert {(row["task"], row["subject"]) for row in rows} == {
        ("local_qasper", "dense"),
        ("local_qasper", "policy @24"),
    }
    assert {row["metric"] for row in rows} >= {"qa_f1_score"} and all(row["samples"] == 1 for row in rows)
    assert "no task 'riddles'" in run("eval", "longbench", "--task", "riddles", *options)[2].message
    assert "trec.jsonl, line 3: not JSON" in run("eval", "longbench", "--task", "trec", *options)[2].message
    assert "can't read LongBench" in run("eval", "longbench", "--task", "lcc", *options)[2].message

"""Evaluation: answers against the oracle, predictions against their definition, and runs as a user starts and resumes them."""

import json
import math

import pytest
import torch
from commands import run
from families import first_selects
from models import family_model, long_model, prefilled, random_tokens, tiny_model
from oracle import OracleModel, roles_of
from policies import policy_of_six
from texts import SETTINGS, TEXT, Words

import tidal_compile as tc
from tidal_compile.evaluate import compared, decode, quality, records
from tidal_compile.evaluate import report as pages
from tidal_compile.evaluate.decode import answer, prepare
from tidal_compile.evaluate.tasks import HAS_DEPTH, TASKS, make_sample
from tidal_compile.explain import decode_calls
from tidal_compile.replay import Block, make_context, replay, replay_text
from tidal_compile.step import PolicyStep
from tidal_compile.text import hide, split_sentences

pytestmark = pytest.mark.uncompiled


def sparse_policy():
    return policy_of_six("tidal-kv_head")


@pytest.fixture(scope="module")
def traced():
    """A model of six layers, and its step for any policy: Dynamo traces it once for a shape."""
    model = tiny_model()
    return model, PolicyStep(model)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_fits_and_holds_its_answers(task):
    tokenizer = Words()
    for length in (900, 1500):
        sample = make_sample(task, tokenizer, TEXT, length, 0.5, 1)
        assert length * 0.8 < len(sample.context) + len(sample.question) <= length
        text = tokenizer.decode(sample.context)
        assert all(one in text for one in sample.answers)
        assert sample.score(f"They are {', '.join(sample.answers).upper()}.") == 1.0 and sample.score("none") == 0.0
        assert make_sample(task, tokenizer, TEXT, length, 0.5, 1) == sample
        assert make_sample(task, tokenizer, TEXT, length, 0.5, 2).answers != sample.answers
    with pytest.raises(tc.TidalError, match=task):
        make_sample(task, tokenizer, TEXT, 40, 0.5, 1)


@pytest.mark.parametrize("task", HAS_DEPTH)
def test_a_fact_stands_at_its_depth(task):
    tokenizer = Words()
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample(task, tokenizer, TEXT, 2000, depth, 3)
        text = tokenizer.decode(sample.context)
        assert abs(text.index(sample.answers[0]) / len(text) - depth) < 0.12


def test_common_words_are_the_most_common():
    sample = make_sample("common_words", Words(), TEXT, 3000, 0.0, 0)
    words = Words().decode(sample.context).split()
    counts = {word: words.count(word) for word in set(words) if word.isalpha()}
    assert set(sorted(counts, key=counts.get)[-5:]) == set(sample.answers)
    sample = make_sample("frequent_words", Words(), TEXT, 3000, 0.0, 0)
    words = Words().decode(sample.context).partition("\n")[2].split()
    assert sorted(set(words), key=words.count, reverse=True)[:3] == list(sample.answers)


def test_facts_keep_their_places_beside_each_other():
    sentences = split_sentences("One. Two. Three. Four. Five. Six. Seven. Eight.")
    text, taken = hide(Words(), sentences, [(0.0, "A. "), (1.0, "C. "), (0.5, "B. ")], 60)
    assert text.startswith("A. One.") and text.endswith("C. ") and text.index("B.") > text.index("Three.")
    assert taken == text.count(".") - 3 and len(text) <= 60


@pytest.mark.shares_traces
@pytest.mark.parametrize("name", ["tidal-kv_head", "tidal-query_head", "heads", "ratio"])
def test_a_padded_batch_answers_as_the_oracle(name, traced):
    policy, (model, step) = policy_of_six(name), traced
    contexts = [random_tokens(1, length, seed=length)[0].tolist() for length in (50, 90, 71)]
    questions = [random_tokens(1, 5, seed=seed)[0].tolist() for seed in (1, 2, 3)]
    prompts = prepare(model, contexts, questions, 6)
    for sparse in (True, False, True):  # from one prefill, on what the last one wrote
        answers = answer(model, step, prompts, policy.roles, sparse, [])
        for context, question, got in zip(contexts, questions, answers, strict=True):
            assert len(got) == 6
            oracle = OracleModel(model, roles_of(policy))
            prompt, given = (context, [*question, *got[:-1]]) if sparse else ([*context, *question], got[:-1])
            likely = oracle.logits(torch.tensor([prompt]), torch.tensor([given]))[0].argmax(-1).tolist()
            if sparse:
                assert likely[4:] == got
            else:  # the first token follows from the dense prompt
                assert [model(torch.tensor([prompt])).logits[0, -1].argmax().item(), *likely] == got


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss"])
def test_softcaps_sinks_and_windows(family):
    model = family_model(family, 4, attn_implementation="eager")  # transformers 5.17 gives gemma2 SDPA, without softcap
    policy, _ = first_selects(family, 4)
    contexts = [random_tokens(1, length, seed=length)[0].tolist() for length in (60, 47)]
    questions = [random_tokens(1, 4, seed=seed)[0].tolist() for seed in (1, 2)]
    answers = answer(model, PolicyStep(model), prepare(model, contexts, questions, 4), policy.roles, True, [])
    for context, question, got in zip(contexts, questions, answers, strict=True):
        oracle = OracleModel(model, roles_of(policy))
        logits = oracle.logits(torch.tensor([context]), torch.tensor([[*question, *got[:-1]]]))
        assert logits[0, 3:].argmax(-1).tolist() == got


def test_an_answer_ends_at_a_stop_token():
    model, policy = tiny_model(), sparse_policy()
    contexts = [random_tokens(1, 40, seed=seed)[0].tolist() for seed in (1, 2)]
    prompts, step = prepare(model, contexts, [[5], [7]], 8), PolicyStep(model)
    whole = answer(model, step, prompts, policy.roles, True, [])
    stop = whole[0][3]
    ended = answer(model, step, prompts, policy.roles, True, [stop])
    assert ended == [row[: row.index(stop)] if stop in row else row for row in whole]
    with pytest.raises(ValueError, match="equally long"):
        prepare(model, contexts, [[5], [7, 8]], 8)


def test_many_positions_and_single_steps_predict_the_same():
    model, policy = tiny_model(), sparse_policy()
    ids = random_tokens(1, 90)[0].tolist()
    decoder = quality.Decoder(PolicyStep(model), replays=True)
    fast, steps = (quality.text_trial(model, ids, 40, decoder, compiled) for compiled in (False, True))
    assert fast.labels.tolist() == ids[41:]
    expected = OracleModel(model, roles_of(policy)).logits(torch.tensor([ids[:40]]), torch.tensor([ids[40:-1]]))[0]
    for trial in (fast, steps, fast):  # the third on what was written before
        torch.testing.assert_close(torch.cat(list(trial.logits(policy))), expected, atol=1e-4, rtol=1e-4)
    full = tc.Policy.preset("full", 6)
    dense = quality.log_probabilities(fast, full)
    found = quality.judge(fast.logits(policy), dense, fast.labels)
    logs = expected.log_softmax(-1).double()
    assert found.tokens == 49
    assert found.nll == pytest.approx(-logs[range(49), ids[41:]].mean().item(), rel=1e-4)
    assert found.kl == pytest.approx((dense.exp() * (dense - logs)).sum(-1).mean().item(), rel=1e-3)
    assert found.agreement == pytest.approx((dense.argmax(-1) == logs.argmax(-1)).double().mean().item())
    same = quality.judge([dense], dense, fast.labels)
    assert same.kl < 1e-6 and same.agreement == 1.0


def test_chunks_of_a_passage_are_one_text():
    """What a chunk leaves in the cache, the next one sees; windows slide on."""
    for family in ("llama", "gemma3"):
        model, (policy, _) = family_model(family, 4), first_selects(family, 4)
        prompt, tokens = random_tokens(1, 40), random_tokens(1, 50, seed=2)
        (expected,) = replay(
            model, make_context(model, prefilled(model, prompt, 96), 40, [Block("", tokens)]), policy.roles
        )
        for chunk in (7, 64):
            got = torch.cat(list(replay_text(model, prefilled(model, prompt, 96), 40, tokens, policy.roles, chunk)))
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.usefixtures("traced_once")
def test_evaluate_compares_and_goes_on(tmp_path, monkeypatch):
    model, small = long_model(), {"budgets": (16, 64), "folder": tmp_path}
    tasks = ("needle", "multivalue", "text", "answers")
    seen = []
    found = tc.evaluate(model, Words(), ["tidal"], tasks=tasks, report=seen.append, **small, **SETTINGS)
    assert len(found) == 3 * (2 * 2 + 2 + 1 + 2) == seen[-1].total == seen[-1].done
    assert {one["subject"] for one in found} == {"dense", "tidal @16", "tidal @64"}
    dense = [one for one in found if one["subject"] == "dense" and "kl" in one]
    assert dense and all(one["kl"] < 1e-6 and one["agreement"] == 1.0 for one in dense)
    assert any(one["kl"] > 0.01 for one in found if one["subject"] == "tidal @16" and "kl" in one)
    answers = [one for one in found if "score" in one]
    assert all(one["output_tokens"] == len(one["output"]) for one in answers)

    for part in (decode, quality):
        monkeypatch.setattr(part, "filled", lambda *_: pytest.fail("prefilled again"))
    again = tc.evaluate(model, Words(), ["tidal"], tasks=tasks, **small, **SETTINGS)
    assert again == found
    monkeypatch.undo()
    mine = first_selects("llama", 4)[0].model_copy(update={"name": "mine"})
    more = tc.evaluate(model, Words(), ["tidal", mine], tasks=("text",), **small, **SETTINGS)
    assert [one["subject"] for one in more] == ["dense", "tidal @16", "tidal @64", "mine @16", "mine @64"]
    assert more[:3] == [one for one in found if one["task"] == "text"]
    with pytest.raises(tc.TidalError, match="another evaluation"):
        tc.evaluate(model, Words(), ["tidal"], tasks=tasks, **small, **{**SETTINGS, "text": TEXT[50:]})


@pytest.mark.usefixtures("traced_once")
def test_an_evaluation_that_was_killed_goes_on(tmp_path):
    """What was being written then is written again; of another model, though of the same name, nothing is taken."""
    model, settings = (
        long_model(),
        {"tasks": ("text",), "folder": str(tmp_path), **SETTINGS},
    )
    found = tc.evaluate(model, Words(), ["tidal"], **settings)
    file = tmp_path / "records.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-40])
    assert tc.evaluate(model, Words(), ["tidal"], **settings) == found
    assert file.read_text() == whole
    with pytest.raises(tc.TidalError, match="another evaluation .fingerprint"):
        tc.evaluate(long_model(seed=1), Words(), ["tidal"], **settings)
    file.write_text(whole.replace("tokens", 'to"kens', 1))
    with pytest.raises(tc.TidalError, match="can't read the records"):
        tc.evaluate(model, Words(), ["tidal"], **settings)


def test_policies_are_named_by_their_files(tmp_path):
    files = [tmp_path / name for name in ("my.v1.yaml", "Qwen2.5-7B/tidal_policy.yaml", "other/tidal_policy.yaml")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        sparse_policy().save(file)
    names = [
        one.name
        for one in compared(*decode_calls(tiny_model()), [files[0], files[1].parent, *files[2:]], (16, 64, 16), None)
    ]
    each = [f"{name} @{budget}" for name in ("my.v1", "Qwen2.5-7B", "other") for budget in (16, 64)]
    assert names == ["dense", *each]


def test_curves_have_budgets_in_order(tmp_path):
    rows = [{"task": "text", "subject": f"p @{budget}", "kl": 1 / budget} for budget in (1024, 64, 256)]
    rows += [{"task": "text", "subject": "a b @128", "kl": 0.1}]
    (file,) = pages.draw([], rows, tmp_path)
    assert file.stat().st_size > 5000
    assert "(heat%20map.png)" in pages.page("", "", [], [tmp_path / "heat map.png"])


@pytest.mark.usefixtures("traced_once")
def test_what_cannot_be_asked_is_named():
    model, (policy, _) = tiny_model(num_hidden_layers=2), first_selects("llama", 2)
    for options, message in (
        ({"tasks": ("riddles",)}, "unknown task 'riddles'"),
        ({"questions": ("both",)}, "unknown question 'both'"),
        ({"policies": [policy, policy]}, "same name"),
        ({"text": " "}, "text is empty"),
        ({"tasks": ("text",), "text": "Short."}, "need a longer text"),
    ):
        with pytest.raises(tc.TidalError, match=message):
            tc.evaluate(model, Words(), **{"policies": ["tidal"], **SETTINGS, **options})


def test_a_summary_weighs_what_it_should():
    def said(seed, subject, **more):
        where = {"task": "t", "length": 8, "depth": 0.0, "seed": seed, "question": "dense", "policy": subject}
        return {**where, "subject": subject, "kv_share": 0.5, **more}

    found = [said(seed, "dense", score=score, output_tokens=4) for seed, score in enumerate((1.0, 0.0, 0.5))]
    found += [said(seed, "p @9", score=score, output_tokens=seed) for seed, score in enumerate((0.5, 1.0, 0.5))]
    dense, policy = records.summarize(found)
    assert (dense["score"], dense["kept"]) == (0.5, 1.0)
    assert policy["score"] == pytest.approx(2 / 3) and policy["kept"] == pytest.approx(1.0 / 1.5)
    assert policy["output_tokens"] == 1.0 and policy["samples"] == 3
    found = [said(seed, "p @9", tokens=n, nll=n, kl=0.1 * n, agreement=1 / n) for seed, n in enumerate((1, 3))]
    (row,) = records.summarize(found)
    assert row["perplexity"] == pytest.approx(math.exp(2.5)) and row["kl"] == pytest.approx(0.25)
    assert row["agreement"] == pytest.approx(0.5) and row["tokens"] == 4


@pytest.fixture
def as_tiny(monkeypatch):
    from tidal_compile import models

    model = long_model(num_hidden_layers=2)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(models, "load_tokenizer", lambda _: Words())
    monkeypatch.setattr(models, "load_config", lambda _: model.config)


@pytest.mark.usefixtures("traced_once")
def test_the_command_line(as_tiny, tmp_path):
    text, out, policy = tmp_path / "text.txt", tmp_path / "out", tmp_path / "mine.yaml"
    text.write_text(TEXT)
    first_selects("llama", 2)[0].save(policy)
    common = ["--model", "tiny", "--text", text, "--length", 900, "--depths", 1, "--seeds", 1, "--budget", 16]
    code, shown, problem = run("eval", "all", *common, "--policy", policy, "--tokens", 8, "--out", out)
    assert code == 0, problem
    result = json.loads((out / "results.json").read_text())
    assert {row["task"] for row in result["rows"]} == {*TASKS, "text", "answers"} and result["device"]
    assert str(tmp_path) not in json.dumps(result["rows"])
    page = (out / "report.md").read_text()
    for picture in ("heat-needle-mine", "heat-passkey-dense", "kl"):
        assert (out / f"{picture}.png").stat().st_size > 5000 and f"({picture}.png)" in page
    assert "| needle | 900 | sparse | mine @16 |" in page and "output tokens" in shown
    code, shown, _ = run("eval", "perplexity", *common, "--tokens", 8, "--json", "--out", tmp_path / "more")
    assert code == 0 and {row["task"] for row in json.loads(shown)["rows"]} == {"text", "answers"}
    for wrong, message in (
        (["eval", "needle", "--policy", "none.yaml"], "none.yaml: can't read"),
        (["eval", "needle", "--model", "random:llama-3.1-8b"], "random weights"),
        (["eval", "needle", "--model", "tiny", "--length", 9000], "positions"),
    ):
        assert message in run(*wrong)[2].message

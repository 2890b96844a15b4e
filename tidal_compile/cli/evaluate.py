"""The commands `tidal-compile eval ...`, which measure what policies cost in quality."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import report
from ..errors import TidalError
from ..provenance import provenance
from .common import (
    DeviceOption,
    DType,
    DTypeOption,
    JsonOption,
    ModelOption,
    check_positions,
    err,
    load,
    make_folder,
    out,
    read_corpus,
    show_progress,
    where,
)  # fmt: skip

app = typer.Typer(help="Measure what policies cost in quality, beside the dense model.", no_args_is_help=True)


class Question(StrEnum):
    """How the question at the end of a prompt is read: prefilled densely, or decoded under the policy."""

    dense = "dense"
    sparse = "sparse"


PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A preset, shipped policy or file; repeat for several. Dense is always compared.",
        show_default="tidal and, if one is shipped for the model, its file",
    ),
]
BudgetsOption = Annotated[
    list[int] | None, typer.Option("--budget", min=1, help="A budget for every policy; repeat.", show_default="its own")
]
TextOption = Annotated[
    list[Path] | None,
    typer.Option(help="A text file; repeat for several.", show_default="the King James text, extra `eval`"),
]
LengthsOption = Annotated[list[int], typer.Option("--length", min=64, help="Tokens of a prompt; repeat for several.")]
DepthsOption = Annotated[int, typer.Option(min=1, help="Number of places of the fact, from start to end.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Number of prompts at each place.")]
FirstSeedOption = Annotated[int, typer.Option(help="The first seed; another one gives other keys and passages.")]
QuestionsOption = Annotated[
    list[Question], typer.Option("--question", help="Prefill the question densely, or decode it; repeat for both.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Prompts that share a prefill.")]
TokensOption = Annotated[int, typer.Option(min=1, help="How many of a passage's last tokens are decoded.")]
OutOption = Annotated[
    Path, typer.Option("--out", help="The folder for the results; a rerun measures only what is missing.")
]
LENGTHS, BOTH = (1024, 2048, 4096), (Question.dense, Question.sparse)


@app.command("needle")
def needle(
    model: ModelOption = "smollm2", policy: PolicyOption = None, budget: BudgetsOption = None, text: TextOption = None,
    length: LengthsOption = LENGTHS, depths: DepthsOption = 10, seeds: SeedsOption = 1,
    first_seed: FirstSeedOption = 0, question: QuestionsOption = BOTH, batch: BatchOption = 10,
    device: DeviceOption = "auto", dtype: DTypeOption = DType.auto, results: OutOption = Path("out/needle"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Ask for a pass key hidden in filler, and a city's magic number hidden in a text, by depth, length and budget."""
    from ..evaluate.tasks import NEEDLES

    _evaluate(
        NEEDLES, model, policy, budget, text, length, device, dtype, results, as_json, depths=depths, seeds=seeds,
        first_seed=first_seed, questions=question, batch=batch,
    )  # fmt: skip


@app.command("synthetic")
def synthetic(
    model: ModelOption = "smollm2", policy: PolicyOption = None, budget: BudgetsOption = None, text: TextOption = None,
    task: Annotated[list[str] | None, typer.Option(help="A task to run; repeat.", show_default="all")] = None,
    length: LengthsOption = LENGTHS, depths: DepthsOption = 3, seeds: SeedsOption = 5, first_seed: FirstSeedOption = 0,
    question: QuestionsOption = BOTH, batch: BatchOption = 10, device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto, results: OutOption = Path("out/synthetic"), as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Run tasks modelled on RULER: several keys, values or queries, chains of variables, common and frequent words."""
    from ..evaluate.tasks import SYNTHETIC

    _evaluate(
        task or SYNTHETIC, model, policy, budget, text, length, device, dtype, results, as_json, depths=depths,
        seeds=seeds, first_seed=first_seed, questions=question, batch=batch,
    )  # fmt: skip


@app.command("perplexity")
def perplexity(
    model: ModelOption = "smollm2", policy: PolicyOption = None, budget: BudgetsOption = None, text: TextOption = None,
    length: LengthsOption = (4096,), tokens: TokensOption = 256, seeds: SeedsOption = 4, depths: DepthsOption = 5,
    first_seed: FirstSeedOption = 0,
    steps: Annotated[bool, typer.Option(help="Also decode token by token, with the compiled step.")] = False,
    device: DeviceOption = "auto", dtype: DTypeOption = DType.auto, results: OutOption = Path("out/perplexity"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Measure perplexity, KL to dense and agreement on passages of the text, and on answers to pass-key prompts.

    With --tokens near --length, a passage is decoded from its start, as in the papers.
    """
    tasks = ("text", *(("text_steps",) if steps else ()), "answers")
    _evaluate(
        tasks, model, policy, budget, text, length, device, dtype, results, as_json, depths=depths, seeds=seeds,
        first_seed=first_seed, text_tokens=tokens,
    )  # fmt: skip


@app.command("all")
def everything(
    model: ModelOption = "smollm2", policy: PolicyOption = None, budget: BudgetsOption = None, text: TextOption = None,
    length: LengthsOption = LENGTHS, tokens: TokensOption = 128, depths: DepthsOption = 5, seeds: SeedsOption = 2,
    first_seed: FirstSeedOption = 0, question: QuestionsOption = BOTH, batch: BatchOption = 10,
    device: DeviceOption = "auto", dtype: DTypeOption = DType.auto, results: OutOption = Path("out/eval"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Run needles, synthetic tasks and predictions; write a page with all tables and pictures, report.md."""
    from ..evaluate.tasks import NEEDLES, SYNTHETIC

    _evaluate(
        (*NEEDLES, *SYNTHETIC, "text", "answers"), model, policy, budget, text, length, device, dtype, results, as_json,
        depths=depths, seeds=seeds, first_seed=first_seed, questions=question, batch=batch, text_tokens=tokens,
    )  # fmt: skip


LimitOption = Annotated[int | None, typer.Option(min=1, help="How many examples of each task are used, at most.")]
TaskOption = Annotated[list[str], typer.Option("--task", help="A task; repeat for several.")]


@app.command("lm")
def lm_harness(
    task: TaskOption, model: ModelOption = "smollm2", policy: PolicyOption = None, budget: BudgetsOption = None,
    include: Annotated[Path | None, typer.Option(help="A folder with your own task files.")] = None,
    limit: LimitOption = None, batch: BatchOption = 1, device: DeviceOption = "auto", dtype: DTypeOption = DType.auto,
    results: OutOption = Path("out/lm"), as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Run tasks of the lm-evaluation-harness (extra `lm-eval`), under every policy and dense.

    For one policy and all options of the harness: `tidal-lm-eval --model tidal --model_args pretrained=...,policy=...`.
    """
    _need_harness("lm-eval")
    from ..evaluate.harness import check_tasks, digest

    check_tasks(task, include)
    paths = [] if include is None else sorted(include.rglob("*"))
    files = [path for path in paths if path.is_file() and not path.is_relative_to(results)]
    tasks = dict.fromkeys(task, digest(files))
    _harness(tasks, include, model, policy, budget, limit, batch, device, dtype, results, as_json)


@app.command("longbench")
def longbench(
    task: TaskOption, data: Annotated[Path, typer.Option(help="The folder of LongBench's <task>.jsonl files.")],
    model: ModelOption = "smollm2", policy: PolicyOption = None, budget: BudgetsOption = None,
    limit: LimitOption = None, batch: BatchOption = 1, device: DeviceOption = "auto", dtype: DTypeOption = DType.auto,
    results: OutOption = Path("out/longbench"), as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Run LongBench from local files, with its own metrics, in the lm-evaluation-harness (extra `longbench`)."""
    _need_harness("longbench")
    from ..evaluate.harness import longbench_tasks

    folder, tasks = longbench_tasks(data, task)
    with folder:
        _harness(tasks, Path(folder.name), model, policy, budget, limit, batch, device, dtype, results, as_json)


def run_harness() -> None:
    """Run the command of the lm-evaluation-harness, `lm_eval`, with the model class `tidal` registered."""
    _need_harness("lm-eval")
    from lm_eval.__main__ import cli_evaluate

    from ..evaluate import harness  # noqa: F401  registers the class

    cli_evaluate()


def _harness(
    tasks: Mapping[str, str], include: Path | None, model: str, policies: list[str] | None, budgets: list[int] | None,
    limit: int | None, batch: int, device: str, dtype: DType, folder: Path, as_json: bool,
) -> None:  # fmt: skip
    """Run tasks of the harness, and write results.json, report.md and the picture into the folder."""
    from ..evaluate import compared
    from ..evaluate import report as pages
    from ..evaluate.harness import run_tasks
    from ..explain import decode_calls

    device, torch_dtype = where(device, dtype)
    names = _policies(policies, model, folder)
    with show_progress() as progress:
        net, tokenizer = load(progress, model, device, torch_dtype)
        subjects = compared(*decode_calls(net), names, budgets or (), model)
    rows = run_tasks(net, tokenizer, subjects, tasks, include, limit, batch, folder, model)
    about = {"kind": "harness", "model": Path(model).name, "dtype": str(torch_dtype).removeprefix("torch.")}
    finish(about | {"rows": rows}, pages.draw([], rows, folder), device, folder, as_json)


def _need_harness(extra: str) -> None:
    """Raise `TidalError` if a package of an extra is missing."""
    needed = {"lm-eval": ("lm_eval",), "longbench": ("lm_eval", "jieba", "fuzzywuzzy", "rouge")}[extra]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise TidalError(f"this command needs {', '.join(missing)}: pip install 'tidal-compile[{extra}]'")


def _policies(options: list[str] | None, model: str, folder: Path) -> list[str]:
    """Return the names of the policies to compare, and make the folder.

    Mistakes in the policies, the model's name or the folder are raised here, before the model is loaded.
    """
    from ..policy import is_preset, load_any, shipped
    from ..shapes import is_random

    if is_random(model):
        raise TidalError(f"eval: {model} has random weights, whose answers mean nothing")
    report.need_matplotlib()
    names = options or ["tidal", *({model} & set(shipped()))]
    for name in names:
        if not is_preset(name):
            load_any(name)
    make_folder(folder)
    return names


def _evaluate(
    tasks: Sequence[str], model: str, policies: list[str] | None, budgets: list[int] | None, text: list[Path] | None,
    lengths: Sequence[int], device: str, dtype: DType, folder: Path, as_json: bool, **more: Any,
) -> None:  # fmt: skip
    """Evaluate policies with a progress bar, and write records, results, report.md and the pictures into the folder.

    `more` are further arguments of `tidal_compile.evaluate`.
    """
    from transformers.utils import logging as hf_logging

    from ..evaluate import evaluate
    from ..evaluate import report as pages
    from ..evaluate.records import summarize
    from ..models import load_config
    from ..progress import Progress

    hf_logging.disable_progress_bar()
    device, torch_dtype = where(device, dtype)
    names = _policies(policies, model, folder)
    check_positions(load_config(model), model, max(lengths), "answers of", 64, "--length")
    corpus = read_corpus(text)
    with show_progress() as progress:
        net, tokenizer = load(progress, model, device, torch_dtype)
        task = progress.add_task("evaluate", total=None)
        last = ""

        def show(step: Progress) -> None:
            nonlocal last
            if not err.is_terminal and step.stage != last:
                err.print(f"{step.stage} ({step.done} of {step.total}) ...", markup=False, highlight=False)
            last = step.stage
            progress.update(task, completed=step.done, total=step.total, description=step.stage)

        records = evaluate(
            net, tokenizer, names, tasks=tasks, text=corpus, lengths=lengths, budgets=budgets or (), model_name=model,
            folder=folder, report=show, **more,
        )  # fmt: skip
    rows = summarize(records)
    result = {
        "kind": "evaluation",
        "model": Path(model).name,
        "dtype": str(torch_dtype).removeprefix("torch."),
        "rows": rows,
    }
    finish(result, pages.draw(records, rows, folder), device, folder, as_json)


def finish(result: dict[str, Any], pictures: Sequence[Path], device: str, folder: Path, as_json: bool) -> None:
    """Write results.json and report.md into the folder, and print the tables, or the JSON."""
    from ..evaluate import report as pages

    result |= provenance(device)
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    about = f"{result['device']}; {result['dtype']}; {versions}; commit {result['commit']}; {result['date']}."
    title = f"{result['model']}: what policies cost in quality"
    (folder / "report.md").write_text(pages.page(title, about, result["rows"], pictures))
    if as_json:
        print(json.dumps(result))
        return
    print(pages.tables(result["rows"]))
    for file in (folder / "results.json", folder / "report.md", *pictures):
        out.print(f"wrote {file}", markup=False, highlight=False)

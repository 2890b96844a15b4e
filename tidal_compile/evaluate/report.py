"""The tables and pictures of an evaluation, and a page of Markdown that holds both.

heat-<task>-<policy>.png   scores of answers by depth and length; a panel for each budget and way to ask the question
scores.png                 the share of the dense model's score that a policy keeps, by budget; a panel for each task
kl.png                     KL from the dense model, by budget; a panel for each kind of prediction
harness.png                metrics of the harness, by budget; a panel for each task and metric, dense as a line
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..bench.markdown import markdown

Row = dict[str, Any]


def answer_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return the table rows of answers: one for each task, length, question and subject."""
    return [
        (
            row["task"], str(row["length"]), row["question"], row["subject"], f"{row['kv_share']:.0%}",
            f"{row['score']:.1%}", "-" if row["kept"] is None else f"{row['kept']:.0%}", str(row["samples"]),
            f"{row['output_tokens']:.1f}",
        )
        for row in rows
        if "score" in row
    ]  # fmt: skip


def prediction_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return the table rows of predictions: one for each kind of prediction, length and subject."""
    return [
        (
            row["task"], str(row["length"]), row["subject"], f"{row['kv_share']:.0%}", f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}", f"{row['agreement']:.1%}", str(row["tokens"]),
        )
        for row in rows
        if "kl" in row
    ]  # fmt: skip


def harness_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return the table rows of the harness: one for each task, metric and subject."""
    return [
        (
            row["task"], row["metric"], row["subject"], f"{row['value']:.4f}", str(row["samples"]),
            "-" if row["output_tokens"] is None else f"{row['output_tokens']:.1f}",
        )
        for row in rows
        if "value" in row
    ]  # fmt: skip


ANSWER_COLUMNS = (
    "task", "tokens", "question", "policy", "KV read", "score", "of dense", "prompts", "output tokens",
)  # fmt: skip
HARNESS_COLUMNS = ("task", "metric", "policy", "value", "examples", "output tokens")
PREDICTION_COLUMNS = ("text", "tokens", "policy", "KV read", "perplexity", "KL", "agreement", "positions")


def tables(rows: Sequence[Row]) -> str:
    """Return the tables in Markdown, except those without rows."""
    parts = (
        (ANSWER_COLUMNS, answer_rows(rows)),
        (PREDICTION_COLUMNS, prediction_rows(rows)),
        (HARNESS_COLUMNS, harness_rows(rows)),
    )
    return "\n\n".join(markdown(columns, cells) for columns, cells in parts if cells)


def draw(records: Sequence[Row], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the pictures for which there are results into a folder, and return their files."""
    files = []
    with_depth = [record for record in records if record["depth"] is not None and "score" in record]
    for task in dict.fromkeys(record["task"] for record in with_depth):
        of_task = [record for record in with_depth if record["task"] == task]
        for policy in dict.fromkeys(_policy(record) for record in of_task):
            files.append(folder / f"heat-{task}-{policy}.png")
            _heat_map([record for record in of_task if _policy(record) == policy], f"{task}, {policy}", files[-1])
    dense = {_panel(row): row["value"] for row in rows if row["subject"] == "dense" and "value" in row}
    curves = (
        ("kept", "scores.png", "share of the dense score"),
        ("kl", "kl.png", "KL to dense, nats"),
        ("value", "harness.png", "metric"),
    )
    for key, file, label in curves:
        with_key = [row for row in rows if row.get(key) is not None and row["subject"] != "dense"]
        if with_key:
            files.append(folder / file)
            _curves(with_key, key, label, dense, files[-1])
    return files


def page(title: str, about: str, rows: Sequence[Row], pictures: Sequence[Path]) -> str:
    """Return the report in Markdown; it refers to pictures in its own folder."""
    images = "\n\n".join(f"![{picture.stem}]({quote(picture.name)})" for picture in pictures)
    notes = NOTES if any("value" not in row for row in rows) else ""
    return f"# {title}\n\n{about}\n\n{notes}\n\n{tables(rows)}\n\n{images}\n"


NOTES = (
    "Score: the share of the wanted strings that the greedy answer contains. Of dense: the share of the dense model's "
    "score on the same prompts that the policy keeps. Question: dense if it is prefilled with the prompt, sparse if it "
    "is decoded under the policy. KL and agreement: comparisons with the dense model's predictions of each token, "
    "given the right tokens before it."
)


def _policy(row: Row) -> str:
    """The policy's part of a subject's name, such as "tidal" of "tidal @256"."""
    return row["subject"].partition(" @")[0]


def _budget(row: Row) -> str:
    """The budget's part of a subject's name, such as "256" of "tidal @256"."""
    return row["subject"].partition(" @")[2]


def _heat_map(records: Sequence[Row], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((record["subject"], record["question"]) for record in records))
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records})
    questions = list(dict.fromkeys(question for _, question in panels))
    subjects = list(dict.fromkeys(subject for subject, _ in panels))
    size = (1.2 + (0.6 + 0.45 * len(lengths)) * len(subjects), 1 + (0.6 + 0.28 * len(depths)) * len(questions))
    figure = Figure(figsize=(max(4.0, size[0]), size[1]), layout="constrained")
    axes = figure.subplots(len(questions), len(subjects), squeeze=False, sharex=True, sharey=True)
    for subject, question in panels:
        cells = [[_score(records, subject, question, length, depth) for length in lengths] for depth in depths]
        panel = axes[questions.index(question)][subjects.index(subject)]
        image = panel.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), [f"{length / 1024:.3g}K" for length in lengths], fontsize=7)
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        panel.set_title(f"{subject}\nquestion {question}", fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("tokens", fontsize=8)
    figure.supylabel("depth of the fact", fontsize=8)
    figure.savefig(file, dpi=130)


def _score(records: Sequence[Row], subject: str, question: str, length: int, depth: float) -> float:
    """The mean score of one cell of a heat map, or NaN, which leaves the cell empty."""
    cell = (subject, question, length, depth)
    keys = ("subject", "question", "length", "depth")
    scores = [record["score"] for record in records if tuple(record[key] for key in keys) == cell]
    return sum(scores) / len(scores) if scores else float("nan")


def _panel(row: Row) -> str:
    """The title of a row's panel: its task and, for a task of the harness, its metric."""
    return "\n".join([row["task"], *([row["metric"]] if "metric" in row else [])])


def _curves(rows: Sequence[Row], key: str, label: str, dense: dict[str, float], file: Path) -> None:
    """Draw `key` by budget: a panel for each task and in it a line for each policy, the mean of lengths and questions.

    `dense` has the dense model's value for the panels in which it is drawn as a line, too.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(_panel(row) for row in rows))
    budgets = sorted({_budget(row) for row in rows}, key=lambda digits: (len(digits), digits))  # by number
    figure = Figure(figsize=(3.2 * len(tasks) + 0.5, 3), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for policy in dict.fromkeys(_policy(row) for row in rows):
            points: dict[str, list[float]] = {}
            for row in rows:
                if _panel(row) == task and _policy(row) == policy:
                    points.setdefault(_budget(row), []).append(row[key])
            means = sorted((budgets.index(budget), sum(values) / len(values)) for budget, values in points.items())
            panel.plot(*zip(*means, strict=True), marker="o", markersize=3, label=policy)
        if task in dense:
            panel.axhline(dense[task], color="#888888", linestyle="--", linewidth=1, label="dense")
        panel.set_xticks(range(len(budgets)), budgets)
        panel.set_title(task, fontsize=8)
        panel.set_xlabel("budget", fontsize=8)
        panel.tick_params(labelsize=7)
        if key == "kl":
            panel.set_yscale("log")
        elif key == "kept":
            panel.set_ylim(-0.02, 1.02)
    panels[0].legend(fontsize=7)
    figure.supylabel(label, fontsize=8)
    figure.savefig(file, dpi=130)

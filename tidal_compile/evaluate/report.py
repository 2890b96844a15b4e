"""An evaluation as people read it: a table of text, pictures, and a page of Markdown that holds both.

heat-<task>-<policy>.png   answers by depth and length, a panel for each budget and way to ask
scores.png                 of what dense answers, the share that each policy keeps, by budget, a panel for each task
kl.png                     KL from dense by budget, a panel for each kind of prediction
harness.png                metrics of the harness by budget, a panel for each task and metric; dense as a line
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..bench.tables import markdown

Row = dict[str, Any]


def answer_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A row a task, length, question and subject."""
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
    """A row a kind of prediction, length and subject."""
    return [
        (
            row["task"], str(row["length"]), row["subject"], f"{row['kv_share']:.0%}", f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}", f"{row['agreement']:.1%}", str(row["tokens"]),
        )
        for row in rows
        if "kl" in row
    ]  # fmt: skip


def harness_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A row a task of the harness, metric and subject."""
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
    """The tables in Markdown, without an empty one."""
    parts = (
        (ANSWER_COLUMNS, answer_rows(rows)),
        (PREDICTION_COLUMNS, prediction_rows(rows)),
        (HARNESS_COLUMNS, harness_rows(rows)),
    )
    return "\n\n".join(markdown(columns, filled) for columns, filled in parts if filled)


def draw(records: Sequence[Row], rows: Sequence[Row], folder: Path) -> list[Path]:
    """All pictures for which there is something to show; their files."""
    files = []
    with_depth = [one for one in records if one["depth"] is not None and "score" in one]
    for task in dict.fromkeys(one["task"] for one in with_depth):
        of_task = [one for one in with_depth if one["task"] == task]
        for policy in dict.fromkeys(_policy(one) for one in of_task):
            files.append(folder / f"heat-{task}-{policy}.png")
            _heat_map([one for one in of_task if _policy(one) == policy], f"{task}, {policy}", files[-1])
    dense = {_panel(row): row["value"] for row in rows if row["subject"] == "dense" and "value" in row}
    kinds = (("kept", "scores.png", "of what dense answers"), ("kl", "kl.png", "KL to dense, nats"))
    for key, file, label in (*kinds, ("value", "harness.png", "metric")):
        having = [row for row in rows if row.get(key) is not None and row["subject"] != "dense"]
        if having:
            files.append(folder / file)
            _curves(having, key, label, dense, files[-1])
    return files


def page(title: str, about: str, rows: Sequence[Row], pictures: Sequence[Path]) -> str:
    """The report in Markdown; pictures lie beside it."""
    shown = "\n\n".join(f"![{picture.stem}]({quote(picture.name)})" for picture in pictures)
    notes = NOTES if any("value" not in row for row in rows) else ""
    return f"# {title}\n\n{about}\n\n{notes}\n\n{tables(rows)}\n\n{shown}\n"


NOTES = (
    "Score: the share of the wanted strings in the greedy answer. Of dense: how much of what the dense model scores on "
    "the same prompts is kept. Question: read densely with the prompt, or decoded under the policy. KL and agreement: "
    "from the dense model, each token given the right ones before it."
)


def _policy(one: Row) -> str:
    return one["subject"].partition(" @")[0]


def _budget(one: Row) -> str:
    return one["subject"].partition(" @")[2]


def _heat_map(records: Sequence[Row], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((one["subject"], one["question"]) for one in records))
    lengths = sorted({one["length"] for one in records})
    depths = sorted({one["depth"] for one in records})
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
    wanted = (subject, question, length, depth)
    scores = [
        one["score"] for one in records if (one["subject"], one["question"], one["length"], one["depth"]) == wanted
    ]
    return sum(scores) / len(scores) if scores else float("nan")


def _panel(row: Row) -> str:
    """The task, and the metric if it has several."""
    return "\n".join([row["task"], *([row["metric"]] if "metric" in row else [])])


def _curves(rows: Sequence[Row], key: str, label: str, dense: dict[str, float], file: Path) -> None:
    """By budget, a line for each policy; a panel for each task, its lengths and questions taken together.

    `dense`: the dense model's value in a panel, if it says something.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(_panel(row) for row in rows))
    budgets = sorted({_budget(row) for row in rows}, key=lambda one: (len(one), one))  # numbers, as texts
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

"""What an evaluation found, a line of JSON each: written as it comes, so that a run that stopped goes on from there."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import TidalError
from ..provenance import check_same

FILE = "records.jsonl"
WHAT = ("task", "length", "depth", "seed", "question", "subject", "policy")  # names a record


def name_of(record: dict[str, Any]) -> tuple:
    """What a record is about."""
    return tuple(record.get(key) for key in WHAT)


def read(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of an earlier run into the same folder. Raises `TidalError` if it was about something else.

    A last line that was cut off when the run ended is taken out of the file.
    """
    file = folder / FILE
    if not file.exists():
        return []
    try:
        text = file.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole)
        lines = [json.loads(line) for line in whole.split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise TidalError(f"{file}: can't read the records of an earlier run: {error}") from None
    check_same(file, "records of another evaluation", lines[0] if lines else about, about)
    return lines[1:]


def append(folder: Path, about: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """Add records to those of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a") as stream:
        if stream.tell() == 0:
            stream.write(json.dumps(about) + "\n")
        for record in records:
            stream.write(json.dumps(record) + "\n")


def summarize(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task, length, question and subject, in the order in which they were first met.

    Answers: mean `score`; `kept`, of what dense scores on the same prompts, the share that the subject scores; mean
    `output_tokens`. Predictions: `perplexity`, `kl` and `agreement` over all positions.
    """
    dense = {name_of(record)[:-2]: record for record in records if record["subject"] == "dense"}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        key = tuple(record.get(part) for part in ("task", "length", "question", "subject"))
        groups.setdefault(key, []).append(record)
    rows = []
    for (task, length, question, subject), group in groups.items():
        row = {"task": task, "length": length, "question": question, "subject": subject, "samples": len(group)}
        row["kv_share"] = group[0]["kv_share"]
        if "score" in group[0]:
            reached = sum(dense[name_of(one)[:-2]]["score"] for one in group if name_of(one)[:-2] in dense)
            kept = sum(
                min(one["score"], dense[name_of(one)[:-2]]["score"]) for one in group if name_of(one)[:-2] in dense
            )
            row |= {
                "score": _mean(one["score"] for one in group),
                "kept": kept / reached if reached else None,
                "output_tokens": _mean(one["output_tokens"] for one in group),
            }
        else:
            tokens = sum(one["tokens"] for one in group)
            nll, kl, agreement = (
                sum(one["tokens"] * one[name] for one in group) / tokens for name in ("nll", "kl", "agreement")
            )
            row |= {"tokens": tokens, "perplexity": math.exp(nll), "kl": kl, "agreement": agreement}
        rows.append(row)
    return rows


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)

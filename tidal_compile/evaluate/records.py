"""The records of an evaluation, one for each prompt and policy, in a file with one line of JSON for each.

Records are written as soon as they are measured, so that a run that was stopped can be started again and measures only
the missing ones. The first line of the file says what the evaluation is about.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import TidalError
from ..provenance import check_same

FILE = "records.jsonl"
PROMPT_KEYS = ("task", "length", "depth", "seed", "question")
NAME_KEYS = (*PROMPT_KEYS, "subject", "policy")


def name_of(record: dict[str, Any]) -> tuple:
    """Return what identifies a record: its prompt and its policy."""
    return tuple(record.get(key) for key in NAME_KEYS)


def _prompt_of(record: dict[str, Any]) -> tuple:
    return tuple(record.get(key) for key in PROMPT_KEYS)


def read(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the records of an earlier run into the same folder. Raises `TidalError` if it was about something else.

    A last line without an end, which the run was writing when it was stopped, is removed from the file.
    """
    file = folder / FILE
    if not file.exists():
        return []
    try:
        text = file.read_text()
        whole_lines = text[: text.rfind("\n") + 1]
        if whole_lines != text:
            file.write_text(whole_lines)
        lines = [json.loads(line) for line in whole_lines.split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise TidalError(f"{file}: can't read the records of an earlier run: {error}") from None
    check_same(file, "records of another evaluation", lines[0] if lines else about, about)
    return lines[1:]


def append(folder: Path, about: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """Add records to the file in the folder; a new file starts with what the evaluation is about."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a") as stream:
        if stream.tell() == 0:
            stream.write(json.dumps(about) + "\n")
        for record in records:
            stream.write(json.dumps(record) + "\n")


def summarize(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each task, length, question and subject, in the order of their first records.

    A row of answers has the mean `score` and `output_tokens`, and `kept`: the share of the dense model's score on the
    same prompts that the subject scores, too. A row of predictions has the `perplexity`, `kl` and `agreement` over all
    positions.
    """
    dense = {_prompt_of(record): record for record in records if record["subject"] == "dense"}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        key = tuple(record.get(part) for part in ("task", "length", "question", "subject"))
        groups.setdefault(key, []).append(record)
    rows = []
    for (task, length, question, subject), group in groups.items():
        row = {"task": task, "length": length, "question": question, "subject": subject, "samples": len(group)}
        row["kv_share"] = group[0]["kv_share"]
        if "score" in group[0]:
            pairs = [
                (record["score"], dense[_prompt_of(record)]["score"]) for record in group if _prompt_of(record) in dense
            ]
            dense_score = sum(dense_score for _, dense_score in pairs)
            row |= {
                "score": _mean(record["score"] for record in group),
                "kept": sum(map(min, pairs)) / dense_score if dense_score else None,
                "output_tokens": _mean(record["output_tokens"] for record in group),
            }
        else:
            tokens = sum(record["tokens"] for record in group)
            nll, kl, agreement = (
                sum(record["tokens"] * record[key] for record in group) / tokens for key in ("nll", "kl", "agreement")
            )
            row |= {"tokens": tokens, "perplexity": math.exp(nll), "kl": kl, "agreement": agreement}
        rows.append(row)
    return rows


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)

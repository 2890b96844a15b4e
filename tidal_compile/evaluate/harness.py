"""The lm-evaluation-harness under a policy (https://github.com/EleutherAI/lm-evaluation-harness), extra `lm-eval`.

The model class `tidal` prefills what a task gives densely, and decodes under the policy: what it generates with the
compiled step, and the continuations whose likelihood is asked for with `replay`, which gives the same and takes all
choices of a question in one pass. The harness has no plug-ins, so `tidal-lm-eval` is its command with the class known:

    tidal-lm-eval --model tidal --model_args pretrained=smollm2,policy=smollm2,budget=256 --tasks TASK
"""

import difflib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

from ..backend import compile_config
from ..errors import TidalError
from ..explain import decode_calls
from ..models import empty_cache, load_model, load_tokenizer
from ..passes.match import policy_layers
from ..policy import resolve
from ..replay import Block, cannot_replay, make_context, replay, replay_text
from ..run import filled, rewind, windows
from ..step import PolicyStep
from ..text import ids_of
from . import Subject, about_model, records
from .quality import decode_steps

MOST_STEPS = 256  # tokens of a pass: more are decoded in parts


@register_model("tidal")
class TidalLM(HFLM):
    """`pretrained`: a name as `tidal-compile --model` takes it, or a loaded model with its `tokenizer`; `policy`, and
    a `budget` in place of its own. Raises `TidalError` and `PolicyError`.
    """

    def __init__(
        self, pretrained: str | PreTrainedModel, policy: Any = "tidal", budget: int | None = None,
        tokenizer: Any = None, device: str | None = None, dtype: str = "auto", **options: Any,
    ) -> None:  # fmt: skip
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        number = getattr(torch, ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype)
        name = pretrained if isinstance(pretrained, str) else None
        model = load_model(name, device, number) if name else pretrained
        super().__init__(pretrained=model, tokenizer=tokenizer or load_tokenizer(name), backend="causal", **options)
        torch._dynamo.reset()  # another policy may have compiled the same model
        calls, num_layers = decode_calls(model)
        found = resolve(policy, num_layers, attention_layers=policy_layers(calls), model=name)
        self.policy = found if budget is None else found.with_budget(int(budget))
        self._step, self._replays = PolicyStep(model), not cannot_replay(model, calls)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        compiled = {"cache_implementation": "static", "compile_config": compile_config(self.policy)}
        return super()._model_generate(context, max_length, stop, **settings, **compiled)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding gives it."""
        groups: dict[tuple[int, ...], list[int]] = {}  # choices share their context
        for number, (_, given, wanted) in enumerate(requests):
            room = self.max_length + 1 - len(wanted)
            if room < 1:
                raise TidalError(f"a continuation of {len(wanted)} tokens: the model takes {self.max_length}")
            groups.setdefault(tuple(given[-room:]), []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for given, numbers in tqdm(groups.items(), disable=disable_tqdm, desc="loglikelihood under a policy"):
            rows = self._continuations(list(given), [requests[number][2] for number in numbers])
            for number, row in zip(numbers, rows, strict=True):
                found[number] = row
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], row)
        return [found[number] for number in range(len(requests))]

    @torch.no_grad()
    def _continuations(self, given: list[int], wanted: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Each continuation of the same tokens, as if it were decoded after their prefill."""
        length = len(given) - 1
        slots = len(given) + sum(map(len, wanted))
        cache = filled(self.model, self._row(given[:-1]), slots) if length else empty_cache(self.model, slots)
        saved = windows(cache)
        tokens = [self._row([given[-1], *continuation[:-1]]) for continuation in wanted]
        answers = []
        for continuation, logits in zip(wanted, self._logits(cache, length, saved, tokens), strict=True):
            row, labels = logits.float().log_softmax(-1), self._row(continuation)[0]
            likelihood = row.gather(1, labels[:, None]).sum().item()
            answers.append((likelihood, torch.equal(row.argmax(-1), labels)))
        return answers

    def _logits(
        self, cache: Any, length: int, saved: dict[int, Any], tokens: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Logits `[n, vocab]` of each row of tokens `[1, n]`, decoded after the cache's first `length` tokens.

        Many tokens share a pass where the model allows it, as a block or, if there are too many, in parts.
        """
        roles = self.policy.roles
        if not self._replays:
            for row in tokens:
                rewind(cache, length, saved)
                yield torch.cat(list(decode_steps(self.model, self._step, cache, row, self.policy)))
            return
        for part in _parts([Block("continuation", row) for row in tokens]):
            rewind(cache, length, saved)
            if part[0].steps > MOST_STEPS:
                yield torch.cat(list(replay_text(self.model, cache, length, part[0].tokens, roles)))
            else:
                yield from replay(self.model, make_context(self.model, cache, length, part), roles)

    def _row(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self.device)


def _parts(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks of a pass, `MOST_STEPS` tokens at most, or one longer block."""
    parts: list[list[Block]] = []
    for block in blocks:
        if parts and sum(one.steps for one in parts[-1]) + block.steps <= MOST_STEPS:
            parts[-1].append(block)
        else:
            parts.append([block])
    return parts


def check_tasks(names: Iterable[str], include: Path | None) -> None:
    """Raises `TidalError` for a name that is no task, group or tag of the harness, and not in the folder `include`."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=5)
        raise TidalError(
            f"--task {unknown[0]}: the lm-evaluation-harness has no such task"
            + (f"; near it are {', '.join(near)}" if near else "")
            + ("" if include is None else f", and {include} has none either")
        )


def run_tasks(
    model: PreTrainedModel, tokenizer: Any, subjects: Sequence[Subject], tasks: Mapping[str, str], include: Path | None,
    limit: int | None, batch: int, folder: Path, model_name: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a task, metric and policy, of tasks given with a digest of their files.

    In `folder`, `records.jsonl` keeps what was found, from which a second run goes on, a policy and task at a time.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    about = about_model(model, model_name) | {"limit": limit}
    known: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in records.read(folder, about):
        known.setdefault((row["asked"], row["files"], row["policy"]), []).append(row)
    manager = TaskManager(include_path=None if include is None else str(include))
    for subject in subjects:
        missing = {task: files for task, files in tasks.items() if (task, files, subject.digest) not in known}
        if missing:  # compiled once for all tasks
            lm = TidalLM(model, subject.policy, tokenizer=tokenizer, batch_size=batch)
        for task, files in missing.items():
            found = simple_evaluate(
                lm, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
            )
            what = {"asked": task, "files": files, "policy": subject.digest}
            new = known[task, files, subject.digest] = [what | row for row in _rows(tokenizer, found)]
            records.append(folder, about, new)
    return [
        {**row, "subject": subject.name}
        for task, files in tasks.items()
        for subject in subjects
        for row in known[task, files, subject.digest]
    ]


def _rows(tokenizer: Any, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the harness found, a row a task and metric."""
    for task, metrics in found["results"].items():
        samples = found["samples"].get(task, [])
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                yield {
                    "task": task, "metric": metric, "filter": kind, "value": value, "samples": len(samples),
                    "output_tokens": _output_tokens(tokenizer, samples),
                }  # fmt: skip


def _output_tokens(tokenizer: Any, samples: Sequence[dict[str, Any]]) -> float | None:
    """Mean length of what was generated; None for tasks that only compare likelihoods."""
    texts = [answer for one in samples for answers in one["resps"] for answer in answers if isinstance(answer, str)]
    return sum(len(ids_of(tokenizer, text)) for text in texts) / len(texts) if texts else None


def longbench_tasks(data: Path, tasks: Sequence[str]) -> tuple[tempfile.TemporaryDirectory, dict[str, str]]:
    """LongBench from local files (https://github.com/THUDM/LongBench): a folder with the harness's own task files, on
    `data/<task>.jsonl`, and the tasks as `run_tasks` takes them. Raises `TidalError` for a task or file that isn't
    there.
    """
    import lm_eval.tasks

    theirs = Path(lm_eval.tasks.__file__).parent / "longbench"
    known = sorted(path.stem for path in theirs.glob("*.yaml") if not path.stem.startswith("_"))
    folder = tempfile.TemporaryDirectory()
    for task in tasks:
        if task not in known:
            raise TidalError(f"LongBench has no task {task!r}; tasks are: {', '.join(known)}")
        rows = _read_lines(data / f"{task}.jsonl")
        with (Path(folder.name) / f"{task}.jsonl").open("w") as stream:
            for row in rows:  # the harness's copy of the data calls the input a question
                stream.write(json.dumps({"question": row.get("input", ""), **row}) + "\n")
        config = {
            "include": str(theirs / f"{task}.yaml"), "task": f"local_{task}", "tag": None, "dataset_path": "json",
            "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(Path(folder.name) / f"{task}.jsonl")}},
        }  # fmt: skip
        (Path(folder.name) / f"{task}.yaml").write_text(yaml.safe_dump(config))
    return folder, {f"local_{task}": digest([data / f"{task}.jsonl"]) for task in tasks}


def digest(files: Iterable[Path]) -> str:
    """Of what is in files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _read_lines(file: Path) -> list[dict[str, Any]]:
    rows, number = [], 0
    try:
        with file.open(encoding="utf-8") as stream:  # its lines, unlike splitlines(), end at line feeds only
            for number, line in enumerate(stream, 1):  # noqa: B007  the error names the line
                if line.strip():
                    rows.append(json.loads(line))
    except OSError as error:
        raise TidalError(f"{file}: can't read LongBench's examples: {error.strerror}") from None
    except ValueError as error:
        raise TidalError(f"{file}, line {number}: not JSON: {error}") from None
    return rows

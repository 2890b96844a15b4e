"""The lm-evaluation-harness under a policy (https://github.com/EleutherAI/lm-evaluation-harness), extra `lm-eval`.

The model class `tidal` prefills the prompt of a task densely, and decodes under the policy. Answers are generated with
the compiled step. Continuations whose likelihood is asked for are decoded with `replay`, which gives the same logits
and takes all choices of a question in one pass. The harness finds no model class outside itself, so `tidal-lm-eval` is
the command of the harness with this class registered:

    tidal-lm-eval --model tidal --model_args pretrained=smollm2,policy=smollm2,budget=256 --tasks TASK
"""

import difflib
import functools
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
from ..variant import Variant
from . import about_model, records
from .quality import decode_steps

MOST_STEPS = 256  # tokens that one pass of `replay` decodes at most; longer rows are decoded in parts


@register_model("tidal")
class TidalLM(HFLM):
    """A model that decodes under a policy, as the harness sees it.

    `pretrained` is a name as `tidal-compile --model` takes it, or a loaded model, which needs its `tokenizer` given. A
    `budget` replaces the one of the `policy`. Raises `TidalError` and `PolicyError`.
    """

    def __init__(
        self, pretrained: str | PreTrainedModel, policy: Any = "tidal", budget: int | None = None,
        tokenizer: Any = None, device: str | None = None, dtype: str = "auto", **options: Any,
    ) -> None:  # fmt: skip
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        name = pretrained if isinstance(pretrained, str) else None
        model = load_model(name, device, getattr(torch, dtype)) if name else pretrained
        super().__init__(pretrained=model, tokenizer=tokenizer or load_tokenizer(name), backend="causal", **options)
        calls, num_layers = decode_calls(model)
        resolved = resolve(policy, num_layers, attention_layers=policy_layers(calls), model=name)
        self.policy = resolved if budget is None else resolved.with_budget(int(budget))
        self._step, self._can_replay = PolicyStep(model), not cannot_replay(model, calls)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        compiled = {"cache_implementation": "static", "compile_config": compile_config(self.policy)}
        return super()._model_generate(context, max_length, stop, **settings, **compiled)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return, for each request, the log-likelihood of its continuation, and whether greedy decoding gives it.

        A request holds its two texts, and the token ids of its context and of its continuation.
        """
        by_context: dict[tuple[int, ...], list[int]] = {}  # request numbers: all choices of a question share a prefill
        for number, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the last token is only predicted, not read
            if room < 1:
                raise TidalError(f"a continuation of {len(continuation)} tokens: the model takes {self.max_length}")
            by_context.setdefault(tuple(context[-room:]), []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        for context, numbers in tqdm(by_context.items(), disable=disable_tqdm, desc="loglikelihood under a policy"):
            likelihoods = self._likelihoods(list(context), [requests[number][2] for number in numbers])
            for number, likelihood in zip(numbers, likelihoods, strict=True):
                answers[number] = likelihood
                texts = requests[number][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, likelihood)
        return [answers[number] for number in range(len(requests))]

    @torch.no_grad()
    def _likelihoods(self, context: list[int], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation of a context, and whether greedy decoding gives it.

        All but the context's last token are prefilled. The last one is decoded, as it predicts a continuation's first.
        """
        prefilled = len(context) - 1
        slots = len(context) + sum(map(len, continuations))
        cache = filled(self.model, self._row(context[:-1]), slots) if prefilled else empty_cache(self.model, slots)
        decoded = [self._row([context[-1], *continuation[:-1]]) for continuation in continuations]
        likelihoods = []
        for continuation, logits in zip(continuations, self._logits(cache, prefilled, decoded), strict=True):
            log_probabilities, labels = logits.float().log_softmax(-1), self._row(continuation)[0]
            likelihood = log_probabilities.gather(1, labels[:, None]).sum().item()
            likelihoods.append((likelihood, torch.equal(log_probabilities.argmax(-1), labels)))
        return likelihoods

    def _logits(self, cache: Any, prefilled: int, rows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the logits `[n, vocab]` of each row of tokens `[1, n]`, decoded after the cache's `prefilled` tokens.

        Where the model allows it, several rows are decoded in one pass; a row too long for a pass is decoded in parts.
        The cache is set back before each pass, since the one before has written to it.
        """
        saved = windows(cache)  # sliding windows forget their oldest tokens in a pass
        if not self._can_replay:
            for row in rows:
                rewind(cache, prefilled, saved)
                yield torch.cat(list(decode_steps(self.model, self._step, cache, row, self.policy)))
            return
        roles = self.policy.roles
        for blocks in _passes([Block("continuation", row) for row in rows]):
            rewind(cache, prefilled, saved)
            if blocks[0].steps > MOST_STEPS:
                yield torch.cat(list(replay_text(self.model, cache, prefilled, blocks[0].tokens, roles)))
            else:
                yield from replay(self.model, make_context(self.model, cache, prefilled, blocks), roles)

    def _row(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self.device)


def _passes(blocks: Sequence[Block]) -> list[list[Block]]:
    """Split blocks into passes of at most `MOST_STEPS` tokens each; a longer block gets a pass of its own."""
    passes: list[list[Block]] = []
    for block in blocks:
        if passes and sum(earlier.steps for earlier in passes[-1]) + block.steps <= MOST_STEPS:
            passes[-1].append(block)
        else:
            passes.append([block])
    return passes


@functools.cache
def _task_manager(include: Path | None) -> Any:
    """All tasks of the harness and of the folder `include`: it reads thousands of files, so once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include))


def check_tasks(names: Iterable[str], include: Path | None) -> None:
    """Raise `TidalError` for a name that is no task, group or tag of the harness or of the folder `include`."""
    manager = _task_manager(include)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=5)
        raise TidalError(
            f"--task {unknown[0]}: the lm-evaluation-harness has no such task"
            + (f"; near it are {', '.join(near)}" if near else "")
            + ("" if include is None else f", and {include} has none either")
        )


def run_tasks(
    model: PreTrainedModel, tokenizer: Any, subjects: Sequence[Variant], tasks: Mapping[str, str], include: Path | None,
    limit: int | None, batch: int, folder: Path, model_name: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluate every policy on every task, and return a row for each task, metric and policy.

    `tasks` has the name of each task and a digest of its files. `records.jsonl` in `folder` keeps the rows of each
    policy and task as soon as they are measured, so that a second run measures only what is missing there.
    """
    from lm_eval import simple_evaluate

    about = about_model(model, model_name) | {"limit": limit}
    measured: dict[tuple[str, str, str], list[dict[str, Any]]] = {}  # by task, digest of its files, digest of a policy
    for row in records.read(folder, about):
        measured.setdefault((row["asked"], row["files"], row["policy"]), []).append(row)
    for subject in subjects:
        missing = {task: files for task, files in tasks.items() if (task, files, subject.digest) not in measured}
        if not missing:
            continue
        lm = TidalLM(model, subject.policy, tokenizer=tokenizer, batch_size=batch)  # one, to compile once for all tasks
        for task, files in missing.items():
            results = simple_evaluate(
                lm, tasks=[task], limit=limit, task_manager=_task_manager(include), bootstrap_iters=0, log_samples=True
            )
            key = {"asked": task, "files": files, "policy": subject.digest}
            rows = [key | row for row in _metric_rows(tokenizer, results)]
            measured[task, files, subject.digest] = rows
            records.append(folder, about, rows)
    return [
        {**row, "subject": subject.name}
        for task, files in tasks.items()
        for subject in subjects
        for row in measured[task, files, subject.digest]
    ]


def _metric_rows(tokenizer: Any, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each task and metric of the harness's results."""
    for task, metrics in results["results"].items():
        samples = results["samples"].get(task, [])
        for name, value in metrics.items():
            metric, _, answer_filter = name.partition(",")  # such as "acc,none"
            if isinstance(value, int | float) and answer_filter and not metric.endswith("_stderr"):
                yield {
                    "task": task, "metric": metric, "filter": answer_filter, "value": value, "samples": len(samples),
                    "output_tokens": _output_tokens(tokenizer, samples),
                }  # fmt: skip


def _output_tokens(tokenizer: Any, samples: Sequence[dict[str, Any]]) -> float | None:
    """The mean number of generated tokens; None for tasks that only compare likelihoods."""
    texts = [
        answer
        for sample in samples
        for answers in sample["resps"]
        for answer in answers
        if isinstance(answer, str)
    ]  # fmt: skip
    return sum(len(ids_of(tokenizer, text)) for text in texts) / len(texts) if texts else None


def longbench_tasks(data: Path, tasks: Sequence[str]) -> tuple[tempfile.TemporaryDirectory, dict[str, str]]:
    """Make harness tasks of LongBench's files `data/<task>.jsonl` (https://github.com/THUDM/LongBench).

    Returns a temporary folder of task files, which include the harness's own ones but read these examples, and the
    tasks as `run_tasks` takes them. Raises `TidalError` for a task that LongBench lacks, or a missing or broken file.
    """
    import lm_eval.tasks

    built_in = Path(lm_eval.tasks.__file__).parent / "longbench"
    known = sorted(path.stem for path in built_in.glob("*.yaml") if not path.stem.startswith("_"))
    folder = tempfile.TemporaryDirectory()
    for task in tasks:
        if task not in known:
            raise TidalError(f"LongBench has no task {task!r}; tasks are: {', '.join(known)}")
        rows = _read_lines(data / f"{task}.jsonl")
        with (Path(folder.name) / f"{task}.jsonl").open("w") as stream:
            for row in rows:  # the harness's task files read a `question` where LongBench's own data have an `input`
                stream.write(json.dumps({"question": row.get("input", ""), **row}) + "\n")
        config = {
            "include": str(built_in / f"{task}.yaml"), "task": f"local_{task}", "tag": None, "dataset_path": "json",
            "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(Path(folder.name) / f"{task}.jsonl")}},
        }  # fmt: skip
        (Path(folder.name) / f"{task}.yaml").write_text(yaml.safe_dump(config))
    return folder, {f"local_{task}": digest([data / f"{task}.jsonl"]) for task in tasks}


def digest(files: Iterable[Path]) -> str:
    """A digest of the contents of files, in this order."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _read_lines(file: Path) -> list[dict[str, Any]]:
    rows, number = [], 0
    try:
        with file.open(encoding="utf-8") as stream:  # not splitlines(), which also splits at U+2028
            for number, line in enumerate(stream, 1):  # noqa: B007  the error names the line
                if line.strip():
                    rows.append(json.loads(line))
    except OSError as error:
        raise TidalError(f"{file}: can't read LongBench's examples: {error.strerror}") from None
    except ValueError as error:
        raise TidalError(f"{file}, line {number}: not JSON: {error}") from None
    return rows

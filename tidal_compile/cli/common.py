"""What the commands share: consoles, options, progress, files."""

import re
import tempfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..errors import TidalError
from ..shapes import FORMS

out = Console()
err = Console(stderr=True)

ModelOption = Annotated[str, typer.Option("--model", help=f"{FORMS}.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
BudgetOption = Annotated[int | None, typer.Option(help="Tokens a selection keeps, in place of the policy's default.")]


class Share(StrEnum):
    """Who shares a token set."""

    kv_head = "kv_head"
    query_head = "query_head"
    layer = "layer"


class DType(StrEnum):
    """Number format of weights and cache."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
DTypeOption = Annotated[DType, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")]
ResultsOption = Annotated[Path, typer.Option("--out", help="Folder for the results.")]


def where(device: str, dtype: DType) -> tuple[str, Any]:
    """The device and number format that are meant."""
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_device(device)
    return device, getattr(torch, ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype.value)


def check_positions(config: Any, model: str, context: int, what: str, more: int, option: str = "--context") -> None:
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and context + more > positions:
        raise TidalError(f"{option} {context} + {what} {more}: {model} has {positions} positions")


def add_stage(progress: Progress, title: str, steps: int) -> Callable[[], None]:
    """A new bar; returns what moves it on."""
    if not err.is_terminal:  # a log shows no bars: a line a stage
        err.print(f"{title} ...", markup=False, highlight=False)
    task = progress.add_task(title, total=steps)
    return lambda: progress.advance(task)


def load(progress: Progress, model: str, device: str, dtype: Any) -> tuple[Any, Any]:
    """The model and its tokenizer, with a bar."""
    from ..models import load_model, load_tokenizer

    done = add_stage(progress, f"load {model}", 1)
    net, tokenizer = load_model(model, device, dtype), load_tokenizer(model)
    done()
    return net, tokenizer


def read_corpus(files: Sequence[Path] | None) -> str:
    """The text of these files, or the default one."""
    from ..text import default_text

    return "\n".join(read_text(file) for file in files) if files else default_text()


def file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-").lower()


def budget_override(budget: int | None) -> dict[str, Any]:
    return {} if budget is None else {"budget": budget}


def check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise TidalError(f"--device {device!r}: valid devices are auto, cpu and cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise TidalError("--device cuda: no CUDA device is available; valid here: auto, cpu")


def make_folder(folder: Path) -> None:
    """Make a folder for results, and see that it can be written to: before minutes of work, not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TidalError(f"--out {folder}: can't make or write this folder: {error.strerror}") from None


def show_progress() -> Progress:
    """Progress on standard error, so that --json leaves standard output clean."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=err)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TidalError(f"{path}: can't read: {error}") from None

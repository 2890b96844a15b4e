"""The consoles, options, progress bars, checks and file names that the commands share."""

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
from ..shapes import FORMS, is_random

out = Console()
err = Console(stderr=True)

ModelOption = Annotated[str, typer.Option("--model", help=f"{FORMS}.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
BudgetOption = Annotated[int | None, typer.Option(help="Tokens a selection keeps; replaces the policy's default.")]


class Share(StrEnum):
    """Which heads share a token set: each query head has its own, those of a kv head share, or all of a layer do."""

    kv_head = "kv_head"
    query_head = "query_head"
    layer = "layer"


class DType(StrEnum):
    """The number format of the weights and the KV cache."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class CacheKind(StrEnum):
    """How the KV cache is stored: see `cache.CACHES`."""

    auto = "auto"
    fp8 = "fp8"


class Weights(StrEnum):
    """How the weights of linear layers are stored: see `weights.quantise`."""

    auto = "auto"
    int8 = "int8"
    int4 = "int4"
    int4_32 = "int4-32"


WeightsOption = Annotated[
    Weights,
    typer.Option(help="How linear layers are stored: int8, int4 or int4-32; auto: as they are loaded."),
]
CacheOption = Annotated[
    CacheKind, typer.Option(help="How keys and values are stored: auto is the number format, fp8 half of it.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or auto, which is cuda where there is a GPU.")]
DTypeOption = Annotated[DType, typer.Option(help="Number format; auto is bfloat16 on a GPU and float32 on a CPU.")]
ResultsOption = Annotated[Path, typer.Option("--out", help="The folder for the results.")]


def where(device: str, dtype: DType) -> tuple[str, Any]:
    """Return the device, and the number format as a torch dtype, with `auto` replaced by what it stands for here."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    automatic = "bfloat16" if device == "cuda" else "float32"
    return device, getattr(torch, automatic if dtype == "auto" else dtype.value)


def check_weights(weights: Weights, dtype: Any) -> None:
    """Raise `TidalError` for weights in int4 and a number format that they don't go with."""
    if weights in (Weights.int4, Weights.int4_32) and dtype.itemsize != 2:
        raise TidalError(
            f"--weights {weights.value} wants a 16-bit number format; found {dtype}: pass --dtype bfloat16"
        )


def check_positions(config: Any, model: str, context: int, what: str, more: int, option: str = "--context") -> None:
    """Raise `TidalError` if a context and `more` tokens, which `what` names, are too long for the model.

    Random weights know no positions but those of a table: with rotary ones, any context will do.
    """
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    any_will_do = is_random(model) and getattr(text, "rope_parameters", None)
    if positions and context + more > positions and not any_will_do:
        raise TidalError(f"{option} {context} + {what} {more}: {model} has {positions} positions")


def add_stage(progress: Progress, title: str, steps: int) -> Callable[[], None]:
    """Add a progress bar, and return the function that advances it by a step."""
    if not err.is_terminal:  # a log file shows no bars, so it gets a line for each stage
        err.print(f"{title} ...", markup=False, highlight=False)
    task = progress.add_task(title, total=steps)
    return lambda: progress.advance(task)


def load(
    progress: Progress, model: str, device: str, dtype: Any, ranks: int = 1, weights: Weights = Weights.auto
) -> tuple[Any, Any]:
    """Load the model and its tokenizer, with a progress bar; or one rank's part of the model."""
    from ..models import load_model, load_tokenizer
    from ..weights import quantise

    advance = add_stage(progress, f"load {model}", 1)
    loaded = quantise(load_model(model, device, dtype, ranks=ranks), weights.value), load_tokenizer(model)
    advance()
    return loaded


def read_corpus(files: Sequence[Path] | None) -> str:
    """Return the text of these files, or the default text if there are none."""
    from ..text import default_text

    return "\n".join(read_text(file) for file in files) if files else default_text()


def file_name(*parts: str) -> str:
    """Join parts to the stem of a file name, in lower case and without special characters."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-").lower()


def budget_override(budget: int | None) -> dict[str, Any]:
    """Return the `--budget` option as overrides of a policy's defaults."""
    return {} if budget is None else {"budget": budget}


def check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise TidalError(f"--device {device!r}: valid devices are auto, cpu and cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise TidalError("--device cuda: no CUDA device is available; valid here: auto, cpu")


def make_folder(folder: Path) -> None:
    """Make a folder for results, and check that files can be written to it, before minutes of work are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TidalError(f"--out {folder}: can't make or write this folder: {error.strerror}") from None


def show_progress() -> Progress:
    """Make progress bars on standard error, so that standard output holds only the JSON of `--json`."""
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

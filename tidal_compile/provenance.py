"""Where, when and with what a result was made."""

import contextlib
import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .errors import TidalError


def provenance(device: str) -> dict[str, Any]:
    """Where and with what a result was made."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name()
    # Where a result was written is no part of it
    script = Path(sys.argv[0])
    program = f"python benchmarks/{script.name}" if script.parent.name == "benchmarks" else "tidal-compile"
    command = re.sub(r" --out[ =]\S+", "", " ".join([program, *sys.argv[1:]]))
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions("torch", "triton", "transformers")},
        "commit": _commit(),
        "command": command,
        "date": datetime.date.today().isoformat(),
    }


def check_same(file: Path, what: str, before: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises `TidalError` if the earlier run that wrote `what` into a file was about something else."""
    for key, value in about.items():
        if before.get(key) != value:
            raise TidalError(
                f"{file}: holds {what} ({key} {before.get(key)!r}, now {value!r}); remove it, or name another place"
            )


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed: a CPU build of torch has no triton."""
    from importlib import metadata

    numbers = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            numbers[package] = metadata.version(package)
    return numbers


def _commit() -> str:
    """The commit of the checkout that runs, unless TIDAL_COMPILE_COMMIT says what a copy of it was made from."""
    if named := os.environ.get("TIDAL_COMPILE_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if names:
            return f"{names[0].strip()} ({os.cpu_count()} cores)"
    return platform.machine()

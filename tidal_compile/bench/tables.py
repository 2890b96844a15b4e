"""Results of the benchmarks as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]]) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


DECODE_COLUMNS = ("batch x context", "variant", "ms (p10, p90)", "GB/s", "of its floor", "generate, ms", "compile, s")


def decode_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a variant of `bench decode`."""
    return [
        (
            f"{one['batch']} x {one['context']:,}",
            one["name"],
            f"{one['ms']['median']:.2f} ({one['ms']['p10']:.2f}, {one['ms']['p90']:.2f})",
            _number(one["gb_per_s"]),
            f"{one['fraction_of_floor']:.0%}",
            f"{one['generate_ms']['median']:.2f}" if one.get("generate_ms") else "-",
            f"{one['compile_s']:.1f}",
        )
        for one in result["decode"]
    ]


KERNEL_COLUMNS = ("op", "batch", "heads", "context", "budget", "share", "us (p10, p90)", "GB/s", "of the copy rate")


def kernel_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row an op and size of `bench kernels`."""
    return [
        (
            one["op"], str(one["batch"]), f"{one['heads']}/{one['kv_heads']}", f"{one['context']:,}",
            str(one["budget"]), one["share"],
            f"{one['us']['median']:.1f} ({one['us']['p10']:.1f}, {one['us']['p90']:.1f})",
            _number(one["gb_per_s"]) if one["gb_per_s"] else "-",
            f"{one['fraction_of_copy_rate']:.0%}" if one["fraction_of_copy_rate"] else "-",
        )
        for one in result["kernels"]
    ]  # fmt: skip


def about(result: dict[str, Any]) -> str:
    """One line: device, memory rate, versions, commit."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rate = result["copy_bytes_per_s"] / 1e12
    return f"{result['device']}, copy rate {rate:.2f} TB/s; {result['dtype']}; {versions}; commit {result['commit']}."

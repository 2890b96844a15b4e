"""Results of the benchmarks as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]]) + "\n"


def _number(value: float) -> str:
    """A number rounded to two significant digits, or to an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


DECODE_COLUMNS = (
    "batch x context", "variant", "ms (p10, p90)", "GB/s", "of its floor", "generate, ms", "our generate, ms",
    "compile, s",
)  # fmt: skip


def decode_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows for `DECODE_COLUMNS`, one for each variant and size of `bench decode`."""
    return [
        (
            f"{record['batch']} x {record['context']:,}",
            record["name"],
            f"{record['ms']['median']:.2f} ({record['ms']['p10']:.2f}, {record['ms']['p90']:.2f})",
            _number(record["gb_per_s"]),
            f"{record['fraction_of_floor']:.0%}",
            *(
                f"{record[name]['median']:.2f}" if record.get(name) else "-"
                for name in ("generate_ms", "own_generate_ms")
            ),
            f"{record['compile_s']:.1f}",
        )
        for record in result["decode"]
    ]


KERNEL_COLUMNS = ("op", "batch", "heads", "context", "budget", "share", "us (p10, p90)", "GB/s", "of the copy rate")


def kernel_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows for `KERNEL_COLUMNS`, one for each op and size of `bench kernels`."""
    return [
        (
            record["op"], str(record["batch"]), f"{record['heads']}/{record['kv_heads']}", f"{record['context']:,}",
            str(record["budget"]), record["share"],
            f"{record['us']['median']:.1f} ({record['us']['p10']:.1f}, {record['us']['p90']:.1f})",
            _number(record["gb_per_s"]) if record["gb_per_s"] else "-",
            f"{record['fraction_of_copy_rate']:.0%}" if record["fraction_of_copy_rate"] else "-",
        )
        for record in result["kernels"]
    ]  # fmt: skip


def about(result: dict[str, Any]) -> str:
    """One line: device, memory rate, versions, commit."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rate = result["copy_bytes_per_s"] / 1e12
    cut = " The run was interrupted, and holds a part of what was asked for." if result.get("interrupted") else ""
    return (
        f"{result['device']}, copy rate {rate:.2f} TB/s; {result['dtype']}; {versions}; commit {result['commit']}.{cut}"
    )

"""Write the tables of README.md and benchmarks/README.md from the results: `python benchmarks/tables.py`."""

import json
from pathlib import Path

from tidal_compile.bench.tables import DECODE_COLUMNS, KERNEL_COLUMNS, about, decode_rows, kernel_rows, markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results"
READMES = (HERE.parent / "README.md", HERE / "README.md")
OURS = ("dense", "select", "sparse", "SDPA flash", "SDPA cuDNN", "dense + torch.topk")


def results(kind):
    """The results of one kind, by file name."""
    files = sorted(RESULTS.glob(f"{kind}-*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def decode_summary():
    """Every variant of every model in one table: ms, against the floor, and what a user sees through generate."""
    rows = []
    for result in [*results("decode").values(), *results("figures").values()]:
        shape = result["model"].removeprefix("random:") + (
            f", {result['layers']} layers" if result.get("layers") else ""
        )
        rows += [(shape, *row) for row in decode_rows(result)]
    return markdown(("shape", *DECODE_COLUMNS), rows)


def kernel_summary():
    """us of each op, a row a size of the main result."""
    (result,) = (one for name, one in results("kernels").items() if name.count("-") == 2)
    rows = {}
    for one in result["kernels"]:
        size = f"{one['heads']}/{one['kv_heads']} heads, {one['context']:,} tokens"
        rows.setdefault(size, {})[one["op"]] = f"{one['us']['median']:.1f}"
    return markdown(("us", *OURS), [(size, *(us[op] for op in OURS)) for size, us in rows.items()])


def full_tables(kinds, columns, rows):
    """Every result of some kinds, each with its command and provenance."""
    parts = []
    for name, result in (item for kind in kinds for item in results(kind).items()):
        parts.append(f"`{name}`: `{result['command']}`  \n{about(result)}\n\n{markdown(columns, rows(result))}")
    return "\n".join(parts)


def decode_tables():
    """Every decode result."""
    return full_tables(("decode", "figures"), DECODE_COLUMNS, decode_rows)


def kernel_tables():
    """Every kernel result."""
    return full_tables(("kernels",), KERNEL_COLUMNS, kernel_rows)


SECTIONS = {
    "decode summary": decode_summary, "kernel summary": kernel_summary,
    "decode tables": decode_tables, "kernel tables": kernel_tables,
}  # fmt: skip


def with_tables(text):
    """A text with the tables of today between its markers."""
    for name, table in SECTIONS.items():
        begin, end = f"<!-- {name}: written by benchmarks/tables.py -->\n", f"<!-- end of {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + table() + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for file in READMES:
        file.write_text(with_tables(file.read_text()))

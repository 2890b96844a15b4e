"""Tables and plots of what the command line finds."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .explain import Explanation


def explanation_table(explanation: "Explanation") -> Table:
    """One row an attention call: layer, role, source of its tokens, budget, or why it was left alone."""
    table = Table("layer", "role", "tokens from", "budget", "shared by", "left alone because", title=None)
    for row in explanation.rows:
        source = {"full": "whole cache", "select": "whole cache, chosen here"}.get(row.role or "", "")
        if row.role == "reuse":
            source = f"layer {row.source}"
        layer = "?" if row.layer is None else str(row.layer)
        table.add_row(layer, row.role or "-", source, row.budget, row.share, row.reason)
    return table


def explanation_text(explanation: "Explanation") -> str:
    """The table as plain text, with a line for each problem."""
    console = Console(width=120, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(f"policy {explanation.policy.name}: {explanation.policy.description}", markup=False)
        console.print(explanation_table(explanation))
        for problem in explanation.problems:
            console.print(f"can't follow the policy: {problem}", markup=False)
    return capture.get().rstrip()

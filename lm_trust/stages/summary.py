"""The last thing a stage prints: its held-out evaluation, before beside after, in at most 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

TableRows = list[tuple[str, Callable[[Mapping[str, Any]], str]]]


def print_stage(evaluation: Mapping[str, Mapping[str, Any]], console: Console, rows: TableRows) -> None:
    """Print an evaluation, {"before": {...}, "after": {...}}; rows: what each line is called and how it reads."""
    count = next(iter(evaluation.values()))["count"]
    console.print()
    console.print(Text(f"Held-out evaluation, {count} rows", "bold"))
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column()
    for _ in evaluation:
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", *(Text(name, "bold") for name in evaluation))
    for label, number in rows:
        table.add_row(label, *(number(values) for values in evaluation.values()))
    console.print(table, width=min(console.width, 80), highlight=False)

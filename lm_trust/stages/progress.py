"""What a person sees while a stage trains: a bar and the latest updates on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lm_trust.terminal import say
from lm_trust.training.progress import (
    PLAIN_LINES,
    ROWS,
    format_duration,
    format_number,
    format_rate,
    live_display,
    progress_line,
    stacked,
)


class StageProgress:
    """Shows a stage's updates as they come; a context manager.

    On a terminal the display is redrawn in place, and leaving the context gives the terminal back with the last state
    standing. Elsewhere each update is one plain line, thinned to some `PLAIN_LINES` lines.

    Args:
        keys: of metrics.jsonl, shown beside the loss.
        console: where to write.
    """

    def __init__(self, keys: Sequence[str], console: Console) -> None:
        self._console = console
        self._keys = ["loss", *keys]
        self._headings = ["update", *(key.replace("_", " ") for key in self._keys), "tok/s"]
        self._total, self._step, self._begun = 0, 0, time.monotonic()
        self._left: float | None = None
        # Rebound, never mutated: the display's own thread reads it.
        self._recent: tuple[list[str], ...] = ()
        self._live = live_display(self, console)

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def start(self, total: int) -> None:
        """Training begins; it has so many updates."""
        self._total, self._begun = total, time.monotonic()
        if self._live:
            self._live.start()
        else:
            self._print([*self._headings, "left"])

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        self._step = metrics["step"]
        self._left = (time.monotonic() - self._begun) / self._step * (self._total - self._step)
        numbers = [format_number(metrics[key]) for key in self._keys]
        cells = [str(self._step), *numbers, format_rate(metrics["tokens_per_second"])]
        self._recent = (*self._recent, cells)[-ROWS:]
        first_or_last = self._step in (1, self._total)
        if not self._live and (first_or_last or self._step % math.ceil(self._total / PLAIN_LINES) == 0):
            self._print([*cells, format_duration(self._left)])

    def __rich__(self) -> RenderableType:
        """The live display: a line with bar, elapsed and remaining time, then the latest updates."""
        elapsed = time.monotonic() - self._begun
        header = progress_line("update", self._step, self._total, elapsed, self._left)
        table = Table.grid(padding=(0, 2, 0, 0))
        for heading in self._headings:
            table.add_column(justify="right", no_wrap=True, min_width=max(7, len(heading)))
        table.add_row(*(Text(heading, "bold") for heading in self._headings))
        # Bar, gap and headings above; more than the window holds would be cut off at the newest.
        for cells in self._recent[-max(1, self._console.height - 5) :]:
            table.add_row(*cells)
        return stacked(header, table, self._console)

    def _print(self, cells: Sequence[str]) -> None:
        widths = [max(7, len(heading)) for heading in [*self._headings, "left"]]
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        say(line, self._console)

"""What a person sees while a run trains: a live display on a terminal, plain lines in a file or a pipe.

Both show the same columns of `metrics.jsonl`: reward, step KL against its bound, reference KL (language) or environment
steps (control), speed, and whether the step was accepted or why not.

    with Progress(30, step_kl_bound=0.02, world="language") as progress:
        for metrics in ...:
            progress.update(metrics)
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lm_trust.terminal import say

WorldName = Literal["language", "control"]

REASONS = {
    "zero_gradient": "zero gradient",
    "non_finite": "NaN or infinite",
    "negative_curvature": "negative curvature",
    "kl_exceeded": "KL over its bound",
    "budget_exceeded": "KL over its budget",
    "no_improvement": "nothing gained",
}
# The same in as few characters as leave a line within 80 columns.
_SHORT_REASONS = {
    "zero_gradient": "gradient 0",
    "non_finite": "not finite",
    "negative_curvature": "curvature",
    "kl_exceeded": "step KL",
    "budget_exceeded": "ref KL",
    "no_improvement": "no gain",
}
ROWS = 8  # iterations in the live table
TIMED = 10  # iterations whose median time foretells the rest
WIDEST = 100  # a wider table is harder to read across
PLAIN_LINES = 80  # most lines of a control run that is not on a terminal, one or two aside


@dataclass(frozen=True)
class _Column:
    heading: str
    unit: str
    width: int
    cell: Callable[[Mapping[str, Any]], str]


class Progress:
    """Shows a run's iterations as they come; a context manager.

    On a terminal the display is redrawn in place, and leaving the context, by an exception too, gives the terminal
    back with the last state standing. Elsewhere each iteration is one plain ASCII line, flushed at once; a control run
    of thousands of iterations is thinned to some `PLAIN_LINES` lines, each of which then counts the accepted steps
    since the line before.

    Args:
        total_iterations: N; the `iteration` of the last line of metrics.
        step_kl_bound: the update rule's in nats per step, where a line does not tell its own (`max_kl`); None where it
            has none.
        world: "language" or "control".
        console: where to write; standard output by default.
        completed: iterations done before this session, for a resumed run.
    """

    def __init__(
        self,
        total_iterations: int,
        *,
        step_kl_bound: float | None,
        world: WorldName,
        console: Console | None = None,
        completed: int = 0,
    ) -> None:
        self.total_iterations = total_iterations
        self.console = console or Console()
        self._iteration = completed
        self._bound = step_kl_bound
        self._columns = self._language_columns() if world == "language" else self._control_columns()
        # Rebound, never mutated: the display's own thread reads it.
        self._recent: tuple[Mapping[str, Any], ...] = ()
        self._seconds: deque[float] = deque(maxlen=TIMED)
        self._left: float | None = None
        self._start = self._updated = time.monotonic()
        self._stride = 1
        if world == "control" and total_iterations > PLAIN_LINES:
            self._stride = math.ceil(total_iterations / PLAIN_LINES)
        self._unprinted: list[Mapping[str, Any]] = []
        self._printed_any = False
        self._live = live_display(self, self.console)

    def __enter__(self) -> Progress:
        self._start = self._updated = time.monotonic()
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        elif self._unprinted:
            self._print_line()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show one line of `metrics.jsonl`; its `iteration` counts from 1. A missing or null number shows as `-`."""
        seconds = metrics.get("iteration_seconds")
        if seconds is not None and math.isfinite(seconds):
            self._seconds.append(seconds)
        self._iteration = metrics["iteration"]
        remaining = max(self.total_iterations - self._iteration, 0)
        self._left = remaining * statistics.median(self._seconds) if self._seconds else None
        self._updated = time.monotonic()
        offender = metrics.get("offender")
        if offender and not (self._recent and self._recent[-1].get("offender")):  # once for all that follow it
            self.message(f"Iteration {self._iteration} was rejected: {offender}")
        self._recent = (*self._recent, dict(metrics))[-ROWS:]
        if self._live:
            return
        self._unprinted.append(self._recent[-1])
        first_or_last = not self._printed_any or not remaining
        if first_or_last or self._iteration % self._stride == 0:
            self._print_line()

    def message(self, text: str) -> None:
        """Write a line of text; on a terminal it scrolls by above the display."""
        say(text, self.console)

    def __rich__(self) -> RenderableType:
        """The live display: a line with bar, elapsed and remaining time, then the latest iterations."""
        # Bar, gap and two lines of headings above; more than the window holds would be cut off at the newest.
        rows = self._recent[-max(1, self.console.height - 6) :]
        return stacked(self._header(), self._table(rows, ascii_only=self.console.options.ascii_only), self.console)

    def _header(self) -> RenderableType:
        now = time.monotonic()
        left = None if self._left is None else max(self._left - (now - self._updated), 0.0)
        return progress_line("iteration", self._iteration, self.total_iterations, now - self._start, left)

    def _table(self, rows: tuple[Mapping[str, Any], ...], *, ascii_only: bool) -> RenderableType:
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for column in self._columns:
            table.add_column(justify="right", no_wrap=True, min_width=column.width)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_row(*(Text(column.heading, "bold") for column in self._columns), Text("accepted", "bold"))
        table.add_row(*(Text(column.unit, "dim") for column in self._columns), "")
        for metrics in rows:
            accepted = metrics.get("accepted")
            if accepted and not ascii_only:
                verdict = Text("✓", "green")
            else:
                verdict = Text(_verdict(metrics), "green" if accepted else "yellow")
            table.add_row(*(column.cell(metrics) for column in self._columns), verdict)
        if not rows:
            table.add_row(*("-" for _ in self._columns), Text("first iteration under way", "dim"))
        return table

    def _print_line(self) -> None:
        if not self._printed_any:
            headings = [f"{column.heading:>{column.width}}" for column in self._columns]
            self.message("  ".join([*headings, f"{'left':>7}", "accepted"]))
        metrics = self._unprinted[-1]
        if len(self._unprinted) == 1:
            verdict = _verdict(metrics)
        else:
            verdict = f"{sum(bool(line.get('accepted')) for line in self._unprinted)} of {len(self._unprinted)}"
        cells = [f"{column.cell(metrics):>{column.width}}" for column in self._columns]
        self.message("  ".join([*cells, f"{format_duration(self._left):>7}", verdict]))
        self._unprinted.clear()
        self._printed_any = True

    def _language_columns(self) -> list[_Column]:
        return [
            self._iteration_column(),
            _Column("reward", "mean", 7, lambda line: format_number(line.get("reward_mean"))),
            self._step_kl_column("nats per token"),
            _Column("ref KL", "nats/seq.", 9, lambda line: format_number(_but_for_rounding(line.get("reference_kl")))),
            _Column("tok/s", "", 5, lambda line: format_rate(line.get("steps_per_second"))),
        ]

    def _control_columns(self) -> list[_Column]:
        return [
            self._iteration_column(),
            _Column("env steps", "", 9, lambda line: _thousands(line.get("steps"))),
            _Column("reward", "mean", 7, lambda line: format_number(line.get("reward_mean"))),
            self._step_kl_column("nats per step"),
            _Column("steps/s", "", 7, lambda line: format_rate(line.get("steps_per_second"))),
        ]

    def _iteration_column(self) -> _Column:
        width = max(len("iteration"), len(str(self.total_iterations)))
        return _Column("iteration", "", width, lambda line: str(line["iteration"]))

    def _step_kl_column(self, unit: str) -> _Column:
        if self._bound is None:
            return _Column("step KL", unit, 14, lambda line: format_number(line.get("step_kl"), 4))

        def cell(line: Mapping[str, Any]) -> str:
            return f"{format_number(line.get('step_kl'), 4)} / {line.get('max_kl', self._bound):.3g}"

        return _Column("step KL / bound", unit, 15, cell)


def format_number(value: float | None, decimals: int = 3) -> str:
    """A number in about seven characters: fixed point where that is legible, else scientific; `-` for None."""
    if value is None:
        return "-"
    size = abs(value)
    if not math.isfinite(value):
        return str(float(value))
    if size >= 1e6 or 0 < size < 0.5 * 10**-decimals:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{1 if size >= 100 else decimals}f}"


def format_rate(value: float | None) -> str:
    """Things a second, in at most five characters up to a thousand million: 7.3, 190, 24k, 1.2M; `-` for None."""
    if value is None or not math.isfinite(value):
        return "-"
    if value < 9.95:
        return f"{value:.1f}"
    for limit, scale, suffix in ((9999.5, 1, ""), (999.5e3, 1e3, "k"), (99.95e6, 1e6, "M")):
        if value < limit:
            return f"{value / scale:.{1 if suffix == 'M' else 0}f}{suffix}"
    return f"{value / 1e6:.0f}M" if value < 999.5e6 else f"{value:.0e}"


def live_display(shown: RenderableType, console: Console) -> Live | None:
    """What draws it in place, again and again; None where there is no terminal."""
    # FORCE_COLOR makes rich take a file for a terminal; a log must still not get cursor movements.
    isatty = getattr(console.file, "isatty", lambda: False)
    return Live(shown, console=console, refresh_per_second=4) if console.is_interactive and isatty() else None


def stacked(header: RenderableType, table: RenderableType, console: Console) -> RenderableType:
    """A live display: its header, a gap and its table, as wide as can be read."""
    display = Table.grid(expand=False)
    display.width = min(console.width, WIDEST)
    display.add_column(ratio=1)
    for part in (header, "", table):
        display.add_row(part)
    return display


def progress_line(unit: str, done: int, total: int, elapsed: float, left: float | None) -> RenderableType:
    """One line of a live display: `iteration 3/16`, a bar, and the seconds behind and before; None: not yet known."""
    line = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(4):
        line.add_column(no_wrap=True)
    line.columns[1].ratio = 1
    line.add_row(
        Text(f"{unit} {done}/{total}", "bold"),
        ProgressBar(total=max(total, 1), completed=done),
        f"elapsed {format_duration(elapsed)}",
        f"left {format_duration(left)}",
    )
    return line


def format_duration(seconds: float | None) -> str:
    """Seconds as 4:05, 1:04:05 or, from a hundred hours, 5 days; `-` for None."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24} days"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _but_for_rounding(kl: float | None) -> float | None:
    """A KL, and zero where it is so small that rounding alone made it, as that of a policy at its start."""
    return 0.0 if kl is not None and abs(kl) < 1e-6 else kl


def _thousands(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _verdict(metrics: Mapping[str, Any]) -> str:
    if metrics.get("accepted"):
        return "yes"
    reason = metrics.get("reason")
    if reason is None:
        return "-" if metrics.get("accepted") is None else "no"
    return f"no: {_SHORT_REASONS.get(reason, str(reason).replace('_', ' '))}"[:24]

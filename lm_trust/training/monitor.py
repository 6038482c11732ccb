"""monitor.csv: one line a finished training episode, in the format of stable-baselines3's Monitor.

The first line is a JSON comment, then come r (unscaled return), l (length), t (seconds since the start) and, our own,
steps (environment steps of the run when the episode ended). `pandas.read_csv(path, skiprows=1)` reads it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from lm_trust.errors import UserError
from lm_trust.training.run_folder import RunFolder

NAME = "monitor.csv"
COLUMNS = "r,l,t,steps\n"

FinishedEpisode = tuple[float, int, int]  # return, length, environment steps of the run at its end


class Monitor:
    """Writes a run's monitor.csv.

    Args:
        folder: the run's.
        environment: its name, for the first line.
        resume_at: environment steps of the checkpoint that the run goes on from, whose episodes are kept; None for a
            new run.

    Raises:
        UserError: it cannot be written, or a line of the run that goes on is not one.
    """

    def __init__(self, folder: RunFolder, environment: str, *, resume_at: int | None = None) -> None:
        self._folder = folder
        self._started, kept = time.time(), []
        if resume_at is not None and self._path.exists():
            # A last line that a kill left unfinished is not one.
            lines = [line for line in self._path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
            try:
                if lines:
                    self._started = json.loads(lines[0].removeprefix("#"))["t_start"]
                kept = [line for line in lines[2:] if int(line.split(",")[3]) <= resume_at]
            except (ValueError, LookupError):
                raise UserError(f"{self._path}: it holds a line that no run wrote; take it out") from None
        header = json.dumps({"t_start": self._started, "env_id": environment})
        folder.replace(NAME, "".join([f"#{header}\n", COLUMNS, *kept]))

    def append(self, episodes: Iterable[FinishedEpisode]) -> None:
        """Note the episodes that an iteration finished; their time is that of the iteration's end."""
        seconds = round(time.time() - self._started, 6)
        lines = [f"{round(total, 6)},{length},{seconds},{steps}\n" for total, length, steps in episodes]
        if lines:
            with self._folder.writing(NAME), self._path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    @property
    def _path(self) -> Path:
        return self._folder.path / NAME

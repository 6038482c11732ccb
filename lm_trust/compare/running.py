"""Train the cells of a comparison, each as `lm-trust train` in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from lm_trust.compare import forked
from lm_trust.compare.config import Cell
from lm_trust.compare.statistics import known
from lm_trust.errors import UserError
from lm_trust.training.config import Config
from lm_trust.training.config_file import dump, load_config
from lm_trust.training.config_leaves import MAY_DIFFER, MAY_DIFFER_IN_REWARDS, course, differing_keys
from lm_trust.training.interruption import Interruption
from lm_trust.training.run_folder import RunFolder, is_finished

_POLL = 0.2  # seconds


def failure(cell: Cell) -> str | None:
    """Why the cell's last attempt ended before its end, in a line; None where none has failed."""
    noted = _failure_file(cell)
    return noted.read_text(encoding="utf-8") if noted.is_file() else None


def check_unchanged(cells: Sequence[Cell]) -> None:
    """A folder's runs are those of this comparison, or there are none.

    Raises:
        UserError: a cell's folder holds a run of other settings.
    """
    for cell in cells:
        saved = cell.folder / "config.yaml"
        if not saved.is_file():
            continue
        before = load_config(saved, check_files=False, saved=True)
        for key, then, now in changes(before, cell.config):
            raise UserError(
                f"{cell.folder}: holds a run with {key} {then!r}, which is {now!r} here; "
                "choose another --output, or remove that folder"
            )


def changes(before: Config, config: Config) -> list[tuple[str, object, object]]:
    """What makes a run another one: its dotted keys that differ, with the values of before and now."""
    then, now = (course(one.model_dump(), MAY_DIFFER_IN_REWARDS) for one in (before, config))
    keys = [key for key in differing_keys(then, now, MAY_DIFFER) if not _has_moved(then.get(key))]
    return [(key, then.get(key), now.get(key)) for key in keys]


def _has_moved(value: object) -> bool:
    """Whether it is the place of a file or folder that is no longer there: what is named now is taken for it."""
    return isinstance(value, str) and os.path.isabs(value) and not os.path.exists(value)


def check_free(cells: Sequence[Cell]) -> None:
    """No run of the comparison is under way, as where an earlier comparison was killed and its runs were not.

    Raises:
        UserError: one is, or was started by hand.
    """
    for cell in cells:
        if cell.folder.is_dir() and not is_finished(cell.folder):
            with RunFolder(cell.folder).claimed():
                pass


def train_cells(cells: Sequence[Cell], jobs: int, tell: Callable[[str], None]) -> int:
    """Train what is not finished, `jobs` at a time; a run that was stopped goes on from its last checkpoint.

    A cell that fails is noted in its folder and does not stop the others; it is tried again the next time. Ctrl-C,
    SIGTERM and an error here end the runs by SIGTERM, on which they write a checkpoint.

    Args:
        cells: in the order in which they are begun.
        jobs: runs at a time; the cores are shared out among them.
        tell: takes a line of what happens.

    Returns:
        The exit status: 0, or 130 / 143 after a signal.

    Raises:
        UserError: what a run begins with cannot be written.
    """
    waiting = [cell for cell in cells if not is_finished(cell.folder)]
    done = len(cells) - len(waiting)
    if done:
        tell(f"{done} of {len(cells)} runs were finished before.")
    running: list[_Attempt] = []
    with Interruption() as interruption:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and interruption.signal is None:
                    running.append(_start(waiting.pop(0), jobs))
                time.sleep(_POLL)
                if interruption.signal is not None:
                    return interruption.exit_status
                for attempt in [attempt for attempt in running if attempt.process.exitcode is not None]:
                    running.remove(attempt)
                    done += 1
                    tell(f"{done} of {len(cells)}: {_ended(attempt)}")
        finally:  # where it ends early
            for attempt in running:
                attempt.process.terminate()
            for attempt in running:
                attempt.process.join()
    return 0


def begin_or_go_on(folder: Path) -> list[str]:
    """The options of `lm-trust train` for a run that is not finished, whose folder may hold its checkpoints."""
    if any((folder / "checkpoints").glob("*")):
        return ["--resume", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)  # of a run that ended before its first checkpoint
    folder.parent.mkdir(parents=True, exist_ok=True)
    return ["--output", str(folder)]


class _Attempt(NamedTuple):
    """A run under way.

    Attributes:
        cell: whose.
        process: that trains it.
        started: when, by the monotonic clock.
        log_start: bytes of its log that are of earlier attempts.
    """

    cell: Cell
    process: BaseProcess
    started: float
    log_start: int


def _start(cell: Cell, jobs: int) -> _Attempt:
    config, log = cell.folder.with_suffix(".yaml"), _log(cell)
    with RunFolder(cell.folder.parent).writing(config.name):
        options = begin_or_go_on(cell.folder)
        _failure_file(cell).unlink(missing_ok=True)
        config.write_text(dump(cell.config), encoding="utf-8")
        log.touch()
    log_start = log.stat().st_size
    threads = max(1, (os.cpu_count() or 1) // jobs)
    process = forked.start(["train", str(config), *options], log, threads=threads)
    return _Attempt(cell, process, time.monotonic(), log_start)


def _ended(attempt: _Attempt) -> str:
    cell = attempt.cell
    minutes = f"{(time.monotonic() - attempt.started) / 60:.1f} min"
    if attempt.process.exitcode == 0 and is_finished(cell.folder):
        after = RunFolder(cell.folder).evaluation()["after"]
        reward = f"{after['reward_mean']:.4g}" if known(after["reward_mean"]) else "no finite reward"
        kl = f" at {after['reference_kl']:.2f} nats" if known(after.get("reference_kl")) else ""
        return f"{cell.name}: {reward}{kl}, {minutes}"
    reason = _last_words(attempt)
    with suppress(OSError):  # a disk that is full is often what ended the run
        _failure_file(cell).write_text(reason, encoding="utf-8")
    return f"{cell.name}: FAILED after {minutes}: {reason} (see {_log(cell)})"


def _last_words(attempt: _Attempt) -> str:
    """The attempt's own error, or its last line."""
    status = attempt.process.exitcode
    said = _log(attempt.cell).read_bytes()[attempt.log_start :].decode("utf-8", "replace")
    lines = [line.strip() for line in said.splitlines()]
    lines = [line for line in lines if line]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return (errors or lines or [f"exit status {status}"])[-1]


def _log(cell: Cell) -> Path:
    return cell.folder.with_suffix(".log")


def _failure_file(cell: Cell) -> Path:
    return cell.folder.with_suffix(".failed")

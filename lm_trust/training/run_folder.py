"""A run's folder: what is written where, and how it is read back.

config.yaml (resolved), metrics.jsonl (a line an iteration), evaluations.jsonl (a line a periodic evaluation),
evaluation.json (held out, before and after), learning_curve.png, checkpoints/, completions/ (language: tables of what
the policy wrote), prompts.json (language: where the prompts were chats), the trained policy and, under best/, the one
of the best evaluation. Other modules add monitor.csv (control: a line an episode) and tensorboard/.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lm_trust.errors import UserError
from lm_trust.verified_folder import replacing

Record = dict[str, Any]  # what a line of a JSON Lines file or a part of a report says


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made where it does not exist.

    Attributes:
        path: the folder, absolute.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # a reward or an environment may leave the working directory
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output: {path} cannot be made ({error.strerror}); choose another --output") from error

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def learning_curve(self) -> Path:
        return self.path / "learning_curve.png"

    def completions(self, iteration: int) -> Path:
        """Where the table of an iteration's completions lies."""
        return self.path / "completions" / f"iteration-{iteration:08d}.parquet"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within the context no other process can claim the folder; the system frees it when this one dies.

        Raises:
            UserError: another process has claimed it.
        """
        lock = FileLock(self.path / ".lock")
        with self.writing(".lock"):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise UserError(
                    f"output: another process is writing to {self.path}; wait for it to end, or choose another --output"
                ) from None
        try:
            yield
        finally:
            # While it is held, so that no file is left behind; whoever has opened it meanwhile is told to try again.
            with suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Within the context a file or folder of that name is written; a disk that fails is a UserError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"output: {self.path / name} could not be written ({error}); the checkpoints so far are intact"
            ) from error

    def write_config(self, text: str) -> None:
        """The resolved configuration."""
        self.replace("config.yaml", text)

    def note_chats(self, chats: bool) -> None:
        """Whether all prompts were chats, which a configuration alone does not tell: rows may hold messages."""
        if chats:
            self.replace("prompts.json", json_text({"chat": True}))
        else:
            (self.path / "prompts.json").unlink(missing_ok=True)

    @property
    def noted_chats(self) -> bool:
        """What `note_chats` noted."""
        return (self.path / "prompts.json").is_file()

    def append_metrics(self, metrics: Record) -> None:
        """One line of metrics.jsonl; numbers that are not finite become null."""
        self._append("metrics.jsonl", metrics)

    def append_evaluation(self, evaluation: Record) -> None:
        """One line of evaluations.jsonl."""
        self._append("evaluations.jsonl", evaluation)

    def metrics(self) -> list[Record]:
        """All lines of metrics.jsonl."""
        return self._lines("metrics.jsonl")

    def evaluations(self) -> list[Record]:
        """All lines of evaluations.jsonl."""
        return self._lines("evaluations.jsonl")

    def held_out(self) -> list[Record]:
        """All held-out evaluations in the order of training, each with its iteration and steps."""
        sides = self.evaluation()
        found = [{"iteration": 0, "steps": 0, **sides["before"]}] if "before" in sides else []
        if "after" not in sides:
            return found + self.evaluations()
        last = self.metrics()[-1]
        # The end has one evaluation, though a run that was made longer has noted another there before.
        found += [line for line in self.evaluations() if line["iteration"] < last["iteration"]]
        return [*found, {"iteration": last["iteration"], "steps": last["steps"], **sides["after"]}]

    def forget_after(self, iteration: int) -> None:
        """Drop the lines, the tables and the end of iterations that a resumed run will do again."""
        if any(line["iteration"] > iteration for line in self.metrics()):
            self.forget_end()  # before the lines, which tell whose end it was
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            kept = [line for line in self._lines(name) if line["iteration"] <= iteration]
            if (self.path / name).exists():
                self.replace(name, "".join(_line(line) for line in kept))
        for table in (self.path / "completions").glob("iteration-*.parquet"):
            if table > self.completions(iteration):
                table.unlink()

    def evaluation(self) -> Record:
        """evaluation.json, empty where there is none yet."""
        path = self.path / "evaluation.json"
        return read_json(path) if path.exists() else {}

    def forget_end(self) -> None:
        """Drop the evaluation after training."""
        noted = self.evaluation()
        if noted.pop("after", None) is not None:
            self.write_evaluation(noted)

    def write_evaluation(self, evaluation: Record) -> None:
        """evaluation.json, whole or not at all."""
        self.replace("evaluation.json", json_text(evaluation))

    def _append(self, name: str, record: Record) -> None:
        with self.writing(name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def _lines(self, name: str) -> list[Record]:
        """The file's records; a last line that a kill left unfinished is not one.

        Raises:
            UserError: another line is not a record.
        """
        path = self.path / name
        if not path.exists():
            return []
        records = []
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):
                records.append(_record(line, f"{path}, line {number}"))
        return records

    def replace(self, name: str, text: str) -> None:
        """Write the file of that name, whole or not at all."""
        with self.writing(name), replacing(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def is_finished(folder: Path) -> bool:
    """Whether it is that of a run that is done to its end; it need not exist."""
    return (folder / "evaluation.json").is_file() and "after" in RunFolder(folder).evaluation()


def json_text(record: Record) -> str:
    """A JSON file's text, to be read by people too; numbers that are not finite become null."""
    return json.dumps(_finite(record), indent=2) + "\n"


def read_json(path: Path) -> Record:
    """What `json_text` wrote.

    Raises:
        UserError: the file is not whole.
    """
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a file that a run wrote; take it back from a copy, or remove it")
    return record


def _record(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a line that a run wrote; take it out, or take the file back from a copy")
    return record


def _line(record: Record) -> str:
    return json.dumps(_finite(record)) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

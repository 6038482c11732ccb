"""Rows of a data file or dataset, each with its place, and what becomes of the rows that cannot be used.

`read_rows` takes JSONL, CSV, Parquet, a folder of the `datasets` library or a dataset on the hub. A local file
is read as it is: no network and no copy in a cache. A row that cannot be read comes as a sentence that says
why, so that whoever asked for the rows decides, by `BadRows`, whether it ends the run or is left out:

    file, bad = read_rows(path, key="ratings.path"), BadRows("skip", key="ratings.on_bad_row")
    for number, row in good_rows(file, check, bad):
        ...
    bad.print_report()
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_trust.errors import UserError, did_you_mean
from lm_trust.lm.row_readers import READERS, Part, Row, Rows, dataset_rows, parquet_rows
from lm_trust.terminal import say

SHOWN = 3  # bad rows that a report names


@dataclass(frozen=True)
class RowFile:
    """The rows of a file or dataset, to be gone through once.

    Attributes:
        source: the file or dataset.
        unit: what its rows are called, "line" or "row".
        rows: (number, row or problem).
    """

    source: str
    unit: str
    rows: Rows

    def __iter__(self) -> Rows:
        return iter(self.rows)

    def where(self, number: int) -> str:
        """Where a row stands, for messages: `reviews.jsonl, line 7`."""
        return f"{self.source}, {self.unit} {number}"


class BadRows:
    """Rows that cannot be used: with "error" the first one ends the run, with "skip" they are left out and counted.

    Args:
        on_bad_row: the setting.
        key: its dotted key, for messages.
    """

    def __init__(self, on_bad_row: Literal["error", "skip"] = "error", *, key: str = "prompts.on_bad_row") -> None:
        self.on_bad_row, self.key = on_bad_row, key
        self.problems: list[str] = []

    def add(self, where: str, problem: str) -> None:
        """Note a row.

        Raises:
            UserError: with "error".
        """
        if self.on_bad_row == "error":
            raise UserError(f"{where}: {problem}")
        self.problems.append(f"{where}: {problem}")

    def report(self) -> str | None:
        """One line: how many rows were left out, the first few of them and why; None where none was."""
        if not self.problems:
            return None
        count, shown = len(self.problems), self.problems[:SHOWN]
        more = f"; and {count - len(shown)} more" if count > len(shown) else ""
        rows = "1 row was" if count == 1 else f"{count} rows were"
        return f"{rows} left out ({self.key} skip): {'; '.join(shown)}{more}"

    def print_report(self) -> None:
        """Put the report on the terminal, where there is one to make."""
        report = self.report()
        if report:
            say(report)


def good_rows(file: RowFile, problem: Callable[[Row], str | None], bad: BadRows) -> Iterator[tuple[int, Row]]:
    """The rows that can be read and in which `problem` finds none, with their numbers; the others go to `bad`.

    Raises:
        UserError: the first bad row where bad rows are errors, or no row is left.
    """
    before, any_good = len(bad.problems), False
    for number, row in file:
        words = row if isinstance(row, str) else problem(row)
        if words:
            bad.add(file.where(number), words)
        else:
            any_good = True
            yield number, row
    if not any_good:
        left_out = bad.problems[before:]
        raise UserError(
            f"{file.source}: none of its {len(left_out)} rows can be used; the first: {left_out[0]}"
            if left_out
            else f"{file.source}: it holds no rows"
        )


def missing_field(row: Row, field: str, key: str) -> str | None:
    """What to say of a row without the field, with the nearest name; None where it is there. key: where it is set."""
    if field in row:
        return None
    names = ", ".join(map(repr, row)) or "none"
    return f"no field {field!r}; its fields are {names}{did_you_mean(field, row)}; set {key}"


def text_problem(row: Row, field: str, key: str) -> str | None:
    """What is wrong with a field that should be a text with something in it, if anything."""
    missing = missing_field(row, field, key)
    if missing:
        return missing
    text = row[field]
    if not isinstance(text, str):
        return f"field {field!r} is {kind_of(text)}, not a string"
    if not text:
        return f"field {field!r} is an empty string"
    return f"field {field!r} holds {HALF_CHARACTER}" if half_a_character(text) else None


def messages_problem(messages: list[Any], field: str) -> str | None:
    """What is wrong with a field that is a list of a chat's messages, if anything."""
    if not messages:
        return f"field {field!r} is an empty list"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            example = {"role": "user", "content": "..."}
            return f"field {field!r} is a list of {kind_of(message)}, not of chat messages such as {example}"
        for name in ("role", "content"):
            value = message.get(name)
            if not isinstance(value, str):
                return f"field {field!r} has no text under {name!r} in message {number} (it is {kind_of(value)})"
            if half_a_character(value):
                return f"field {field!r} holds, in message {number}, {HALF_CHARACTER}"
    return None


HALF_CHARACTER = "half of a surrogate pair, which no tokenizer can read"


def half_a_character(text: str) -> bool:
    """JSON can spell half of a UTF-16 surrogate pair, which is no text in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def read_rows(
    path: str | Path,
    *,
    subset: str | None = None,
    split: str | None = None,
    key: str = "prompts.path",
    part_keys: str | None = None,
    usual_split: str = "train",
) -> RowFile:
    """Open rows for reading.

    Args:
        path: a .jsonl (.json, .ndjson), .csv or .parquet file, a folder (`save_to_disk`'s, or one that `load_dataset`
            takes), or a hub id. CSV values stay the strings that they are.
        subset: of a dataset with several (the hub's word; `datasets` calls it a configuration).
        split: of a dataset with several; without it the only one, or usual_split.
        key: the dotted key of path, for messages.
        part_keys: how those of subset and split begin, such as `prompts.`; None: no key sets them.

    Raises:
        UserError: it cannot be read, which the iteration may also find; names key or file.
    """
    source = str(path)
    local = Path(os.path.expanduser(source))
    reader = READERS.get(local.suffix.lower())
    part = Part(subset, split, usual_split, part_keys)
    # Asked of os.path, which answers False where pathlib raises: a name too long, a NUL in it.
    if os.path.isdir(local):
        return RowFile(source, "row", dataset_rows(source, str(local), part))
    if os.path.isfile(local):
        if reader is None:
            raise UserError(f"{source}: rows are read from {', '.join(READERS)}, not from {local.suffix or 'this'!r}")
        for name, asked in (("subset", subset), ("split", split)):
            if asked is not None:
                raise UserError(f"{source}: a file has no {name}s; leave out {part_keys or ''}{name} {asked!r}")
        return RowFile(source, "row" if reader is parquet_rows else "line", reader(source, local))
    if reader is None and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source):
        return RowFile(source, "row", dataset_rows(source, source, part))
    raise UserError(f"{key}: {source}: no such file{_nearest_file(local)}")


def _nearest_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return f", and no folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""

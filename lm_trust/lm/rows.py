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

import csv
import difflib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lm_trust.errors import UserError, did_you_mean, in_line

Row = dict[str, Any]
# What a reader yields for each row: its number from 1, and the row or a sentence that says why not.
Rows = Iterator[tuple[int, Row | str]]

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
            Console().print(report, markup=False, highlight=False, soft_wrap=True)


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
    reader = _READERS.get(local.suffix.lower())
    part = _Part(subset, split, usual_split, part_keys)
    # Asked of os.path, which answers False where pathlib raises: a name too long, a NUL in it.
    if os.path.isdir(local):
        return RowFile(source, "row", _dataset_rows(source, str(local), part))
    if os.path.isfile(local):
        if reader is None:
            raise UserError(f"{source}: rows are read from {', '.join(_READERS)}, not from {local.suffix or 'this'!r}")
        for name, asked in (("subset", subset), ("split", split)):
            if asked is not None:
                raise UserError(f"{source}: a file has no {name}s; leave out {part_keys or ''}{name} {asked!r}")
        return RowFile(source, "row" if reader is _parquet_rows else "line", reader(source, local))
    if reader is None and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source):
        return RowFile(source, "row", _dataset_rows(source, source, part))
    raise UserError(f"{key}: {source}: no such file{_nearest_file(local)}")


@dataclass(frozen=True)
class _Part:
    """Which subset and split of a dataset are asked for, the split that is usual, and how the keys of both begin."""

    subset: str | None
    split: str | None
    usual_split: str
    keys: str | None

    def choose_split(self, source: str, splits: list[str]) -> str:
        chosen = self.split if self.split is not None else splits[0] if len(splits) == 1 else self.usual_split
        if chosen in splits:
            return chosen
        found = f"no split {chosen!r}" if self.split is not None else f"several splits and none named {chosen!r}"
        raise UserError(f"{source}: {found}; {self._choices('split', splits)}")

    def require_subset(self, source: str, subsets: list[str]) -> None:
        """Say which subsets there are, where that is why `datasets` could not read it; none: they are not known."""
        if self.subset is None and len(subsets) > 1:
            raise UserError(f"{source}: several subsets; {self._choices('subset', subsets)}")
        if subsets and self.subset is not None and self.subset not in subsets:
            raise UserError(f"{source}: no subset {self.subset!r}; {self._choices('subset', subsets)}")

    def _choices(self, what: str, names: list[str]) -> str:
        choice = f"its {what}s are" if self.keys is None else f"set {self.keys}{what} to one of"
        return f"{choice} {', '.join(map(repr, names))}"


def _bytes(source: str, path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from error


def _json_rows(source: str, path: Path) -> Rows:
    # Not splitlines(): inside a JSON string some of the characters at which that would cut are lawful.
    for number, line in enumerate(_bytes(source, path).split(b"\n"), start=1):
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: bytes) -> Row | str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8 text; save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}; the file holds one JSON object a line"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets
        return f"not JSON that can be read: {in_line(error)[:200]}"
    return row if isinstance(row, dict) else f"a JSON {type(row).__name__} where an object was expected"


def _csv_rows(source: str, path: Path) -> Rows:
    data = _bytes(source, path)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    # The module's own limit is for all readers, and less than a long text: 131,072 characters.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    first_line = 1  # a quoted value may hold line ends: a row is known by the line on which it begins
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            if header is None:  # without the names of the columns no other row can be read
                raise UserError(f"{source}, line {first_line}: not CSV: {error}") from error
            yield first_line, f"not CSV: {error}"
        else:
            if values is None:
                return
            if header is None and values:
                header = values
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    raise UserError(f"{source}, line {first_line}: two columns are named {twice[0]!r}")
            elif header is not None and len(values) == len(header):
                yield first_line, dict(zip(header, values, strict=True))
            elif header is not None and values:  # a line without anything on it is no row
                yield first_line, f"{len(values)} values under {len(header)} column names"
        first_line = reader.line_num + 1


def _parquet_rows(source: str, path: Path) -> Rows:
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except Exception as error:
        raise UserError(f"{source}: not a Parquet file that can be read: {in_line(error)[:200]}") from error
    yield from _column_rows(columns)


def _column_rows(columns: dict[str, list]) -> Rows:
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield number, dict(zip(columns, values, strict=True))


def _dataset_rows(source: str, path: str, part: _Part) -> Rows:
    import datasets  # here: it takes a second to import, and a local file has no need of it

    saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved and part.subset is not None:
            raise UserError(f"{source}: no subset {part.subset!r}; a folder of save_to_disk has none")
        if saved:
            dataset = datasets.load_from_disk(path)
        elif Path(path).is_dir():
            # The tables that `datasets` builds of a folder's files are kept no longer than this call.
            with tempfile.TemporaryDirectory() as cache:
                dataset = datasets.load_dataset(path, name=part.subset, cache_dir=cache, keep_in_memory=True)
        else:
            dataset = datasets.load_dataset(path, name=part.subset)
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[part.choose_split(source, list(dataset))]
        elif part.split is not None and str(dataset.split) != part.split:
            raise UserError(f"{source}: no split {part.split!r}; the folder holds one dataset without splits")
        columns = dataset.to_dict()
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not saved:  # what `datasets` raises for a subset, among others
            part.require_subset(source, _subsets(path))
        reason = f"{type(error).__name__}: {in_line(error)[:200]}"
        what = "a dataset folder" if Path(path).is_dir() else "a local file, nor a dataset on the hub"
        raise UserError(f"{source}: not {what} that can be read ({reason})") from error
    yield from _column_rows(columns)


def _subsets(path: str) -> list[str]:
    """The names of a dataset's subsets; none where they cannot be told."""
    import datasets

    try:
        return datasets.get_dataset_config_names(path)
    except Exception:  # whatever it is, what reading the dataset raised says more
        return []


def _nearest_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return f", and no folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""


_READERS: dict[str, Callable[[str, Path], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}

"""What stands in a file or dataset, row by row: each with its number, or a sentence that says why it cannot be read."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_trust.errors import UserError, in_line

Row = dict[str, Any]
# What a reader yields for each row: its number from 1, and the row or a sentence that says why not.
Rows = Iterator[tuple[int, Row | str]]


@dataclass(frozen=True)
class Part:
    """Which subset and split of a dataset are asked for, the split that is usual, and how the keys of both begin."""

    subset: str | None
    split: str | None
    usual_split: str
    keys: str | None

    def choose_split(self, source: str, splits: list[str]) -> str:
        """The split to read, of those that there are."""
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


def parquet_rows(source: str, path: Path) -> Rows:
    """The rows of a Parquet file.

    Raises:
        UserError: it cannot be read.
    """
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except Exception as error:
        raise UserError(f"{source}: not a Parquet file that can be read: {in_line(error)[:200]}") from error
    yield from _column_rows(columns)


def _column_rows(columns: dict[str, list]) -> Rows:
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield number, dict(zip(columns, values, strict=True))


def dataset_rows(source: str, path: str, part: Part) -> Rows:
    """The rows of a dataset's part; path: a folder, or a hub id.

    Raises:
        UserError: it cannot be read, or has no such part; says which there are.
    """
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
        names = datasets.get_dataset_config_names(path)
    except Exception:  # whatever it is, what reading the dataset raised says more
        return []
    # Without a network `datasets` calls whatever lies in its cache so, and what it raised names what is there.
    return [] if names == ["default"] and not Path(path).is_dir() else names


# By the suffix of a local file; each takes what messages call the file, and its path.
READERS: dict[str, Callable[[str, Path], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".parquet": parquet_rows,
}

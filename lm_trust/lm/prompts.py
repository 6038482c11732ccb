"""Prompts: read from a file or dataset, checked row by row, split, encoded, and drawn in shuffled epochs.

`load_prompts` takes JSONL, CSV, Parquet, a folder of the `datasets` library or a dataset on the hub. A local
file is read as it is: no network and no copy in a cache. Every row keeps its other fields, which the rewards
receive. Whatever is wrong with the data is a UserError that names the file, the line and the field, before
training starts.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_trust.core.seeding import make_generator
from lm_trust.errors import UserError

# What a reader yields for each row: its number from 1, and the row or a sentence that says why not.
Rows = Iterator[tuple[int, dict[str, Any] | str]]


@dataclass(frozen=True)
class Prompts:
    """N prompts, none empty, with the other columns of their rows.

    texts: N strings. fields: each other column, N values, None where a row lacks it. source: the file or
    dataset; unit: what its rows are called, "line" or "row"; numbers: where each prompt stands in it, from 1.
    """

    texts: list[str]
    fields: dict[str, list]
    source: str
    unit: str
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """Where prompt `index` comes from, for messages: `reviews.jsonl, line 7`."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def select(self, indices: Sequence[int] | Tensor) -> Prompts:
        """The prompts at the indices, repeats allowed, in their order."""
        indices = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        return Prompts(
            [self.texts[index] for index in indices],
            {name: [column[index] for index in indices] for name, column in self.fields.items()},
            self.source,
            self.unit,
            [self.numbers[index] for index in indices],
        )


def load_prompts(path: str | Path, *, field: str = "prompt", split: str | None = None) -> Prompts:
    """Read prompts.

    path: a .jsonl (.json, .ndjson), .csv or .parquet file, a folder (`save_to_disk`'s, or one that
    `load_dataset` takes), or a hub id. CSV values stay the strings that they are. field: the column that
    holds the prompt. split: of a dataset with several; without it the only one, or `train`.
    Raises UserError, naming file, line and field, for a file that cannot be read and for a row that is
    malformed: bad JSON, no such field, not a string, an empty string.
    """
    source, unit = str(path), "row"
    local = Path(os.path.expanduser(source))
    reader = _READERS.get(local.suffix.lower())
    # Asked of os.path, which answers False where pathlib raises: a name too long, a NUL in it.
    if os.path.isdir(local):
        rows = _dataset_rows(source, str(local), split)
    elif os.path.isfile(local):
        if reader is None:
            raise UserError(
                f"{source}: prompts are read from {', '.join(_READERS)}, not from {local.suffix or 'this'!r}"
            )
        if split is not None:
            raise UserError(f"{source}: a file has no splits; leave out prompts.split {split!r}")
        unit = "row" if reader is _parquet_rows else "line"
        rows = reader(source, local)
    elif reader is None and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source):
        rows = _dataset_rows(source, source, split)
    else:
        raise UserError(f"prompts.path: {source}: no such file{_nearest_file(local)}")

    texts: list[str] = []
    fields: dict[str, list] = {}
    numbers: list[int] = []
    for number, row in rows:
        problem = row if isinstance(row, str) else _problem(row, field)
        if problem:
            raise UserError(f"{source}, {unit} {number}: {problem}")
        for name in row:
            if name != field and name not in fields:
                fields[name] = [None] * len(texts)
        for name, column in fields.items():
            column.append(row.get(name))
        texts.append(row[field])
        numbers.append(number)
    if not texts:
        raise UserError(f"{source}: it holds no rows")
    return Prompts(texts, fields, source, unit, numbers)


def _problem(row: dict[str, Any], field: str) -> str | None:
    """What is wrong with the row's prompt, if anything."""
    if field not in row:
        near = difflib.get_close_matches(field, row, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        names = ", ".join(map(repr, row)) or "none"
        return f"no field {field!r}; its fields are {names}{hint}; set prompts.field"
    text = row[field]
    if not isinstance(text, str):
        return f"field {field!r} is {'null' if text is None else type(text).__name__}, not a string"
    if not text:
        return f"field {field!r} is an empty string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"field {field!r} holds half of a surrogate pair, which no tokenizer can read"
    return None


def _text(source: str, path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}, line {line}: not UTF-8 text; save the file as UTF-8") from error


def _json_rows(source: str, path: Path) -> Rows:
    # Not splitlines(): inside a JSON string some of the characters at which that would cut are lawful.
    for number, line in enumerate(_text(source, path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield (
                    number,
                    f"not JSON: {error.msg} at column {error.colno}; the file holds one JSON object a line",
                )
            except (
                ValueError,
                RecursionError,
            ) as error:  # a number of thousands of digits, or as many brackets
                yield number, f"not JSON that can be read: {' '.join(str(error).split())[:200]}"
            else:
                is_object = isinstance(row, dict)
                yield (
                    number,
                    row if is_object else f"a JSON {type(row).__name__} where an object was expected",
                )


def _csv_rows(source: str, path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_text(source, path), newline=""), strict=True)
    header: list[str] | None = None
    first_line = 1  # a quoted value may hold line ends: a row is known by the line on which it begins
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield first_line, f"not CSV: {error}"
            return
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
        raise UserError(
            f"{source}: not a Parquet file that can be read: {' '.join(str(error).split())[:200]}"
        ) from error
    yield from _column_rows(columns)


def _column_rows(columns: dict[str, list]) -> Rows:
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield number, dict(zip(columns, values, strict=True))


def _dataset_rows(source: str, path: str, split: str | None) -> Rows:
    import datasets  # here: it takes a second to import, and a local file has no need of it

    saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            dataset = datasets.load_from_disk(path)
        elif Path(path).is_dir():
            # The tables that `datasets` builds of a folder's files are kept no longer than this call.
            with tempfile.TemporaryDirectory() as cache:
                dataset = datasets.load_dataset(path, cache_dir=cache, keep_in_memory=True)
        else:
            dataset = datasets.load_dataset(path)
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[_choose_split(source, list(dataset), split)]
        elif split is not None and str(dataset.split) != split:
            raise UserError(f"{source}: no split {split!r}; the folder holds one dataset without splits")
        columns = dataset.to_dict()
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        what = "a dataset folder" if Path(path).is_dir() else "a local file, nor a dataset on the hub"
        raise UserError(f"{source}: not {what} that can be read ({reason})") from error
    yield from _column_rows(columns)


def _choose_split(source: str, splits: list[str], split: str | None) -> str:
    chosen = split if split is not None else splits[0] if len(splits) == 1 else "train"
    if chosen not in splits:
        asked = f"no split {split!r}" if split is not None else "several splits and none named 'train'"
        raise UserError(f"{source}: {asked}; set prompts.split to one of {', '.join(map(repr, splits))}")
    return chosen


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


def encode(tokenizer: Any, prompts: Prompts, *, context: int | None, max_new_tokens: int) -> list[list[int]]:
    """The token ids of every prompt, as the tokenizer makes them (with a start token where it sets one).

    tokenizer: of transformers. context: positions that the model has, None where it sets no limit.
    Raises UserError where a prompt has no tokens, or leaves no room for max_new_tokens: all prompts are
    looked at, the first offending row is named with the number of the others and the length that would fit.
    """
    encoded = tokenizer(prompts.texts, padding=False, truncation=False, verbose=False)["input_ids"]
    ids = [list(row) for row in encoded]
    empty = [index for index, row in enumerate(ids) if not row]
    if empty:
        raise UserError(
            f"{prompts.where(empty[0])}: the tokenizer makes no token of the prompt "
            f"{prompts.texts[empty[0]][:60]!r}{_and_others(empty)}; "
            "a prompt needs at least one, so change or remove it"
        )
    if context is None:
        return ids
    room = context - max_new_tokens
    if room < 1:
        raise UserError(
            f"rollout.max_new_tokens: {max_new_tokens} leaves no room for a prompt in the "
            f"model's context of {context} tokens; the longest prompt has {max(map(len, ids))}"
        )
    long = [index for index, row in enumerate(ids) if len(row) > room]
    if long:
        longest = max(len(ids[index]) for index in long)
        raise UserError(
            f"{prompts.where(long[0])}: a prompt of {len(ids[long[0]])} tokens and max_new_tokens "
            f"{max_new_tokens} exceed the model's context of {context} tokens{_and_others(long)}; "
            f"shorten prompts to {room} tokens (the longest has {longest}) or lower rollout.max_new_tokens"
        )
    return ids


def _and_others(indices: list[int]) -> str:
    return f" (and {len(indices) - 1} more)" if len(indices) > 1 else ""


def split_heldout(prompts: Prompts, fraction: float, seed: int) -> tuple[Prompts, Prompts]:
    """(training, held out): a split by the seed alone, each side in the prompts' own order.

    fraction: of the distinct texts that are held out, in (0, 1). Rows with the same text stay on one side, so
    that no held-out prompt was ever trained on. Raises UserError where a side would be empty.
    """
    distinct = list(dict.fromkeys(prompts.texts))
    count = round(fraction * len(distinct)) if 0 < fraction < 1 else 0
    if not 0 < count < len(distinct):
        raise UserError(
            f"{prompts.source}: holding out {fraction} of {len(distinct)} distinct prompts leaves a side "
            "empty; give more prompts, or a fraction that leaves at least one on each side"
        )
    order = torch.randperm(len(distinct), generator=make_generator(seed, "lm.heldout")).tolist()
    held_out = {distinct[index] for index in order[:count]}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, text in enumerate(prompts.texts):
        sides[text in held_out].append(index)
    return prompts.select(sides[0]), prompts.select(sides[1])


class PromptSampler:
    """Draws prompts in shuffled epochs: every index once before any comes again.

    A batch that meets the end of an epoch takes what is left of it and goes on with the next, so no prompt is
    dropped whatever the batch size; a batch larger than `count` spans several epochs. The stream is the
    seed's own ("lm.prompts"): no other draw shifts it, and a restored state continues it exactly.
    """

    def __init__(self, count: int, batch_prompts: int, seed: int) -> None:
        if count < 1 or batch_prompts < 1:
            raise ValueError(f"count and batch_prompts must be positive, not {count} and {batch_prompts}")
        self.count, self.batch_prompts = count, batch_prompts
        self._generator = make_generator(seed, "lm.prompts")
        self._left = torch.empty(0, dtype=torch.long)  # of the present epoch, in the order to come

    def next(self) -> Tensor:
        """The indices of the next batch, (batch_prompts,) long."""
        while len(self._left) < self.batch_prompts:
            self._left = torch.cat([self._left, torch.randperm(self.count, generator=self._generator)])
        batch, self._left = self._left[: self.batch_prompts].clone(), self._left[self.batch_prompts :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Everything that `next` depends on, as a copy."""
        return {"count": self.count, "left": self._left.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken. Raises UserError where the number of prompts is another."""
        if state["count"] != self.count:
            raise UserError(
                f"prompts: the checkpoint was made with {state['count']} training prompts and there are "
                f"{self.count} now; resume with the prompts that the run began with"
            )
        self._left = state["left"].clone()
        self._generator.set_state(state["generator"].clone())

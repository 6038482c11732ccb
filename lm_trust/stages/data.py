"""What the stages learn from: rows of texts or of preferences, checked one by one and split into training and held out.

Texts and chat messages come in the formats that trl's users know. A malformed row, one too that the model's chat
template refuses, is named by its file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lm_trust.errors import UserError, in_line
from lm_trust.lm.heldout import split_rows
from lm_trust.lm.rows import (
    BadRows,
    Row,
    good_rows,
    messages_problem,
    missing_field,
    read_rows,
    text_problem,
)
from lm_trust.training.config_stages import PairData, TextData

FORMATS = (("messages",), ("prompt", "completion"), ("text",))  # columns of a row of texts, in order of precedence


@dataclass(frozen=True)
class Examples:
    """N rows with the columns that trl takes. source: the file; unit: what a row is called; numbers: their places."""

    rows: list[Row]
    source: str
    unit: str
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Where row `index` comes from, for messages: `reviews.jsonl, line 7`."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def select(self, indices: Sequence[int]) -> Examples:
        """The rows at the indices, in their order."""
        return replace(
            self, rows=[self.rows[index] for index in indices], numbers=[self.numbers[index] for index in indices]
        )


def load_texts(section: TextData, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Examples, Examples]:
    """(training, held out): rows of `messages`, of `prompt` and `completion`, or of `text`.

    All rows of a stage are of one format, that of the first. With `field` it is what that field holds.

    Raises:
        UserError: a file cannot be read, a row is malformed, or the tokenizer has no chat template for messages.
    """
    columns: tuple[str, ...] = ()

    def problem(row: Row) -> str | None:
        nonlocal columns
        columns = columns or ((section.field,) if section.field else _format_of(row))
        if not columns:
            return missing_field(row, "text", "data.field")
        return _side_problem(row, columns, tokenizer, "data.field")

    def shaped(row: Row) -> Row:
        if section.field is None:
            return {column: _value(row[column]) for column in columns}
        value = _value(row[section.field])
        return {"text" if isinstance(value, str) else "messages": value}

    return _load(section, problem, shaped, shaped, seed)


def load_pairs(section: PairData, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Examples, Examples]:
    """(training, held out): rows of `chosen`, `rejected` and, where there is one, `prompt`.

    Pairs of one prompt stay on one side.

    Raises:
        UserError: as `load_texts`.
    """

    def problem(row: Row) -> str | None:
        prompt = ("prompt",) if row.get("prompt") is not None else ()
        for side in ("chosen", "rejected"):
            words = _side_problem(row, (*prompt, side), tokenizer, "data.path")
            if words:
                return words
        if isinstance(row["chosen"], list) != isinstance(row["rejected"], list):
            return _mixed(("chosen", "rejected"))
        return "chosen and rejected are the same" if row["chosen"] == row["rejected"] else None

    def shaped(row: Row) -> Row:
        prompt = row.get("prompt")
        return {side: _value(row[side] if prompt is None else prompt + row[side]) for side in ("chosen", "rejected")}

    return _load(
        section, problem, shaped, lambda row: shaped(row) if row.get("prompt") is None else row["prompt"], seed
    )


def _load(
    section: TextData | PairData,
    problem: Callable[[Row], str | None],
    shaped: Callable[[Row], Row],
    identity: Callable[[Row], Any],
    seed: int,
) -> tuple[Examples, Examples]:
    """identity: rows of which it is the same never stand on both sides."""
    bad = BadRows(section.on_bad_row, key="data.on_bad_row")
    first_is_chat: bool | None = None

    def checked(row: Row) -> str | None:
        nonlocal first_is_chat
        words = problem(row)
        if words:
            return words
        is_chat = any(isinstance(value, list) for value in shaped(row).values())
        first_is_chat = is_chat if first_is_chat is None else first_is_chat
        if is_chat == first_is_chat:
            return None
        kinds = ("texts", "chat messages")
        return f"it holds {kinds[is_chat]} and the first row {kinds[first_is_chat]}; give one kind"

    def read(path: str, **options: str | None) -> tuple[Examples, list[str]]:
        file = read_rows(path, **options)
        found = list(good_rows(file, checked, bad))
        rows = [shaped(row) for _, row in found]
        return Examples(rows, file.source, file.unit, [number for number, _ in found]), [
            str(identity(row)) for _, row in found
        ]

    names = {"key": "data.path", "part_keys": "data."}
    training, identities = read(section.path, subset=section.subset, split=section.split, **names)
    if section.heldout is None:
        what = "prompts (or pairs without one)" if isinstance(section, PairData) else "rows"
        training, heldout = _split(training, identities, section.heldout_fraction, seed, what)
    else:
        names = {"key": "data.heldout", "part_keys": "data.heldout_", "usual_split": "test"}
        heldout, _ = read(section.heldout, subset=section.heldout_subset, split=section.heldout_split, **names)
    bad.print_report()
    return training, heldout


def _split(
    examples: Examples, identities: list[str], fraction: float, seed: int, what: str
) -> tuple[Examples, Examples]:
    training, heldout = split_rows(identities, fraction, seed=seed, stream="stages.heldout")
    if not training or not heldout:
        raise UserError(
            f"{examples.source}: data.heldout_fraction {fraction} of {len(set(identities))} different {what} leaves a "
            "side empty; give more, a fraction that leaves at least one on each side, or others in data.heldout"
        )
    return examples.select(training), examples.select(heldout)


def _format_of(row: Row) -> tuple[str, ...]:
    return next((columns for columns in FORMATS if all(column in row for column in columns)), ())


def _side_problem(row: Row, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, key: str) -> str | None:
    """What is wrong with columns of a row that go on from one another, if anything: texts, or messages of a chat.

    key: where it is set which columns they are.
    """
    for column in columns:
        words = (
            messages_problem(row[column], column)
            if isinstance(row.get(column), list)
            else text_problem(row, column, key)
        )
        if words:
            return words
    values = [row[column] for column in columns]
    if not isinstance(values[0], list):
        return None if all(isinstance(value, str) for value in values) else _mixed(columns)
    if not all(isinstance(value, list) for value in values):
        return _mixed(columns)
    if tokenizer.chat_template is None:
        # Not this row's fault: skipping rows would not help.
        raise UserError(
            "data.path: its rows are chat messages, and the model's tokenizer has no chat template; "
            "give texts, or a model with a template"
        )
    try:
        tokenizer.apply_chat_template([message for value in values for message in value], tokenize=False)
    except Exception as error:
        return f"the model's chat template refuses its messages: {in_line(error)[:200]}"
    return None


def _value(value: str | list[Row]) -> str | list[Row]:
    """A text, or messages with the same keys each: a table fills up those that only some rows have."""
    if isinstance(value, str):
        return value
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _mixed(columns: tuple[str, ...]) -> str:
    return f"{' and '.join(columns)} must both be texts, or both lists of chat messages"

"""Prompts: plain texts or chats, checked row by row, split, and drawn in shuffled epochs.

`load_prompts` reads them from whatever `lm_trust.lm.rows` reads. Every row keeps its other fields, which the
rewards receive. Whatever is wrong with the data is a UserError that names the file, the line and the field, before
training starts; with `BadRows("skip")` such rows are left out and counted instead.

A chat is a list of messages, dictionaries of `role` and `content`, for the model's chat template. Rewards are
functions of texts: what they receive as the prompt of a chat is its last user message, and the messages besides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_trust.core.seeding import make_generator
from lm_trust.errors import UserError
from lm_trust.lm.heldout import split_rows
from lm_trust.lm.rows import (
    BadRows,
    Row,
    good_rows,
    kind_of,
    messages_problem,
    missing_field,
    read_rows,
    text_problem,
)

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompts:
    """N prompts, none empty, with the other columns of their rows.

    Attributes:
        texts: N strings, of a chat its last user message.
        fields: each other column, N values, None where a row lacks it.
        source: the file or dataset.
        unit: what its rows are called, "line" or "row".
        numbers: where each prompt stands in it, from 1.
        chats: N chats, None for a prompt that is a plain text; None where all are.
    """

    texts: list[str]
    fields: dict[str, list]
    source: str
    unit: str
    numbers: list[int]
    chats: list[Chat | None] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """Where prompt `index` comes from, for messages: `reviews.jsonl, line 7`."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def chat(self, index: int) -> Chat | None:
        """Prompt `index` as messages; None where it is a plain text."""
        return None if self.chats is None else self.chats[index]

    @property
    def chat_column(self) -> list[Chat | None]:
        """N: each prompt as messages, None where it is a plain text."""
        return [None] * len(self) if self.chats is None else self.chats

    @property
    def all_chats(self) -> bool:
        """Whether every prompt is one of messages."""
        return self.chats is not None and None not in self.chats

    def whole(self, index: int) -> str:
        """All of prompt `index` as one string, by which prompts are the same or not."""
        chat = self.chat(index)
        return self.texts[index] if chat is None else json.dumps(chat, default=str)

    def firsts(self) -> list[int]:
        """For each prompt the index of the first that is the same."""
        first: dict[str, int] = {}
        return [first.setdefault(self.whole(index), index) for index in range(len(self))]

    def select(self, indices: Sequence[int] | Tensor) -> Prompts:
        """The prompts at the indices, repeats allowed, in their order."""
        indices = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        return Prompts(
            [self.texts[index] for index in indices],
            {name: [column[index] for index in indices] for name, column in self.fields.items()},
            self.source,
            self.unit,
            [self.numbers[index] for index in indices],
            None if self.chats is None else [self.chats[index] for index in indices],
        )


def user_chat(text: str) -> Chat:
    """A text as the one message of a user."""
    return [{"role": "user", "content": text}]


def typed_prompt(text: str, *, chat: bool) -> Prompts:
    """The one prompt that somebody typed."""
    return Prompts([text], {}, "prompt", "row", [1], [user_chat(text)] if chat else None)


def load_prompts(
    path: str | Path,
    *,
    field: str = "prompt",
    subset: str | None = None,
    split: str | None = None,
    chat: bool = False,
    bad: BadRows | None = None,
    heldout: bool = False,
) -> Prompts:
    """Read prompts.

    Args:
        path, subset, split: see `read_rows`.
        field: the column that holds the prompt, a text or a list of messages.
        chat: make a text a user's message.
        bad: takes the malformed rows: bad JSON, no such field, neither a text nor messages, nothing in it; without it
            the first one is an error.
        heldout: they are the held-out ones, of a dataset with several splits by default those of `test`.

    Raises:
        UserError: a file cannot be read, or a row is bad; names file, line and field.
    """
    if heldout:
        names = {"key": "prompts.heldout", "part_keys": "prompts.heldout_", "usual_split": "test"}
    else:
        names = {"part_keys": "prompts."}
    file = read_rows(path, subset=subset, split=split, **names)
    texts: list[str] = []
    fields: dict[str, list] = {}
    numbers: list[int] = []
    chats: list[Chat | None] = []
    for number, row in good_rows(file, lambda row: _problem(row, field), bad or BadRows()):
        for name in row:
            if name != field and name not in fields:
                fields[name] = [None] * len(texts)
        for name, column in fields.items():
            column.append(row.get(name))
        prompt = row[field]
        chats.append(_messages(prompt) if isinstance(prompt, list) else user_chat(prompt) if chat else None)
        texts.append(prompt if isinstance(prompt, str) else _last_user_text(prompt))
        numbers.append(number)
    return Prompts(texts, fields, file.source, file.unit, numbers, chats if any(chats) else None)


def _problem(row: Row, field: str) -> str | None:
    """What is wrong with the row's prompt, if anything."""
    missing = missing_field(row, field, "prompts.field")
    if missing:
        return missing
    prompt = row[field]
    if isinstance(prompt, list):
        return messages_problem(prompt, field) or _chat_problem(prompt, field)
    if not isinstance(prompt, str):
        return f"field {field!r} is {kind_of(prompt)}, not a string or a list of chat messages"
    return text_problem(row, field, "prompts.field")


def _chat_problem(chat: Chat, field: str) -> str | None:
    """What is wrong with messages as a prompt, if anything."""
    if not any(message["role"] == "user" for message in chat):
        return f"field {field!r} holds no message with the role 'user'"
    if chat[-1]["role"] == "assistant":
        return f"field {field!r} ends with a message of the assistant; a prompt ends before the answer"
    return None if _last_user_text(chat) else f"field {field!r} has an empty last message of the user"


def _messages(chat: list) -> Chat:
    """Without the keys that only other rows' messages have: Parquet fills them with None."""
    return [{name: value for name, value in message.items() if value is not None} for message in chat]


def _last_user_text(chat: Chat) -> str:
    return next(message["content"] for message in reversed(chat) if message["role"] == "user")


def split_heldout(
    prompts: Prompts, fraction: float, seed: int, *, seen: Prompts | None = None
) -> tuple[Prompts, Prompts]:
    """(training, held out): a split by the seed alone, training prompts in their own order and held-out ones in none.

    Rows with the same prompt stay on one side, so that no held-out prompt was ever trained on.

    Args:
        fraction: of the distinct prompts that are held out, in (0, 1); at least one is.
        seen: the prompts as the model will get them, where they are yet to be cut: these say which are the same.

    Raises:
        UserError: a side would be empty.
    """
    seen = prompts if seen is None else seen
    whole = [seen.whole(index) for index in range(len(prompts))]
    training, heldout = split_rows(whole, fraction, seed=seed, stream="lm.heldout")
    if not training or not heldout:
        raise UserError(
            f"{prompts.source}: holding out {fraction} of {len(set(whole))} distinct prompts leaves a side "
            "empty; give more prompts, a fraction that leaves at least one on each side, or others in prompts.heldout"
        )
    return prompts.select(training), prompts.select(heldout)


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
        """Continue where the state was taken.

        Raises:
            UserError: the number of prompts is another.
        """
        if state["count"] != self.count:
            raise UserError(
                f"prompts: the checkpoint was made with {state['count']} training prompts and there are "
                f"{self.count} now; resume with the prompts that the run began with"
            )
        self._left = state["left"].clone()
        self._generator.set_state(state["generator"].clone())

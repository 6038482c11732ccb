"""The last thing a run prints: its held-out evaluation, before against after, and completions side by side.

Completions are a model's text and may hold anything. They are shown as text only: markup in them stays markup, and
what would move the cursor or turn the reading direction is written out as an escape.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm_trust.terminal import encodable
from lm_trust.training.progress import WorldName, format_number

WIDTH = 80
SAMPLES = 4
# Control, format, surrogate, private and unassigned characters; line and paragraph separators.
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

Evaluation = Mapping[str, Any]


def print_summary(evaluation: Mapping[str, Evaluation | None], console: Console, *, world: WorldName) -> None:
    """Print an evaluation (the content of evaluation.json) in at most 80 columns.

    Args:
        evaluation: {"before": {...}, "after": {...}}; either may be missing. Missing and null numbers show as `-`.
        console: where to write, a terminal or not.
        world: "language" or "control".
    """
    columns = {name: evaluation[name] for name in ("before", "after") if evaluation.get(name)}
    if not columns:
        return
    width = min(console.width, WIDTH)
    last = list(columns.values())[-1]
    unit = "completions" if world == "language" else "episodes"
    title = "Held-out evaluation" if world == "language" else "Evaluation"
    rows = language_rows(last) if world == "language" else _CONTROL_ROWS
    counts = {values.get("count") for values in columns.values()} - {None}
    if len(counts) == 1:
        title += f", {counts.pop()} {unit}"
    elif counts:  # each column has its own
        rows = [*rows, (unit, lambda values: str(values.get("count", "-")))]
    console.print()
    console.print(Text(title, "bold"))
    # Not as wide as it might be: the eye should find its way from a name to its number.
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(overflow="fold")
    for _ in columns:
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", *(Text(name, "bold") for name in columns))
    for label, number in rows:
        table.add_row(Text(label), *(number(values) for values in columns.values()))
    console.print(table, width=width, highlight=False)
    samples = {name: list(values.get("samples") or []) for name, values in columns.items()}
    if world == "language":
        _print_samples(samples, console, width)


def visible(text: str, encoding: str = "utf-8") -> str:
    """`text` on one line with every control or invisible character, and all that `encoding` lacks, as an escape."""
    characters = (
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in INVISIBLE
        else character
        for character in text
    )
    return encodable("".join(characters), encoding)


def _print_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]], console: Console, width: int) -> None:
    # The same prompts on both sides: a sample without its counterpart would be read as one.
    rows = [row for row in zip(*samples.values(), strict=False) if len({sample["prompt"] for sample in row}) == 1]
    gap = 3
    column = (width - gap * (len(samples) - 1)) // len(samples)
    for row in rows[:SAMPLES]:
        console.print()
        prompt = Text(visible(row[0]["prompt"], console.encoding), "bold")
        console.print(prompt, width=width, highlight=False)
        table = Table.grid(padding=(0, gap, 0, 0))
        for _ in samples:
            table.add_column(width=column, overflow="fold")
        rewards = (format_number(sample.get("reward")) for sample in row)
        table.add_row(*(Text(f"{name}, reward {reward}", "dim") for name, reward in zip(samples, rewards, strict=True)))
        table.add_row(*(_completion(sample, console.encoding) for sample in row))
        console.print(table, highlight=False)


def _completion(sample: Mapping[str, Any], encoding: str) -> Text:
    text = visible(sample["completion"].strip(" "), encoding)
    return Text(text) if text else Text("(empty)", "dim")


def language_rows(values: Evaluation) -> list[tuple[str, Callable[[Evaluation], str]]]:
    """The rows of a table of evaluations, (label, what it shows of one); the reward's parts where it has several."""
    names = [key.removeprefix("reward/") for key in values if key.startswith("reward/")]
    parts = [(f"  {name}", partial(_mean, of=f"/{name}")) for name in names] if len(names) > 1 else []
    first, *others = _LANGUAGE_ROWS
    return [first, *parts, *others]


def _mean(values: Evaluation, of: str = "") -> str:
    interval = values.get(f"reward_interval{of}")
    mean = format_number(values.get("reward_mean" if not of else f"reward{of}"))
    if interval is None or any(limit is None for limit in interval):
        return mean
    low, high = map(format_number, interval)
    return f"{mean} [{low}, {high}]"


def _number(key: str, decimals: int = 3) -> Callable[[Evaluation], str]:
    return lambda values: format_number(values.get(key), decimals)


_LANGUAGE_ROWS: list[tuple[str, Callable[[Evaluation], str]]] = [
    ("mean reward [95 % interval]", _mean),
    ("reference KL (nats/sequence)", _number("reference_kl")),
    ("perplexity under base model", _number("perplexity", 2)),
    ("distinct-2", _number("distinct_2")),
    ("completion length (tokens)", _number("completion_length", 1)),
]
_CONTROL_ROWS: list[tuple[str, Callable[[Evaluation], str]]] = [
    ("mean return [95 % interval]", _mean),
    ("episode length (steps)", _number("length_mean", 1)),
]

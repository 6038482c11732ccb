"""Lines of text on the terminal."""

from __future__ import annotations

from rich.console import Console


def say(line: str, console: Console | None = None) -> None:
    """Print a line as it is, however long and whatever it has of brackets and colons, on `console` or standard output.

    Paths and rows of data come to stand in it.
    """
    console = console or Console()
    console.print(encodable(line, console.encoding), markup=False, emoji=False, highlight=False, soft_wrap=True)


def encodable(text: str, encoding: str) -> str:
    """The text with all that the encoding lacks as an escape: a character must not end a training run."""
    return text.encode(encoding, "backslashreplace").decode(encoding)

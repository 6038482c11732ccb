"""Errors that are meant for the person at the terminal, and the words that they are made of."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right: a configuration, a file, a missing package, a reward function.

    The message is one line for each thing that is wrong. It names the file, key or sample at fault and says what to do.
    The command line prints it without a traceback and exits with status 2.
    """


def in_line(value: object) -> str:
    """Its text without line breaks, which errors have, and arrays and the spaces that hold some."""
    return " ".join(str(value).split())


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def error_text(error: BaseException) -> str:
    """An error in one line, with its kind where it is not a person's."""
    text = in_line(error)
    return text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A guess at what was meant, in brackets; empty where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

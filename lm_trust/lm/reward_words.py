"""How messages about rewards show values, errors and samples: on one line, and never too long."""

from __future__ import annotations

import os
import reprlib
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_trust.errors import in_line

# Where code lies that no user has written.
_LIBRARIES = (
    str(Path(__file__).parents[1]) + os.sep,
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")),
    "<frozen ",
)


def short(value: Any) -> str:
    """The value's repr on one line, cut in its middle to about 80 characters."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 80
    try:
        return in_line(shortener.repr(value))
    except Exception:  # an object without a repr, inside a container that asks for it
        return f"<{type(value).__name__}>"


def one_line(error: BaseException) -> str:
    """The error's type and the beginning of its message."""
    try:
        text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in in_line(error))
    except Exception:  # an error that fails to say what it is
        text = ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def raised(error: BaseException) -> str:
    """What a user's function did, and where in their code: `raised KeyError: 'a' (rewards.py:31, in judge)`."""
    frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    written = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    if not written:
        return f"raised {one_line(error)}"
    file = in_line("/".join(Path(written[-1].filename).parts[-2:]))
    return f"raised {one_line(error)} ({file}:{written[-1].lineno}, in {written[-1].name})"


def sample_words(samples: Mapping[str, list], index: int) -> str:
    """Which sample it is, with its prompt and completion."""
    prompt, completion = samples["prompts"][index], samples["completions"][index]
    return f"sample {index}: prompt {short(prompt)}, completion {short(completion)}"

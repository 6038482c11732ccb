"""Where a pretrained model comes from: the special name `smollm2-135m`, a local folder, or a hub id."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lm_trust.lm.smollm2 import smollm2_folder

SMOLLM2 = "smollm2-135m"


def source_of(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: a folder, with the network ruled out, or a hub id.

    Raises:
        UserError: SmolLM2 is named and its package is not there.
    """
    folder = smollm2_folder() if path == SMOLLM2 else Path(path).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True, "trust_remote_code": trust_remote_code}
    return path, {"revision": revision or "main", "trust_remote_code": trust_remote_code}


@contextmanager
def quiet(*, bars: bool = True, reports: bool = True) -> Iterator[None]:
    """Keep off the terminal that peft asks transformers by an old name and, by choice, transformers' own output.

    Args:
        bars: leave transformers' progress bars; a model of a local folder loads too fast to need one.
        reports: leave its report of weights that a file lacks; without it the caller says so itself.
    """
    hidden = not bars and transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    if hidden:
        transformers_logging.disable_progress_bar()
    if not reports:
        transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if hidden:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

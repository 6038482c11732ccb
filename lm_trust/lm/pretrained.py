"""Where a pretrained model comes from: the special name `smollm2-135m`, a local folder, or a hub id.

Weights are read from safetensors files alone. The older files (.bin, .pt) are pickles, which may run code when read.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as transformers_logging

from lm_trust.errors import UserError
from lm_trust.lm.smollm2 import SMOLLM2, smollm2_folder

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def source_of(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: a folder, with the network ruled out, or a hub id.

    Raises:
        UserError: SmolLM2 is named and its package is not there.
    """
    folder = smollm2_folder() if path == SMOLLM2 else Path(path).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True, "trust_remote_code": trust_remote_code}
    return path, {"revision": revision or "main", "trust_remote_code": trust_remote_code}


def described(path: str) -> str:
    """The path as errors name it: one that is no folder may be a folder's name that was mistyped."""
    return repr(path) if path == SMOLLM2 or Path(path).expanduser().is_dir() else f"{path!r} (no folder here: a hub id)"


def refuse_pickle(folder: Path, key: str) -> None:
    """See that a local folder's weights, where it holds any, are in safetensors files of its own.

    Raises:
        UserError: they are in a pickle file, or an index names another file than one of the folder's; names `key`.
    """
    files = [path for path in folder.iterdir() if path.is_file()]
    pickles = sorted(path.name for path in files if path.suffix in PICKLES)
    if pickles and not any(path.suffix == SAFETENSORS for path in files):
        raise UserError(
            f"{key}: {folder} holds its weights in {pickles[0]}, a pickle file, which may run code when it is read; "
            "convert them to safetensors (save_pretrained does it)"
        )
    for index in (path for path in files if path.name.endswith(f"{SAFETENSORS}.index.json")):
        _check_index(index, key)


def refuse_pickle_of_hub(repository: str, revision: str, key: str) -> None:
    """See that a hub repository's index of weights, where it has one, names safetensors files of its own.

    Raises:
        UserError: it names another file; names `key`.
    """
    try:
        index = huggingface_hub.hf_hub_download(repository, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    except (OSError, ValueError):  # it has none; or there is no such repository, which loading it will tell
        return
    _check_index(Path(index), key)


@contextmanager
def as_uploaded() -> Iterator[None]:
    """Load what a hub repository's revision holds, and no pull request that converts its pickle."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_index(index: Path, key: str) -> None:
    for name in _named_files(index, key):
        if Path(name).name != name or Path(name).suffix != SAFETENSORS:
            raise UserError(f"{key}: {index} names {name!r}, which is not a safetensors file beside it")


def _named_files(index: Path, key: str) -> list[str]:
    try:
        return sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{key}: {index} is not an index of weights ({type(error).__name__})") from error


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

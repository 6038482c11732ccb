"""Checkpoints: safetensors for tensors, JSON for the rest, never pickle; whole and verified, or not there.

A run's `checkpoints/` holds folders named by iteration. Each is built aside, sealed with a manifest of checksums and
moved in by one rename, so that a kill at any moment leaves the older ones untouched.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm_trust.errors import UserError
from lm_trust.verified_folder import build_verified, fault, put_back

STATE, TENSORS = "state.json", "tensors.safetensors"

logger = logging.getLogger(__name__)


def save_checkpoint(folder: Path, state: dict[str, Any], *, iteration: int, keep_last: int) -> Path:
    """Write the state, and drop the oldest checkpoints beyond `keep_last` and those of later iterations.

    A later one is torn, or of a run that this one replaces: were it kept, it would stand in the place of a good one.
    Nothing is dropped before the new one has been read back and its checksums were found right.

    Args:
        folder: the run's `checkpoints/`.
        state: nested dictionaries and lists (a tuple comes back as a list) whose leaves are tensors or JSON values.
        iteration: names the checkpoint.
        keep_last: how many stay, at least 1.

    Raises:
        UserError: it cannot be written, or is not what was written; older checkpoints are intact.
    """

    def build(target: Path) -> None:
        tensors: dict[str, Tensor] = {}
        tree = _pack(state, "state", tensors)
        (target / STATE).write_text(json.dumps(tree), encoding="utf-8")
        save_file(tensors, target / TENSORS)

    path = folder / f"{iteration:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        build_verified(path, build)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the checkpoint could not be written ({error}); older ones are intact") from error
    problem = fault(path)
    if problem is not None:
        raise UserError(
            f"{path}: the checkpoint is not what was written ({problem}); check the disk; older ones are kept"
        )
    kept = [other for other in _checkpoints(folder) if _iteration(other) <= iteration][-keep_last:]
    for other in _checkpoints(folder):
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)
    return path


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state of the newest checkpoint that is whole; a torn one is skipped with a warning.

    Raises:
        UserError: there is none.
    """
    for path in reversed(_checkpoints(folder)):
        problem = fault(path)
        if problem is None:
            try:
                return _read(path)
            except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
                problem = f"it cannot be read ({type(error).__name__})"  # sealed, but by someone else
        logger.warning("skipping the checkpoint %s: %s", path, problem)
    raise UserError(f"{folder}: no whole checkpoint to resume from; start the run anew with another --output")


def holds_checkpoint(folder: Path) -> bool:
    """Whether any checkpoint has been written there, whole or not; one that a kill left unnamed is named first.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        put_back(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); a run goes on in its own folder") from error
    return bool(_checkpoints(folder))


def _read(path: Path) -> dict[str, Any]:
    tensors = load_file(path / TENSORS)
    state = _unpack(json.loads((path / STATE).read_text(encoding="utf-8")), tensors)
    if not isinstance(state, dict):
        raise TypeError("not a dictionary")
    return state


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()), key=_iteration)


def _iteration(path: Path) -> int:
    return int(path.name)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, its tensors replaced by {"tensor": name} and its dictionaries by lists of pairs."""
    if isinstance(value, Tensor):
        # Numbered, because joined names may coincide: a module's own keys hold dots.
        name = f"{len(tensors)} {name}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        # Pairs, because JSON would turn the integer keys of an optimizer's state into strings.
        return {"items": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unpack(item, tensors) for key, item in value["items"]}
    return value

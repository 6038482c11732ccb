"""Folders that are either whole or not there: built aside, moved in by one rename, checked against a manifest.

The manifest lists every file's size and SHA-256. Model caches and checkpoints are such folders.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MANIFEST = "manifest.json"


def fault(folder: Path) -> str | None:
    """What is wrong with a verified folder, in a few words; None if it is exactly what was built."""
    if not folder.is_dir():
        return "it does not exist" if not os.path.lexists(folder) else "it is not a folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {path: (entry["size"], entry["sha256"]) for path, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    present = _files(folder)
    for path in sorted(listed.keys() | present.keys()):
        if path not in present:
            return f"{path} is missing"
        # A file that nobody listed can change what is loaded: transformers reads any adapter_config.json it finds.
        if path not in listed:
            return f"{path} was not put there by lm_trust"
        # A link leads elsewhere, and who opens a pipe may wait for ever.
        if present[path].is_symlink() or not present[path].is_file():
            return f"{path} is not a plain file"
    try:
        # Sizes first: the usual fault, a truncated file, is then found without reading half a gigabyte.
        for path, (size, _) in listed.items():
            if present[path].stat().st_size != size:
                return f"{path} has {present[path].stat().st_size} bytes instead of {size}"
        for path, (_, sha256) in listed.items():
            if _sha256(present[path]) != sha256:
                return f"the checksum of {path} does not match"
    except OSError as error:
        return f"a file cannot be read: {error}"
    return None


def build_verified(folder: Path, build: Callable[[Path], None]) -> None:
    """Build the folder with `replace_folder` and seal it with a manifest.

    Args:
        folder, build: as for `replace_folder`; the name manifest.json is reserved.
    """

    def build_and_seal(temporary: Path) -> None:
        build(temporary)
        if (temporary / MANIFEST).exists():
            raise ValueError(f"the name {MANIFEST} is reserved for the folder's own manifest")
        files = {
            path: {"size": file.stat().st_size, "sha256": _sha256(file)} for path, file in _files(temporary).items()
        }
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
        # Some disks say only here that they are full.
        for file in (*_files(temporary).values(), temporary / MANIFEST):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    replace_folder(folder, build_and_seal)


def put_back(parent: Path) -> None:
    """Put the whole folders in `parent` into their places that a kill left beside them, before or between two renames.

    Where something stands in the place already, or the folder is not whole, it is left to the next `replace_folder`.
    """
    for aside in parent.glob(".*.tmp"):
        place = parent / aside.name[1:].removesuffix(".tmp").rpartition(".")[0]
        if not os.path.lexists(place) and fault(aside) is None:
            aside.rename(place)


def replace_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Build a folder beside its final place and put it there by one rename.

    Only one process at a time may build the same folder; a temporary one found here belongs to one that was killed.

    Args:
        folder: the final place; what stands there is replaced, and stays where the new one does not get there.
        build: writes the contents into the empty folder that it is given. What it raises is passed on, and nothing of
            what it wrote is kept.
    """
    _remove_temporaries(folder)
    temporary, aside = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp") for _ in range(2))
    temporary.mkdir()
    try:
        build(temporary)
        for file in temporary.rglob("*.safetensors"):
            follow_umask(file)
        if os.path.lexists(folder):
            # A folder with something in it cannot be replaced by a rename, so the old one steps aside first.
            folder.rename(aside)
        temporary.rename(folder)
    finally:
        if os.path.lexists(aside) and not os.path.lexists(folder):
            aside.rename(folder)
        _remove_temporaries(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file within the context; by one rename it then becomes `path`, or nothing where that failed."""
    temporary = path.with_name(f".{path.name}.tmp")  # readers of a folder pass over names that begin with a dot
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def follow_umask(file: Path) -> None:
    """Give a file the permissions that `open` gives a new one: safetensors lets none but the owner read its own."""
    umask = os.umask(0o077)  # it cannot be read without being set
    os.umask(umask)
    with suppress(OSError):  # not every disk knows them
        file.chmod(0o666 & ~umask)


def _files(folder: Path) -> dict[str, Path]:
    """Every file under `folder` but its manifest, by its path relative to the folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in found if path != folder / MANIFEST}


def _remove_temporaries(folder: Path) -> None:
    """Those of this folder alone: `model.v2` may be being built beside `model`."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 32}.tmp"):
        _remove(leftover)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

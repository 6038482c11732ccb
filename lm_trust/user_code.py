"""Importing what a user names by dotted path: a reward, an environment."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType


def import_user_module(name: str) -> ModuleType:
    """Import a module from the working directory, as with `python -m`, or from the installed packages.

    Whatever the import raises is passed on; the search path is as before afterwards.
    """
    with working_directory_importable():
        return importlib.import_module(name)


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Within the context the working directory is on the search path, as with `python -m`.

    For the user's own calls too: they may import what is beside them as late as they are called.
    """
    sys.path.insert(0, "")
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove("")

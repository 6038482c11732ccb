"""Importing what a user names by dotted path: a reward, an environment."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from types import ModuleType


def import_user_module(name: str) -> ModuleType:
    """Import a module from the working directory, as with `python -m`, or from the installed packages.

    Whatever the import raises is passed on; the search path is as before afterwards.
    """
    directory = os.getcwd()
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)

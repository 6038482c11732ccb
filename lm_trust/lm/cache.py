"""Folders that are expensive to make, made once and kept in the user's cache.

A cached folder is a verified folder (`lm_trust.verified_folder`): its manifest is checked each time it is
asked for, and one that is incomplete, truncated or altered is reported in a single warning and built anew.
A file lock lets one process build while others wait, and is freed by the system when its holder dies.
"""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lm_trust.errors import UserError
from lm_trust.verified_folder import build_verified, fault

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """The folder of all caches.

    It is `$LM_TRUST_CACHE`, else `$XDG_CACHE_HOME/lm_trust`, else `~/.cache/lm_trust`.
    """
    if own := os.environ.get("LM_TRUST_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG specification says that a relative path here is invalid and to be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "lm_trust"


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, verified; built first where it is missing or broken.

    Args:
        name: the folder's name, one path component. Put into it whatever the contents depend on, such as a
            version.
        build: writes the contents into the empty folder that it is given. What it raises is passed on, and
            nothing of what it wrote is kept. The name `manifest.json` is refused: it is the cache's own.

    Raises:
        UserError: the cache cannot be written.
    """
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"a cached folder's name is one visible path component, not {name!r}")
    root = cache_root()
    folder = root / name
    if fault(folder) is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            # Another process may have built it while this one waited for the lock.
            problem = fault(folder)
            if problem is None:
                return folder
            if os.path.lexists(folder):
                logger.warning("lm_trust: the cached folder %s is broken (%s); rebuilding it", folder, problem)
            build_verified(folder, build)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise UserError(
            f"{error.filename or root}: cannot write the cache ({os.strerror(error.errno)}); "
            "set LM_TRUST_CACHE to a folder that can be written and has room"
        ) from error
    return folder


_UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOTDIR,
}

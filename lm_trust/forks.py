"""What a fork of this process does before anything else."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def first_in_forks(prepare: Callable[[], None]) -> None:
    """Call `prepare` first thing in each fork made from now on. A SIGTERM that comes earlier waits for it.

    Without that wait whoever ends a fork as soon as it has made it would be met by this process's own handler. Nothing
    where there are no forks.
    """
    if not hasattr(os, "register_at_fork"):
        return
    held = threading.local()

    def hold() -> None:
        held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, held.mask)

    def begin() -> None:
        prepare()
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=begin)

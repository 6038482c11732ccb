"""Ctrl-C and SIGTERM as a request to stop after the iteration under way.

A run of several processes stops in all of them after the same iteration. Its launcher repeats the signal that it got
itself, so that there a second one asks for no more than the first; a process that takes too long is killed by it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from lm_trust.core.processes import gathered, process_count
from lm_trust.forks import first_in_forks


class Interruption:
    """Within this context SIGINT and SIGTERM are noted and not obeyed; a second one is, at once, where one is alone.

    Forks of this process obey SIGTERM at once: whoever made one, such as a reward, ends it so and waits for that. A
    first SIGINT they pass over, as a terminal sends it to them too and the iteration under way needs their answers.

    Attributes:
        signal: the signal that came to this process, or None; after `requested`, to any.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def requested(self) -> bool:
        """Whether a signal came to any process; all of them must ask."""
        self.signal = next((each for each in gathered(self.signal) if each is not None), None)
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 0 where none came: the shell's convention."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> Interruption:
        # Only the main thread may set handlers; elsewhere whoever owns it decides.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
            first_in_forks(lambda: self._restore(signal.SIGTERM))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore(*self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if process_count() == 1:
            self._restore(*self._previous)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))

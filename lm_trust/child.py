"""An object that lives in a child of this process, and whose methods are called from here.

For work that another core can do meanwhile: `start` a method, do something else, `finish` it. Threads would not do
where Python's own work is half of it. And for work that may crash, hang or fill the memory, in a fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

from lm_trust.errors import UserError

_AWAKE = 0.0005  # seconds that either side looks out for the other before it sleeps
_LOOK = 0.1  # seconds of sleep after which it looks whether the other is still there

_NOTHING = object()  # in the place of a message: the bell alone


class ChildDied(RuntimeError):  # noqa: N818 - it says what happened
    """The child's process is gone. exit_code: its status, negative for the number of a signal."""

    def __init__(self, name: str, exit_code: int | None) -> None:
        super().__init__(f"{name}: its process is gone, with exit code {exit_code}")
        self.exit_code = exit_code


class Child:
    """A fork of this process that holds `target`; it ends with `close`, with this object, and with this process.

    Messages go through a pipe, and a semaphore each way says when to look. A call without arguments that repeats the
    last one, and a result of None, go by the semaphore alone, in a tenth of the time.

    Args:
        target: as it is now; what the child does to it is not seen here, but for what lies in shared memory.
        name: for messages, such as "the critic".
        fresh: a new interpreter in the place of a fork, to which the target is sent; it shares nothing with this one.

    Raises:
        UserError: this platform cannot fork, or has no semaphores.
    """

    def __init__(self, target: Any, name: str, *, fresh: bool = False) -> None:
        if not fresh and "fork" not in multiprocessing.get_all_start_methods():
            raise UserError(f"{name}: a process of its own needs a platform that can fork, such as Linux; leave it out")
        context = multiprocessing.get_context("spawn" if fresh else "fork")
        self._name = name
        ours, theirs = context.Pipe()
        try:
            asking, answering = (_Bells(context.Semaphore(0), context.Semaphore(0)) for _ in range(2))
        except (ImportError, OSError) as error:  # no shared memory, in some containers
            raise UserError(f"{name}: a process of its own needs semaphores, and there are none ({error})") from error
        self._ours, self._repeated = _Side(ours, asking, answering), None
        given = (target, _Side(theirs, answering, asking), None if fresh else ours)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        theirs.close()
        # multiprocessing's own, which at the end of this process runs before it waits for its children.
        killed = self._process if fresh else None
        self._end = Finalize(self, _end, args=(self._ours, killed), exitpriority=0)

    def start(self, method: str, *given: Any) -> None:
        """Begin a call; one at a time."""
        repeats = not given and method == self._repeated
        self._repeated = None if given else method
        try:
            self._ours.send(_NOTHING if repeats else (method, given))
        except OSError:
            raise self._gone() from None

    def finish(self, timeout: float | None = None) -> Any:
        """Wait for the call that was begun: its result, or its exception raised here.

        Raises:
            TimeoutError: it takes more than `timeout` seconds and goes on; `kill` ends it.
            ChildDied: the process is gone.
        """
        try:
            answer = self._ours.receive(self._process.is_alive, timeout)
        except TimeoutError:  # it is an OSError
            raise
        except (EOFError, OSError):
            raise self._gone() from None
        result, error = (None, None) if answer is _NOTHING else answer
        if error is not None:
            raise error
        return result

    def call(self, method: str, *given: Any) -> Any:
        """Begin a call and wait for it."""
        self.start(method, *given)
        return self.finish()

    def close(self) -> None:
        """End the child."""
        self._end()
        self._process.join(5)

    def kill(self) -> None:
        """End the child whatever it does."""
        self._process.kill()
        self.close()

    def _gone(self) -> ChildDied:
        self._process.join(1)
        return ChildDied(self._name, self._process.exitcode)


class _Bells(NamedTuple):
    """What one end rings for the other: that it is its turn, and before that, where there is one, a message."""

    turn: Semaphore
    message: Semaphore


class _Side:
    """One end: what it sends, and what the other end sends.

    Args:
        connection: for messages.
        ringing: for the other end.
        hearing: from the other end.
    """

    def __init__(self, connection: Connection, ringing: _Bells, hearing: _Bells) -> None:
        self.connection, self._ringing, self._hearing = connection, ringing, hearing

    def send(self, message: Any) -> None:
        """Anything that can be pickled, or _NOTHING."""
        if message is _NOTHING:
            self._ringing.turn.release()
            return
        # Plain bytes: what torch would make of the tensors in a message, a file in shared memory for each, is slower
        # than copying them.
        message = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._ringing.message.release()
        self._ringing.turn.release()
        self.connection.send_bytes(message)  # last: what is more than a pipe holds waits for its reader

    def receive(self, there: Callable[[], bool], timeout: float | None = None) -> Any:
        """The next message, or _NOTHING.

        Args:
            there: whether the process at the other end is.
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: nothing came in that time.
            EOFError, OSError: the other end is gone.
        """
        self._await_turn(there, timeout)
        return pickle.loads(self.connection.recv_bytes()) if self._hearing.message.acquire(False) else _NOTHING

    def _await_turn(self, there: Callable[[], bool], timeout: float | None) -> None:
        # To wake takes a sleeping process a tenth of a millisecond, longer than many calls: first look for a while.
        turn, began = self._hearing.turn, time.perf_counter()
        while not turn.acquire(False):
            waited = time.perf_counter() - began
            if timeout is not None and waited >= timeout:
                raise TimeoutError
            if waited < _AWAKE:
                continue
            alive = there()  # before the last look: what it rang while it lived is heard
            if turn.acquire(timeout=_LOOK if timeout is None else min(_LOOK, timeout - waited)):
                return
            if not alive:
                raise EOFError


def _serve(target: Any, side: _Side, parents_end: Connection | None) -> None:
    if parents_end is None:
        _end_with_parent()
    else:
        parents_end.close()
        _one_thread()
    # The parent finishes its iteration at either signal, and needs its children for it.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    parent = multiprocessing.parent_process().pid
    method, given = None, ()
    with suppress(EOFError, OSError):  # the parent is gone
        while (request := side.receive(lambda: os.getppid() == parent)) is not None:
            if request is not _NOTHING:
                method, given = request
            try:
                result = getattr(target, method)(*given)
                reply = _NOTHING if result is None else (result, None)
            except Exception as error:
                reply = (None, _portable(error))
            side.send(reply)


def _portable(error: Exception) -> Exception:
    """The exception, or its words where it does not survive being sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _one_thread() -> None:
    """OpenMP's threads do not survive a fork: a child that counts on them would wait for ever."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    """Also where a call hangs: who is not looking at the pipe does not see that nobody is there any more."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(side: _Side, killed: BaseProcess | None) -> None:
    # Said, and not left to the closed pipe: later children have inherited this end of it.
    with suppress(OSError):
        side.send(None)
    side.connection.close()
    if killed is not None:
        killed.join(1)
        killed.kill()

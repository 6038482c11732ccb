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
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from lm_trust.errors import UserError
from lm_trust.forks import first_in_forks


class ChildDied(RuntimeError):  # noqa: N818 - it says what happened
    """The child's process is gone. exit_code: its status, negative for the number of a signal."""

    def __init__(self, name: str, exit_code: int | None) -> None:
        super().__init__(f"{name}: its process is gone, with exit code {exit_code}")
        self.exit_code = exit_code


class Child:
    """A process that holds `target`; it ends with `close`, with this object, and with this process.

    Args:
        target: as it is now; what the child does to it is not seen here, but for what lies in shared memory.
        name: for messages, the setting that asks for it, such as "critic.own_process".
        fresh: a new interpreter, to which the target is sent and which shares nothing with this one; else a fork of it.

    Raises:
        UserError: this platform cannot fork.
    """

    def __init__(self, target: Any, name: str, *, fresh: bool = False) -> None:
        if not fresh and "fork" not in multiprocessing.get_all_start_methods():
            raise UserError(f"{name}: a process of its own needs a platform that can fork, such as Linux; leave it out")
        context = multiprocessing.get_context("spawn" if fresh else "fork")
        self._name = name
        self._connection, theirs = context.Pipe()
        given = (target, theirs, None if fresh else self._connection)
        # A daemon may not have children of its own. A fresh one is ended before this process waits for its children.
        self._process = context.Process(target=_serve, args=given, daemon=not fresh)
        self._process.start()
        theirs.close()
        # multiprocessing's own, which at the end of this process runs before it waits for its children.
        killed = self._process if fresh else None
        self._end = Finalize(self, _end, args=(self._connection, killed), exitpriority=0)

    def start(self, method: str, *given: Any) -> None:
        """Begin a call; one at a time.

        Raises:
            UserError: what is given cannot be sent to another process.
            ChildDied: the process is gone.
        """
        try:
            message = _pickled((method, given))
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:  # each as the object has it
            raise UserError(f"{self._name}: this cannot be sent to another process ({error}); leave it out") from error
        try:
            self._connection.send_bytes(message)
        except OSError:
            raise self._gone() from None

    def finish(self, timeout: float | None = None) -> Any:
        """Wait for the call that was begun: its result, or its exception raised here.

        Raises:
            TimeoutError: it takes more than `timeout` seconds and goes on; `kill` ends it.
            ChildDied: the process is gone.
        """
        try:
            if timeout is not None and not self._connection.poll(timeout):
                raise TimeoutError
            result, error = pickle.loads(self._connection.recv_bytes())
        except TimeoutError:  # it is an OSError
            raise
        except (EOFError, OSError):
            raise self._gone() from None
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
        _kill(self._process)
        self.close()

    def _gone(self) -> ChildDied:
        self._end()  # what it has started may still be there
        self._process.join(1)
        return ChildDied(self._name, self._process.exitcode)


def _serve(target: Any, connection: Connection, parents_end: Connection | None) -> None:
    if parents_end is None:
        if hasattr(os, "setsid"):
            os.setsid()  # by it the end of this process is that of all that it has started
        multiprocessing.set_start_method(None, force=True)  # the target's processes start as anywhere, not as this one
        _end_with_parent()
    else:
        parents_end.close()
        _one_thread()
    # The parent finishes its iteration at either signal, and needs its children for it. A handler, as what is ignored
    # stays so in the programs that the target starts.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda *_: None)

    def leave() -> None:
        connection.close()  # held open it would hide from the parent that this process is gone
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever made the fork ends it so and waits for that

    first_in_forks(leave)
    with suppress(EOFError, OSError):  # the parent is gone
        while (request := pickle.loads(connection.recv_bytes())) is not None:
            method, given = request
            try:
                reply = (getattr(target, method)(*given), None)
            except Exception as error:
                reply = (None, _portable(error))
            connection.send_bytes(_pickled(reply))


def _pickled(message: Any) -> bytes:
    # Plain bytes: what torch would make of the tensors in a message, a file in shared memory for each, is slower.
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


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
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(connection: Connection, killed: BaseProcess | None) -> None:
    # Said, and not left to the closed pipe: later children have inherited this end of it.
    with suppress(OSError):
        connection.send_bytes(_pickled(None))
    connection.close()
    if killed is not None:
        wait([killed.sentinel], 1)  # and not joined: only until then its number is surely its own
        _kill(killed)
        killed.join(1)


def _kill(process: BaseProcess) -> None:
    """End it, and what it has started where it has a session of its own."""
    with suppress(AttributeError, OSError):  # no such platform; no such session, yet or any more
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()

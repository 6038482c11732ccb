"""A reward function in a process of its own: what it does to that process it does not do to the run.

    rewards: [{name: my_rewards:judge, process: true, timeout: 60, memory: 4000}]

The process is a fresh interpreter that imports the function by its name. Where a call crashes it, exceeds its time or
its memory, the process is ended, and the next call gets a new one. With several calls at once there are as many
processes. What one of them has started ends with it. What the function returns comes back as plain numbers, texts and
lists: its modules are never imported here.
"""

from __future__ import annotations

import inspect
import queue
import signal
from numbers import Real
from pathlib import Path
from typing import Any

from lm_trust.child import Child, ChildDied
from lm_trust.errors import UserError
from lm_trust.lm.reward_calls import CallTimeout, run_calls
from lm_trust.lm.reward_functions import resolve_reward
from lm_trust.lm.reward_words import raised, short


class Mishap(Exception):  # noqa: N818 - its message goes on from the reward's name
    """What became of a call in place of an answer: "raised ValueError", "ended its process (SIGSEGV)"."""


class RewardProcess:
    """A reward function by its name, called in processes of its own. From several threads at once too.

    Args:
        name: as for `resolve_reward`.
        key: the reward's place in the configuration, such as `rewards[0]`, which errors name.
        timeout: seconds that a call may take, its process's start and imports aside; None: no limit.
        memory: MiB of address space that the process may take beside what it has after its imports; None: no limit.

    Raises:
        UserError: the function cannot be found or imported, or this platform cannot limit memory.
    """

    def __init__(self, name: str, *, key: str, timeout: float | None = None, memory: int | None = None) -> None:
        self._held, self._timeout, self._memory = _Held(name, f"{key}.name", memory), timeout, memory
        self._idle: queue.LifoQueue[Child] = queue.LifoQueue()
        child, parameters = self._new_child()
        self._idle.put(child)
        # Which columns it takes is asked of the signature.
        self.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    each, getattr(inspect.Parameter, kind), default=inspect.Parameter.empty if needed else 0
                )
                for each, kind, needed in parameters
            ]
        )

    def __call__(self, **given: list) -> Any:
        """The function's answer.

        Raises:
            CallTimeout: it took too long.
            Mishap: it raised, took too much memory or ended its process.
        """
        try:
            child = self._idle.get_nowait()
        except queue.Empty:
            child, _ = self._new_child()
        try:
            child.start("call", given)
            kind, answer = child.finish(self._timeout)
        except TimeoutError:
            child.kill()
            raise CallTimeout from None
        except ChildDied as error:
            raise Mishap(f"ended its process ({_ending(error)})") from None
        if kind == "memory":
            child.kill()  # what a function leaves behind that ran out of memory is anyone's guess
            limit = "all memory" if self._memory is None else f"more than its {self._memory} MiB of memory"
            raise Mishap(f"took {limit}")
        self._idle.put(child)
        if kind == "mishap":
            raise Mishap(answer)
        return answer

    def _new_child(self) -> tuple[Child, list[tuple[str, str, bool]]]:
        child = Child(self._held, self._held.key, fresh=True)
        try:
            return child, child.call("load")
        except ChildDied as error:
            raise UserError(
                f"{self._held.key}: importing {self._held.name!r} ended its process ({_ending(error)})"
            ) from None


class _Held:
    """The child's side."""

    def __init__(self, name: str, key: str, memory: int | None) -> None:
        self.name, self.key, self.memory = name, key, memory

    def load(self) -> list[tuple[str, str, bool]]:
        """Import the function; its parameters as (name, kind, has no default)."""
        self.function = resolve_reward(self.name, key=self.key)
        if self.memory is not None:
            _limit_memory(self.memory, self.key)
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # as of many functions written in C
            parameters = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("prompts", "completions")
            ]
        return [(each.name, each.kind.name, each.default is each.empty) for each in parameters]

    def call(self, given: dict[str, list]) -> tuple[str, Any]:
        """("answer", it), ("mishap", words) or ("memory", None)."""
        (outcome,) = run_calls(self.function, [given])
        try:
            if outcome.error is not None:
                raise outcome.error
            return "answer", _plain(outcome.value)
        except MemoryError:
            return "memory", None
        except BaseException as error:
            return "mishap", str(error) if isinstance(error, Mishap) else raised(error)


def _plain(value: Any) -> Any:
    """An answer in Python's own numbers, texts and lists, which can be sent and read without its modules."""
    if hasattr(value, "tolist"):  # an array or tensor
        value = (value.detach().cpu() if hasattr(value, "detach") else value).tolist()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Real):
        return float(value)
    raise Mishap(f"returned {short(value)}, a {type(value).__name__} and neither numbers nor a list of them")


def _limit_memory(memory: int, key: str) -> None:
    import resource  # here: not every platform has it

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        raise UserError(f"{key.removesuffix('name')}memory: can be limited on Linux only; leave it out") from None
    limit, hard = pages * resource.getpagesize() + memory * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _ending(error: ChildDied) -> str:
    code = error.exit_code
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

"""Running calls of a reward function: sync or async, several at once, each within its time.

Async functions run in an event loop of our own, one for the life of the process, so that what they keep between
calls (a client, a session) stays usable. Sync functions run in this thread where nothing else is asked for; with a
time-out or several at once each call gets a daemon thread. Python cannot kill a thread: a sync call that exceeds its
time is abandoned, and goes on until it returns or the process ends.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from lm_trust.lm.reward_functions import Reward
from lm_trust.user_code import working_directory_importable


class CallTimeout(Exception):  # noqa: N818 - not an error until a reward's answer is missing for it
    """A call exceeded its time."""


@dataclass(frozen=True)
class Outcome:
    """What became of a call: what it returned, or the error in its place."""

    value: Any = None
    error: BaseException | None = None


@working_directory_importable()
def run_calls(
    function: Reward, calls: Sequence[Mapping[str, Any]], *, timeout: float | None = None, parallel: int = 1
) -> list[Outcome]:
    """Call the function with each of the keyword arguments.

    Args:
        calls: N sets of them.
        timeout: seconds that one call may take.
        parallel: how many run at once.

    Returns:
        The outcomes in the order of the calls. After a call that failed no further one begins, so that there may be
        fewer than N; then one of them holds the first failure of all.
    """
    if timeout is None and parallel == 1 and not _is_async(function):
        outcomes = []
        for given in calls:
            outcomes.append(_called(function, given))
            if outcomes[-1].error is not None:
                break
        return [_checked(outcome) for outcome in outcomes]
    finished: dict[int, Outcome] = {}
    running: dict[Future[Outcome], tuple[int, float]] = {}  # with the call's place and its last moment
    waiting = iter(enumerate(calls))
    try:
        while True:
            while len(running) < parallel and all(outcome.error is None for outcome in finished.values()):
                place, given = next(waiting, (-1, {}))
                if place < 0:
                    break
                running[_started(function, given)] = place, time.monotonic() + (timeout or math.inf)
            if not running:
                return [finished[place] for place in range(len(finished))]
            for future, outcome in _next_outcomes(running).items():
                finished[running.pop(future)[0]] = _checked(outcome)
    finally:
        for future in running:
            future.cancel()


def _next_outcomes(running: Mapping[Future[Outcome], tuple[int, float]]) -> dict[Future[Outcome], Outcome]:
    """Wait until some of the running calls have returned or exceeded their time; these are abandoned."""
    deadline = min(moment for _, moment in running.values())
    left = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
    done, others = wait(running, timeout=left, return_when=FIRST_COMPLETED)
    late = [future for future in others if running[future][1] <= time.monotonic()]
    for future in late:
        future.cancel()
    if late:
        # An async function that blocks its event loop would make all later calls wait: they get a new one.
        _event_loop.cache_clear()
    return {future: future.result() for future in done} | {future: Outcome(error=CallTimeout()) for future in late}


def _started(function: Reward, given: Mapping[str, Any]) -> Future[Outcome]:
    if _is_async(function):
        return asyncio.run_coroutine_threadsafe(_awaited(function, given), _event_loop())
    future: Future[Outcome] = Future()
    future.set_running_or_notify_cancel()
    threading.Thread(target=lambda: future.set_result(_called(function, given)), daemon=True).start()
    return future


def _called(function: Reward, given: Mapping[str, Any]) -> Outcome:
    try:
        value = function(**given)
    except BaseException as error:  # told apart in the thread that waits for it
        return Outcome(error=error)
    if inspect.isawaitable(value):  # of an async function within a plain one, as decorators make them
        return asyncio.run_coroutine_threadsafe(_awaited(lambda: value, {}), _event_loop()).result()
    return Outcome(value)


async def _awaited(function: Reward, given: Mapping[str, Any]) -> Outcome:
    try:
        return Outcome(await function(**given))
    except BaseException as error:  # SystemExit would end the loop and leave whoever waits for it waiting
        return Outcome(error=error)


def _checked(outcome: Outcome) -> Outcome:
    """The outcome; the user's wish to end the program is no failure of the reward and is raised here.

    A SystemExit is one: it would end the run without a word, and as if all had gone well.
    """
    if isinstance(outcome.error, KeyboardInterrupt):
        raise outcome.error
    return outcome


def _is_async(function: Reward) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop

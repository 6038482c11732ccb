"""Calls of a reward function: sync and async, several at once, within their time, and nothing left hanging."""

import asyncio
import functools
import threading
import time

import pytest

from lm_trust.lm.reward_calls import CallTimeout, run_calls
from lm_trust.lm.rewards import RewardError, RewardPart, WeightedRewards

PROMPTS, COMPLETIONS = [f"p{index}" for index in range(6)], ["a", "bb", "", "cccc", "bb", "a"]
LENGTHS = [1.0, 2.0, 0.0, 4.0, 2.0, 1.0]


def score(function, completions=COMPLETIONS, **settings):
    return WeightedRewards([RewardPart(function, **settings)]).score(PROMPTS[: len(completions)], completions).total


class Busy:
    """Counts how many calls run at once, and what they were given; on a busy machine it waits for the number due."""

    def __init__(self, due=1):
        self.now, self.most, self.given, self._due = 0, 0, [], due
        self._patience = time.monotonic() + 10.0
        self._lock = threading.Lock()

    def __enter__(self):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_):
        with self._lock:
            self.now -= 1

    @property
    def still_waits(self):
        return self.most < self._due and time.monotonic() < self._patience


def timed(busy, asynchronous, seconds=0.02):
    """A reward that takes a while, longer for earlier samples, so that returns come out of order."""

    def answer(completions):
        busy.given.append(completions)
        return [float(len(text)) for text in completions]

    def wait_of(completions):
        return seconds * (1 + 2 * (completions[0] == "a"))

    def sync(completions):
        with busy:
            time.sleep(wait_of(completions))
            while busy.still_waits:
                time.sleep(0.01)
            return answer(completions)

    async def awaited(completions):
        with busy:
            await asyncio.sleep(wait_of(completions))
            while busy.still_waits:
                await asyncio.sleep(0.01)
            return answer(completions)

    return awaited if asynchronous else sync


both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@both
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_one_call_for_all_samples(asynchronous, timeout):
    busy = Busy()
    assert score(timed(busy, asynchronous), timeout=timeout).tolist() == LENGTHS
    assert busy.given == [COMPLETIONS]


@both
@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("parallel", [2, 3, 50])
def test_several_calls_at_once_each_of_one_sample(asynchronous, timeout, parallel):
    busy = Busy(due=min(parallel, 6))
    assert score(timed(busy, asynchronous), timeout=timeout, parallel=parallel).tolist() == LENGTHS
    assert busy.most == min(parallel, 6)
    assert sorted(busy.given) == sorted([text] for text in COMPLETIONS)
    assert score(timed(busy, asynchronous), [], parallel=parallel).shape == (0,)


def test_a_callable_object_may_be_async():
    class Judge:
        async def __call__(self, prompts, completions):
            return [1.0] * len(completions)

    assert score(Judge()).tolist() == [1.0] * 6


@pytest.mark.parametrize("settings", [{}, {"timeout": 30.0}, {"parallel": 3}], ids=str)
def test_an_async_function_may_be_wrapped_in_a_plain_one(settings):
    wrapped = timed(Busy(), True)

    @functools.wraps(wrapped)
    def plain(*given, **named):
        return wrapped(*given, **named)

    assert score(plain, **settings).tolist() == LENGTHS


def test_an_error_within_a_wrapped_async_function_is_the_rewards():
    async def failing(completions):
        raise ValueError("no judge")

    with pytest.raises(RewardError, match="raised ValueError: no judge"):
        score(lambda completions: failing(completions))
    with pytest.raises(RewardError, match=r"did not return within 0\.1 s"):
        score(lambda completions: asyncio.sleep(20), timeout=0.1)


def test_what_an_async_function_keeps_stays_usable():
    """One event loop for all calls of all batches: a client made in one belongs to it."""
    loops = set()

    async def judge(completions):
        loops.add(asyncio.get_running_loop())
        return [0.0] * len(completions)

    score(judge)
    score(judge, parallel=3)
    assert len(loops) == 1 and loops.pop().is_running()


@both
def test_a_call_that_takes_too_long_ends_the_wait(asynchronous):
    released = threading.Event()

    def slow(completions):
        released.wait(20)
        return [0.0] * len(completions)

    async def slow_async(completions):
        await asyncio.sleep(20)

    began = time.monotonic()
    try:
        with pytest.raises(
            RewardError, match=r"\(rewards\[0\]\) did not return within 0.1 s on a batch of 6"
        ) as caught:
            score(slow_async if asynchronous else slow, timeout=0.1)
        assert "timeout" in str(caught.value) and "\n" not in str(caught.value)
        assert 0.1 <= time.monotonic() - began < 5
    finally:
        released.set()


def test_an_async_function_that_blocks_its_loop_hangs_nobody():
    released = threading.Event()

    async def blocking(completions):
        released.wait(20)

    began = time.monotonic()
    try:
        with pytest.raises(RewardError, match=r"did not return within 0\.1 s"):
            score(blocking, timeout=0.1)
        assert score(timed(Busy(), True), timeout=5.0).tolist() == LENGTHS  # others go on, in a new loop
        assert time.monotonic() - began < 5
    finally:
        released.set()


@both
def test_each_call_has_its_own_time(asynchronous):
    """Calls of 0.1 s, two at once: each takes less than 0.7 s, all together more."""
    calls = [{"completions": ["b"]}] * 16
    outcomes = run_calls(timed(Busy(), asynchronous, 0.1), calls, timeout=0.7, parallel=2)
    assert [outcome.value for outcome in outcomes] == [[1.0]] * 16


@both
def test_the_late_sample_is_named(asynchronous):
    released = threading.Event()

    def slow(completions):
        if completions == ["cccc"]:
            released.wait(20)
        return [0.0]

    async def slow_async(completions):
        await asyncio.sleep(20 if completions == ["cccc"] else 0)
        return [0.0]

    try:
        with pytest.raises(RewardError, match=r"within 0\.5 s on sample 3: prompt 'p3', completion 'cccc'"):
            score(slow_async if asynchronous else slow, timeout=0.5, parallel=2)
    finally:
        released.set()


@both
def test_after_a_late_call_no_further_one_begins(asynchronous):
    begun, released, cancelled = [], threading.Event(), threading.Event()

    def sync(completions):
        begun.append(completions[0])
        if completions[0] == "1":
            released.wait(20)
        return [0.0]

    async def awaited(completions):
        begun.append(completions[0])
        try:
            await asyncio.sleep(20 if completions[0] == "1" else 0)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [0.0]

    calls = [{"completions": [str(index)]} for index in range(50)]
    try:
        outcomes = run_calls(awaited if asynchronous else sync, calls, timeout=0.3)
    finally:
        released.set()
    assert [type(outcome.error) for outcome in outcomes] == [type(None), CallTimeout]
    assert begun == ["0", "1"]
    assert not asynchronous or cancelled.wait(5)  # Python can end the one kind, and not the other


@both
def test_an_error_of_the_functions_own_is_no_timeout(asynchronous):
    def sync(completions):
        raise TimeoutError("the server said so")

    async def awaited(completions):
        raise TimeoutError("the server said so")

    with pytest.raises(RewardError, match=r"raised TimeoutError: the server said so \(.*, in \w+\) on sample 0"):
        score(awaited if asynchronous else sync, timeout=30.0)


@both
@pytest.mark.parametrize("parallel", [1, 3, 6])
def test_the_first_offending_sample_is_named(asynchronous, parallel):
    """Samples 3 and 4 fail, and 4 at once."""

    def sync(completions):
        if "cccc" in completions:
            time.sleep(0.05)
            raise KeyError("four")
        if completions == ["dd"]:
            raise KeyError("two")
        return [0.0] * len(completions)

    async def awaited(completions):
        return sync(completions)

    with pytest.raises(
        RewardError, match=r"raised KeyError: 'four' \(.*, in sync\) on sample 3: prompt 'p3'"
    ) as caught:
        score(awaited if asynchronous else sync, ["a", "b", "c", "cccc", "dd", "e"], parallel=parallel)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_first_fault_counts_whatever_its_kind():
    def faulty(completions):
        if completions == ["bb"]:
            return [float("nan")]
        if completions == ["cccc"]:
            raise ValueError
        return [0.0]

    with pytest.raises(RewardError, match="returned nan for sample 1"):
        score(faulty, parallel=6)


@pytest.mark.parametrize("returned", [[], [1.0, 2.0]])
def test_a_call_of_one_sample_returns_one_score(returned):
    with pytest.raises(
        RewardError, match=rf"returned {len(returned)} scores for 1 completions .*sample 0: prompt 'p0'"
    ):
        score(lambda completions: returned, parallel=2)


@both
@pytest.mark.parametrize("parallel", [1, 2])
def test_an_interrupt_is_no_failure_of_the_reward_and_an_exit_is(asynchronous, parallel):
    def sync(completions):
        raise error

    async def awaited(completions):
        raise error

    error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        score(awaited if asynchronous else sync, timeout=20.0, parallel=parallel)
    error = SystemExit(3)
    with pytest.raises(RewardError, match="raised SystemExit: 3"):
        score(awaited if asynchronous else sync, timeout=20.0, parallel=parallel)
    assert score(timed(Busy(), True)).tolist() == LENGTHS


def test_a_call_that_cancels_itself_is_a_failure():
    async def cancelled(completions):
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="raised CancelledError"):
        score(cancelled)


def test_a_sync_function_with_nothing_asked_for_runs_in_this_thread():
    threads = []

    def noted(completions):
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    score(noted)
    score(noted, timeout=9.0)
    assert threads[0] is threading.current_thread()
    assert threads[1] is not threads[0] and threads[1].daemon  # so that one that hangs does not hold up the end


def test_what_an_async_function_returns_is_checked_too():
    async def wrong(completions):
        return [0.0, float("inf")] + [0.0] * 4

    with pytest.raises(RewardError, match="returned inf for sample 1"):
        score(wrong)


def test_the_example_takes_part(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    rewards = WeightedRewards([RewardPart("examples.async_reward:variety", timeout=10.0, parallel=8)])
    found = rewards.score(["It was", "A", "The"], [" good and good", "", " film"])
    assert found.total.tolist() == pytest.approx([2 / 3, 0.0, 1.0])

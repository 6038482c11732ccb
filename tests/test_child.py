"""Objects in a child of this process: their results, their exceptions, and the ways that they end."""

import os
import signal
import time

import pytest

from lm_trust.child import Child
from lm_trust.errors import UserError


class OddError(Exception):
    """Cannot be made again from what it was pickled as."""

    def __init__(self, one, other):
        super().__init__("odd")


class Target:
    def __init__(self):
        self.calls = 0

    def add(self, one, other):
        self.calls += 1
        return one + other, self.calls, os.getpid()

    def count(self):
        self.calls += 1
        if self.calls == 3:
            raise UserError("three")

    def called(self):
        return self.calls

    def refuse(self):
        raise UserError("no")

    def be_odd(self):
        raise OddError(1, 2)

    def sleep(self, seconds):
        time.sleep(seconds)

    def die(self):
        os._exit(7)


@pytest.fixture
def child():
    child = Child(Target(), "the thing")
    yield child
    child.close()


def test_calls_are_made_elsewhere_on_one_object(child):
    first, second = child.call("add", 1, 2), child.call("add", "a", "b")
    assert first[:2] == (3, 1) and second[:2] == ("ab", 2)
    assert first[2] == second[2] != os.getpid()


def test_calls_that_have_nothing_to_say_are_made_all_the_same(child):
    outcomes = []
    for _ in range(5):
        try:
            outcomes.append(child.call("count"))
        except UserError as error:
            outcomes.append(str(error))
    assert outcomes == [None, None, "three", None, None] and child.call("called") == 5
    assert child.call("count") is None and child.call("called") == 6


def test_messages_longer_than_a_pipe_holds_go_both_ways(child):
    long = "x" * 3_000_000
    assert child.call("add", long, "y")[0] == long + "y"


def test_a_call_goes_on_while_this_process_does_something_else(child):
    child.call("called")  # it is there
    started = time.perf_counter()
    child.start("sleep", 0.4)
    time.sleep(0.4)
    child.finish()
    assert time.perf_counter() - started < 0.7


def test_exceptions_come_here_and_the_child_stays(child):
    with pytest.raises(UserError, match=r"^no$"):
        child.call("refuse")
    with pytest.raises(RuntimeError, match="OddError: odd"):
        child.call("be_odd")
    assert child.call("add", 1, 2)[0] == 3


def test_signals_that_end_a_run_leave_the_child_to_its_parent(child):
    pid = child.call("add", 1, 2)[2]
    for stop in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, stop)
    assert child.call("add", 1, 2)[2] == pid


def test_a_child_that_is_gone_is_an_error_with_its_exit_code(child):
    child.start("die")
    with pytest.raises(RuntimeError, match="the thing: its process is gone, with exit code 7"):
        child.finish()
    with pytest.raises(RuntimeError, match="exit code 7"):
        child.call("add", 1, 2)


@pytest.mark.parametrize("end", ["close", "forget"])
def test_children_end_with_their_owner_later_ones_first_or_last(end):
    children = [Child(Target(), "the thing") for _ in range(2)]
    processes = [child._process for child in children]
    if end == "close":
        for child in children:
            child.close()
        del child
    del children
    for process in processes:
        process.join(5)
        assert process.exitcode == 0


def test_children_end_when_their_parent_is_killed():
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        children = [Child(Target(), "the thing") for _ in range(2)]
        os.write(write, b" ".join(str(child.call("add", 1, 2)[2]).encode() for child in children) + b"\n")
        time.sleep(60)
        os._exit(0)
    pids = [int(pid) for pid in os.read(read, 100).split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pids) == 2 and not any(_runs(pid) for pid in pids)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

"""Signals as requests: the first is noted, the second obeyed, and nothing stays behind."""

import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import pytest

from lm_trust.training.interruption import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_obeyed(number):
    received = []
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    own = signal.signal(number, lambda *_: received.append("mine"))
    try:
        with Interruption() as interruption:
            assert interruption.signal is None and interruption.exit_status == 0
            os.kill(os.getpid(), number)
            assert interruption.signal is number and interruption.exit_status == 128 + number
            assert not received
            os.kill(os.getpid(), number)
            assert received == ["mine"]
        os.kill(os.getpid(), number)
        assert received == ["mine", "mine"]
    finally:
        signal.signal(number, own)
    assert {name: signal.getsignal(name) for name in handlers} == handlers


def test_a_second_ctrl_c_is_a_keyboard_interrupt(request):
    # A process that a script starts in the background ignores SIGINT from the start, and the tests with it.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.exit_status == 130
        os.kill(os.getpid(), signal.SIGINT)


def test_an_error_inside_restores_the_handlers():
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="inside"), Interruption():
        raise ValueError("inside")
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_outside_the_main_thread_signals_are_left_to_their_owner():
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    found = []

    def run():
        with Interruption() as interruption:
            found.append([signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)])
            found.append(interruption.exit_status)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [handlers, 0]


@pytest.mark.parametrize("forker", ["main thread", "another"])
def test_forks_end_by_sigterm_and_pass_over_a_first_sigint(forker):
    def fork():
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
        for child in children:
            child.start()
        os.kill(children[1].pid, signal.SIGINT)
        children[1].join(0.5)
        alive.extend(child.is_alive() for child in children)
        for child in children:
            child.terminate()
            child.join(5)
            codes.append(child.exitcode)
            child.kill()

    alive, codes = [], []
    with Interruption() as interruption:
        if forker == "another":
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
        else:
            fork()
        assert alive == [True, True] and codes == [-signal.SIGTERM] * 2 and interruption.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal is signal.SIGTERM

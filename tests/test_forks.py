"""What forks do first, and when a SIGTERM reaches them."""

import subprocess
import sys

PROGRAM = """
import os, signal, sys, time
from lm_trust.forks import first_in_forks

signal.signal(signal.SIGTERM, lambda *_: None)
{late}
first_in_forks(lambda: (time.sleep(0.1), signal.signal(signal.SIGTERM, signal.SIG_DFL)))
before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
child = os.fork()
if child == 0:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    time.sleep(5 * (blocked == {{signal.SIGUSR1}}))
    os._exit(3)
time.sleep({wait})
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM, status
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {{signal.SIGUSR1}}
os.kill(os.getpid(), signal.SIGTERM)  # this process keeps its own handler
"""


def run(wait: float, late: str = "") -> None:
    program = PROGRAM.format(wait=wait, late=late)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


def test_a_sigterm_before_the_first_call_waits_for_it():
    run(wait=0)


def test_a_sigterm_is_obeyed_afterwards_and_the_mask_is_as_it_was():
    run(wait=1)


def test_several_are_called_in_one_fork():
    run(wait=0, late="first_in_forks(lambda: time.sleep(0.1))")

"""Rewards in processes of their own: whatever they do, it is one plain line here, and the next call is answered."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import metrics, prepare, train, write_config

from lm_trust.cli import main
from lm_trust.errors import UserError
from lm_trust.lm.rewards import RewardError, RewardPart, WeightedRewards
from lm_trust.training.config_file import load_config

REWARDS = """
import multiprocessing, os, signal, subprocess, sys, time

import numpy as np

def pid(completions):
    return [float(os.getpid())] * len(completions)

def length(prompts, completions, topic, weight=1.0):
    print("a word on the terminal")
    return np.array([len(text) for text in completions])

async def judge(completions):
    return tuple(np.float32(len(text)) for text in completions)

def odd(completions):
    text = completions[0]
    if "raise" in completions:
        raise OddError("no\\nluck")
    if "exit" in completions:
        sys.exit(4)
    if "crash" in completions:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in completions:
        while True:
            pass
    if "sleep" in completions:
        time.sleep(60)
    if "hog" in completions:
        return [float(len(bytearray(4 * 2**30)))]
    if "hoard" in completions:
        hoard = []
        while True:
            hoard.append(bytearray(2**20))
    if "object" in completions:
        return [OddNumber()] * len(completions)
    if "many" in completions:
        return (float(number) for number in range(10))
    if "deep" in completions:
        deep = []
        for _ in range(100_000):
            deep = [deep]
        return deep
    if "nan" in completions:
        return [float("nan")] * len(completions)
    return [1.0] * len(completions)

def pool(completions):
    with multiprocessing.Pool(2) as workers:
        return workers.map(len, completions)

def program(completions):
    slept = subprocess.Popen(["sleep", "60"])
    slept.terminate()
    return [float(slept.wait())] * len(completions)

def fork(completions):
    slept = multiprocessing.Process(target=time.sleep, args=(60,))
    slept.start()
    open("fork.pid", "w").write(str(slept.pid))
    if "crash" in completions:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "end" in completions:
        slept.terminate()
    slept.join()
    return [float(slept.exitcode)] * len(completions)

def default_start(completions):
    return [float(multiprocessing.get_start_method() == completions[0])]

class OddError(Exception):
    pass

class OddNumber:
    pass
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_process_rewards.py").write_text(REWARDS)
    (tmp_path / "ends_when_imported.py").write_text("import os; os._exit(5)\n")
    return tmp_path


def rewards(name, **settings):
    return WeightedRewards([RewardPart(f"own_process_rewards:{name}", process=True, **settings)])


def ask(rewards, completions, **fields):
    return rewards.score([f"p{index}" for index in range(len(completions))], completions, fields).total.tolist()


def test_it_is_called_elsewhere_and_always_there():
    own = rewards("pid")
    (pid,) = set(ask(own, ["a", "b"]))
    assert pid != os.getpid() and set(ask(own, ["c"])) == {pid}
    assert "own_process_rewards" not in sys.modules


@pytest.mark.parametrize("name", ["length", "judge"])
def test_what_it_returns_is_what_it_would_have_returned_here(name):
    fields = {"topic": ["x", "y"]} if name == "length" else {}
    assert ask(rewards(name), ["a", "bcd"], **fields) == [1.0, 3.0]


def test_the_columns_that_it_takes_are_known_here():
    with pytest.raises(UserError, match="takes 'topic', which is neither"):
        rewards("length").check_columns(["answer"])
    rewards("length").check_columns(["topic"])


def test_several_calls_at_once_have_a_process_each():
    own = rewards("pid", parallel=3)
    assert 1 <= len(set(ask(own, ["a"] * 6))) <= 3


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "raise",
            r"raised OddError: no luck \(\S*own_process_rewards\.py:\d+, in odd\) on sample 1: prompt 'p1'",
        ),
        ("exit", r"raised SystemExit: 4 \(\S*own_process_rewards\.py:\d+, in odd\) on sample 1"),
        ("crash", r"ended its process \(SIGSEGV\) on sample 1"),
        ("hog", "took more than its 50 MiB of memory on sample 1"),
        ("hoard", "took more than its 50 MiB of memory on sample 1"),
        ("object", "returned <own_process_rewards.OddNumber object .* neither numbers nor a list"),
        ("many", "returned <generator object .* neither numbers nor a list"),
        ("deep", "raised RecursionError"),
        ("nan", "returned nan for sample 0"),
    ],
)
def test_a_mishap_is_named_and_the_next_call_is_answered(what, told):
    own = rewards("odd", memory=50)
    with pytest.raises(RewardError, match=rf"^reward 'own_process_rewards:odd' \(rewards\[0\]\) {told}") as caught:
        ask(own, ["a", what])
    assert "\n" not in str(caught.value)
    assert ask(own, ["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize("what", ["hang", "sleep"])
@pytest.mark.parametrize("parallel", [1, 2])
def test_a_call_that_takes_too_long_is_ended(what, parallel):
    own, began = rewards("odd", timeout=0.5, parallel=parallel), time.monotonic()
    where = "a batch of 3 samples" if parallel == 1 else "sample 1: prompt 'p1'"
    with pytest.raises(RewardError, match=f"did not return within 0.5 s on {where}"):
        ask(own, ["a", what, "b"])
    assert ask(own, ["a", "b"]) == [1.0, 1.0]
    assert time.monotonic() - began < 20
    assert not _children_that_run_on()


def _children_that_run_on():
    """Fresh interpreters of this process that use the processor."""
    import multiprocessing

    def ticks(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return int(file.read().rpartition(")")[2].split()[11])
        except OSError:
            return 0

    before = {child.pid: ticks(child.pid) for child in multiprocessing.active_children()}
    time.sleep(0.3)
    return [pid for pid, used in before.items() if ticks(pid) > used + 10]


@pytest.mark.parametrize(("name", "answer"), [("pool", 3.0), ("program", -15.0), ("fork", -15.0)])
def test_it_may_start_processes_and_end_them(name, answer):
    assert ask(rewards(name, timeout=30), ["end"]) == [answer]


def test_its_processes_start_as_they_would_here():
    assert ask(rewards("default_start"), [multiprocessing.get_start_method()]) == [1.0]


@pytest.mark.parametrize(("what", "told"), [("hang", "did not return within 1 s"), ("crash", "ended its process")])
def test_what_it_has_started_ends_with_it(place, what, told):
    own = rewards("fork", timeout=1)
    with pytest.raises(RewardError, match=told):
        ask(own, [what])
    assert _is_gone(int((place / "fork.pid").read_text()))


def _is_gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("own_process_rewards:lenght", r"rewards\[0\]\.name: .*has no function 'lenght' \(did you mean 'length'"),
        ("no_such_module:f", r"rewards\[0\]\.name: importing 'no_such_module'"),
        ("ends_when_imported:f", r"rewards\[0\]\.name: importing .* ended its process \(exit code 5\)"),
        (len, r"rewards\[0\]\.process: .* give package.module:function"),
    ],
)
def test_what_cannot_be_imported_there_is_told_at_once(name, told):
    with pytest.raises(UserError, match=told):
        WeightedRewards([RewardPart(name, process=True)])


HANGING = """
import signal
from lm_trust.lm.reward_process import RewardProcess
if __name__ == "__main__":
    # A shell's background command begins with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fork = RewardProcess("own_process_rewards:fork", key="rewards[0]")
    print(fork._idle.queue[0]._process.pid, flush=True)
    fork(completions=["hang"])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_one_that_hangs_ends_with_the_program_and_so_does_what_it_has_started(place, how):
    (place / "hanging.py").write_text(HANGING)
    program = subprocess.Popen(
        [sys.executable, "hanging.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=place
    )
    pid = int(program.stdout.readline())
    while not (started := place / "fork.pid").exists() or not started.read_text():
        time.sleep(0.05)
    program.send_signal(how)
    program.wait(20)
    program.stdout.close()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")
    assert _is_gone(int(started.read_text()))


def test_memory_without_a_process_is_refused(place):
    path = write_config()
    assert load_config(path, [("rewards.0.process", "true")], check_files=False).rewards[0].memory is None
    with pytest.raises(UserError, match=r"rewards\.0\.memory: limits a process of its own, which needs process true"):
        load_config(path, [("rewards.0.memory", "100")], check_files=False)


FLAKY = """
import os, signal

def vowels(prompts, completions):
    with open("calls", "a") as file:
        file.write("call\\n")
    if len(open("calls").readlines()) == 4 and os.path.exists("armed"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]
"""


def test_a_run_whose_reward_dies_stops_after_a_checkpoint_and_goes_on_as_if_it_never_had(place, capsys):
    prepare(place)
    (place / "flaky_rewards.py").write_text(FLAKY)
    sections = {"rewards": [{"name": "flaky_rewards:vowels", "process": True}], "checkpoint": {"every": 0}}
    assert train("whole", **sections) == 0
    (place / "armed").touch()
    (place / "calls").unlink()
    capsys.readouterr()
    assert train("run", **sections) == 2  # in its third iteration: one call is the evaluation before training
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: reward 'flaky_rewards:vowels' (rewards[0]) ended its process (SIGKILL)")
    assert line.endswith("(iteration 3; a checkpoint was written)")
    assert [path.name for path in (place / "run" / "checkpoints").iterdir()] == ["00000002"]
    assert main(["train", "--resume", "run", "--rewards.0.weight", "2.0"]) == 2
    assert "it cannot change in a resumed run" in capsys.readouterr().err
    # How the reward is called may change: a run that it has stopped needs that.
    assert main(["train", "--resume", "run", "--rewards.0.timeout", "60"]) == 0
    assert [line["reward_mean"] for line in metrics("run")] == [line["reward_mean"] for line in metrics("whole")]

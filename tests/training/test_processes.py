"""Runs that are spread over processes: one run folder, one policy, and the numbers of all rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from spread import Workers
from tiny_policies import MASK, B, T
from tiny_runs import metrics, prepare, untimed, write_config
from torch import nn

from lm_trust.cli import main
from lm_trust.control.normaliser import ObservationNormaliser, RewardNormaliser
from lm_trust.core.advantages import masked_whiten
from lm_trust.core.batch import Rollout
from lm_trust.core.processes import (
    all_rows,
    gathered,
    in_the_first,
    own_stream,
    process_index,
    require_alike,
    share_of,
    together,
)
from lm_trust.errors import UserError
from lm_trust.training.config_yaml import write_yaml
from lm_trust.training.critic import ValueCritic
from lm_trust.training.sequence_critic import SequenceCritic

CARTPOLE = {
    "total_steps": 240,
    "environment": {"id": "CartPole-v1", "count": 5},
    "policy": {"hidden": [8]},
    "rollout": {"steps": 16},
    "normalise": {"observations": True, "rewards": True},
    "critic": {"kind": "mlp", "hidden": [8], "epochs": 2, "minibatches": 5, "own_process": False},
    "update": {"kind": "ppo_clip", "epochs": 2, "minibatches": 5},
    "evaluation": {"every": 0, "count": 2},
    "checkpoint": {"every": 0},
    "trackers": [],
}
FAILING = """
import os, signal
from lm_trust.core.processes import process_index
calls = 0

def second(prompts, completions):
    global calls
    calls += 1
    if process_index() == 1 and calls == 4:
        raise ValueError("no more of this")
    return [float(len(text)) for text in completions]

def stopping(prompts, completions):
    global calls
    calls += 1
    if process_index() == 1 and calls == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def workers():
    with Workers(4) as workers:
        yield workers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    (tmp_path / "spread_rewards.py").write_text(FAILING)
    return tmp_path


def command(folder, *arguments):
    """The command line in this process; its status and what it wrote."""
    import contextlib
    import io

    os.chdir(folder)
    sys.modules.pop("spread_rewards", None)
    said, complained = io.StringIO(), io.StringIO()
    os.environ["RANK"] = str(process_index())
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = main(list(arguments))
    return status, said.getvalue(), complained.getvalue()


def statuses(replies):
    return [status for status, _, _ in replies]


def write_control(name, **sections):
    with open(f"{name}.yaml", "w", encoding="utf-8") as file:
        file.write(write_yaml(CARTPOLE | sections | {"output": name}))
    return f"{name}.yaml"


def test_only_the_first_process_writes_and_speaks(workers, folder):
    config = write_config(iterations=2, completions={"every": 1, "show": 1}, evaluation={"every": 1, "count": 3})
    replies = workers.run(command, 2, folder, "train", config)
    assert statuses(replies) == [0, 0]
    assert "Run folder" in replies[0][1] and replies[1][1:] == ("", "")
    lines = metrics("run")
    assert [line["iteration"] for line in lines] == [1, 2] and all(line["accepted"] for line in lines)
    assert json.loads((folder / "run/evaluation.json").read_text())["after"]["count"] == 3
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / "run/completions/iteration-00000002.parquet")
    assert len(table) == 6 and lines[1]["reward_mean"] == pytest.approx(np.mean(table["reward"].to_pylist()))
    assert lines[1]["steps"] - lines[0]["steps"] == sum(table["tokens"].to_pylist())


@pytest.mark.parametrize("world", ["language", "control"])
def test_a_run_goes_on_exactly_and_in_any_number_of_processes(workers, folder, world):
    if world == "language":
        evaluation = {"every": 0, "count": 4}
        whole = write_config("whole", evaluation=evaluation)
        parted = write_config("parted", evaluation=evaluation, iterations=2)
        more = ["--iterations", "4"]
    else:
        whole, parted = write_control("whole"), write_control("parted", total_steps=160)
        more = ["--total_steps", "240"]
    assert statuses(workers.run(command, 2, folder, "train", whole)) == [0, 0]
    assert statuses(workers.run(command, 2, folder, "train", parted)) == [0, 0]
    for count, name in ((2, "same"), (1, "one"), (4, "four")):
        shutil.copytree("parted", name)
        replies = workers.run(command, count, folder, "train", "--resume", name, *more)
        assert statuses(replies) == [0] * count, replies
        lines = metrics(name)
        assert [line["iteration"] for line in lines] == [line["iteration"] for line in metrics("whole")]
    assert untimed(metrics("same")) == untimed(metrics("whole"))


def test_a_language_model_takes_minibatches_that_leave_processes_without_rows(workers, folder):
    update = {"kind": "ppo_clip", "epochs": 2, "minibatches": 3}
    config = write_config(iterations=1, evaluation={"every": 0, "count": 4}, update=update)
    assert statuses(workers.run(command, 4, folder, "train", config)) == [0] * 4
    (line,) = metrics("run")
    assert line["accepted"] and line["gradient_steps"] == 6


def test_a_reward_that_fails_in_one_process_stops_all_with_a_checkpoint(workers, folder):
    config = write_config(rewards=[{"name": "spread_rewards:second"}])
    replies = workers.run(command, 2, folder, "train", config)
    assert statuses(replies) == [2, 2]
    assert "process 1" in replies[0][2] and "no more of this" in replies[0][2] and replies[1][2] == ""
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["00000002"]
    replies = workers.run(command, 1, folder, "train", "--resume", "run")
    assert statuses(replies) == [0] and len(metrics("run")) == 4


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(workers, folder):
    config = write_config(rewards=[{"name": "spread_rewards:stopping"}])
    replies = workers.run(command, 2, folder, "train", config)
    assert statuses(replies) == [128 + signal.SIGTERM] * 2
    assert "SIGTERM: stopped after iteration 2" in replies[0][1] and len(metrics("run")) == 2


def test_more_processes_than_rows_are_refused(workers, folder):
    config = write_config(rollout={"batch_size": 6, "samples_per_prompt": 2, "max_new_tokens": 4})
    (status, _, error), *_ = workers.run(command, 4, folder, "train", config)
    assert status == 2 and "rollout.batch_size: 3 prompts of 2 samples cannot be shared out among 4 processes" in error
    (status, _, error), *_ = workers.run(
        command,
        4,
        folder,
        "train",
        write_control("few", environment={"id": "CartPole-v1", "count": 3}, rollout={"steps": 20}),
    )
    assert status == 2 and "environment.count: 3" in error


def test_a_process_that_dies_ends_the_run_and_it_can_be_resumed(folder):
    """By the launcher itself."""
    write_control("run", total_steps=1_000_000, checkpoint={"every": 2, "keep_last": 2})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = subprocess.Popen(
        [sys.executable, "-m", "lm_trust", "launch", "--processes", "2", "train", "run.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((folder / "run/checkpoints").glob("[0-9]*")):
            assert time.monotonic() < deadline and launched.poll() is None, launched.stdout.read()
            time.sleep(0.2)
        os.kill(worker_of(launched.pid, "1"), signal.SIGKILL)
        launched.wait(60)
    finally:
        launched.kill()
    assert launched.returncode not in (0, None)
    done = len(metrics("run"))
    steps = str(80 * (done + 2))
    assert main(["train", "--resume", "run", "--total_steps", steps]) == 0
    assert [line["iteration"] for line in metrics("run")] == list(range(1, done + 3))


def worker_of(launcher, rank):
    """The process below the launcher with that rank."""
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/environ") as environ:
                parent, variables = stat.read().rsplit(")", 1)[1].split()[1], environ.read().split("\0")
        except OSError:
            continue
        if parent == str(launcher) and f"RANK={rank}" in variables:
            return int(name)
    raise AssertionError("no such process")


# --- The pieces, against one process with all rows.

GENERATOR = torch.Generator().manual_seed(0)
VALUES = torch.randn(B, T, generator=GENERATOR, dtype=torch.float64)
INPUTS = torch.randn(B, T, 3, generator=GENERATOR, dtype=torch.float64)


def whitened():
    own = share_of(B).slice
    return masked_whiten(VALUES[own], MASK[own])


def test_whitening_is_over_all_rows(workers):
    for count in (2, 4):
        spread = torch.cat(workers.run(whitened, count))
        torch.testing.assert_close(spread, whitened(), rtol=0, atol=1e-12)


def normalised():
    own = share_of(B).slice
    observations, rewards = ObservationNormaliser(3), RewardNormaliser(len(VALUES[own]), 0.9)
    scaled = None
    for _ in range(2):
        observations.update(all_rows(INPUTS[own][MASK[own]]))
        scaled = rewards(VALUES[own], VALUES[own] > 1, MASK[own])
    return observations.mean, observations.var, scaled


def test_the_normalisers_count_all_rows(workers):
    mean, variance, scaled = normalised()
    replies = workers.run(normalised, 4)
    for reply in replies:
        torch.testing.assert_close(reply[:2], (mean, variance))
    torch.testing.assert_close(torch.cat([reply[2] for reply in replies]), scaled)


class Sequences(nn.Module):
    """A value of each state and of the one after the last."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1).double()

    def forward(self, observations):
        values = self.line(observations).squeeze(-1)
        return torch.cat([values, values[:, -1:]], -1)

    def active(self):
        from contextlib import nullcontext

        return nullcontext()


class Squeezed(nn.Sequential):
    def forward(self, inputs):
        return super().forward(inputs).squeeze(-1)


def fitted(kind):
    own = share_of(B).slice
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Sequences() if kind == "sequences" else Squeezed(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    make = SequenceCritic if kind == "sequences" else ValueCritic
    critic = make(network, learning_rate=0.01, epochs=3, minibatches=3, clip=0.2)
    ends = torch.zeros(len(MASK[own]), T, dtype=torch.bool)
    rollout = Rollout(INPUTS[own], ends, VALUES[own], ends, ends, MASK[own], INPUTS[own], INPUTS[own])
    numbers = critic.fit(rollout, VALUES[own], 0.5 * VALUES[own])
    return numbers, [parameter.detach() for parameter in critic.parameters()]


@pytest.mark.parametrize("kind", ["steps", "sequences"])
def test_critics_are_fitted_to_all_rows(workers, kind):
    numbers, parameters = fitted(kind)
    for count in (2, 4):
        for theirs, spread in workers.run(fitted, count, kind):
            assert theirs == pytest.approx(numbers, rel=1e-9)
            torch.testing.assert_close(spread, parameters, rtol=0, atol=1e-9)


def failing_in_the_third():
    try:
        return together(lambda: 1 / (process_index() - 2))
    except (UserError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"


def test_what_fails_in_one_fails_in_all(workers):
    words = workers.run(failing_in_the_third, 4)
    assert words[2] == "ZeroDivisionError: division by zero"
    assert set(words[:2] + words[3:]) == {"UserError: process 2: ZeroDivisionError: division by zero"}


def unlike(differs):
    try:
        require_alike([torch.zeros(3), torch.full((2,), float(differs and process_index() == 1))], "policies")
    except RuntimeError as error:
        return str(error)
    return "alike"


def test_different_bits_are_an_error(workers):
    assert workers.run(unlike, 4, False) == ["alike"] * 4
    assert all("hold different policies" in words for words in workers.run(unlike, 4, True))


def drawn():
    generator = torch.Generator().manual_seed(5)
    own = own_stream(generator)
    return torch.rand(3, generator=own).tolist(), generator.get_state().tolist()


def test_each_process_draws_its_own_and_all_stay_in_step(workers):
    replies = workers.run(drawn, 4)
    assert len({tuple(numbers) for numbers, _ in replies}) == 4
    assert all(state == replies[0][1] for _, state in replies)
    assert workers.run(drawn, 4) == replies


def shared():
    return share_of(10), gathered(process_index()), in_the_first(lambda: process_index() + 7)


def test_shares_cover_everything_once(workers):
    replies = workers.run(shared, 4)
    assert [share.count for share, _, _ in replies] == [2, 3, 2, 3]
    assert [share.first for share, _, _ in replies] == [0, 2, 5, 7]
    assert all(indices == [0, 1, 2, 3] and value == 7 for _, indices, value in replies)

"""Trackers: what they are told, that they go on where a run does, and that none of them can end it."""

import json
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm_trust.errors import UserError
from lm_trust.training.trackers import Trackers, check_installed, evaluation_values, iteration_values

HYPERPARAMETERS = {"update.kind": "trpo", "update.max_kl": 0.01, "policy.hidden": [64, 64], "critic.clip": None}

# Stands in for wandb and trackio alike: both have `init(project=..., ...)` and a run with `log` and `finish`.
SERVICE = """
calls, broken = [], None

class Run:
    def log(self, values, step=None):
        if broken == "log":
            raise ConnectionError("the network is down\\nand more")
        calls.append(("log", values, step))

    def finish(self):
        if broken == "finish":
            raise ConnectionError("gone")
        calls.append(("finish",))

def init(**settings):
    if broken == "init":
        raise ConnectionError("not logged in")
    calls.append(("init", settings))
    return Run()
"""


@pytest.fixture
def services(tmp_path, monkeypatch):
    """Modules named wandb and trackio, to be looked into and broken."""
    (tmp_path / "modules").mkdir()
    for name in ("wandb", "trackio"):
        (tmp_path / "modules" / f"{name}.py").write_text(SERVICE)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield [__import__(name) for name in ("wandb", "trackio")]
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "hopper"
    folder.mkdir()
    return folder


def scalars(run):
    """What TensorBoard shows: {tag: [(step, value)]}."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_numbers_are_grouped_and_the_rest_left_out():
    metrics = {
        **{"iteration": 3, "steps": 300, "reward_mean": 1.5, "reward/vader": 0.5, "entropy": 2, "reference_kl": 0.1},
        **{"step_kl": 0.01, "accepted": True, "reason": "accepted", "clip_fraction": None, "cg_residual": float("nan")},
        **{"reference_kl_after": 0.2},
        **{"value_loss": 4.0, "rollout_seconds": 0.5, "steps_per_second": 9.0, "episode_length": float("inf")},
    }
    assert iteration_values(metrics) == {
        **{"time/iteration": 3, "time/steps": 300, "time/rollout_seconds": 0.5, "time/steps_per_second": 9},
        **{"rollout/reward_mean": 1.5, "rollout/reward/vader": 0.5, "rollout/entropy": 2, "rollout/reference_kl": 0.1},
        **{"update/step_kl": 0.01, "update/accepted": 1, "update/reference_kl_after": 0.2, "critic/value_loss": 4},
    }
    record = {"iteration": 3, "steps": 300, "reward_mean": 5.0, "reward_interval": [4.0, 6.0], "samples": [{}]}
    assert evaluation_values(record) == {
        **{"evaluation/reward_mean": 5, "evaluation/reward_low": 4, "evaluation/reward_high": 6},
    }
    assert evaluation_values({"reward_mean": 5.0, "reward_interval": None}) == {"evaluation/reward_mean": 5}


def test_tensorboard_has_values_and_hyperparameters_in_one_run(run):
    trackers = Trackers(["tensorboard"], run, HYPERPARAMETERS)
    trackers.log({"update/step_kl": 0.25}, 100)
    trackers.log({"update/step_kl": 0.5}, 200)
    trackers.close()
    assert scalars(run) == {"update/step_kl": [(100, 0.25), (200, 0.5)]}
    assert all(path.is_file() for path in (run / "tensorboard").iterdir()), "a folder would be another run"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"update.kind" in start and b"trpo" in start and b"[64, 64]" in start and b"null" in start
    assert not torch.distributed.is_initialized()


def test_a_resumed_run_purges_what_it_does_again(run):
    trackers = Trackers(["tensorboard"], run, HYPERPARAMETERS)
    for step in (1, 2, 3, 4):
        trackers.log({"a/b": step}, step)
    trackers.close()
    time.sleep(1)  # TensorBoard reads files by their names' seconds, and then by a number that it sorts as a text
    trackers = Trackers(["tensorboard"], run, HYPERPARAMETERS, resume_at=3)
    for step in (3, 4, 5):
        trackers.log({"a/b": 10 * step}, step)
    trackers.close()
    assert scalars(run) == {"a/b": [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]}


def test_a_service_gets_the_run_and_finds_it_again(run, services):
    names = ["wandb", "trackio"]
    first = Trackers(names, run, HYPERPARAMETERS)
    first.log({"a/b": 1.0}, 7)
    first.close()
    again = Trackers(names, run, HYPERPARAMETERS, resume_at=8)
    again.close()
    other = Trackers(names, run, HYPERPARAMETERS)
    other.close()
    for module in services:
        starts = [settings for name, *(settings, *_) in (call for call in module.calls if len(call) > 1)]
        init, values, resumed, fresh = starts
        assert values == {"a/b": 1.0}
        assert (init["project"], init["resume"], init["config"]) == ("lm-trust", "allow", HYPERPARAMETERS)
        assert resumed == init != fresh
        assert [call[0] for call in module.calls] == ["init", "log", "finish", "init", "finish", "init", "finish"]
    wandb, trackio = services
    assert wandb.calls[0][1]["name"] == "hopper" and wandb.calls[0][1]["dir"] == str(run)
    assert trackio.calls[0][1]["name"] == f"hopper-{wandb.calls[0][1]['id']}"
    assert json.loads((run / "trackers.json").read_text())["id"] == wandb.calls[-2][1]["id"]


def test_the_environment_names_the_project(run, services, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    Trackers(["wandb"], run, {}).close()
    assert services[0].calls[0][1]["project"] == "mine"


def test_a_tracker_that_fails_is_warned_of_once_and_left(run, services, caplog):
    wandb, trackio = services
    trackers = Trackers(["wandb", "trackio", "tensorboard", "wandb"], run, {})
    wandb.broken = "log"
    trackers.log({"a/b": 1.0}, 1)
    wandb.broken = None
    trackers.log({"a/b": 2.0}, 2)
    trackio.broken = "finish"
    trackers.close()
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("the tracker wandb failed (the network is down); the run goes on")
    assert second == "the tracker trackio could not be closed (gone)"
    assert [call[0] for call in wandb.calls] == ["init"]
    assert [call[2] for call in trackio.calls[1:]] == [1, 2]
    assert scalars(run) == {"a/b": [(1, 1), (2, 2)]}


def test_a_tracker_that_cannot_start_is_the_users_error(run, services):
    wandb, trackio = services
    trackio.broken = "init"
    with pytest.raises(UserError, match=r"^trackers: trackio could not be started \(not logged in\)$"):
        Trackers(["wandb", "trackio"], run, {})
    assert wandb.calls[-1] == ("finish",), "what had started is closed"


def test_a_missing_package_is_told_with_its_installation(tmp_path, monkeypatch, services):
    check_installed(["tensorboard", "wandb", "trackio"])
    (tmp_path / "modules" / "wandb.py").unlink()
    sys.modules.pop("wandb")
    # Not a package: what wandb leaves in the working directory of a run.
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match=r"^trackers: wandb is not installed; pip install wandb, or leave it out"):
        check_installed(["tensorboard", "wandb"])


def test_no_trackers_write_nothing(run):
    trackers = Trackers([], run, HYPERPARAMETERS)
    trackers.log({"a/b": 1.0}, 1)
    trackers.close()
    assert list(run.iterdir()) == []

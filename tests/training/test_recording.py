"""What a whole run leaves beside its metrics: tracker events, finished episodes, the best policy; and on from there."""

import json
import shutil

import pandas as pd
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import write_model
from tiny_runs import write_prompts

from lm_trust.cli import main
from lm_trust.control.rollout import ControlTask
from lm_trust.training.build import build_world
from lm_trust.training.checkpoint import load_checkpoint
from lm_trust.training.config_file import load_config
from lm_trust.training.config_yaml import write_yaml
from lm_trust.training.recording import Recorder
from lm_trust.training.run_folder import RunFolder

SHORT = {"evaluation": {"every": 1, "count": 2}, "checkpoint": {"every": 1, "keep_last": 9}}
CONTROL = {
    "total_steps": 4 * 2 * 64,
    "environment": {"id": "CartPole-v1", "count": 2},
    "policy": {"hidden": [8]},
    "rollout": {"steps": 64},
    "normalise": {"observations": True},
    "critic": {"kind": "mlp", "hidden": [8], "epochs": 1, "minibatches": 2},
    **SHORT,
}
LANGUAGE = {
    "iterations": 3,
    "model": {"path": "gpt2", "lora": {"r": 2, "alpha": 8}},
    "prompts": {"path": "prompts.jsonl", "heldout_fraction": 0.3},
    "rollout": {"batch_size": 4, "max_new_tokens": 4, "microbatch_size": 8},
    "rewards": [{"name": "tiny_lengths:length"}],
    "critic": {"kind": "reference_head", "hidden": [8], "epochs": 1, "minibatches": 2},
    "update": {"kind": "trpo", "max_kl": 0.1, "cg_iterations": 3},
    **SHORT,
}
REWARD = "def length(prompts, completions):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished control run, to be copied."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "run.yaml").write_text(write_yaml(CONTROL))
    assert main(["train", str(folder / "run.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(run, tag):
    """What TensorBoard shows of a tag: [(step, value)]."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def evaluations(run):
    """Steps and mean rewards of every evaluation but that before training."""
    end = lines(run / "metrics.jsonl")[-1]["steps"]
    return [
        *((line["steps"], line["reward_mean"]) for line in lines(run / "evaluations.jsonl") if line["steps"] < end),
        (end, json.loads((run / "evaluation.json").read_text())["after"]["reward_mean"]),
    ]


def check(run):
    """Every record tells the same story."""
    metrics = lines(run / "metrics.jsonl")
    assert shown(run, "update/step_kl") == [(line["steps"], pytest.approx(line["step_kl"])) for line in metrics]
    assert shown(run, "evaluation/reward_mean") == [(step, pytest.approx(reward)) for step, reward in evaluations(run)]
    episodes = pd.read_csv(run / "monitor.csv", skiprows=1)
    assert len(episodes) == metrics[-1]["episodes"] > 4
    assert episodes.r.tolist() == episodes.l.tolist(), "CartPole pays one a step"
    assert episodes.r.tail(100).mean() == pytest.approx(metrics[-1]["reward_mean"])
    assert (episodes.steps.diff().dropna() >= 0).all() and episodes.steps.max() <= metrics[-1]["steps"]
    best = json.loads((run / "best" / "evaluation.json").read_text())
    step, reward = max(evaluations(run), key=lambda pair: pair[1])
    assert (best["steps"], best["reward_mean"]) == (step, reward)
    return best


def test_the_records_of_a_control_run_agree(run, capsys):
    best = check(run)
    # The best policy sees what it saw then: its normaliser had learnt from so many steps.
    assert load_file(run / "best" / "policy.safetensors")["normaliser.count"] == best["steps"]
    assert load_file(run / "policy.safetensors")["normaliser.count"] == 512
    capsys.readouterr()
    assert main(["evaluate", str(run), "--best"]) == 0
    assert f"{best['reward_mean']:.3g}" in capsys.readouterr().out


def test_an_episode_ends_at_its_step(run):
    episodes = pd.read_csv(run / "monitor.csv", skiprows=1)
    # Two environments of 64 steps an iteration: what an environment played adds up to its share of the steps.
    assert (episodes.steps % 2 == 0).all()
    assert episodes.l.iloc[0] * 2 == episodes.steps.iloc[0]
    assert episodes.l.sum() <= 512


def test_a_run_that_goes_on_from_an_older_checkpoint_tells_the_same_story(run, finished):
    for iteration in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"{iteration:08d}")
    assert main(["train", "--resume", str(run)]) == 0
    check(run)
    again, once = (pd.read_csv(folder / "monitor.csv", skiprows=1).drop(columns="t") for folder in (run, finished))
    assert again.equals(once)


def test_a_finished_run_can_be_resumed_and_made_longer(run):
    assert main(["train", "--resume", str(run)]) == 0
    check(run)
    assert main(["train", "--resume", str(run), "--total_steps", "640"]) == 0
    assert shown(run, "time/steps") == [(step, step) for step in range(128, 641, 128)]
    # The evaluation that was the last one stays where it was made.
    assert [step for step, _ in shown(run, "evaluation/reward_mean")] == list(range(128, 641, 128))
    assert [step for step, _ in evaluations(run)] == list(range(128, 641, 128))
    check(run)


def test_the_end_of_iterations_that_are_done_again_is_not_that_of_the_checkpoint(run):
    shutil.rmtree(run / "checkpoints" / "00000004")
    (run / "evaluations.jsonl").unlink()
    assert main(["train", "--resume", str(run), "--total_steps", "640"]) == 0
    assert [line["iteration"] for line in lines(run / "evaluations.jsonl")] == [4]


def test_a_run_that_is_stopped_while_it_is_made_longer_notes_its_old_end_once(run):
    end = run / "evaluation.json"
    noted = end.read_text()
    for _ in range(2):
        end.write_text(noted)  # as where a kill came before it was forgotten
        world = build_world(load_config(run / "config.yaml", [("total_steps", "640")]))
        world.trainer.load_state_dict(load_checkpoint(run / "checkpoints"))
        with Recorder(load_config(run / "config.yaml"), world, RunFolder(run), resumed=True):
            pass
        world.trainer.task.close()
    assert [line["iteration"] for line in lines(run / "evaluations.jsonl")] == [1, 2, 3, 4]


def test_trackers_can_be_left_out_and_taken_up_again(run, tmp_path):
    (tmp_path / "none.yaml").write_text(write_yaml(CONTROL | {"total_steps": 128, "trackers": []}))
    assert main(["train", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none" / "tensorboard").exists()
    assert main(["train", "--resume", str(run), "--total_steps", "640", "--trackers", "[]"]) == 0
    assert shown(run, "time/iteration")[-1] == (512, 4)


def test_a_missing_tracker_is_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(write_yaml(CONTROL | {"trackers": ["wandb"]}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "run.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: trackers: wandb is not installed; pip install wandb")
    assert not (tmp_path / "runs").exists()


def test_a_language_run_is_logged_by_iteration_and_keeps_its_best_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_model(tmp_path / "gpt2", "gpt2")
    (tmp_path / "tiny_lengths.py").write_text(REWARD)
    write_prompts(tmp_path)
    (tmp_path / "run.yaml").write_text(write_yaml(LANGUAGE | {"output": "run"}))
    assert main(["train", "run.yaml"]) == 0
    run = tmp_path / "run"
    noted = json.loads((run / "evaluation.json").read_text())
    periodic = [(line["iteration"], line["reward_mean"]) for line in lines(run / "evaluations.jsonl")]
    rewards = [*periodic, (3, noted["after"]["reward_mean"])]
    everything = [(0, noted["before"]["reward_mean"]), *rewards]
    assert shown(run, "evaluation/reward_mean") == [(step, pytest.approx(reward)) for step, reward in everything]
    assert [step for step, _ in shown(run, "rollout/reference_kl")] == [1, 2, 3]
    assert not (run / "monitor.csv").exists()

    best = json.loads((run / "best" / "evaluation.json").read_text())
    assert (best["iteration"], best["reward_mean"]) == max(rewards, key=lambda pair: pair[1])
    assert len(best["samples"]) == 2
    shutil.rmtree(run / "adapter")
    capsys.readouterr()
    assert main(["generate", str(run), "the film", "--best"]) == 0
    assert capsys.readouterr().out.startswith("the film")
    assert main(["evaluate", str(run), "--best"]) == 0
    shutil.rmtree(run / "best")
    assert main(["generate", str(run), "the film", "--best"]) == 2
    assert "no best policy" in capsys.readouterr().err


def test_a_task_tells_the_episodes_of_its_last_rollout_only(run, monkeypatch):
    told, play = [], ControlTask.collect

    def collect(self, policy):
        rollout = play(self, policy)
        told.append(list(self.finished_episodes))
        return rollout

    monkeypatch.setattr(ControlTask, "collect", collect)
    assert main(["train", "--resume", str(run), "--total_steps", "768"]) == 0
    assert all(512 < steps <= 640 for _, _, steps in told[0]) and all(640 < steps <= 768 for _, _, steps in told[1])

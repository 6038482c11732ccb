"""A run from its command to its folder: both worlds, both rules, what can go wrong, and on again from there."""

import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import write_model
from tiny_runs import untimed, write_prompts
from transformers import AutoModelForCausalLM

import lm_trust
from lm_trust.cli import main
from lm_trust.core.seeding import make_generator
from lm_trust.training.build import build_world
from lm_trust.training.checkpoint import load_checkpoint
from lm_trust.training.config_file import load_config
from lm_trust.training.config_yaml import write_yaml
from lm_trust.training.trainer import Trainer

SHARED = {
    *("iteration", "steps", "reward_mean", "step_kl", "step_kl_max", "surrogate_gain", "predicted_gain", "accepted"),
    *("entropy", "value_loss", "explained_variance", "rollout_seconds", "update_seconds", "step_seconds"),
}
OF_LANGUAGE = {"reference_kl", "completion_length", "truncated_fraction"}
EVALUATED = {"reward_mean", "reward_interval", "count"}
EVALUATED_LANGUAGE = EVALUATED | {"reference_kl", "perplexity", "distinct_2", "completion_length"}

# Rewards and environments are looked for in the working directory, as a user's would be.
REWARDS = """
calls, fail_at, how = 0, None, None

def vowels(prompts, completions):
    global calls
    calls += 1
    scores = [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]
    if fail_at is not None and calls >= fail_at:
        if how == "raise":
            raise ValueError("out of luck")
        if how == "nan":
            scores[1] = float("nan")
        if how == "count":
            scores.pop()
    return scores
"""
ENVIRONMENTS = """
import gymnasium
import numpy as np

class Breaking(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.ones(1, np.float32), {}

    def step(self, action):
        raise ArithmeticError("the motor is off")

class Fleeting(Breaking):
    # Of two the first is for training; the other one breaks in its third evaluation, each of which resets it twice.
    made = 0

    def __init__(self):
        Fleeting.made += 1
        self.evaluated, self.episodes = Fleeting.made % 2 == 0, 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        return super().reset(seed=seed)

    def step(self, action):
        if self.evaluated and self.episodes > 5:
            raise ConnectionError("the simulator is gone")
        return np.ones(1, np.float32), 1.0, True, False, {}
"""
MODULES = {"tiny_rewards": REWARDS, "tiny_worlds": ENVIRONMENTS}
LANGUAGE = {
    "iterations": 4,
    "model": {"path": "gpt2", "lora": {"r": 2, "alpha": 8}},
    "prompts": {"path": "prompts.jsonl", "heldout_fraction": 0.3},
    "rollout": {"batch_size": 8, "max_new_tokens": 4, "microbatch_size": 8},
    "rewards": [{"name": "tiny_rewards:vowels"}],
    "critic": {"kind": "reference_head", "hidden": [8], "epochs": 1, "minibatches": 2},
    "update": {"kind": "trpo", "max_kl": 0.02, "cg_iterations": 3},
    "evaluation": {"every": 0, "count": 4},
    "checkpoint": {"every": 1, "keep_last": 9},
}
CONTROL = {
    "total_steps": 4 * 2 * 32,
    "environment": {"id": "CartPole-v1", "count": 2},
    "policy": {"hidden": [8]},
    "rollout": {"steps": 32},
    "critic": {"kind": "mlp", "hidden": [8], "epochs": 1, "minibatches": 2},
    "update": {"kind": "trpo", "max_kl": 0.02, "cg_iterations": 3},
    "evaluation": {"every": 0, "count": 2},
    "checkpoint": {"every": 1, "keep_last": 9},
}
PPO = {"kind": "ppo_clip", "epochs": 2, "minibatches": 2, "learning_rate": 0.01, "anneal": True}
BOUNDED = {"penalty": 0.05, "adaptive": {"target": 0.05, "horizon": 100}, "budget": 0.1}
# Both rules in both worlds, each with what carries state: critic, normalisers, moments, a schedule.
CASES = {
    "language-trpo": (signal.SIGINT, "language", {"reference": {"loss": 0.02, "budget": 0.1}}),
    "language-ppo": (
        signal.SIGTERM,
        "language",
        {"update": PPO, "reference": BOUNDED, "model": {"path": "llama", "lora": {"r": 2, "alpha": 8}}},
    ),
    "control-trpo": (signal.SIGTERM, "control", {"normalise": {"observations": True, "rewards": True}}),
    "control-ppo": (signal.SIGINT, "control", {"update": PPO, "normalise": {"observations": True}}),
}


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in ("gpt2", "llama")}


@pytest.fixture
def place(tmp_path, monkeypatch, model_folders):
    """A working directory with models, prompts, rewards and environments of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name, folder in model_folders.items():
        (tmp_path / name).symlink_to(folder)
    write_prompts(tmp_path)
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


class Runs:
    """Writes configs and runs the command line on them, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name, world, **sections):
        path = self.folder / f"{name}.yaml"
        base = {"language": LANGUAGE, "control": CONTROL}[world]
        path.write_text(write_yaml(base | sections | {"output": str(self.folder / name)}))
        return path

    def train(self, name, world, *options, status=0, **sections):
        """A fresh run in a folder of that name; returns the folder."""
        assert main(["train", str(self.write(name, world, **sections)), *options]) == status
        return self.folder / name

    def resume(self, run, *options, status=0):
        assert main(["train", "--resume", str(run), *options]) == status

    def metrics(self, run):
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def evaluation(self, run):
        return json.loads((run / "evaluation.json").read_text())

    def state(self, run):
        return load_checkpoint(run / "checkpoints")

    def assert_same(self, run, other):
        """Metrics but their timing, the last checkpoint's whole state and the evaluation are equal, bit for bit."""
        assert untimed(self.metrics(run)) == untimed(self.metrics(other))
        assert differences(self.state(run), self.state(other)) == []
        assert self.evaluation(run) == self.evaluation(other)


def differences(one, other, at="state"):
    """Where two nested states differ."""
    if type(one) is not type(other):
        return [f"{at}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict | list) and len(one) != len(other):
        return [f"{at}: {len(one)} and {len(other)} items"]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{at}: other keys"]
        return [found for key in one for found in differences(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, f"{at}.{index}")]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [at]
    return [] if one == other else [at]


@pytest.fixture
def runs(place):
    return Runs(place)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def rewards(place, monkeypatch):
    """The module of the runs' reward, to spoil it."""
    monkeypatch.syspath_prepend(place)
    return importlib.import_module("tiny_rewards")


@pytest.fixture
def before_iteration(monkeypatch):
    """Call something just before the given iteration begins."""
    iterate = Trainer.iterate

    def patch(iteration, call):
        def patched(self):
            if self.iteration == iteration - 1:
                call()
            return iterate(self)

        monkeypatch.setattr(Trainer, "iterate", patched)

    yield patch


def error_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# ---- stop and go on


def test_a_run_that_a_signal_stopped_goes_on_as_if_it_never_had(runs, case, before_iteration, capsys):
    number, world, sections = case
    whole = runs.train("whole", world, **sections)
    before_iteration(2, lambda: os.kill(os.getpid(), number))
    # Without periodic checkpoints the signal itself must write one.
    run = runs.train("stopped", world, status=128 + number, **sections, checkpoint={"every": 0})
    out = capsys.readouterr().out
    assert f"{number.name}: stopped after iteration 2 of 4. Go on with: lm-trust train --resume {run}" in out
    assert [line["iteration"] for line in runs.metrics(run)] == [1, 2]
    assert "after" not in (runs.evaluation(run) if world == "language" else {})
    runs.resume(run)
    assert [line["iteration"] for line in runs.metrics(run)] == [1, 2, 3, 4]
    runs.assert_same(run, whole)


@pytest.mark.parametrize("world", ["language", "control"])
def test_a_torn_newest_checkpoint_is_skipped_with_a_warning(runs, world, caplog):
    whole = runs.train("whole", world)
    run = Path(shutil.copytree(whole, whole.with_name("torn")))
    shutil.rmtree(run / "checkpoints" / "00000004")
    tensors = run / "checkpoints" / "00000003" / "tensors.safetensors"
    os.truncate(tensors, tensors.stat().st_size - 1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "ste')  # a kill in the midst of a line
    runs.resume(run)
    assert any(str(tensors.parent) in record.getMessage() for record in caplog.records)
    assert [line["iteration"] for line in runs.metrics(run)] == [1, 2, 3, 4]
    runs.assert_same(run, whole)


def test_a_finished_run_can_be_made_longer(runs):
    short = runs.train("short", "control", "--total_steps", "128")
    runs.resume(short, "--total_steps", "256")
    runs.assert_same(short, runs.train("long", "control"))


@pytest.mark.parametrize(
    ("world", "key", "shorter", "done"), [("language", "iterations", 1, 2), ("control", "total_steps", 64, 128)]
)
def test_a_run_cannot_be_made_shorter_than_it_is(runs, world, key, shorter, done, capsys):
    run = runs.train("run", world, f"--{key}", str(done))
    before = (run / "config.yaml").read_text(), (run / "metrics.jsonl").read_text(), runs.evaluation(run)
    capsys.readouterr()
    runs.resume(run, f"--{key}", str(shorter), status=2)
    assert error_line(capsys) == (
        f"--resume: {key} is {shorter} and the run has {done} behind it; give at least {done}, or leave it"
    )
    assert before == ((run / "config.yaml").read_text(), (run / "metrics.jsonl").read_text(), runs.evaluation(run))
    runs.resume(run, f"--{key}", str(done))


def spawn(place, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(lm_trust.__file__).parent.parent), "PYTHONWARNINGS": "default"}
    return subprocess.Popen(
        [sys.executable, "-m", "lm_trust", *map(str, arguments)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("world", "number", "length"),
    [("language", signal.SIGINT, {"iterations": 100_000}), ("control", signal.SIGTERM, {"total_steps": 10**9})],
    ids=["language-SIGINT", "control-SIGTERM"],
)
def test_a_process_that_is_told_to_stop(runs, world, number, length):
    run = runs.folder / "run"
    sections = length | {"checkpoint": {"every": 0}}
    process = spawn(runs.folder, "train", runs.write("run", world, **sections))
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    done = runs.metrics(run)[-1]["iteration"]
    assert f"stopped after iteration {done} of " in out and f"lm-trust train --resume {run}" in out
    # Loading bars and other packages' deprecations are nobody's business at this terminal.
    assert err == ""
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"{done:08d}"]
    key, size = ("iterations", 1) if world == "language" else ("total_steps", 64)
    runs.resume(run, f"--{key}", str((done + 1) * size))
    runs.assert_same(run, runs.train("whole", world, **{key: (done + 1) * size}))


def test_resuming_with_another_model_is_refused(runs, capsys):
    run = runs.train("run", "language", iterations=1)
    runs.resume(run, "--model.path", "llama", "--iterations", "2", status=2)
    assert "another model or configuration" in error_line(capsys)


# ---- what goes wrong


@pytest.mark.parametrize(
    ("how", "told"),
    [("raise", "sample 0: prompt "), ("nan", "sample 1: prompt "), ("count", "7 scores for 8 completions")],
)
def test_a_reward_that_fails_stops_the_run_after_a_checkpoint(runs, rewards, how, told, capsys):
    whole = runs.train("whole", "language")
    # One call is the evaluation before training: the fourth is in iteration 3.
    rewards.calls, rewards.fail_at, rewards.how = 0, 4, how
    run = runs.train("run", "language", status=2, checkpoint={"every": 0})
    line = error_line(capsys)
    assert "'tiny_rewards:vowels'" in line and told in line and "iteration 3" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000002"]
    rewards.fail_at = None
    runs.resume(run)
    runs.assert_same(run, whole)


def test_a_reward_that_fails_in_the_first_iteration_or_in_an_evaluation(runs, rewards, capsys):
    rewards.calls, rewards.fail_at, rewards.how = 0, 2, "nan"
    run = runs.train("first", "language", status=2, checkpoint={"every": 0})
    assert "iteration 1;" in error_line(capsys)
    assert runs.state(run)["iteration"] == 0
    rewards.calls, rewards.fail_at = 0, 4  # before training, iterations 1 and 2, and the evaluation after these
    sections = {"checkpoint": {"every": 0}, "evaluation": {"every": 2, "count": 4}}
    run = runs.train("second", "language", status=2, **sections)
    assert "evaluation after iteration 2;" in error_line(capsys)
    assert runs.state(run)["iteration"] == 2
    rewards.fail_at = None
    whole = runs.train("whole", "language")
    runs.resume(run)
    runs.assert_same(run, whole)
    runs.resume(run.with_name("first"))
    runs.assert_same(run.with_name("first"), whole)


def test_an_environment_that_breaks_keeps_its_traceback_and_the_run_a_checkpoint(runs):
    config = runs.write("run", "control", environment={"id": "tiny_worlds:Breaking", "count": 2})
    with pytest.raises(ArithmeticError, match="motor"):
        main(["train", str(config)])
    assert runs.state(runs.folder / "run")["iteration"] == 0


def test_an_environment_that_breaks_in_an_evaluation_keeps_its_traceback_and_the_run_a_checkpoint(runs):
    sections = {"environment": {"id": "tiny_worlds:Fleeting", "count": 1}, "checkpoint": {"every": 0}}
    config = runs.write("run", "control", evaluation={"every": 1, "count": 1}, **sections)
    with pytest.raises(ConnectionError, match="simulator"):
        main(["train", str(config)])
    run = runs.folder / "run"
    assert runs.state(run)["iteration"] == 3
    assert (run / "policy.safetensors").is_file()
    runs.resume(run, "--evaluation.every", "0")
    assert [line["iteration"] for line in runs.metrics(run)] == list(range(1, 9))


def test_a_control_run_that_can_never_learn_again_ends_with_a_checkpoint_and_advice(runs, capsys):
    critic = CONTROL["critic"] | {"learning_rate": 1e30}
    run = runs.train("run", "control", status=2, total_steps=9 * 2 * 32, critic=critic, checkpoint={"every": 0})
    line = error_line(capsys)
    assert line.startswith("3 updates in a row were rejected: NaN or infinite (the value is nan at ")
    assert "critic.learning_rate" in line and line.endswith("a checkpoint was written)")
    reasons = [line["reason"] for line in runs.metrics(run)]
    assert reasons[-3:] == ["non_finite"] * 3 and len(reasons) < 9
    assert runs.state(run)["iteration"] == len(reasons)
    assert "after" not in (runs.evaluation(run) if (run / "evaluation.json").exists() else {})


@pytest.mark.parametrize("blocked", ["metrics.jsonl", "checkpoints/00000002", "policy.safetensors"])
def test_a_disk_that_fails_is_one_line_and_leaves_the_checkpoints(runs, blocked, before_iteration, capsys, monkeypatch):
    from lm_trust.training import checkpoint

    run = runs.folder / "run"

    def fail():
        if blocked == "metrics.jsonl":
            (run / blocked).unlink()
        if blocked == "policy.safetensors":
            (run / blocked).unlink()
        if blocked.startswith("checkpoints"):
            monkeypatch.setattr(checkpoint, "build_verified", full)
        else:
            (run / blocked).mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    before_iteration(2, fail)
    runs.train("run", "control", status=2)
    line = error_line(capsys)
    assert blocked in line and "intact" in line
    assert runs.state(run)["iteration"] == (2 if blocked == "policy.safetensors" else 1)


def test_an_output_that_cannot_be_made(runs, capsys):
    (runs.folder / "file").write_text("in the way")
    runs.train("run", "control", "--output", "file/run", status=2)
    assert "file/run" in error_line(capsys)


def test_a_torn_checkpoint_never_drives_out_the_good_ones(runs, before_iteration):
    sections = {"checkpoint": {"every": 1, "keep_last": 1}}
    whole = runs.train("whole", "control", **sections)
    assert [path.name for path in (whole / "checkpoints").iterdir()] == ["00000004"]
    run = runs.train("run", "control", "--checkpoint.keep_last", "9")
    for torn in ("00000003", "00000004"):
        (run / "checkpoints" / torn / "state.json").unlink()
    before_iteration(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    runs.resume(run, "--checkpoint.keep_last", "1", status=130)
    assert runs.state(run)["iteration"] == 3
    runs.resume(run)
    runs.assert_same(run, whole)


# ---- the folder


def test_the_folder_of_a_language_run(runs):
    sections = {"reference": {"penalty": 0.05, "loss": 0.01}, "evaluation": {"every": 2, "count": 4}}
    trpo, clipped = runs.train("trpo", "language", **sections), runs.train("ppo", "language", **sections, update=PPO)
    for run in (trpo, clipped):
        config = load_config(run / "config.yaml")
        assert config.output == str(run) and config.reference.loss == 0.01
        assert json.loads((run / "evaluations.jsonl").read_text())["iteration"] == 2
        assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        assert {path.name for path in run.iterdir()} == {
            *("config.yaml", "metrics.jsonl", "evaluations.jsonl", "evaluation.json", "learning_curve.png"),
            *("adapter", "best", "checkpoints", "completions", "tensorboard"),
        }
        lines = runs.metrics(run)
        assert len(lines) == 4 and all(line.keys() >= SHARED | OF_LANGUAGE for line in lines)
        assert abs(lines[0]["reference_kl"]) < 1e-5 < lines[-1]["reference_kl"]
        evaluation = runs.evaluation(run)
        assert evaluation.keys() == {"before", "after"}
        for side in evaluation.values():
            assert side.keys() == EVALUATED_LANGUAGE | {"samples", "reward/vowels", "reward_interval/vowels"}
            assert side["reward/vowels"] == side["reward_mean"]
            assert len(side["samples"]) == side["count"] == 4
            assert side["samples"][0].keys() == {"prompt", "completion", "reward"}
            assert side["reward_mean"] == pytest.approx(np.mean([sample["reward"] for sample in side["samples"]]))
        assert evaluation["before"]["reference_kl"] == pytest.approx(0, abs=1e-5)
        assert evaluation["after"]["reference_kl"] > 1e-4
    assert all("clip_fraction" in line for line in runs.metrics(clipped))
    assert runs.evaluation(trpo)["before"] == runs.evaluation(clipped)["before"]


def test_the_folder_of_a_control_run(runs):
    run = runs.train("run", "control", update=PPO, normalise={"observations": True})
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "evaluation.json", "learning_curve.png", "policy.safetensors", "checkpoints"),
        *("best", "monitor.csv", "tensorboard"),
    }
    assert load_config(run / "config.yaml").environment.id == "CartPole-v1"
    lines = runs.metrics(run)
    assert all(line.keys() >= SHARED | {"clip_fraction"} for line in lines)
    assert [line["steps"] for line in lines] == [64, 128, 192, 256]
    evaluation = runs.evaluation(run)
    assert evaluation.keys() == {"after"} and evaluation["after"].keys() == EVALUATED | {"length_mean", "returns"}

    saved = load_file(run / "policy.safetensors")
    assert saved["normaliser.count"] == 256  # so that the policy sees what it was trained on
    world = build_world(load_config(run / "config.yaml"))
    world.load_policy(run)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in world.trainer.policy.state_dict().items())
    assert world.trainer.task.evaluate(world.trainer.policy, 2) == evaluation["after"]
    world.trainer.task.close()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # plain peft asks for it
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_adapter_needs_no_lm_trust(runs, architecture):
    sections = {
        "model": {"path": architecture, "lora": {"r": 2, "alpha": 8}},
        "update": {"kind": "trpo", "max_kl": 0.1},
    }
    run = runs.train("run", "language", **sections)
    trainer = build_world(load_config(run / "config.yaml")).trainer
    trainer.load_state_dict(runs.state(run))
    task, policy = trainer.task, trainer.policy
    completions = task.sample(policy, task.training, torch.arange(4), make_generator(0, "test"))
    observations, mask = completions.observations, completions.mask
    with torch.no_grad():
        trained = policy.distribution(observations).log_prob(completions.tokens)[mask]
        with policy.as_reference():
            untrained = policy.distribution(observations).log_prob(completions.tokens)[mask]
        base = AutoModelForCausalLM.from_pretrained(runs.folder / architecture)
        plain = PeftModel.from_pretrained(base, run / "adapter").eval()
        rows = zip(observations.input_ids, observations.attention_mask, completions.lengths.tolist(), strict=True)
        found = []
        for ids, real, length in rows:  # one at a time, so that no padding is needed
            ids = ids[real]
            log_probs = plain(ids.unsqueeze(0)).logits[0].log_softmax(-1)[-1 - length : -1]
            found.append(log_probs.gather(-1, ids[-length:, None]).squeeze(-1))
    torch.testing.assert_close(torch.cat(found), trained, atol=1e-5, rtol=0)
    assert (trained - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["trpo", "ppo_clip", "ppo_penalty", "ppo_trust", "divergence_mask"])
def test_a_budget_of_the_reference_kl_reaches_every_rule(runs, kind):
    update = {"kind": kind} | ({"max_kl": 0.05} if kind == "trpo" else {"learning_rate": 0.02, "minibatches": 2})
    lines = runs.metrics(runs.train("bounded", "language", update=update, reference={"budget": 0.03}))
    free = runs.metrics(runs.train("free", "language", update=update))
    for line in lines:
        assert line["reference_kl_after"] <= max(0.03, line["reference_kl"])
        assert ("constraint" in line) == (kind == "trpo") and ("reference_multiplier" in line) == (kind != "trpo")
    assert lines[0]["reference_kl_after"] > 0.005
    assert free[-1]["reference_kl"] > 0.06 and "reference_kl_after" not in free[-1]


def test_an_adaptive_penalty_follows_the_reference_kl(runs):
    reference = {"penalty": 0.5, "adaptive": {"target": 0.01, "horizon": 80}}
    lines = runs.metrics(runs.train("steered", "language", reference=reference))
    expected = 0.5
    for line in lines:
        assert line["reference_penalty"] == pytest.approx(expected, rel=1e-9)
        expected *= 1 + min(0.2, max(-0.2, line["reference_kl"] / 0.01 - 1)) * 8 / 80
    assert lines[-1]["reference_penalty"] != 0.5


@pytest.mark.parametrize("world", ["language", "control"])
def test_every_accepted_step_keeps_to_its_bound(runs, world):
    lines = runs.metrics(runs.train("run", world))
    for line in lines:
        if line["accepted"]:
            assert 0 < line["step_kl"] <= 0.02 and line["step_kl"] <= line["step_kl_max"]
            assert line["surrogate_gain"] > 0
        else:
            assert line["step_kl"] == line["step_kl_max"] == 0
    assert any(line["accepted"] for line in lines)


# ---- the other settings run


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"batch_size": 8, "max_new_tokens": 4, "at_limit": "bootstrap"}},
        {"rollout": {"batch_size": 8, "max_new_tokens": 4, "at_limit": "penalise", "limit_penalty": 1.0}},
        {"rollout": {"batch_size": 8, "max_new_tokens": 4, "samples_per_prompt": 4}, "group": "leave_one_out"},
        {"rollout": {"batch_size": 8, "max_new_tokens": 4, "samples_per_prompt": 2}, "group": "group_relative"},
        {"advantage": {"kind": "returns_to_go"}},
    ],
    ids=["bootstrap", "penalise", "leave_one_out", "group_relative", "returns_to_go"],
)
def test_settings_that_change_the_advantages(runs, sections):
    group = sections.get("group")
    if group:
        sections = {"rollout": sections["rollout"], "advantage": {"kind": group}, "critic": {"kind": "none"}}
    lines = runs.metrics(runs.train("run", "language", **sections, iterations=2))
    assert len(lines) == 2 and all(line["reason"] != "non_finite" for line in lines)
    assert all((line["value_loss"] is None) == bool(group) for line in lines)
    assert all(math.isfinite(line["reward_mean"]) for line in lines)


@pytest.mark.parametrize("world", ["language", "control"])
def test_the_callers_random_numbers_are_left_alone(runs, world):
    runs.train("warm", world, "--seed", "9", update=PPO)  # imports and caches aside
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = runs.train("first", world, update=PPO)
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(after[0], before[0])
    assert all(np.array_equal(one, other) for one, other in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]
    # Nor do they decide anything: another state of theirs gives the same run.
    torch.manual_seed(6), np.random.seed(6), random.seed(6)
    runs.assert_same(first, runs.train("second", world, update=PPO))
    assert runs.metrics(first)[0]["entropy"] != runs.metrics(runs.folder / "warm")[0]["entropy"]


# ---- evaluate and generate


def test_evaluate_prints_before_and_after(runs, capsys):
    run = runs.train("run", "language", iterations=1)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--count", "3"]) == 0
    out, err = capsys.readouterr()
    assert "Held-out evaluation\n" in out and "before" in out and "after" in out and "perplexity" in out
    assert ["completions", "4", "3"] in [line.split() for line in out.splitlines()]
    assert err == "" and max(map(len, out.splitlines())) <= 80
    assert main(["evaluate", str(run), "--count", "4"]) == 0
    assert "Held-out evaluation, 4 completions\n" in capsys.readouterr().out
    control = runs.train("control", "control", total_steps=64)
    capsys.readouterr()
    assert main(["evaluate", str(control)]) == 0
    out = capsys.readouterr().out
    assert "Evaluation, 2 episodes" in out and "before" not in out


def test_generate_prints_completions(runs, capsys):
    run = runs.train("run", "language", update={"kind": "trpo", "max_kl": 1.0})
    # Only the model is needed: prompts and reward may have moved.
    (runs.folder / "prompts.jsonl").unlink()
    (runs.folder / "tiny_rewards.py").unlink()
    sys.modules.pop("tiny_rewards")

    def generate(*options):
        capsys.readouterr()
        assert main(["generate", str(run), "the film", *options]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.splitlines()

    lines = generate("--count", "4", "--seed", "1")
    assert len(lines) == 4 and len(set(lines)) > 1
    assert all(line.startswith("the film") and len(line.split()) <= 2 + 4 for line in lines)
    assert generate("--count", "4", "--seed", "1") == lines != generate("--count", "4", "--seed", "2")
    assert any(len(line.split()) > 2 + 4 for line in generate("--count", "4", "--max-new-tokens", "12"))
    assert generate("--count", "4", "--seed", "1", "--reference") != lines


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("", "PROMPT: must not be empty"), ("film " * 61, "a prompt of 61 tokens"), ("\udcff", "not text")],
    ids=["empty", "too long", "not UTF-8"],
)
def test_generate_refuses_a_prompt_that_does_not_fit(runs, prompt, told, capsys):
    run = runs.train("run", "language", iterations=1)
    capsys.readouterr()
    assert main(["generate", str(run), prompt]) == 2
    assert told in error_line(capsys)


def test_generate_needs_a_trained_language_run(runs, capsys):
    config = runs.write("config", "language")
    (runs.folder / "config").mkdir()
    shutil.copy(config, runs.folder / "config" / "config.yaml")
    assert main(["generate", "config", "the film"]) == 2
    assert "adapter" in error_line(capsys)
    runs.train("control", "control", total_steps=64)
    capsys.readouterr()
    assert main(["generate", "control", "the film"]) == 2
    assert "control run" in error_line(capsys)

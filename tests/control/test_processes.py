"""Environments in several processes: the same rollouts as in one."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

from lm_trust.control import ControlTask, MLPPolicy
from lm_trust.control.environments import make_environments
from lm_trust.control.playing import play
from lm_trust.errors import UserError


class Counter(gymnasium.Env):
    """Shows its seed's last digit and its step; ends after three to five steps, or raises at the action 9."""

    observation_space = gymnasium.spaces.Box(0, 9, (1, 2))
    action_space = gymnasium.spaces.Discrete(10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown, self.steps = seed % 10, 0
        return self._look(), {}

    def step(self, action):
        if action == 9:
            raise ValueError("nine")
        self.steps += 1
        return self._look(), float(action), self.steps == 3 + self.shown % 3, self.steps == 4, {}

    def _look(self):
        return np.array([[self.shown, self.steps]], np.float32)


class Forgetful(Counter):
    """Its episodes differ, whatever their seed."""

    count = 0

    def reset(self, *, seed=None, options=None):
        Forgetful.count += 1
        return super().reset(seed=Forgetful.count)


class Diary(Counter):
    """Writes down on closing how far its episode has come."""

    folder = None

    def close(self):
        (self.folder / str(id(self))).write_text(str(self.steps))


@dataclass
class Script:
    """Draws what is written, (T, B)."""

    actions: np.ndarray
    step: int = -1

    def __call__(self, observations):
        self.step += 1
        return self.actions[self.step]


@pytest.fixture
def make(monkeypatch):
    made = []

    def make(processes, count=5, name="Counter"):
        made.append(make_environments(f"{__name__}:{name}", count, seed=3, processes=processes))
        return made[-1]

    monkeypatch.setitem(
        sys.modules, __name__, SimpleNamespace(Counter=Counter, Forgetful=Forgetful, Diary=Diary, Script=Script)
    )
    yield make
    for environments in made:
        environments.close()


def rollout(environments, steps, seed=0):
    script = Script(np.random.default_rng(seed).integers(0, 9, (steps, environments.count)))
    played = environments.play(script, steps) if hasattr(environments, "play") else play(environments, script, steps)
    np.testing.assert_array_equal(played["actions"], script.actions)
    return played


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_rollouts_are_the_same(make, processes):
    one, several = make(1), make(processes)
    for seed in range(2):  # the second goes on where the first ended
        expected = rollout(one, 12, seed)
        assert (expected["terminated"] | expected["truncated"]).sum() > 10  # episodes ended and began
        assert_same(expected, rollout(several, 12, seed))


def test_a_saved_state_goes_on_exactly_with_another_number_of_processes(make):
    first = make(2)
    rollout(first, 5)
    state, expected = first.state_dict(), rollout(first, 7, seed=1)
    for processes in (1, 3):
        other = make(processes)
        other.load_state_dict(state)
        assert_same(expected, rollout(other, 7, seed=1))


def test_some_rows_alone(make):
    environments = make(1)
    before = environments.observations
    transition = environments.step(np.arange(5), rows=[1, 4])
    assert transition.valid.tolist() == [False, True, False, False, True]
    assert transition.rewards.tolist() == [0.0, 1.0, 0.0, 0.0, 4.0]
    assert (environments.observations != before).any(1).tolist() == transition.valid.tolist()


def test_an_environment_that_does_not_repeat_itself_is_warned_of_once(make):
    environments = make(3, name="Forgetful")
    rollout(environments, 2)
    state = environments.state_dict()
    with pytest.warns(UserWarning, match="not deterministic given its seed") as warned:
        environments.load_state_dict(state)
    assert len(warned) == 1


@pytest.mark.parametrize("row", [0, 4])
def test_an_environment_that_raises_is_heard_and_nothing_is_left_over(make, row):
    environments = make(3)
    state, expected = environments.state_dict(), rollout(environments, 4)
    environments.load_state_dict(state)
    actions = np.zeros((4, 5), int)
    actions[1, row] = 9
    with pytest.raises(ValueError, match="nine"):
        environments.play(Script(actions), 4)
    environments.load_state_dict(state)
    assert_same(expected, rollout(environments, 4))


def test_each_environment_is_closed_where_it_was_played(make, monkeypatch, tmp_path):
    monkeypatch.setattr(Diary, "folder", tmp_path)
    environments = make(3, name="Diary")
    rollout(environments, 2)
    environments.close()
    assert [note.read_text() for note in tmp_path.iterdir()] == ["2"] * 5
    environments.close()  # again, with nobody there


class Shifted(MLPPolicy):
    """Drawn from by torch: it has a distribution of its own."""

    def distribution(self, observations):
        return super().distribution(observations + 0.1)


@pytest.mark.parametrize("policy_class", [MLPPolicy, Shifted])
def test_a_task_collects_the_same(policy_class):
    collected = []
    for processes in (1, 3):
        environments = make_environments("CartPole-v1", 4, seed=0, processes=processes)
        task = ControlTask(environments, steps=60, gamma=0.99, seed=1, normalise_rewards=True)
        policy = policy_class(environments.observation_size, environments.action_space)
        collected.append(([task.collect(policy) for _ in range(2)], task.finished_episodes, task.state_dict()))
        task.close()
    (ones, episodes, state), (others, other_episodes, other_state) = collected
    assert episodes == other_episodes != []
    assert torch.equal(state["generator"], other_state["generator"])
    for one, other in zip(ones, others, strict=True):
        assert one.metrics == other.metrics
        for name in ("observations", "actions", "rewards", "terminated", "truncated", "mask", "next_critic_inputs"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_policy_that_cannot_be_sent_is_refused_in_words():
    class Local(MLPPolicy):
        def distribution(self, observations):
            return super().distribution(observations)

    environments = make_environments("CartPole-v1", 2, seed=0, processes=2)
    task = ControlTask(environments, steps=3, gamma=0.99, seed=1)
    with pytest.raises(UserError, match=r"environment\.processes: this cannot be sent .*Local.*leave it out"):
        task.collect(Local(environments.observation_size, environments.action_space))
    task.collect(MLPPolicy(environments.observation_size, environments.action_space))
    task.close()

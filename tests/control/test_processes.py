"""Environments in several processes: the same transitions as in one."""

import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from lm_trust.control.environments import make_environments


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


@pytest.fixture
def make(monkeypatch):
    made = []

    def make(processes, count=5):
        made.append(make_environments(f"{__name__}:Counter", count, seed=3, processes=processes))
        return made[-1]

    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Counter=Counter))
    yield make
    for environments in made:
        environments.close()


def play(environments, steps, seed=0):
    actions = np.random.default_rng(seed).integers(0, 9, (steps, environments.count))
    played = []
    for action in actions:
        transition = environments.step(action)
        played.append((environments.observations, *transition[:4], transition.final))
    return played


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert all(map(np.array_equal, one[:-1], other[:-1]))
        assert one[-1].keys() == other[-1].keys()
        assert all(np.array_equal(one[-1][row], other[-1][row]) for row in one[-1])


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_transitions_are_the_same(make, processes):
    one, several = play(make(1), 12), play(make(processes), 12)
    assert sum(len(step[-1]) for step in one) > 10  # episodes ended and began
    assert_same(one, several)


def test_a_saved_state_goes_on_exactly_with_another_number_of_processes(make):
    first = make(2)
    play(first, 5)
    state, expected = first.state_dict(), play(first, 7, seed=1)
    for processes in (1, 3):
        other = make(processes)
        other.load_state_dict(state)
        assert_same(expected, play(other, 7, seed=1))


def test_some_rows_alone(make):
    environments = make(2)
    before = environments.observations
    transition = environments.step(np.arange(5), rows=[1, 4])
    assert transition.valid.tolist() == [False, True, False, False, True]
    assert transition.rewards.tolist() == [0.0, 1.0, 0.0, 0.0, 4.0]
    assert (environments.observations != before).any(1).tolist() == transition.valid.tolist()


@pytest.mark.parametrize("row", [0, 4])
def test_an_environment_that_raises_is_heard(make, row):
    actions = np.zeros(5, int)
    actions[row] = 9
    with pytest.raises(ValueError, match="nine"):
        make(2).step(actions)

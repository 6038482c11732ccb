"""Small environments whose every number can be foretold."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from lm_trust.control import Environments


class Clock(gymnasium.Env):
    """Shows (its number, the steps since its reset), pays 1 a step, and ends by itself after `lives`."""

    def __init__(self, number=0, lives=None, nan_at=None, nan_reward_at=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.number, self.lives, self.nan_at, self.nan_reward_at = number, lives, nan_at, nan_reward_at
        self.time = 0
        self.resets = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets.append(seed)
        self.time = 0
        return self._observation(), {}

    def step(self, action):
        self.time += 1
        reward = np.nan if self.time == self.nan_reward_at else 1.0
        return self._observation(), reward, self.time == self.lives, False, {}

    def _observation(self):
        return np.array([self.number, np.nan if self.time == self.nan_at else self.time], np.float32)


class Walk(gymnasium.Env):
    """A noisy walk that remembers every action; continuous, bounded by [-1, 1] and by `limit` steps."""

    def __init__(self, limit=7):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.limit, self.given = limit, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.position = 0, self.np_random.normal(size=3)
        return self.position.copy(), {}

    def step(self, action):
        self.given.append(action.copy())
        self.time += 1
        self.position = 0.9 * self.position + self.np_random.normal(size=3)
        self.position[:2] += action
        reward = float(np.square(self.position).sum())
        return self.position.copy(), reward, bool(self.position[2] > 2), self.time >= self.limit, {}


class Forgetful(Clock):
    """Draws from a generator that no seed reaches."""

    noise = np.random.default_rng(0)

    def _observation(self):
        return np.array([self.number, self.noise.normal()], np.float32)


def limited(env, steps):
    return gymnasium.wrappers.TimeLimit(env, steps)


@pytest.fixture
def clocks():
    """clocks(count, limit=None, seed=0, **arguments): an `Environments` of clocks numbered from 0."""

    def make(count, limit=None, seed=0, kind=Clock, **arguments):
        envs = [kind(number, **arguments) for number in range(count)]
        return Environments("Clock", [limited(env, limit) if limit else env for env in envs], seed=seed)

    return make


@pytest.fixture
def walks():
    def make(count, seed=0, limit=7):
        return Environments("Walk", [Walk(limit) for _ in range(count)], seed=seed)

    return make


@pytest.fixture
def forgetful():
    return Forgetful

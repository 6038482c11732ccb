"""An environment of one's own: hold a drifting point at the origin.

Name it by its dotted path, in a configuration or on the command line over one, and start the run in the
folder above this one:

    lm-trust train configs/control/cartpole_trpo.yaml --environment.id examples.custom_environment:make \
        --output runs/drift --total_steps 50000

Anything that returns a `gymnasium.Env` will do: a function as here, or the class itself
(`examples.custom_environment:Drift`, which has no time limit, so that its evaluation would not end).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Drift(gymnasium.Env):
    """A point on a line is pushed by wind; the action pushes back. Losing it ends the episode."""

    def __init__(self, wind: float = 0.03) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, shape=(2,), dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)
        self.wind = wind

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)  # every draw below comes from self.np_random, so an episode can be repeated
        self.position, self.velocity = self.np_random.uniform(-1, 1), 0.0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.velocity = 0.9 * self.velocity + 0.1 * float(action[0]) + self.wind * self.np_random.normal()
        self.position += self.velocity
        lost = abs(self.position) > 3
        return self._observation(), 1.0 / (1.0 + self.position**2), lost, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.position, self.velocity], dtype=np.float32)


def make() -> gymnasium.Env:
    """One environment. A limit from outside only truncates: the value of the last state still counts."""
    return gymnasium.wrappers.TimeLimit(Drift(), max_episode_steps=200)

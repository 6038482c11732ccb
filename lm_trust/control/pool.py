"""envpool's environments, which a pool of threads in C++ steps: an optional backend for training.

They are gymnasium's tasks written anew, and are taken only where the tests hold them against gymnasium's, step by
step over whole episodes: from the same state and the same action come the same observation, reward and end. What
differs (envpool 1.2.5, gymnasium 1.4):

- Where the task ends and the time limit is reached in one step, gymnasium says terminated and truncated, envpool
  truncated alone: that step is bootstrapped.
- Rewards are float32. CartPole, Acrobot, MountainCar and Pendulum agree to float32's rounding.
- It brings a MuJoCo of its own, 3.6.0; these are differences from 4.0.0. A step agrees to 1e-11 of a number's size,
  Swimmer's to 1e-6. Not so where many contacts are: in Ant, Humanoid and HumanoidStandup positions and velocities
  differ by 1e-5 in the median step and by less than 2e-3 in 99 of 100, observed contact forces by ten times that,
  rewards by less than 1e-3 in 99 of 100. Chaos makes of it another episode, not another task.
- A reset takes an environment's place in a step, and is no step: a rollout has so many steps less, and a run of the
  same `total_steps` one less an episode.
- Episodes' first states have the same distribution, but another seed gives each.
- A pool's state can be neither read nor set: see `VectorEnvironments.load_state_dict`.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lm_trust.control.vector_env import VectorEnvironments
from lm_trust.core.processes import RowRange
from lm_trust.errors import UserError, did_you_mean, first_line

# Compared in tests/control/test_envpool.py, each of them.
CHECKED = (
    "Acrobot-v1",
    "Ant-v5",
    "CartPole-v1",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
)


class Pool(VectorEnv):
    """`num_envs` environments of envpool, stepped together: batch_size is num_envs, so that a seed fixes everything.

    A pool is seeded when it is made and never again, so `reset` makes one.

    Args:
        id: one of envpool's.
        count: how many environments.
        arguments: envpool's own settings of the environment.
        threads: that step them; None is one a core, and at most one an environment. The results are the same.
    """

    def __init__(
        self, id: str, count: int, *, arguments: dict[str, Any] | None = None, threads: int | None = None
    ) -> None:
        import envpool

        threads = threads or min(count, os.cpu_count() or 1)
        self._make = envpool.make_gymnasium
        self._settings = {"task_id": id, "num_envs": count, "num_threads": threads, **(arguments or {})}
        self._pool: VectorEnv | None = None
        spec = envpool.make_spec(**self._settings)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.num_envs = count
        with warnings.catch_warnings(action="ignore"):  # that bounds of float64 are rounded to float32
            self.single_observation_space = spec.gymnasium_observation_space
            self.single_action_space = spec.gymnasium_action_space
            self.observation_space = batch_space(self.single_observation_space, count)
            self.action_space = batch_space(self.single_action_space, count)

    def reset(self, *, seed: list[int], options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin anew, each environment with its own seed of 31 bits."""
        self._pool = None  # its threads end here
        self._pool = self._make(**self._settings, seed=seed)
        with warnings.catch_warnings(action="ignore"):  # as in __init__
            return self._pool.reset()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As `VectorEnv.step`."""
        return self._pool.step(actions)

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._pool = None


def make_pool(
    id: str, count: int, *, seed: int, arguments: dict[str, Any], placed: RowRange | None = None
) -> VectorEnvironments:
    """`count` environments of envpool behind the interface of `Environments`; `placed` as of `VectorEnvironments`.

    Raises:
        UserError: envpool is not installed; the environment is not one of `CHECKED`; or envpool does not take the
            arguments.
    """
    try:
        import envpool  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"environment.backend: envpool cannot be imported ({error}): pip install 'lm-trust[envpool]', or use "
            "gymnasium"
        ) from error
    if id not in CHECKED:
        raise UserError(
            f"environment.backend: envpool's {id!r} is not among those that were compared with gymnasium's "
            f"({', '.join(CHECKED)}); use gymnasium for it{did_you_mean(id, CHECKED)}"
        )
    try:
        return VectorEnvironments(id, Pool(id, count, arguments=arguments), seed=seed, placed=placed)
    except (TypeError, RuntimeError) as error:
        if not arguments:
            raise
        raise UserError(
            f"environment.arguments: envpool's {id} does not take {arguments}: {first_line(error)}"
        ) from error

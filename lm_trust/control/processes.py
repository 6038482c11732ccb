"""Environments that step in processes of their own, while this one steps the first of them.

For environments whose step is work, such as MuJoCo's: a step of CartPole is shorter than telling another process of it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from lm_trust.child import Child

Encode = Callable[[Any], np.ndarray] | None  # from an environment's observation to a row of numbers; None: it is one


class Remote(gymnasium.Env):
    """An environment in a child, as `Environments` uses one: its spaces are known here, its steps are done there."""

    def __init__(self, env: gymnasium.Env, child: Child, index: int) -> None:
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._child, self._index = child, index

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As the environment itself, without its information."""
        return self._child.call("reset", self._index, seed), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As the environment itself, without its information."""
        return *self._child.call("step", self._index, action), {}

    def close(self) -> None:
        """End the child, with all its environments."""
        self._child.close()


class Share:
    """The environments from row `first` on that one child steps, all at once; the numbers go through shared memory."""

    def __init__(self, envs: Sequence[gymnasium.Env], first: int, given: np.ndarray, size: int, encode: Encode) -> None:
        self._rows = slice(first, first + len(envs))
        self._actions = _shared(given[self._rows])
        self._results = (
            _shared(np.zeros((len(envs), size), np.float32)),
            _shared(np.zeros(len(envs))),
            _shared(np.zeros(len(envs), bool)),
            _shared(np.zeros(len(envs), bool)),
        )
        self._child = Child(_Stepper(envs, encode, self._actions, self._results), "environment.processes")
        self.envs = [Remote(env, self._child, index) for index, env in enumerate(envs)]

    def start(self, given: np.ndarray) -> None:
        """Begin a step of each, with the actions of all rows."""
        self._actions[:] = given[self._rows]
        self._child.start("step_all")

    def finish(self, *arrays: np.ndarray) -> None:
        """Put what they gave into this share's rows of the arrays: observations, rewards, terminated, truncated."""
        self._child.finish()
        for array, result in zip(arrays, self._results, strict=True):
            array[self._rows] = result


def shared_out(
    envs: Sequence[gymnasium.Env], processes: int, given: np.ndarray, size: int, encode: Encode
) -> tuple[list[gymnasium.Env], list[Share]]:
    """The same environments, the first of `processes` even shares here and each other one in a child.

    Args:
        envs: all of them.
        processes: this one and the children.
        given: (B, ...) like the actions that environments take.
        size: O, of an observation as `encode` makes it.
        encode: of their observations.

    Raises:
        UserError: this platform cannot fork.
    """
    parts = [part.tolist() for part in np.array_split(np.arange(len(envs)), processes)]
    shares = [Share([envs[row] for row in part], part[0], given, size, encode) for part in parts[1:]]
    return [*(envs[row] for row in parts[0]), *(env for share in shares for env in share.envs)], shares


class _Stepper:
    """The child's side."""

    def __init__(
        self, envs: Sequence[gymnasium.Env], encode: Encode, actions: np.ndarray, results: tuple[np.ndarray, ...]
    ) -> None:
        self._envs, self._encode = list(envs), encode
        self._actions, self._results = actions, results

    def step_all(self) -> None:
        observations, rewards, terminated, truncated = self._results
        for row, (env, action) in enumerate(zip(self._envs, self._actions, strict=True)):
            observation, rewards[row], terminated[row], truncated[row], _ = env.step(action)
            observations[row] = observation if self._encode is None else self._encode(observation)

    def step(self, index: int, action: Any) -> tuple[Any, float, bool, bool]:
        return self._envs[index].step(action)[:4]

    def reset(self, index: int, seed: int | None) -> Any:
        return self._envs[index].reset(seed=seed)[0]


def _shared(array: np.ndarray) -> np.ndarray:
    """A copy that forks of this process write to as well."""
    memory = multiprocessing.RawArray("b", max(array.nbytes, 1))
    copy = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
    copy[:] = array
    return copy

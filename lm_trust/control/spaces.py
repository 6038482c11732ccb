"""The gymnasium spaces that the control world takes; observations become vectors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from lm_trust.errors import UserError, in_line

_ZERO = np.int64(0)


@dataclass(frozen=True, eq=False)
class ActionSpace:
    """What a policy acts with.

    Attributes:
        kind: "discrete" (a policy's action is an index), "multi_discrete" (A indices) or "continuous" (A real numbers).
        size: V actions to choose from, the sum of a multi-discrete action's `sizes`, or A dimensions: how many
            numbers a policy's network gives for an action.
        low, high: (A,) bounds of a continuous action, in the environment's own dtype; may be infinite.
        start: the environment's number for index 0 of a discrete action; of a multi-discrete one (A,); in the
            environment's own dtype.
        sizes: V_a, how many actions each dimension of a multi-discrete action chooses from; None of another kind.
    """

    kind: str
    size: int
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    start: np.integer | np.ndarray = _ZERO
    sizes: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one action."""
        if self.kind == "discrete":
            return ()
        return (self.size,) if self.sizes is None else (len(self.sizes),)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """What the environments are given for a policy's raw actions, (B,) or (B, A): a new array.

        The bounds are applied here and nowhere else, so what is stored and scored is what was sampled.
        """
        if self.kind == "continuous":
            return np.minimum(np.maximum(actions, self.low), self.high).astype(self.low.dtype, copy=False)
        return (actions + self.start).astype(self.start.dtype, copy=False)


def action_space(space: spaces.Space | None, name: str) -> ActionSpace:
    """The supported action spaces: `Discrete`, and one-dimensional `MultiDiscrete`, `MultiBinary` and `Box` of floats.

    Raises:
        UserError: any other space, or none; the message names the environment and the space.
    """
    if isinstance(space, spaces.Discrete):
        return ActionSpace("discrete", int(space.n), start=space.dtype.type(space.start))
    one_dimensional = isinstance(space, spaces.Space) and space.shape is not None and len(space.shape) == 1
    if isinstance(space, spaces.MultiDiscrete) and one_dimensional:
        return _multi_discrete(space.nvec.tolist(), space.start)
    if isinstance(space, spaces.MultiBinary) and one_dimensional:
        return _multi_discrete([2] * space.shape[0], np.zeros(space.shape, space.dtype))
    if isinstance(space, spaces.Box) and one_dimensional and np.issubdtype(space.dtype, np.floating):
        return ActionSpace("continuous", space.shape[0], low=space.low, high=space.high)
    raise UserError(
        f"environment {name}: the action space {in_line(space)} is not supported; "
        "supported are Discrete, and one-dimensional MultiDiscrete, MultiBinary and Box of floats"
    )


def _multi_discrete(sizes: list[int], start: np.ndarray) -> ActionSpace:
    return ActionSpace("multi_discrete", sum(sizes), start=start, sizes=tuple(sizes))


def observation_encoder(space: spaces.Space | None, name: str) -> tuple[int, Callable[[Any], np.ndarray] | None]:
    """How an observation becomes a vector: a `Box` is flattened, a `Discrete` one becomes one-hot.

    Returns:
        The length of the vector, and the function that makes it; None where an observation already is one. The function
        raises a UserError for a number that is not in a `Discrete` space.

    Raises:
        UserError: any other space, or none; the message names the environment and the space.
    """
    if isinstance(space, spaces.Box):
        if len(space.shape) == 1:
            return space.shape[0], None
        return int(np.prod(space.shape)), np.ravel
    if isinstance(space, spaces.Discrete):
        return int(space.n), _one_hot(space, name)
    raise UserError(
        f"environment {name}: the observation space {in_line(space)} is not supported; supported are Box and Discrete "
        "(wrap it in gymnasium.wrappers.FlattenObservation)"
    )


def _one_hot(space: spaces.Discrete, name: str) -> Callable[[Any], np.ndarray]:
    size, start = int(space.n), int(space.start)

    def encode(observation: Any) -> np.ndarray:
        try:
            index = operator.index(observation) - start
        except TypeError:
            index = -1
        if not 0 <= index < size:  # numpy would take a negative one for another state, without a word
            raise UserError(f"environment {name}: an observation is {described(observation)}, its space says {space}")
        row = np.zeros(size, np.float32)
        row[index] = 1.0
        return row

    return encode


def described(value: Any) -> str:
    """What an environment gave instead of what it should have given: value and type, in a line."""
    return f"{in_line(value)} ({type(value).__name__})"

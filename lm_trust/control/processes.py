"""Environments that several processes play, each some of them.

For environments whose step is work, such as MuJoCo's. Each process draws the actions of its own environments, so that
they need not wait for each other between the first step of a rollout and the last.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from lm_trust.child import Child, ChildDied
from lm_trust.control.acting import OfRows, Sampler
from lm_trust.control.playing import play
from lm_trust.control.vector import Environments, require_separate
from lm_trust.core.processes import RowRange


class EnvironmentProcesses:
    """`Environments` in even shares: this process has the first, a child each other one.

    Args:
        name, envs, seed, placed: as of `Environments`.
        processes: this one and the children.

    Attributes:
        name, count, observation_size, action_space, keeps_episodes: as of `Environments`.

    Raises:
        UserError: as `Environments`; or this platform cannot fork.
    """

    keeps_episodes = True

    def __init__(
        self,
        name: str,
        envs: Sequence[gymnasium.Env],
        *,
        seed: int,
        processes: int,
        placed: RowRange | None = None,
    ) -> None:
        require_separate(name, envs)
        self.name, self.count = name, len(envs)
        first, _, total = placed or RowRange(0, self.count, self.count)
        parts = np.array_split(np.arange(self.count), processes)
        self._rows = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
        shares = [
            Environments(
                name, envs[rows], seed=seed, placed=RowRange(first + rows.start, rows.stop - rows.start, total)
            )
            for rows in self._rows
        ]
        self._here = shares[0]
        self.action_space, self.observation_size = self._here.action_space, self._here.observation_size
        self._player = _Player(self._here)
        self._children = [Child(_Player(share), "environment.processes") for share in shares[1:]]

    def play(self, draw: Sampler, steps: int) -> dict[str, np.ndarray]:
        """As `playing.play` of them all, to the bit.

        Raises:
            UserError: the sampler cannot be sent to another process.
        """
        given = [(OfRows(draw, rows, self.count), steps) for rows in self._rows]
        shares = self._in_each("play", given)
        return {name: np.concatenate([share[name] for share in shares], axis=1) for name in shares[0]}

    def state_dict(self) -> dict[str, Any]:
        """As that of `Environments`."""
        return self._here.joined(self._in_each("state_dict", [()] * len(self._rows)))

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of all of a run's environments from those of each process's."""
        return self._here.joined(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As that of `Environments`."""
        for message in {words: None for said in self._in_each("load", [(state,)] * len(self._rows)) for words in said}:
            warnings.warn(message, stacklevel=2)

    def close(self) -> None:
        """Close every environment in the process that plays it, and end the children."""
        with ExitStack() as left:  # done even where an environment fails to close
            for child in self._children:
                left.callback(child.close)
                left.callback(_close_in, child)
            self._here.close()

    def _in_each(self, method: str, given: Sequence[tuple]) -> list[Any]:
        """What a method of `_Player` gives in each process.

        All are waited for, even where one of them fails: an answer that nobody heard would be taken for the next one.
        """
        for child, arguments in zip(self._children, given[1:], strict=True):
            child.start(method, *arguments)
        results, errors = [], []
        for result in (partial(getattr(self._player, method), *given[0]), *(child.finish for child in self._children)):
            try:
                results.append(result())
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results


class _Player:
    """One process's share."""

    def __init__(self, environments: Environments) -> None:
        self._environments = environments

    def play(self, draw: Sampler, steps: int) -> dict[str, np.ndarray]:
        return play(self._environments, draw, steps)

    def state_dict(self) -> dict[str, Any]:
        return self._environments.state_dict()

    def close(self) -> None:
        self._environments.close()

    def load(self, state: dict[str, Any]) -> list[str]:
        """What it warns of: here it might not be heard."""
        with warnings.catch_warnings(record=True, action="always") as caught:
            self._environments.load_state_dict(state)
        return [str(warning.message) for warning in caught]


def _close_in(child: Child) -> None:
    """Close the environments of a child that may be gone, or closed before."""
    with suppress(ChildDied):
        child.call("close")

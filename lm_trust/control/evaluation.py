"""Deterministic evaluation: each episode is played to its end, so short ones count no more than long ones.

What was played can be remembered, to be shown afterwards (`lm_trust.control.video`).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn

from lm_trust.control.vector import Environments
from lm_trust.errors import UserError
from lm_trust.intervals import clustered_mean
from lm_trust.user_code import working_directory_importable

LONGEST_EPISODE = 100_000


@torch.inference_mode()
@working_directory_importable()
def evaluate_policy(policy: nn.Module, environments: Environments) -> dict[str, Any]:
    """One episode in each environment with the distribution's mode; each call plays the same episodes.

    Returns:
        reward_mean (unscaled return of an episode), reward_interval [low, high] (95 %, Student's t; None for
        a single episode), count, length_mean, and returns, those of each episode.

    Raises:
        UserError: an episode did not end.
    """
    environments.reset()
    returns, lengths = np.zeros(environments.count), np.zeros(environments.count, np.int64)
    playing = list(range(environments.count))
    while playing:
        actions = policy.distribution(torch.from_numpy(environments.observations)).mode().numpy()
        transition = environments.step(actions, playing)
        returns += transition.rewards
        lengths[playing] += 1
        playing = [row for row in playing if row not in transition.final]
        if lengths.max() >= LONGEST_EPISODE and playing:
            raise UserError(
                f"environment {environments.name}: an evaluation episode did not end in {LONGEST_EPISODE} "
                "steps; give it a limit (gymnasium.wrappers.TimeLimit)"
            )
    return {
        "reward_mean": float(returns.mean()),
        "reward_interval": clustered_mean(returns, np.arange(environments.count)).interval,
        "count": environments.count,
        "length_mean": float(lengths.mean()),
        "returns": returns.tolist(),
    }


@dataclass(frozen=True, eq=False)
class Episode:
    """All that it takes to play an episode again, and to tell that it went the same way.

    Attributes:
        seed: that it was reset with.
        actions: as the environment was given them.
        total: sum of its rewards.
        final: the last observation, as the environment gave it.
    """

    seed: int
    actions: list[Any]
    total: float
    final: Any


class Remembering(gymnasium.Wrapper):
    """An environment that remembers its last episode; what goes in and comes out is untouched.

    Attributes:
        episode: the last one that ended; None before the first.
    """

    episode: Episode | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._seed, self._actions, self._total = seed, [], 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._actions.append(copy(action))  # a row of an array that the environment may write to
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._total += float(reward)
        if terminated or truncated:
            self.episode = Episode(self._seed, self._actions, self._total, copy(observation))
        return observation, reward, terminated, truncated, info

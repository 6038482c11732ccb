"""Deterministic evaluation: each episode is played to its end, so short ones count no more than long ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import nn

from lm_trust.control.vector import Environments
from lm_trust.errors import UserError

LONGEST_EPISODE = 100_000


@torch.inference_mode()
def evaluate_policy(policy: nn.Module, environments: Environments) -> dict[str, Any]:
    """One episode in each environment with the distribution's mode; each call plays the same episodes.

    Returns:
        reward_mean (unscaled return of an episode), reward_interval [low, high] (95 %, Student's t; None for
        a single episode), count, length_mean.

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
        "reward_interval": t_interval(returns),
        "count": environments.count,
        "length_mean": float(lengths.mean()),
    }


def t_interval(samples: np.ndarray) -> list[float] | None:
    """95 % interval of the mean of (N,) samples by Student's t; None for fewer than two."""
    if len(samples) < 2:
        return None
    half = stdtrit(len(samples) - 1, 0.975) * samples.std(ddof=1) / np.sqrt(len(samples))
    return [float(samples.mean() - half), float(samples.mean() + half)]

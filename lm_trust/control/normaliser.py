"""Running normalisation of observations and of rewards, by batched Welford merging.

Both keep float64 statistics in buffers, so that they travel in a state dict. Those of observations move in
`update` alone: they stand still within an iteration and in evaluation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lm_trust.core.processes import all_rows

CLIP = 10.0  # standard deviations: nothing normalised is larger; as in stable-baselines3


def merge_moments(mean: Tensor, variance: Tensor, count: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (population) variance of all rows seen so far, with those of `batch` added.

    Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
    variances".

    Args:
        mean, variance: (...) of the `count` rows so far.
        count: scalar.
        batch: (rows, ...).
    """
    rows = len(batch)
    if not rows:
        return mean, variance, count
    total = count + rows
    batch_mean = batch.mean(0)
    difference = batch_mean - mean
    within = variance * count + batch.var(0, correction=0) * rows
    squares = within + difference.square() * (count * rows / total)
    return mean + difference * (rows / total), squares / total, total


class ObservationNormaliser(nn.Module):
    """(x - mean) / std of the observations seen so far, clipped; the identity until the first update.

    As a submodule of the policy it is saved, copied and frozen with it.

    Args:
        size: O, the length of an observation.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        # What `forward` applies at every step, derived in `update`: float64 there would cost a fifth of a
        # rollout. They are saved as well, so that no way of restoring buffers can leave them behind.
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Count raw observations (..., O) into the statistics."""
        rows = observations.reshape(-1, observations.shape[-1]).to(self.mean.dtype)
        statistics = (self.mean, self.var, self.count)
        for buffer, value in zip(statistics, merge_moments(*statistics, rows), strict=True):
            buffer.copy_(value)
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.rsqrt(self.var + 1e-8))

    def forward(self, observations: Tensor) -> Tensor:
        """(..., O) raw to (..., O) normalised."""
        if not self.count:
            return observations
        return ((observations - self.shift) * self.scale).clamp(-CLIP, CLIP)


class RewardNormaliser(nn.Module):
    """Rewards over the running standard deviation of the discounted return, as in gymnasium and SB3.

    That of the environments of all processes; each scales the rewards of its own.

    Returns accumulate forwards, R_t = r_t + gamma R_{t-1}, from zero at an episode's start. The mean is not
    taken out: that would change what is optimal. One rollout is counted, and then scaled by one number.

    Args:
        count: B environments.
        gamma: discount.
    """

    def __init__(self, count: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("var", torch.ones((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("returns", torch.zeros(count, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, rewards: Tensor, ended: Tensor, mask: Tensor | None = None) -> Tensor:
        """Count a rollout in, and scale it.

        Args:
            rewards: (B, T), the steps that follow those of the last call.
            ended: (B, T) bool, True at the last step of an episode.
            mask: (B, T) bool, False between two episodes where nothing happened: a reward of zero, not counted.
                None is all True.

        Returns:
            (B, T) scaled rewards.
        """
        returns, running = np.empty(rewards.shape[::-1]), self.returns.numpy()
        keep = self.gamma * (~ended).double().numpy()
        # In numpy, which takes a quarter of torch's time on rows this small.
        for step, reward in enumerate(rewards.double().numpy().T):
            returns[step] = running + reward
            running = returns[step] * keep[:, step]
        self.returns = torch.from_numpy(running)
        batch = all_rows(torch.from_numpy(returns.reshape(-1) if mask is None else returns[mask.numpy().T]))
        self.mean, self.var, self.count = merge_moments(self.mean, self.var, self.count, batch)
        return (rewards * torch.rsqrt(self.var + 1e-8)).clamp(-CLIP, CLIP).to(rewards.dtype)

"""What an update is worth on samples that it has not seen, and how sure that is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_trust.core.batch import Batch, Rollout
from lm_trust.core.distributions import Distribution, per_step
from lm_trust.core.surrogate import ratio
from lm_trust.intervals import Estimate, clustered_mean
from lm_trust.training.trainer import Experience


def fresh_gain(policy: nn.Module, fresh: Experience, *, reference_loss: float = 0.0) -> Estimate:
    """The gain of an update's objective over the old policy, on a rollout that the update has not seen.

    Unlike the gain on the batch that was stepped on, it is not fitted to the noise that it is measured with. The mean
    is over all valid steps, as there. The interval takes as independent what is so given the old policy and the critic:
    the completions of one prompt together, and in control each episode's part in the rollout. (Whitened advantages
    share their mean and scale, which is neglected.)

    Args:
        policy: after the update.
        fresh: of the old policy.
        reference_loss: weight of the exact KL(policy || reference) in the objective, per nat of the mean step.
    """
    gains = _step_gains(policy, fresh.batch, reference_loss)
    return clustered_mean(gains.double().cpu().numpy(), _clusters(fresh.rollout).cpu().numpy())


def paired_improvement(before: dict[str, Any], after: dict[str, Any]) -> Estimate:
    """The mean reward of one evaluation less another's, of the same prompts or episodes with the same noise.

    The interval is that of the differences, with the samples of one prompt taken together.
    """
    if "returns" in before:
        differences = np.subtract(after["returns"], before["returns"])
        return clustered_mean(differences, np.arange(len(differences)))
    pairs = list(zip(before["samples"], after["samples"], strict=True))
    if any(one["prompt"] != two["prompt"] for one, two in pairs):
        raise ValueError("the two evaluations are not of the same prompts")
    return clustered_mean([two["reward"] - one["reward"] for one, two in pairs], [one["prompt"] for one, _ in pairs])


@torch.no_grad()
def _step_gains(policy: nn.Module, batch: Batch, reference_loss: float) -> Tensor:
    """(N,) the gain at each valid step; their mean is `SurrogateObjective`'s gain."""

    def gain(new: Distribution, old: Distribution, *given: Any) -> Tensor:
        *reference, actions, advantages = given
        each = (ratio(old.log_prob(actions), new.log_prob(actions)) - 1) * advantages
        for other in reference:
            each = each - reference_loss * (new.kl(other) - old.kl(other))
        return each

    reference = [batch.reference] if reference_loss and batch.reference is not None else []
    new = policy.distribution(batch.observations)
    gains = per_step(gain, [new, batch.old, *reference], batch.actions, batch.advantages)
    return gains if batch.mask is None else gains[batch.mask]


def _clusters(rollout: Rollout) -> Tensor:
    """(N,) for each valid step the number of its prompt's group of rows and of its episode there."""
    ended = (rollout.terminated | rollout.truncated).long()
    rows, steps = ended.shape
    episodes = ended.cumsum(-1) - ended
    groups = torch.arange(rows, device=ended.device).unsqueeze(-1) // rollout.group_size
    return (groups * (steps + 1) + episodes)[rollout.mask]

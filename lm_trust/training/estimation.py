"""From rewards and values to advantages, by the estimator that the configuration names."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_trust.core.advantages import gae, group_relative, leave_one_out, masked_whiten
from lm_trust.core.batch import Rollout
from lm_trust.training.config_learning import Gae, GroupRelative, LeaveOneOut, ReturnsToGo

AdvantageConfig = Gae | ReturnsToGo | LeaveOneOut | GroupRelative


def estimate_advantages(
    config: AdvantageConfig, rollout: Rollout, rewards: Tensor, values: Tensor, next_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages, and the returns that the critic is fitted to, each (B, T).

    Args:
        config: the estimator and its settings.
        rollout: for ends, mask and groups.
        rewards: (B, T), any penalty already taken off.
        values, next_values: (B, T), zeros without a critic.
    """
    rewards = torch.where(rollout.mask, rewards, 0.0)
    if isinstance(config, Gae | ReturnsToGo):
        advantages, returns = gae(
            rewards,
            values,
            next_values,
            rollout.terminated,
            rollout.truncated,
            gamma=config.gamma,
            # Returns to go are the trace that does not decay: what a limit cut off is worth is then still in them.
            lam=config.lam if isinstance(config, Gae) else 1.0,
        )
    else:
        scores = rewards.sum(-1)
        if isinstance(config, LeaveOneOut):
            relative = leave_one_out(scores, rollout.group_size)
        else:
            relative = group_relative(scores, rollout.group_size, scale=config.scale)
        advantages = relative.unsqueeze(-1).expand_as(rewards) * rollout.mask
        returns = advantages
    if config.whiten:
        advantages = masked_whiten(advantages, rollout.mask)
    return advantages, returns

"""From rewards and values to advantages, by the estimator that the configuration names."""

from __future__ import annotations

from torch import Tensor

from lm_trust.core.advantages import gae, group_relative, leave_one_out, masked_whiten, returns_to_go
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
    if isinstance(config, Gae):
        advantages, returns = gae(
            rewards,
            values,
            next_values,
            rollout.terminated,
            rollout.truncated,
            gamma=config.gamma,
            lam=config.lam,
        )
    elif isinstance(config, ReturnsToGo):
        returns = returns_to_go(rewards, rollout.terminated | rollout.truncated, gamma=config.gamma)
        advantages = returns - values
    else:
        scores = (rewards * rollout.mask).sum(-1)
        if isinstance(config, LeaveOneOut):
            relative = leave_one_out(scores, rollout.group_size)
        else:
            relative = group_relative(scores, rollout.group_size, scale=config.scale)
        advantages = relative.unsqueeze(-1).expand_as(rewards) * rollout.mask
        returns = advantages
    if config.whiten:
        advantages = masked_whiten(advantages, rollout.mask)
    return advantages, returns

"""Where the engine that sampled and the policy that is trained are not quite the same distribution.

A generation engine with other kernels or another precision draws from mu where the policy scores pi, and the policy
gradient on its samples is biased. Weighing each step by min(pi / mu, cap) takes away the bias of the step's own draw,
up to the cap: truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training"). Which states are met remains mu's doing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm_trust.core.batch import Rollout
from lm_trust.core.distributions import kl_estimators
from lm_trust.core.processes import largest, mean
from lm_trust.core.surrogate import ratio
from lm_trust.errors import UserError
from lm_trust.training.config_language import Mismatch


def mismatch_metrics(config: Mismatch, rollout: Rollout, log_prob: Tensor) -> dict[str, float]:
    """How far the engine is from the policy, over the valid steps of all processes.

    Empty where no engine told its log-probabilities.

    Args:
        config: its cap and its limit.
        rollout: with `engine_log_prob`.
        log_prob: (B, T) of the same actions by the policy, nats.

    Returns:
        engine_kl: an estimate of KL(engine || policy) from the sampled actions alone, nats per step: the mean of k3,
            which is unbiased and never negative. The exact divergence would need the engine's whole distribution.
        engine_ratio_max: the largest policy / engine of a sampled action.
        engine_clipped_fraction: share of the steps whose ratio is beyond the cap.

    Raises:
        UserError: the estimate is beyond the limit.
    """
    if rollout.engine_log_prob is None:
        return {}
    estimate = mean(kl_estimators(rollout.engine_log_prob, log_prob)["k3"], rollout.mask)
    if config.limit is not None and estimate > config.limit:
        raise UserError(
            f"rollout.mismatch.limit: the engine's distribution is {estimate:.3g} nats a token from the policy's, by "
            f"estimate, and {config.limit:g} is allowed; raise the limit, or begin again with rollout.engine generate"
        )
    weight = ratio(rollout.engine_log_prob, log_prob)
    return {
        "engine_kl": estimate,
        "engine_ratio_max": largest(torch.where(rollout.mask, weight, 0.0).amax()).item(),
        "engine_clipped_fraction": mean(weight > config.cap, rollout.mask),
    }


def corrected(config: Mismatch, rollout: Rollout, log_prob: Tensor, advantages: Tensor) -> Tensor:
    """(B, T) advantages; where an engine sampled and `correct` is set, each times its step's truncated weight.

    Args:
        config: `correct` and the cap.
        rollout: with or without `engine_log_prob`.
        log_prob: (B, T) of the actions by the policy, nats.
        advantages: (B, T).
    """
    if rollout.engine_log_prob is None or not config.correct:
        return advantages
    return advantages * ratio(rollout.engine_log_prob, log_prob).clamp(max=config.cap).to(advantages.dtype)

"""The adaptive coefficient of the reference KL in the reward (Ziegler et al. 2019, section 2.2)."""

from __future__ import annotations

import math

from lm_trust.training.config_language import AdaptivePenalty

LARGEST_ERROR = 0.2


def adapted_penalty(config: AdaptivePenalty, coefficient: float, reference_kl: float, episodes: int) -> float:
    """The next iteration's coefficient: larger where the policy went beyond the target, smaller where it did not.

    A controller proportional in the logarithm: the coefficient grows by error * episodes / horizon of itself, with the
    error of the KL relative to its target clipped to 0.2.

    Args:
        config: target (nats per sequence) and horizon (episodes), which must be more than 0.2 * episodes: the
            coefficient then stays positive.
        coefficient: of the iteration that was.
        reference_kl: of its rollout, exact, nats per sequence; one that is not a number changes nothing.
        episodes: sequences in that rollout.
    """
    if math.isnan(reference_kl):
        return coefficient
    error = min(max(reference_kl / config.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1 + error * episodes / config.horizon)

"""REINFORCE: one step along the policy gradient (Williams 1992; Sutton et al. 2000).

The gradient of the mean of advantage * log pi(a | s), by Adam and on the whole batch at once: the policy that sampled
is the one that is differentiated, so that nothing is corrected, clipped or bounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm_trust.core.distributions import Distribution
from lm_trust.updates.adam_rule import AdamRule


class Reinforce(AdamRule):
    """The policy gradient.

    Args:
        learning_rate: Adam's; there is one step a batch.
        settings: anneal, entropy, max_grad_norm, microbatch_size, reference_loss, reference_budget and seed; see
            `AdamRule`.
    """

    def __init__(self, *, learning_rate: float = 3e-3, **settings: Any) -> None:
        super().__init__(_objective, epochs=1, minibatches=1, learning_rate=learning_rate, **settings)


def _objective(
    new: Distribution, old: Distribution, actions: Tensor, advantages: Tensor, old_log_prob: Tensor, mask: Tensor
) -> tuple[Tensor]:
    return (torch.where(mask, new.log_prob(actions), 0.0) * advantages,)

"""PPO with the adaptive KL penalty: the surrogate less beta times the exact step KL (Schulman et al. 2017, section 4).

The step KL is a preference here and not a bound: beta doubles after an update that went too far, and halves after one
that did not go far enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.batch import Batch
from lm_trust.core.distributions import Distribution
from lm_trust.core.report import StepReport
from lm_trust.core.surrogate import ratio
from lm_trust.updates.adam_rule import AdamRule


class PPOPenalty(AdamRule):
    """PPO with the adaptive KL penalty.

    Args:
        target_kl: the mean step KL that beta is steered to, nats per step.
        beta: the penalty's weight at first.
        settings: see `AdamRule`.
    """

    def __init__(self, *, target_kl: float = 0.01, beta: float = 1.0, **settings: Any) -> None:
        super().__init__(self._penalised, **settings)
        self._target_kl, self._beta = target_kl, beta

    def step(self, policy: nn.Module, batch: Batch) -> StepReport:
        """Move the policy in place, then adapt beta to how far it went; see `MinibatchAdam.step`."""
        report = super().step(policy, batch)
        report.metrics = {"kl_coefficient": self._beta, **report.metrics}
        if report.accepted:
            if report.step_kl > 1.5 * self._target_kl:
                self._beta *= 2
            elif report.step_kl < self._target_kl / 1.5:
                self._beta /= 2
        return report

    def _penalised(
        self,
        new: Distribution,
        old: Distribution,
        actions: Tensor,
        advantages: Tensor,
        old_log_prob: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor]:
        log_prob = torch.where(mask, new.log_prob(actions), 0.0)
        return (ratio(old_log_prob, log_prob) * advantages - self._beta * old.kl(new),)

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments, the shuffles' generator and beta."""
        return {"adam": super().state_dict(), "beta": self._beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        super().load_state_dict(state["adam"])
        self._beta = state["beta"]

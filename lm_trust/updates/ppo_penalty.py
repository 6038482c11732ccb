"""PPO with the adaptive KL penalty: the surrogate less beta times the exact step KL (Schulman et al. 2017, section 4).

The step KL is a preference here and not a bound: beta doubles after an update that went too far, and halves after one
that did not go far enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.batch import Batch
from lm_trust.core.distributions import Distribution
from lm_trust.core.surrogate import ratio
from lm_trust.core.trust_region import StepReport
from lm_trust.updates.minibatch_adam import MinibatchAdam, backward
from lm_trust.updates.reference_budget import ReferenceBudget


@dataclass
class PPOPenalty:
    """PPO with the adaptive KL penalty.

    Args:
        target_kl: the mean step KL that beta is steered to, nats per step.
        beta: the penalty's weight at first.
        entropy: weight of the entropy bonus.
        microbatch_size: rows differentiated at a time; changes memory, not the result.
        reference_loss: weight of the exact KL(policy || reference) in the loss.
        reference_budget: bound on that KL, nats per row (sequence); see `ReferenceBudget`.
        epochs, minibatches, learning_rate, anneal, max_grad_norm, seed: see `MinibatchAdam`.
    """

    target_kl: float = 0.01
    beta: float = 1.0
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 3e-4
    anneal: bool = False
    entropy: float = 0.0
    max_grad_norm: float | None = 0.5
    microbatch_size: int | None = None
    reference_loss: float = 0.0
    reference_budget: float | None = None
    seed: int = 0
    _adam: MinibatchAdam = field(init=False, repr=False)
    _reference: ReferenceBudget = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reference = ReferenceBudget(self.reference_budget, self.reference_loss)
        self._beta = self.beta
        self._adam = MinibatchAdam(
            learning_rate=self.learning_rate,
            anneal=self.anneal,
            epochs=self.epochs,
            minibatches=self.minibatches,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
        )

    def step(self, policy: nn.Module, batch: Batch) -> StepReport:
        """Move the policy in place, then adapt beta to how far it went; see `MinibatchAdam.step`."""

        def differentiate(minibatch: Batch, rows: int) -> bool:
            others = [minibatch.old, *self._reference.fixed(minibatch)]
            changes = backward(policy, minibatch, self._objective, others=others, microbatch_size=self.microbatch_size)
            return self._reference.go_on(minibatch, rows, changes)

        report = self._adam.step(
            policy,
            batch,
            differentiate,
            reference=self._reference,
            microbatch_size=self.microbatch_size,
        )
        report.metrics = {"kl_coefficient": self._beta, **report.metrics}
        if report.accepted:
            if report.step_kl > 1.5 * self.target_kl:
                self._beta *= 2
            elif report.step_kl < self.target_kl / 1.5:
                self._beta /= 2
        return report

    def _objective(self, new: Distribution, old: Distribution, *given: Any) -> tuple[Tensor, ...]:
        *fixed, actions, advantages, old_log_prob, mask = given
        log_prob = torch.where(mask, new.log_prob(actions), 0.0)
        each = ratio(old_log_prob, log_prob) * advantages - self._beta * old.kl(new)
        if self.entropy:
            each = each + self.entropy * new.entropy()
        return self._reference.weigh(each, new, fixed)

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments, the shuffles' generator and beta."""
        return {"adam": self._adam.state_dict(), "beta": self._beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._adam.load_state_dict(state["adam"])
        self._beta = state["beta"]

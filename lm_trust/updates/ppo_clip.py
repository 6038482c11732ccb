"""PPO-clip: epochs of minibatch Adam on the clipped surrogate (Schulman et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.batch import Batch
from lm_trust.core.distributions import Distribution, kl_estimators
from lm_trust.core.linearisation import distribution_with_pullback, knows_its_derivative, set_gradients
from lm_trust.core.processes import sum_gradients, summed
from lm_trust.core.report import StepReport
from lm_trust.core.surrogate import clipped_surrogate, clipped_surrogate_slope
from lm_trust.updates.backward import backward
from lm_trust.updates.minibatch_adam import MinibatchAdam
from lm_trust.updates.reference_budget import ReferenceBudget


@dataclass
class PPOClip:
    """PPO with the clipped surrogate.

    Args:
        clip, clip_high: see `clipped_surrogate`.
        entropy: weight of the entropy bonus.
        anneal_entropy: bring that weight linearly to zero over the training.
        target_kl: stop the epochs once a minibatch's k3 estimate is over 1.5 times this; None never stops.
        microbatch_size: rows differentiated at a time; changes memory, not the result.
        reference_loss: weight of the exact KL(policy || reference), which is taken off the objective.
        reference_budget: bound on that KL, nats per row (sequence); see `ReferenceBudget`.
        epochs, minibatches, learning_rate, anneal, max_grad_norm, seed: see `MinibatchAdam`.
    """

    clip: float = 0.2
    clip_high: float | None = None
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 3e-4
    anneal: bool = False
    entropy: float = 0.0
    anneal_entropy: bool = False
    max_grad_norm: float | None = 0.5
    target_kl: float | None = None
    microbatch_size: int | None = None
    reference_loss: float = 0.0
    reference_budget: float | None = None
    seed: int = 0
    _adam: MinibatchAdam = field(init=False, repr=False)
    _reference: ReferenceBudget = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reference = ReferenceBudget(self.reference_budget, self.reference_loss)
        self._adam = MinibatchAdam(
            learning_rate=self.learning_rate,
            anneal=self.anneal,
            epochs=self.epochs,
            minibatches=self.minibatches,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
        )

    def step(
        self, policy: nn.Module, batch: Batch, *, max_kl: float = math.inf, needs_gain: bool = False
    ) -> StepReport:
        """Move the policy in place; `max_kl` and `needs_gain` as for `MinibatchAdam.step`."""
        entropy = self.entropy * (1 - batch.progress) if self.anneal_entropy else self.entropy
        # A policy that knows its own derivative needs no autograd, as long as the objective is the surrogate alone.
        plain = knows_its_derivative(policy) and not entropy and not self._reference.weighs
        parameters = list(policy.parameters())
        clipped: list[float] = []

        def differentiate(minibatch: Batch, rows: int) -> bool:
            if plain:
                share, estimate = self._pull_back(policy, parameters, minibatch, rows)
                changes = []
            else:
                share, estimate, *changes = self._backward(policy, minibatch, entropy)
            clipped.append(share)
            within = self.target_kl is None or estimate <= 1.5 * self.target_kl
            return self._reference.go_on(minibatch, rows, changes) and within

        report = self._adam.step(
            policy,
            batch,
            differentiate,
            reference=self._reference,
            max_kl=max_kl,
            needs_gain=needs_gain,
            microbatch_size=self.microbatch_size,
            autograd=not plain,
        )
        report.metrics = {"clip_fraction": sum(clipped) / max(len(clipped), 1), **report.metrics}
        return report

    def _pull_back(
        self, policy: nn.Module, parameters: list[nn.Parameter], minibatch: Batch, rows: int
    ) -> tuple[float, float]:
        """The gradient as the sum over steps of slope * score; returns the share of clipped steps and the k3 mean.

        `rows` are those of the minibatch in all processes, `minibatch` are this one's.
        """
        distribution, pullback = distribution_with_pullback(policy, minibatch.observations)
        old_log_prob, log_prob = minibatch.old_log_prob, distribution.log_prob(minibatch.actions)
        slope, outside = clipped_surrogate_slope(
            old_log_prob, log_prob, minibatch.advantages, clip=self.clip, clip_high=self.clip_high
        )
        mask = minibatch.mask
        steps_a_row = math.prod(minibatch.advantages.shape[1:])
        count = rows * steps_a_row if mask is None else summed(mask.sum()).clamp_min(1)
        slope = (slope / -count).unsqueeze(-1)
        cotangents = [slope * part for part in distribution.score(minibatch.actions)]
        statistics = [outside.to(slope.dtype)]
        if self.target_kl is not None:
            statistics.append(kl_estimators(old_log_prob, log_prob)["k3"])
        if mask is not None:  # a masked step may hold anything
            cotangents = [torch.where(mask.unsqueeze(-1), part, 0.0) for part in cotangents]
            statistics = [torch.where(mask, each, 0.0) for each in statistics]
        set_gradients(parameters, pullback(*cotangents))
        sum_gradients(parameters)
        share, *estimate = summed(torch.stack([each.sum() for each in statistics]) / count).tolist()
        return share, estimate[0] if estimate else 0.0

    def _backward(self, policy: nn.Module, minibatch: Batch, entropy: float) -> list[float]:
        """The same by autograd, with every term of the objective; with a budget also the reference KL's mean change."""

        def objective(new: Distribution, *given: Any) -> tuple[Tensor, ...]:
            *fixed, actions, advantages, old_log_prob, mask = given
            log_prob = torch.where(mask, new.log_prob(actions), 0.0)
            each = clipped_surrogate(old_log_prob, log_prob, advantages, clip=self.clip, clip_high=self.clip_high)
            if entropy:
                each = each + entropy * new.entropy()
            each, *changes = self._reference.weigh(each, new, fixed)
            _, outside = clipped_surrogate_slope(
                old_log_prob, log_prob.detach(), advantages, clip=self.clip, clip_high=self.clip_high
            )
            return each, outside.to(each.dtype), kl_estimators(old_log_prob, log_prob.detach())["k3"], *changes

        others = self._reference.fixed(minibatch)
        return backward(policy, minibatch, objective, others=others, microbatch_size=self.microbatch_size)

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments and the shuffles' generator."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._adam.load_state_dict(state)

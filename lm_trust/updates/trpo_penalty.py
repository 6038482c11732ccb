"""The lower bound on the return, maximised: the surrogate less C times the largest step KL.

Schulman et al. 2015, theorem 1 and algorithm 1, for all policies (Kakade and Langford 2002 for mixtures of two):

    return(new) >= return(old) + L(new) - C max_s KL(old || new),  C = 4 epsilon gamma / (1 - gamma)^2,

with epsilon = max |A(s, a)|. There L sums gamma^t over the steps of an episode; the mean over steps that an update rule
maximises is (1 - gamma) L, and C counts there as (1 - gamma) C. Maxima are taken over the steps of the batch: over all
states nobody can. A move is kept only where the bound is positive, so that theory, as far as the samples bear it,
promises an improvement; with its own C the steps are minute, and a smaller one is what practice takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.batch import Batch
from lm_trust.core.distributions import Distribution, per_step
from lm_trust.core.passes import passes
from lm_trust.core.processes import gathered, largest, process_index, summed
from lm_trust.core.report import StepReport
from lm_trust.core.rows import select_rows
from lm_trust.core.surrogate import ratio
from lm_trust.updates.adam_rule import AdamRule


class TRPOPenalty(AdamRule):
    """The surrogate less a multiple of the largest step KL, by Adam; shortened until the whole is positive.

    The gradient of a minibatch takes the largest step KL of that minibatch; the move is judged by that of the batch.

    Args:
        coefficient: objective units per nat of the largest step KL; None: (1 - gamma) C, anew for each batch.
        gamma: the discount that C knows of.
        settings: see `AdamRule`.

    Raises:
        ValueError: no coefficient, and a gamma for which C is infinite.
    """

    def __init__(self, *, coefficient: float | None = 1.0, gamma: float = 0.99, **settings: Any) -> None:
        if coefficient is None and gamma >= 1:
            raise ValueError(f"the theoretical coefficient is infinite at gamma {gamma}; give one")
        super().__init__(self._penalised, prepare=self._furthest, **settings)
        self._given, self._gamma = coefficient, gamma
        self._coefficient = 0.0

    def step(self, policy: nn.Module, batch: Batch) -> StepReport:
        """Move the policy in place; see `MinibatchAdam.step`."""
        if self._given is None:
            advantages = batch.advantages if batch.mask is None else batch.advantages[batch.mask]
            epsilon = largest(advantages.abs().max() if advantages.numel() else advantages.new_zeros(())).item()
            self._coefficient = (1 - self._gamma) * theoretical_coefficient(epsilon, self._gamma)
        else:
            self._coefficient = self._given
        report = super().step(policy, batch, needs_gain=True, price=self._coefficient)
        bound = report.surrogate_gain - self._coefficient * report.step_kl_max
        report.metrics = {
            "kl_coefficient": self._coefficient,
            "lower_bound": bound,
            **report.metrics,
            "forwards_computed": report.metrics["gradients_computed"],  # `_furthest`'s, before each
        }
        return report

    @torch.no_grad()
    def _furthest(self, policy: nn.Module, minibatch: Batch) -> Sequence[Tensor]:
        """The weight of each step's KL in the mean over steps: N at the step that is furthest off, else 0."""
        mask = torch.ones_like(minibatch.advantages, dtype=torch.bool) if minibatch.mask is None else minibatch.mask
        parts = [
            per_step(
                lambda new, old: old.kl(new),
                [policy.distribution(select_rows(minibatch.observations, rows)), minibatch.old[rows]],
            )
            for rows in passes(policy, len(minibatch), self._microbatch_size) or [slice(0)]
        ]
        step_kl = torch.where(mask, torch.cat(parts), -1.0)
        weights = torch.zeros_like(step_kl)
        steps = summed(mask.sum())
        # Several processes may have it, as where they hold rows of one prompt: the first of them counts.
        furthest = gathered(step_kl.max().item() if step_kl.numel() else -math.inf)
        if furthest.index(max(furthest)) == process_index() and step_kl.numel():
            weights.view(-1)[step_kl.argmax()] = steps
        return (weights,)

    def _penalised(
        self,
        new: Distribution,
        old: Distribution,
        actions: Tensor,
        advantages: Tensor,
        old_log_prob: Tensor,
        mask: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor]:
        log_prob = torch.where(mask, new.log_prob(actions), 0.0)
        return (ratio(old_log_prob, log_prob) * advantages - self._coefficient * weights * old.kl(new),)


def theoretical_coefficient(epsilon: float, gamma: float) -> float:
    """C = 4 epsilon gamma / (1 - gamma)^2 (Schulman et al. 2015, equation 9), in units of L per nat."""
    return 4 * epsilon * gamma / (1 - gamma) ** 2

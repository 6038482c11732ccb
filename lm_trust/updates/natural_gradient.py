"""The natural policy gradient: a fixed multiple of F^-1 g (Amari 1998; Kakade 2001).

What TRPO is without its bound and its line search: a length that suits one batch may be far too long for the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from lm_trust.core.batch import Batch
from lm_trust.core.natural_gradient import natural_gradient
from lm_trust.core.objective import SurrogateObjective
from lm_trust.core.parameters import trainable_parameters
from lm_trust.core.report import StepReport
from lm_trust.core.trust_region import line_search


@dataclass
class NaturalGradient:
    """The step theta + step_size * (F + damping I)^-1 g.

    Args:
        step_size: the multiple.
        anneal: bring it linearly to zero over the training.
        damping, cg_iterations, fisher_fraction, fisher_method, microbatch_size, reference_loss: see
            `trust_region_step`.
    """

    step_size: float = 0.1
    anneal: bool = False
    damping: float = 0.1
    cg_iterations: int = 10
    fisher_fraction: float = 1.0
    fisher_method: str = "auto"
    microbatch_size: int | None = None
    reference_loss: float = 0.0

    def step(self, policy: nn.Module, batch: Batch) -> StepReport:
        """Move the policy in place and measure the move; only numbers that are not finite take it back."""
        parameters = trainable_parameters(policy)
        objective = SurrogateObjective(
            policy,
            batch.observations,
            batch.actions,
            batch.advantages,
            mask=batch.mask,
            reference=batch.reference,
            reference_loss=self.reference_loss,
            microbatch_size=self.microbatch_size,
        )
        direction, report = natural_gradient(
            objective,
            batch.observations,
            parameters,
            damping=self.damping,
            cg_iterations=self.cg_iterations,
            fisher_fraction=self.fisher_fraction,
            fisher_method=self.fisher_method,
            microbatch_size=self.microbatch_size,
        )
        if direction is None:
            return report
        step_size = self.step_size * (1 - batch.progress) if self.anneal else self.step_size
        move = step_size * direction.size * direction.solved.solution
        report.metrics["step_size"] = step_size
        return line_search(  # among one candidate: it measures, and restores where a number is not finite
            objective,
            parameters,
            move,
            report,
            full_gain=direction.gradient.dot(move).item(),
            max_kl=math.inf,
            backtrack_ratio=1.0,
            max_backtracks=0,
            first_backtracks=0,
            accept_ratio=0.0,
            needs_gain=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: each step stands alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""

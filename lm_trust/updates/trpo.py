"""TRPO: one natural-gradient step to the edge of an exact KL bound (Schulman et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lm_trust.core.batch import Batch
from lm_trust.core.preconditioner import Preconditioner
from lm_trust.core.report import StepReport
from lm_trust.core.trust_region import trust_region_step


@dataclass
class TRPO:
    """The trust-region step of the core as an update rule; see `trust_region_step` for each setting.

    `anneal` brings max_kl linearly to zero over the training; the bound in force is in the report's metrics.
    """

    max_kl: float = 0.01
    anneal: bool = False
    damping: float = 0.1
    cg_iterations: int = 10
    preconditioner: Preconditioner = None
    backtrack_ratio: float = 0.8
    max_backtracks: int = 10
    accept_ratio: float = 0.0
    fisher_fraction: float = 1.0
    fisher_method: str = "auto"
    holdout_fraction: float = 0.0
    microbatch_size: int | None = None
    reference_loss: float = 0.0
    reference_budget: float | None = None
    _first_backtracks: int = field(default=0, init=False, repr=False)

    def step(self, policy: nn.Module, batch: Batch) -> StepReport:
        """Move the policy in place; the surrogate's old distribution is the policy as it comes."""
        max_kl = self.max_kl * (1 - batch.progress) if self.anneal else self.max_kl
        report = trust_region_step(
            policy,
            batch.observations,
            batch.actions,
            batch.advantages,
            mask=batch.mask,
            max_kl=max_kl,
            damping=self.damping,
            cg_iterations=self.cg_iterations,
            preconditioner=self.preconditioner,
            backtrack_ratio=self.backtrack_ratio,
            max_backtracks=self.max_backtracks,
            first_backtracks=self._first_backtracks,
            accept_ratio=self.accept_ratio,
            fisher_fraction=self.fisher_fraction,
            fisher_method=self.fisher_method,
            holdout_fraction=self.holdout_fraction,
            microbatch_size=self.microbatch_size,
            reference=batch.reference,
            reference_loss=self.reference_loss,
            reference_budget=self.reference_budget,
        )
        report.metrics["max_kl"] = max_kl
        self._first_backtracks = self._next_first_backtracks(report, max_kl)
        return report

    def _next_first_backtracks(self, report: StepReport, max_kl: float) -> int:
        """Where the next line search starts: where this one ended, or one longer where the bound left room for it.

        Steps in a row overshoot alike, and each candidate that fails costs a pass over the whole batch.
        """
        if not report.accepted:
            return 0
        room = report.step_kl <= max_kl * self.backtrack_ratio**2
        return max(report.backtracks - room, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the next line search starts."""
        return {"first_backtracks": self._first_backtracks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._first_backtracks = state["first_backtracks"]

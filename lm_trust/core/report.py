"""What one update says of itself: the certificate that every update rule returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class StepReport:
    """The certificate of one update.

    Attributes:
        accepted: whether the step was kept.
        reason: "accepted", or why not: "zero_gradient", "non_finite", "negative_curvature", "kl_exceeded",
            "budget_exceeded", "no_improvement".
        step_kl: mean exact KL(old || new) over valid steps, nats per step; 0.0 after a rejection.
        step_kl_max: its maximum over valid steps.
        surrogate_gain: measured change of the mean surrogate objective; 0.0 after a rejection.
        predicted_gain: what the linear model foretold for the step taken; None where a rule predicts nothing.
        backtracks: how many times the step was shortened by the backtrack ratio; not all of the lengths between are
            tried.
        candidates: steps that were measured, each by a forward pass over the batch.
        step_fraction: the share of the full step that was taken; 0.0 after a rejection.
        cg_iterations: Fisher products spent.
        cg_residual: |g - (F + damping I) x| / |g|.
        cg_stopped: why conjugate gradient stopped (see `conjugate_gradient`); "" where a rule has none.
        gradient_norm: |g| of the surrogate objective.
        metrics: a rule's own numbers and words for the log; where the objective or a budget looks at the reference KL,
            "reference_kl_after" in nats per row, and with a budget "constraint" (see `TwoConstraintStep.case`).
    """

    accepted: bool
    reason: str
    step_kl: float = 0.0
    step_kl_max: float = 0.0
    surrogate_gain: float = 0.0
    predicted_gain: float | None = 0.0
    backtracks: int = 0
    candidates: int = 0
    step_fraction: float = 0.0
    cg_iterations: int = 0
    cg_residual: float = 0.0
    cg_stopped: str = ""
    gradient_norm: float = 0.0
    metrics: dict[str, float | str] = field(default_factory=dict)

    def as_metrics(self) -> dict[str, Any]:
        """One flat dictionary for the log."""
        values = asdict(self)
        return values | values.pop("metrics")

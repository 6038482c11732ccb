"""The natural gradient of an objective, F^-1 g by conjugate gradient (Amari 1998, Kakade 2001), and why there is none.

Every second-order rule steps along it; how far is what tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.batch import spread_rows
from lm_trust.core.conjugate_gradient import ConjugateGradientResult, conjugate_gradient
from lm_trust.core.fisher import FisherOperator, forbids_second_derivative
from lm_trust.core.linearisation import knows_its_derivative
from lm_trust.core.objective import RowIndex, SurrogateObjective
from lm_trust.core.passes import is_sharded
from lm_trust.core.preconditioner import Preconditioner, gradient_preconditioner
from lm_trust.core.report import StepReport
from lm_trust.core.rows import select_rows


@dataclass(frozen=True)
class AscentDirection:
    """A direction of ascent, at a size at which no square can overflow.

    Attributes:
        gradient: (P,) of the objective.
        size: its largest element.
        unit: (P,) gradient / size.
        solved: (F + damping I)^-1 unit; its curvature, undamped, is positive.
        solve: the same for any right-hand side (P,).
    """

    gradient: Tensor
    size: float
    unit: Tensor
    solved: ConjugateGradientResult
    solve: Callable[[Tensor], ConjugateGradientResult]


def natural_gradient(
    objective: SurrogateObjective,
    observations: Any,
    parameters: Sequence[nn.Parameter],
    *,
    damping: float,
    cg_iterations: int,
    fisher_fraction: float,
    fisher_method: str,
    microbatch_size: int | None,
    cg_tolerance: float = 1e-10,
    preconditioner: Preconditioner = None,
) -> tuple[AscentDirection | None, StepReport]:
    """The direction at the present parameters, which become theta_old of the objective.

    Args:
        objective: over the rows of `observations`.
        parameters: the trainable ones of the objective's policy.
        damping, cg_iterations, fisher_fraction, fisher_method, microbatch_size, cg_tolerance, preconditioner: as for
            `trust_region_step`.

    Returns:
        The direction, or None where there is none; and a report, not accepted, with its numbers and, where there is
        none, the reason.

    Raises:
        ValueError: fewer than 1 cg_iterations, a fisher_fraction outside of (0, 1] or a negative damping.
    """
    if cg_iterations < 1:
        raise ValueError(f"cg_iterations must be 1 or more, got {cg_iterations}")
    if not 0 < fisher_fraction <= 1:
        raise ValueError(f"fisher_fraction must be more than 0 and at most 1, got {fisher_fraction}")
    if not damping >= 0:
        raise ValueError(f"damping must be 0 or more, got {damping}")
    rows: RowIndex = slice(None)
    if fisher_fraction < 1:
        rows = objective.placed.own(spread_rows(objective.placed.total, fisher_fraction))
    shared = rows if _can_share(objective.policy, fisher_method, len(objective.mask[rows]), microbatch_size) else None
    gradient, fisher_method = _gradient(objective, list(parameters), shared, fisher_method)
    gradient_norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()  # squares may not fit into less
    known = {} if objective.reference_kl is None else {"reference_kl_after": objective.reference_kl}
    largest = gradient.abs().max()
    if not torch.isfinite(largest):
        return None, StepReport(False, "non_finite", gradient_norm=gradient_norm, metrics=known)
    if largest == 0:
        return None, StepReport(False, "zero_gradient", metrics=known)

    fisher = FisherOperator(
        objective.policy,
        observations if fisher_fraction >= 1 else select_rows(observations, rows),
        mask=objective.mask[rows],
        method=fisher_method,
        linearisation=objective.linearisation,
        microbatch_size=microbatch_size,
    )

    unit = gradient / largest
    if preconditioner == "gradient":
        preconditioner = gradient_preconditioner(unit, parameters)

    def solve(right_hand_side: Tensor) -> ConjugateGradientResult:
        return conjugate_gradient(
            fisher.undamped,
            right_hand_side,
            max_iterations=cg_iterations,
            tolerance=cg_tolerance,
            damping=damping,
            preconditioner=preconditioner,
        )

    solved = solve(unit)
    report = StepReport(
        False,
        "non_finite",
        cg_iterations=solved.iterations,
        cg_residual=solved.residual_norm / unit.norm().item(),
        cg_stopped=solved.stopped,
        gradient_norm=gradient_norm,
        metrics=known,
    )
    if solved.stopped == "non_finite":
        return None, report
    # What was solved before a negative curvature showed is still an ascent direction (truncated Newton); it goes on
    # where the Fisher is positive along it.
    if not solved.curvature > 0:
        report.reason = "negative_curvature"
        return None, report
    return AscentDirection(gradient, largest.item(), unit, solved, solve), report


def _gradient(
    objective: SurrogateObjective, parameters: list[nn.Parameter], shared: RowIndex | None, fisher_method: str
) -> tuple[Tensor, str]:
    """The objective's gradient, sharing its passes where it can, and the Fisher method that is left."""
    try:
        return objective.gradient(parameters, linearise=shared), fisher_method
    except RuntimeError as error:
        if shared is None or fisher_method != "auto" or not forbids_second_derivative(error):
            raise
    # Not within the except: the error holds the graph that it came from.
    return objective.gradient(parameters), "finite_difference"


def _can_share(policy: nn.Module, fisher_method: str, rows: int, microbatch_size: int | None) -> bool:
    """Whether the gradient's passes over the Fisher's rows can be those that the Fisher keeps.

    Not where it keeps none, and not in half precision: the attention kernel that can be differentiated twice rounds
    otherwise there than the one that candidates are measured with, and theta_old must be measured as they are.
    """
    return (
        fisher_method in ("auto", "gauss_newton")
        and not knows_its_derivative(policy)
        and not is_sharded(policy)
        and getattr(policy, "autocast", None) is None
        and 0 < rows <= (microbatch_size or rows)
    )

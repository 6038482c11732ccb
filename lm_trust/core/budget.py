"""The budget of the reference KL beside a trust region: which full step to try, and what the line search may accept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_trust.core.conjugate_gradient import ConjugateGradientResult
from lm_trust.core.objective import SurrogateObjective
from lm_trust.core.two_constraints import Case, two_constraint_step


@dataclass(frozen=True)
class BoundedStep:
    """A full step under both constraints.

    Attributes:
        step: (P,); not finite where the reference KL or its gradient is not.
        case: see `TwoConstraintStep`.
        limit: the largest exact reference KL that the line search may accept, nats per row.
        needs_gain: whether the surrogate must improve; not on the way back to the budget.
        cg_iterations: Fisher products spent beyond those of the plain step.
    """

    step: Tensor
    case: Case
    limit: float
    needs_gain: bool
    cg_iterations: int = 0


def step_within_budget(
    objective: SurrogateObjective,
    unit: Tensor,
    solved: ConjugateGradientResult,
    solve: Callable[[Tensor], ConjugateGradientResult],
    *,
    max_kl: float,
    budget: float,
) -> BoundedStep:
    """The plain trust-region step where it keeps the budget, else the two-constraint step.

    A purely linear model of the reference KL would see no cost at all at the start, where its gradient is zero. But its
    own curvature is known: that of KL(. || reference), summed over a row, is about steps-per-row times the Fisher. So a
    step of max_kl nats a step adds about max_kl * steps_per_row beyond its slope, whatever its direction, and that much
    is taken off the room that the budget leaves.

    Args:
        objective: at theta_old, bounded.
        unit: (P,) the surrogate's gradient at any size.
        solved: `solve(unit)`, with a positive curvature.
        solve: (F + damping I)^-1 by conjugate gradient.
        max_kl: nats per step.
        budget: nats per row.
    """
    reference_kl, cost_gradient = objective.reference_kl, objective.reference_gradient
    scale = cost_gradient.abs().max().item()
    over = reference_kl > budget

    def bounded(step: Tensor, case: Case, cg_iterations: int = 0) -> BoundedStep:
        back = over or case == "recovery"
        limit = reference_limit(reference_kl, budget, must_fall=back)
        return BoundedStep(step, case, limit, needs_gain=not back, cg_iterations=cg_iterations)

    # A step KL beyond this would by itself be over the budget, from the reference on.
    radius = min(max_kl, budget / objective.steps_per_row)
    plain = math.sqrt(2 * radius / solved.curvature) * solved.solution
    if not math.isfinite(reference_kl + scale):
        return bounded(torch.full_like(plain, math.nan), "inactive")
    slack = reference_kl + radius * objective.steps_per_row - budget
    if scale == 0 or near_reference(reference_kl, budget) or slack + cost_gradient.dot(plain).item() <= 0:
        return bounded(plain, "inactive")
    unit_cost = cost_gradient / scale
    v, w = solved, solve(unit_cost)
    step = two_constraint_step(
        gv=unit.dot(v.solution).item(),
        gw=unit.dot(w.solution).item(),
        bv=unit_cost.dot(v.solution).item(),
        bw=unit_cost.dot(w.solution).item(),
        vHv=v.curvature,
        vHw=v.product.dot(w.solution).item(),
        wHw=w.curvature,
        slack=slack / scale,
        max_kl=radius,
    )
    return bounded(step.along_v * v.solution + step.along_w * w.solution, step.case, w.iterations)


def near_reference(reference_kl: float, budget: float) -> bool:
    """Whether a policy is so near to the reference that its KL's gradient says little but how numbers are rounded.

    At a thousandth of the budget its slope adds at most 2 sqrt(1 / 1000) of it, a sixteenth, to a step of the whole
    budget: the root of a KL is a distance, and sqrt(kl) + sqrt(budget) the furthest that such a step leads.
    """
    return reference_kl <= 1e-3 * budget


def reference_limit(reference_kl: float, budget: float, *, must_fall: bool) -> float:
    """The largest reference KL that a step may lead to: the budget or, where it must fall, just below what it is."""
    return math.nextafter(reference_kl, -math.inf) if must_fall else budget

"""The trust-region step: gradient, conjugate gradient, scale, line search, report.

One function for both worlds. It maximises the surrogate E[pi(a|s) / pi_old(a|s) A] (Schulman et al. 2015, eq. 14)
subject to a bound on the mean exact KL(pi_old || pi), and it never leaves a policy worse or further off than promised:
a candidate is accepted only where the exact KL, over all valid steps, is within the bound *and* the surrogate improves.
A second bound, on the exact KL to a reference policy, can be added; then the step is that of constrained policy
optimisation (Achiam et al. 2017), and the line search checks both.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.budget import step_within_budget
from lm_trust.core.distributions import Distribution
from lm_trust.core.natural_gradient import natural_gradient
from lm_trust.core.objective import SurrogateObjective
from lm_trust.core.parameters import assign, flatten, trainable_parameters
from lm_trust.core.preconditioner import Preconditioner
from lm_trust.core.report import StepReport


def trust_region_step(
    policy: nn.Module,
    observations: Any,
    actions: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    max_kl: float = 0.01,
    damping: float = 0.1,
    cg_iterations: int = 10,
    cg_tolerance: float = 1e-10,
    backtrack_ratio: float = 0.8,
    max_backtracks: int = 10,
    first_backtracks: int = 0,
    accept_ratio: float = 0.0,
    fisher_fraction: float = 1.0,
    fisher_method: str = "auto",
    holdout_fraction: float = 0.0,
    microbatch_size: int | None = None,
    preconditioner: Preconditioner = None,
    reference: Distribution | None = None,
    reference_loss: float = 0.0,
    reference_budget: float | None = None,
) -> StepReport:
    """Take one trust-region step in place (TRPO, Schulman et al. 2015, appendix C).

    The step is sqrt(2 max_kl / x'Fx) x with x from conjugate gradient on (F + damping I) x = g and with the *undamped*
    curvature, so that the quadratic model's KL is max_kl; it is then shortened by backtrack_ratio until the exact mean
    KL over all valid steps is at most max_kl and the surrogate improves.

    Args:
        policy: a module with `distribution(observations)`; its parameters with requires_grad move. Whatever its mode,
            dropout rests and batch statistics are those of evaluation while it is asked here.
        observations: what the policy takes; B rows, selected by `[rows]` where only some are wanted (of a dictionary or
            a tuple, its parts').
        actions: (B, T), (B, T, A), (N,) or (N, A); where masked, anything.
        advantages: (B, T) or (N,).
        mask: like advantages, True (or 1) at real actions; None counts all.
        max_kl: bound on the mean exact KL(old || new), nats per step.
        damping: added to the Fisher's diagonal while solving.
        cg_iterations, cg_tolerance: see `conjugate_gradient`.
        preconditioner: as there; or "gradient", see `gradient_preconditioner`.
        backtrack_ratio, max_backtracks: the line search tries fractions backtrack_ratio ** k, k = 0..max_backtracks.
        first_backtracks: the first k; a caller that remembers what the last step needed saves passes over the batch.
        accept_ratio: least measured gain over predicted gain.
        fisher_fraction: share of the rows, evenly spread, that the Fisher is taken over.
        fisher_method: see `FisherOperator`.
        holdout_fraction: share of the rows, the last ones, on which alone the gain is measured; the gradient is that of
            the others. A gain on the batch that made the direction overstates. Both KLs are of all rows.
        microbatch_size: rows computed at a time; changes memory, not the result.
        reference, reference_loss: subtract reference_loss * KL(new || reference), exact, from the objective.
        reference_budget: bound on the exact KL(new || reference), nats per row (sequence): the sum over a row's valid
            steps, its mean over rows. A policy that is over it already must come closer to the reference, whatever
            the surrogate does (only where the surrogate's gradient is exactly zero is there no step at all).

    Returns:
        The report. Where it says not accepted, the parameters are bit-identical to before.

    Raises:
        ValueError: a max_kl that is negative or not finite, fewer than 1 cg_iterations, a backtrack_ratio outside of
            (0, 1), a fisher_fraction outside of (0, 1], a negative damping or negative max_backtracks, a budget that is
            not positive; a reference_loss or a budget without a reference; a holdout that leaves no row on one side;
            or shapes of observations, actions, advantages and mask that do not belong together.
        TypeError: the policy's distribution lacks some of what `Distribution` names; or actions, advantages or mask are
            no tensors.
    """
    if not 0 <= max_kl < math.inf:  # 0 is what an annealed bound comes to
        raise ValueError(f"max_kl must be 0 or more, and finite, got {max_kl}")
    if not 0 < backtrack_ratio < 1:
        raise ValueError(f"backtrack_ratio must be between 0 and 1, got {backtrack_ratio}")
    if max_backtracks < 0:
        raise ValueError(f"max_backtracks must be 0 or more, got {max_backtracks}")
    if reference_budget is not None and not reference_budget > 0:
        raise ValueError(f"reference_budget must be more than 0, got {reference_budget}")
    parameters = trainable_parameters(policy)
    objective = SurrogateObjective(
        policy,
        observations,
        actions,
        advantages,
        mask=mask,
        reference=reference,
        reference_loss=reference_loss,
        bounded=reference_budget is not None,
        holdout_fraction=holdout_fraction,
        microbatch_size=microbatch_size,
    )
    direction, report = natural_gradient(
        objective,
        observations,
        parameters,
        damping=damping,
        cg_iterations=cg_iterations,
        cg_tolerance=cg_tolerance,
        fisher_fraction=fisher_fraction,
        fisher_method=fisher_method,
        microbatch_size=microbatch_size,
        preconditioner=preconditioner,
    )
    if direction is None:
        return report
    unit, solved = direction.unit, direction.solved
    limit, needs_gain = math.inf, True
    if reference_budget is None:
        full_step = math.sqrt(2 * max_kl / solved.curvature) * solved.solution
    else:
        bounded = step_within_budget(objective, unit, solved, direction.solve, max_kl=max_kl, budget=reference_budget)
        full_step, limit, needs_gain = bounded.step, bounded.limit, bounded.needs_gain
        report.cg_iterations += bounded.cg_iterations
        report.metrics["constraint"] = bounded.case
    if not torch.isfinite(full_step).all():
        return report
    full_gain = direction.gradient.dot(full_step).item()
    return line_search(
        objective,
        parameters,
        full_step,
        report,
        full_gain=full_gain,
        max_kl=max_kl,
        backtrack_ratio=backtrack_ratio,
        max_backtracks=max_backtracks,
        first_backtracks=first_backtracks,
        accept_ratio=accept_ratio,
        reference_limit=limit,
        needs_gain=needs_gain,
    )


@torch.no_grad()
def line_search(
    objective: SurrogateObjective,
    parameters: list[nn.Parameter],
    full_step: Tensor,
    report: StepReport,
    *,
    full_gain: float | None,
    max_kl: float,
    backtrack_ratio: float,
    max_backtracks: int,
    first_backtracks: int,
    accept_ratio: float,
    reference_limit: float = math.inf,
    needs_gain: bool = True,
    price: float = 0.0,
) -> StepReport:
    """Shorten `full_step` until the exact KLs are within their bounds and the surrogate improves; else restore.

    Args:
        objective: holds theta_old's distribution (its `gradient` or its `start_from` has been called).
        parameters: at theta_old; moved in place.
        full_step: (P,).
        report: is filled in and returned.
        full_gain: the linear model's gain for the full step; None where there is no model.
        max_kl, backtrack_ratio, max_backtracks, first_backtracks, accept_ratio: as for `trust_region_step`.
        reference_limit: the largest exact reference KL to accept, nats per row.
        needs_gain: whether the surrogate must improve.
        price: of a nat of the largest step KL, in objective units: so much must the improvement be worth.
    """
    if not full_step.any():  # of a bound of zero: candidates would be told from theta_old by rounding alone
        report.reason = "no_improvement"
        return report
    start = [parameter.detach().clone() for parameter in parameters]
    theta = flatten(start)
    backtracks = min(first_backtracks, max_backtracks)
    try:
        while backtracks <= max_backtracks:
            fraction = backtrack_ratio**backtracks
            assign(parameters, theta + fraction * full_step)
            found = objective.measure()
            report.backtracks, report.candidates = backtracks, objective.candidates
            further = 1
            if not found.finite:
                report.reason = "non_finite"
            elif found.step_kl > max_kl:
                report.reason = "kl_exceeded"
                # KL grows with the square of the step: fractions that this rules out are not worth a pass each.
                share = max(max_kl / found.step_kl, sys.float_info.min)
                further = max(1, math.floor(math.log(share) / (2 * math.log(backtrack_ratio))))
                # It may grow faster than that: the last fraction is tried before giving up.
                further = min(further, max(1, max_backtracks - backtracks))
            elif found.reference_kl is not None and found.reference_kl > reference_limit:
                report.reason = "budget_exceeded"
            elif needs_gain and not found.improves(price, accept_ratio * fraction * (full_gain or 0.0)):
                report.reason = "no_improvement"
            else:
                report.accepted, report.reason = True, "accepted"
                report.step_kl, report.step_kl_max, report.surrogate_gain = found.step_kl, found.step_kl_max, found.gain
                report.predicted_gain = None if full_gain is None else fraction * full_gain
                report.step_fraction = fraction
                if found.reference_kl is not None:
                    report.metrics["reference_kl_after"] = found.reference_kl
                return report
            backtracks += further
        return report
    finally:
        # Also where a candidate raised, so that no error leaves the policy at a step that nobody accepted.
        if not report.accepted:
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)

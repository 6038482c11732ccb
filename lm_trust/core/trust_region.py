"""The trust-region step: gradient, conjugate gradient, scale, line search, report.

One function for both worlds. It maximises the surrogate E[pi(a|s) / pi_old(a|s) A] (Schulman et al. 2015, eq. 14)
subject to a bound on the mean exact KL(pi_old || pi), and it never leaves a policy worse or further off than promised:
a candidate is accepted only where the exact KL, over all valid steps, is within the bound *and* the surrogate improves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.batch import row_chunks, spread_rows
from lm_trust.core.conjugate_gradient import conjugate_gradient
from lm_trust.core.distributions import Distribution, per_step
from lm_trust.core.fisher import FisherOperator
from lm_trust.core.parameters import assign, flatten, trainable_parameters
from lm_trust.core.surrogate import ratio


@dataclass
class StepReport:
    """The certificate of one update.

    Attributes:
        accepted: whether the parameters moved.
        reason: "accepted", or why not: "zero_gradient", "non_finite", "negative_curvature", "kl_exceeded",
            "no_improvement".
        step_kl: mean exact KL(old || new) over valid steps, nats per step; 0.0 after a rejection.
        step_kl_max: its maximum over valid steps.
        surrogate_gain: measured change of the mean surrogate objective; 0.0 after a rejection.
        predicted_gain: what the linear model foretold for the step taken; None where a rule predicts nothing.
        backtracks: how many times the step was shortened by the backtrack ratio.
        step_fraction: the share of the full step that was taken; 0.0 after a rejection.
        cg_iterations: Fisher products spent.
        cg_residual: |g - (F + damping I) x| / |g|.
        cg_stopped: why conjugate gradient stopped (see `conjugate_gradient`); "" where a rule has none.
        gradient_norm: |g| of the surrogate objective.
        metrics: a rule's own numbers for the log.
    """

    accepted: bool
    reason: str
    step_kl: float = 0.0
    step_kl_max: float = 0.0
    surrogate_gain: float = 0.0
    predicted_gain: float | None = 0.0
    backtracks: int = 0
    step_fraction: float = 0.0
    cg_iterations: int = 0
    cg_residual: float = 0.0
    cg_stopped: str = ""
    gradient_norm: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def as_metrics(self) -> dict[str, Any]:
        """One flat dictionary for the log."""
        values = asdict(self)
        return values | values.pop("metrics")


class SurrogateObjective:
    """The surrogate at theta_old and at candidates, with the exact step KL, over all valid steps of a batch.

    objective = mean over valid steps of ratio * advantage - reference_loss * KL(pi_theta || reference).

    Made by one differentiated pass at theta_old: it holds the old distribution, so the ratio there is exactly 1.

    Args:
        policy, observations, actions, advantages, mask: as for `trust_region_step`.
        reference: a fixed distribution at the same steps.
        reference_loss: weight of the exact KL to it, in objective units per nat.
        microbatch_size: rows computed at a time; the sums are those of the whole batch.
    """

    def __init__(
        self,
        policy: nn.Module,
        observations: Any,
        actions: Tensor,
        advantages: Tensor,
        *,
        mask: Tensor | None = None,
        reference: Distribution | None = None,
        reference_loss: float = 0.0,
        microbatch_size: int | None = None,
    ) -> None:
        self.policy = policy
        self.mask = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
        self._observations = observations
        self._actions = actions
        self._advantages = torch.where(self.mask, advantages, 0.0)
        self._reference = reference if reference_loss else None
        self._reference_loss = reference_loss
        self._count = self.mask.sum().clamp_min(1)
        self._chunks = list(row_chunks(len(actions), microbatch_size))
        self._old: list[Distribution] = []
        self._start = 0.0

    @torch.no_grad()
    def start_from(self, old: Distribution) -> None:
        """Take `old` (B rows, detached) as theta_old's distribution, for a rule that needs no gradient from here."""
        self._old = [old[rows] for rows in self._chunks]
        self._start = sum(
            self._mean(self._per_step(_at_start, rows, piece))
            for rows, piece in zip(self._chunks, self._old, strict=True)
        ).item()

    def gradient(self, parameters: list[nn.Parameter]) -> Tensor:
        """(P,) gradient of the objective at the present parameters, which become theta_old."""
        self._old, self._start, total = [], 0.0, None
        for rows in self._chunks:
            with torch.enable_grad():
                distribution = self.policy.distribution(self._select(rows))
                objective = self._mean(self._per_step(_at_start, rows, distribution))
                gradient = flatten(torch.autograd.grad(objective, parameters, materialize_grads=True))
            self._old.append(distribution.detach())
            self._start += objective.item()
            total = gradient if total is None else total + gradient
        return total

    @torch.no_grad()
    def measure(self) -> tuple[float, float, float]:
        """Gain of the objective over theta_old, mean and maximum exact step KL in nats, at the present parameters."""
        value, mean_kl, max_kl = 0.0, 0.0, 0.0
        for rows, old in zip(self._chunks, self._old, strict=True):
            distribution = self.policy.distribution(self._select(rows))
            objective, kl = self._per_step(_at_candidate, rows, distribution, old)
            value += self._mean(objective).item()
            mean_kl += self._mean(kl).item()
            largest = kl.max().item() if kl.numel() else 0.0
            max_kl = largest if math.isnan(largest) else max(max_kl, largest)
        return value - self._start, mean_kl, max_kl

    def _per_step(self, function: Callable[..., Any], rows: slice, *distributions: Distribution) -> Any:
        if self._reference is not None:
            distributions = (*distributions, self._reference[rows])
            function = partial(function, reference_loss=self._reference_loss)
        return per_step(
            lambda *given: function(given[: len(distributions)], *given[len(distributions) :]),
            distributions,
            self._actions[rows],
            self._advantages[rows],
            self.mask[rows],
        )

    def _mean(self, x: Tensor) -> Tensor:
        """Sum over the valid steps of some rows over the count of all rows', in double precision."""
        return x.sum(dtype=torch.float64) / self._count

    def _select(self, rows: slice) -> Any:
        return self._observations if len(self._chunks) == 1 else self._observations[rows]


def _at_start(
    distributions: Sequence[Distribution],
    actions: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference_loss: float = 0.0,
) -> Tensor:
    """The objective of each step where the policy is theta_old: the ratio is 1, its gradient that of log_prob."""
    new, *reference = distributions
    log_prob = new.log_prob(actions)
    return _objective(new, log_prob.detach(), log_prob, advantages, mask, reference, reference_loss)


def _at_candidate(
    distributions: Sequence[Distribution],
    actions: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The objective and the step KL of each step."""
    new, old, *reference = distributions
    objective = _objective(
        new, old.log_prob(actions), new.log_prob(actions), advantages, mask, reference, reference_loss
    )
    return objective, torch.where(mask, old.kl(new), 0.0)


def _objective(
    new: Distribution,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference: Sequence[Distribution],
    reference_loss: float,
) -> Tensor:
    # A masked step may hold anything; a log-ratio of zero keeps it out of the value and of the gradient.
    objective = ratio(torch.where(mask, old_log_prob, 0.0), torch.where(mask, log_prob, 0.0)) * advantages
    for other in reference:
        objective = objective - reference_loss * new.kl(other)
    return torch.where(mask, objective, 0.0)


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
    microbatch_size: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    reference: Distribution | None = None,
    reference_loss: float = 0.0,
) -> StepReport:
    """Take one trust-region step in place (TRPO, Schulman et al. 2015, appendix C).

    The step is sqrt(2 max_kl / x'Fx) x with x from conjugate gradient on (F + damping I) x = g and with the *undamped*
    curvature, so that the quadratic model's KL is max_kl; it is then shortened by backtrack_ratio until the exact mean
    KL over all valid steps is at most max_kl and the surrogate improves.

    Args:
        policy: a module with `distribution(observations)`; its parameters with requires_grad move.
        observations: what the policy takes; B rows, selected by `[rows]` where only some are wanted.
        actions: (B, T), (B, T, A), (N,) or (N, A).
        advantages: (B, T) or (N,).
        mask: like advantages, True at real actions; None counts all.
        max_kl: bound on the mean exact KL(old || new), nats per step.
        damping: added to the Fisher's diagonal while solving.
        cg_iterations, cg_tolerance, preconditioner: see `conjugate_gradient`.
        backtrack_ratio, max_backtracks: the line search tries fractions backtrack_ratio ** k, k = 0..max_backtracks.
        first_backtracks: the first k; a caller that remembers what the last step needed saves passes over the batch.
        accept_ratio: least measured gain over predicted gain.
        fisher_fraction: share of the rows, evenly spread, that the Fisher is taken over. Gradient and line search
            always see every row.
        fisher_method: see `FisherOperator`.
        microbatch_size: rows computed at a time; changes memory, not the result.
        reference, reference_loss: subtract reference_loss * KL(new || reference), exact, from the objective.

    Returns:
        The report. Where it says not accepted, the parameters are bit-identical to before.
    """
    parameters = trainable_parameters(policy)
    objective = SurrogateObjective(
        policy,
        observations,
        actions,
        advantages,
        mask=mask,
        reference=reference,
        reference_loss=reference_loss,
        microbatch_size=microbatch_size,
    )
    gradient = objective.gradient(parameters)
    gradient_norm = gradient.norm().item()
    largest = gradient.abs().max()
    if not torch.isfinite(largest):
        return StepReport(False, "non_finite", gradient_norm=gradient_norm)
    if largest == 0:
        return StepReport(False, "zero_gradient")

    rows = spread_rows(len(actions), fisher_fraction) if fisher_fraction < 1 else slice(None)
    fisher = FisherOperator(
        policy,
        observations if fisher_fraction >= 1 else observations[rows],
        mask=objective.mask[rows],
        method=fisher_method,
        microbatch_size=microbatch_size,
    )
    # The step does not depend on the gradient's length; at unit size no square of it can overflow.
    unit = gradient / largest
    solved = conjugate_gradient(
        fisher.undamped,
        unit,
        max_iterations=cg_iterations,
        tolerance=cg_tolerance,
        damping=damping,
        preconditioner=preconditioner,
    )
    direction = solved.solution
    report = StepReport(
        False,
        "non_finite",
        cg_iterations=solved.iterations,
        cg_residual=solved.residual_norm / unit.norm().item(),
        cg_stopped=solved.stopped,
        gradient_norm=gradient_norm,
    )
    if solved.stopped == "non_finite":
        return report
    # What was solved before a negative curvature showed is still an ascent direction (truncated Newton); it goes on to
    # the line search where the Fisher is positive along it.
    if not solved.curvature > 0:
        report.reason = "negative_curvature"
        return report
    full_step = math.sqrt(2 * max_kl / solved.curvature) * direction
    if not torch.isfinite(full_step).all():
        return report
    full_gain = gradient.dot(full_step).item()
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
    )


@torch.no_grad()
def line_search(
    objective: SurrogateObjective,
    parameters: list[nn.Parameter],
    full_step: Tensor,
    report: StepReport,
    *,
    full_gain: float,
    max_kl: float,
    backtrack_ratio: float,
    max_backtracks: int,
    first_backtracks: int,
    accept_ratio: float,
) -> StepReport:
    """Shorten `full_step` until the exact step KL is within the bound and the surrogate improves; else restore.

    Args:
        objective: holds theta_old's distribution (its `gradient` has been called).
        parameters: at theta_old; moved in place.
        full_step: (P,).
        report: is filled in and returned.
        full_gain: the linear model's gain for the full step.
        max_kl, backtrack_ratio, max_backtracks, first_backtracks, accept_ratio: as for `trust_region_step`.
    """
    start = [parameter.detach().clone() for parameter in parameters]
    theta = flatten(start)
    backtracks = min(first_backtracks, max_backtracks)
    try:
        while backtracks <= max_backtracks:
            fraction = backtrack_ratio**backtracks
            assign(parameters, theta + fraction * full_step)
            gain, kl, kl_max = objective.measure()
            report.backtracks = backtracks
            further = 1
            if not (math.isfinite(gain) and math.isfinite(kl) and math.isfinite(kl_max)):
                report.reason = "non_finite"
            elif kl > max_kl:
                report.reason = "kl_exceeded"
                # KL grows with the square of the step: fractions that this rules out are not worth a pass each.
                further = max(1, math.floor(math.log(max_kl / kl) / (2 * math.log(backtrack_ratio))))
            elif gain <= 0 or gain < accept_ratio * fraction * full_gain:
                report.reason = "no_improvement"
            else:
                report.accepted, report.reason = True, "accepted"
                report.step_kl, report.step_kl_max, report.surrogate_gain = kl, kl_max, gain
                report.predicted_gain, report.step_fraction = fraction * full_gain, fraction
                return report
            backtracks += further
        return report
    finally:
        # Also where a candidate raised, so that no error leaves the policy at a step that nobody accepted.
        if not report.accepted:
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)

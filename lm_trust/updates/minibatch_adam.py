"""Epochs of minibatch Adam on one batch, certified after the fact: what the PPO family shares.

Such a rule bounds nothing by itself; its report measures, on all valid steps, how far it went. What bounds there are
(on the step KL, on the reference KL, on what the move must be worth) are kept by shortening the whole move.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.adam import adam_step
from lm_trust.core.at_rest import at_rest
from lm_trust.core.batch import Batch
from lm_trust.core.budget import near_reference, reference_limit
from lm_trust.core.minibatches import shuffled
from lm_trust.core.objective import Measurement, SurrogateObjective
from lm_trust.core.parameters import assign, flatten, trainable_parameters
from lm_trust.core.processes import placed_rows
from lm_trust.core.report import StepReport
from lm_trust.core.seeding import make_generator
from lm_trust.core.trust_region import line_search
from lm_trust.updates.reference_budget import ReferenceBudget

# Of the way back to the bounds: a shorter move than 0.8 ** 20, a hundredth, is not worth another pass.
_BACKTRACK_RATIO, _MAX_BACKTRACKS = 0.8, 20
_HALVINGS = 5  # of a way back that went too far


class MinibatchAdam:
    """Moves a policy by Adam, minibatch after minibatch, and measures the whole move.

    Args:
        learning_rate: Adam's, with eps 1e-5 as in PPO's reference implementation.
        anneal: bring the learning rate linearly to zero over the training.
        epochs: passes over the batch.
        minibatches: parts that a pass is cut into, by rows, freshly shuffled.
        max_grad_norm: gradients are scaled to at most this norm; None leaves them.
        seed: of the shuffles.

    Raises:
        ValueError: fewer than 1 epochs or minibatches.
    """

    def __init__(
        self,
        *,
        learning_rate: float,
        anneal: bool,
        epochs: int,
        minibatches: int,
        max_grad_norm: float | None,
        seed: int,
    ) -> None:
        if epochs < 1 or minibatches < 1:
            raise ValueError(f"epochs and minibatches must be 1 or more, got {epochs} and {minibatches}")
        self._learning_rate, self._anneal = learning_rate, anneal
        self._epochs, self._minibatches = epochs, minibatches
        self._max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self._generator = make_generator(seed, "update.minibatches")
        self._optimizer: torch.optim.Adam | None = None
        self._saved_optimizer: dict[str, Any] | None = None

    def step(
        self,
        policy: nn.Module,
        batch: Batch,
        differentiate: Callable[[Batch, int], bool],
        *,
        reference: ReferenceBudget,
        max_kl: float = math.inf,
        needs_gain: bool = False,
        price: float = 0.0,
        microbatch_size: int | None = None,
        autograd: bool = True,
    ) -> StepReport:
        """Move the policy in place; a move that cannot be certified restores policy and optimizer, and is reported.

        A loss, a gradient or a measured number that is not finite is such a one. Where there is a bound, a move that
        breaks it is shortened, on the straight line to its start, until the exact numbers on the whole batch keep it.
        From a start over the budget of the reference KL it is enough that this KL falls, and a move that brings it
        within is shortened to where it just is: a step on the KL alone, which is much steeper than the surrogate that
        Adam's scale comes from, would give up most of what has been learnt.
        A batch without rows moves nothing.

        Args:
            policy, batch: as for every update rule.
            differentiate: of a minibatch's rows here and the number of its rows in all processes; leaves the gradient
                of its loss in the parameters' `.grad`; False ends the epochs.
            reference: how KL(policy || reference) counts.
            max_kl: bound on the mean exact step KL, nats per step.
            needs_gain: whether the surrogate must improve, by more than `price` a nat of the largest step KL.
            microbatch_size: rows measured at a time.
            autograd: whether `differentiate` needs it. Without it the epochs run in inference mode: on a small network
                a tenth of their time is torch's keeping of versions and views.

        Raises:
            ValueError: the policy trains parameters that it did not at the first step.
        """
        parameters = trainable_parameters(policy)
        optimizer = self._prepared_optimizer(parameters, batch.progress)
        start = [parameter.detach().clone() for parameter in parameters]
        optimizer_start = copy.deepcopy(optimizer.state_dict())
        objective = SurrogateObjective(
            policy,
            batch.observations,
            batch.actions,
            batch.advantages,
            mask=batch.mask,
            reference=batch.reference,
            reference_loss=reference.loss,
            bounded=reference.budget is not None,
            microbatch_size=microbatch_size,
        )
        if not objective.placed.total:
            metrics = {"learning_rate": optimizer.param_groups[0]["lr"], "gradient_steps": 0, "gradients_computed": 0}
            return StepReport(False, "zero_gradient", predicted_gain=None, metrics=metrics)
        if reference.budget is None:
            objective.start_from(batch.old)
            reference.begin(objective.reference_kl)
        else:
            gradient = objective.gradient(parameters)
            reference.begin(objective.reference_kl, _unit(gradient, objective, reference.budget))
        if reference.began_over:
            _forget_momentum(optimizer)
        report = StepReport(False, "non_finite", predicted_gain=None)
        if objective.reference_kl is not None:
            report.metrics["reference_kl_after"] = objective.reference_kl
        try:
            with torch.inference_mode(not autograd), at_rest(policy):
                norms, taken, finite = self._run_epochs(parameters, optimizer, batch, differentiate)
            if not autograd:  # outside of that mode nothing could be added to these
                policy.zero_grad()
            if finite:
                needs_gain = needs_gain and not reference.began_over
                _certify(
                    objective,
                    parameters,
                    start,
                    reference,
                    report,
                    max_kl=max_kl,
                    needs_gain=needs_gain,
                    price=price,
                )
                report.candidates = objective.candidates
        finally:
            # Also where something raised, so that no error leaves the policy at a move that nobody certified.
            if not report.accepted:
                assign(parameters, flatten(start))
                optimizer.load_state_dict(optimizer_start)
        if reference.budget is not None:
            report.metrics["reference_multiplier"] = reference.mean_multiplier
        if report.accepted and reference.began_over:  # the gradients of the way back are no measure of those to come
            optimizer.load_state_dict(optimizer_start)
            _forget_momentum(optimizer)
        report.gradient_norm = norms[0] if norms else 0.0
        report.metrics |= {
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gradient_steps": taken,
            "gradients_computed": len(norms),
        }
        return report

    def _run_epochs(
        self,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Adam,
        batch: Batch,
        differentiate: Callable[[Batch, int], bool],
    ) -> tuple[list[float], int, bool]:
        """The norms of the finite gradients, how many of these a step followed, and whether all were finite.

        The gradient that ends the epochs, by what was found beside it, is computed and not followed.
        """
        placed = placed_rows(len(batch))
        norms: list[float] = []
        taken = 0
        for _ in range(self._epochs):
            order, parts = shuffled(placed, self._minibatches, self._generator)
            # Gathered once a pass: the minibatches are then views.
            ordered = batch[order]
            for rows, total in parts:
                go_on = differentiate(_some_row(ordered[rows], batch), total)
                norm = _clip_gradients(parameters, self._max_grad_norm)
                if not math.isfinite(norm):
                    return norms, taken, False
                norms.append(norm)
                if not go_on:
                    return norms, taken, True
                adam_step(optimizer)
                taken += 1
        return norms, taken, True

    def _prepared_optimizer(self, parameters: list[nn.Parameter], progress: float) -> torch.optim.Adam:
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(parameters, lr=self._learning_rate, eps=1e-5, fused=True)
            if self._saved_optimizer is not None:
                self._optimizer.load_state_dict(self._saved_optimizer)
                self._saved_optimizer = None
        known = set(map(id, self._optimizer.param_groups[0]["params"]))
        if not known.issuperset(map(id, parameters)):  # those that were frozen since are left where they are
            raise ValueError("the policy trains other parameters than those whose moments Adam holds: make a new rule")
        if self._anneal:
            self._optimizer.param_groups[0]["lr"] = self._learning_rate * (1 - progress)
        return self._optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's moments and the shuffles' generator."""
        optimizer = self._saved_optimizer if self._optimizer is None else self._optimizer.state_dict()
        return {"optimizer": optimizer, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the optimizer is restored once the policy is seen."""
        self._optimizer, self._saved_optimizer = None, state["optimizer"]
        self._generator.set_state(state["generator"])


def _certify(
    objective: SurrogateObjective,
    parameters: list[nn.Parameter],
    start: list[Tensor],
    reference: ReferenceBudget,
    report: StepReport,
    *,
    max_kl: float,
    needs_gain: bool,
    price: float,
) -> None:
    """Measure the move, shorten it where it breaks a bound, and fill in the report."""
    found, fraction = objective.measure(), 1.0
    if not found.finite:
        return
    limit = math.inf
    if reference.budget is not None:
        if reference.began_over and found.reference_kl < reference.budget:
            found, fraction = _just_within(objective, parameters, start, reference.budget, found)
        limit = reference_limit(objective.reference_kl, reference.budget, must_fall=reference.began_over)
    within = found.step_kl <= max_kl and (found.reference_kl is None or found.reference_kl <= limit)
    if within and (not needs_gain or found.improves(price)):
        report.accepted, report.reason, report.step_fraction = True, "accepted", fraction
        report.surrogate_gain, report.step_kl, report.step_kl_max, reference_kl = found
        if reference_kl is not None:
            report.metrics["reference_kl_after"] = reference_kl
        return
    # The step KL grows with the square of the move, so the edge of its bound is known to within a pass or two.
    edge = math.sqrt(max_kl / found.step_kl) if found.step_kl > max_kl else 1.0
    move = flatten(parameters) - flatten(start)
    assign(parameters, flatten(start))
    line_search(
        objective,
        parameters,
        edge * move,
        report,
        full_gain=None,
        max_kl=max_kl,
        backtrack_ratio=_BACKTRACK_RATIO,
        max_backtracks=_MAX_BACKTRACKS,
        first_backtracks=0 if edge < 1 else 1,
        accept_ratio=0.0,
        reference_limit=limit,
        needs_gain=needs_gain,
        price=price,
    )
    report.step_fraction *= edge * fraction


def _some_row(minibatch: Batch, batch: Batch) -> Batch:
    """The minibatch; where this process has no sequence of it, one that counts for nothing: a model wants one."""
    if len(minibatch) or batch.mask is None:
        return minibatch
    row = batch[:1]
    return replace(row, mask=torch.zeros_like(row.mask))


def _unit(gradient: Tensor, objective: SurrogateObjective, budget: float) -> float:
    """The weight of the reference KL, a mean over steps, at which its gradient is as long as the surrogate's."""
    if near_reference(objective.reference_kl, budget):
        return 0.0
    length = objective.reference_gradient.norm().item() / objective.steps_per_row
    return gradient.norm().item() / length if length > 0 else 0.0


def _forget_momentum(optimizer: torch.optim.Adam) -> None:
    """A momentum that led over the budget would go on doing so."""
    for state in optimizer.state.values():
        state["exp_avg"].zero_()


def _just_within(
    objective: SurrogateObjective,
    parameters: list[nn.Parameter],
    start: list[Tensor],
    budget: float,
    found: Measurement,
) -> tuple[Measurement, float]:
    """The shortest part of the move, of a few halvings, whose reference KL is within the budget that it began over."""
    begin = flatten(start)
    move = flatten(parameters) - begin
    over, within = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (over + within) / 2
        assign(parameters, begin + middle * move)
        measured = objective.measure()
        if measured.finite and measured.reference_kl <= budget:
            found, within = measured, middle
        else:
            over = middle
    assign(parameters, begin + within * move)
    return found, within


def _clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale the parameters' gradients together to at most this norm; returns the norm that they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # One norm of one vector: nn.utils.clip_grad_norm_ takes four times as long on networks of this size.
    gradient = torch.cat([gradient.flatten() for gradient in gradients])
    norm = torch.linalg.vector_norm(gradient).item()
    if not math.isfinite(norm):  # the squares of finite numbers may not fit
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm

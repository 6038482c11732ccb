"""Epochs of minibatch Adam on one batch, certified after the fact: what the PPO family shares.

Such a rule bounds nothing by itself; its report measures, on all valid steps, how far it went.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.adam import adam_step
from lm_trust.core.advantages import masked_mean
from lm_trust.core.batch import Batch, row_chunks
from lm_trust.core.distributions import Distribution, per_step
from lm_trust.core.parameters import trainable_parameters
from lm_trust.core.seeding import make_generator
from lm_trust.core.trust_region import StepReport, SurrogateObjective


class MinibatchAdam:
    """Moves a policy by Adam, minibatch after minibatch, and measures the whole move.

    Args:
        learning_rate: Adam's, with eps 1e-5 as in PPO's reference implementation.
        anneal: bring the learning rate linearly to zero over the training.
        epochs: passes over the batch.
        minibatches: parts that a pass is cut into, by rows, freshly shuffled.
        max_grad_norm: gradients are scaled to at most this norm; None leaves them.
        seed: of the shuffles.
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
        self._learning_rate, self._anneal = learning_rate, anneal
        self._epochs, self._minibatches = epochs, minibatches
        self._limit = math.inf if max_grad_norm is None else max_grad_norm
        self._generator = make_generator(seed, "update.minibatches")
        self._optimizer: torch.optim.Adam | None = None
        self._saved_optimizer: dict[str, Any] | None = None

    def step(
        self,
        policy: nn.Module,
        batch: Batch,
        differentiate: Callable[[Batch], bool],
        *,
        reference_loss: float = 0.0,
        microbatch_size: int | None = None,
    ) -> StepReport:
        """Move the policy in place; a non-finite loss or gradient restores policy and optimizer, and is reported.

        Args:
            policy, batch: as for every update rule.
            differentiate: leaves the gradient of a minibatch's loss in the parameters' `.grad`; False ends the epochs.
            reference_loss: the weight of KL(policy || reference) in the objective that is reported.
            microbatch_size: rows measured at a time.
        """
        parameters = trainable_parameters(policy)
        optimizer = self._prepared_optimizer(parameters, batch.progress)
        start = [parameter.detach().clone() for parameter in parameters]
        optimizer_start = copy.deepcopy(optimizer.state_dict())
        norms: list[float] = []
        finite = self._run_epochs(parameters, optimizer, batch, differentiate, norms)
        report = StepReport(True, "accepted", predicted_gain=None, step_fraction=1.0)
        if finite:
            objective = SurrogateObjective(
                policy,
                batch.observations,
                batch.actions,
                batch.advantages,
                mask=batch.mask,
                reference=batch.reference,
                reference_loss=reference_loss,
                microbatch_size=microbatch_size,
            )
            objective.start_from(batch.old)
            report.surrogate_gain, report.step_kl, report.step_kl_max = objective.measure()
            finite = math.isfinite(report.surrogate_gain + report.step_kl + report.step_kl_max)
        if not finite:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            optimizer.load_state_dict(optimizer_start)
            report = StepReport(False, "non_finite", predicted_gain=None)
        report.gradient_norm = norms[0] if norms else 0.0
        report.metrics = {"learning_rate": optimizer.param_groups[0]["lr"], "gradient_steps": len(norms)}
        return report

    def _run_epochs(
        self,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Adam,
        batch: Batch,
        differentiate: Callable[[Batch], bool],
        norms: list[float],
    ) -> bool:
        """False as soon as a gradient is not finite; fills in the gradient norms."""
        size = -(-len(batch) // self._minibatches)
        for _ in range(self._epochs):
            # Gathered once a pass: the minibatches are then views.
            shuffled = batch[torch.randperm(len(batch), generator=self._generator)]
            for rows in row_chunks(len(batch), size):
                go_on = differentiate(shuffled[rows])
                norm = clip_gradients(parameters, self._limit)
                if not math.isfinite(norm):
                    return False
                if not go_on:
                    return True
                norms.append(norm)
                adam_step(optimizer)
        return True

    def _prepared_optimizer(self, parameters: list[nn.Parameter], progress: float) -> torch.optim.Adam:
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(parameters, lr=self._learning_rate, eps=1e-5, fused=True)
            if self._saved_optimizer is not None:
                self._optimizer.load_state_dict(self._saved_optimizer)
                self._saved_optimizer = None
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


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the parameters' gradients together to at most this norm; returns the norm that they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # One norm of one vector: nn.utils.clip_grad_norm_ takes four times as long on networks of this size.
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))
    return norm


def backward(
    policy: nn.Module,
    minibatch: Batch,
    objective: Callable[..., tuple[Tensor, ...]],
    *,
    others: Sequence[Distribution] = (),
    microbatch_size: int | None = None,
) -> list[float]:
    """Leave the gradient of minus the mean objective in `.grad`, accumulated over microbatches.

    Args:
        policy: differentiated by autograd.
        minibatch: of `len` rows.
        objective: of the new distribution, the others, actions, advantages, old_log_prob and mask (all (B, T)), to the
            objective of each step and any statistics of each step.
        others: fixed distributions at the same rows.
        microbatch_size: rows differentiated at a time; changes memory, not the result.

    Returns:
        The mean of each statistic over the valid steps.
    """
    mask = minibatch.mask
    if mask is None:
        mask = torch.ones_like(minibatch.advantages, dtype=torch.bool)
    policy.zero_grad(set_to_none=True)
    # A masked step may hold anything; a log-probability of zero on both sides keeps it out of the gradient.
    old_log_prob = torch.where(mask, minibatch.old_log_prob, 0.0)
    count = mask.sum().clamp_min(1)
    means: list[float] = []
    for rows in row_chunks(len(minibatch), microbatch_size):
        each, *statistics = per_step(
            objective,
            [policy.distribution(minibatch.observations[rows]), *[other[rows] for other in others]],
            *[minibatch.actions[rows], minibatch.advantages[rows], old_log_prob[rows], mask[rows]],
        )
        share = mask[rows].sum().to(each.dtype) / count
        (-masked_mean(each, mask[rows]) * share).backward()
        parts = [(masked_mean(statistic.detach(), mask[rows]) * share).item() for statistic in statistics]
        means = parts if not means else [mean + part for mean, part in zip(means, parts, strict=True)]
    return means

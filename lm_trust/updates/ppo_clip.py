"""PPO-clip: epochs of minibatch Adam on the clipped surrogate (Schulman et al. 2017), certified after the fact.

The rule bounds nothing; its report measures, on all valid steps, how far it went.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.advantages import masked_mean
from lm_trust.core.batch import Batch, row_chunks
from lm_trust.core.distributions import Distribution, kl_estimators, per_step
from lm_trust.core.parameters import trainable_parameters
from lm_trust.core.seeding import make_generator
from lm_trust.core.surrogate import clipped_surrogate, ratio
from lm_trust.core.trust_region import StepReport, SurrogateObjective


@dataclass
class PPOClip:
    """PPO with the clipped surrogate.

    Args:
        clip, clip_high: see `clipped_surrogate`.
        epochs: passes over the batch.
        minibatches: parts that a pass is cut into, by rows, freshly shuffled.
        learning_rate: Adam's, with eps 1e-5 as in PPO's reference implementation.
        anneal: bring the learning rate linearly to zero over the training.
        entropy: weight of the entropy bonus.
        max_grad_norm: gradients are scaled to at most this norm; None leaves them.
        target_kl: stop the epochs once a minibatch's k3 estimate is over 1.5 times this; None never stops.
        microbatch_size: rows differentiated at a time; changes memory, not the result.
        reference_loss: weight of the exact KL(policy || reference) in the loss.
        seed: of the minibatch shuffles.
    """

    clip: float = 0.2
    clip_high: float | None = None
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 3e-4
    anneal: bool = False
    entropy: float = 0.0
    max_grad_norm: float | None = 0.5
    target_kl: float | None = None
    microbatch_size: int | None = None
    reference_loss: float = 0.0
    seed: int = 0
    _optimizer: torch.optim.Adam | None = field(default=None, init=False, repr=False)
    _saved_optimizer: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = make_generator(self.seed, "update.minibatches")

    def step(self, policy: nn.Module, batch: Batch) -> StepReport:
        """Move the policy in place; a non-finite loss or gradient restores policy and optimizer, and is reported."""
        parameters = trainable_parameters(policy)
        optimizer = self._prepared_optimizer(parameters, batch.progress)
        start = [parameter.detach().clone() for parameter in parameters]
        optimizer_start = copy.deepcopy(optimizer.state_dict())
        norms, clipped = [], []
        finite = self._run_epochs(policy, parameters, optimizer, batch, norms, clipped)
        report = StepReport(True, "accepted", predicted_gain=None, step_fraction=1.0)
        if finite:
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
        report.metrics = {
            "clip_fraction": sum(clipped) / len(clipped) if clipped else 0.0,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gradient_steps": len(norms),
        }
        return report

    def _run_epochs(
        self,
        policy: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Adam,
        batch: Batch,
        norms: list[float],
        clipped: list[float],
    ) -> bool:
        """False as soon as a gradient is not finite; fills in the gradient norms and the clipped shares."""
        for _ in range(self.epochs):
            order = torch.randperm(len(batch), generator=self._generator)
            for rows in order.chunk(self.minibatches):
                minibatch = batch[rows]
                optimizer.zero_grad(set_to_none=True)
                share, estimate = self._accumulate(policy, minibatch)
                limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
                norm = nn.utils.clip_grad_norm_(parameters, limit).item()
                if not math.isfinite(norm):
                    return False
                clipped.append(share)
                if self.target_kl is not None and estimate > 1.5 * self.target_kl:
                    return True
                norms.append(norm)
                optimizer.step()
        return True

    def _accumulate(self, policy: nn.Module, minibatch: Batch) -> tuple[float, float]:
        """Gradients of the minibatch's loss into `.grad`; returns the share of clipped steps and the k3 estimate."""
        count = minibatch.mask.sum().clamp_min(1)
        share, estimate = 0.0, 0.0
        for rows in row_chunks(len(minibatch), self.microbatch_size):
            part = minibatch if self.microbatch_size is None else minibatch[rows]
            reference = [part.reference] if self.reference_loss and part.reference is not None else []
            old_log_prob = torch.where(part.mask, part.old_log_prob, 0.0)
            objective, log_prob = per_step(
                self._objective,
                [policy.distribution(part.observations), *reference],
                *[part.actions, part.advantages, old_log_prob, part.mask],
            )
            weight = part.mask.sum().to(objective.dtype) / count
            (-masked_mean(objective, part.mask) * weight).backward()
            with torch.no_grad():
                share += (masked_mean(self._is_clipped(old_log_prob, log_prob), part.mask) * weight).item()
                k3 = kl_estimators(old_log_prob, log_prob)["k3"]
                estimate += (masked_mean(k3, part.mask) * weight).item()
        return share, estimate

    def _objective(self, new: Distribution, *given: Any) -> tuple[Tensor, Tensor]:
        """The objective and the log-probability of each step."""
        *reference, actions, advantages, old_log_prob, mask = given
        # A masked step may hold anything; a log-ratio of zero keeps it out of the gradient.
        log_prob = torch.where(mask, new.log_prob(actions), 0.0)
        objective = clipped_surrogate(old_log_prob, log_prob, advantages, clip=self.clip, clip_high=self.clip_high)
        if self.entropy:
            objective = objective + self.entropy * new.entropy()
        for other in reference:
            objective = objective - self.reference_loss * new.kl(other)
        return objective, log_prob.detach()

    def _is_clipped(self, old_log_prob: Tensor, log_prob: Tensor) -> Tensor:
        probability_ratio = ratio(old_log_prob, log_prob)
        high = self.clip if self.clip_high is None else self.clip_high
        return ((probability_ratio < 1 - self.clip) | (probability_ratio > 1 + high)).to(log_prob.dtype)

    def _prepared_optimizer(self, parameters: list[nn.Parameter], progress: float) -> torch.optim.Adam:
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, eps=1e-5)
            if self._saved_optimizer is not None:
                self._optimizer.load_state_dict(self._saved_optimizer)
                self._saved_optimizer = None
        if self.anneal:
            self._optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - progress)
        return self._optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's moments and the shuffles' generator."""
        optimizer = self._saved_optimizer if self._optimizer is None else self._optimizer.state_dict()
        return {"optimizer": optimizer, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the optimizer is restored once the policy is seen."""
        self._optimizer, self._saved_optimizer = None, state["optimizer"]
        self._generator.set_state(state["generator"])

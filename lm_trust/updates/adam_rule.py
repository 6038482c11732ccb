"""An update rule from an objective of each step: what is left to say of a rule that steps by minibatch Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lm_trust.core.batch import Batch
from lm_trust.core.distributions import Distribution
from lm_trust.core.report import StepReport
from lm_trust.updates.backward import backward
from lm_trust.updates.minibatch_adam import MinibatchAdam
from lm_trust.updates.reference_budget import ReferenceBudget


class AdamRule:
    """Maximises the mean of an objective over a batch's valid steps; see `MinibatchAdam.step` for its certificate.

    Args:
        objective: of the new distribution, the old one, actions, advantages, old_log_prob, mask and what `prepare`
            gave, all (B, T), to each step's objective and to the numbers that `metrics` names, without graph.
        metrics: these numbers' names in the report; the mean over valid steps, then over the gradient steps.
        prepare: of the policy and a minibatch, to further (B, T) tensors for the objective.
        entropy: weight of the entropy bonus.
        microbatch_size: rows differentiated at a time; changes memory, not the result.
        reference_loss: weight of the exact KL(policy || reference), which is taken off the objective.
        reference_budget: bound on that KL, nats per row (sequence); see `ReferenceBudget`.
        epochs, minibatches, learning_rate, anneal, max_grad_norm, seed: see `MinibatchAdam`.
    """

    def __init__(
        self,
        objective: Callable[..., tuple[Tensor, ...]],
        *,
        metrics: Sequence[str] = (),
        prepare: Callable[[nn.Module, Batch], Sequence[Tensor]] | None = None,
        epochs: int = 4,
        minibatches: int = 4,
        learning_rate: float = 3e-4,
        anneal: bool = False,
        entropy: float = 0.0,
        max_grad_norm: float | None = 0.5,
        microbatch_size: int | None = None,
        reference_loss: float = 0.0,
        reference_budget: float | None = None,
        seed: int = 0,
    ) -> None:
        self._objective, self._metrics, self._prepare = objective, tuple(metrics), prepare
        self._entropy, self._microbatch_size = entropy, microbatch_size
        self._reference = ReferenceBudget(reference_budget, reference_loss)
        self._adam = MinibatchAdam(
            learning_rate=learning_rate,
            anneal=anneal,
            epochs=epochs,
            minibatches=minibatches,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )

    def step(self, policy: nn.Module, batch: Batch, *, needs_gain: bool = False, price: float = 0.0) -> StepReport:
        """Move the policy in place; `needs_gain` and `price` as for `MinibatchAdam.step`."""
        seen: list[list[float]] = []

        def differentiate(minibatch: Batch, rows: int) -> bool:
            means = backward(
                policy,
                minibatch,
                self._weighed,
                others=[minibatch.old, *self._reference.fixed(minibatch)],
                extras=() if self._prepare is None else self._prepare(policy, minibatch),
                microbatch_size=self._microbatch_size,
            )
            seen.append(means[: len(self._metrics)])
            return self._reference.go_on(minibatch, rows, means[len(self._metrics) :])

        report = self._adam.step(
            policy,
            batch,
            differentiate,
            reference=self._reference,
            needs_gain=needs_gain,
            price=price,
            microbatch_size=self._microbatch_size,
        )
        means = [sum(values) / len(seen) for values in zip(*seen, strict=True)] or [0.0] * len(self._metrics)
        report.metrics = dict(zip(self._metrics, means, strict=True)) | report.metrics
        return report

    def _weighed(self, new: Distribution, old: Distribution, *given: Any) -> tuple[Tensor, ...]:
        """The objective with the entropy bonus and the reference KL."""
        fixed = [one for one in given if not isinstance(one, Tensor)]
        each, *numbers = self._objective(new, old, *given[len(fixed) :])
        if self._entropy:
            each = each + self._entropy * new.entropy()
        each, *changes = self._reference.weigh(each, new, fixed)
        return each, *numbers, *changes

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments and the shuffles' generator."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._adam.load_state_dict(state)

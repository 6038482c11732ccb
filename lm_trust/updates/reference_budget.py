"""How the KL to the reference counts in a rule that steps by Adam: a fixed weight, and a budget as a hard bound.

A budget is kept in three ways. A Lagrange multiplier makes it felt before it is reached, the epochs end once a
minibatch is over it, and what is over it all the same after them is scaled back (`MinibatchAdam.step`).

The multiplier is set by the room that is left, minibatch by minibatch, and remembers nothing: one that adds up the
excess of update after update (dual ascent) is late by several of them, and swings (Stooke et al. 2020, "Responsive
Safety in Reinforcement Learning by PID Lagrangian Methods", whose proportional term this is). Its unit is the weight at
which the KL's gradient is as long as the surrogate's. With that weight a step cannot raise the KL, to first order; it
is reached at the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lm_trust.core.batch import Batch
from lm_trust.core.distributions import Distribution
from lm_trust.core.processes import summed

BAND = 0.25  # of the budget: the room in which the multiplier grows from zero to the weight of equal gradients


class ReferenceBudget:
    """Weighs the reference KL in the objective of an update, and says when its epochs end.

    Args:
        budget: nats per row (sequence); None: no bound.
        loss: `reference_loss` of the rules, the fixed weight of the exact KL(policy || reference), in objective units
            per nat of the mean step.

    Attributes:
        multiplier: what is added to `loss` now, in the same units; never negative.
        mean_multiplier: its mean over the gradients of the present update.
        began_over: whether the policy was over the budget when the present update began.

    Raises:
        ValueError: a budget that is not positive.
    """

    def __init__(self, budget: float | None, loss: float) -> None:
        if budget is not None and not budget > 0:
            raise ValueError(f"a budget of {budget:g} nats: it must be positive")
        self.budget = budget
        self.loss = loss
        self.multiplier = 0.0
        self._start: float | None = None
        self._unit = 0.0
        self._used: list[float] = []
        self.began_over = self._way_back = False

    @property
    def weighs(self) -> bool:
        """Whether the reference KL has any part in the update."""
        return bool(self.loss) or self.budget is not None

    @property
    def mean_multiplier(self) -> float:
        return sum(self._used) / max(len(self._used), 1)

    def begin(self, reference_kl: float | None, unit: float = 0.0) -> None:
        """Start an update.

        Args:
            reference_kl: of the policy on the whole batch, nats per row.
            unit: the multiplier at which the KL's gradient is as long as the surrogate's.
        """
        self._start, self._unit, self._used = reference_kl, unit, []
        self.began_over = self._way_back = self.budget is not None and reference_kl > self.budget
        if self.budget is not None:
            self._adapt(reference_kl)

    def fixed(self, minibatch: Batch) -> list[Distribution]:
        """The fixed distributions that `weigh` takes: the reference where it has a part; old as well with a budget."""
        if minibatch.reference is None or not self.weighs:
            return []
        return [minibatch.reference] if self.budget is None else [minibatch.reference, minibatch.old]

    def weigh(self, each: Tensor, new: Distribution, fixed: Sequence[Distribution]) -> tuple[Tensor, ...]:
        """Each step's objective with the reference KL weighed in, the KL alone on the way back, all (B, T).

        With a budget also the change of each step's reference KL since the start of the update, without graph.
        """
        if not fixed:
            return (each,)
        reference, *old = fixed
        kl = new.kl(reference)
        weighed = -kl if self._way_back else each - (self.loss + self.multiplier) * kl
        return weighed, *(kl.detach() - one.kl(reference).detach() for one in old)

    def go_on(self, minibatch: Batch, rows: int, changes: Sequence[float]) -> bool:
        """Whether the epochs go on after a minibatch, given the mean changes that `weigh` gave for it, nats per step.

        It has `rows` rows in all processes; `minibatch` holds those of this one.

        Only the change is taken from the minibatch; the level is that of the whole batch, which varies less.

        The multiplier becomes that of the new level. The epochs end at the first minibatch over the budget. Only an
        update that began over it must first come back: it lowers the KL and nothing else (constraint-rectified policy
        optimisation, Xu et al. 2021) until one is within.
        """
        if not changes:
            return True
        (change,) = changes
        self._used.append(self.multiplier)
        mask = minibatch.mask
        steps = minibatch.advantages.new_tensor(minibatch.advantages.numel()) if mask is None else mask.sum()
        level = self._start + change * summed(steps).item() / rows
        self._adapt(level)
        over = level > self.budget
        goes_on = self._way_back or not over
        self._way_back = self._way_back and over
        return goes_on

    def _adapt(self, level: float) -> None:
        self.multiplier = self._unit * max(0.0, 1 - (self.budget - level) / (BAND * self.budget))

"""How the KL to the reference counts in a rule that steps by Adam: a fixed weight, and a budget as a hard bound.

A budget is kept in three ways. A Lagrange multiplier makes it felt before it is reached, the epochs end once a
minibatch is over it, and what is over it all the same after them is scaled back (`MinibatchAdam.step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lm_trust.core.batch import Batch
from lm_trust.core.distributions import Distribution

RATE = 0.5  # how much the multiplier grows where the reference KL is twice its budget


class ReferenceBudget:
    """Weighs the reference KL in the loss of an update, and says when its epochs end.

    Args:
        budget: nats per row (sequence); None: no bound.
        loss: the fixed weight of the exact KL(policy || reference), in objective units per nat of the mean step.

    Attributes:
        multiplier: what is added to `loss`, in the same units; never negative. It ascends the dual problem: it grows
            with the excess over the budget and falls with the room that is left.
        began_over: whether the policy was over the budget when the present update began.
    """

    def __init__(self, budget: float | None, loss: float) -> None:
        self.budget = budget
        self.loss = loss
        self.multiplier = 0.0
        self._start: float | None = None
        self.began_over = self._way_back = False

    @property
    def weighs(self) -> bool:
        """Whether the reference KL has any part in the update."""
        return bool(self.loss) or self.budget is not None

    def begin(self, reference_kl: float | None) -> None:
        """Start an update of a policy with this reference KL on the whole batch, nats per row."""
        self._start = reference_kl
        self.began_over = self._way_back = self.budget is not None and reference_kl > self.budget

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

    def go_on(self, minibatch: Batch, changes: Sequence[float]) -> bool:
        """Whether the epochs go on after a minibatch, given the mean changes that `weigh` gave for it, nats per step.

        Only the change is taken from the minibatch; the level is that of the whole batch, which varies less.

        They end at the first minibatch over the budget. Only an update that began over it must first come back: it
        lowers the KL and nothing else (constraint-rectified policy optimisation, Xu et al. 2021) until one is within.
        """
        if not changes:
            return True
        (change,) = changes
        steps = minibatch.advantages.numel() if minibatch.mask is None else minibatch.mask.sum().item()
        over = self._start + change * steps / len(minibatch) > self.budget
        goes_on = self._way_back or not over
        self._way_back = self._way_back and over
        return goes_on

    def adapt(self, reference_kl: float) -> None:
        """One step of the multiplier, by the largest reference KL of the update on its whole batch, nats per row."""
        self.multiplier = max(0.0, self.multiplier + RATE * (reference_kl / self.budget - 1))

    def state_dict(self) -> dict[str, Any]:
        """The multiplier."""
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.multiplier = state["multiplier"]

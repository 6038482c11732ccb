"""How the learner sees rewards: shifted, divided and clipped. What is reported stays as it was scored.

A completion's total is the sum of what its tokens are paid. Scaling is a map of totals, x -> (x - mean) / sd, then
clipped; it reaches the tokens so that their sums are exactly the scaled totals:

- every token's payment is divided by sd;
- what is paid with the last token also bears the shift, and what the clipping takes off or adds.

So nothing that is paid while a text is written depends on what comes later.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lm_trust.lm.token_mdp import Payments

ScalingRule = Literal["none", "running", "reference", "whiten"]


class RewardScaler:
    """Scales payments by the totals that it has observed.

    Args:
        by: `none`; `running`: by mean and sd of all totals so far, this batch's among them; `reference`: by those of
            the first batch, which is to be the starting policy's (Ziegler et al. 2019 normalise so); `whiten`: by
            this batch's sd, keeping its mean.
        clip: magnitude that scaled totals are clipped to; None: not.

    The sd is the sample's, with n - 1. Where it is zero, or there are no totals yet, nothing is divided.
    """

    def __init__(self, by: ScalingRule = "none", clip: float | None = None) -> None:
        self.by = by
        self.clip = clip
        self._count, self._mean, self._squares = 0, 0.0, 0.0  # squares: summed, of the deviations from the mean

    @property
    def needs_reference(self) -> bool:
        """Whether totals of the starting policy's completions are still to be observed."""
        return self.by == "reference" and self._count == 0

    @property
    def mean(self) -> float:
        """Of the observed totals; 0 for none."""
        return self._mean

    @property
    def sd(self) -> float:
        """Of the observed totals; 0 where they are all the same, up to rounding."""
        if self._count < 2:
            return 0.0
        sd = (self._squares / (self._count - 1)) ** 0.5
        return sd if sd > 1e-9 * max(1.0, abs(self._mean)) else 0.0

    def observe(self, totals: Tensor) -> None:
        """Take note of the totals (B,) of a batch, before it is scaled."""
        if self.by == "none" or (self.by == "reference" and self._count):
            return
        if self.by == "whiten":
            self._count, self._mean, self._squares = 0, 0.0, 0.0
        count, mean = len(totals), totals.mean().item()
        squares = (totals - mean).square().sum().item()
        # Chan, Golub and LeVeque 1979: the moments of two sets from the moments of each.
        both, gap = self._count + count, mean - self._mean
        self._squares += squares + gap**2 * self._count * count / both
        self._mean += gap * count / both
        self._count = both

    def scale(self, paid: Payments) -> Payments:
        """The payments as the learner sees them."""
        divisor = self.sd or 1.0
        final, per_token = paid.final / divisor, paid.per_token / divisor
        final = final - self.mean / divisor
        if self.by == "whiten":
            final = final + self.mean
        if self.clip is not None:
            totals = Payments(final, per_token).totals
            final = final + (totals.clamp(-self.clip, self.clip) - totals)
        return Payments(final, per_token)

    def metrics(self) -> dict[str, float]:
        """Mean and sd that totals are scaled by; nothing where they are not."""
        return {} if self.by == "none" else {"reward_scaling/mean": self.mean, "reward_scaling/sd": self.sd}

    def state_dict(self) -> dict[str, Any]:
        """The moments of what was observed."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._count, self._mean, self._squares = state["count"], state["mean"], state["squares"]

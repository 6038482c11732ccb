"""PPO with a hard bound: PPO's epochs, then the whole move scaled back until the exact step KL is within the bound.

Where the epochs stay within it, and improve the surrogate, this is PPO; where they lead further, the move is shortened
on the straight line to its start by a line search on the exact step KL and on the surrogate, as at the end of TRPO's
step (Schulman et al. 2015, appendix C). Each candidate costs a forward pass over the batch.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lm_trust.core.batch import Batch
from lm_trust.core.report import StepReport
from lm_trust.updates.ppo_clip import PPOClip


class PPOTrust:
    """PPO's clipped epochs within a bound on the step KL.

    Args:
        max_kl: bound on the mean exact KL(old || new), nats per step.
        settings: see `PPOClip`.

    Raises:
        ValueError: a negative max_kl.
    """

    def __init__(self, *, max_kl: float = 0.015, **settings: Any) -> None:
        if not max_kl >= 0:
            raise ValueError(f"max_kl must be 0 or more, got {max_kl}")
        self._max_kl = max_kl
        self._ppo = PPOClip(**settings)

    def step(self, policy: nn.Module, batch: Batch) -> StepReport:
        """Move the policy in place; where no part of the move improves the surrogate, not at all."""
        return self._ppo.step(policy, batch, max_kl=self._max_kl, needs_gain=True)

    def state_dict(self) -> dict[str, Any]:
        """As of `PPOClip`."""
        return self._ppo.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._ppo.load_state_dict(state)

"""A critic that is fitted in a process of its own, while the policy is updated.

Neither needs the other's result, and in control together they are most of an iteration's learning: on a second core the
fit costs no time. The network's tensors lie in shared memory, so that a fit need not be sent back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lm_trust.child import Child
from lm_trust.core.batch import Rollout
from lm_trust.training.critic import ValueCritic


class CriticProcess:
    """A `ValueCritic` whose optimizer lives, and whose fits run, in a child of this process.

    Args:
        critic: not used by anyone else from now on.

    Raises:
        UserError: this platform cannot fork.
    """

    def __init__(self, critic: ValueCritic) -> None:
        critic.network.share_memory()
        self._values, self.parameters = critic.values, critic.parameters
        self._child = Child(critic, "critic.own_process")

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Values of each step's state and of the state it led to, (B, T) each."""
        return self._values(rollout)

    def start_fit(
        self, rollout: Rollout, returns: Tensor, old_values: Tensor, progress: float = 0.0
    ) -> Callable[[], dict[str, float | None]]:
        """Begin `ValueCritic.fit`; the function that is returned waits for its numbers."""
        needed = replace(rollout, observations=None, next_critic_inputs=None, reference=None)
        self._child.start("fit", needed, returns, old_values, progress)
        return self._child.finish

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer and shuffles."""
        return self._child.call("state_dict")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._child.call("load_state_dict", state)

"""The critic: a value network of its own, fitted by regression, which cannot move the policy.

Both worlds use it; only the network and its inputs differ (observations here, frozen hidden states there).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lm_trust.core.advantages import masked_mean
from lm_trust.core.batch import Rollout
from lm_trust.core.seeding import make_generator
from lm_trust.core.surrogate import clipped_value_loss


class Critic(Protocol):
    """What the Trainer asks of a critic."""

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]: ...

    def fit(self, rollout: Rollout, returns: Tensor, old_values: Tensor) -> dict[str, float | None]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class NoCritic:
    """Values of zero, for estimators whose baseline is something else."""

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Two (B, T) tensors of zeros."""
        zeros = torch.zeros_like(rollout.rewards)
        return zeros, zeros

    def fit(self, rollout: Rollout, returns: Tensor, old_values: Tensor) -> dict[str, float | None]:
        """Nothing to fit."""
        return {"value_loss": None, "explained_variance": None}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class ValueCritic:
    """A value network fitted to the returns of each rollout by epochs of minibatch AdamW.

    Args:
        network: maps critic inputs (..., F) to values (...).
        learning_rate, weight_decay: AdamW's.
        epochs: passes over the rollout's valid steps.
        minibatches: parts that a pass is cut into.
        clip: see `clipped_value_loss`.
        seed: of the minibatch shuffles.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        learning_rate: float = 1e-3,
        epochs: int = 10,
        minibatches: int = 4,
        clip: float | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.network = network
        self._epochs = epochs
        self._minibatches = minibatches
        self._clip = clip
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, eps=1e-5, weight_decay=weight_decay)
        self._generator = make_generator(seed, "critic.minibatches")

    @torch.no_grad()
    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Values of each step's state and of the state it led to, (B, T) each."""
        return self.network(rollout.critic_inputs), self.network(rollout.next_critic_inputs)

    def fit(self, rollout: Rollout, returns: Tensor, old_values: Tensor) -> dict[str, float | None]:
        """Regress on the returns (B, T).

        Returns:
            value_loss: mean loss of the last pass. explained_variance: of the returns by the values before the fit.
        """
        mask = rollout.mask
        inputs, targets, old = rollout.critic_inputs[mask], returns[mask], old_values[mask]
        for _ in range(self._epochs):
            total = 0.0
            order = torch.randperm(len(targets), generator=self._generator)
            for rows in order.chunk(self._minibatches):
                loss = masked_mean(
                    clipped_value_loss(self.network(inputs[rows]), old[rows], targets[rows], clip=self._clip),
                    None,
                )
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self._optimizer.step()
                total += loss.item() * len(rows)
        variance = targets.var(unbiased=False).item()
        unexplained = (targets - old).var(unbiased=False).item()
        return {
            "value_loss": total / max(len(targets), 1),
            "explained_variance": 1 - unexplained / variance if variance > 0 else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer and shuffles."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])

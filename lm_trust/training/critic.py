"""The critic: a value network of its own, fitted by regression, which cannot move the policy.

Both worlds use it; only the network and its inputs differ (observations here, frozen hidden states there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lm_trust.core.adam import adam_step
from lm_trust.core.batch import Rollout
from lm_trust.core.linearisation import knows_its_derivative, output_with_pullback, set_gradients
from lm_trust.core.minibatches import shuffled
from lm_trust.core.processes import all_rows, mean, placed_rows, sum_gradients
from lm_trust.core.seeding import make_generator
from lm_trust.core.surrogate import clipped_value_loss, clipped_value_slope


class Critic(Protocol):
    """What the Trainer asks of a critic."""

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Values of each step's state and of the state it led to, (B, T) each, in units of return; without graph."""

    def start_fit(
        self, rollout: Rollout, returns: Tensor, old_values: Tensor, progress: float = 0.0
    ) -> Callable[[], dict[str, float | None]]:
        """Begin to regress on the returns (B, T), from values (B, T) before the fit.

        Args:
            rollout, returns, old_values: of this process's rows.
            progress: fraction of the training done, 0 to 1, for schedules.

        Returns:
            What ends the fit, and gives its `value_loss` and `explained_variance` for the log.
        """

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is trained."""

    def state_dict(self) -> dict[str, Any]:
        """What a later fit depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


class NoCritic:
    """Values of zero, for estimators whose baseline is something else."""

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Two (B, T) tensors of zeros."""
        zeros = torch.zeros_like(rollout.rewards)
        return zeros, zeros

    def start_fit(
        self, rollout: Rollout, returns: Tensor, old_values: Tensor, progress: float = 0.0
    ) -> Callable[[], dict[str, float | None]]:
        """Nothing to fit."""
        return lambda: {"value_loss": None, "explained_variance": None}

    def parameters(self) -> Iterable[nn.Parameter]:
        """None is trained."""
        return ()

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
        anneal: bring the learning rate linearly to zero over the training.
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
        anneal: bool = False,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.network = network
        self._learning_rate, self._anneal = learning_rate, anneal
        self._epochs = epochs
        self._minibatches = minibatches
        self._clip = clip
        self._optimizer = torch.optim.AdamW(
            network.parameters(), lr=learning_rate, eps=1e-5, weight_decay=weight_decay, fused=True
        )
        self._generator = make_generator(seed, "critic.minibatches")

    @torch.no_grad()
    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Values of each step's state and of the state it led to, (B, T) each."""
        return self.network(rollout.critic_inputs), self.network(rollout.next_critic_inputs)

    def start_fit(self, *given: Any) -> Callable[[], dict[str, float | None]]:
        """`fit`, done when its numbers are asked for."""
        return partial(self.fit, *given)

    def fit(
        self, rollout: Rollout, returns: Tensor, old_values: Tensor, progress: float = 0.0
    ) -> dict[str, float | None]:
        """Regress on the returns (B, T); `progress` is the fraction of the training done.

        Returns:
            value_loss: mean loss of the last pass. explained_variance: of the returns by the values before the fit.
        """
        if self._anneal:
            self._optimizer.param_groups[0]["lr"] = self._learning_rate * (1 - progress)
        mask = rollout.mask
        inputs, targets, old = rollout.critic_inputs[mask], returns[mask], old_values[mask]
        # A network that knows its own derivative needs no autograd: a tenth of the time is keeping versions and views.
        with torch.inference_mode(knows_its_derivative(self.network, "forward")):
            loss = self._regress(inputs, targets, old)
        self.network.zero_grad()  # outside of that mode nothing could be added to these
        return {"value_loss": loss, "explained_variance": explained_variance(targets, old)}

    def _regress(self, inputs: Tensor, targets: Tensor, old: Tensor) -> float:
        """On (N,) valid steps; returns the mean loss of the last pass."""
        placed = placed_rows(len(targets))
        parameters = list(self.network.parameters())
        losses = []
        for epoch in range(self._epochs):
            order, parts = shuffled(placed, self._minibatches, self._generator)
            # Gathered once a pass: the minibatches are then views.
            ordered = [each[order] for each in (inputs, targets, old)]
            for rows, count in parts:
                some_inputs, some_targets, some_old = (each[rows] for each in ordered)
                values, pullback = output_with_pullback(self.network, some_inputs)
                slope = clipped_value_slope(values, some_old, some_targets, clip=self._clip)
                set_gradients(parameters, pullback(slope / count))
                sum_gradients(parameters)
                adam_step(self._optimizer)
                if epoch == self._epochs - 1:
                    losses.append(clipped_value_loss(values, some_old, some_targets, clip=self._clip))
        return mean(torch.cat(losses))

    def parameters(self) -> Iterable[nn.Parameter]:
        """The network's."""
        return self.network.parameters()

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


def explained_variance(returns: Tensor, values: Tensor) -> float | None:
    """The share of the variance of returns (N,) that values (N,) account for; None where there is no variance.

    What is only rounding of returns that are all alike is none. Over those of all processes.
    """
    returns, values = all_rows(returns), all_rows(values)
    variance = returns.var(unbiased=False).item()
    unexplained = (returns - values).var(unbiased=False).item()
    rounding = 10 * torch.finfo(returns.dtype).eps * returns.abs().mean().item()
    return 1 - unexplained / variance if variance > rounding**2 else None

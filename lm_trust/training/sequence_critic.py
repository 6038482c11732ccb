"""The critic of whole sequences: its network sees the tokens themselves, and is fitted by minibatches of rows.

Such a network may stand on the policy's own model. It is told when it is at work, by its context `active()`, and only
there are its parameters trainable: outside, the model's trainable parameters are the policy's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lm_trust.core.batch import Rollout
from lm_trust.core.minibatches import shuffled
from lm_trust.core.passes import passes
from lm_trust.core.processes import placed_rows, sum_gradients, summed
from lm_trust.core.seeding import make_generator
from lm_trust.core.surrogate import clipped_value_loss
from lm_trust.training.critic import explained_variance


class SequenceNetwork(Protocol):
    """A module that values all states of B sequences at once."""

    def __call__(self, observations: Any) -> Tensor:
        """(B, T + 1) values: of the state before each of T tokens, and of the last state."""

    def named_parameters(self) -> Any: ...

    def active(self) -> AbstractContextManager[None]:
        """Within the context it can be called and differentiated; what it trains has `requires_grad`."""


class SequenceCritic:
    """A value network on token observations, fitted to the returns of each rollout by epochs of minibatch AdamW.

    Args:
        network: maps the rollout's observations to values.
        learning_rate, weight_decay: AdamW's.
        anneal: bring the learning rate linearly to zero over the training.
        epochs: passes over the rollout's rows.
        minibatches: parts that a pass is cut into, by rows.
        clip: see `clipped_value_loss`.
        microbatch_size: rows differentiated at a time; None takes a whole minibatch. Changes memory, not the result.
        seed: of the minibatch shuffles.
    """

    def __init__(
        self,
        network: SequenceNetwork,
        *,
        learning_rate: float = 3e-4,
        epochs: int = 2,
        minibatches: int = 4,
        clip: float | None = None,
        anneal: bool = False,
        weight_decay: float = 0.0,
        microbatch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.network = network
        self._learning_rate, self._anneal = learning_rate, anneal
        self._epochs, self._minibatches = epochs, minibatches
        self._clip = clip
        self._microbatch_size = microbatch_size
        with network.active():
            self._trained: dict[str, nn.Parameter] = {
                name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad
            }
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=learning_rate, eps=1e-5, weight_decay=weight_decay, fused=True
        )
        self._generator = make_generator(seed, "critic.minibatches")

    @torch.no_grad()
    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Values of each step's state and of the state it led to, (B, T) each."""
        with self.network.active():
            values = self.network(rollout.observations)
        return values[:, :-1], values[:, 1:]

    def start_fit(self, *given: Any) -> Callable[[], dict[str, float | None]]:
        """`fit`, done when its numbers are asked for: the model may be the policy's, which is being updated."""
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
        mask, total = rollout.mask, 0.0
        placed = placed_rows(len(mask))
        with self.network.active():
            for epoch in range(self._epochs):
                order, parts = shuffled(placed, self._minibatches, self._generator)
                for rows in (order[part.rows] for part in parts):
                    loss = self._differentiate(rollout.observations[rows], returns[rows], old_values[rows], mask[rows])
                    self._optimizer.step()
                    if epoch == self._epochs - 1:
                        total += loss
        self._optimizer.zero_grad()
        loss, count = summed(torch.tensor([total, mask.sum()], dtype=torch.float64, device=mask.device)).tolist()
        return {
            "value_loss": loss / max(count, 1),
            "explained_variance": explained_variance(returns[mask], old_values[mask]),
        }

    def _differentiate(self, observations: Any, returns: Tensor, old_values: Tensor, mask: Tensor) -> float:
        """Leave the gradient of a minibatch's mean loss over its valid steps in `.grad`; returns the sum of it here."""
        self._optimizer.zero_grad()
        count, total = summed(mask.sum()).clamp_min(1), 0.0
        for rows in passes(self.network, len(mask), self._microbatch_size):
            real = mask[rows]
            values = self.network(observations[rows])[:, :-1][real]
            loss = clipped_value_loss(values, old_values[rows][real], returns[rows][real], clip=self._clip).sum()
            (loss / count).backward()
            total += loss.item()
        sum_gradients(self._trained.values())
        return total

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is trained of the network."""
        return self._trained.values()

    def state_dict(self) -> dict[str, Any]:
        """What is trained of the network, optimizer and shuffles."""
        return {
            "network": {name: parameter.detach().clone() for name, parameter in self._trained.items()},
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: it is of another network.
        """
        saved = state["network"]
        if _shapes(saved) != _shapes(self._trained):
            raise ValueError("the critic's parameters have other names or shapes")
        for name, parameter in self._trained.items():
            parameter.copy_(saved[name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])


def _shapes(parameters: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in parameters.items()}

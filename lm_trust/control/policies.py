"""Multi-layer perceptrons for control: the policy and the critic's value network.

A policy is any module with `distribution(observations)`; this one is what published control results use.
Parameters are drawn from an explicit generator, so that making a network never touches the global one.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_trust.control.normaliser import ObservationNormaliser
from lm_trust.control.spaces import ActionSpace
from lm_trust.core import Categorical, DiagonalGaussian
from lm_trust.errors import UserError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": functional.relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class MLPPolicy(nn.Module):
    """Observations to a `Categorical` (discrete actions) or a `DiagonalGaussian` (continuous ones).

    Args:
        observation_size: O.
        action_space: kind and size of an action; `Environments.action_space` is one.
        hidden: widths of the hidden layers.
        activation: one of `ACTIVATIONS`.
        log_std: initial log standard deviation of every action dimension; a parameter, the same in every
            state.
        normaliser: applied to every observation; a submodule, so its statistics travel with the policy.
        generator: draws the initial weights; None draws them from a generator seeded with 0.

    Raises:
        UserError: an unknown activation.
    """

    def __init__(
        self,
        observation_size: int,
        action_space: ActionSpace,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        log_std: float = 0.0,
        normaliser: ObservationNormaliser | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.normaliser = normaliser
        # A small last layer starts the policy near uniform, whatever the observations' scale.
        sizes = [observation_size, *hidden, action_space.size]
        self.body = MLP(sizes, activation, last_gain=0.01, generator=generator)
        self.log_std: nn.Parameter | None = None
        if action_space.kind == "continuous":
            self.log_std = nn.Parameter(torch.full((action_space.size,), float(log_std)))

    def distribution(self, observations: Tensor) -> Categorical | DiagonalGaussian:
        """The distribution of the action at each raw observation, (..., O)."""
        if self.normaliser is not None:
            observations = self.normaliser(observations)
        output = self.body(observations)
        return Categorical(output) if self.log_std is None else DiagonalGaussian(output, self.log_std)


class ValueNetwork(nn.Module):
    """Raw observations (..., O) to values (...); made by `value_network`."""

    def __init__(self, body: nn.Module, normaliser: ObservationNormaliser | None) -> None:
        super().__init__()
        self.normaliser = normaliser
        self.body = body

    def forward(self, observations: Tensor) -> Tensor:
        if self.normaliser is not None:
            observations = self.normaliser(observations)
        return self.body(observations).squeeze(-1)


def value_network(
    observation_size: int,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    normaliser: ObservationNormaliser | None = None,
    generator: torch.Generator | None = None,
) -> ValueNetwork:
    """The critic's network. Pass the policy's own normaliser: both then see the same observations.

    Arguments as for `MLPPolicy`. Nothing else is shared with the policy: fitting the critic cannot move it.
    """
    return ValueNetwork(MLP([observation_size, *hidden, 1], activation, last_gain=1.0, generator=generator), normaliser)


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Weights are orthogonal (gain sqrt 2, `last_gain` at the last layer), biases zero.

    Args:
        sizes: widths from the input to the output.
        activation: one of `ACTIVATIONS`.
        last_gain: of the last layer's weights.
        generator: draws the weights; None is a new one seeded with 0.

    Raises:
        UserError: an unknown activation.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str,
        *,
        last_gain: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            near = difflib.get_close_matches(activation, ACTIVATIONS, n=1, cutoff=0.0)
            raise UserError(
                f"policy.activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}; did you mean {near[0]!r}?"
            )
        generator = generator or torch.Generator().manual_seed(0)
        # nn.Linear's own initialisation would draw from the global generator.
        *hidden, last = [nn.utils.skip_init(nn.Linear, *pair) for pair in itertools.pairwise(sizes)]
        for layer in (*hidden, last):
            gain = last_gain if layer is last else math.sqrt(2)
            nn.init.orthogonal_(layer.weight, gain=gain, generator=generator)
            nn.init.zeros_(layer.bias)
        self.hidden, self.last = nn.ModuleList(hidden), last
        self._activate = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        # On a handful of rows half of the time would be spent in nn.Linear's own call.
        for layer in self.hidden:
            x = self._activate(functional.linear(x, layer.weight, layer.bias))
        return functional.linear(x, self.last.weight, self.last.bias)

"""Multi-layer perceptrons for control: the policy and the critic's value network.

A policy is any module with `distribution(observations)`; this one is what published control results use.
Parameters are drawn from an explicit generator, so that making a network never touches the global one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_trust.control.normaliser import ObservationNormaliser
from lm_trust.control.spaces import ActionSpace
from lm_trust.core import Categorical, DiagonalGaussian, MultiCategorical
from lm_trust.core.linearisation import Linearisation
from lm_trust.errors import UserError, did_you_mean

_MINUS_ONE = torch.tensor(-1.0, device="cpu")  # without dimensions, it goes with tensors anywhere


def _tanh(x: Tensor) -> Tensor:
    # 2 sigmoid(2 x) - 1: on many rows torch's sigmoid takes a fifth of the time of its tanh (CPU, float32).
    return torch.tanh(x) if x.numel() < 8192 else torch.add(_MINUS_ONE, (2 * x).sigmoid_(), alpha=2)


# Of each activation: the function, and a tangent or cotangent g taken through it, given its value y.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "tanh": (_tanh, torch.ops.aten.tanh_backward),
    "relu": (functional.relu, lambda g, y: g * (y > 0)),
}


class MLPPolicy(nn.Module):
    """Observations to the distribution of the action.

    A `Categorical` of discrete actions, a `MultiCategorical` of multi-discrete ones, a `DiagonalGaussian` of
    continuous ones.

    Args:
        observation_size: O.
        action_space: kind and size of an action; `Environments.action_space` is one.
        hidden: widths of the hidden layers.
        activation: one of `ACTIVATIONS`.
        log_std: initial log standard deviation of every action dimension; a parameter, the same in every
            state.
        normaliser: applied to every observation; a submodule, so its statistics travel with the policy.
        generator: draws the initial weights; None draws them from a generator seeded with 0.

    Attributes:
        sizes: of a multi-discrete action, how many each dimension chooses from; None of another kind.

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
        self.sizes = action_space.sizes
        self.log_std: nn.Parameter | None = None
        if action_space.kind == "continuous":
            self.log_std = nn.Parameter(torch.full((action_space.size,), float(log_std)))

    def distribution(self, observations: Tensor) -> Categorical | MultiCategorical | DiagonalGaussian:
        """The distribution of the action at each raw observation, (..., O)."""
        if self.normaliser is not None:
            observations = self.normaliser(observations)
        return self._on(self.body(observations), self.log_std)

    def linearised(self, observations: Tensor) -> Linearisation:
        """The same distribution as `distribution`, with its derivative, without autograd; see `Linearisation`."""
        if self.normaliser is not None:
            observations = self.normaliser(observations)
        output, body_pushforward, body_pullback = self.body.linearised(observations)
        if self.log_std is None:
            return Linearisation(self._on(output, None), body_pushforward, body_pullback)

        # log_std is the first parameter, because a module's own come before those of its submodules.
        def pushforward(tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
            (mean,) = body_pushforward(tangents[1:])
            return mean, tangents[0].expand_as(mean)

        def pullback(mean: Tensor, log_std: Tensor) -> list[Tensor]:
            return [log_std.flatten(0, -2).sum(0), *body_pullback(mean)]

        return Linearisation(self._on(output, self.log_std.detach()), pushforward, pullback)

    def _on(self, output: Tensor, log_std: Tensor | None) -> Categorical | MultiCategorical | DiagonalGaussian:
        if log_std is not None:
            return DiagonalGaussian(output, log_std)
        return Categorical(output) if self.sizes is None else MultiCategorical(output, self.sizes)


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

    def linearised(self, observations: Tensor) -> Linearisation:
        """Values (...) with their derivative, without autograd; see `Linearisation`."""
        if self.normaliser is not None:
            observations = self.normaliser(observations)
        output, pushforward, pullback = self.body.linearised(observations)
        return Linearisation(
            output.squeeze(-1),
            lambda tangents: (pushforward(tangents)[0].squeeze(-1),),
            lambda cotangent: pullback(cotangent.unsqueeze(-1)),
        )


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
            near = did_you_mean(activation, ACTIVATIONS)
            raise UserError(f"policy.activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}{near}")
        generator = generator or torch.Generator().manual_seed(0)
        # nn.Linear's own initialisation would draw from the global generator.
        *hidden, last = [nn.utils.skip_init(nn.Linear, *pair) for pair in itertools.pairwise(sizes)]
        for layer in (*hidden, last):
            gain = last_gain if layer is last else math.sqrt(2)
            nn.init.orthogonal_(layer.weight, gain=gain, generator=generator)
            nn.init.zeros_(layer.bias)
        self.hidden, self.last = nn.ModuleList(hidden), last
        self.activation = activation  # by name, so that a policy can be sent to another process

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        activate, _ = ACTIVATIONS[self.activation]
        # On a handful of rows half of the time would be spent in nn.Linear's own call.
        for layer in self.hidden:
            x = activate(functional.linear(x, layer.weight, layer.bias))
        return functional.linear(x, self.last.weight, self.last.bias)

    def linearised(self, x: Tensor) -> Linearisation:
        """Output and derivative at x (..., inputs), which has one leading axis at least; see `Linearisation`.

        It is backpropagation written out: on minibatches of tens or hundreds of rows it takes half of autograd's time.
        """
        # Detached, so that nothing here is recorded; entering torch.no_grad in each map would take a tenth of the time.
        layers = [(layer.weight.detach(), layer.bias.detach()) for layer in (*self.hidden, self.last)]
        activate, through_activation = ACTIVATIONS[self.activation]
        lead, given = x.shape[:-1], [x.flatten(0, -2)]
        for weight, bias in layers[:-1]:
            given.append(activate(functional.linear(given[-1], weight, bias)))
        output = functional.linear(given[-1], *layers[-1])

        def pushforward(tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
            moved = functional.linear(given[0], tangents[0], tangents[1])
            for index in range(1, len(layers)):
                moved = functional.linear(through_activation(moved, given[index]), layers[index][0])
                moved += functional.linear(given[index], tangents[2 * index], tangents[2 * index + 1])
            return (moved.unflatten(0, lead),)

        def pullback(cotangent: Tensor) -> list[Tensor]:
            cotangent = cotangent.flatten(0, -2)
            gradients: list[Tensor] = []
            for index in range(len(layers) - 1, -1, -1):
                gradients = [cotangent.t() @ given[index], cotangent.sum(0), *gradients]
                if index:
                    cotangent = through_activation(cotangent @ layers[index][0], given[index])
            return gradients

        return Linearisation(output.unflatten(0, lead), pushforward, pullback)

"""Drawing the actions of a rollout.

A step asks a small network about a handful of rows, and nearly all of that time goes into calling torch's functions. In
numpy the same numbers take a fifth of it, and the noise of all steps is drawn before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lm_trust.control.normaliser import CLIP
from lm_trust.control.policies import MLPPolicy

# Raw observations (B, O) to actions as drawn, (B,) or (B, A). Those made here can be sent to another process.
Sampler = Callable[[np.ndarray], np.ndarray]

# Those of `policies.ACTIVATIONS`, in place.
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": lambda x: np.tanh(x, out=x),
    "relu": lambda x: np.maximum(x, 0, out=x),
}


def sampler(policy: nn.Module, generator: torch.Generator, steps: int, count: int) -> Sampler:
    """What draws from `policy.distribution`, for as long as the policy stands still.

    Of an `MLPPolicy` it takes the weights as they are now, and its actions are those that `distribution` would draw by
    the same noise, up to rounding.

    Args:
        policy: whose distribution it is.
        generator: of the noise.
        steps: how often it is asked.
        count: B, rows of observations each time.
    """
    if type(policy).distribution is not MLPPolicy.distribution:  # it may be of a class derived from that
        return _OfDistribution(policy, generator)
    if policy.log_std is not None:
        return _OfNetwork(_Network.of(policy), _deviations(policy.log_std, generator, (steps, count)), _gaussian)
    choose = _categorical if policy.sizes is None else _multi_categorical
    return _OfNetwork(_Network.of(policy), _handicaps(policy, generator, (steps, count)), choose)


@dataclass(frozen=True, eq=False)
class OfRows:
    """Draws for some of a sampler's rows alone, in whatever process, what it would draw for them among all.

    All rows are computed, because how a product of matrices is rounded depends on how many there are.
    """

    sampler: Sampler
    rows: slice
    count: int  # B

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """For observations of those rows."""
        given = np.zeros((self.count, *observations.shape[1:]), observations.dtype)
        given[self.rows] = observations
        return self.sampler(given)[self.rows]


@dataclass(frozen=True, eq=False)
class _OfDistribution:
    """Asks the policy itself."""

    policy: nn.Module
    generator: torch.Generator

    @torch.inference_mode()
    def __call__(self, observations: np.ndarray) -> np.ndarray:
        return self.policy.distribution(torch.from_numpy(observations)).sample(self.generator).numpy()


@dataclass(eq=False)
class _OfNetwork:
    """Chooses by the network's outputs and by noise.

    Args:
        network: of the outputs (B, outputs).
        noise: (T, B, ...) each.
        choose: from the outputs and a step's part of each noise to the actions.
    """

    network: _Network
    noise: Sequence[np.ndarray]
    choose: Callable[..., np.ndarray]
    step: int = 0

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        actions = self.choose(self.network(observations), *[each[self.step] for each in self.noise])
        self.step += 1
        return actions


@dataclass(frozen=True, eq=False)
class _Network:
    """Raw observations to what parameterises the distribution."""

    hidden: list[tuple[np.ndarray, np.ndarray]]
    last: tuple[np.ndarray, np.ndarray]
    activation: str
    normalisation: tuple[np.ndarray, np.ndarray] | None

    @classmethod
    def of(cls, policy: MLPPolicy) -> _Network:
        layers = [(_array(layer.weight).T, _array(layer.bias)) for layer in (*policy.body.hidden, policy.body.last)]
        normaliser, normalisation = policy.normaliser, None
        if normaliser is not None and normaliser.count:
            normalisation = _array(normaliser.shift), _array(normaliser.scale)
        return cls(layers[:-1], layers[-1], policy.body.activation, normalisation)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.normalisation is not None:
            shift, scale = self.normalisation
            x = x - shift
            x *= scale
            np.minimum(np.maximum(x, -CLIP, out=x), CLIP, out=x)
        activate = ACTIVATIONS[self.activation]
        for weight, bias in self.hidden:
            x = x @ weight
            x += bias
            activate(x)
        weight, bias = self.last
        x = x @ weight
        x += bias
        return x


def _deviations(log_std: Tensor, generator: torch.Generator, shape: tuple[int, int]) -> list[np.ndarray]:
    """(T, B, A) from the mean."""
    noise = torch.empty(*shape, len(log_std), dtype=log_std.dtype)
    for step in noise:  # one call each, so that two short rollouts draw what a long one does
        step.normal_(generator=generator)
    return [noise.numpy() * np.exp(_array(log_std))]


def _handicaps(policy: MLPPolicy, generator: torch.Generator, shape: tuple[int, int]) -> list[np.ndarray]:
    """Of each action dimension, (T, B, V_a): by how much the logits run behind in the race of `Categorical.sample`."""
    bias = policy.body.last.bias
    races = [torch.empty(*shape, size, dtype=bias.dtype) for size in policy.sizes or bias.shape]
    for step in zip(*races, strict=True):  # as above
        for race in step:
            race.exponential_(generator=generator)
    # In logarithms, so that the logits need not be normalised.
    return [_array(race.log_()) for race in races]


def _gaussian(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """As `DiagonalGaussian.sample` draws, from means (B, A)."""
    mean += deviation
    return mean


def _categorical(logits: np.ndarray, handicap: np.ndarray) -> np.ndarray:
    """As `Categorical.sample` draws, from logits (B, V)."""
    return (logits - handicap).argmax(-1)


def _multi_categorical(logits: np.ndarray, *handicaps: np.ndarray) -> np.ndarray:
    """As `MultiCategorical.sample` draws, from logits (B, sum of V_a)."""
    places = np.cumsum([handicap.shape[-1] for handicap in handicaps])[:-1]
    parts = zip(np.split(logits, places, axis=-1), handicaps, strict=True)
    return np.stack([_categorical(*part) for part in parts], axis=-1)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()

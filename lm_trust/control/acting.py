"""Drawing the actions of a rollout.

A step asks a small network about a handful of rows, and nearly all of that time goes into calling torch's functions. In
numpy the same numbers take a fifth of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lm_trust.control.policies import MLPPolicy

Sampler = Callable[[np.ndarray], np.ndarray]  # raw observations (B, O) to actions as drawn, (B,) or (B, A)

# Those of `policies.ACTIVATIONS`, in place.
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": lambda x: np.tanh(x, out=x),
    "relu": lambda x: np.maximum(x, 0, out=x),
}


def sampler(policy: nn.Module, generator: torch.Generator) -> Sampler:
    """What draws from `policy.distribution`, for as long as the policy stands still.

    Of an `MLPPolicy` it takes the weights as they are now, and its actions are those that `distribution` would draw by
    the same noise, up to rounding.
    """
    if type(policy).distribution is not MLPPolicy.distribution:  # it may be of a class derived from that
        return lambda observations: policy.distribution(torch.from_numpy(observations)).sample(generator).numpy()
    outputs = _outputs(policy)
    draw = _categorical(policy.sizes, generator) if policy.log_std is None else _gaussian(policy.log_std, generator)
    return lambda observations: draw(outputs(observations))


def _outputs(policy: MLPPolicy) -> Callable[[np.ndarray], np.ndarray]:
    """Raw observations to what parameterises the distribution."""
    normaliser, activate = policy.normaliser, ACTIVATIONS[policy.body.activation]
    *hidden, (last_weight, last_bias) = [
        (_array(layer.weight).T, _array(layer.bias)) for layer in (*policy.body.hidden, policy.body.last)
    ]
    normalised = normaliser is not None and bool(normaliser.count)
    if normalised:
        shift, scale, clip = _array(normaliser.shift), _array(normaliser.scale), normaliser.clip

    def outputs(x: np.ndarray) -> np.ndarray:
        if normalised:
            x = x - shift
            x *= scale
            np.minimum(np.maximum(x, -clip, out=x), clip, out=x)
        for weight, bias in hidden:
            x = x @ weight
            x += bias
            activate(x)
        x = x @ last_weight
        x += last_bias
        return x

    return outputs


def _gaussian(log_std: Tensor, generator: torch.Generator) -> Sampler:
    """As `DiagonalGaussian.sample` draws, from means (B, A)."""
    std = np.exp(_array(log_std))

    def draw(mean: np.ndarray) -> np.ndarray:
        mean += std * torch.from_numpy(np.empty_like(mean)).normal_(generator=generator).numpy()
        return mean

    return draw


def _categorical(sizes: tuple[int, ...] | None, generator: torch.Generator) -> Sampler:
    """As `Categorical.sample` draws from logits (B, V), and `MultiCategorical.sample` where there are several sizes."""

    def draw(logits: np.ndarray) -> np.ndarray:
        # The race of that method in logarithms: the logits need not be normalised.
        race = torch.from_numpy(np.empty_like(logits)).exponential_(generator=generator)
        return (logits - race.log_().numpy()).argmax(-1)

    if sizes is None:
        return draw
    places = np.cumsum(sizes)[:-1]
    return lambda logits: np.stack([draw(part) for part in np.split(logits, places, axis=-1)], axis=-1)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()

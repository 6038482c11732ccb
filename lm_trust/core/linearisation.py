"""A network's output together with its derivative by the parameters, as two linear maps.

The pushforward takes a tangent of the parameters to that of the output (J v), the pullback a cotangent of the output to
the parameters' gradient (J' w). First-order rules need only the second, a Gauss-Newton product needs both. On the small
networks of control most of the time would go into recording an autograd graph and walking it; a network that knows its
own derivative can spare that by a method `linearised(inputs)`. Any other is differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lm_trust.core.distributions import Distribution

Pullback = Callable[..., list[Tensor | None]]


class Linearisation(NamedTuple):
    """What `linearised(inputs)` of a network, or `linearised(observations)` of a policy, returns; without graph.

    Attributes:
        output: the network's tensor (...), or the policy's distribution.
        pushforward: from tangents of all the network's parameters, in module order, to the tuple of the tangents of the
            output (of a distribution: of each of its `parameters`).
        pullback: from cotangents of the same to the gradients of all the network's parameters, in module order.
    """

    output: Any
    pushforward: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    pullback: Pullback


def output_with_pullback(network: nn.Module, inputs: Any) -> tuple[Tensor, Pullback]:
    """The network's output, without graph, and its pullback.

    Args:
        network: maps inputs to a tensor.
        inputs: what it takes.

    Returns:
        The output (...), and the function from a cotangent (...) to the gradients of the sum of output * cotangent, one
        for each of the network's parameters, in module order (of frozen ones it may be None). It can be called once.
    """
    if hasattr(network, "linearised"):
        output, _, pullback = network.linearised(inputs)
        return output, pullback
    with torch.enable_grad():
        output = network(inputs)
    return output.detach(), lambda cotangent: _gradients(network, [output], [cotangent])


def distribution_with_pullback(policy: nn.Module, observations: Any) -> tuple[Distribution, Pullback]:
    """The policy's distribution, without graph, and the pullback of its parameters.

    Returns:
        The distribution, and the function from cotangents (one for each of `distribution.parameters`) to the gradients
        of the policy's parameters, as above.
    """
    if hasattr(policy, "linearised"):
        distribution, _, pullback = policy.linearised(observations)
        return distribution, pullback
    with torch.enable_grad():
        distribution = policy.distribution(observations)
    return distribution.detach(), lambda *cotangents: _gradients(policy, distribution.parameters, cotangents)


def set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Leave the gradients that a pullback gave in the trainable parameters' `.grad`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.requires_grad:
            parameter.grad = gradient


def _gradients(network: nn.Module, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, trained, cotangents, materialize_grads=True))
    return [next(gradients) if parameter.requires_grad else None for parameter in network.parameters()]

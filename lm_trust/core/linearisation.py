"""A network's output together with its derivative by the parameters, as two linear maps.

The pushforward takes a tangent of the parameters to that of the output (J v), the pullback a cotangent of the output to
the parameters' gradient (J' w). First-order rules need only the second, a Gauss-Newton product needs both. On the small
networks of control most of the time would go into recording an autograd graph and walking it; a network that knows its
own derivative can spare that by a method `linearised(inputs)`. Any other is differentiated by autograd: J v is then had
from two backward passes ("double vjp"). The pullback w -> J' w is linear in w, so differentiating it by w along v gives
J v; the graph of one pullback, whichever it was, serves every pushforward. A gradient's own pullback will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lm_trust.core.distributions import Distribution, require_members
from lm_trust.core.parameters import trainable_parameters

Pullback = Callable[..., list[Tensor | None]]

NOT_TWICE = "the policy's graph cannot be differentiated twice, use the method finite_difference"


class Linearisation(NamedTuple):
    """What `linearised(inputs)` of a network, or `linearised(observations)` of a policy, returns.

    The parameters are all of the network's, in module order; by autograd they are the trainable ones.

    Attributes:
        output: the network's tensor (...), or the policy's distribution; without graph, but by autograd.
        pushforward: from tangents of the parameters to the tuple of the tangents of the output (of a distribution: of
            each of its `parameters`).
        pullback: from cotangents of the same to the gradients of the parameters.
    """

    output: Any
    pushforward: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    pullback: Pullback


def knows_its_derivative(module: nn.Module, function: str = "distribution") -> bool:
    """Whether its method `linearised` speaks of this function: not if a derived class has replaced the function alone.

    Args:
        module: a policy, or a network.
        function: what would be differentiated; of a network "forward".
    """
    first = next((each for each in type(module).__mro__ if {"linearised", function} & vars(each).keys()), object)
    return "linearised" in vars(first)


def output_with_pullback(network: nn.Module, inputs: Any) -> tuple[Tensor, Pullback]:
    """The network's output, without graph, and its pullback.

    Args:
        network: maps inputs to a tensor.
        inputs: what it takes.

    Returns:
        The output (...), and the function from a cotangent (...) to the gradients of the sum of output * cotangent, one
        for each of the network's parameters, in module order (of frozen ones it may be None). It can be called once.
    """
    if knows_its_derivative(network, "forward"):
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
    if knows_its_derivative(policy):
        distribution, _, pullback = policy.linearised(observations)
        return distribution, pullback
    with torch.enable_grad():
        distribution = policy.distribution(observations)
    return distribution.detach(), lambda *cotangents: _gradients(policy, distribution.parameters, cotangents)


def linearised(policy: nn.Module, observations: Any) -> Linearisation:
    """The policy's distribution with both maps, between its trainable parameters and the distribution's own.

    Where all of a policy's parameters are trained and it knows its own derivative, from there; by autograd otherwise.
    """
    if knows_its_derivative(policy) and all(parameter.requires_grad for parameter in policy.parameters()):
        return policy.linearised(observations)
    return linearised_by_autograd(policy, observations)


def linearised_by_autograd(policy: nn.Module, observations: Any) -> Linearisation:
    """The same by autograd; the output has its graph, and both maps can be called any number of times.

    The first pullback keeps its graph for the pushforwards, so one that is wanted anyway costs nothing more.
    """
    maps = _Maps(policy, observations)
    return Linearisation(maps.distribution, maps.pushforward, maps.pullback)


class _Maps:
    """Pushforward and pullback of a policy by two backward passes."""

    def __init__(self, policy: nn.Module, observations: Any) -> None:
        self._trained = trainable_parameters(policy)
        with torch.enable_grad(), twice_differentiable():
            self.distribution = policy.distribution(observations)
        require_members(self.distribution, "parameters", "log_prob", "kl", "fisher_product", "detach")
        self._outputs = self.distribution.parameters
        self._live = [output for output in self._outputs if output.requires_grad]
        self._cotangents: list[Tensor] = []  # of the pullback that was kept,
        self._gradients: Sequence[Tensor] = ()  # and what it gave, a linear function of them
        self._checked = False

    def pullback(self, *cotangents: Tensor) -> list[Tensor]:
        given = [each for each, output in zip(cotangents, self._outputs, strict=True) if output.requires_grad]
        if self._gradients:
            return list(
                torch.autograd.grad(self._live, self._trained, given, retain_graph=True, materialize_grads=True)
            )
        self._cotangents = [each.detach().requires_grad_() for each in given]
        with torch.enable_grad():
            self._gradients = torch.autograd.grad(
                self._live, self._trained, self._cotangents, create_graph=True, materialize_grads=True
            )
        return [gradient.detach() for gradient in self._gradients]

    def pushforward(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not self._gradients:
            self.pullback(*(torch.zeros_like(output) for output in self._outputs))
        if not self._checked:
            require_second_derivative(self._gradients)
            self._checked = True
        moved = iter(
            torch.autograd.grad(self._gradients, self._cotangents, tangents, retain_graph=True, materialize_grads=True)
        )
        return tuple(next(moved) if output.requires_grad else torch.zeros_like(output) for output in self._outputs)


def twice_differentiable() -> AbstractContextManager[None]:
    """The context for a forward pass that will be differentiated twice.

    The fused attention kernels have no second derivative; the plain one has. No effect on other policies.
    """
    return sdpa_kernel(SDPBackend.MATH)


def set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Leave the gradients that a pullback gave in the trainable parameters' `.grad`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.requires_grad:
            parameter.grad = gradient


def _gradients(network: nn.Module, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, trained, cotangents, materialize_grads=True))
    return [next(gradients) if parameter.requires_grad else None for parameter in network.parameters()]


def require_second_derivative(gradients: Sequence[Tensor]) -> None:
    """Refuse a gradient whose graph is cut: `once_differentiable` operations drop out of J v without a word.

    Raises:
        RuntimeError: autograd put the node there that stands for such a cut.
    """
    waiting = [gradient.grad_fn for gradient in gradients if gradient.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if "Error" in node.name():
            raise RuntimeError(f"{NOT_TWICE}: an operation of the policy is marked once_differentiable")
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)

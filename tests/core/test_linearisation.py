"""The pullback of a network that autograd differentiates, and what is asked of one that knows its derivative."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_trust.core import Categorical
from lm_trust.core.linearisation import (
    Linearisation,
    distribution_with_pullback,
    linearised_by_autograd,
    output_with_pullback,
    set_gradients,
)


class Plain(nn.Module):
    """A policy that autograd must differentiate; its last layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        for parameter in self.body[2].parameters():
            parameter.requires_grad_(False)

    def forward(self, x):
        return self.body(x)

    def distribution(self, x):
        return Categorical(self.body(x))


class Knowing(nn.Module):
    def linearised(self, inputs):
        return Linearisation("output", "pushforward", "pullback")


def cotangent(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("function", [output_with_pullback, distribution_with_pullback])
def test_autograd_serves_a_network_that_has_no_pullback_of_its_own(function):
    network, x = Plain(), cotangent((2, 6, 3))
    given = cotangent((2, 6, 4))
    output, pullback = function(network, x)
    logits = output if function is output_with_pullback else output.logits
    assert torch.equal(logits, network(x)) and not logits.requires_grad
    set_gradients(list(network.parameters()), pullback(given))
    gradients = [parameter.grad for parameter in network.parameters()]
    assert [gradient is None for gradient in gradients] == [False, False, True, True]

    # central differences of <output, cotangent>, an independent route
    weight = network.body[0].weight
    with torch.no_grad():
        for index in [(0, 0), (4, 2), (2, 1)]:
            start, values = weight[index].item(), []
            for step in (1e-6, -1e-6):
                weight[index] = start + step
                values.append((network(x) * given).sum().item())
            weight[index] = start
            assert gradients[0][index].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_a_network_that_knows_its_derivative_is_asked():
    assert (
        output_with_pullback(Knowing(), None) == distribution_with_pullback(Knowing(), None) == ("output", "pullback")
    )


@pytest.mark.parametrize("first", ["pushforward", "pullback"])
def test_both_maps_by_autograd_are_the_jacobian_whichever_is_called_first(first):
    policy, x = Plain(), cotangent((2, 6, 3))
    trained = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    fixed = {name: value.detach() for name, value in policy.named_parameters() if not value.requires_grad}
    tangents = [0.1 + cotangent(value.shape) for value in trained.values()]

    def logits(weights):
        return torch.func.functional_call(policy, weights | fixed, (x,))

    _, expected = torch.func.jvp(logits, (trained,), (dict(zip(trained, tangents, strict=True)),))
    _, transposed = torch.func.vjp(logits, trained)
    _, pushforward, pullback = linearised_by_autograd(policy, x)
    if first == "pullback":
        pullback(cotangent((2, 6, 4)).square())
    for _ in range(2):
        torch.testing.assert_close(pushforward(tangents)[0], expected, rtol=0, atol=1e-12)
        given = cotangent((2, 6, 4))
        for found, other in zip(pullback(given), transposed(given)[0].values(), strict=True):
            torch.testing.assert_close(found, other, rtol=0, atol=1e-12)
            assert not found.requires_grad

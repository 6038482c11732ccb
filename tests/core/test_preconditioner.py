"""A preconditioner from the gradient: against dense algebra, and on Fisher matrices like those of a linear layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_trust.core import conjugate_gradient
from lm_trust.core.preconditioner import FLOOR, gradient_preconditioner


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def parameters_of(*shapes):
    return [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]


def dense(apply, size):
    return torch.stack([apply(row) for row in torch.eye(size, dtype=torch.float64)])


def test_it_is_the_inverse_root_of_each_blocks_input_side():
    parameters = parameters_of((3, 7), (5, 2), (4,))
    gradient = normal(35)
    found = dense(gradient_preconditioner(gradient, parameters), 35)

    floor = FLOOR * gradient.square().mean()
    blocks = []
    for rows, block in ((3, gradient[:21].view(3, 7)), (5, gradient[21:31].view(5, 2)), (4, gradient[31:].view(4, 1))):
        columns = block.T @ block / rows + floor * torch.eye(block.shape[1], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(columns)
        root = (vectors * values.sqrt()) @ vectors.T
        blocks.append(torch.kron(torch.eye(rows, dtype=torch.float64), root / floor.sqrt()))
    torch.testing.assert_close(found @ torch.block_diag(*blocks), torch.eye(35, dtype=torch.float64))
    torch.testing.assert_close(found, found.T)


def test_a_tensor_of_more_dimensions_is_taken_as_a_matrix():
    gradient = normal(24)
    vector = normal(24)
    convolution = gradient_preconditioner(gradient, parameters_of((2, 3, 4)))
    assert convolution(vector).equal(gradient_preconditioner(gradient, parameters_of((2, 12)))(vector))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_size_of_the_gradient_does_not_matter(scale):
    parameters = parameters_of((3, 7), (5, 2))
    gradient, vector = normal(2, 31)
    expected = gradient_preconditioner(gradient, parameters)(vector)
    torch.testing.assert_close(gradient_preconditioner(scale * gradient, parameters)(vector), expected)


def test_a_block_without_gradient_is_left_as_it_is():
    """An adapter's A at its start, where B = 0."""
    parameters = parameters_of((2, 6), (5, 2))
    gradient = torch.cat([torch.zeros(12, dtype=torch.float64), normal(10)])
    vector = normal(22)
    assert gradient_preconditioner(gradient, parameters)(vector)[:12].equal(vector[:12])


def layer(outputs=12, inputs=40, steps=400):
    """The Fisher of a linear layer whose inputs have a few strong directions, and a gradient of noise from it."""
    strength = torch.logspace(0, -3, inputs, dtype=torch.float64)
    basis = torch.linalg.qr(normal(inputs, inputs)).Q
    x = normal(steps, inputs) * strength @ basis
    delta = normal(steps, outputs)
    scores = torch.einsum("to,ti->toi", delta, x).flatten(1)
    advantages = normal(steps)
    return scores.T @ scores / steps, advantages @ scores / steps, parameters_of((outputs, inputs))


def test_six_iterations_do_what_ten_do_without_it_on_the_fisher_of_a_linear_layer():
    fisher, gradient, parameters = layer()

    def gain(iterations, preconditioner=None):
        """The quadratic model's at the same quadratic KL."""
        x = conjugate_gradient(
            lambda v: fisher @ v,
            gradient,
            max_iterations=iterations,
            damping=1e-4,
            preconditioner=preconditioner,
        ).solution
        return gradient @ x / (x @ fisher @ x).sqrt()

    assert gain(6, gradient_preconditioner(gradient, parameters)) > gain(10)


def test_half_precision_has_one_too():
    parameters, gradient = parameters_of((4, 6), (5,)), normal(29)
    vector = normal(29)
    whole = gradient_preconditioner(gradient, parameters)(vector)
    rounded = [nn.Parameter(parameter.detach().bfloat16()) for parameter in parameters]
    half = gradient_preconditioner(gradient.bfloat16(), rounded)(vector.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.to(whole.dtype), whole, rtol=0.05, atol=0.05)

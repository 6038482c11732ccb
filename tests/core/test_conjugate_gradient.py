"""Conjugate gradient against a dense solve, and each of its reasons to stop."""

import itertools
import math

import pytest
import torch

from lm_trust.core import conjugate_gradient

P = 12


def system(size=P, condition=50.0, seed=0):
    """A symmetric positive definite matrix with a known spread of eigenvalues, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    return basis @ eigenvalues.diag() @ basis.T, torch.randn(size, generator=generator, dtype=torch.float64)


class Counting:
    """A matrix as an operator that counts its products."""

    def __init__(self, matrix):
        self.matrix, self.products = matrix, 0

    def __call__(self, vector):
        self.products += 1
        return self.matrix @ vector


def test_solves_as_a_dense_solver_does():
    for seed in range(5):
        matrix, b = system(seed=seed)
        result = conjugate_gradient(lambda v, m=matrix: m @ v, b, max_iterations=100, tolerance=1e-12)
        torch.testing.assert_close(result.solution, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-9)
        assert result.stopped == "converged"


def test_the_product_with_the_solution_comes_along_without_the_damping():
    matrix, b = system()
    for damping in (0.0, 0.5):
        result = conjugate_gradient(lambda v: matrix @ v, 300 * b, max_iterations=4, damping=damping)
        torch.testing.assert_close(result.product, matrix @ result.solution, rtol=1e-9, atol=1e-9)
        assert result.curvature == pytest.approx(result.solution.dot(result.product).item(), rel=1e-9)


def test_is_exact_in_as_many_iterations_as_dimensions():
    matrix, b = system(condition=20.0)
    result = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=P, tolerance=1e-30)
    torch.testing.assert_close(result.solution, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
    assert result.iterations <= P


def test_needs_one_iteration_for_each_distinct_eigenvalue():
    basis, _ = torch.linalg.qr(system()[0])
    eigenvalues = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64).repeat(P // 3)
    matrix = basis @ eigenvalues.diag() @ basis.T
    result = conjugate_gradient(lambda v: matrix @ v, system()[1], max_iterations=P, tolerance=1e-8)
    assert result.stopped == "converged"
    assert result.iterations == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_beyond_its_precision_it_has_converged(dtype):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        diagonal = (1 + torch.rand(6, generator=generator)).to(dtype)
        b = torch.randn(6, generator=generator).to(dtype)
        found = conjugate_gradient(lambda v, d=diagonal: d * v, b, max_iterations=200, tolerance=0.0)
        assert found.stopped == "converged"
        torch.testing.assert_close(found.solution, b / diagonal, rtol=0.05, atol=0.05)


def test_stops_at_the_iteration_limit_and_says_so():
    matrix, b = system(condition=1e4)
    operator = Counting(matrix)
    result = conjugate_gradient(operator, b, max_iterations=3)
    assert result.stopped == "max_iterations"
    assert result.iterations == 3
    assert operator.products <= 4  # a product is the cost of the whole step: none is wasted
    assert result.residual_norm > 0


def test_the_residual_reported_is_that_of_the_solution():
    matrix, b = system(condition=1e3)
    for iterations in (1, 3, 6):
        result = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=iterations)
        assert result.residual_norm == pytest.approx((b - matrix @ result.solution).norm().item(), rel=1e-6)


def test_each_iteration_improves_the_quadratic_model():
    matrix, b = system(condition=1e3)
    model = []
    for iterations in range(1, 8):
        x = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=iterations).solution
        model.append((b @ x - 0.5 * x @ matrix @ x).item())
    assert all(later > earlier for earlier, later in itertools.pairwise(model))


def test_the_reported_curvature_is_that_of_the_solution():
    matrix, b = system()
    result = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=5)
    expected = (result.solution @ matrix @ result.solution).item()
    assert result.curvature == pytest.approx(expected, rel=1e-8)


def test_a_good_preconditioner_saves_iterations_on_a_badly_scaled_system():
    generator = torch.Generator().manual_seed(3)
    size = 40
    scale = torch.logspace(-3, 3, size, dtype=torch.float64)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64) / size
    core = torch.eye(size, dtype=torch.float64) + noise @ noise.T
    matrix = scale[:, None] * core * scale
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    diagonal = matrix.diagonal()
    exact = torch.linalg.solve(matrix, b)

    plain = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=400, tolerance=1e-10)
    scaled = conjugate_gradient(
        lambda v: matrix @ v, b, max_iterations=400, tolerance=1e-10, preconditioner=lambda v: v / diagonal
    )
    assert scaled.stopped == "converged"
    assert scaled.iterations < 0.5 * plain.iterations
    assert ((scaled.solution - exact).norm() / exact.norm()).item() < 1e-6


def test_the_exact_inverse_as_preconditioner_needs_one_iteration():
    matrix, b = system(condition=1e6)
    inverse = torch.linalg.inv(matrix)
    result = conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-6, preconditioner=lambda v: inverse @ v)
    assert result.iterations == 1
    torch.testing.assert_close(result.solution, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)


def test_the_identity_as_preconditioner_changes_nothing():
    matrix, b = system()
    plain = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=5)
    same = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=5, preconditioner=lambda v: v.clone())
    torch.testing.assert_close(plain.solution, same.solution, rtol=1e-12, atol=1e-12)


def test_a_zero_right_hand_side_has_the_zero_solution_without_a_product():
    operator = Counting(system()[0])
    result = conjugate_gradient(operator, torch.zeros(P, dtype=torch.float64))
    assert result.stopped == "zero"
    assert result.iterations == 0
    assert operator.products == 0
    assert torch.equal(result.solution, torch.zeros(P, dtype=torch.float64))


def test_negative_curvature_stops_and_what_was_found_before_is_kept():
    matrix = torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    result = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=10)
    assert result.stopped == "negative_curvature"
    assert result.solution.isfinite().all()
    assert (result.solution @ b).item() >= 0  # never a direction that goes downhill on b


def test_negative_curvature_at_the_first_product_gives_a_finite_solution():
    b = torch.ones(3, dtype=torch.float64)
    result = conjugate_gradient(lambda v: -v, b)
    assert result.stopped == "negative_curvature"
    assert result.solution.isfinite().all()


def test_a_singular_operator_does_not_divide_by_zero():
    b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    result = conjugate_gradient(lambda v: torch.zeros_like(v), b)
    assert result.stopped == "negative_curvature"
    assert result.solution.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_number_stops(bad):
    matrix, b = system()
    poisoned = b.clone()
    poisoned[4] = bad
    assert conjugate_gradient(lambda v: matrix @ v, poisoned).stopped == "non_finite"

    calls = []

    def breaks_later(vector):
        calls.append(1)
        product = matrix @ vector
        return product if len(calls) < 3 else product * bad

    result = conjugate_gradient(breaks_later, b)
    assert result.stopped == "non_finite"
    assert len(calls) == 3
    assert result.solution.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_of_the_right_hand_side_does_not_matter(scale):
    matrix, b = system()
    base = conjugate_gradient(lambda v: matrix @ v, b, max_iterations=100, tolerance=1e-6)
    result = conjugate_gradient(lambda v: matrix @ v, scale * b, max_iterations=100, tolerance=1e-6)
    assert result.stopped == base.stopped == "converged"
    assert result.iterations == base.iterations
    torch.testing.assert_close(result.solution / scale, base.solution, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_operator_does_not_matter(scale):
    matrix, b = system()
    result = conjugate_gradient(lambda v: scale * (matrix @ v), b, max_iterations=100)
    assert result.stopped == "converged"
    torch.testing.assert_close(result.solution * scale, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-9)


def test_single_precision_scales():
    """In float32 the square of 1e-30 underflows: the solver must not mistake a small gradient for none."""
    matrix, b = system()
    matrix, b = matrix.float(), b.float()
    for scale in (1e-30, 1e30):
        result = conjugate_gradient(lambda v: matrix @ v, scale * b, max_iterations=100, tolerance=1e-5)
        assert result.stopped == "converged", scale
        torch.testing.assert_close(result.solution / scale, torch.linalg.solve(matrix, b), rtol=1e-3, atol=1e-3)


def test_the_right_hand_side_is_left_alone():
    matrix, b = system()
    copy = b.clone()
    conjugate_gradient(lambda v: matrix @ v, b)
    assert torch.equal(b, copy)

"""Conjugate gradient for the trust-region direction: it says why it stopped, and never hands back a non-finite step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConjugateGradientResult:
    """What conjugate gradient found.

    Attributes:
        solution: (P,) approximate solution of (A + damping I) x = b; the last finite iterate.
        iterations: products with A that entered the solution.
        residual_norm: |b - (A + damping I) x|, by the recurrence.
        curvature: x' A x, without the damping.
        product: (P,) A x, without the damping.
        stopped: "converged", "max_iterations", "zero" (b is zero), "negative_curvature" or "non_finite".
    """

    solution: Tensor
    iterations: int
    residual_norm: float
    curvature: float
    product: Tensor
    stopped: str


@torch.no_grad()
def conjugate_gradient(
    operator: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    max_iterations: int = 10,
    tolerance: float = 1e-10,
    damping: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> ConjugateGradientResult:
    """Solve (A + damping I) x = b for a symmetric positive semidefinite A known by its products.

    Nocedal and Wright, "Numerical Optimization" (2006), algorithm 5.3, with the stops of a truncated Newton method.

    Args:
        operator: v -> A v, both (P,).
        b: (P,).
        max_iterations: products with A, at most.
        tolerance: converged once the residual is at most tolerance * |b|.
        damping: added to the diagonal here, and not by the operator, where x' A x is wanted: a difference of two
            damped numbers would lose it to rounding once A is small beside the damping.
        preconditioner: v -> M^-1 v for an approximation M of the damped A, symmetric positive definite.
    """
    largest, zero = b.abs().max(), torch.zeros_like(b)
    if not torch.isfinite(largest):
        return ConjugateGradientResult(zero, 0, float("nan"), 0.0, zero, "non_finite")
    if largest == 0:
        return ConjugateGradientResult(zero, 0, 0.0, 0.0, zero, "zero")

    # Solving for b at unit size keeps squared norms in range for gradients of any size.
    unit = b / largest
    x, residual, undamped_x = torch.zeros_like(unit), unit.clone(), torch.zeros_like(unit)
    # A residual whose square is zero in this precision is none, whatever is asked for.
    target = max(tolerance, torch.finfo(b.dtype).tiny ** 0.5) * residual.norm()
    preconditioned = preconditioner(residual) if preconditioner else residual
    direction = preconditioned.clone()
    rho = residual.dot(preconditioned)
    iterations, stopped = 0, "max_iterations"
    while iterations < max_iterations:
        undamped = operator(direction)
        product = undamped + damping * direction
        curvature = direction.dot(product)
        if not torch.isfinite(curvature):
            stopped = "non_finite"
            break
        if curvature <= 0:
            stopped = "negative_curvature"
            break
        alpha = rho / curvature
        candidate = x + alpha * direction
        if not torch.isfinite(candidate).all():
            stopped = "non_finite"
            break
        x = candidate
        undamped_x = undamped_x + alpha * undamped
        residual = residual - alpha * product
        iterations += 1
        if residual.norm() <= target:
            stopped = "converged"
            break
        preconditioned = preconditioner(residual) if preconditioner else residual
        next_rho = residual.dot(preconditioned)
        direction = preconditioned + (next_rho / rho) * direction
        rho = next_rho
    return ConjugateGradientResult(
        solution=x * largest,
        iterations=iterations,
        residual_norm=float(residual.norm()) * float(largest),
        curvature=float(x.dot(undamped_x)) * float(largest) * float(largest),
        product=undamped_x * largest,
        stopped=stopped,
    )

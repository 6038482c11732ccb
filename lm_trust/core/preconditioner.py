"""A preconditioner for the trust-region system that costs no Fisher product: what the gradient says of the Fisher.

The Fisher of a linear layer is close to a Kronecker product of a factor of its outputs and one of its inputs (Martens
and Grosse 2015, "K-FAC"), and the inputs' is the one whose eigenvalues spread: activations have a few strong
directions. A policy gradient is a sum of the same scores, weighted by advantages that are mostly noise, so that its own
G'G is a sample of the inputs' factor. Its square root is taken, as Shampoo does (Gupta et al. 2018): one sample
overstates the spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lm_trust.core.parameters import flatten, unflatten

# What a step may be given: the one below, v -> M^-1 v of any other, or none.
Preconditioner = Literal["gradient"] | Callable[[Tensor], Tensor] | None

# Of the gradient's mean square, what is added to G'G / m: between a tenth and three, conjugate gradient takes the same
# number of iterations.
FLOOR = 0.3


@torch.no_grad()
def gradient_preconditioner(gradient: Tensor, parameters: Sequence[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """v -> M^-1 v, with M block-diagonal: for a parameter of m rows with gradient G, (G'G / m + floor I)^(1/2).

    Only directions in G's row space are told from each other, so the singular value decomposition of G is all that is
    needed: of rank r for an adapter's m x r or r x n. A multiple of M is as good as M for conjugate gradient; this one
    is the identity outside of that space, and does not change where the gradient is multiplied by a number.

    Args:
        gradient: (P,), not zero.
        parameters: those it belongs to. Vectors count as one column; of more than two dimensions all but the first are
            columns.
    """
    floor = FLOOR * gradient.square().mean()
    factors = []
    for block in unflatten(gradient, parameters):
        block = _as_matrix(block)
        precise = torch.promote_types(block.dtype, torch.float32)  # nothing is decomposed in half precision
        _, scale, directions = torch.linalg.svd(block.to(precise), full_matrices=False)
        shrinkage = (floor / (scale.square() / len(block) + floor)).sqrt() - 1
        factors.append((directions.to(block.dtype), shrinkage.to(block.dtype)))

    def apply(vector: Tensor) -> Tensor:
        blocks = [_as_matrix(block) for block in unflatten(vector, parameters)]
        return flatten([b + (b @ v.T * s) @ v for b, (v, s) in zip(blocks, factors, strict=True)])

    return apply


def _as_matrix(block: Tensor) -> Tensor:
    return block.flatten(1) if block.dim() > 1 else block.reshape(-1, 1)

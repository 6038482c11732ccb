"""The trainable parameters of a policy as one flat vector of length P, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def trainable_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters with `requires_grad`, in module order.

    Raises:
        ValueError: the policy has none.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the policy has no trainable parameters: none has requires_grad")
    return parameters


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """(P,) a new vector holding the tensors one after another."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the (P,) vector in the shapes (and the dtypes) of `like`."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view_as(tensor).to(tensor.dtype) for piece, tensor in zip(pieces, like, strict=True)]


@torch.no_grad()
def assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Copy the (P,) vector into the parameters, in place."""
    for parameter, values in zip(parameters, unflatten(vector, parameters), strict=True):
        parameter.copy_(values)

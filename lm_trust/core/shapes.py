"""Tensors that belong together step by step: of other shapes they would broadcast to other numbers without a word."""

from __future__ import annotations

from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Check that all tensors, given by their names, are of one shape.

    Raises:
        ValueError: they are not; it names them and their shapes.
    """
    shapes = [tensor.shape for tensor in tensors.values()]
    if any(shape != shapes[0] for shape in shapes):
        given = _listed([str(tuple(shape)) for shape in shapes])
        raise ValueError(f"{_listed(list(tensors))} of shapes {given}: one of each a step")


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]])

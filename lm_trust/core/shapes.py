"""Tensors that belong together step by step: of other shapes they would broadcast to other numbers without a word."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def require_tensors(**given: Any) -> None:
    """Check that all that is given, by its name, is a tensor: a buffer of numpy's is the usual other thing.

    Raises:
        TypeError: it is not; it names it and its kind.
    """
    for name, each in given.items():
        if not isinstance(each, Tensor):
            kind = type(each)
            raise TypeError(f"{name}: expected a torch.Tensor, got a {kind.__module__}.{kind.__qualname__}")


def require_same_shape(**tensors: Tensor) -> None:
    """Check that all tensors, given by their names, are of one shape.

    Raises:
        TypeError: one is no tensor.
        ValueError: they are not of one; it names them and their shapes.
    """
    require_tensors(**tensors)
    shapes = [tensor.shape for tensor in tensors.values()]
    if any(shape != shapes[0] for shape in shapes):
        given = _listed([str(tuple(shape)) for shape in shapes])
        raise ValueError(f"{_listed(list(tensors))} of shapes {given}: one of each a step")


def require_a_row_each(observations: Any, **tensors: Tensor) -> None:
    """Check that observations have the rows of the tensors. Of other kinds than a tensor nobody knows what len counts.

    Raises:
        ValueError: they have not; it names the tensors and the numbers.
    """
    for name, tensor in tensors.items():
        if isinstance(observations, Tensor) and len(observations) != len(tensor):
            raise ValueError(
                f"observations and {name} of {len(observations)} and {len(tensor)} rows: one of each a row"
            )


def require_a_step_each(actions: Tensor, **tensors: Tensor) -> None:
    """Check that the tensors are of one shape and that there is an action, of any shape, for each of their elements.

    Raises:
        TypeError: one is no tensor.
        ValueError: they are not, or there is not; it names them and their shapes.
    """
    require_tensors(actions=actions)
    require_same_shape(**tensors)
    name, steps = next(iter(tensors.items()))
    if actions.shape[: steps.ndim] != steps.shape:
        raise ValueError(
            f"actions and {name} of shapes {tuple(actions.shape)} and {tuple(steps.shape)}: one of each a step"
        )


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]])

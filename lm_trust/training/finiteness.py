"""Where the numbers of a rollout first fail to be numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Offender(NamedTuple):
    """A number that is not finite: the name of the quantity, its value, and the row and the step where it stands."""

    quantity: str
    value: float
    row: int
    step: int


def first_non_finite(quantities: Mapping[str, Tensor], mask: Tensor) -> Offender | None:
    """The first number at a valid step that is NaN or infinite; None where all are finite.

    Args:
        quantities: (B, T) each, a cause before what is computed from it: the first that is broken anywhere is named,
            in its first row and there at its first step.
        mask: (B, T) bool; what stands at other steps may be anything.
    """
    for name, each in quantities.items():
        broken = mask & ~each.isfinite()
        if broken.any():
            row, step = broken.nonzero()[0].tolist()
            return Offender(name, each[row, step].item(), row, step)
    return None

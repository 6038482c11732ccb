"""The rows of observations, whatever holds them.

A tensor and a policy's own kind of observations are asked themselves, by `[rows]` and `len`. Of a dictionary or a tuple
that a policy takes apart those would speak of its parts, so its parts are asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def select_rows(observations: Any, rows: Any) -> Any:
    """The chosen rows; parts that are None stay so.

    Args:
        observations: B rows.
        rows: a slice, indices, or a mask (B, ...).
    """
    if observations is None:
        return None
    if isinstance(observations, Mapping):
        return {name: select_rows(part, rows) for name, part in observations.items()}
    if isinstance(observations, tuple):
        parts = [select_rows(part, rows) for part in observations]
        return type(observations)(*parts) if hasattr(observations, "_fields") else tuple(parts)
    return observations[rows]


def row_count(observations: Any) -> int:
    """How many rows they have.

    Raises:
        ValueError: parts that have not the same number of rows, or no part at all.
    """
    counts = {len(part) for part in _parts(observations)}
    if len(counts) != 1:
        found = " and ".join(map(str, sorted(counts))) or "no"
        raise ValueError(f"observations with parts of {found} rows: a mask must say how many there are")
    return counts.pop()


def _parts(observations: Any) -> Iterator[Any]:
    if isinstance(observations, Mapping | tuple):
        for part in observations.values() if isinstance(observations, Mapping) else observations:
            yield from _parts(part)
    elif observations is not None:
        yield observations

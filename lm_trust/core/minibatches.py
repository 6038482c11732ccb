"""Shuffled minibatches of rows that may be spread over several processes."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lm_trust.core.processes import RowRange


class Minibatch(NamedTuple):
    """One of a pass over the rows.

    Attributes:
        rows: where its rows of this process stand in the shuffled order; there may be none.
        total: its rows of all processes.
    """

    rows: slice
    total: int


def shuffled(placed: RowRange, minibatches: int, generator: torch.Generator) -> tuple[Tensor, list[Minibatch]]:
    """One pass over the rows of all processes, in an order that does not depend on how they are spread.

    Args:
        placed: the rows, of which this process holds some.
        minibatches: parts that the pass is cut into, equal to within a row; no more than there are rows.
        generator: in the same state in all processes.

    Returns:
        The (count,) indices of this process's rows as they come in the pass, so that each minibatch is a slice of them,
        and the minibatches.
    """
    order = torch.randperm(placed.total, generator=generator)
    count = min(minibatches, placed.total)
    edges = [placed.total * part // count for part in range(count + 1)] if count else []
    chunks = [slice(start, stop) for start, stop in pairwise(edges)]
    if placed.count == placed.total:  # each selection would be of all
        return order, [Minibatch(chunk, chunk.stop - chunk.start) for chunk in chunks]
    own = [placed.own(order[chunk]) for chunk in chunks]
    parts, start = [], 0
    for rows, chunk in zip(own, chunks, strict=True):
        parts.append(Minibatch(slice(start, start + len(rows)), chunk.stop - chunk.start))
        start += len(rows)
    return torch.cat(own), parts

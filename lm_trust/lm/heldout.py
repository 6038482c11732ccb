"""Holding out a share of the rows, with no row on one side that is also on the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_trust.core.seeding import make_generator


def split_rows(identities: Sequence[str], fraction: float, *, seed: int, stream: str) -> tuple[list[int], list[int]]:
    """Indices of (the other, the held-out) rows, the others in their own order and the held-out ones in none.

    So an evaluation of the first ones sees all kinds of sorted data. A side may be empty.

    Args:
        identities: of N rows; those of the same stay on one side.
        fraction: of the distinct ones that are held out, at least one; nothing is where it is not positive.
        seed, stream: decide which, and nothing else does.
    """
    generator = make_generator(seed, stream)
    distinct = list(dict.fromkeys(identities))
    order = torch.randperm(len(distinct), generator=generator).tolist()
    count = max(1, round(fraction * len(distinct))) if fraction > 0 else 0
    chosen = {distinct[index] for index in order[:count]}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, identity in enumerate(identities):
        sides[identity in chosen].append(index)
    others, heldout = sides
    return others, [heldout[index] for index in torch.randperm(len(heldout), generator=generator).tolist()]

"""How one pass over the rows is cut into minibatches."""

from __future__ import annotations

import pytest
import torch

from lm_trust.core.minibatches import shuffled
from lm_trust.core.processes import RowRange


@pytest.mark.parametrize(
    ("rows", "minibatches"), [(9, 8), (12, 8), (33, 16), (64, 10), (10, 4), (3, 5), (8, 2), (1, 1)]
)
def test_a_pass_is_cut_into_as_many_parts_as_asked_for_equal_to_within_a_row(rows, minibatches):
    order, parts = shuffled(RowRange(0, rows, rows), minibatches, torch.Generator().manual_seed(0))
    sizes = [part.total for part in parts]
    assert len(parts) == min(minibatches, rows) and sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1
    assert sorted(order.tolist()) == list(range(rows))
    seen = torch.cat([order[part.rows] for part in parts])
    assert torch.equal(seen, order)


def test_no_rows_are_no_minibatches():
    _, parts = shuffled(RowRange(0, 0, 0), 4, torch.Generator().manual_seed(0))
    assert parts == []


def test_the_cut_does_not_depend_on_how_the_rows_are_spread():
    _, alone = shuffled(RowRange(0, 10, 10), 4, torch.Generator().manual_seed(3))
    spread = [shuffled(RowRange(first, 5, 10), 4, torch.Generator().manual_seed(3)) for first in (0, 5)]
    assert all([part.total for part in parts] == [part.total for part in alone] for _, parts in spread)
    for number, whole in enumerate(alone):
        held = sum(parts[number].rows.stop - parts[number].rows.start for _, parts in spread)
        assert held == whole.total

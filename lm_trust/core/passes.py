"""How many passes a module makes over rows, where it may have to make each of them together with the other processes.

A module is sharded where its frozen weights are spread over the processes; it says so by an attribute `sharded`. Each
of its layers is put together from all processes for as long as it computes, forward and backward. So every process must
make the same passes, one that has no row left as well, and the graph can be differentiated once only: its nodes point
at weights that are no longer there.
"""

from __future__ import annotations

import torch
from torch import nn

from lm_trust.core.batch import row_chunks
from lm_trust.core.processes import largest


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's weights are spread over the processes."""
    return getattr(module, "sharded", False)


def passes(module: nn.Module, count: int, size: int | None) -> list[slice]:
    """Slices that cover `count` rows, `size` at a time, one pass of the module each.

    Those of a sharded module are as many in every process: one with fewer rows ends with empty slices, and the module
    must take no rows. All processes must then ask at the same time.
    """
    chunks = list(row_chunks(count, size))
    if not is_sharded(module):
        return chunks
    most = int(largest(torch.tensor(len(chunks))))
    return chunks + [slice(count, count)] * (most - len(chunks))

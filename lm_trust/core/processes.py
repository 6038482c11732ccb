"""The processes that a run is spread over: each holds some rows of the batch, and what is said of it is of all rows.

A mean is a sum over a count, both over the valid steps of all processes. So every process computes the same numbers,
takes the same decisions and holds the same policy, bit for bit. The group of processes is torch.distributed's default
one, which accelerate starts; with a single process every function here is the identity. Each of the functions that
speak to the others must be called by all processes, in the same order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm_trust.core.seeding import make_generator
from lm_trust.errors import UserError, error_text

Value = TypeVar("Value")


class RowRange(NamedTuple):
    """Where this process's rows stand among those of all processes, which follow one another in the processes' order.

    Attributes:
        first: index of this process's first row.
        count: rows of this process.
        total: rows of all processes.
    """

    first: int
    count: int
    total: int

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.count)

    def own(self, indices: Tensor) -> Tensor:
        """Those of the indices among all rows that are of this process, as indices among its own, in their order."""
        if self.count == self.total:
            return indices
        here = (indices >= self.first) & (indices < self.first + self.count)
        return indices[here] - self.first


def process_count() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if _spread() else 1


def process_index() -> int:
    """Which of them this is, from 0: the first one writes and speaks."""
    return dist.get_rank() if _spread() else 0


def share_of(total: int) -> RowRange:
    """This process's rows of `total` that are shared out in blocks, as evenly as can be."""
    count, index = process_count(), process_index()
    first, end = (total * place // count for place in (index, index + 1))
    return RowRange(first, end - first, total)


def placed_rows(count: int) -> RowRange:
    """Where `count` rows that this process holds stand among those of all processes."""
    if not _spread():
        return RowRange(0, count, count)
    counts = gathered(count)
    return RowRange(sum(counts[: process_index()]), count, sum(counts))


def summed(x: Tensor) -> Tensor:
    """The sum of all processes' x, of one shape; the same bits in all of them."""
    return _reduced(x, dist.ReduceOp.SUM) if _spread() else x


def largest(x: Tensor) -> Tensor:
    """The maximum of all processes' x, elementwise."""
    return _reduced(x, dist.ReduceOp.MAX) if _spread() else x


def mean(x: Tensor, mask: Tensor | None = None) -> float:
    """The mean of all processes' x, over True entries of their masks; 0 where there is none."""
    counted = x if mask is None else torch.where(mask, x, 0.0)
    count = x.new_tensor(x.numel(), dtype=torch.float64) if mask is None else mask.sum(dtype=torch.float64)
    total, number = summed(torch.stack([counted.sum(dtype=torch.float64), count])).tolist()
    return total / max(number, 1.0)


def mean_kl(kl: Tensor, mask: Tensor) -> float:
    """The mean over all processes' rows of a KL (B, T) summed over True entries of their masks, nats per row.

    Of two nearly equal policies rounding can leave a sum below zero, which no divergence has: that is 0.
    """
    return max(mean(torch.where(mask, kl, 0.0).sum(-1)), 0.0)


def gathered(value: Value) -> list[Value]:
    """Every process's value, in the processes' order; anything that can be pickled."""
    if not _spread():
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def all_rows(x: Tensor) -> Tensor:
    """Every process's rows of x (n, ...), one after another; n may differ."""
    return torch.cat([rows.to(x.device) for rows in gathered(x.cpu())]) if _spread() else x


def own_stream(generator: torch.Generator) -> torch.Generator:
    """A generator of this process's own, drawn from one that is in the same state in all; alone, that one itself."""
    if not _spread():
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return make_generator(seed, f"process {process_index()}")


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each parameter's `.grad` by its sum over the processes; one that is None counts as zero."""
    if not _spread():
        return
    parameters = list(parameters)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    total = summed(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for parameter, part in zip(parameters, total.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def together(work: Callable[[], Value]) -> Value:
    """Do work that speaks to no other process, and may fail in one of them: then all of them fail.

    Raises:
        UserError: it failed in another process; the message says in which, and how.
    """
    if not _spread():
        return work()
    result: Value | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    words = gathered(None if error is None else error_text(error))
    if error is not None:
        raise error
    for index, theirs in enumerate(words):
        if theirs is not None:
            raise UserError(f"process {index}: {theirs}")
    return result


def in_the_first(work: Callable[[], Value]) -> Value:
    """What the work gives in the first process, which alone does it; see `together`."""
    return gathered(together(lambda: work() if process_index() == 0 else None))[0]


def require_alike(tensors: Iterable[Tensor], what: str) -> None:
    """Check that all processes hold the same bits.

    Raises:
        RuntimeError: they do not; `what` is named.
    """
    if not _spread():
        return
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), checksum)
    checksums = gathered(checksum)
    if len(set(checksums)) > 1:
        raise RuntimeError(f"the processes hold different {what}: checksums {checksums}, in the processes' order")


def _spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reduced(x: Tensor, operation: dist.ReduceOp) -> Tensor:
    # NCCL takes nothing that is not on its device.
    sent = x.detach().cuda() if dist.get_backend() == "nccl" and not x.is_cuda else x.detach().clone()
    sent = sent.contiguous()
    dist.all_reduce(sent, operation)
    return sent.to(x.device)

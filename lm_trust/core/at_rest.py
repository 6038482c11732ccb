"""A module as it answers when nobody trains it, whatever mode it was left in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Dropout does nothing and batch statistics are neither used nor gathered; gradients are as ever.

    In training mode, which every new module is in, two passes with dropout are two policies: a KL between them says
    nothing of the step between. Modes are set one by one, as a `train` of the module's own may do more than that.
    """
    changed = []
    for each in module.modules():
        # cuDNN differentiates recurrent layers in training mode only.
        name, rest = ("dropout", 0.0) if isinstance(each, nn.RNNBase) else ("training", False)
        if each.training and getattr(each, name) != rest:
            changed.append((each, name, getattr(each, name)))
            setattr(each, name, rest)
    try:
        yield
    finally:
        for each, name, before in changed:
            setattr(each, name, before)

"""Gradient checkpointing: a layer's inside is dropped after the forward pass and computed again in the backward pass.

transformers' own switch works in training mode only, which would turn dropout on and score another distribution. Here
the same layers that it would act on are checkpointed in evaluation mode, wherever a graph is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lm_trust.core.linearisation import twice_differentiable
from lm_trust.errors import UserError


def checkpoint_layers(model: nn.Module) -> None:
    """Checkpoint every layer of a transformer that transformers can checkpoint.

    Raises:
        UserError: it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model.gradient_checkpointing: {type(model).__name__} has no layers that can be checkpointed; "
            "leave it false"
        )
    for layer in layers:
        layer.forward = _Checkpointed(layer.forward)


class _Checkpointed:
    """A layer's forward pass."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():  # also in `generate`, whose cache must be written once only
            return self._forward(*given, **named)
        forward = self._forward
        # The second computation must take the attention kernel of the first. This setting is of every device, whatever
        # the module that tells is called.
        if not torch.backends.cuda.flash_sdp_enabled():
            forward = twice_differentiable()(forward)
        return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False, **named)

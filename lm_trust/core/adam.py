"""Adam's step without what surrounds it: on a small network that costs as much as the arithmetic."""

from __future__ import annotations

import torch
from torch.optim import Adam, AdamW
from torch.optim.adam import adam
from torch.optim.adamw import adamw


@torch.no_grad()
def adam_step(optimizer: Adam) -> None:
    """`optimizer.step()` by torch's functional form of it, less hooks, profiler ranges and checks.

    Args:
        optimizer: a fused Adam or AdamW with one parameter group, without AMSGrad.
    """
    (group,) = optimizer.param_groups
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    if any(parameter not in optimizer.state for parameter in parameters):
        with torch.inference_mode(False):  # a first gradient makes the moments, which are to outlive an inference mode
            optimizer.step()
        return
    states = [optimizer.state[parameter] for parameter in parameters]
    beta1, beta2 = group["betas"]
    functional = adamw if isinstance(optimizer, AdamW) else adam
    functional(
        parameters,
        [parameter.grad for parameter in parameters],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )

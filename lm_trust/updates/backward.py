"""The gradient of an objective of each step by autograd, over microbatches and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lm_trust.core.batch import Batch
from lm_trust.core.distributions import Distribution, per_step
from lm_trust.core.parameters import trainable_parameters
from lm_trust.core.passes import passes
from lm_trust.core.processes import sum_gradients, summed
from lm_trust.core.rows import select_rows


def backward(
    policy: nn.Module,
    minibatch: Batch,
    objective: Callable[..., tuple[Tensor, ...]],
    *,
    others: Sequence[Distribution] = (),
    extras: Sequence[Tensor] = (),
    microbatch_size: int | None = None,
) -> list[float]:
    """Leave the gradient of minus the mean objective in `.grad`, accumulated over microbatches and processes.

    Args:
        policy: differentiated by autograd.
        minibatch: its rows that this process holds.
        objective: of the new distribution, the others, actions, advantages, old_log_prob, mask and the extras (all
            (B, T)), to the objective of each step and any statistics of each step.
        others: fixed distributions at the same rows.
        extras: further tensors of each step.
        microbatch_size: rows differentiated at a time; changes memory, not the result.

    Returns:
        The mean of each statistic over the valid steps.
    """
    mask = minibatch.mask
    if mask is None:
        mask = torch.ones_like(minibatch.advantages, dtype=torch.bool)
    policy.zero_grad(set_to_none=True)
    # A masked step may hold anything; a log-probability of zero on both sides keeps it out of the gradient.
    old_log_prob = torch.where(mask, minibatch.old_log_prob, 0.0)
    count = summed(mask.sum()).clamp_min(1)
    means: list[Tensor] = []
    # A process without a row of the minibatch has its part in the sums, which is zero.
    for rows in passes(policy, len(minibatch), microbatch_size) or [slice(0)]:
        values = per_step(
            objective,
            [policy.distribution(select_rows(minibatch.observations, rows)), *[other[rows] for other in others]],
            *[minibatch.actions[rows], minibatch.advantages[rows], old_log_prob[rows], mask[rows]],
            *[extra[rows] for extra in extras],
        )
        each, *statistics = (torch.where(mask[rows], value, 0.0).sum() / count for value in values)
        (-each).backward()
        parts = [statistic.detach() for statistic in statistics]
        means = parts if not means else [mean + part for mean, part in zip(means, parts, strict=True)]
    sum_gradients(trainable_parameters(policy))
    return summed(torch.stack(means)).tolist() if means else []

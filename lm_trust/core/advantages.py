"""Advantage estimators and masked statistics, as pure functions of (B, T) tensors.

T is the last axis. Masks and ends are bool, or numbers that are 0 or 1. `terminated` is a true end of the task (its
value is zero), `truncated` an outside limit (the value of the state it stopped in still counts); both cut the trace.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lm_trust.core.processes import largest, summed
from lm_trust.core.shapes import require_same_shape, require_tensors


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    Args:
        rewards, values: (B, T).
        next_values: (B, T), the value of the state that each action led to. At a truncation that is the value of the
            final observation, never of the observation after a reset; at a termination it is ignored.
        terminated, truncated: (B, T).
        gamma: discount.
        lam: trace decay; 0 gives one-step errors, 1 gives returns minus values.

    Returns:
        advantages and returns (advantages + values), each (B, T).

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: the arguments are not all of one shape.
    """
    require_same_shape(
        rewards=rewards, values=values, next_values=next_values, terminated=terminated, truncated=truncated
    )
    terminated, truncated = terminated.bool(), truncated.bool()
    deltas = rewards + gamma * torch.where(terminated, torch.zeros_like(next_values), next_values) - values
    carry = gamma * lam * (~(terminated | truncated)).to(deltas.dtype)
    advantages = _discounted_sum(deltas, carry)
    return advantages, advantages + values


def returns_to_go(rewards: Tensor, ended: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of rewards from each step to the end of its episode, (B, T); with a baseline, A = G - V.

    Args:
        rewards: (B, T).
        ended: (B, T), True at the last step of an episode.
        gamma: discount.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: the two are not of one shape.
    """
    require_same_shape(rewards=rewards, ended=ended)
    return _discounted_sum(rewards, gamma * ended.logical_not().to(rewards.dtype))


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """Score minus the mean of the others in its group (Kool et al. 2019; RLOO, Ahmadian et al. 2024).

    Args:
        scores: (B,), consecutive `group_size` rows forming a group.

    Returns:
        (B,) advantages.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: a group of fewer than two, or B not a multiple of the group.
    """
    groups = _grouped(scores, group_size)
    others = (groups.sum(-1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).reshape(scores.shape)


def group_relative(scores: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """Score minus its group's mean, over the group's standard deviation (GRPO, Shao et al. 2024).

    Args:
        scores: (B,), consecutive `group_size` rows forming a group.
        scale: divide by the standard deviation; False is Dr. GRPO (Liu et al. 2025).

    Returns:
        (B,) advantages; a group of equal scores gives zeros, one with a score that is not finite no number.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: a group of fewer than two, or B not a multiple of the group.
    """
    groups = _grouped(scores, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    if scale:
        centred = _divide_by_deviation(centred, groups.std(-1, keepdim=True), groups.abs().amax(-1, keepdim=True))
    return centred.reshape(scores.shape)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x over True entries of mask, a scalar; 0 where none is True. Masked entries may hold anything.

    Half precision is summed up in single precision.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: x and mask are not of one shape.
    """
    require_tensors(x=x)
    x = x.to(torch.result_type(x, 1.0))  # truths and counts have a mean, too
    if mask is None:
        return x.mean()
    require_same_shape(x=x, mask=mask)
    mask = mask.bool()
    total = torch.where(mask, x, 0.0).sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / mask.sum().clamp_min(1)).to(x.dtype)


def masked_whiten(x: Tensor, mask: Tensor | None) -> Tensor:
    """x shifted and scaled to mean 0 and standard deviation 1 over True entries; masked entries become 0.

    Finite for one valid item or zero variance (both give zeros), zero being whatever the rounding of such numbers may
    be; NaN where a valid item is not finite. Over the entries of all processes, each of which gives its own. Half
    precision is whitened in single precision.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: x and mask are not of one shape.
    """
    if mask is not None:
        require_same_shape(x=x, mask=mask)
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    given = torch.result_type(x, 1.0)
    valid = torch.where(mask, x.to(torch.promote_types(given, torch.float32)), 0.0)
    count = summed(mask.sum())
    centred = torch.where(mask, valid - summed(valid.sum()) / count.clamp_min(1), 0.0)
    magnitude = largest(valid.abs().amax() if valid.numel() else valid.sum())
    # By a power of two, which costs no digit, to a size at which squares fit.
    size = 2.0 ** -min(max(math.frexp(magnitude.item())[1], -100), 100)
    centred = centred * size
    deviation = (summed(centred.square().sum()) / (count - 1).clamp_min(1)).sqrt()
    white = _divide_by_deviation(centred, deviation, magnitude * size)
    return torch.where(mask, white, 0.0).to(given)


def _discounted_sum(x: Tensor, carry: Tensor) -> Tensor:
    """y_t = x_t + carry_t * y_{t+1} along the last axis."""
    if not x.shape[-1]:
        return x
    total = torch.zeros_like(x[..., 0])
    columns = []
    cut = carry == 0
    for value, factor, ends in zip(
        reversed(x.unbind(-1)), reversed(carry.unbind(-1)), reversed(cut.unbind(-1)), strict=True
    ):
        total = value + torch.where(ends, 0.0, factor * total)  # what is no number would pass through a zero
        columns.append(total)
    return torch.stack(columns[::-1], dim=-1)


def _grouped(scores: Tensor, group_size: int) -> Tensor:
    require_tensors(scores=scores)
    if group_size < 2 or scores.numel() % group_size:
        raise ValueError(f"{scores.numel()} scores do not form groups of {group_size} (at least 2 a group)")
    return scores.reshape(-1, group_size).to(torch.result_type(scores, 1.0))  # right or wrong may come as integers


def _divide_by_deviation(centred: Tensor, deviation: Tensor, magnitude: Tensor) -> Tensor:
    """centred / deviation, but zero where the deviation is only rounding of numbers of this magnitude.

    A deviation that is NaN is no rounding: it goes through, for whoever looks at the result to see.
    """
    flat = deviation <= 10 * torch.finfo(centred.dtype).eps * magnitude
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, deviation))

"""Surrogate objectives, per step and to be maximised, the clipped value loss, and the slopes of both."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_trust.core.shapes import require_same_shape


def ratio(old_log_prob: Tensor, new_log_prob: Tensor) -> Tensor:
    """pi_new(a | s) / pi_old(a | s), (B, T)."""
    return torch.exp(new_log_prob - old_log_prob)


def clipped_surrogate(
    old_log_prob: Tensor,
    new_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Tensor:
    """PPO's pessimistic surrogate min(r A, clip(r, 1 - clip, 1 + clip) A) (Schulman et al. 2017, eq. 7).

    Args:
        old_log_prob, new_log_prob: (B, T).
        advantages: (B, T); or (B, 1) or a scalar, that of all steps of a row or of all.
        clip: half-width of the band around 1.
        clip_high: the upper half-width where it differs ("clip-higher", Yu et al. 2025).

    Returns:
        (B, T), to be maximised.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: the tensors are of other shapes.
    """
    if advantages.ndim == 0 or advantages.shape == (*new_log_prob.shape[:-1], 1):
        advantages = advantages.expand_as(new_log_prob)
    require_same_shape(old_log_prob=old_log_prob, new_log_prob=new_log_prob, advantages=advantages)
    probability_ratio = ratio(old_log_prob, new_log_prob)
    high = clip if clip_high is None else clip_high
    clipped = probability_ratio.clamp(1 - clip, 1 + high)
    return torch.minimum(probability_ratio * advantages, clipped * advantages)


def clipped_surrogate_slope(
    old_log_prob: Tensor,
    new_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The derivative of `clipped_surrogate` by new_log_prob: r A, and 0 where the clip holds.

    Arguments and errors as there, but for `advantages`, which are (B, T).

    Returns:
        (B, T) the derivative, and (B, T) bool, whether the ratio is outside of the band.
    """
    require_same_shape(old_log_prob=old_log_prob, new_log_prob=new_log_prob, advantages=advantages)
    probability_ratio = ratio(old_log_prob, new_log_prob)
    above = probability_ratio > 1 + (clip if clip_high is None else clip_high)
    below = probability_ratio < 1 - clip
    # Beyond the band on the side that the advantage pulls to, the minimum is a constant.
    held = torch.where(advantages > 0, above, below)
    return (probability_ratio * advantages).masked_fill_(held, 0.0), above | below


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Half squared error, the worse of the new value and of the new value held within `clip` of the old one.

    The value loss of PPO's reference implementation (Dhariwal et al. 2017).

    Args:
        values, old_values, returns: (B, T).
        clip: how far a value may move, in units of return; None leaves the plain half squared error.

    Returns:
        (B, T), to be minimised.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: the tensors are not of one shape.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    error = (values - returns).square()
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error


def clipped_value_slope(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """The derivative of `clipped_value_loss` by the values, per step. Arguments, shape and errors as there."""
    require_same_shape(values=values, old_values=old_values, returns=returns)
    error = values - returns
    if clip is None:
        return error
    movement = values - old_values
    held_error = old_values + movement.clamp(-clip, clip) - returns
    held_slope = torch.where(movement.abs() <= clip, held_error, 0.0)
    return torch.where(held_error.square() > error.square(), held_slope, error)

"""Clipped losses: values and gradients in each case of sign and side."""

import math

import pytest
import torch

from lm_trust.core import clipped_surrogate, clipped_value_loss
from lm_trust.core.surrogate import clipped_surrogate_slope


def surrogate(ratio, advantage, clip=0.2, clip_high=None):
    """Value of the clipped surrogate at one step, and its derivative with respect to the ratio."""
    log_prob = torch.tensor([math.log(ratio) - 1.3], dtype=torch.float64, requires_grad=True)
    old_log_prob, advantage = torch.tensor([[-1.3], [advantage]], dtype=torch.float64)
    value = clipped_surrogate(old_log_prob, log_prob, advantage, clip=clip, clip_high=clip_high)
    (gradient,) = torch.autograd.grad(value.sum(), log_prob)
    in_closed_form, _ = clipped_surrogate_slope(
        old_log_prob, log_prob.detach(), advantage, clip=clip, clip_high=clip_high
    )
    torch.testing.assert_close(in_closed_form, gradient)
    return value.item(), gradient.item() / ratio


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 2.0, 2.4, 0.0),  # good action, already likelier: no reason to go on
        (0.5, 2.0, 1.0, 2.0),  # good action that became unlikelier: full gradient back
        (1.5, -2.0, -3.0, -2.0),  # bad action that became likelier: full gradient back
        (0.5, -2.0, -1.6, 0.0),  # bad action, already unlikelier: no reason to go on
        (1.1, 2.0, 2.2, 2.0),  # inside the range nothing is clipped
        (0.9, 2.0, 1.8, 2.0),
        (1.1, -2.0, -2.2, -2.0),
        (0.9, -2.0, -1.8, -2.0),
    ],
)
def test_clipped_surrogate_in_each_case(ratio, advantage, value, slope):
    measured, derivative = surrogate(ratio, advantage)
    assert measured == pytest.approx(value, rel=1e-12)
    assert derivative == pytest.approx(slope, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.6, 2.0, 3.0, 0.0),
        (0.7, 2.0, 1.4, 2.0),
        (1.6, -2.0, -3.2, -2.0),
        (0.7, -2.0, -1.6, 0.0),  # the lower side is as it was
        (1.4, 2.0, 2.8, 2.0),  # outside 1.2, inside 1.5
    ],
)
def test_clipped_surrogate_in_each_case_of_a_band_that_is_wider_above(ratio, advantage, value, slope):
    measured, derivative = surrogate(ratio, advantage, clip=0.2, clip_high=0.5)
    assert measured == pytest.approx(value, rel=1e-12)
    assert derivative == pytest.approx(slope, rel=1e-12, abs=1e-12)


def test_clipped_surrogate_is_the_lower_of_clipped_and_unclipped():
    generator = torch.Generator().manual_seed(0)
    old, new, advantages = (torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    for clip in (0.1, 0.3):
        value = clipped_surrogate(old, new, advantages, clip=clip)
        assert value.shape == (6, 7)
        for index in range(old.numel()):
            ratio = math.exp(new.flatten()[index].item() - old.flatten()[index].item())
            advantage = advantages.flatten()[index].item()
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            assert value.flatten()[index].item() == pytest.approx(min(ratio * advantage, bounded * advantage))


def test_clipped_surrogate_at_the_old_policy_is_the_advantage_with_the_policy_gradient():
    generator = torch.Generator().manual_seed(1)
    log_prob, advantages = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    new = log_prob.clone().requires_grad_()
    value = clipped_surrogate(log_prob, new, advantages)
    torch.testing.assert_close(value, advantages)
    (gradient,) = torch.autograd.grad(value.sum(), new)
    torch.testing.assert_close(gradient, advantages)


def value_loss(value, old, target, clip=0.2):
    value = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    loss = clipped_value_loss(
        value,
        torch.tensor([old], dtype=torch.float64),
        torch.tensor([target], dtype=torch.float64),
        clip=clip,
    )
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("value", "target", "error", "moves"),
    [
        (1.5, 2.0, 0.8, False),  # moved far towards the target: judged at 1.2, no gradient
        (1.5, 0.0, 1.5, True),  # moved far away from a lower target: full gradient back
        (0.5, 0.0, 0.8, False),  # moved far towards a lower target
        (0.5, 2.0, 1.5, True),  # moved far away from a higher target
        (1.1, 2.0, 0.9, True),  # inside the range
        (0.9, 2.0, 1.1, True),
    ],
)
def test_clipped_value_loss_in_each_case(value, target, error, moves):
    loss, gradient = value_loss(value, 1.0, target)
    inside, _ = value_loss(1.0, 1.0, 2.0)  # one half or one: the convention, measured where nothing is clipped
    assert inside in (pytest.approx(0.5), pytest.approx(1.0))
    assert loss == pytest.approx(inside * error**2, rel=1e-12)
    assert gradient == pytest.approx(2 * inside * (value - target) if moves else 0.0, rel=1e-12)


def test_clipped_value_loss_is_never_below_the_squared_error():
    generator = torch.Generator().manual_seed(2)
    values, old, targets = (torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    loss = clipped_value_loss(values, old, targets, clip=0.2)
    plain = clipped_value_loss(values, values, targets, clip=0.2)
    assert loss.shape == (6, 7)
    assert (loss >= plain - 1e-12).all()
    assert (loss > plain + 1e-6).any()
    torch.testing.assert_close(clipped_value_loss(values, old, targets, clip=1e6), plain)

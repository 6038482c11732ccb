"""Advantage estimators against explicit sums over pairs of steps, and one as a special case of another."""

import math

import pytest
import torch

from lm_trust.core import gae, group_relative, leave_one_out, masked_mean, masked_whiten, returns_to_go

B, T = 5, 9


def experience(seed=0, *, ends=0.15):
    """Random steps in which terminations and truncations both occur, never both at one step."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(B, T, generator=generator, dtype=torch.float64)

    rewards, values, next_values = normal(), normal(), normal()
    draw = torch.rand(B, T, generator=generator, dtype=torch.float64)
    terminated, truncated = draw < ends, (draw >= ends) & (draw < 2 * ends)
    assert ends == 0 or (terminated.any() and truncated.any())
    return rewards, values, next_values, terminated, truncated


def chained(values, last):
    """next_values inside one unbroken trajectory: the value of the following step, then `last`."""
    return torch.cat([values[:, 1:], last[:, None]], dim=1)


def double_sum(rewards, values, next_values, terminated, truncated, gamma, lam):
    """A_t = sum over l >= t of (gamma lam)^(l - t) delta_l, while no episode ended in between."""
    advantages = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        for t in range(rewards.shape[1]):
            for later in range(t, rewards.shape[1]):
                bootstrap = 0.0 if terminated[b, later] else gamma * next_values[b, later].item()
                delta = rewards[b, later].item() + bootstrap - values[b, later].item()
                advantages[b, t] += (gamma * lam) ** (later - t) * delta
                if terminated[b, later] or truncated[b, later]:
                    break
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 0.95), (0.9, 1.0), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_gae_is_the_discounted_sum_of_td_errors_cut_at_every_end(gamma, lam, seed):
    steps = experience(seed)
    advantages, returns = gae(*steps, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, double_sum(*steps, gamma, lam), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + steps[1], rtol=1e-12, atol=1e-12)


def test_gae_with_lam_zero_is_the_td_error():
    rewards, values, next_values, terminated, truncated = experience()
    advantages, _ = gae(rewards, values, next_values, terminated, truncated, gamma=0.9, lam=0.0)
    expected = rewards + 0.9 * next_values * (~terminated) - values
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)


def test_gae_with_lam_one_is_returns_to_go_minus_value():
    rewards, values, _, _, _ = experience(2)
    ended = torch.zeros(B, T, dtype=torch.bool)
    ended[:, -1] = True
    ended[0, 3] = ended[2, 0] = ended[2, 5] = True
    next_values = chained(values, torch.full((B,), 7.0, dtype=torch.float64))  # 7 must not be seen: the end is terminal
    advantages, returns = gae(rewards, values, next_values, ended, torch.zeros_like(ended), gamma=0.97, lam=1.0)
    togo = returns_to_go(rewards, ended, gamma=0.97)
    torch.testing.assert_close(advantages, togo - values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, togo, rtol=1e-12, atol=1e-12)


def test_gae_with_lam_one_bootstraps_the_truncated_tail():
    rewards, values, _, _, _ = experience(3)
    never = torch.zeros(B, T, dtype=torch.bool)
    truncated = never.clone()
    truncated[:, -1] = True
    last = torch.arange(B, dtype=torch.float64)
    advantages, _ = gae(rewards, values, chained(values, last), never, truncated, gamma=0.9, lam=1.0)
    with_tail = rewards.clone()
    with_tail[:, -1] += 0.9 * last
    torch.testing.assert_close(
        advantages, returns_to_go(with_tail, truncated, gamma=0.9) - values, rtol=1e-12, atol=1e-12
    )


def test_a_termination_never_bootstraps_and_a_truncation_does():
    rewards, values, next_values, terminated, truncated = experience(4)
    base, _ = gae(rewards, values, next_values, terminated, truncated, gamma=0.9, lam=0.8)
    after_termination = torch.where(terminated, next_values + 100.0, next_values)
    same, _ = gae(rewards, values, after_termination, terminated, truncated, gamma=0.9, lam=0.8)
    assert torch.equal(base, same)
    after_truncation = torch.where(truncated, next_values + 100.0, next_values)
    moved, _ = gae(rewards, values, after_truncation, terminated, truncated, gamma=0.9, lam=0.8)
    torch.testing.assert_close((moved - base)[truncated], torch.full_like(base[truncated], 90.0))


def test_nothing_leaks_across_an_end():
    rewards, values, next_values, _, _ = experience(5)
    never = torch.zeros(B, T, dtype=torch.bool)
    for which in ("terminated", "truncated"):
        cut = never.clone()
        cut[:, 4] = True
        flags = (cut, never) if which == "terminated" else (never, cut)
        base, _ = gae(rewards, values, next_values, *flags, gamma=0.99, lam=0.95)
        later = rewards.clone()
        later[:, 5:] += 50.0
        moved, _ = gae(later, values, next_values, *flags, gamma=0.99, lam=0.95)
        assert torch.equal(base[:, :5], moved[:, :5])
        assert not torch.allclose(base[:, 5:], moved[:, 5:])


def test_a_step_both_terminated_and_truncated_does_not_bootstrap():
    one = torch.ones(1, 1, dtype=torch.float64)
    both = torch.ones(1, 1, dtype=torch.bool)
    advantages, returns = gae(one, 3 * one, 5 * one, both, both, gamma=0.9, lam=0.9)
    assert advantages.item() == pytest.approx(-2.0)
    assert returns.item() == pytest.approx(1.0)


def test_returns_to_go_by_double_loop():
    rewards, _, _, ended, _ = experience(6)
    expected = torch.zeros_like(rewards)
    for b in range(B):
        for t in range(T):
            for later in range(t, T):
                expected[b, t] += 0.9 ** (later - t) * rewards[b, later]
                if ended[b, later]:
                    break
    torch.testing.assert_close(returns_to_go(rewards, ended, gamma=0.9), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_ends_may_be_zeros_and_ones(dtype):
    *given, terminated, truncated = experience(6)
    flags = terminated.to(dtype), truncated.to(dtype)
    assert torch.equal(returns_to_go(given[0], flags[0], gamma=0.9), returns_to_go(given[0], terminated, gamma=0.9))
    found, expected = (gae(*given, *each, gamma=0.9, lam=0.8) for each in (flags, (terminated, truncated)))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("shape", [(B, 0), (0, T), (0,)])
def test_no_steps_have_no_advantages(shape):
    nothing = torch.zeros(shape)
    assert all(each.shape == shape for each in gae(*[nothing] * 5, gamma=0.9, lam=0.9))
    assert returns_to_go(nothing, nothing, gamma=0.9).shape == shape


def test_gae_leaves_its_arguments_as_they_were():
    steps = experience(7)
    copies = [tensor.clone() for tensor in steps]
    gae(*steps, gamma=0.9, lam=0.9)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(steps, copies, strict=True))


def scores(groups, size, seed=0):
    return torch.randn(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("groups", "size"), [(1, 2), (3, 4), (5, 3)])
def test_leave_one_out_subtracts_the_mean_of_the_others(groups, size):
    values = scores(groups, size)
    expected = []
    for index, score in enumerate(values.tolist()):
        start = index // size * size
        others = [values[j].item() for j in range(start, start + size) if j != index]
        expected.append(score - sum(others) / len(others))
    torch.testing.assert_close(
        leave_one_out(values, size), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_the_leave_one_out_baseline_of_a_sample_does_not_depend_on_it():
    values = scores(2, 4)
    moved = values.clone()
    moved[1] += 10.0
    difference = leave_one_out(moved, 4) - leave_one_out(values, 4)
    assert difference[1].item() == pytest.approx(10.0)
    torch.testing.assert_close(difference[[0, 2, 3]], torch.full((3,), -10.0 / 3, dtype=torch.float64))
    assert torch.equal(difference[4:], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(("groups", "size"), [(1, 2), (3, 4), (5, 3)])
def test_group_relative_centres_each_group(groups, size):
    values = scores(groups, size)
    expected = []
    for index, score in enumerate(values.tolist()):
        start = index // size * size
        expected.append(score - sum(values[start : start + size].tolist()) / size)
    centred = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(group_relative(values, size, scale=False), centred, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("groups", "size"), [(1, 2), (3, 4), (5, 3)])
def test_group_relative_divides_by_the_groups_own_standard_deviation(groups, size):
    values = scores(groups, size)
    scaled = group_relative(values, size).view(groups, size)
    for row, group in zip(scaled.tolist(), values.view(groups, size).tolist(), strict=True):
        mean = sum(group) / size
        deviation = math.sqrt(sum((score - mean) ** 2 for score in group) / (size - 1))
        assert row == pytest.approx([(score - mean) / deviation for score in group], rel=1e-3)


def test_group_relative_ignores_a_groups_scale_and_offset():
    values = scores(3, 4)
    moved = values.clone()
    moved[4:8] = 100.0 * moved[4:8] - 20.0
    torch.testing.assert_close(group_relative(moved, 4), group_relative(values, 4), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.1, 1e8])
@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_equal_scores_has_no_preference(level, scale):
    values = torch.cat([torch.full((3,), level, dtype=torch.float64), scores(1, 3)])
    out = group_relative(values, 3, scale=scale)
    assert out.isfinite().all()
    assert out[:3].abs().max() < 1e-6
    assert out[3:].abs().min() > 0


def test_a_batch_that_does_not_divide_into_groups_is_an_error():
    for estimator in (leave_one_out, group_relative):
        with pytest.raises(ValueError):
            estimator(torch.randn(5), 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("estimator", [leave_one_out, group_relative])
def test_scores_may_be_right_or_wrong(estimator, dtype):
    right = torch.tensor([1, 0, 0, 1, 1, 1])
    torch.testing.assert_close(estimator(right.to(dtype), 3), estimator(right.float(), 3))


def test_leave_one_out_needs_another_sample():
    with pytest.raises(ValueError):
        leave_one_out(torch.randn(4), 1)


def mask_of(seed=0):
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.6


def test_masked_mean_by_loop():
    x, mask = experience()[0], mask_of()
    kept = [x[b, t].item() for b in range(B) for t in range(T) if mask[b, t]]
    assert masked_mean(x, mask).item() == pytest.approx(sum(kept) / len(kept), rel=1e-12)
    assert masked_mean(x, mask).shape == ()


def test_masked_mean_does_not_see_what_is_masked():
    x, mask = experience()[0], mask_of()
    assert masked_mean(torch.where(mask, x, torch.full_like(x, 1e6)), mask).item() == pytest.approx(
        masked_mean(x, mask).item(), rel=1e-12
    )


def test_masked_mean_of_nothing_is_zero():
    x = experience()[0].requires_grad_()
    mean = masked_mean(x, torch.zeros(B, T, dtype=torch.bool))
    assert mean.item() == 0.0
    (gradient,) = torch.autograd.grad(mean, x)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_masked_whiten_gives_mean_zero_and_deviation_one_over_valid_items():
    x, mask = 5.0 + 3.0 * experience()[0], mask_of()
    white = masked_whiten(x, mask)
    assert white.shape == x.shape
    kept = white[mask]
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert kept.std(correction=0).item() == pytest.approx(
        1.0, rel=2.0 / len(kept)
    )  # either convention of the deviation
    centred = x[mask] - x[mask].mean()
    ratio = kept / centred
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-9, atol=0)


def test_masked_whiten_does_not_see_what_is_masked():
    x, mask = experience()[0], mask_of()
    other = masked_whiten(torch.where(mask, x, torch.full_like(x, 1e4)), mask)
    torch.testing.assert_close(other[mask], masked_whiten(x, mask)[mask], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 3.5, -1e6])
def test_masked_whiten_is_finite_for_one_valid_item_and_for_no_variance(value):
    x = torch.full((B, T), value, dtype=torch.float64)
    one = torch.zeros(B, T, dtype=torch.bool)
    one[2, 3] = True
    for mask in (one, mask_of(), torch.zeros_like(one)):
        white = masked_whiten(x, mask)
        assert white.isfinite().all()
        assert (white[mask].abs() < 1e-6).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_valid_item_that_is_not_finite_is_no_lack_of_variance(value):
    x, mask = experience()[0], mask_of()
    x[~mask] = value
    assert masked_whiten(x, mask).isfinite().all()
    x[mask] = torch.cat([torch.tensor([value]), x[mask][1:]])
    white = masked_whiten(x, mask)
    assert white[mask].isnan().all() and not white[~mask].any()
    relative = group_relative(torch.tensor([1.0, value, 3.0, 1.0]), 2)
    assert relative[:2].isnan().all() and relative[2:].isfinite().all()


def test_a_flat_batch_is_accepted_by_the_masked_statistics():
    x, mask = experience()[0].flatten(), mask_of().flatten()
    assert masked_mean(x, mask).item() == pytest.approx(x[mask].mean().item())
    assert masked_whiten(x, mask).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_may_be_zeros_and_ones(dtype):
    x, mask = experience()[0], mask_of()
    assert masked_mean(x, mask.to(dtype)).equal(masked_mean(x, mask))
    assert masked_whiten(x, mask.to(dtype)).equal(masked_whiten(x, mask))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_what_is_no_number_after_an_end_stays_there(wrong, lam):
    rewards, values, next_values, terminated, truncated = experience()
    terminated[:, 4] = True
    truncated[:, 4] = False
    settings = {"gamma": 0.9, "lam": lam}
    advantages, _ = gae(rewards, values, next_values, terminated, truncated, **settings)
    returns = returns_to_go(rewards, terminated | truncated, gamma=0.9)
    rewards[:, 6] = wrong
    spoilt, _ = gae(rewards, values, next_values, terminated, truncated, **settings)
    assert torch.equal(spoilt[:, :5], advantages[:, :5]) and not spoilt[:, 6].isfinite().any()
    spoilt = returns_to_go(rewards, terminated | truncated, gamma=0.9)
    assert torch.equal(spoilt[:, :5], returns[:, :5]) and not spoilt[:, 6].isfinite().any()


@pytest.mark.parametrize("size", [1e-38, 1e-24, 1e20, 1e37])
def test_masked_whiten_of_numbers_whose_squares_do_not_fit(size):
    x = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(masked_whiten(x * size, None), torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-6, atol=1e-6)


def test_masked_whiten_of_nothing_is_nothing():
    assert masked_whiten(torch.zeros(0, 3), None).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_and_whitened_in_single(dtype):
    """Thousands of numbers about 100: their sum is beyond float16, their deviation below bfloat16's digits."""
    x = (100 + 3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) > 0.3
    assert masked_mean(x, mask).dtype == dtype and masked_whiten(x, mask).dtype == dtype
    assert masked_mean(x, mask).item() == pytest.approx(x[mask].double().mean().item(), rel=1e-2)
    white, exact = masked_whiten(x, mask)[mask].double(), x[mask].double()
    torch.testing.assert_close(white, (exact - exact.mean()) / exact.std(), rtol=1e-2, atol=1e-2)


def test_truths_have_a_mean():
    truths, mask = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    assert masked_mean(truths, None).item() == pytest.approx(2 / 3) and masked_mean(truths, mask).item() == 0.5

"""Scaling: the moments that totals are scaled by, and payments whose sums are exactly the scaled totals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_trust.lm.reward_scaling import RewardScaler
from lm_trust.lm.token_mdp import Payments

BATCHES = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-4.0]), torch.tensor([0.5, 0.5, 3.0, 9.0])]
RULES = ["none", "running", "reference", "whiten"]


def batches():
    return [batch.double() for batch in BATCHES]


def pay(totals, *, steps=3, seed=0):
    """Payments with these totals, a part of them token by token."""
    generator = torch.Generator().manual_seed(seed)
    per_token = torch.randn(len(totals), steps, generator=generator, dtype=torch.float64)
    return Payments(totals.double() - per_token.sum(-1), per_token)


def test_running_moments_are_those_of_all_totals_so_far():
    scaler, seen = RewardScaler("running"), []
    for batch in batches():
        scaler.observe(batch)
        seen += batch.tolist()
        assert scaler.mean == pytest.approx(np.mean(seen), abs=1e-12)
        assert scaler.sd == pytest.approx(np.std(seen, ddof=1), abs=1e-12)
        torch.testing.assert_close(scaler.scale(pay(batch)).totals, (batch - np.mean(seen)) / np.std(seen, ddof=1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=5), st.floats(-1e6, 1e6))
def test_running_moments_do_not_depend_on_how_totals_are_batched(parts, offset):
    scaler, at_once = RewardScaler("running"), RewardScaler("running")
    for part in parts:
        scaler.observe(torch.tensor(part, dtype=torch.float64) + offset)
    at_once.observe(torch.tensor([value for part in parts for value in part], dtype=torch.float64) + offset)
    assert scaler.mean == pytest.approx(at_once.mean, abs=1e-8)
    assert scaler.sd == pytest.approx(at_once.sd, rel=1e-6, abs=2e-3)


def test_the_reference_is_the_first_batch_for_good():
    scaler = RewardScaler("reference")
    assert scaler.needs_reference
    first, second, third = batches()
    scaler.observe(first)
    assert not scaler.needs_reference
    for batch in (second, third):
        scaler.observe(batch)
        torch.testing.assert_close(scaler.scale(pay(batch)).totals, (batch - 3) / 7**0.5)


def test_whitening_divides_by_the_batchs_sd_and_keeps_its_mean():
    scaler = RewardScaler("whiten")
    for batch in (*batches()[::2], 2 * batches()[0]):
        scaler.observe(batch)
        scaled = scaler.scale(pay(batch)).totals
        assert scaled.mean() == pytest.approx(batch.mean())
        assert scaled.std() == pytest.approx(1.0)
        torch.testing.assert_close(scaled - scaled.mean(), (batch - batch.mean()) / batch.std())


def test_only_the_reference_needs_completions_of_the_start():
    assert [RewardScaler(rule).needs_reference for rule in RULES] == [False, False, True, False]


@pytest.mark.parametrize("rule", RULES)
def test_nothing_observed_changes_nothing(rule):
    paid = pay(torch.tensor([5.0, -2.0]))
    scaled = RewardScaler(rule).scale(paid)
    assert torch.equal(scaled.final, paid.final)
    assert torch.equal(scaled.per_token, paid.per_token)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("totals", [[0.1] * 7, [3.0], [1e6 + 0.1] * 3, [0.0, 0.0]])
def test_an_sd_of_zero_divides_nothing(rule, totals):
    scaler, totals = RewardScaler(rule), torch.tensor(totals, dtype=torch.float64)
    scaler.observe(totals)
    paid = pay(totals)
    scaled = scaler.scale(paid)
    assert torch.equal(scaled.per_token, paid.per_token)
    expected = totals if rule in ("none", "whiten") else torch.zeros_like(totals)
    torch.testing.assert_close(scaled.totals, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.5, 3.0])
@pytest.mark.parametrize("rule", RULES)
def test_payments_add_up_to_the_scaled_and_clipped_totals(rule, clip):
    scaler, unclipped = RewardScaler(rule, clip), RewardScaler(rule)
    for batch in batches():
        scaler.observe(batch)
        unclipped.observe(batch)
        scaled = unclipped.scale(pay(batch)).totals
        found = scaler.scale(pay(batch))
        torch.testing.assert_close(found.totals, scaled if clip is None else scaled.clamp(-clip, clip))
        # What is paid while a text is written bears the factor and nothing else.
        factor = 1.0 if rule == "none" else 1 / (scaler.sd or 1.0)
        torch.testing.assert_close(found.per_token, factor * pay(batch).per_token)


@pytest.mark.parametrize("rule", RULES)
def test_a_restored_scaler_continues_exactly(rule):
    first, second, third = batches()
    scaler, other = RewardScaler(rule), RewardScaler(rule)
    scaler.observe(first)
    other.observe(100 * second)
    other.load_state_dict(scaler.state_dict())
    for batch in (second, third):
        scaler.observe(batch)
        other.observe(batch)
        assert torch.equal(scaler.scale(pay(batch)).final, other.scale(pay(batch)).final)
    assert scaler.metrics() == other.metrics()
    assert (scaler.metrics() == {}) == (rule == "none")

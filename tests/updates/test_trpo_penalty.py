"""The penalised lower bound: its coefficient, its gradient against autograd, and what it promises."""

import pytest
import torch
from tiny_policies import MASK, Policy, batch_for, step_kl, vector_of

from lm_trust.updates import TRPOPenalty
from lm_trust.updates.trpo_penalty import theoretical_coefficient


def test_the_theorys_coefficient():
    assert theoretical_coefficient(2.0, 0.9) == pytest.approx(720.0)
    assert theoretical_coefficient(1.0, 0.99) == pytest.approx(39_600.0)


@pytest.mark.parametrize("masked", [True, False])
def test_it_is_taken_from_the_valid_steps_of_each_batch(masked):
    policy = Policy()
    batch = batch_for(policy, mask=MASK if masked else None)
    report = TRPOPenalty(coefficient=None, gamma=0.9).step(policy, batch)
    largest = max(abs(value) for value in (batch.advantages[MASK] if masked else batch.advantages.flatten()).tolist())
    # L sums over discounted steps, the surrogate is their mean: (1 - gamma) of it.
    assert report.metrics["kl_coefficient"] == pytest.approx(0.1 * 4 * largest * 0.9 / 0.01)


def test_without_a_discount_the_theory_has_none():
    with pytest.raises(ValueError, match="infinite"):
        TRPOPenalty(coefficient=None, gamma=1.0)
    TRPOPenalty(coefficient=0.5, gamma=1.0)


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_is_adam_on_the_surrogate_less_the_largest_kl(kind, microbatch_size):
    policy, plain = Policy(kind), Policy(kind)
    batch = batch_for(policy)
    settings = {"learning_rate": 0.01, "epochs": 4, "minibatches": 1, "max_grad_norm": None}
    report = TRPOPenalty(coefficient=3.0, microbatch_size=microbatch_size, **settings).step(policy, batch)

    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01, eps=1e-5)
    with torch.no_grad():
        old = Policy(kind).independent(batch.observations)
    for _ in range(4):
        new = plain.independent(batch.observations)
        gain = ((new.log_prob(batch.actions) - batch.old_log_prob).exp() * batch.advantages)[MASK].mean()
        largest = torch.distributions.kl_divergence(old, new)[MASK].max()
        optimizer.zero_grad()
        (3.0 * largest - gain).backward()
        optimizer.step()
    assert report.step_fraction == 1.0
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=0, atol=1e-7)
    assert report.metrics["lower_bound"] == pytest.approx(report.surrogate_gain - 3.0 * report.step_kl_max)


@pytest.mark.parametrize("kind", ["categorical", "multi_categorical", "gaussian"])
def test_every_move_that_is_kept_has_a_positive_bound(kind):
    seen = {"whole": 0, "shortened": 0}
    for seed in range(12):
        policy, old = Policy(kind, seed), Policy(kind, seed)
        batch = batch_for(policy, seed=seed)
        report = TRPOPenalty(coefficient=None, gamma=0.9, learning_rate=10 ** (-4 + seed / 4)).step(policy, batch)
        if not report.accepted:
            assert report.reason == "no_improvement" and torch.equal(vector_of(policy), vector_of(old))
            continue
        kl = step_kl(old, policy, batch)
        with torch.no_grad():
            log_prob = policy.distribution(batch.observations).log_prob(batch.actions)
        gain = (((log_prob - batch.old_log_prob).exp() - 1) * batch.advantages)[MASK].mean().item()
        bound = gain - report.metrics["kl_coefficient"] * kl.max().item()
        assert bound > 0 and report.metrics["lower_bound"] == pytest.approx(bound, rel=1e-6)
        seen["whole" if report.step_fraction == 1 else "shortened"] += 1
    assert min(seen.values()) >= 2


def test_a_smaller_coefficient_goes_further():
    moves = []
    for coefficient in (0.1, 10.0, None):
        policy = Policy()
        rule = TRPOPenalty(coefficient=coefficient, gamma=0.99, epochs=20, learning_rate=0.005)
        moves.append(rule.step(policy, batch_for(policy)).step_kl_max)
    assert moves[0] > 2 * moves[1] > 4 * moves[2] > 0

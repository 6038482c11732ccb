"""PPO with a hard bound: never over it, PPO itself within it, and always on PPO's line."""

import copy

import pytest
import torch
from tiny_policies import KINDS, MASK, Policy, batch_for, step_kl, vector_of

from lm_trust.updates import PPOClip, PPOTrust


@pytest.mark.parametrize("max_kl", [0.001, 0.02])
@pytest.mark.parametrize("kind", KINDS)
def test_is_never_over_its_bound_and_always_on_ppos_line(kind, max_kl):
    seen = {"whole": 0, "shortened": 0}
    for seed in range(12):
        policy, ppo, old = Policy(kind, seed), Policy(kind, seed), Policy(kind, seed)
        batch = batch_for(policy, seed=seed)
        settings = {"learning_rate": 10 ** (-4 + seed / 4), "epochs": 3, "minibatches": 2, "seed": seed}
        report = PPOTrust(max_kl=max_kl, **settings).step(policy, batch)
        whole = PPOClip(**settings).step(ppo, batch)
        start, move = vector_of(old), vector_of(ppo) - vector_of(old)
        torch.testing.assert_close(vector_of(policy), start + report.step_fraction * move, rtol=0, atol=1e-12)
        if not report.accepted:
            assert torch.equal(vector_of(policy), start)
            continue
        kl = step_kl(old, policy, batch)
        assert kl.mean().item() <= max_kl and report.surrogate_gain > 0
        assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-9)
        assert report.step_kl_max == pytest.approx(kl.max().item(), rel=1e-9)
        if whole.step_kl <= max_kl and whole.surrogate_gain > 0:
            seen["whole"] += 1
            assert torch.equal(vector_of(policy), vector_of(ppo)) and report.step_fraction == 1.0
        elif report.backtracks <= 1:
            seen["shortened"] += 1
            assert kl.mean().item() > 0.4 * max_kl
    assert min(seen.values()) >= 2


@pytest.mark.parametrize("learning_rate", [1e-4, 0.03])
def test_candidates_are_the_passes_that_ppo_has_no_need_of_and_its_one(monkeypatch, learning_rate):
    passes, candidates = [], []
    for rule in (PPOClip(learning_rate=learning_rate), PPOTrust(learning_rate=learning_rate, max_kl=0.001)):
        policy, count = Policy(), []
        batch, forward = batch_for(policy), policy.distribution
        monkeypatch.setattr(
            policy, "distribution", lambda x, count=count, forward=forward: count.append(x) or forward(x)
        )
        candidates.append(rule.step(policy, batch).candidates)
        passes.append(len(count))
    assert candidates[0] == 1 and candidates[1] - 1 == passes[1] - passes[0]
    assert (candidates[1] > 1) == (learning_rate == 0.03)


@pytest.mark.parametrize("max_kl", [-1.0, float("nan")])
def test_a_bound_that_nothing_keeps_is_an_error(max_kl):
    with pytest.raises(ValueError, match=f"max_kl must be 0 or more, got {max_kl}"):
        PPOTrust(max_kl=max_kl)


def test_what_does_not_improve_is_not_done():
    policy = Policy()
    batch = batch_for(policy)
    good, start = PPOTrust(learning_rate=0.01), vector_of(policy)
    batch.advantages = torch.where(MASK, 0.0, 1.0)
    report = good.step(policy, batch)
    assert (report.accepted, report.reason, report.step_kl) == (False, "no_improvement", 0.0)
    assert torch.equal(vector_of(policy), start)


def test_both_bounds_are_kept():
    reference, policy = Policy(), Policy()
    rule = PPOTrust(max_kl=0.02, reference_budget=0.1, learning_rate=0.03)
    largest = []
    for seed in range(10):
        batch, old = batch_for(policy, seed=seed, reference=reference), copy.deepcopy(policy)
        batch.advantages = torch.tensor([1.0, 0.3, -0.3, -1.0], dtype=torch.float64)[batch.actions]
        rule.step(policy, batch)
        assert step_kl(old, policy, batch).mean().item() <= 0.02
        with torch.no_grad():
            kl = policy.distribution(batch.observations).kl(batch.reference)
        largest.append(torch.where(MASK, kl, 0.0).sum().item() / len(batch))
        before = old.distribution(batch.observations).kl(batch.reference)
        assert largest[-1] <= max(0.1, torch.where(MASK, before, 0.0).sum().item() / len(batch))
    assert max(largest) > 0.05

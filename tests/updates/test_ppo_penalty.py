"""PPO with the adaptive KL penalty: its gradient against autograd written out, and how beta moves."""

from __future__ import annotations

import pytest
import torch
from tiny_policies import MASK, Policy, batch_for, moved, vector_of

from lm_trust.updates import PPOPenalty
from lm_trust.updates.backward import backward


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_the_gradient_is_that_of_the_penalised_surrogate(kind):
    old = Policy(kind)
    batch, policy = batch_for(old), moved(old, 0.3)  # away from the start, where the KL has a slope
    rule = PPOPenalty(beta=2.5, entropy=0.1)
    backward(policy, batch, rule._weighed, others=[batch.old], microbatch_size=3)
    found = [parameter.grad.clone() for parameter in policy.parameters()]

    new, fixed = (each.independent(batch.observations) for each in (policy, old))
    ratio = (new.log_prob(batch.actions) - fixed.log_prob(batch.actions).detach()).exp()
    penalised = ratio * batch.advantages - 2.5 * torch.distributions.kl_divergence(fixed, new) + 0.1 * new.entropy()
    expected = torch.autograd.grad(-penalised[MASK].mean(), list(policy.parameters()))
    for ours, given in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, given, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e9, 0.5)])
def test_beta_follows_the_step_kl(target, factor):
    policy = Policy()
    batch = batch_for(policy)
    rule = PPOPenalty(target_kl=target, beta=3.0, learning_rate=0.01)
    assert rule.step(policy, batch).metrics["kl_coefficient"] == 3.0
    assert rule.step(policy, batch).metrics["kl_coefficient"] == 3.0 * factor


def test_beta_stays_within_the_band_around_the_target():
    policy, same = Policy(), Policy()
    batch = batch_for(policy)
    step_kl = PPOPenalty(learning_rate=0.01).step(policy, batch).step_kl
    rule = PPOPenalty(learning_rate=0.01, target_kl=step_kl * 1.2)
    rule.step(same, batch)
    assert rule.state_dict()["beta"] == 1.0


def test_a_larger_beta_moves_less_and_the_surrogate_improves():
    gains, moves = [], []
    for beta in (0.1, 30.0):
        policy = Policy("gaussian")
        report = PPOPenalty(beta=beta, epochs=20, learning_rate=0.01).step(policy, batch_for(policy))
        gains.append(report.surrogate_gain)
        moves.append(report.step_kl)
    assert min(gains) > 0 and moves[1] < moves[0] / 3


def test_continues_where_it_stopped():
    policy, again = Policy(), Policy()
    batch = batch_for(policy)
    whole, first, second = (PPOPenalty(target_kl=1e-6) for _ in range(3))
    for _ in range(2):
        whole.step(policy, batch)
    first.step(again, batch)
    second.load_state_dict(first.state_dict())
    second.step(again, batch)
    assert torch.equal(vector_of(policy), vector_of(again))
    assert second.state_dict()["beta"] == whole.state_dict()["beta"] == 4.0

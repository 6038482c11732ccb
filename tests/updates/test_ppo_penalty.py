"""PPO with the adaptive KL penalty: its gradient against autograd written out, and how beta moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_trust.core import Categorical, DiagonalGaussian
from lm_trust.core.batch import Batch
from lm_trust.updates import PPOPenalty
from lm_trust.updates.minibatch_adam import backward


class Policy(nn.Module):
    def __init__(self, gaussian: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.zeros(2, dtype=torch.float64)) if gaussian else None

    def distribution(self, x):
        return Categorical(x @ self.weight) if self.log_std is None else DiagonalGaussian(x @ self.weight, self.log_std)


def make(gaussian: bool) -> tuple[Policy, Batch]:
    policy, generator = Policy(gaussian), torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        old = policy.distribution(x).detach()
        actions = old.sample(generator)
    advantages = torch.randn(64, generator=generator, dtype=torch.float64)
    mask = torch.rand(64, generator=generator) < 0.8
    return policy, Batch(x, actions, old, old.log_prob(actions), advantages, mask)


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_gradient_is_that_of_the_penalised_surrogate(gaussian):
    policy, batch = make(gaussian)
    with torch.no_grad():  # away from the start, where the KL has a slope
        for parameter in policy.parameters():
            parameter.add_(0.3)
    rule = PPOPenalty(beta=2.5, entropy=0.1)
    backward(policy, batch, rule._weighed, others=[batch.old], microbatch_size=10)
    found = [parameter.grad.clone() for parameter in policy.parameters()]

    # by sampled divergences of one-sample estimators in expectation: here, torch's own distributions
    new = policy.distribution(batch.observations)
    kind = torch.distributions
    if gaussian:
        theirs = kind.Independent(kind.Normal(new.mean, new.log_std.exp()), 1)
        old = kind.Independent(kind.Normal(batch.old.mean, batch.old.log_std.exp()), 1)
    else:
        theirs, old = kind.Categorical(logits=new.logits), kind.Categorical(logits=batch.old.logits)
    each = (theirs.log_prob(batch.actions) - old.log_prob(batch.actions)).exp() * batch.advantages
    each = each - 2.5 * kind.kl_divergence(old, theirs) + 0.1 * theirs.entropy()
    expected = torch.autograd.grad(-each[batch.mask].mean(), list(policy.parameters()))
    for ours, given in zip(found, expected, strict=True):
        assert torch.allclose(ours, given, atol=1e-12)


@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e9, 0.5)])
def test_beta_follows_the_step_kl(target, factor):
    policy, batch = make(False)
    rule = PPOPenalty(target_kl=target, beta=3.0, learning_rate=0.01)
    assert rule.step(policy, batch).metrics["kl_coefficient"] == 3.0
    assert rule.step(policy, batch).metrics["kl_coefficient"] == 3.0 * factor


def test_beta_stays_within_the_band_around_the_target():
    policy, batch = make(False)
    start = [parameter.detach().clone() for parameter in policy.parameters()]
    step_kl = PPOPenalty(learning_rate=0.01).step(policy, batch).step_kl
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), start, strict=True):
            parameter.copy_(value)
    rule = PPOPenalty(learning_rate=0.01, target_kl=step_kl * 1.2)
    rule.step(policy, batch)
    assert rule.state_dict()["beta"] == 1.0


def test_a_larger_beta_moves_less_and_the_surrogate_improves():
    gains, moves = [], []
    for beta in (0.1, 30.0):
        policy, batch = make(True)
        report = PPOPenalty(beta=beta, epochs=20, learning_rate=0.01).step(policy, batch)
        gains.append(report.surrogate_gain)
        moves.append(report.step_kl)
    assert min(gains) > 0 and moves[1] < moves[0] / 3


def test_continues_where_it_stopped():
    policy, batch = make(False)
    whole, first = PPOPenalty(target_kl=1e-6), PPOPenalty(target_kl=1e-6)
    whole.step(policy, batch)
    whole.step(policy, batch)
    again, batch = make(False)
    first.step(again, batch)
    second = PPOPenalty(target_kl=1e-6)
    second.load_state_dict(first.state_dict())
    second.step(again, batch)
    assert torch.equal(policy.weight, again.weight) and second.state_dict()["beta"] == whole.state_dict()["beta"] == 4.0

"""The mismatch of engine and policy: measured by hand, corrected by enumeration, refused where it is too large."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lm_trust.core import Categorical
from lm_trust.core.batch import Rollout
from lm_trust.errors import UserError
from lm_trust.training.config_language import Mismatch
from lm_trust.training.mismatch import corrected, mismatch_metrics

ACTIONS = 3
GENERATOR = torch.Generator().manual_seed(4)
# Logits of the first action, and of the second after each first one.
POLICY = torch.randn(1 + ACTIONS, ACTIONS, generator=GENERATOR, dtype=torch.float64)
ENGINE = POLICY + 0.6 * torch.randn(1 + ACTIONS, ACTIONS, generator=GENERATOR, dtype=torch.float64)
REWARDS = torch.randn(ACTIONS, ACTIONS, generator=GENERATOR, dtype=torch.float64)


def rollout_of(actions, engine_log_prob, mask=None):
    nothing = torch.zeros(actions.shape, dtype=torch.bool)
    mask = ~nothing if mask is None else mask
    return Rollout(None, actions, torch.zeros(actions.shape), nothing, nothing, mask, engine_log_prob=engine_log_prob)


def every_sequence(steps):
    """Each sequence of actions there is (R, steps), the row of the logits of each step, and its reward."""
    actions = torch.tensor(list(itertools.product(range(ACTIONS), repeat=steps)))
    states = torch.stack([torch.zeros(len(actions), dtype=torch.long), 1 + actions[:, 0]][:steps], -1)
    return actions, states, REWARDS[actions[:, 0], actions[:, -1]].unsqueeze(-1).expand(actions.shape)


def policy_gradient(config, steps, sampler):
    """Of the expected reward, by REINFORCE over all sequences that `sampler` draws, weighted as `config` says."""
    actions, states, rewards = every_sequence(steps)
    logits = POLICY.clone().requires_grad_()
    log_prob, sampled = Categorical(logits[states]).log_prob(actions), Categorical(sampler[states]).log_prob(actions)
    advantages = corrected(config, rollout_of(actions, sampled), log_prob.detach(), rewards)
    (sampled.sum(-1).exp() * (advantages * log_prob).sum(-1)).sum().backward()
    return logits.grad


def true_gradient(steps):
    """The same by automatic differentiation of the expectation itself."""
    actions, states, rewards = every_sequence(steps)
    logits = POLICY.clone().requires_grad_()
    (Categorical(logits[states]).log_prob(actions).sum(-1).exp() * rewards[:, 0]).sum().backward()
    return logits.grad


def test_weights_give_the_true_gradient_from_the_engines_samples():
    true = true_gradient(1)
    assert (policy_gradient(Mismatch(cap=1e6), 1, ENGINE) - true).abs().max() < 1e-12
    assert (policy_gradient(Mismatch(correct=False), 1, ENGINE) - true).abs().max() > 0.05
    # Where the engine is the policy nothing is changed.
    assert (policy_gradient(Mismatch(cap=1.0), 1, POLICY) - true).abs().max() < 1e-12


def test_a_cap_leaves_the_bias_of_what_is_beyond_it():
    true, uncorrected = true_gradient(1), policy_gradient(Mismatch(correct=False), 1, ENGINE)
    ratio = (POLICY[0].log_softmax(-1) - ENGINE[0].log_softmax(-1)).exp()
    cap = 1 + 0.5 * (ratio.max().item() - 1)
    capped = policy_gradient(Mismatch(cap=cap), 1, ENGINE)
    beyond = ((ratio - cap).clamp(min=0) * ENGINE[0].softmax(-1) * REWARDS.diagonal()).unsqueeze(-1)
    bias = (beyond * (torch.eye(ACTIONS) - POLICY[0].softmax(-1))).sum(0)
    torch.testing.assert_close(true[0] - capped[0], bias, rtol=0, atol=1e-12)
    assert 0 < (capped - true).norm() < (uncorrected - true).norm()


def test_over_several_steps_the_bias_that_is_left_is_that_of_the_states_met():
    true = true_gradient(2)
    uncorrected, weighted = (
        policy_gradient(config, 2, ENGINE) - true for config in (Mismatch(correct=False), Mismatch(cap=1e6))
    )
    assert 0 < weighted.norm() < 0.7 * uncorrected.norm()


def test_the_metrics_by_hand():
    engine = torch.tensor([[0.5, 0.2], [0.5, 0.9]]).log()
    policy = torch.tensor([[0.25, 0.5], [0.5, math.nan]]).log()
    mask = torch.tensor([[True, True], [True, False]])
    found = mismatch_metrics(Mismatch(cap=2.0), rollout_of(torch.zeros(2, 2), engine, mask), policy)
    k3 = [0.5 - 1 - math.log(0.5), 2.5 - 1 - math.log(2.5), 0.0]
    expected = {"engine_kl": sum(k3) / 3, "engine_ratio_max": 2.5, "engine_clipped_fraction": 1 / 3}
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_estimate_is_the_divergence_of_engine_from_policy():
    engine, policy = Categorical(ENGINE[0]), Categorical(POLICY[0])
    often = engine.log_probs.exp().mul(20_000).round().long()  # each action as often as the engine draws it
    actions = torch.arange(ACTIONS).repeat_interleave(often).unsqueeze(0)
    found = mismatch_metrics(Mismatch(), rollout_of(actions, engine.log_probs[actions]), policy.log_probs[actions])
    assert found["engine_kl"] == pytest.approx(engine.kl(policy).item(), rel=1e-2)
    assert found["engine_kl"] != pytest.approx(policy.kl(engine).item(), rel=0.05)


def test_beyond_the_limit_is_refused_by_name():
    rollout, policy = rollout_of(torch.zeros(1, 1), torch.tensor([[0.5]]).log()), torch.tensor([[0.25]]).log()
    estimate = 0.5 - 1 - math.log(0.5)
    assert mismatch_metrics(Mismatch(limit=estimate + 1e-3), rollout, policy)
    with pytest.raises(UserError, match=r"rollout\.mismatch\.limit: .* 0\.193 nats a token .* 0\.19 is allowed"):
        mismatch_metrics(Mismatch(limit=0.19), rollout, policy)


def test_without_an_engines_log_probabilities_there_is_nothing_to_do():
    rollout, advantages = rollout_of(torch.zeros(2, 2), None), torch.ones(2, 2)
    assert mismatch_metrics(Mismatch(limit=1e-9), rollout, -advantages) == {}
    assert corrected(Mismatch(), rollout, -advantages, advantages) is advantages
    told = replace(rollout, engine_log_prob=-2 * advantages)
    assert corrected(Mismatch(correct=False), told, -advantages, advantages) is advantages

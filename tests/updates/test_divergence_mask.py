"""The divergence mask against a loop over steps in plain Python."""

import math

import pytest
import torch
from tiny_policies import KINDS, MASK, Policy, batch_for, moved, vector_of

from lm_trust.errors import UserError
from lm_trust.updates import DivergenceMask


def divergence_by_hand(old, new, action, kind, top_k):
    """Of two lists of probabilities."""
    if top_k is not None and top_k < len(old):
        kept = sorted(range(len(old)), key=lambda index: -old[index])[:top_k]
        if action not in kept:
            kept[-1] = action
        rest = [index for index in range(len(old)) if index not in kept]
        old, new = ([p[i] for i in kept] + [sum(p[i] for i in rest)] for p in (old, new))
    if kind == "tv":
        return sum(abs(p - q) for p, q in zip(old, new, strict=True)) / 2
    return sum(p * math.log(p / q) for p, q in zip(old, new, strict=True))


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_against_a_loop_over_steps(kind, top_k):
    policy = Policy()
    batch = batch_for(policy)
    old = torch.softmax(batch.old.logits, -1).tolist()
    threshold = {"kl": 0.04, "tv": 0.1}[kind]
    rule = DivergenceMask(divergence=kind, threshold=threshold, top_k=top_k)
    new = moved(policy, 0.4).distribution(batch.observations)
    each, held = rule._masked(new, batch.old, batch.actions, batch.advantages, batch.old_log_prob, MASK)
    (slope,) = torch.autograd.grad(each[MASK].sum(), new.logits)

    probabilities = torch.softmax(new.logits.detach(), -1).tolist()
    count = 0
    for b, t in MASK.nonzero().tolist():
        action, advantage = batch.actions[b, t].item(), batch.advantages[b, t].item()
        p, q = old[b][t], probabilities[b][t]
        ratio = q[action] / p[action]
        onward = (advantage > 0 and ratio > 1) or (advantage < 0 and ratio < 1)
        out = onward and divergence_by_hand(p, q, action, kind, top_k) > threshold
        assert held[b, t].item() == out
        assert each[b, t].item() == pytest.approx(0.0 if out else ratio * advantage, rel=1e-9)
        scores = [(index == action) - q[index] for index in range(4)]
        expected = [0.0 if out else ratio * advantage * score for score in scores]
        assert slope[b, t].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        count += out
    assert 3 <= count <= MASK.sum().item() - 10


def test_one_kept_action_is_the_divergence_of_two_coins():
    policy = Policy()
    batch = batch_for(policy)
    new = moved(Policy(), 0.4).distribution(batch.observations).detach()
    p, q = batch.old_log_prob.exp(), new.log_prob(batch.actions).exp()
    coins = torch.distributions.kl_divergence(torch.distributions.Bernoulli(p), torch.distributions.Bernoulli(q))
    for threshold in coins[MASK].tolist()[:5]:
        rule = DivergenceMask(threshold=threshold + 1e-9, top_k=1)
        _, held = rule._masked(new, batch.old, batch.actions, batch.advantages, batch.old_log_prob, MASK)
        onward = torch.where(batch.advantages > 0, q > p, q < p)
        assert torch.equal(held.bool(), MASK & onward & (coins > threshold + 1e-9))


@pytest.mark.parametrize("kind", KINDS)
def test_far_thresholds_leave_the_surrogate_and_near_ones_hold_the_policy(kind):
    policy, tight, plain = Policy(kind), Policy(kind), Policy(kind)
    batch = batch_for(policy)
    settings = {"learning_rate": 0.02, "epochs": 10, "minibatches": 1}
    far = DivergenceMask(threshold=1e9, **settings).step(policy, batch)
    near = DivergenceMask(threshold=1e-3, **settings).step(tight, batch)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.02, eps=1e-5)
    for _ in range(10):
        log_prob = plain.distribution(batch.observations).log_prob(batch.actions)
        optimizer.zero_grad()
        (-((log_prob - batch.old_log_prob).exp() * batch.advantages)[MASK].mean()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=0, atol=1e-6)
    assert far.metrics["masked_fraction"] == 0 < near.metrics["masked_fraction"]
    assert 0 < near.step_kl < far.step_kl / 2


@pytest.mark.parametrize("settings", [{"divergence": "tv"}, {"top_k": 1}])
@pytest.mark.parametrize("kind", ["multi_categorical", "gaussian"])
def test_what_only_discrete_actions_have_is_refused_before_anything_moves(kind, settings):
    policy = Policy(kind)
    start = vector_of(policy)
    with pytest.raises(UserError, match=f"update.{next(iter(settings))}: .*one discrete action a step; use "):
        DivergenceMask(**settings).step(policy, batch_for(policy))
    assert torch.equal(vector_of(policy), start)

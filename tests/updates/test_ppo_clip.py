"""PPO-clip against a loop written out by hand, and its certificate against torch.distributions."""

import copy
import math

import pytest
import torch
from tiny_policies import B, D, Policy, V, batch_for, independent_kl, vector_of
from torch import nn

from lm_trust.control import ActionSpace, MLPPolicy
from lm_trust.core import Categorical
from lm_trust.core.batch import Batch
from lm_trust.core.linearisation import Linearisation
from lm_trust.updates import PPOClip


def by_hand(policy, batch, *, epochs, clip, learning_rate, max_grad_norm, entropy=0.0, reference=None, weight=0.0):
    """Full-batch PPO; returns the share of clipped ratios in each epoch and the first gradient's length."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, eps=1e-5)
    shares, norms = [], []
    for _ in range(epochs):
        new = policy.independent(batch.observations)
        ratio = (new.log_prob(batch.actions) - batch.old_log_prob).exp()
        bounded = ratio.clip(1 - clip, 1 + clip)
        gain = torch.minimum(ratio * batch.advantages, bounded * batch.advantages) + entropy * new.entropy()
        if reference is not None:
            with torch.no_grad():
                fixed = reference.independent(batch.observations)
            gain = gain - weight * torch.distributions.kl_divergence(new, fixed)
        optimizer.zero_grad()
        (-gain[batch.mask].mean()).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        norms.append(gradients.norm().item())
        for parameter in policy.parameters():
            parameter.grad.mul_(min(1.0, max_grad_norm / norms[-1]))
        shares.append(((ratio - 1).abs() > clip)[batch.mask].double().mean().item())
        optimizer.step()
    return shares, norms


SETTINGS = {"epochs": 4, "clip": 0.1, "learning_rate": 0.02, "max_grad_norm": 0.2}


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("extra", [{}, {"entropy": 0.3}])
def test_is_adam_on_the_clipped_surrogate(kind, extra):
    policy, plain = Policy(kind), Policy(kind)
    batch = batch_for(policy)
    report = PPOClip(minibatches=1, **SETTINGS, **extra).step(policy, batch)
    shares, norms = by_hand(plain, batch, **SETTINGS, **extra)
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=1e-5, atol=1e-7)
    assert max(shares) > 0
    assert report.metrics["clip_fraction"] == pytest.approx(sum(shares) / len(shares), abs=1e-9)
    assert report.gradient_norm == pytest.approx(norms[0], rel=1e-6)
    assert report.metrics["gradient_steps"] == 4


def test_a_reference_loss_is_the_exact_kl_from_the_new_policy():
    policy, plain, reference = Policy(), Policy(), Policy(seed=9)
    batch = batch_for(policy, reference=reference)
    PPOClip(minibatches=1, reference_loss=0.5, **SETTINGS).step(policy, batch)
    by_hand(plain, batch, reference=reference, weight=0.5, **SETTINGS)
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=1e-5, atol=1e-7)


def test_the_ratio_is_one_before_the_first_step():
    """So nothing is clipped, whatever the clip, and the first gradient is the policy gradient."""
    policy, plain = Policy(), Policy()
    batch = batch_for(policy)
    report = PPOClip(clip=1e-6, epochs=1, minibatches=1).step(policy, batch)
    assert report.metrics["clip_fraction"] == 0.0
    log_prob = plain.independent(batch.observations).log_prob(batch.actions)
    gradient = torch.autograd.grad((log_prob * batch.advantages)[batch.mask].mean(), list(plain.parameters()))
    norm = torch.cat([part.flatten() for part in gradient]).norm().item()
    assert report.gradient_norm == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_the_certificate_is_measured_after_the_epochs(kind, microbatch_size):
    policy = Policy(kind)
    old, batch = copy.deepcopy(policy), batch_for(policy)
    report = PPOClip(minibatches=2, learning_rate=0.02, microbatch_size=microbatch_size).step(policy, batch)
    assert report.accepted
    assert report.predicted_gain is None
    kl = independent_kl(old, policy, batch)
    assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert report.step_kl_max == pytest.approx(kl.max().item(), rel=1e-9)
    backward = independent_kl(policy, old, batch).mean().item()
    assert abs(report.step_kl - backward) > 1e-3 * backward
    with torch.no_grad():
        log_prob = policy.independent(batch.observations).log_prob(batch.actions)
    gain = (((log_prob - batch.old_log_prob).exp() - 1) * batch.advantages)[batch.mask].mean().item()
    assert report.surrogate_gain == pytest.approx(gain, rel=1e-9)


def test_the_metrics_of_the_rule():
    policy = Policy()
    report = PPOClip(epochs=3, minibatches=2, learning_rate=0.05).step(policy, batch_for(policy))
    assert 0 < report.metrics["clip_fraction"] < 1
    assert report.metrics["gradient_steps"] == 6
    assert report.as_metrics()["clip_fraction"] == report.metrics["clip_fraction"]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("extra", [{}, {"entropy": 0.1, "reference_loss": 0.2}])
def test_microbatches_equal_the_whole_minibatch_under_unequal_masks(rows, extra):
    whole, cut, reference = Policy(), Policy(), Policy(seed=9)
    batch = batch_for(whole, reference=reference)
    one = PPOClip(minibatches=2, learning_rate=0.01, **extra).step(whole, batch)
    two = PPOClip(minibatches=2, learning_rate=0.01, microbatch_size=rows, **extra).step(cut, batch)
    torch.testing.assert_close(vector_of(cut), vector_of(whole), rtol=1e-6, atol=1e-8)
    for name in ("step_kl", "step_kl_max", "surrogate_gain", "gradient_norm"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-5), name
    assert two.metrics["clip_fraction"] == pytest.approx(one.metrics["clip_fraction"])


def test_what_is_masked_changes_nothing():
    policy, other = Policy(), Policy()
    batch = batch_for(policy)
    noisy, mask = copy.copy(batch), batch.mask
    noisy.observations = torch.where(mask[..., None], batch.observations, torch.full_like(batch.observations, 20.0))
    noisy.actions = torch.where(mask, batch.actions, (batch.actions + 1) % V)
    noisy.advantages = torch.where(mask, batch.advantages, torch.full_like(batch.advantages, 1e6))
    noisy.old_log_prob = torch.where(mask, batch.old_log_prob, torch.full_like(batch.old_log_prob, -50.0))
    one, two = PPOClip(learning_rate=0.01).step(policy, batch), PPOClip(learning_rate=0.01).step(other, noisy)
    torch.testing.assert_close(vector_of(other), vector_of(policy), rtol=1e-7, atol=1e-9)
    assert two.metrics["clip_fraction"] == pytest.approx(one.metrics["clip_fraction"])
    assert two.step_kl == pytest.approx(one.step_kl, rel=1e-6)


class Bandit(nn.Module):
    """Two actions, the first with the given probability, in every state."""

    def __init__(self, probability):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([probability, 1 - probability], dtype=torch.float64).log())

    def distribution(self, observations):
        return Categorical(self.logits.expand(*observations.shape[:-1], 2))


class KnowingBandit(Bandit):
    """The same with a derivative of its own, so that the rule takes the gradient without autograd."""

    def linearised(self, observations):
        distribution = self.distribution(observations).detach()
        return Linearisation(
            distribution,
            lambda tangents: (tangents[0].expand_as(distribution.logits),),
            lambda cotangent: [cotangent.sum(0)],
        )


@pytest.mark.parametrize("advantage", [3.0, -3.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
@pytest.mark.parametrize("kind", [Bandit, KnowingBandit])
def test_a_policy_beyond_the_band_is_moved_only_back(kind, ratio, advantage):
    policy, old = kind(0.4 * ratio), kind(0.4).distribution(torch.zeros(1, 1)).detach()
    actions = torch.zeros(1, dtype=torch.int64)
    batch = Batch(
        observations=torch.zeros(1, 1),
        actions=actions,
        old=old,
        old_log_prob=old.log_prob(actions),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        mask=torch.ones(1, dtype=torch.bool),
    )
    before = policy.logits.detach().clone()
    report = PPOClip(clip=0.2, epochs=1, minibatches=1, learning_rate=0.01).step(policy, batch)
    onward = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    gradient = 0.0 if onward else ratio * advantage * (1 - 0.4 * ratio)  # d (r A) / d logit of the action
    assert report.gradient_norm == pytest.approx(math.sqrt(2) * abs(gradient), rel=1e-9)
    moved = (policy.logits.detach() - before)[0].item()
    assert moved == pytest.approx(math.copysign(0.01, gradient) if gradient else 0.0, rel=1e-3)
    assert report.metrics["clip_fraction"] == (ratio in (0.5, 1.5))


def test_a_wider_upper_clip_lets_good_actions_grow_further():
    def highest(clip_high):
        policy = Policy()
        batch = batch_for(policy)
        batch.advantages = torch.ones_like(batch.advantages)
        PPOClip(clip=0.1, clip_high=clip_high, epochs=30, minibatches=1, learning_rate=0.02).step(policy, batch)
        with torch.no_grad():
            log_prob = policy.independent(batch.observations).log_prob(batch.actions)
        return (log_prob - batch.old_log_prob)[batch.mask].exp().mean().item()

    assert highest(0.6) > highest(None) + 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_restores_policy_and_optimizer(bad):
    rule, policy = PPOClip(learning_rate=0.01, minibatches=2), Policy()
    rule.step(policy, batch_for(policy))
    moments = copy.deepcopy(rule.state_dict()["optimizer"])
    before = [parameter.detach().clone().view(torch.int64) for parameter in policy.parameters()]
    batch = batch_for(policy, seed=2)
    batch.advantages[0, 1] = bad
    report = rule.step(policy, batch)
    assert not report.accepted
    assert report.reason == "non_finite"
    assert report.step_kl == report.step_kl_max == 0.0
    now = [parameter.detach().view(torch.int64) for parameter in policy.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(now, before, strict=True))
    for index, state in rule.state_dict()["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, moments["state"][index][name]), name
    good = rule.step(policy, batch_for(policy, seed=3))
    assert good.accepted
    assert vector_of(policy).isfinite().all()


def test_saved_and_continued_is_the_same_as_never_stopped():
    rule, policy = PPOClip(learning_rate=0.01, minibatches=3, seed=4), Policy()
    rule.step(policy, batch_for(policy))
    saved, weights = copy.deepcopy(rule.state_dict()), copy.deepcopy(policy.state_dict())
    rule.step(policy, batch_for(policy, seed=2))

    resumed, other = PPOClip(learning_rate=0.01, minibatches=3, seed=4), Policy(seed=7)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    resumed.step(other, batch_for(other, seed=2))
    assert torch.equal(vector_of(other), vector_of(policy))

    forgetful, third = PPOClip(learning_rate=0.01, minibatches=3, seed=4), Policy(seed=7)
    third.load_state_dict(weights)
    forgetful.step(third, batch_for(third, seed=2))
    assert not torch.equal(vector_of(third), vector_of(policy))


def test_a_rule_can_be_saved_again_before_its_first_step_after_loading():
    rule, policy = PPOClip(), Policy()
    rule.step(policy, batch_for(policy))
    resumed = PPOClip()
    resumed.load_state_dict(rule.state_dict())
    again = resumed.state_dict()["optimizer"]
    assert again["state"].keys() == rule.state_dict()["optimizer"]["state"].keys()


def test_shuffles_have_their_own_generator():
    policy, other, third = Policy(), Policy(), Policy()
    batch = batch_for(policy)
    state = torch.get_rng_state()
    PPOClip(learning_rate=0.01, seed=1).step(policy, batch)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(123)
    PPOClip(learning_rate=0.01, seed=1).step(other, batch)
    PPOClip(learning_rate=0.01, seed=2).step(third, batch)
    assert torch.equal(vector_of(other), vector_of(policy))
    assert not torch.equal(vector_of(third), vector_of(policy))


def test_every_row_is_seen_once_an_epoch():
    class Watching(Policy):
        seen = None

        def distribution(self, observations):
            if self.seen is not None and torch.is_grad_enabled():
                self.seen.append(observations[:, 0])
            return super().distribution(observations)

    policy = Watching()
    batch = batch_for(policy)
    policy.seen = []
    PPOClip(epochs=2, minibatches=3).step(policy, batch)
    assert sum(len(rows) for rows in policy.seen) == 2 * B
    for epoch in (policy.seen[:3], policy.seen[3:]):
        rows = torch.cat(epoch)
        assert {tuple(row.tolist()) for row in rows} == {tuple(row.tolist()) for row in batch.observations[:, 0]}


def test_a_kl_target_stops_the_epochs_early():
    policy, free = Policy(), Policy()
    batch = batch_for(policy)
    stopped = PPOClip(epochs=20, minibatches=1, learning_rate=0.02, target_kl=0.005).step(policy, batch)
    whole = PPOClip(epochs=20, minibatches=1, learning_rate=0.02).step(free, batch)
    assert (
        stopped.metrics["gradient_steps"] < whole.metrics["gradient_steps"] == whole.metrics["gradients_computed"] == 20
    )
    assert (
        stopped.metrics["gradients_computed"] == stopped.metrics["gradient_steps"] + 1
    )  # the one that says so is not followed
    assert stopped.step_kl < whole.step_kl


def test_an_annealed_learning_rate_follows_progress():
    for progress, expected in ((0.0, 0.01), (0.25, 0.0075), (1.0, 0.0)):
        policy = Policy()
        before = vector_of(policy)
        batch = batch_for(policy, progress=progress)
        report = PPOClip(learning_rate=0.01, anneal=True).step(policy, batch)
        assert report.metrics["learning_rate"] == pytest.approx(expected)
        assert torch.equal(vector_of(policy), before) == (expected == 0.0)


def test_frozen_parameters_stay():
    policy = Policy()
    policy.net[0].requires_grad_(False)
    before = policy.net[0].weight.clone(), policy.net[2].weight.clone()
    PPOClip(learning_rate=0.01).step(policy, batch_for(policy))
    assert torch.equal(policy.net[0].weight, before[0])
    assert not torch.equal(policy.net[2].weight, before[1])


def test_a_flat_batch_takes_the_same_steps():
    policy, flat = Policy(), Policy()
    batch = batch_for(policy)
    rows = batch.observations.flatten(0, 1)
    with torch.no_grad():
        old = flat.distribution(rows).detach()
    steps = Batch(
        observations=rows,
        actions=batch.actions.flatten(),
        old=old,
        old_log_prob=batch.old_log_prob.flatten(),
        advantages=batch.advantages.flatten(),
        mask=batch.mask.flatten(),
    )
    one = PPOClip(minibatches=1, learning_rate=0.01).step(policy, batch)
    two = PPOClip(minibatches=1, learning_rate=0.01).step(flat, steps)
    torch.testing.assert_close(vector_of(flat), vector_of(policy), rtol=1e-6, atol=1e-8)
    assert two.step_kl == pytest.approx(one.step_kl, rel=1e-6)


def test_nothing_of_the_epochs_that_needed_no_autograd_is_in_its_way_afterwards():
    policy, rule = (
        MLPPolicy(D, ActionSpace("discrete", V)).double(),
        PPOClip(minibatches=2, **SETTINGS),
    )
    batch = batch_for(policy)
    rule.step(policy, batch)
    for _ in range(2):  # the second is added to the first
        (-policy.distribution(batch.observations).log_prob(batch.actions)[batch.mask].mean()).backward()
    torch.optim.SGD(policy.parameters(), lr=0.1).step()
    copied, theirs = copy.deepcopy((rule, policy))
    copied.step(theirs, batch)
    assert not torch.equal(vector_of(theirs), vector_of(policy))
    moments = [each for state in rule.state_dict()["optimizer"]["state"].values() for each in state.values()]
    assert moments and not any(each.is_inference() for each in moments)


def test_sequences_without_a_mask_are_their_single_steps():
    policy, flat = (MLPPolicy(D, ActionSpace("discrete", V)).double() for _ in range(2))
    batch = batch_for(policy, mask=None)
    rule = {**SETTINGS, "minibatches": 1, "target_kl": 10.0}
    one, two = PPOClip(**rule).step(policy, batch), PPOClip(**rule).step(flat, batch.flattened())
    torch.testing.assert_close(vector_of(flat), vector_of(policy), rtol=1e-6, atol=1e-8)
    assert one.gradient_norm == pytest.approx(two.gradient_norm, rel=1e-9)
    assert one.metrics["clip_fraction"] == pytest.approx(two.metrics["clip_fraction"])

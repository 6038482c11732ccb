"""What holds for every update rule: its certificate, masks, rejections, saving, both worlds, and that it improves."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny_policies import KINDS, MASK, Policy, batch_for, moved, step_kl, vector_of
from torch import nn

from lm_trust.core import Categorical
from lm_trust.core.batch import Batch
from lm_trust.lm import vocabulary_head
from lm_trust.lm.vocabulary_head import VocabularyCategorical
from lm_trust.updates import (
    TRPO,
    DivergenceMask,
    NaturalGradient,
    PPOClip,
    PPOPenalty,
    PPOTrust,
    Projection,
    Reinforce,
    TRPOPenalty,
)


def by_adam(rule, **own):
    """With two epochs of two minibatches, unless told otherwise."""
    return lambda **given: rule(**{"learning_rate": 0.01, "epochs": 2, "minibatches": 2, **own, **given})


RULES = {
    "trpo": TRPO,
    "natural_gradient": NaturalGradient,
    "reinforce": lambda **given: Reinforce(learning_rate=0.01, **given),
    "ppo_clip": by_adam(PPOClip),
    "ppo_penalty": by_adam(PPOPenalty),
    "ppo_trust": by_adam(PPOTrust, max_kl=0.002),
    "trpo_penalty": by_adam(TRPOPenalty),
    "projection": by_adam(Projection, token_kl=0.002),
    "divergence_mask": by_adam(DivergenceMask, threshold=0.002),
}
SPARSE = {
    "projection": by_adam(Projection, token_kl=0.002, top_k=2),
    "divergence_mask": by_adam(DivergenceMask, divergence="tv", threshold=0.02, top_k=2),
}
BY_ADAM = [name for name in RULES if name not in ("trpo", "natural_gradient")]
MINIBATCHED = [name for name in BY_ADAM if name != "reinforce"]
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))


@every_rule
@pytest.mark.parametrize("kind", KINDS)
def test_the_report_is_measured_on_the_whole_batch(kind, make):
    policy, old = Policy(kind), Policy(kind)
    batch = batch_for(policy)
    report = make().step(policy, batch)
    assert report.accepted and report.reason == "accepted"
    kl = step_kl(old, policy, batch)
    with torch.no_grad():
        log_prob = policy.distribution(batch.observations).log_prob(batch.actions)
    gain = (((log_prob - batch.old_log_prob).exp() - 1) * batch.advantages)[MASK].mean().item()
    assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert report.step_kl_max == pytest.approx(kl.max().item(), rel=1e-9)
    assert report.surrogate_gain == pytest.approx(gain, rel=1e-9) and gain > 0
    assert all(isinstance(value, float | int | str | bool | None) for value in report.as_metrics().values())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_single_steps_without_a_mask_are_the_masked_sequences(kind, name):
    policy, flat = Policy(kind), Policy(kind)
    batch = batch_for(policy)
    one, two = whole_batches(name).step(policy, batch), whole_batches(name).step(flat, batch.flattened())
    torch.testing.assert_close(vector_of(flat), vector_of(policy), rtol=0, atol=1e-8)
    assert two.step_kl == pytest.approx(one.step_kl, rel=1e-5)
    assert two.surrogate_gain == pytest.approx(one.surrogate_gain, rel=1e-5)


@every_rule
def test_a_mask_may_be_zeros_and_ones(make):
    policy, other = Policy("categorical"), Policy("categorical")
    batch = batch_for(policy)
    given = replace(batch, mask=batch.mask.long())
    assert make().step(other, given) == make().step(policy, batch) and vector_of(other).equal(vector_of(policy))
    assert given.flattened().actions.equal(batch.flattened().actions)


def whole_batches(name):
    """The rule with one minibatch, whose cut does not depend on what a row is."""
    return RULES[name](minibatches=1) if name in MINIBATCHED else RULES[name]()


@every_rule
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_microbatches_change_nothing(kind, make):
    whole, cut = Policy(kind), Policy(kind)
    batch = batch_for(whole)
    one, two = make().step(whole, batch), make(microbatch_size=3).step(cut, batch)
    torch.testing.assert_close(vector_of(cut), vector_of(whole), rtol=0, atol=1e-7)
    assert two.step_kl_max == pytest.approx(one.step_kl_max, rel=1e-5)


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_rejects_bit_for_bit(bad, make):
    rule, policy = make(), Policy()
    rule.step(policy, batch_for(policy))
    before = [parameter.detach().clone().view(torch.int64) for parameter in policy.parameters()]
    batch = batch_for(policy, seed=2)
    batch.advantages[0, 1] = bad
    report = rule.step(policy, batch)
    assert (report.accepted, report.reason) == (False, "non_finite")
    assert report.step_kl == report.step_kl_max == report.surrogate_gain == report.step_fraction == 0.0
    now = [parameter.detach().view(torch.int64) for parameter in policy.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(now, before, strict=True))
    assert rule.step(policy, batch_for(policy, seed=3)).accepted


@every_rule
@pytest.mark.parametrize("settings", [{}, {"reference_loss": 0.1}], ids=str)
def test_a_batch_without_rows_moves_nothing(settings, make):
    rule, policy = make(**settings), Policy()
    batch = batch_for(policy, reference=Policy(seed=5))
    rule.step(policy, batch)
    before = vector_of(policy)
    report = rule.step(policy, batch[:0])
    assert (report.accepted, report.reason, report.step_kl) == (False, "zero_gradient", 0.0)
    assert torch.equal(vector_of(policy), before)


@pytest.mark.parametrize("name", RULES)
def test_saved_and_continued_is_the_same_as_never_stopped(name):
    seed = {"seed": 4} if name in BY_ADAM else {}
    rule, resumed, policy, other = RULES[name](**seed), RULES[name](**seed), Policy(), Policy()
    rule.step(policy, batch_for(policy))
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    other.load_state_dict(policy.state_dict())
    one, two = rule.step(policy, batch_for(policy, seed=2)), resumed.step(other, batch_for(other, seed=2))
    assert torch.equal(vector_of(policy), vector_of(other)) and one == two


class Tokens(nn.Module):
    """A policy over a vocabulary with a frozen head: chunked, or as plain logits."""

    def __init__(self, dense, size=40):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 6, generator=generator, dtype=torch.float64))
        self.register_buffer("head", torch.randn(size, 6, generator=generator, dtype=torch.float64))
        self.dense = dense

    def distribution(self, observations):
        hidden = torch.tanh(observations @ self.weight)
        return Categorical(hidden @ self.head.T) if self.dense else VocabularyCategorical(hidden, self.head)


@pytest.mark.parametrize("make", [*RULES.values(), *SPARSE.values()], ids=[*RULES, *(f"sparse_{k}" for k in SPARSE)])
def test_a_chunked_vocabulary_takes_the_same_step(make, monkeypatch):
    monkeypatch.setattr(vocabulary_head, "CHUNK_ELEMENTS", 40 * 7)
    chunked, dense = Tokens(dense=False), Tokens(dense=True)
    moves = []
    for policy in (chunked, dense):
        batch, reference = batch_for(policy), moved(Tokens(policy.dense), 0.1)
        batch.actions = batch_for(dense).actions
        batch.old_log_prob = batch.old.log_prob(batch.actions)
        batch.reference = reference.distribution(batch.observations).detach()
        start = vector_of(policy)
        report = make(reference_loss=0.1).step(policy, batch)
        assert report.accepted and report.step_kl > 0
        moves.append(vector_of(policy) - start)
    torch.testing.assert_close(moves[0], moves[1], rtol=0, atol=1e-7)


@every_rule
def test_a_reference_loss_without_a_reference_is_an_error(make):
    policy = Policy()
    before = vector_of(policy)
    with pytest.raises(ValueError, match="needs a reference"):
        make(reference_loss=0.1).step(policy, batch_for(policy))
    assert torch.equal(vector_of(policy), before)
    assert make(reference_loss=0.0).step(policy, batch_for(policy)).accepted


@pytest.mark.parametrize("name", BY_ADAM)
def test_the_reference_loss_and_budget_count_in_every_rule_by_adam(name):
    distances = {}
    for label, given in {"free": {}, "loss": {"reference_loss": 5.0}, "budget": {"reference_budget": 0.02}}.items():
        reference, policy = Policy(), Policy()
        rule = RULES[name](**given)
        for seed in range(6):
            batch = batch_for(policy, seed=seed, reference=reference)
            batch.advantages = torch.tensor([1.0, 0.3, -0.3, -1.0], dtype=torch.float64)[batch.actions]
            rule.step(policy, batch)
            with torch.no_grad():
                kl = torch.where(MASK, policy.distribution(batch.observations).kl(batch.reference), 0.0)
            distances.setdefault(label, []).append(kl.sum().item() / len(batch))
    assert distances["loss"][-1] < 0.8 * distances["free"][-1]
    assert distances["free"][-1] > 0.04 > 0.021 > max(distances["budget"]) > 0.005


class Bandit(nn.Module):
    """One state, five actions."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(5))

    def distribution(self, observations):
        return Categorical(self.logits.expand(len(observations), 5))


@every_rule
def test_a_bandit_learns_its_best_action(make):
    policy, rule = Bandit(), make()
    worth = torch.tensor([0.0, 0.5, 1.0, 0.2, 0.8])
    generator = torch.Generator().manual_seed(0)
    earned = []
    for _ in range(60):
        with torch.no_grad():
            old = policy.distribution(torch.zeros(64, 1)).detach()
            actions = old.sample(generator)
            probabilities = old.log_probs[0].exp()
        earned.append((probabilities * worth).sum().item())
        advantages = worth[actions] - earned[-1]
        batch = Batch(torch.zeros(64, 1), actions, old, old.log_prob(actions), advantages, mask=None)
        rule.step(policy, batch)
    assert earned[0] == pytest.approx(0.5)
    assert earned[-1] > 0.6 and probabilities.argmax() == 2


@pytest.mark.parametrize("name", BY_ADAM)
def test_a_rule_by_adam_serves_one_policy(name):
    rule, policy, other = RULES[name](), Policy(), Policy(seed=5)
    rule.step(policy, batch_for(policy))
    before = vector_of(policy), vector_of(other)
    with pytest.raises(ValueError, match="make a new rule"):
        rule.step(other, batch_for(other))
    assert torch.equal(vector_of(policy), before[0]) and torch.equal(vector_of(other), before[1])


@pytest.mark.parametrize("name", BY_ADAM)
def test_what_is_frozen_on_the_way_stays_and_what_is_set_free_is_refused(name):
    rule, policy = RULES[name](), Policy()
    rule.step(policy, batch_for(policy))
    policy.net[0].requires_grad_(False)
    before = policy.net[0].weight.clone(), policy.net[2].weight.clone()
    rule.step(policy, batch_for(policy, seed=2))
    assert torch.equal(policy.net[0].weight, before[0]) and not torch.equal(policy.net[2].weight, before[1])
    later = RULES[name]()
    later.step(policy, batch_for(policy))
    policy.net[0].requires_grad_(True)
    with pytest.raises(ValueError, match="make a new rule"):
        later.step(policy, batch_for(policy))


class Failing(Policy):
    """Raises at its n-th pass from now on."""

    left = None

    def distribution(self, observations):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("no room")
        return super().distribution(observations)


@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_an_error_on_the_way_leaves_the_policy_as_it_was(name, passes):
    rule, again, policy, plain = RULES[name](), RULES[name](), Failing(), Policy()
    batch = batch_for(policy)
    before = vector_of(policy)
    policy.left = passes
    try:
        rule.step(policy, batch)
    except MemoryError:
        assert torch.equal(vector_of(policy), before)
        if name == "trpo":  # draws nothing, so that the step is that of a rule that never failed
            policy.left = None
            rule.step(policy, batch)
            again.step(plain, batch)
            assert torch.equal(vector_of(policy), vector_of(plain))
    else:
        assert passes > 1 and name in ("natural_gradient", "trpo", "reinforce")  # over in fewer passes


@every_rule
def test_shapes_that_would_broadcast_are_refused(make):
    policy = Policy("gaussian")
    flat = batch_for(policy).flattened()
    before = vector_of(policy)
    with pytest.raises(ValueError, match="shape"):
        make().step(policy, replace(flat, advantages=flat.advantages.unsqueeze(-1)))
    with pytest.raises(ValueError, match="shape"):
        make().step(policy, replace(flat, actions=flat.actions[:, :1]))
    with pytest.raises(ValueError, match="shape"):
        make().step(policy, replace(flat, mask=torch.ones(len(flat), 1, dtype=torch.bool)))
    assert torch.equal(vector_of(policy), before)


def test_a_batch_without_a_mask_flattens_to_all_of_its_steps():
    batch = batch_for(Policy(), mask=None)
    flat = batch.flattened()
    assert flat.observations.shape == (len(batch) * batch.advantages.shape[1], 3) and flat.mask is None
    assert torch.equal(flat.advantages, batch.advantages.flatten())


def test_settings_that_mean_nothing_are_refused():
    policy = Policy()
    with pytest.raises(ValueError, match="at least 1"):
        TRPO(microbatch_size=0).step(policy, batch_for(policy))
    with pytest.raises(ValueError, match="positive"):
        PPOClip(reference_budget=0.0)


@pytest.mark.parametrize("name", MINIBATCHED)
@pytest.mark.parametrize("setting", ["epochs", "minibatches"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_rule_that_would_do_nothing_is_refused(name, setting, value):
    with pytest.raises(ValueError, match=f"epochs and minibatches must be 1 or more.*{value}"):
        RULES[name](**{setting: value})


def test_a_gradient_whose_squares_do_not_fit_is_clipped_like_any_other():
    steps = []
    for size in (1.0, 1e20):
        policy = Policy("categorical").float()
        batch = batch_for(Policy("categorical"))
        batch = replace(
            batch,
            observations=batch.observations.float(),
            old_log_prob=batch.old_log_prob.float(),
            advantages=(batch.advantages * size).float(),
        )
        start = vector_of(policy)
        report = PPOClip(max_grad_norm=1e-3, epochs=1, minibatches=1).step(policy, batch)
        assert report.accepted
        steps.append((vector_of(policy) - start, report.gradient_norm / size))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-2, atol=1e-7)

"""TRPO as an update rule: the core's step on a batch, with a batch's own mask and reference."""

import copy

import pytest
import torch
from tiny_policies import Policy, batch_for, independent_kl, vector_of

from lm_trust.core import trust_region_step
from lm_trust.updates import TRPO


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_kl": 0.05, "damping": 0.01, "cg_iterations": 4},
        {"fisher_fraction": 0.5, "microbatch_size": 3},
        {"fisher_method": "finite_difference", "backtrack_ratio": 0.5},
        {"preconditioner": "gradient", "cg_iterations": 2},
    ],
)
def test_is_the_cores_step_with_the_rules_settings(settings):
    policy, plain = Policy(), Policy()
    batch = batch_for(policy)
    report = TRPO(**settings).step(policy, batch)
    expected = trust_region_step(
        plain, batch.observations, batch.actions, batch.advantages, mask=batch.mask, **settings
    )
    assert report.metrics.pop("max_kl") == settings.get("max_kl", 0.01)
    assert report == expected
    assert torch.equal(vector_of(policy), vector_of(plain))


def test_every_step_is_within_its_bound_and_measured():
    rule, policy = TRPO(max_kl=0.02), Policy()
    for seed in range(1, 6):
        batch, old = batch_for(policy, seed=seed), copy.deepcopy(policy)
        report = rule.step(policy, batch)
        kl = independent_kl(old, policy, batch)
        assert report.accepted
        assert 0 < kl.mean().item() <= 0.02
        assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-9)
        assert report.step_kl_max == pytest.approx(kl.max().item(), rel=1e-9)


def test_a_reference_and_its_coefficient_enter_the_objective():
    reference = Policy(seed=9)
    policy, free, unused = Policy(), Policy(), Policy()
    batch = batch_for(policy, reference=reference)
    old = copy.deepcopy(policy)
    report = TRPO(reference_loss=0.7).step(policy, batch)
    plain = TRPO().step(free, batch)
    TRPO(reference_loss=0.0).step(unused, batch)
    assert report.accepted
    assert torch.equal(vector_of(unused), vector_of(free))
    distance = {name: independent_kl(p, reference, batch).mean().item() for name, p in (("old", old), ("new", policy))}
    assert distance["new"] < independent_kl(free, reference, batch).mean().item()
    with torch.no_grad():
        log_prob = policy.distribution(batch.observations).log_prob(batch.actions)
    gain = (((log_prob - batch.old_log_prob).exp() - 1) * batch.advantages)[batch.mask].mean().item()
    assert report.surrogate_gain == pytest.approx(gain + 0.7 * (distance["old"] - distance["new"]), rel=1e-9)
    assert report.surrogate_gain != pytest.approx(plain.surrogate_gain, rel=1e-3)


def test_a_strong_reference_loss_is_the_way_back_to_the_reference():
    reference, policy = Policy(seed=9), Policy()
    batch = batch_for(policy, reference=reference)
    before = independent_kl(policy, reference, batch).mean().item()
    rule = TRPO(reference_loss=1000.0, max_kl=0.02)
    for _ in range(10):
        assert rule.step(policy, batch).accepted
    assert independent_kl(policy, reference, batch).mean().item() < 0.5 * before


def test_carries_nothing_of_a_policy_from_step_to_step():
    rule, policy, other = TRPO(), Policy(), Policy()
    rule.step(Policy(seed=5), batch_for(Policy(seed=5), seed=7))
    batch = batch_for(policy)
    rule.step(policy, batch)
    fresh = TRPO()
    fresh.load_state_dict(rule.state_dict())
    fresh.step(other, batch)
    assert torch.equal(vector_of(policy), vector_of(other))


def test_the_next_line_search_starts_where_the_last_one_ended():
    settings = {"max_kl": 0.5, "damping": 0.0, "backtrack_ratio": 0.9}  # a long step overshoots
    rule, policy = TRPO(**settings), Policy()
    first = rule.step(policy, batch_for(policy))
    assert first.accepted and first.backtracks > 0
    saved = rule.state_dict()
    assert saved["first_backtracks"] in (first.backtracks, first.backtracks - 1)
    resumed, same, batch = TRPO(**settings), copy.deepcopy(policy), batch_for(policy, seed=2)
    resumed.load_state_dict(saved)
    one, two = rule.step(policy, batch), resumed.step(same, batch)
    assert one == two and one.backtracks >= saved["first_backtracks"]
    assert torch.equal(vector_of(policy), vector_of(same))


def test_candidates_are_the_passes_of_the_line_search(monkeypatch):
    """The lengths that it does not try, as it starts where the last one ended, cost nothing."""
    rule, policy, passes = TRPO(max_kl=0.5, damping=0.0, backtrack_ratio=0.9), Policy(), []
    forward = policy.distribution
    monkeypatch.setattr(policy, "distribution", lambda x: passes.append(torch.is_grad_enabled()) or forward(x))
    for seed in (1, 2):
        batch = batch_for(policy, seed=seed)
        passes.clear()
        report = rule.step(policy, batch)
        assert report.candidates == passes.count(False) > 0
    assert report.candidates < 1 + report.backtracks


@pytest.mark.parametrize("progress", [0.0, 0.75])
def test_an_annealed_bound_falls_with_the_progress(progress):
    policy, plain = Policy(), Policy()
    batch = batch_for(policy, progress=progress)
    report = TRPO(max_kl=0.04, anneal=True).step(policy, batch)
    expected = TRPO(max_kl=0.04 * (1 - progress)).step(plain, batch)
    assert torch.equal(vector_of(policy), vector_of(plain)) and report == expected
    assert 0 < report.step_kl <= report.metrics["max_kl"] == 0.04 * (1 - progress)

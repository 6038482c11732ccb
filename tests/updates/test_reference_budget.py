"""The budget of the reference KL for the PPO family: multiplier, stop, way back, each against a loop written out."""

import copy

import pytest
import tiny_policies
import torch
from tiny_policies import MASK, B, Policy, T, moved, vector_of
from torch import nn

from lm_trust.updates import TRPO, PPOClip, PPOPenalty
from lm_trust.updates.minibatch_adam import MinibatchAdam
from lm_trust.updates.reference_budget import BAND, ReferenceBudget

RULES = [PPOClip, PPOPenalty]


def batch_for(policy, reference, seed=1):
    """Some actions are better than others, so that a policy keeps going one way."""
    batch = tiny_policies.batch_for(policy, seed=seed, reference=reference)
    batch.advantages = torch.tensor([1.0, 0.3, -0.3, -1.0], dtype=torch.float64)[batch.actions]
    return batch


def divergence(policy, reference, batch):
    """(B, T), differentiable, with nothing of ours; zero where masked."""
    one, two = (each.independent(batch.observations) for each in (policy, reference))
    return torch.where(MASK, torch.distributions.kl_divergence(one, two), 0.0)


def kl_per_row(policy, reference, batch):
    return divergence(policy, reference, batch).sum().item() / B


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_far_off_changes_nothing(rule):
    reference, policy, plain = Policy(), moved(Policy(), 0.2), moved(Policy(), 0.2)
    batch = batch_for(policy, reference)
    report = rule(reference_budget=1e9).step(policy, batch)
    expected = rule().step(plain, batch)
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=0, atol=1e-12)
    assert report.metrics["reference_multiplier"] == 0
    assert report.metrics["reference_kl_after"] == pytest.approx(kl_per_row(policy, reference, batch), rel=1e-12)
    assert report.metrics["gradient_steps"] == expected.metrics["gradient_steps"] == 16
    assert "reference_multiplier" not in expected.metrics


def unit_of(policy, reference, batch):
    """The weight at which the two gradients, written out, are as long as each other."""
    log_prob = policy.independent(batch.observations).log_prob(batch.actions)
    gain = ((log_prob - batch.old_log_prob).exp() * batch.advantages)[MASK].mean()
    kl = divergence(policy, reference, batch)[MASK].mean()
    lengths = [torch.cat([g.flatten() for g in torch.autograd.grad(x, policy.parameters())]).norm() for x in (gain, kl)]
    return (lengths[0] / lengths[1]).item()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("room", [0.1, 0.2, 0.5])
def test_the_multiplier_is_added_to_the_weight_of_the_reference_loss(rule, microbatch_size, room):
    """One gradient step, so that the level is that of the start."""
    reference, policy, plain = Policy(), moved(Policy(), 0.3), moved(Policy(), 0.3)
    batch = batch_for(policy, reference)
    budget = kl_per_row(policy, reference, batch) / (1 - room)
    once = {"epochs": 1, "minibatches": 1, "learning_rate": 1e-4}
    multiplier = unit_of(policy, reference, batch) * max(0.0, 1 - room / BAND)
    report = rule(reference_budget=budget, microbatch_size=microbatch_size, **once).step(policy, batch)
    rule(reference_loss=multiplier, **once).step(plain, batch)
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=0, atol=1e-9)
    assert report.metrics["reference_multiplier"] == pytest.approx(multiplier, rel=1e-9)


def test_at_the_bound_a_step_does_not_raise_the_kl_to_first_order():
    reference = Policy()
    for seed in range(5):
        policy = moved(reference, 0.4, seed)
        batch = batch_for(policy, reference, seed)
        # Advantages that pay for nothing but the distance: the surrogate's gradient is then along the KL's.
        batch.advantages = (batch.old.log_prob(batch.actions) - batch.reference.log_prob(batch.actions)).detach()
        kl = divergence(policy, reference, batch)[MASK].mean()
        outwards = torch.cat([g.flatten() for g in torch.autograd.grad(kl, policy.parameters())])
        budget = ReferenceBudget(1.0, 0.0)
        budget.begin(1.0, unit_of(policy, reference, batch))
        log_prob = policy.independent(batch.observations).log_prob(batch.actions)
        gain = ((log_prob - batch.old_log_prob).exp() * batch.advantages)[MASK].mean()
        upwards = torch.cat([g.flatten() for g in torch.autograd.grad(gain, policy.parameters())])
        assert upwards @ outwards > 0
        assert (upwards - budget.multiplier * outwards) @ outwards < 1e-9


def adam_to_the_edge(policy, reference, batch, *, steps, learning_rate, budget, inwards=False):
    """Full-batch Adam on the surrogate, or on the KL alone; ends before a gradient is taken over the budget."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, eps=1e-5)
    taken = 0
    for _ in range(steps):
        kl = divergence(policy, reference, batch)
        if not inwards and kl.sum().item() / B > budget:
            break
        log_prob = policy.independent(batch.observations).log_prob(batch.actions)
        gain = (log_prob - batch.old_log_prob).exp() * batch.advantages
        loss = kl[MASK].mean() if inwards else -gain[MASK].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken += 1
    return taken


ADAM = {"learning_rate": 0.02, "minibatches": 1, "epochs": 30, "max_grad_norm": None}


def test_the_epochs_end_at_the_budget_and_the_rest_is_scaled_back():
    reference, policy, plain = Policy(), Policy(), Policy()
    batch = batch_for(policy, reference)
    rule = PPOClip(clip=0.99, clip_high=1e6, reference_budget=0.1, **ADAM)
    report = rule.step(policy, batch)
    taken = adam_to_the_edge(plain, reference, batch, steps=30, learning_rate=0.02, budget=0.1)
    assert report.metrics["gradient_steps"] == taken < 30
    over = kl_per_row(plain, reference, batch)
    assert over > 0.1 >= kl_per_row(policy, reference, batch) > 0.05
    start, end = vector_of(reference), vector_of(plain)
    assert 0 < report.step_fraction < 1 and report.step_fraction == 0.8**report.backtracks
    expected = start + report.step_fraction * (end - start)
    torch.testing.assert_close(vector_of(policy), expected, rtol=0, atol=1e-6)
    # One backtrack less would have been over.
    longer = copy.deepcopy(policy)
    nn.utils.vector_to_parameters(start + report.step_fraction / 0.8 * (end - start), longer.parameters())
    assert kl_per_row(longer, reference, batch) > 0.1
    assert report.metrics["reference_kl_after"] == pytest.approx(kl_per_row(policy, reference, batch), rel=1e-9)
    assert over > 0.1


def test_from_over_the_budget_the_kl_alone_is_lowered():
    reference = Policy()
    policy, plain = moved(reference, 0.5), moved(reference, 0.5)
    batch = batch_for(policy, reference)
    before = kl_per_row(policy, reference, batch)
    rule = PPOClip(reference_budget=before / 10, **(ADAM | {"epochs": 3}))
    report = rule.step(policy, batch)
    adam_to_the_edge(plain, reference, batch, steps=3, learning_rate=0.02, budget=0.0, inwards=True)
    assert kl_per_row(policy, reference, batch) > before / 10
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=0, atol=1e-6)
    assert report.accepted and report.metrics["gradient_steps"] == 3


@pytest.mark.parametrize("rule", RULES)
def test_once_back_within_the_budget_the_surrogate_counts_again(rule):
    reference = Policy()
    policy, lowered = moved(reference, 0.4), moved(reference, 0.4)
    batch = batch_for(policy, reference)
    before = kl_per_row(policy, reference, batch)
    assert rule(reference_budget=0.8 * before, **ADAM).step(policy, batch).accepted
    adam_to_the_edge(lowered, reference, batch, steps=30, learning_rate=0.02, budget=0.0, inwards=True)
    after = kl_per_row(policy, reference, batch)
    assert kl_per_row(lowered, reference, batch) < 0.1 * before
    assert 0.25 * before < after < before


@pytest.mark.parametrize("rule", RULES)
def test_a_way_back_that_goes_too_far_is_shortened_to_the_budget(rule):
    reference = Policy()
    policy = moved(reference, 0.5)
    batch = batch_for(policy, reference)
    budget = 0.9 * kl_per_row(policy, reference, batch)
    update = rule(reference_budget=budget, **(ADAM | {"learning_rate": 0.3, "epochs": 1, "minibatches": 1}))
    report = update.step(policy, batch)
    whole = moved(reference, 0.5)  # the same single step of Adam, not shortened
    adam_to_the_edge(whole, reference, batch, steps=1, learning_rate=0.3, budget=0.0, inwards=True)
    assert report.accepted and report.step_fraction < 0.5
    after = kl_per_row(policy, reference, batch)
    assert 0.9 * budget < after <= budget
    assert after == pytest.approx(report.metrics["reference_kl_after"], rel=1e-9)
    begin = vector_of(moved(reference, 0.5))
    step = vector_of(whole) - begin
    torch.testing.assert_close(vector_of(policy), begin + report.step_fraction * step, rtol=0, atol=1e-6)
    if rule is PPOClip:  # the gradients of the way back are not what the next steps are measured by
        assert not update.state_dict()["optimizer"]["state"]


def test_the_multiplier_grows_as_the_room_goes():
    reference = Policy()
    batch = batch_for(reference, reference)
    budget = ReferenceBudget(2.0, 0.0)
    budget.begin(1.0, 3.0)
    rows, seen = len(batch), []
    steps = batch.mask.sum().item() / rows
    for level in (1.0, 1.5, 1.75, 2.0, 1.9, 0.5):
        budget.go_on(batch, len(batch), [(level - 1.0) / steps])
        seen.append(budget.multiplier)
    assert seen == pytest.approx([0.0, 0.0, 1.5, 3.0, 2.4, 0.0])
    # Each gradient is taken with the multiplier of the level before it.
    assert budget.mean_multiplier == pytest.approx((0.0 + 0.0 + 0.0 + 1.5 + 3.0 + 2.4) / 6)


def test_the_level_is_the_whole_batchs_and_only_the_change_a_minibatchs():
    reference = Policy()
    policy = moved(reference, 0.4)
    batch = batch_for(policy, reference)
    rows = divergence(policy, reference, batch).sum(-1)
    level = rows.mean().item()
    high = batch[rows.argsort(descending=True)[:3]]
    steps = high.mask.sum().item() / 3
    budget = ReferenceBudget(1.1 * level, 0.0)
    budget.begin(level)
    assert rows.sort(descending=True).values[:3].mean() > 1.5 * level
    assert budget.go_on(high, len(high), [0.0])
    assert budget.go_on(high, len(high), [0.09 * level / steps]) and not budget.go_on(
        high, len(high), [0.11 * level / steps]
    )
    # The change itself: of the new policy against the one that sampled.
    further = moved(policy, 0.2, seed=4)
    new = further.distribution(high.observations)
    _, change = budget.weigh(torch.zeros(3, T, dtype=torch.float64), new, budget.fixed(high))
    order = rows.argsort(descending=True)[:3]
    expected = (divergence(further, reference, batch) - divergence(policy, reference, batch))[order]
    torch.testing.assert_close(torch.where(high.mask, change, 0.0), expected)


@pytest.mark.parametrize("budget", [0.05, 0.3])
@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_updates_on_end_keep_the_budget(rule, minibatches, budget):
    reference = Policy()
    policy, free = Policy(), Policy()
    settings = {"learning_rate": 0.02, "epochs": 4, "minibatches": minibatches}
    constrained, plain = rule(reference_budget=budget, **settings), rule(**settings)
    values, gains, refused = [], [], 0
    for seed in range(15):
        batch = batch_for(policy, reference, seed)
        before = kl_per_row(policy, reference, batch)
        report = constrained.step(policy, batch)
        values.append(kl_per_row(policy, reference, batch))
        assert values[-1] <= budget or values[-1] < before or not report.accepted
        refused += not report.accepted
        assert report.metrics["reference_kl_after"] == pytest.approx(values[-1], rel=1e-9)
        gains.append(report.surrogate_gain)
        plain.step(free, batch_for(free, reference, seed))
    assert max(values) > 0.7 * budget
    assert kl_per_row(free, reference, batch) > 2 * budget
    assert sum(gains) > 0 and refused <= 2


def test_a_move_that_only_leads_away_is_undone():
    reference = Policy()
    policy = moved(reference, 0.4)
    batch = batch_for(policy, reference)
    adam = MinibatchAdam(learning_rate=0.01, anneal=False, epochs=2, minibatches=1, max_grad_norm=None, seed=0)
    budget = ReferenceBudget(0.5 * kl_per_row(policy, reference, batch), 0.0)

    def outwards(minibatch, rows):
        policy.zero_grad()
        (-divergence(policy, reference, batch).sum()).backward()
        return True

    # Once within reach, so that there are moments to be restored.
    adam.step(policy, batch, outwards, reference=ReferenceBudget(None, 0.0))
    start, moments = vector_of(policy), copy.deepcopy(adam.state_dict()["optimizer"]["state"])
    batch = batch_for(policy, reference)
    report = adam.step(policy, batch, outwards, reference=budget)
    assert not report.accepted and report.reason == "budget_exceeded"
    assert (report.step_kl, report.surrogate_gain) == (0.0, 0.0)
    assert torch.equal(vector_of(policy), start)
    assert report.metrics["reference_kl_after"] == pytest.approx(kl_per_row(policy, reference, batch), rel=1e-12)
    for index, state in adam.state_dict()["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, moments[index][key])


@pytest.mark.parametrize("rule", RULES)
def test_continues_where_it_stopped(rule):
    reference = Policy()
    policy, other = Policy(), Policy()
    settings = {"reference_budget": 0.05, "learning_rate": 0.02}
    first = rule(**settings)
    for seed in range(4):
        first.step(policy, batch_for(policy, reference, seed))
    other.load_state_dict(policy.state_dict())
    second = rule(**settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(4, 7):
        one = first.step(policy, batch_for(policy, reference, seed))
        two = second.step(other, batch_for(other, reference, seed))
        assert one == two
    assert torch.equal(vector_of(policy), vector_of(other))


@pytest.mark.parametrize("rule", [*RULES, TRPO])
def test_a_budget_needs_a_reference(rule):
    policy = Policy()
    batch = batch_for(policy, policy)
    batch.reference = None
    with pytest.raises(ValueError, match="needs a reference"):
        rule(reference_budget=1.0).step(policy, batch)


def test_trpo_hands_the_budget_on():
    reference = Policy()
    policy = moved(reference, 0.4)
    batch = batch_for(policy, reference)
    before = kl_per_row(policy, reference, batch)
    report = TRPO(reference_budget=0.9 * before).step(policy, batch)
    assert report.accepted and report.metrics["constraint"] in ("active", "recovery")
    assert kl_per_row(policy, reference, batch) < before

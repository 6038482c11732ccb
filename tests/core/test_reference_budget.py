"""The trust-region step under a budget of the reference KL: gradient, step and acceptance, each by another route."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny_policies import D, Policy, moved, vector_of

from lm_trust.core import conjugate_gradient, trust_region_step
from lm_trust.core import trust_region as module
from lm_trust.core.budget import step_within_budget
from lm_trust.core.objective import SurrogateObjective
from lm_trust.core.parameters import assign, trainable_parameters

B, T = 8, 4
LENGTHS = torch.tensor([4, 1, 3, 2, 4, 4, 0, 2])
MASK = torch.arange(T) < LENGTHS.unsqueeze(-1)
STEPS_PER_ROW = LENGTHS.sum().item() / B


def experience(policy, reference, seed=1):
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        actions = policy.distribution(observations).sample(generator=generator)
        fixed = reference.distribution(observations).detach()
    # Some actions are better than others, so that a policy keeps going one way, and noise.
    noise = torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, 0.3, -0.3, -1.0], dtype=torch.float64)[actions] + 0.3 * noise
    return (observations, actions, advantages), {"mask": MASK, "reference": fixed}


@torch.no_grad()
def kl_per_row(policy, reference, observations):
    """Sum over a row's valid steps, mean over rows, with nothing of ours."""
    one, two = (each.independent(observations) for each in (policy, reference))
    return (torch.distributions.kl_divergence(one, two) * MASK).sum().item() / B


def take(policy, given, settings, **more):
    return trust_region_step(policy, *given, **settings, **more)


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("reference_loss", [0.0, 0.4])
def test_the_reference_kl_and_its_gradient_are_those_of_finite_differences(microbatch_size, reference_loss):
    policy = Policy()
    reference = moved(policy, 0.4)
    (observations, *rest), settings = experience(policy, reference)
    settings |= {"reference_loss": reference_loss, "microbatch_size": microbatch_size}
    parameters = trainable_parameters(policy)
    objective = SurrogateObjective(policy, observations, *rest, **settings, bounded=True)
    gradient = objective.gradient(parameters)
    assert objective.reference_kl == pytest.approx(kl_per_row(policy, reference, observations), rel=1e-12)
    assert objective.steps_per_row == STEPS_PER_ROW
    # A bound on top leaves the objective's own gradient as it was, to the last bit.
    alone = SurrogateObjective(policy, observations, *rest, **settings)
    assert torch.equal(alone.gradient(parameters), gradient)
    assert alone.reference_gradient is None

    theta, spacing, expected = vector_of(policy), 1e-6, []
    for index in range(len(theta)):
        ends = []
        for sign in (1, -1):
            shifted = theta.clone()
            shifted[index] += sign * spacing
            assign(parameters, shifted)
            ends.append(kl_per_row(policy, reference, observations))
            assert objective.measure().reference_kl == pytest.approx(ends[-1], rel=1e-12)
        expected.append((ends[0] - ends[1]) / (2 * spacing))
    found = objective.reference_gradient
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"reference_loss": 0.3}, {"fisher_fraction": 0.5, "microbatch_size": 3}])
def test_a_budget_far_off_changes_no_bit(settings):
    policy, plain = Policy(), Policy()
    given, common = experience(policy, moved(policy, 0.3))
    report = take(policy, given, common, reference_budget=1e9, **settings)
    expected = take(plain, given, common, **settings)
    assert report.accepted and torch.equal(vector_of(policy), vector_of(plain))
    assert report.metrics.pop("constraint") == "inactive"
    assert report.metrics.pop("reference_kl_after") > 0
    expected.metrics.pop("reference_kl_after", None)
    assert report == expected


def dense(policy, reference, given):
    """Fisher, gradient of the surrogate, gradient of the reference KL per row: dense, by autograd alone."""
    observations, actions, advantages = given
    named = dict(policy.named_parameters())
    theta = vector_of(policy)

    def at(vector):
        pieces = vector.split([parameter.numel() for parameter in named.values()])
        weights = {name: piece.view(named[name].shape) for name, piece in zip(named, pieces, strict=True)}
        logits = torch.func.functional_call(
            policy.net, {k.removeprefix("net."): x for k, x in weights.items()}, observations
        )
        return torch.distributions.Categorical(logits=logits)

    old, fixed = at(theta), torch.distributions.Categorical(logits=reference.net(observations).detach())
    divergence = torch.distributions.kl_divergence
    fisher = torch.autograd.functional.hessian(lambda x: divergence(old, at(x))[MASK].mean(), theta)
    gain = torch.autograd.functional.jacobian(
        lambda x: ((at(x).log_prob(actions) - old.log_prob(actions)).exp() * advantages)[MASK].mean(), theta
    )
    cost = torch.autograd.functional.jacobian(lambda x: divergence(at(x), fixed)[MASK].sum() / B, theta)
    return fisher.numpy(), gain.numpy(), cost.numpy()


def two_constraint_optimum(fisher, gain, cost, slack, max_kl):
    """By a general solver, where the Fisher has rank: coordinates y with x = basis @ y and x'Fx / 2 = max_kl |y|^2."""
    values, vectors = np.linalg.eigh(fisher)
    kept = values > 1e-10 * values.max()
    basis = vectors[:, kept] * np.sqrt(2 * max_kl / values[kept])
    ball = {"type": "ineq", "fun": lambda y: 1 - y @ y, "jac": lambda y: -2 * y}
    g, b = gain @ basis, cost @ basis
    linear = {"type": "ineq", "fun": lambda y: -(slack + b @ y), "jac": lambda y: -b}
    start = -0.5 * b / np.linalg.norm(b)
    g_size = np.linalg.norm(g)
    found = minimize(
        lambda y: -g @ y / g_size,
        start,
        jac=lambda y: -g / g_size,
        method="SLSQP",
        constraints=[ball, linear],
        options={"ftol": 1e-16, "maxiter": 2000},
    )
    feasible = slack + b @ found.x < 1e-7 and found.x @ found.x < 1 + 1e-7
    return basis @ (found.x if feasible else -b / np.linalg.norm(b))


MAX_KL = 1e-5
# The room in the linear model, as a share of what the reference KL may change by in one step.
ROOMS = {"inactive": 1.5, "active": 0.1, "active from over it": -0.5, "recovery": -1.5}


@pytest.mark.parametrize("case", ROOMS)
def test_the_whole_step_is_the_optimum_of_dense_algebra(case):
    policy = Policy()
    reference = moved(policy, 0.3, seed=11)  # one that the surrogate's gradient leads away from
    given, settings = experience(policy, reference)
    before = kl_per_row(policy, reference, given[0])
    fisher, gain, cost = dense(policy, reference, given)
    room = ROOMS[case] * math.sqrt(2 * MAX_KL * cost @ np.linalg.pinv(fisher, rcond=1e-10) @ cost)
    budget = before + room + MAX_KL * STEPS_PER_ROW  # the last: what the curvature of the reference KL takes
    expected = two_constraint_optimum(fisher, gain, cost, -room, MAX_KL)
    start = vector_of(policy)
    exact = {"max_kl": MAX_KL, "damping": 0.0, "cg_iterations": 200, "cg_tolerance": 1e-14}
    report = take(policy, given, settings, reference_budget=budget, **exact)
    assert report.accepted and report.metrics["constraint"] == case.split()[0]
    step = (vector_of(policy) - start).numpy() / report.step_fraction
    np.testing.assert_allclose(step, expected, atol=2e-3 * np.abs(expected).max())
    after = kl_per_row(policy, reference, given[0])
    assert report.metrics["reference_kl_after"] == pytest.approx(after, rel=1e-12)
    assert after <= budget if room > 0 else after < before
    assert report.predicted_gain == pytest.approx(report.step_fraction * gain @ expected, rel=1e-2)
    plain = take(Policy(), given, settings, **exact)
    assert (report.cg_iterations > plain.cg_iterations) == (case != "inactive")  # the second solve is counted


# Reference KL, its slope, and what follows for a budget of 1, a step KL of 0.01 and 10 steps a row: a slope of s is
# worth sqrt(0.02) s in one step, whose curvature takes 0.1.
ACCEPTANCE = {
    "inactive": (0.5, 1.0, 1.0, True),
    "active": (0.99, 1.0, 1.0, True),
    "active, over it": (1.01, 2.0, 1.01, False),
    "recovery": (1.5, 2.0, 1.5, False),
    "recovery, though within": (0.99, 0.1, 0.99, False),
}


@pytest.mark.parametrize("case", ACCEPTANCE)
def test_what_the_line_search_may_accept(case):
    reference_kl, slope, limit, needs_gain = ACCEPTANCE[case]
    gradient = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    objective = SimpleNamespace(
        reference_kl=reference_kl,
        reference_gradient=torch.tensor([slope, 0.0, 0.0], dtype=torch.float64),
        steps_per_row=10,
    )

    def solve(right_hand_side):
        return conjugate_gradient(lambda v: v, right_hand_side)

    found = step_within_budget(objective, gradient, solve(gradient), solve, max_kl=0.01, budget=1.0)
    assert found.case == case.split(",")[0]
    assert found.needs_gain == needs_gain
    assert found.limit == limit if needs_gain else limit - 1e-9 < found.limit < limit


@pytest.mark.parametrize("settings", [{}, {"cg_iterations": 2, "damping": 0.3, "fisher_fraction": 0.5}])
@pytest.mark.parametrize("budget", [0.02, 0.2, 0.5])
def test_steps_on_end_keep_the_budget_from_the_reference_on(budget, settings):
    policy, reference = Policy(), Policy()
    free = Policy()
    values, gains = [], []
    for seed in range(16):
        given, common = experience(policy, reference, seed)
        before = kl_per_row(policy, reference, given[0])
        report = take(policy, given, common, reference_budget=budget, max_kl=0.02, **settings)
        values.append(kl_per_row(policy, reference, given[0]))
        assert values[-1] <= max(budget, before)
        assert report.step_kl <= 0.02
        if before <= budget and report.accepted and report.metrics["constraint"] != "recovery":
            assert report.surrogate_gain > 0
            gains.append(report.surrogate_gain)
        given, common = experience(free, reference, seed)
        take(free, given, common, max_kl=0.02, **settings)
    assert len(gains) >= 3
    assert max(values) > 0.6 * budget  # the budget is used ...
    assert kl_per_row(free, reference, given[0]) > 1.5 * budget  # ... and needed


@pytest.mark.parametrize("seed", range(6))
def test_what_rounding_leaves_at_the_reference_is_no_slope(seed, monkeypatch):
    """A budget that max_kl could spend at once: all of the room is the step's, and a KL of 1e-13 is no excess."""
    reference = Policy()
    policy = moved(reference, 1e-6)
    given, settings = experience(policy, reference, seed)
    assert 0 < kl_per_row(policy, reference, given[0]) < 1e-10
    report = take(policy, given, settings, reference_budget=0.02, max_kl=0.02)
    assert report.accepted and report.metrics["constraint"] == "inactive" and report.surrogate_gain > 0
    assert 0.005 < kl_per_row(policy, reference, given[0]) <= 0.02


def test_a_policy_over_the_budget_comes_back_whatever_the_surrogate_does():
    reference = Policy()
    policy = moved(reference, 1.2)
    cases, values = [], []
    for _ in range(40):
        given, common = experience(policy, reference, 1)
        values.append(kl_per_row(policy, reference, given[0]))
        if values[-1] <= 0.2:
            break
        report = take(policy, given, common, reference_budget=0.2, max_kl=0.02)
        assert report.accepted
        assert report.metrics["reference_kl_after"] < values[-1]
        cases.append(report.metrics["constraint"])
    assert values[0] > 1 and values[-1] <= 0.2
    assert cases[0] == "recovery" and cases[-1] == "active"


def test_a_candidate_over_the_budget_is_refused_and_leaves_no_trace(monkeypatch):
    policy = Policy()
    reference = moved(policy, 0.3)
    given, settings = experience(policy, reference)
    before = kl_per_row(policy, reference, given[0])
    wrong = module.step_within_budget

    def outwards(*arguments, **more):
        """The right limits, and a step that leads straight away from the reference."""
        found = wrong(*arguments, **more)
        objective = arguments[0]
        return replace(found, step=0.05 * objective.reference_gradient / objective.reference_gradient.norm())

    monkeypatch.setattr(module, "step_within_budget", outwards)
    start = vector_of(policy)
    report = take(policy, given, settings, reference_budget=before, max_kl=0.02, max_backtracks=2)
    assert not report.accepted and report.reason == "budget_exceeded" and report.backtracks == 2
    assert torch.equal(vector_of(policy), start)
    assert report.metrics["reference_kl_after"] == pytest.approx(before, rel=1e-12)


def test_a_reference_kl_that_is_not_finite_rejects_the_step():
    policy = Policy()
    given, settings = experience(policy, Policy(seed=5))
    settings["reference"].logits[0, 0, 1] = -math.inf
    start = vector_of(policy)
    report = take(policy, given, settings, reference_budget=1.0)
    assert not report.accepted and report.reason == "non_finite"
    assert torch.equal(vector_of(policy), start)


def test_a_budget_needs_a_reference():
    policy = Policy()
    given, settings = experience(policy, policy)
    with pytest.raises(ValueError, match="needs a reference"):
        take(policy, given, settings | {"reference": None}, reference_budget=1.0)


def test_rows_of_single_steps():
    """A flat batch: a row is a step, and the budget is per step."""
    policy = Policy()
    reference = moved(policy, 0.3)
    (observations, actions, advantages), settings = experience(policy, reference)
    flat = (observations[MASK], actions[MASK], advantages[MASK])
    before = kl_per_row(policy, reference, observations) / STEPS_PER_ROW
    objective = SurrogateObjective(policy, *flat, reference=settings["reference"][MASK], bounded=True)
    objective.gradient(trainable_parameters(policy))
    assert objective.reference_kl == pytest.approx(before, rel=1e-12)
    report = trust_region_step(policy, *flat, reference=settings["reference"][MASK], reference_budget=before)
    assert report.accepted and report.metrics["reference_kl_after"] <= before

"""Distributions against torch.distributions, worked figures, sampling and automatic second derivatives."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch

from lm_trust.core import Categorical, DiagonalGaussian, MultiCategorical, kl_estimators, trust_region_step

B, T, V, A = 3, 4, 5, 2
SIZES = (2, 4, 1, 3)
COMBINATIONS = list(itertools.product(*map(range, SIZES)))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_categoricals(*lead):
    return normal(*lead, V, seed=1) * 1.5, normal(*lead, V, seed=2) * 1.5


def two_multi_categoricals(*lead):
    return normal(*lead, sum(SIZES), seed=1) * 1.5, normal(*lead, sum(SIZES), seed=2) * 1.5


def joint(logits):
    """One categorical over all combinations of the dimensions' actions, in the order of COMBINATIONS."""
    parts = logits.split(SIZES, dim=-1)
    combined = [sum(part[..., index] for part, index in zip(parts, each, strict=True)) for each in COMBINATIONS]
    return torch.distributions.Categorical(logits=torch.stack(combined, dim=-1))


def two_gaussians(*lead):
    return (
        (normal(*lead, A, seed=3), 0.5 * normal(*lead, A, seed=4)),
        (normal(*lead, A, seed=5), 0.5 * normal(*lead, A, seed=6)),
    )


def reference_gaussian(mean, log_std):
    return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize("lead", [(B, T), (7,)])
def test_categorical_agrees_with_torch(lead):
    logits, other = two_categoricals(*lead)
    ours, theirs = Categorical(logits), torch.distributions.Categorical(logits=logits)
    actions = theirs.sample()
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), rtol=1e-12, atol=1e-12)
    expected = torch.distributions.kl_divergence(theirs, torch.distributions.Categorical(logits=other))
    torch.testing.assert_close(ours.kl(Categorical(other)), expected, rtol=1e-12, atol=1e-12)
    assert ours.log_prob(actions).shape == ours.entropy().shape == ours.kl(Categorical(other)).shape == lead
    assert ours.sample().shape == ours.mode().shape == lead


@pytest.mark.parametrize("lead", [(B, T), (7,)])
def test_multi_categorical_is_the_joint_distribution_of_independent_choices(lead):
    logits, other = two_multi_categoricals(*lead)
    ours, theirs = MultiCategorical(logits, SIZES), joint(logits)
    index = theirs.sample()
    actions = torch.tensor(COMBINATIONS)[index]
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(index), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), rtol=1e-12, atol=1e-12)
    expected = torch.distributions.kl_divergence(theirs, joint(other))
    torch.testing.assert_close(ours.kl(MultiCategorical(other, SIZES)), expected, rtol=1e-12, atol=1e-12)
    likeliest = torch.tensor(COMBINATIONS)[theirs.logits.argmax(-1)]
    assert torch.equal(ours.mode(), likeliest)
    assert ours.log_prob(actions).shape == ours.entropy().shape == lead
    assert ours.sample().shape == (*lead, len(SIZES))


def test_multi_categorical_of_one_dimension_is_the_categorical():
    logits, tangent = normal(B, T, V), normal(B, T, V, seed=2)
    ours, single = MultiCategorical(logits, [V]), Categorical(logits)
    actions = single.sample(torch.Generator().manual_seed(1))
    assert torch.equal(ours.sample(torch.Generator().manual_seed(1)), actions.unsqueeze(-1))
    assert torch.equal(ours.log_prob(actions.unsqueeze(-1)), single.log_prob(actions))
    assert torch.equal(ours.fisher_product(tangent), single.fisher_product(tangent))


def test_multi_categorical_refuses_what_does_not_fit():
    logits = normal(B, T, 5)
    with pytest.raises(RuntimeError, match="split_sizes"):
        MultiCategorical(logits, [2, 2])
    with pytest.raises(ValueError, match="longer"):
        MultiCategorical(logits, [2, 3]).log_prob(torch.zeros(B, T, 3))


@pytest.mark.parametrize("lead", [(B, T), (7,)])
def test_gaussian_agrees_with_torch_summed_over_action_dimensions(lead):
    (mean, log_std), (other_mean, other_log_std) = two_gaussians(*lead)
    ours, theirs = DiagonalGaussian(mean, log_std), reference_gaussian(mean, log_std)
    actions = normal(*lead, A, seed=9)
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), rtol=1e-12, atol=1e-12)
    other = DiagonalGaussian(other_mean, other_log_std)
    expected = torch.distributions.kl_divergence(theirs, reference_gaussian(other_mean, other_log_std))
    torch.testing.assert_close(ours.kl(other), expected, rtol=1e-12, atol=1e-12)
    assert ours.log_prob(actions).shape == ours.entropy().shape == ours.kl(other).shape == lead
    assert ours.sample().shape == ours.mode().shape == (*lead, A)
    assert torch.equal(ours.mode(), mean)


def test_a_gaussian_kl_grows_with_the_number_of_action_dimensions():
    """Averaged over dimensions, not summed, one bound would mean something else for each environment."""
    for dimensions in (1, 3, 6):
        zeros = torch.zeros(1, 1, dimensions, dtype=torch.float64)
        moved = DiagonalGaussian(zeros + 0.2, zeros)
        assert DiagonalGaussian(zeros, zeros).kl(moved).item() == pytest.approx(dimensions * 0.02)


def test_a_gaussian_log_std_may_be_shared_by_all_states():
    (mean, _), (other_mean, _) = two_gaussians(B, T)
    log_std, other_log_std = normal(A, seed=7), normal(A, seed=8)
    ours, other = DiagonalGaussian(mean, log_std), DiagonalGaussian(other_mean, other_log_std)
    theirs = reference_gaussian(mean, log_std.expand_as(mean))
    actions = normal(B, T, A, seed=9)
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), rtol=1e-12, atol=1e-12)
    assert ours.entropy().shape == (B, T)
    expected = torch.distributions.kl_divergence(theirs, reference_gaussian(other_mean, other_log_std.expand_as(mean)))
    torch.testing.assert_close(ours.kl(other), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("new", "nats"), [((0.65, 0.35), 0.0056), ((0.2, 0.8), 0.583)])
def test_worked_categorical_kl(new, nats):
    old = torch.tensor([0.7, 0.3], dtype=torch.float64)
    moved = torch.tensor(new, dtype=torch.float64)
    measured = Categorical(old.log()).kl(Categorical(moved.log())).item()
    assert measured == pytest.approx(nats, rel=0.01)
    by_hand = 0.7 * math.log(0.7 / new[0]) + 0.3 * math.log(0.3 / new[1])
    assert measured == pytest.approx(by_hand, rel=1e-12)


def test_kl_is_taken_under_the_first_distribution():
    """KL(self || other): the two directions differ here by far more than any tolerance."""
    wide, narrow = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.95, 0.05]).double()
    forward = Categorical(wide.log()).kl(Categorical(narrow.log())).item()
    backward = Categorical(narrow.log()).kl(Categorical(wide.log())).item()
    assert forward == pytest.approx(0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(0.5 / 0.05))
    assert abs(forward - backward) > 0.3

    zero, wider = torch.zeros(1).double(), torch.full((1,), math.log(2.0)).double()
    forward = DiagonalGaussian(zero, zero).kl(DiagonalGaussian(zero, wider)).item()
    assert forward == pytest.approx(math.log(2.0) + 1 / 8 - 1 / 2)
    backward = DiagonalGaussian(zero, wider).kl(DiagonalGaussian(zero, zero)).item()
    assert backward == pytest.approx(-math.log(2.0) + 2 - 1 / 2)


def test_kl_and_entropy_by_monte_carlo():
    count = 200_000
    logits, other = (x[0, 0] for x in two_categoricals(1, 1))
    several, other_several = (x[0, 0].expand(count, -1) for x in two_multi_categoricals(1, 1))
    (mean, log_std), (other_mean, other_log_std) = two_gaussians()
    pairs = [
        (MultiCategorical(several, SIZES), MultiCategorical(other_several, SIZES)),
        (Categorical(logits.expand(count, V)), Categorical(other.expand(count, V))),
        (
            DiagonalGaussian(mean.expand(count, A), log_std),
            DiagonalGaussian(other_mean.expand(count, A), other_log_std),
        ),
    ]
    for old, new in pairs:
        actions = old.sample(generator=torch.Generator().manual_seed(0))
        old_log_prob, new_log_prob = old.log_prob(actions), new.log_prob(actions)
        for samples, exact in [(old_log_prob - new_log_prob, old.kl(new)), (-old_log_prob, old.entropy())]:
            standard_error = samples.std() / math.sqrt(count)
            assert abs(samples.mean() - exact[0]) < 5 * standard_error


def test_samples_follow_the_probabilities():
    count = 100_000
    logits = normal(V, seed=1)
    draws = Categorical(logits.expand(count, V)).sample(generator=torch.Generator().manual_seed(1))
    frequency = torch.bincount(draws, minlength=V).double() / count
    torch.testing.assert_close(frequency, logits.softmax(-1), rtol=0, atol=0.01)
    several = normal(sum(SIZES), seed=1)
    draws = MultiCategorical(several.expand(count, -1), SIZES).sample(generator=torch.Generator().manual_seed(1))
    counted = Counter(map(tuple, draws.tolist()))
    frequency = torch.tensor([counted[each] / count for each in COMBINATIONS], dtype=torch.float64)
    torch.testing.assert_close(frequency, joint(several).probs, rtol=0, atol=0.005)
    mean, log_std = normal(A, seed=3), 0.5 * normal(A, seed=4)
    gaussian = DiagonalGaussian(mean.expand(count, A), log_std.expand(count, A))
    draws = gaussian.sample(generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(draws.std(0), log_std.exp(), rtol=0.02, atol=0)


def test_a_given_generator_makes_sampling_repeatable_and_the_global_one_is_not_touched():
    for distribution in (
        Categorical(normal(B, T, V)),
        MultiCategorical(normal(B, T, sum(SIZES)), SIZES),
        DiagonalGaussian(normal(B, T, A), normal(B, T, A, seed=1)),
    ):
        before = torch.get_rng_state()
        first = distribution.sample(generator=torch.Generator().manual_seed(5))
        second = distribution.sample(generator=torch.Generator().manual_seed(5))
        assert torch.equal(first, second)
        assert torch.equal(before, torch.get_rng_state())
        assert not torch.equal(first, distribution.sample(generator=torch.Generator().manual_seed(6)))


def test_samples_carry_no_gradient():
    mean = normal(B, T, A).requires_grad_()
    assert not DiagonalGaussian(mean, torch.zeros_like(mean)).sample().requires_grad


def test_categorical_mode_is_the_likeliest_action():
    one = Categorical(normal(B, T, V))
    every = torch.stack([one.log_prob(torch.full((B, T), action)) for action in range(V)])
    assert torch.equal(one.log_prob(one.mode()), every.amax(0))


def test_adding_a_constant_to_the_logits_changes_nothing():
    logits, other = two_categoricals(B, T)
    base, shifted = Categorical(logits), Categorical(logits + 100.0)
    torch.testing.assert_close(shifted.entropy(), base.entropy(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        shifted.kl(Categorical(other - 50.0)), base.kl(Categorical(other)), rtol=1e-9, atol=1e-12
    )
    assert base.kl(shifted).abs().max() < 1e-12
    tangent = normal(B, T, V, seed=5)
    torch.testing.assert_close(base.fisher_product(tangent + 3.0), base.fisher_product(tangent), rtol=1e-9, atol=1e-12)


def test_minus_infinity_logits_stay_finite_in_value_and_gradient():
    """A forbidden action has p = 0: 0 log 0 is 0, and its gradient is 0, not NaN."""
    logits, other = two_categoricals(B, T)
    logits[..., 2] = other[..., 2] = -math.inf
    kept = [0, 1, 3, 4]
    logits.requires_grad_()
    other.requires_grad_()
    old, new = Categorical(logits), Categorical(other)
    small_old = torch.distributions.Categorical(logits=logits.detach()[..., kept])
    small_new = torch.distributions.Categorical(logits=other.detach()[..., kept])
    torch.testing.assert_close(old.entropy(), small_old.entropy(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        old.kl(new), torch.distributions.kl_divergence(small_old, small_new), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(old.kl(old).abs() < 1e-12, torch.ones(B, T, dtype=torch.bool))
    gradients = torch.autograd.grad(old.kl(new).sum() + old.entropy().sum(), [logits, other])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all((gradient[..., 2] == 0).all() for gradient in gradients)
    assert old.fisher_product(normal(B, T, V, seed=5)).isfinite().all()


def test_an_action_that_becomes_impossible_costs_infinitely_many_nats():
    """What the line search must refuse: never reported as a small or a finite KL."""
    old = Categorical(torch.zeros(3, dtype=torch.float64))
    new = Categorical(torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64))
    assert old.kl(new).item() == math.inf
    assert new.kl(old).item() == pytest.approx(math.log(1.5))


def test_very_large_logits_stay_finite():
    logits = torch.tensor([1e4, 0.0, -1e4], dtype=torch.float64)
    certain = Categorical(logits)
    assert certain.entropy().item() == pytest.approx(0.0, abs=1e-12)
    assert certain.log_prob(torch.tensor(2)).item() == pytest.approx(-2e4)


def test_kl_of_a_distribution_to_itself_is_zero():
    (mean, log_std), _ = two_gaussians(B, T)
    several = MultiCategorical(normal(B, T, sum(SIZES)), SIZES)
    for one in (Categorical(normal(B, T, V)), several, DiagonalGaussian(mean, log_std)):
        assert one.kl(one).abs().max() < 1e-14


def test_categorical_fisher_product_is_the_hessian_of_the_kl():
    logits = normal(V, seed=1)
    old = Categorical(logits)
    hessian = torch.autograd.functional.hessian(lambda x: old.kl(Categorical(x)), logits)
    dense = torch.stack([old.fisher_product(row) for row in torch.eye(V, dtype=torch.float64)])
    torch.testing.assert_close(dense, hessian, rtol=1e-10, atol=1e-12)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(dense, probabilities.diag() - probabilities.outer(probabilities), rtol=1e-10, atol=1e-12)


def test_multi_categorical_fisher_product_is_the_hessian_of_the_joint_kl():
    logits = normal(sum(SIZES), seed=1)
    old, fixed = MultiCategorical(logits, SIZES), joint(logits)
    hessian = torch.autograd.functional.hessian(lambda x: torch.distributions.kl_divergence(fixed, joint(x)), logits)
    dense = torch.stack([old.fisher_product(row) for row in torch.eye(sum(SIZES), dtype=torch.float64)])
    torch.testing.assert_close(dense, hessian, rtol=1e-10, atol=1e-12)
    own = torch.autograd.functional.hessian(lambda x: old.kl(MultiCategorical(x, SIZES)), logits)
    torch.testing.assert_close(dense, own, rtol=1e-10, atol=1e-12)


def test_gaussian_fisher_product_is_the_hessian_of_the_kl():
    (mean, log_std), _ = two_gaussians()
    old = DiagonalGaussian(mean, log_std)
    together = torch.cat([mean, log_std])
    hessian = torch.autograd.functional.hessian(lambda x: old.kl(DiagonalGaussian(x[:A], x[A:])), together)
    rows = [torch.cat(old.fisher_product(row[:A], row[A:])) for row in torch.eye(2 * A, dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(rows), hessian, rtol=1e-10, atol=1e-12)
    expected = torch.cat([(-2 * log_std).exp(), torch.full((A,), 2.0, dtype=torch.float64)]).diag()
    torch.testing.assert_close(hessian, expected, rtol=1e-10, atol=1e-12)


def test_fisher_products_are_taken_step_by_step():
    logits, tangent = normal(B, T, V, seed=1), normal(B, T, V, seed=2)
    product = Categorical(logits).fisher_product(tangent)
    several, several_tangent = two_multi_categoricals(B, T)
    several_product = MultiCategorical(several, SIZES).fisher_product(several_tangent)
    (mean, log_std), (mean_tangent, std_tangent) = two_gaussians(B, T)
    products = DiagonalGaussian(mean, log_std).fisher_product(mean_tangent, std_tangent)
    for b in range(B):
        for t in range(T):
            torch.testing.assert_close(product[b, t], Categorical(logits[b, t]).fisher_product(tangent[b, t]))
            expected = MultiCategorical(several[b, t], SIZES).fisher_product(several_tangent[b, t])
            torch.testing.assert_close(several_product[b, t], expected)
            single = DiagonalGaussian(mean[b, t], log_std[b, t]).fisher_product(mean_tangent[b, t], std_tangent[b, t])
            for whole, part in zip(products, single, strict=True):
                torch.testing.assert_close(whole[b, t], part)


def test_the_score_is_the_gradient_of_the_log_probability():
    (mean, log_std), _ = two_gaussians(B, T)
    for one in (
        Categorical(normal(B, T, V).requires_grad_()),
        MultiCategorical(normal(B, T, sum(SIZES)).requires_grad_(), SIZES),
        DiagonalGaussian(mean.requires_grad_(), log_std.requires_grad_()),
    ):
        actions = one.sample(torch.Generator().manual_seed(3))
        expected = torch.autograd.grad(one.log_prob(actions).sum(), one.parameters)
        torch.testing.assert_close(one.score(actions), expected, rtol=1e-12, atol=1e-12)


def test_detach_and_rows():
    logits = normal(B, T, V).requires_grad_()
    (mean, log_std), _ = two_gaussians(B, T)
    mean.requires_grad_()
    rows = torch.tensor([2, 0])
    several = MultiCategorical(normal(B, T, sum(SIZES)).requires_grad_(), SIZES)
    for one in (Categorical(logits), several, DiagonalGaussian(mean, log_std), DiagonalGaussian(mean, normal(A))):
        assert one.entropy().requires_grad or one.kl(one.detach()).requires_grad
        assert not one.detach().kl(one.detach()).requires_grad
        kept = {parameter.data_ptr() for parameter in one.parameters}
        assert kept.isdisjoint(parameter.data_ptr() for parameter in one.detach().parameters)
        assert isinstance(one.parameters, tuple)
        torch.testing.assert_close(one[rows].entropy(), one.entropy()[rows])
        torch.testing.assert_close(one[1:3].entropy(), one.entropy()[1:3])


def enumerated(old, new):
    """Expectation over all actions under the old probabilities of each estimator, for one state."""
    old_log, new_log = old.log_softmax(-1), new.log_softmax(-1)
    estimates = kl_estimators(old_log, new_log)
    assert set(estimates) == {"k1", "k2", "k3"}
    return {name: (old_log.exp() * value).sum().item() for name, value in estimates.items()}


def test_k1_and_k3_are_unbiased_for_old_to_new():
    old, new = (x[0] for x in two_categoricals(1))
    exact = Categorical(old).kl(Categorical(new)).item()
    backward = Categorical(new).kl(Categorical(old)).item()
    assert abs(exact - backward) > 0.05 * exact
    expected = enumerated(old, new)
    assert expected["k1"] == pytest.approx(exact, rel=1e-12)
    assert expected["k3"] == pytest.approx(exact, rel=1e-12)


def test_k2_is_half_the_squared_log_ratio_and_right_to_second_order():
    old_log, new_log = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    torch.testing.assert_close(kl_estimators(old_log, new_log)["k2"], torch.tensor([0.125, 1.125]))
    logits, direction = (x[0] for x in two_categoricals(1))
    moved = logits + 1e-4 * direction
    exact = Categorical(logits).kl(Categorical(moved)).item()
    assert enumerated(logits, moved)["k2"] == pytest.approx(exact, rel=1e-3)


def test_k3_is_never_negative_and_k1_can_be():
    old, new = two_categoricals(50)
    estimates = kl_estimators(old.log_softmax(-1), new.log_softmax(-1))
    assert (estimates["k3"] >= 0).all()
    assert (estimates["k2"] >= 0).all()
    assert (estimates["k1"] < 0).any()
    assert all(value.shape == old.shape for value in estimates.values())


def test_estimators_of_equal_policies_are_zero():
    log_prob = normal(B, T)
    for value in kl_estimators(log_prob, log_prob).values():
        assert torch.equal(value.abs(), torch.zeros(B, T, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["categorical", "multi_categorical"])
def test_what_is_asked_without_a_graph_costs_no_gradient_later(kind):
    def made(logits):
        return Categorical(logits) if kind == "categorical" else MultiCategorical(logits, SIZES)

    logits = (two_categoricals if kind == "categorical" else two_multi_categoricals)(B, T)[0].requires_grad_()
    distribution = made(logits)
    with torch.no_grad():
        actions = distribution.sample(torch.Generator().manual_seed(0))
        distribution.entropy()
    for ask in (lambda d: d.log_prob(actions), lambda d: d.entropy(), lambda d: d.kl(made(logits.detach() + 1e-3))):
        (found,) = torch.autograd.grad(ask(distribution).sum(), logits, retain_graph=True)
        (wanted,) = torch.autograd.grad(ask(made(logits)).sum(), logits)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kl_of_logits_in_half_precision_is_that_of_these_logits(dtype):
    logits = normal(64, 300, seed=1).to(dtype)
    others = (logits.double() + 0.03 * normal(64, 300, seed=2)).to(dtype)
    for new in (others, logits):
        found = Categorical(logits).kl(Categorical(new)).mean().item()
        exact = Categorical(logits.double()).kl(Categorical(new.double())).mean().item()
        assert found == pytest.approx(exact, rel=1e-2, abs=1e-7)
    assert exact == 0 and Categorical(others).log_prob(torch.zeros(64)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_score_of_logits_in_half_precision_is_that_of_these_logits(dtype):
    logits, actions = normal(64, sum(SIZES), seed=1).to(dtype), torch.arange(64) % SIZES[0]
    for made, chosen in ((Categorical, actions), (lambda x: MultiCategorical(x, SIZES), torch.zeros(64, 4))):
        (found,), (exact,) = made(logits).score(chosen), made(logits.double()).score(chosen)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_policy_in_half_precision_can_be_stepped(dtype):
    policy = torch.nn.Linear(4, 50, dtype=dtype)
    policy.distribution = lambda observations: Categorical(policy(observations))
    observations = normal(64, 4).to(dtype)
    actions = policy.distribution(observations).sample(torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = policy(observations).double()
    for method in ("gauss_newton", "kl_hessian"):
        report = trust_region_step(policy, observations, actions, normal(64).float(), max_kl=1e-3, fisher_method=method)
        after = policy(observations).detach().double()
        exact = Categorical(before).kl(Categorical(after)).mean().item()
        assert report.accepted and 0 < exact <= 1.01e-3 and report.step_kl == pytest.approx(exact, rel=0.02), method
        before = after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gaussian_in_half_precision_is_measured_in_single(dtype):
    mean, log_std = normal(50, 3).to(dtype), normal(50, 3, seed=1).to(dtype)
    old = DiagonalGaussian(mean, log_std)
    new = DiagonalGaussian(mean + 0.05 * normal(50, 3, seed=2).to(dtype), log_std + 0.01)
    exact = [DiagonalGaussian(each.mean.double(), each.log_std.double()) for each in (old, new)]
    actions = old.sample(torch.Generator().manual_seed(0))
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(old.kl(new).double(), exact[0].kl(exact[1]), rtol=1e-4, atol=1e-6)
    close(old.log_prob(actions).double(), exact[0].log_prob(actions.double()))
    close(old.entropy().double(), exact[0].entropy())
    close([part.double() for part in old.score(actions)], list(exact[0].score(actions.double())))

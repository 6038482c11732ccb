"""The trust-region step: every number of its report recomputed by hand, and every way in which it refuses."""

import copy
import math

import pytest
import torch
from tiny_policies import LowRank, Records, fill, torch_distribution
from torch import nn
from torch.func import functional_call

from lm_trust.core import Categorical, DiagonalGaussian, trust_region_step
from lm_trust.core.objective import SurrogateObjective

B, T, D, V, A = 6, 4, 3, 4, 2


class Discrete(nn.Module):
    """Observations (..., D) to a categorical; `offset` weighs a constant of each state in all its logits."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.inner, self.outer, self.offset = nn.Linear(D, 4), nn.Linear(4, V), offset
        fill(self)

    def forward(self, observations):
        logits = self.outer(torch.tanh(self.inner(observations)))
        return logits + self.offset * observations.sum(-1, keepdim=True)

    def distribution(self, observations):
        return Categorical(self(observations))


class Continuous(nn.Module):
    """Observations (..., D) to a Gaussian whose deviation is a parameter, the same in all states."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 4), nn.Linear(4, A)
        self.log_std = nn.Parameter(torch.zeros(A))
        fill(self)

    def forward(self, observations):
        return self.outer(torch.tanh(self.inner(observations))), self.log_std

    def distribution(self, observations):
        return DiagonalGaussian(*self(observations))


class Bandit(nn.Module):
    """Its logits are its parameter."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(V))
        fill(self)

    def forward(self, observations):
        return self.logits.expand(*observations.shape[:-1], V)

    def distribution(self, observations):
        return Categorical(self(observations))


POLICIES = [Discrete, Continuous, Bandit]


def experience(policy, *lead, seed=1):
    """Observations, actions drawn from the policy and advantages; lead is (B, T) or (N,)."""
    lead = lead or (B, T)
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(*lead, D, generator=generator, dtype=torch.float64)
    actions = policy.distribution(observations).sample(generator=generator)
    return observations, actions, torch.randn(*lead, generator=generator, dtype=torch.float64)


def uneven_mask():
    lengths = torch.tensor([4, 1, 3, 0, 2, 4])
    return torch.arange(T) < lengths[:, None]


@torch.no_grad()
def by_hand(old, new, observations, actions, advantages, mask=None):
    """Per-step KL(old || new) and the surrogate's gain, over valid steps."""
    before, after = torch_distribution(old(observations)), torch_distribution(new(observations))
    kl = torch.distributions.kl_divergence(before, after)
    ratio = (after.log_prob(actions) - before.log_prob(actions)).exp()
    gain = (ratio - 1) * advantages
    valid = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
    return kl[valid], gain[valid].mean().item()


def dense(policy, observations, actions, advantages, mask=None, fisher_rows=slice(None)):
    """Dense Fisher matrix over some rows and the surrogate's gradient over all, with nothing of ours."""
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    start = torch.cat([parameter.detach().flatten() for parameter in named.values()])
    valid = torch.ones(observations.shape[:-1], dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        fixed = policy(observations)
    old = torch_distribution(tuple(x.clone() for x in fixed) if isinstance(fixed, tuple) else fixed.clone())
    log_prob = old.log_prob(actions)

    def at(vector, where):
        pieces = vector.split([parameter.numel() for parameter in named.values()])
        weights = {name: piece.view(named[name].shape) for name, piece in zip(named, pieces, strict=True)}
        return torch_distribution(functional_call(policy, weights, (observations[where],)))

    with torch.no_grad():
        picked = policy(observations[fisher_rows])
    old_rows = torch_distribution(tuple(x.clone() for x in picked) if isinstance(picked, tuple) else picked.clone())

    def mean_kl(vector):
        kl = torch.distributions.kl_divergence(old_rows, at(vector, fisher_rows))
        return kl[valid[fisher_rows]].mean()

    def surrogate(vector):
        ratio = (at(vector, slice(None)).log_prob(actions) - log_prob).exp()
        return (ratio * advantages)[valid].mean()

    fisher = torch.autograd.functional.hessian(mean_kl, start)
    return fisher, torch.autograd.functional.jacobian(surrogate, start)


def vector_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad])


def bits(policy):
    """The parameters as integers, so that even -0.0 and 0.0 differ."""
    return [parameter.detach().clone().view(torch.int64) for parameter in policy.parameters()]


def assert_untouched(policy, before, report):
    assert not report.accepted
    assert report.reason and report.reason != "accepted"
    assert report.step_kl == 0.0
    assert report.step_kl_max == 0.0
    assert all(torch.equal(one, other) for one, other in zip(bits(policy), before, strict=True))


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("preconditioner", [None, "gradient", lambda v: 2 * v])
def test_the_step_is_the_dense_natural_gradient_scaled_by_the_undamped_curvature(make, masked, preconditioner):
    policy, mask = make(), uneven_mask() if masked else None
    batch = experience(policy)
    fisher, gradient = dense(policy, *batch, mask)
    before = vector_of(policy)
    report = trust_region_step(
        policy,
        *batch,
        mask=mask,
        max_kl=1e-4,
        damping=0.05,
        cg_iterations=100,
        cg_tolerance=1e-14,
        preconditioner=preconditioner,
    )
    assert report.accepted
    x = torch.linalg.solve(fisher + 0.05 * torch.eye(len(fisher), dtype=torch.float64), gradient)
    full_step = math.sqrt(2e-4 / (x @ fisher @ x).item()) * x
    torch.testing.assert_close(
        vector_of(policy) - before,
        report.step_fraction * full_step,
        rtol=1e-6,
        atol=1e-9 * full_step.norm().item(),
    )
    assert report.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-9)
    assert report.predicted_gain == pytest.approx((gradient @ (vector_of(policy) - before)).item(), rel=1e-6)


@pytest.mark.parametrize("method", ["gauss_newton", "kl_hessian", "finite_difference"])
@pytest.mark.parametrize("make", POLICIES)
def test_every_fisher_method_takes_the_same_step(make, method):
    policy, other = make(), make()
    batch = experience(policy)
    trust_region_step(policy, *batch, fisher_method="gauss_newton")
    trust_region_step(other, *batch, fisher_method=method)
    torch.testing.assert_close(vector_of(other), vector_of(policy), rtol=0, atol=2e-4)


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_report_is_what_the_policies_themselves_say(make, masked, max_kl, seed):
    policy, mask = make(), uneven_mask() if masked else None
    old = copy.deepcopy(policy)
    batch = experience(policy, seed=seed)
    report = trust_region_step(policy, *batch, mask=mask, max_kl=max_kl)
    assert report.accepted
    assert report.reason == "accepted"
    kl, gain = by_hand(old, policy, *batch, mask)
    assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert report.step_kl_max == pytest.approx(kl.max().item(), rel=1e-9)
    assert report.surrogate_gain == pytest.approx(gain, rel=1e-9)
    assert 0 < kl.mean().item() <= max_kl
    assert gain > 0
    assert report.step_fraction == pytest.approx(0.8**report.backtracks)


def test_the_step_kl_is_old_to_new():
    """At a wide bound the two directions differ plainly."""
    policy = Discrete()
    old = copy.deepcopy(policy)
    batch = experience(policy)
    report = trust_region_step(policy, *batch, max_kl=0.5)
    forward, _ = by_hand(old, policy, *batch)
    backward, _ = by_hand(policy, old, *batch)
    assert abs(forward.mean() - backward.mean()) > 0.02 * forward.mean()
    assert report.step_kl == pytest.approx(forward.mean().item(), rel=1e-9)


@pytest.mark.parametrize("make", POLICIES)
def test_measured_kl_over_the_bound_tends_to_one(make):
    errors = []
    for max_kl in (1e-2, 1e-4, 1e-6):
        policy = make()
        report = trust_region_step(
            policy,
            *experience(policy),
            max_kl=max_kl,
            damping=0.01,
            cg_iterations=100,
            backtrack_ratio=0.99,
            max_backtracks=200,
        )
        assert report.accepted
        errors.append(abs(report.step_kl / (report.step_fraction**2 * max_kl) - 1))
        assert report.step_kl <= max_kl
    assert errors[0] > errors[1] > errors[2]
    assert errors[-1] < 5e-3
    assert report.step_kl / max_kl > 0.97


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_the_quadratic_model_spends_the_whole_bound_whatever_the_damping(damping):
    policy = Bandit() if damping == 0.0 else Discrete()
    report = trust_region_step(
        policy, *experience(policy), max_kl=1e-6, damping=damping, cg_iterations=3, backtrack_ratio=0.999
    )
    assert report.step_kl / 1e-6 == pytest.approx(1.0, abs=0.01)


def test_predicted_and_measured_gain_agree_for_small_steps():
    for max_kl, tolerance in ((1e-4, 0.05), (1e-8, 5e-4)):
        policy = Discrete()
        report = trust_region_step(policy, *experience(policy), max_kl=max_kl)
        assert report.surrogate_gain == pytest.approx(report.predicted_gain, rel=tolerance)


def test_the_conjugate_gradients_account():
    policy = Discrete()
    batch = experience(policy)
    few = trust_region_step(copy.deepcopy(policy), *batch, cg_iterations=2)
    assert few.cg_iterations == 2
    many = trust_region_step(copy.deepcopy(policy), *batch, cg_iterations=100)
    assert many.cg_iterations < 100
    assert 0 <= many.cg_residual < 1e-8 < few.cg_residual


def test_a_damping_that_is_very_large_gives_the_plain_gradients_direction():
    policy = Discrete()
    batch = experience(policy)
    _, gradient = dense(policy, *batch)
    before = vector_of(policy)
    trust_region_step(policy, *batch, damping=1e8)
    assert torch.cosine_similarity(vector_of(policy) - before, gradient, dim=0).item() > 1 - 1e-6


def test_the_size_of_the_advantages_does_not_matter():
    steps = []
    for scale in (1e-20, 1.0, 1e20):
        policy = Discrete()
        observations, actions, advantages = experience(policy)
        report = trust_region_step(policy, observations, actions, scale * advantages)
        assert report.accepted
        assert report.surrogate_gain / scale == pytest.approx(report.predicted_gain / scale, rel=0.5)
        steps.append(vector_of(policy))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(steps[2], steps[1], rtol=1e-7, atol=1e-9)


def test_a_constant_added_to_the_logits_of_a_state_does_not_change_the_step():
    plain, shifted = Discrete(), Discrete(offset=7.0)
    batch = experience(plain)
    one = trust_region_step(plain, *batch)
    other = trust_region_step(shifted, *batch)
    torch.testing.assert_close(vector_of(shifted), vector_of(plain), rtol=1e-8, atol=1e-9)
    assert other.step_kl == pytest.approx(one.step_kl, rel=1e-7)
    assert other.backtracks == one.backtracks


def test_without_damping_the_step_does_not_depend_on_the_parametrisation():
    """The same bandit with its parameters measured in other units moves to the same probabilities."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("units", torch.tensor([0.01, 1.0, 30.0, 4.0], dtype=torch.float64))
            self.scores = nn.Parameter(Bandit().logits.detach() / self.units)

        def distribution(self, observations):
            return Categorical((self.scores * self.units).expand(*observations.shape[:-1], V))

    plain, scaled = Bandit(), Scaled()
    batch = experience(plain)
    for policy in (plain, scaled):
        assert trust_region_step(policy, *batch, damping=0.0, cg_iterations=3, max_kl=1e-3).accepted
    torch.testing.assert_close(
        scaled.distribution(batch[0]).logits.softmax(-1),
        plain.logits.softmax(-1).expand(B, T, V),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("make", POLICIES)
def test_what_is_masked_changes_nothing(make):
    policy, other, mask = make(), make(), uneven_mask()
    observations, actions, advantages = experience(policy)
    one = trust_region_step(policy, observations, actions, advantages, mask=mask)
    noise = torch.where(mask[..., None], observations, torch.full_like(observations, 25.0))
    wrong = torch.where(mask, advantages, torch.full_like(advantages, -1e6))
    swapped = (actions + 1) % V if actions.dtype == torch.int64 else actions + 30.0
    moved = torch.where(mask.view(*mask.shape, *[1] * (actions.ndim - 2)), actions, swapped)
    two = trust_region_step(other, noise, moved, wrong, mask=mask)
    torch.testing.assert_close(vector_of(other), vector_of(policy), rtol=1e-9, atol=1e-11)
    for name in ("step_kl", "step_kl_max", "surrogate_gain", "predicted_gain", "gradient_norm"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-7), name


def test_a_mask_of_true_is_no_mask_and_rows_without_valid_steps_may_be_left_out():
    plain, masked, shorter = Discrete(), Discrete(), Discrete()
    batch = experience(plain)
    trust_region_step(plain, *batch)
    trust_region_step(masked, *batch, mask=torch.ones(B, T, dtype=torch.bool))
    torch.testing.assert_close(vector_of(masked), vector_of(plain), rtol=1e-12, atol=1e-12)
    masked, mask = Discrete(), uneven_mask()
    trust_region_step(masked, *batch, mask=mask)
    kept = mask.any(-1)
    trust_region_step(shorter, *(tensor[kept] for tensor in batch), mask=mask[kept])
    torch.testing.assert_close(vector_of(shorter), vector_of(masked), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", [{}, {"fisher_method": "kl_hessian"}, {"microbatch_size": 2}])
@pytest.mark.parametrize("make", POLICIES)
def test_a_masked_action_may_be_impossible(make, settings):
    one, two, mask = make(), make(), uneven_mask()
    observations, actions, advantages = experience(one)
    trust_region_step(one, observations, actions, advantages, mask=mask, **settings)
    label = -100 if actions.dtype == torch.int64 else math.nan
    wrong = torch.where(mask.view(*mask.shape, *[1] * (actions.ndim - 2)), actions, label)
    given = wrong.clone()
    trust_region_step(two, observations, given, advantages, mask=mask, **settings)
    assert vector_of(two).equal(vector_of(one)) and not vector_of(two).equal(vector_of(make()))
    torch.testing.assert_close(given, wrong, rtol=0, atol=0, equal_nan=True)
    none = torch.full_like(wrong, label)
    assert not trust_region_step(two, observations, none, advantages, mask=torch.zeros_like(mask)).accepted


@pytest.mark.parametrize("settings", [{}, {"holdout_fraction": 0.5}, {"microbatch_size": 2}])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_a_mask_may_be_zeros_and_ones(dtype, settings):
    one, two, mask = Discrete(), Discrete(), uneven_mask()
    batch = experience(one)
    expected = trust_region_step(one, *batch, mask=mask, **settings)
    assert trust_region_step(two, *batch, mask=mask.to(dtype), **settings) == expected and expected.accepted
    assert vector_of(two).equal(vector_of(one))


@pytest.mark.parametrize("make", POLICIES)
def test_a_flat_batch_takes_the_same_step(make):
    policy, flat, mask = make(), make(), uneven_mask()
    observations, actions, advantages = experience(policy)
    trust_region_step(policy, observations, actions, advantages, mask=mask)
    pieces = observations.flatten(0, 1), actions.flatten(0, 1), advantages.flatten()
    trust_region_step(flat, *pieces, mask=mask.flatten())
    torch.testing.assert_close(vector_of(flat), vector_of(policy), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 100])
@pytest.mark.parametrize("make", POLICIES)
def test_microbatches_take_the_step_of_the_whole_batch(make, rows):
    policy, cut, mask = make(), make(), uneven_mask()
    batch = experience(policy)
    whole = trust_region_step(policy, *batch, mask=mask)
    parts = trust_region_step(cut, *batch, mask=mask, microbatch_size=rows)
    torch.testing.assert_close(vector_of(cut), vector_of(policy), rtol=1e-8, atol=1e-10)
    for name in ("step_kl", "step_kl_max", "surrogate_gain", "predicted_gain", "gradient_norm"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-7), name
    assert (parts.accepted, parts.backtracks, parts.cg_iterations) == (
        True,
        whole.backtracks,
        whole.cg_iterations,
    )


class Watching(Discrete):
    """Remembers the observations of each call, and whether the call was differentiated."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def distribution(self, observations):
        self.calls.append((observations, torch.is_grad_enabled()))
        return super().distribution(observations)


def test_a_fisher_fraction_of_one_is_the_full_computation():
    plain, full = Discrete(), Discrete()
    batch = experience(plain)
    trust_region_step(plain, *batch)
    trust_region_step(full, *batch, fisher_fraction=1.0)
    assert torch.equal(vector_of(full), vector_of(plain))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_fisher_fraction_of_a_half_curves_by_half_the_rows_and_is_bounded_on_all(microbatch_size):
    policy, mask = Watching(), uneven_mask()
    old = copy.deepcopy(policy)
    batch = experience(policy)
    before = vector_of(policy)
    report = trust_region_step(
        policy,
        *batch,
        mask=mask,
        max_kl=0.02,
        damping=0.05,
        fisher_fraction=0.5,
        cg_iterations=200,
        cg_tolerance=1e-14,
        microbatch_size=microbatch_size,
    )
    assert report.accepted
    kl, gain = by_hand(old, policy, *batch, mask)
    assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert report.step_kl <= 0.02
    assert report.surrogate_gain == pytest.approx(gain, rel=1e-9)
    if microbatch_size is None:
        *_, seen = (observations for observations, graph in policy.calls if graph and len(observations) != B)
        assert len(seen) == B // 2
        rows = torch.tensor([next(i for i in range(B) if torch.equal(batch[0][i], one)) for one in seen])
        fisher, gradient = dense(old, *batch, mask, fisher_rows=rows)
        x = torch.linalg.solve(fisher + 0.05 * torch.eye(len(fisher), dtype=torch.float64), gradient)
        step = math.sqrt(0.04 / (x @ fisher @ x).item()) * x
        torch.testing.assert_close(vector_of(policy) - before, report.step_fraction * step, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_gradient_and_fisher_share_their_passes(fraction):
    policy = Watching()
    batch = experience(policy)
    policy.calls.clear()
    assert trust_region_step(policy, *batch, fisher_fraction=fraction).accepted
    assert sum(len(observations) for observations, graph in policy.calls if graph) == B


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("rows", [slice(None), torch.tensor([0, 2, 5])])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_the_gradient_of_a_linearised_batch_is_the_gradient(make, rows, microbatch_size):
    policy, reference = make(), make()
    fill(reference, seed=3)
    observations, actions, advantages = experience(policy)
    parameters = list(policy.parameters())
    with torch.no_grad():
        settings = {"reference": reference.distribution(observations), "reference_loss": 0.3, "bounded": True}
    plain, shared = (
        SurrogateObjective(
            policy, observations, actions, advantages, mask=uneven_mask(), microbatch_size=microbatch_size, **settings
        )
        for _ in range(2)
    )
    expected = plain.gradient(parameters)
    torch.testing.assert_close(shared.gradient(parameters, linearise=rows), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(shared.reference_gradient, plain.reference_gradient, rtol=0, atol=1e-12)
    assert shared.reference_kl == pytest.approx(plain.reference_kl, rel=1e-12)
    with torch.no_grad():
        parameters[0].add_(0.1)
    assert shared.measure() == pytest.approx(plain.measure(), rel=1e-9)


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"microbatch_size": 2}, {"fisher_fraction": 0.5}])
def test_rows_that_are_held_out_judge_the_step_and_have_no_part_in_its_gradient(make, masked, settings):
    """Two of six rows; the Fisher and both KLs are still of all rows."""
    policy, mask = make(), uneven_mask() if masked else None
    old, (observations, actions, advantages) = copy.deepcopy(policy), experience(policy)
    held = (torch.arange(B) >= 4).unsqueeze(-1).expand(B, T)
    valid = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    # The gradient of a mean over the others alone: the same with the others' advantages scaled up and these at zero.
    share = valid.sum() / (valid & ~held).sum()
    learnt = torch.where(held, 0.0, advantages * share)
    expected = copy.deepcopy(policy)
    trust_region_step(expected, observations, actions, learnt, mask=mask, **settings)
    # Held-out advantages that agree, so that the step is taken as it is.
    kl, _ = by_hand(old, expected, observations, actions, advantages, mask)
    before, after = torch_distribution(old(observations)), torch_distribution(expected(observations))
    agreeing = torch.where(held, (after.log_prob(actions) - before.log_prob(actions)).detach().sign(), advantages)
    report = trust_region_step(policy, observations, actions, agreeing, mask=mask, holdout_fraction=1 / 3, **settings)
    assert report.accepted
    torch.testing.assert_close(vector_of(policy), vector_of(expected), rtol=0, atol=1e-10)
    assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    _, gain = by_hand(old, policy, observations[4:], actions[4:], agreeing[4:], None if mask is None else mask[4:])
    assert report.surrogate_gain == pytest.approx(gain, rel=1e-9)


def test_a_step_that_is_no_gain_on_the_rows_held_out_is_refused():
    policy = Discrete()
    observations, actions, advantages = experience(policy)
    taken = copy.deepcopy(policy)
    assert trust_region_step(taken, observations[:4], actions[:4], advantages[:4]).accepted
    before, after = (each.distribution(observations).log_prob(actions) for each in (policy, taken))
    against = torch.where((torch.arange(B) >= 4).unsqueeze(-1), -(after - before).detach().sign(), advantages)
    untouched = bits(policy)
    report = trust_region_step(policy, observations, actions, against, holdout_fraction=1 / 3)
    assert report.reason == "no_improvement"
    assert_untouched(policy, untouched, report)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_holdout_leaves_rows_on_both_sides(fraction):
    policy = Discrete()
    with pytest.raises(ValueError, match="leaves no row"):
        trust_region_step(policy, *experience(policy), holdout_fraction=fraction)


class Refusing(torch.autograd.Function):
    """tanh whose backward pass refuses to be recorded."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.tanh(x))
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError("this kernel does not support double backward")
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class Once(Discrete):
    """A policy that can be differentiated once: compiled by torch, or by a kernel."""

    def __init__(self, how):
        super().__init__()
        compiled = torch.compile(super().forward, backend="aot_eager") if how == "compiled" else None
        self.once = compiled or (lambda observations: self.outer(Refusing.apply(self.inner(observations))))

    def forward(self, observations):
        return self.once(observations)


@pytest.mark.parametrize("settings", [{}, {"fisher_fraction": 0.5}, {"microbatch_size": 2}], ids=str)
@pytest.mark.parametrize("how", ["compiled", "kernel"])
def test_auto_takes_the_step_of_finite_differences_where_nothing_is_differentiated_twice(how, settings):
    policies = [Once(how), Discrete()]
    given = experience(policies[1])
    reports = [
        trust_region_step(policy, *given, mask=uneven_mask(), fisher_method=method, **settings)
        for policy, method in zip(policies, ["auto", "finite_difference"], strict=True)
    ]
    one, other = (torch.cat([each.detach().flatten() for each in policy.parameters()]) for policy in policies)
    assert reports[0].accepted and reports[0].step_kl == pytest.approx(reports[1].step_kl, rel=1e-6)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError):
        trust_region_step(policies[0], *given, fisher_method="gauss_newton", **settings)


def test_a_very_small_fisher_fraction_still_uses_a_row():
    policy = Discrete()
    report = trust_region_step(policy, *experience(policy), fisher_fraction=1e-6)
    assert report.accepted
    assert report.step_kl <= 0.01


def test_an_exceeded_bound_without_backtracks_is_refused():
    policy = Discrete()
    before = bits(policy)
    report = trust_region_step(policy, *experience(policy), max_kl=0.1, damping=0.0, max_backtracks=0)
    assert report.reason == "kl_exceeded"
    assert_untouched(policy, before, report)


def test_a_gain_below_what_was_asked_for_is_refused():
    policy = Discrete()
    before = bits(policy)
    report = trust_region_step(policy, *experience(policy), accept_ratio=50.0)
    assert report.reason == "no_improvement"
    assert report.backtracks == 10
    assert_untouched(policy, before, report)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_candidate_that_does_not_improve_is_refused_however_near_it_is(factor):
    """Moved parameters that leave the distribution where it was, or that move it the wrong way."""

    class Contrary(Discrete):
        start = None

        def distribution(self, observations):
            logits = self(observations)
            self.start = logits.detach() if self.start is None else self.start
            return Categorical(logits if torch.equal(logits, self.start) else self.turned(logits))

        def turned(self, logits):
            return self.start + factor * (logits - self.start)

    policy = Contrary()
    batch, before = experience(policy), bits(policy)
    report = trust_region_step(policy, *batch, fisher_method="gauss_newton")
    assert report.reason == "no_improvement"
    assert report.surrogate_gain == 0.0
    assert_untouched(policy, before, report)


def test_parameters_come_back_bit_for_bit_where_arithmetic_would_lose_them():
    policy = Discrete()
    with torch.no_grad():
        policy.outer.bias.copy_(torch.tensor([1e-300, -0.0, 1e12, 1e12]))
        policy.outer.bias[2:] -= policy.outer.bias[2:].mean()
    before = bits(policy)
    report = trust_region_step(policy, *experience(policy), max_kl=0.1, damping=0.0, max_backtracks=0)
    assert_untouched(policy, before, report)


class Fragile(Discrete):
    """Its logits are broken, in one state, as soon as its parameters have moved."""

    def __init__(self, broken):
        super().__init__()
        self.broken, self.start = broken, None

    def distribution(self, observations):
        now = vector_of(self)
        self.start = now.clone() if self.start is None else self.start
        logits = self(observations)
        if not torch.equal(now, self.start):
            logits = logits.clone()
            logits[-1, 1, 0] = self.broken
        return Categorical(logits)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_candidate_that_is_not_finite_is_refused(broken, microbatch_size):
    policy = Fragile(broken)
    batch = experience(policy)
    before = bits(policy)
    report = trust_region_step(policy, *batch, max_backtracks=3, fisher_method="gauss_newton")
    assert report.reason == "non_finite"
    assert_untouched(policy, before, report)


def test_a_candidate_that_forbids_a_possible_action_is_refused():
    """KL(old || new) is infinite there, whatever the sampled actions say."""
    policy = Fragile(-math.inf)
    observations, actions, advantages = experience(policy)
    actions[-1, 1] = 3
    before = bits(policy)
    report = trust_region_step(policy, observations, actions, advantages, max_backtracks=3)
    assert_untouched(policy, before, report)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_kl", -1),
        ("max_kl", math.nan),
        ("max_kl", math.inf),
        ("cg_iterations", 0),
        ("backtrack_ratio", 0.0),
        ("backtrack_ratio", 1.0),
        ("backtrack_ratio", math.nan),
        ("max_backtracks", -1),
        ("fisher_fraction", 0.0),
        ("fisher_fraction", -1.0),
        ("fisher_fraction", 1.5),
        ("damping", -0.1),
        ("reference_budget", 0.0),
        ("reference_budget", -1.0),
        ("reference_budget", math.nan),
    ],
)
def test_a_setting_that_is_out_of_range_is_an_error_that_names_it(name, value):
    policy = Discrete()
    before, (observations, *taken) = bits(policy), experience(policy)
    reference = policy.distribution(observations).detach()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}"):
        trust_region_step(policy, observations, *taken, reference=reference, **{name: value})
    assert all(map(torch.equal, bits(policy), before))


def test_a_bound_that_was_annealed_to_zero_is_a_step_of_zero():
    policy = Discrete()
    before = bits(policy)
    report = trust_region_step(policy, *experience(policy), max_kl=0.0)
    assert_untouched(policy, before, report)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["advantages", "observations", "parameters"])
def test_numbers_that_are_not_finite_are_reported_and_never_raised(bad, where):
    policy = Discrete()
    observations, actions, advantages = experience(policy)
    if where == "advantages":
        advantages[1, 2] = bad
    elif where == "observations":
        observations[1, 2, 0] = math.nan
    else:
        with torch.no_grad():
            policy.outer.bias[1] = bad if bad > 0 else math.nan
    before = bits(policy)
    report = trust_region_step(policy, observations, actions, advantages)
    assert report.reason == "non_finite"
    assert_untouched(policy, before, report)


class Lacking(Discrete):
    """Its distribution is torch's."""

    def distribution(self, observations):
        return torch.distributions.Categorical(logits=self(observations))


@pytest.mark.parametrize(
    ("settings", "missing"),
    [({}, "parameters, kl, fisher_product, detach"), ({"fisher_method": "finite_difference"}, "kl, detach")],
)
def test_a_distribution_of_another_kind_is_told_what_it_lacks(settings, missing):
    policy, batch = Lacking(), experience(Discrete())
    with pytest.raises(TypeError, match=rf"a torch\.distributions\..*Categorical, lacks {missing}; see lm_trust\.core"):
        trust_region_step(policy, *batch, **settings)


def test_a_gradient_of_zero_is_a_step_of_zero():
    policy = Discrete()
    observations, actions, advantages = experience(policy)
    before = bits(policy)
    report = trust_region_step(policy, observations, actions, torch.zeros_like(advantages))
    assert report.gradient_norm == 0.0
    assert_untouched(policy, before, report)


def test_a_batch_with_no_valid_step_is_a_step_of_zero():
    policy = Discrete()
    before = bits(policy)
    report = trust_region_step(policy, *experience(policy), mask=torch.zeros(B, T, dtype=torch.bool))
    assert_untouched(policy, before, report)


class Inverted(Categorical):
    """A metric with the wrong sign."""

    def fisher_product(self, *tangents):
        return -super().fisher_product(*tangents)

    def detach(self):
        return Inverted(self.logits.detach())


def test_negative_curvature_is_reported():
    class Policy(Discrete):
        def distribution(self, observations):
            return Inverted(self(observations))

    policy = Policy()
    batch, before = experience(policy), bits(policy)
    report = trust_region_step(policy, *batch, damping=0.0, fisher_method="gauss_newton")
    assert report.reason == report.cg_stopped == "negative_curvature"
    assert_untouched(policy, before, report)
    # Enough damping hides it from conjugate gradient, but the step is scaled by the undamped curvature.
    report = trust_region_step(policy, *batch, damping=1000.0, fisher_method="gauss_newton")
    assert report.cg_stopped != "negative_curvature"
    assert report.reason == "negative_curvature"
    assert_untouched(policy, before, report)


def test_only_trainable_parameters_move():
    policy = Discrete()
    policy.inner.requires_grad_(False)
    policy.outer.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in policy.named_parameters()}
    assert trust_region_step(policy, *experience(policy)).accepted
    moved = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"outer.weight"}


def test_a_trainable_parameter_that_the_distribution_does_not_use_stays():
    policy = Discrete()
    policy.value_head = nn.Linear(D, 1).double()
    before = policy.value_head.weight.clone()
    assert trust_region_step(policy, *experience(policy)).accepted
    assert torch.equal(policy.value_head.weight, before)


def test_gradients_modes_generators_and_inputs_are_left_as_they_were():
    policy = Discrete()
    batch = experience(policy)
    copies = [tensor.clone() for tensor in batch]
    policy.outer.bias.grad = torch.full((V,), 3.0, dtype=torch.float64)
    state = torch.get_rng_state()
    trust_region_step(policy, *batch)
    assert torch.equal(policy.outer.bias.grad, torch.full((V,), 3.0, dtype=torch.float64))
    assert policy.inner.weight.grad is None
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, other) for tensor, other in zip(batch, copies, strict=True))


def test_a_step_where_gradients_are_switched_off_is_the_same_step():
    policy, other = Discrete(), Discrete()
    batch = experience(policy)
    trust_region_step(policy, *batch)
    with torch.no_grad():
        trust_region_step(other, *batch)
    assert torch.equal(vector_of(other), vector_of(policy))


def test_the_same_call_twice_is_the_same_step():
    policy, other = Continuous(), Continuous()
    batch = experience(policy)
    assert trust_region_step(policy, *batch) == trust_region_step(other, *batch)
    assert torch.equal(vector_of(other), vector_of(policy))


class Minimal(nn.Module):
    """The whole contract of a policy, and no more: no forward."""

    def __init__(self):
        super().__init__()
        self.net = Discrete()

    def distribution(self, observations):
        return self.net.distribution(observations.rows)


@pytest.mark.parametrize("settings", [{}, {"microbatch_size": 4}, {"fisher_fraction": 0.5}])
def test_the_contract_is_distribution_alone_and_observations_are_any_rows(settings):
    policy, plain = Minimal(), Discrete()
    observations, actions, advantages = experience(plain)
    report = trust_region_step(policy, Records(observations), actions, advantages, **settings)
    assert report.accepted
    trust_region_step(plain, observations, actions, advantages, **settings)
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("method", ["gauss_newton", "kl_hessian", "finite_difference"])
def test_a_low_rank_adapter_leaves_its_start(method, damping):
    policy = LowRank(D, V)
    old, batch = copy.deepcopy(policy), experience(policy)
    for _ in range(2):  # A has no gradient at the first step, and one at the second
        old = copy.deepcopy(policy)
        report = trust_region_step(policy, *batch, damping=damping, fisher_method=method, cg_iterations=5)
        assert report.accepted
        assert vector_of(policy).isfinite().all()
        assert report.step_kl == pytest.approx(by_hand(old, policy, *batch)[0].mean().item(), rel=1e-9)
    assert not torch.equal(policy.a.weight, old.a.weight)


def test_the_constraint_is_what_limits_the_step():
    """A wider bound gives more surrogate, monotonically."""
    gains = []
    for max_kl in (1e-4, 1e-3, 1e-2):
        policy = Discrete()
        gains.append(trust_region_step(policy, *experience(policy), max_kl=max_kl).surrogate_gain)
    assert gains[0] < gains[1] < gains[2]
    assert gains[2] / gains[0] == pytest.approx(10.0, rel=0.4)  # to first order as the square root of the bound


@pytest.mark.parametrize("make", [Discrete, Continuous])
def test_repeated_steps_on_one_batch_lift_the_surrogate_each_time(make):
    policy = make()
    batch = experience(policy)
    for _ in range(5):
        report = trust_region_step(policy, *batch)
        assert report.accepted
        assert report.surrogate_gain > 0


def test_with_a_reference_the_objective_subtracts_the_exact_kl_to_it():
    policy, reference = Discrete(), Discrete()
    fill(reference, seed=9)
    old = copy.deepcopy(policy)
    observations, actions, advantages = experience(policy)
    mask, weight = uneven_mask(), 0.7
    with torch.no_grad():
        fixed = reference.distribution(observations)
    report = trust_region_step(
        policy, observations, actions, advantages, mask=mask, reference=fixed, reference_loss=weight
    )
    assert report.accepted
    _, gain = by_hand(old, policy, observations, actions, advantages, mask)
    distance = [by_hand(one, reference, observations, actions, advantages, mask)[0].mean() for one in (old, policy)]
    assert report.surrogate_gain == pytest.approx(gain + weight * (distance[0] - distance[1]).item(), rel=1e-9)


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_a_reference_alone_pulls_the_policy_towards_it(microbatch_size):
    policy, reference = Discrete(), Discrete()
    fill(reference, seed=9)
    observations, actions, advantages = experience(policy)
    with torch.no_grad():
        fixed = reference.distribution(observations)
        before = policy.distribution(observations).kl(fixed).mean().item()
    for _ in range(5):
        report = trust_region_step(
            policy,
            observations,
            actions,
            torch.zeros_like(advantages),
            reference=fixed,
            reference_loss=1.0,
            microbatch_size=microbatch_size,
        )
        assert report.accepted
        assert report.step_kl <= 0.01
    with torch.no_grad():
        assert policy.distribution(observations).kl(fixed).mean().item() < 0.8 * before


def test_a_reference_without_a_weight_changes_nothing():
    policy, other = Discrete(), Discrete()
    batch = experience(policy)
    trust_region_step(policy, *batch)
    trust_region_step(other, *batch, reference=Categorical(torch.zeros(B, T, V, dtype=torch.float64)))
    assert torch.equal(vector_of(other), vector_of(policy))


def test_single_precision_stays_within_its_bound():
    for make in (Discrete, Continuous):
        policy = make()
        observations, actions, advantages = experience(policy)
        policy.float()
        old = copy.deepcopy(policy)
        actions = actions.float() if actions.is_floating_point() else actions
        batch = observations.float(), actions, advantages.float()
        report = trust_region_step(policy, *batch)
        assert report.accepted
        kl, _ = by_hand(old, policy, *batch)
        assert kl.mean().item() <= 0.01 * (1 + 1e-4)
        assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-3)


def test_a_fisher_far_below_the_damping_is_not_lost_in_single_precision():
    """x'Fx as the difference of two damped numbers would be rounding alone: 1e-8 of the damping."""

    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, V)
            fill(self)

        def distribution(self, observations):
            return Categorical(1e-4 * self.layer(observations))

    policy = Faint()
    observations, actions, advantages = experience(policy)
    policy.float()
    report = trust_region_step(policy, observations.float(), actions, advantages.float())
    assert report.accepted
    assert 0.8**2 * 0.9 * 0.01 < report.step_kl <= 0.01


class Steep(nn.Module):
    """A Gaussian whose mean grows so fast that its KL is far from quadratic in a step."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def distribution(self, observations):
        mean = self.theta + 1e5 * self.theta**5
        return DiagonalGaussian(mean.expand(len(observations), 1), torch.zeros(1, dtype=torch.float64))


def test_a_kl_that_grows_faster_than_a_square_does_not_end_the_search():
    policy, actions = Steep(), torch.ones(6, 1, dtype=torch.float64)
    advantages = torch.ones(6, dtype=torch.float64)
    report = trust_region_step(
        policy, torch.zeros(6, 1), actions, advantages, max_kl=0.01, damping=0.0, max_backtracks=8, backtrack_ratio=0.8
    )
    assert report.accepted and 0 < report.step_kl <= 0.01
    assert report.step_fraction == 0.8**report.backtracks


class Attention(nn.Module):
    """Differentiated through another kernel than it is measured with: the two round otherwise."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer = nn.Linear(D, 3 * 16), nn.Linear(16, V)

    def distribution(self, observations):
        query, key, value = self.inner(observations).unsqueeze(1).split(16, -1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return Categorical(self.outer(mixed.squeeze(1)))


@pytest.mark.parametrize("seed", range(8))
def test_a_bound_of_zero_is_no_step_however_theta_old_is_measured(seed):
    policy = Attention(seed)
    observations, actions, advantages = (
        each.float() if each.is_floating_point() else each for each in experience(Discrete(), seed=seed)
    )
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    report = trust_region_step(policy, observations, actions, advantages, max_kl=0.0)
    assert (report.accepted, report.reason, report.step_kl) == (False, "no_improvement", 0.0)
    assert all(torch.equal(one, two) for one, two in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_the_gradients_norm_is_a_number_where_its_squares_do_not_fit(size):
    policy = Discrete().float()
    observations, actions, advantages = experience(Discrete())
    norms = [
        trust_region_step(copy.deepcopy(policy), observations.float(), actions, (advantages * scale).float())
        for scale in (1.0, size)
    ]
    assert norms[1].gradient_norm == pytest.approx(size * norms[0].gradient_norm, rel=1e-4) and norms[1].accepted

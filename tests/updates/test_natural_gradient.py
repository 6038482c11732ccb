"""The natural gradient step against a dense Fisher matrix."""

import math

import pytest
import torch
from tiny_policies import MASK, Policy, batch_for, vector_of
from torch.func import functional_call

from lm_trust.updates import NaturalGradient


def dense_step(policy, batch, damping):
    """(F + damping I)^-1 g, with F the Hessian of torch's own KL by all P parameters, and g."""
    names, values = zip(*policy.named_parameters(), strict=True)
    sizes = [value.numel() for value in values]
    old = policy.independent(batch.observations)

    def at(theta):
        parts = {name: part.view_as(value) for name, part, value in zip(names, theta.split(sizes), values, strict=True)}
        output = functional_call(policy.net, {n[4:]: p for n, p in parts.items() if n != "log_std"}, batch.observations)
        if policy.kind == "categorical":
            return torch.distributions.Categorical(logits=output)
        scale = parts["log_std"].exp().expand_as(output)
        return torch.distributions.Independent(torch.distributions.Normal(output, scale), 1)

    kinds = torch.distributions
    theta = vector_of(policy)
    fixed = at(theta)
    fisher = torch.autograd.functional.hessian(lambda x: kinds.kl_divergence(fixed, at(x))[MASK].mean(), theta)
    with torch.no_grad():
        start = old.log_prob(batch.actions)
    gradient = torch.autograd.functional.jacobian(
        lambda x: ((at(x).log_prob(batch.actions) - start).exp() * batch.advantages)[MASK].mean(), theta
    )
    return torch.linalg.solve(fisher + damping * torch.eye(len(theta), dtype=theta.dtype), gradient), gradient


@pytest.mark.parametrize("method", ["gauss_newton", "kl_hessian"])
@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_the_step_is_a_multiple_of_the_dense_solve(kind, microbatch_size, method):
    policy = Policy(kind)
    batch = batch_for(policy)
    start = vector_of(policy)
    direction, gradient = dense_step(policy, batch, damping=0.05)
    rule = NaturalGradient(
        step_size=0.07, damping=0.05, cg_iterations=200, microbatch_size=microbatch_size, fisher_method=method
    )
    report = rule.step(policy, batch)
    torch.testing.assert_close(vector_of(policy) - start, 0.07 * direction, rtol=1e-6, atol=1e-9)
    assert report.predicted_gain == pytest.approx(0.07 * gradient.dot(direction).item(), rel=1e-6)
    assert report.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-9)
    assert report.surrogate_gain == pytest.approx(report.predicted_gain, rel=0.3)
    assert (report.accepted, report.step_fraction, report.metrics["step_size"]) == (True, 1.0, 0.07)


def test_no_bound_and_no_line_search_hold_it():
    short, long = Policy(), Policy()
    batch = batch_for(short)
    start = vector_of(short)
    one, two = NaturalGradient(step_size=0.1).step(short, batch), NaturalGradient(step_size=30.0).step(long, batch)
    torch.testing.assert_close(vector_of(long) - start, 300 * (vector_of(short) - start), rtol=1e-9, atol=1e-9)
    assert two.accepted and two.step_kl > 1 > one.step_kl


def test_a_step_that_cannot_be_measured_is_taken_back():
    policy = Policy()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    report = NaturalGradient(step_size=math.inf).step(policy, batch_for(policy))
    assert (report.accepted, report.reason, report.step_kl) == (False, "non_finite", 0.0)
    assert all(torch.equal(one, two) for one, two in zip(policy.parameters(), before, strict=True))


def test_the_step_size_can_fall_with_the_progress():
    policy, plain = Policy(), Policy()
    NaturalGradient(step_size=0.2, anneal=True).step(policy, batch_for(policy, progress=0.75))
    NaturalGradient(step_size=0.05).step(plain, batch_for(plain))
    assert torch.equal(vector_of(policy), vector_of(plain))


def test_the_reference_loss_is_part_of_the_objective():
    policy, plain, reference = Policy(), Policy(), Policy(seed=9)
    batch = batch_for(policy, reference=reference)
    report = NaturalGradient(reference_loss=0.5).step(policy, batch)
    NaturalGradient().step(plain, batch)
    distance = {
        name: new.distribution(batch.observations).kl(batch.reference)[MASK].mean().item()
        for name, new in (("with", policy), ("without", plain), ("before", Policy()))
    }
    assert distance["with"] < distance["without"]
    steps_per_row = MASK.sum().item() / len(batch)
    assert report.metrics["reference_kl_after"] == pytest.approx(distance["with"] * steps_per_row, rel=1e-9)


def test_no_iterations_are_an_error():
    policy = Policy("categorical")
    with pytest.raises(ValueError, match="cg_iterations must be 1 or more, got 0"):
        NaturalGradient(cg_iterations=0).step(policy, batch_for(policy))

"""The projection against a general optimiser, its gradient against differences, the rule against a loop."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from tiny_policies import KINDS, MASK, Policy, batch_for, moved, vector_of

from lm_trust.core import Categorical, DiagonalGaussian, MultiCategorical
from lm_trust.errors import UserError
from lm_trust.updates import DivergenceMask, Projection
from lm_trust.updates.coarse import coarse
from lm_trust.updates.projection import project


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("seed", range(4))
def test_is_what_a_general_optimiser_finds(seed):
    new, old = Categorical(2 * draw(1, 5, seed=seed)), Categorical(draw(1, 5, seed=seed + 50))
    p, base = new.log_probs.exp()[0].numpy(), old.log_probs.exp()[0].numpy()
    found = minimize(
        lambda q: np.sum(q * np.log(q / p)),
        base,
        bounds=[(1e-9, 1)] * 5,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: 0.05 - np.sum(q * np.log(q / base))},
        ],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert new.kl(old).item() > 0.1
    np.testing.assert_allclose(project(new, old, 0.05).log_probs.exp()[0].numpy(), found.x, atol=2e-6)


def test_is_what_a_general_optimiser_finds_for_a_gaussian():
    new = DiagonalGaussian(torch.tensor([[1.0, -0.5]]).double(), torch.tensor([[0.3, -0.4]]).double())
    old = DiagonalGaussian(torch.zeros(1, 2).double(), torch.zeros(1, 2).double())

    def kl(x, other):
        mean, log_std = x[:2], x[2:]
        m, s = other.mean[0].numpy(), other.log_std[0].numpy()
        return np.sum(s - log_std + (np.exp(2 * log_std) + (mean - m) ** 2) / (2 * np.exp(2 * s)) - 0.5)

    found = minimize(
        lambda x: kl(x, new),
        np.full(4, 0.01),
        constraints=[{"type": "ineq", "fun": lambda x: 0.05 - kl(x, old)}],
        options={"ftol": 1e-14},
    )
    projected = project(new, old, 0.05)
    ours = np.concatenate([projected.mean[0].numpy(), projected.log_std[0].numpy()])
    np.testing.assert_allclose(ours, found.x, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("max_kl", [1e-4, 0.05])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_every_step_is_on_the_edge_of_its_bound(dtype, accuracy, max_kl, scale):
    logits, base = scale * draw(200, 50, dtype=dtype), draw(200, 50, seed=1, dtype=dtype)
    mean, log_std = scale * (1 + draw(200, 3, seed=2, dtype=dtype).abs()), 0.3 * draw(200, 3, seed=3, dtype=dtype)
    still = torch.zeros(200, 3, dtype=dtype)
    for new, old in (
        (Categorical(logits), Categorical(base)),
        (MultiCategorical(logits, [20, 30]), MultiCategorical(base, [20, 30])),
        (DiagonalGaussian(mean, log_std), DiagonalGaussian(still, still)),
    ):
        assert (new.kl(old) > max_kl).all()
        kl = project(new, old, max_kl).kl(old)
        torch.testing.assert_close(kl, torch.full_like(kl, max_kl), rtol=1e-5, atol=accuracy)


def test_its_gradient_is_that_of_differences():
    base, actions = draw(3, 5, seed=1), torch.tensor([0, 3, 4])

    def of_logits(logits):
        projected = project(Categorical(logits), Categorical(base), 0.05)
        return projected.log_prob(actions), projected.entropy()

    def of_gaussian(mean, log_std):
        old = DiagonalGaussian(torch.zeros(3, 2).double(), torch.zeros(3, 2).double())
        return project(DiagonalGaussian(mean, log_std), old, 0.05).log_prob(torch.ones(3, 2).double())

    mean, log_std = 2 * draw(3, 2), 0.3 * draw(3, 2, seed=5)
    assert torch.autograd.gradcheck(of_logits, (2 * draw(3, 5)).requires_grad_())
    assert torch.autograd.gradcheck(of_gaussian, (mean.requires_grad_(), log_std.requires_grad_()))


def test_an_action_that_neither_takes_stays_excluded():
    new = Categorical(torch.tensor([[2.0, 0.0, -math.inf]]).double().requires_grad_())
    old = Categorical(torch.tensor([[0.0, 1.0, -math.inf]]).double())
    projected = project(new, old, 0.05)
    assert projected.kl(old).item() == pytest.approx(0.05, rel=1e-9)
    assert projected.log_probs[0, 2] == -math.inf
    (slope,) = torch.autograd.grad(projected.log_prob(torch.tensor([0])).sum(), new.logits)
    assert slope.isfinite().all() and slope[0, 2] == 0


@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_the_objective_against_a_loop_over_steps(top_k):
    policy = Policy()
    batch = batch_for(policy)
    new = moved(policy, 0.2).distribution(batch.observations).detach()
    rule = Projection(token_kl=0.03, pull=0.7, top_k=top_k)
    each, outside = rule._projected(new, batch.old, batch.actions, batch.advantages, batch.old_log_prob, MASK)
    for b, t in MASK.nonzero().tolist():
        p, base = (one.log_probs[b, t].exp().numpy() for one in (new, batch.old))
        action, advantage = batch.actions[b, t].item(), batch.advantages[b, t].item()
        if top_k == 2:
            kept = list(np.argsort(-base)[:2])
            kept = kept if action in kept else [kept[0], action]
            rest = [index for index in range(4) if index not in kept]
            p, base = (np.append(one[kept], one[rest].sum()) for one in (p, base))
            action = kept.index(action)

        def mixture(w, p=p, base=base):
            q = p**w * base ** (1 - w)
            return q / q.sum()

        def excess(w, base=base, mixture=mixture):
            return np.sum(mixture(w) * np.log(mixture(w) / base)) - 0.03

        is_outside = excess(1.0) > 0
        q = mixture(brentq(excess, 1e-9, 1.0, xtol=1e-14)) if is_outside else p
        expected = q[action] / base[action] * advantage - 0.7 * np.sum(p * np.log(p / q))
        assert outside[b, t].item() == is_outside
        assert each[b, t].item() == pytest.approx(expected, rel=1e-7)
    assert 5 < outside.sum().item() < MASK.sum().item()


def test_the_policy_is_drawn_to_a_projection_that_is_held_fixed():
    policy = Policy()
    batch = batch_for(policy)
    new = moved(policy, 0.2).distribution(batch.observations)
    still = torch.zeros_like(batch.advantages)
    each, outside = Projection(token_kl=0.03, pull=0.7)._projected(
        new, batch.old, batch.actions, still, batch.old_log_prob, MASK
    )
    (slope,) = torch.autograd.grad(each[MASK].sum(), new.logits)
    for b, t in outside.nonzero().tolist():
        own, old = Categorical(new.logits[b, t : t + 1].detach()), batch.old[b, t : t + 1]
        p, q = (one.log_probs[0].exp().numpy() for one in (own, project(own, old, 0.03)))
        gap = np.log(p / q)
        np.testing.assert_allclose(slope[b, t].numpy(), -0.7 * p * (gap - np.sum(p * gap)), atol=1e-9)
    assert outside.any() and (slope[(outside == 0) & MASK] == 0).all()


def test_all_actions_told_apart_is_the_dense_projection():
    policy, dense, sparse = Policy(), Policy(), Policy()
    batch = batch_for(policy)
    settings = {"token_kl": 0.01, "learning_rate": 0.02}
    Projection(top_k=4, **settings).step(policy, batch)
    Projection(**settings).step(dense, batch)
    Projection(top_k=2, **settings).step(sparse, batch)
    assert torch.equal(vector_of(policy), vector_of(dense))
    assert not torch.allclose(vector_of(sparse), vector_of(dense), atol=1e-4)


def test_few_categories_hide_divergence_and_keep_the_taken_action():
    new, old, actions = Categorical(2 * draw(40, 9)), Categorical(draw(40, 9, seed=1)), torch.arange(40) % 9
    exact, previous = new.kl(old), torch.zeros(40, dtype=torch.float64)
    for kept in range(1, 10):
        own, other, places = coarse(new, old, actions, kept)
        assert own.logits.shape == (40, min(kept + 1, 9) if kept < 9 else 9)
        torch.testing.assert_close(own.log_prob(places), new.log_prob(actions))
        torch.testing.assert_close(other.log_prob(places), old.log_prob(actions))
        kl = own.kl(other)
        assert (kl <= exact + 1e-12).all() and kl.mean() >= previous.mean() - 0.05
        previous = kl
    torch.testing.assert_close(previous, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_region_leaves_the_surrogate_and_a_narrow_one_holds_the_policy(kind):
    wide, plain, narrow = Policy(kind), Policy(kind), Policy(kind)
    batch = batch_for(wide)
    settings = {"learning_rate": 0.02, "epochs": 10}
    far = Projection(token_kl=1e9, **settings).step(wide, batch)
    DivergenceMask(threshold=1e9, **settings).step(plain, batch)
    near = Projection(token_kl=1e-3, pull=20.0, **settings).step(narrow, batch)
    torch.testing.assert_close(vector_of(wide), vector_of(plain), rtol=0, atol=1e-9)
    assert far.metrics["projected_fraction"] == 0 < near.metrics["projected_fraction"]
    assert near.step_kl < far.step_kl / 4


@pytest.mark.parametrize("kind", ["multi_categorical", "gaussian"])
def test_few_categories_of_what_is_not_one_category_are_refused(kind):
    policy = Policy(kind)
    start = vector_of(policy)
    with pytest.raises(UserError, match=r"update\.top_k: needs one discrete action a step; use null"):
        Projection(top_k=2).step(policy, batch_for(policy))
    assert torch.equal(vector_of(policy), start)


@pytest.mark.parametrize("kept", [2, 3])
def test_actions_that_are_all_ruled_out_have_no_part_in_the_gradient(kept):
    logits = torch.tensor([[0.3, -0.2, -math.inf, -math.inf]], dtype=torch.float64, requires_grad=True)
    own, _, place = coarse(Categorical(logits), Categorical(logits.detach()), torch.tensor([1]), kept)
    assert own.log_probs[0, -1] == -math.inf
    (gradient,) = torch.autograd.grad(own.log_prob(place).sum(), logits)
    (expected,) = torch.autograd.grad(Categorical(logits).log_prob(torch.tensor([1])).sum(), logits)
    torch.testing.assert_close(gradient[0, :2], expected[0, :2])
    assert torch.isfinite(gradient).all()

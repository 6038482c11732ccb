"""The surrogate of a projected policy: TROLL (Becker et al. 2025, "TROLL: Trust Regions improve Reinforcement Learning
for Large Language Models", arXiv 2510.03817), with its projection and its objective as follows.

At each step the new distribution p is replaced by the nearest one within a trust region around the old one,

    q = argmin KL(q || p)  subject to  KL(q || old) <= token_kl,

which is q ~ p^w old^(1 - w), with w = 1 / (1 + eta) for the constraint's multiplier eta; where p is within, w = 1 and
q = p. The mean of q(a) / old(a) * advantage - pull * KL(p || q held fixed) is maximised by minibatch Adam. Gradients go
through the projection, w included (by the implicit function theorem); the second term draws the policy itself, which is
what samples, towards its projection. The region bounds q and not the policy: the step KL of the report has no bound.

The same minimum over Gaussians, or over products of categoricals, is of the same form, so that this rule serves them.
The sparse variant puts all but the k likeliest actions together as one (`coarse`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm_trust.core.distributions import Distribution
from lm_trust.core.surrogate import ratio
from lm_trust.updates.adam_rule import AdamRule
from lm_trust.updates.coarse import coarse

_ROUNDS = 20  # of the search for w, at most; four are usual


class Projection(AdamRule):
    """The surrogate of the policy projected, step by step, into a trust region around the old one.

    Args:
        token_kl: how far from the old distribution a projected one may be, nats.
        pull: weight of the KL from the policy to its projection.
        top_k: how many actions are told apart; None: all.
        settings: see `AdamRule`.
    """

    def __init__(self, *, token_kl: float = 0.05, pull: float = 1.0, top_k: int | None = None, **settings: Any) -> None:
        super().__init__(self._projected, metrics=("projected_fraction",), **settings)
        self._token_kl, self._pull, self._top_k = token_kl, pull, top_k

    def _projected(
        self,
        new: Distribution,
        old: Distribution,
        actions: Tensor,
        advantages: Tensor,
        old_log_prob: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        new, old, actions = coarse(new, old, actions, self._top_k)
        log_prob = torch.where(mask, new.log_prob(actions), 0.0)
        outside = mask & (new.kl(old).detach() > self._token_kl)
        distance = torch.zeros_like(log_prob)
        if outside.any():
            own = new[outside]
            projected = project(own, old[outside], self._token_kl)
            log_prob = log_prob.index_put((outside,), projected.log_prob(actions[outside]))
            distance = distance.index_put((outside,), own.kl(projected.detach()))
        objective = ratio(old_log_prob, log_prob) * advantages - self._pull * distance
        return objective, outside.to(objective.dtype)


def project(new: Distribution, old: Distribution, max_kl: float) -> Distribution:
    """The distribution nearest to `new`, in KL(. || new), with KL(. || old) = max_kl; differentiable in `new`.

    Args:
        new, old: (N,) steps, each with KL(new || old) over max_kl.
        max_kl: nats.
    """
    target = old.detach()
    weight, slope = _edge(new.detach(), target, max_kl)
    # The last step of Newton's method: what it leaves is rounding, and its derivative by `new` is that of the root.
    kl = new.mixed(target, weight).kl(target)
    return new.mixed(target, weight - (kl - max_kl) / slope)


def _edge(new: Distribution, old: Distribution, max_kl: float) -> tuple[Tensor, Tensor]:
    """w at which the mixture is max_kl from old, to half of the arithmetic's digits, and the KL's derivative, (N,).

    Newton's method on the root of the KL, which is almost linear in w, and bisection where that leads astray.
    """
    weight = (max_kl / new.kl(old)).sqrt()
    low, high = torch.zeros_like(weight), torch.ones_like(weight)
    accuracy = max_kl * torch.finfo(weight.dtype).eps ** 0.5
    for _ in range(_ROUNDS):
        kl, slope = _divergence(new, old, weight)
        settled = (kl - max_kl).abs() <= accuracy
        if settled.all():
            break
        over = kl > max_kl
        low, high = torch.where(over, low, weight), torch.where(over, weight, high)
        root = kl.sqrt()
        onward = weight - (root - max_kl**0.5) * 2 * root / slope
        onward = torch.where((onward >= low) & (onward <= high), onward, (low + high) / 2)
        weight = torch.where(settled, weight, onward)
    return weight, slope


def _divergence(new: Distribution, old: Distribution, weight: Tensor) -> tuple[Tensor, Tensor]:
    """KL(mixture || old) at w, and its derivative by w, (N,)."""
    with torch.enable_grad():
        weight = weight.detach().requires_grad_()
        kl = new.mixed(old, weight).kl(old)
        (slope,) = torch.autograd.grad(kl.sum(), weight)
    return kl.detach(), slope

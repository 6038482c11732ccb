"""Exact action distributions: what a policy returns, and all that a trust region needs to know of it.

A distribution knows its own divergence and its own Fisher metric, so nothing above it asks which world it serves.
Shapes: B rows, T steps (any leading shape will do), V categories, A action dimensions. Entropy and KL in nats per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lm_trust.core.shapes import require_same_shape


@runtime_checkable
class Distribution(Protocol):
    """What the core asks of a distribution over actions, one for every step."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that the Fisher metric speaks of, each (B, T, ...)."""

    def log_prob(self, actions: Tensor) -> Tensor:
        """(B, T) log-probability, or log-density, of each step's action, nats."""

    def entropy(self) -> Tensor:
        """(B, T) nats per step."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One action a step, (B, T) or (B, T, A), without graph."""

    def mode(self) -> Tensor:
        """The most likely action of each step, as `sample` gives one."""

    def kl(self, other: Any) -> Tensor:
        """(B, T) KL(self || other), exact, nats per step; differentiable in both."""

    def score(self, actions: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each step's log_prob by the distribution's own parameters, each (B, T, ...)."""

    def fisher_product(self, *tangents: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The Hessian of KL(self || .) at self times tangents of `parameters`, shaped like them."""

    def mixed(self, other: Any, weight: Tensor) -> Distribution:
        """The distribution proportional to self ** weight * other ** (1 - weight), weight (B, T)."""

    def detach(self) -> Distribution:
        """A snapshot: cut from the graph, and from storage that it may share with a parameter that will move."""

    def __getitem__(self, rows: Any) -> Distribution:
        """The same of the chosen rows."""


class Categorical:
    """A categorical distribution over V actions.

    Args:
        logits: (B, T, V), unnormalised; adding a constant to a row changes nothing, and -inf is probability zero.

    Raises:
        ValueError: from `log_prob` and `score`, actions that are not one a step.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._log_probs: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    @property
    def log_probs(self) -> Tensor:
        """(B, T, V) normalised log-probabilities."""
        made = self._log_probs
        # What was made without a graph, while sampling, has no gradient to give.
        if made is None or (torch.is_grad_enabled() and self.logits.requires_grad and not made.requires_grad):
            self._log_probs = torch.log_softmax(self.logits, dim=-1, dtype=_precise(self.logits))
        return self._log_probs

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of actions (B, T), in nats."""
        return self.log_probs.gather(-1, self._index(actions)).squeeze(-1)

    def entropy(self) -> Tensor:
        """(B, T) entropy in nats per step."""
        return -_expectation(self.log_probs.exp(), self.log_probs)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B, T) actions, by the exponential race: argmin of Exp(1) / p is distributed as p."""
        probabilities = self.log_probs.detach().exp()
        race = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / race).argmax(dim=-1)

    def mode(self) -> Tensor:
        """(B, T) most likely actions."""
        return self.logits.argmax(dim=-1)

    def kl(self, other: Categorical) -> Tensor:
        """KL(self || other), exact over all V actions, (B, T) in nats per step; +inf where other excludes an action."""
        return _expectation(self.log_probs.exp(), self.log_probs - other.log_probs)

    def score(self, actions: Tensor) -> tuple[Tensor, ...]:
        """(onehot(action) - p,), the gradient of log_prob by the logits, (B, T, V)."""
        chosen = torch.ones_like(self.log_probs[..., :1])
        return (self.log_probs.exp().neg_().scatter_add_(-1, self._index(actions), chosen),)

    def fisher_product(self, *tangents: Tensor) -> Tensor:
        """(diag(p) - p p') u for one tangent u of the logits, (B, T, V): the Hessian of KL(self || .) at self."""
        (tangent,) = tangents
        probabilities = self.log_probs.exp()
        return probabilities * (tangent - (probabilities * tangent).sum(-1, keepdim=True))

    def mixed(self, other: Categorical, weight: Tensor) -> Categorical:
        """Proportional to self ** weight * other ** (1 - weight), weight (B, T): from other at 0 to self at 1."""
        excluded = other.log_probs == -math.inf  # and so in the mixture; the difference would be no number
        difference = torch.where(excluded, 0.0, self.log_probs - other.log_probs)
        return Categorical(other.log_probs + weight.unsqueeze(-1) * difference)

    def detach(self) -> Categorical:
        """A snapshot of the distribution, without graph."""
        return Categorical(self.logits.detach().clone())

    def __getitem__(self, rows: Any) -> Categorical:
        return Categorical(self.logits[rows])

    def _index(self, actions: Tensor) -> Tensor:
        # Of fewer actions than steps, gather would score a corner without a word.
        if actions.shape != self.logits.shape[:-1]:
            given, wanted = tuple(actions.shape), tuple(self.logits.shape)
            raise ValueError(f"actions of shape {given} for logits of shape {wanted}: one a step")
        return actions.long().unsqueeze(-1)


class MultiCategorical:
    """Independent categoricals, one for each of A action dimensions; every quantity sums over A.

    Args:
        logits: (B, T, sum of V_a), the dimensions' logits side by side, each as for `Categorical`.
        sizes: V_a, how many actions each dimension chooses from.

    Raises:
        RuntimeError: the sizes do not add up to the logits.
    """

    def __init__(self, logits: Tensor, sizes: Sequence[int]) -> None:
        self.logits = logits
        self.sizes = tuple(sizes)
        self._dimensions = [Categorical(part) for part in logits.split(self.sizes, dim=-1)]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of actions (B, T, A), (B, T) in nats."""
        return sum(one.log_prob(action) for one, action in zip(self._dimensions, actions.unbind(-1), strict=True))

    def entropy(self) -> Tensor:
        """(B, T) entropy in nats per step."""
        return sum(one.entropy() for one in self._dimensions)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B, T, A) actions."""
        return torch.stack([one.sample(generator) for one in self._dimensions], dim=-1)

    def mode(self) -> Tensor:
        """(B, T, A) most likely actions."""
        return torch.stack([one.mode() for one in self._dimensions], dim=-1)

    def kl(self, other: MultiCategorical) -> Tensor:
        """KL(self || other), exact, (B, T) in nats per step; +inf where other excludes an action."""
        return sum(one.kl(two) for one, two in zip(self._dimensions, other._dimensions, strict=True))

    def score(self, actions: Tensor) -> tuple[Tensor, ...]:
        """The gradient of log_prob by the logits, (B, T, sum of V_a)."""
        parts = [one.score(action)[0] for one, action in zip(self._dimensions, actions.unbind(-1), strict=True)]
        return (torch.cat(parts, dim=-1),)

    def fisher_product(self, *tangents: Tensor) -> Tensor:
        """For one tangent of the logits, (B, T, sum of V_a): the metric is one block for each dimension."""
        (tangent,) = tangents
        parts = tangent.split(self.sizes, dim=-1)
        products = [one.fisher_product(part) for one, part in zip(self._dimensions, parts, strict=True)]
        return torch.cat(products, dim=-1)

    def mixed(self, other: MultiCategorical, weight: Tensor) -> MultiCategorical:
        """As for `Categorical`, in each dimension."""
        parts = [one.mixed(two, weight) for one, two in zip(self._dimensions, other._dimensions, strict=True)]
        return MultiCategorical(torch.cat([part.logits for part in parts], dim=-1), self.sizes)

    def detach(self) -> MultiCategorical:
        """A snapshot of the distribution, without graph."""
        return MultiCategorical(self.logits.detach().clone(), self.sizes)

    def __getitem__(self, rows: Any) -> MultiCategorical:
        return MultiCategorical(self.logits[rows], self.sizes)


class DiagonalGaussian:
    """A Gaussian over A independent action dimensions; every quantity sums over A.

    Args:
        mean: (B, T, A).
        log_std: broadcastable to mean; a state-independent (A,) vector is the usual case.

    Raises:
        ValueError: from `log_prob` and `score`, actions that are not of the mean's shape but for further axes in front.
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean
        self.log_std = log_std.expand_as(mean)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.mean, self.log_std)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-density of actions (B, T, A), (B, T) in nats."""
        log_std = self.log_std.to(_precise(self.log_std))
        standardised = self._deviation(actions) * torch.exp(-log_std)
        return (-0.5 * standardised.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """(B, T) differential entropy in nats per step."""
        return (self.log_std.to(_precise(self.log_std)) + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B, T, A) actions."""
        mean = self.mean.detach()
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + self.log_std.detach().exp() * noise

    def mode(self) -> Tensor:
        """(B, T, A) the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """KL(self || other), closed form, summed over A, (B, T) in nats per step."""
        mean, log_std, other_mean, other_log_std = (
            each.to(_precise(each)) for each in (self.mean, self.log_std, other.mean, other.log_std)
        )
        log_ratio = other_log_std - log_std
        distance = ((mean - other_mean) * torch.exp(-other_log_std)).square()
        # expm1 keeps the digits of a small step, where the terms of the textbook form cancel.
        return 0.5 * (torch.expm1(-2 * log_ratio) + 2 * log_ratio + distance).sum(-1)

    def score(self, actions: Tensor) -> tuple[Tensor, ...]:
        """(z / sigma, z^2 - 1) with z = (action - mean) / sigma: by the mean and by the log-std, each (B, T, A)."""
        inverse = torch.exp(-self.log_std.to(_precise(self.log_std)))
        standardised = self._deviation(actions) * inverse
        return standardised * inverse, standardised.square() - 1

    def fisher_product(self, *tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(dm / sigma^2, 2 ds) for tangents dm of the mean and ds of the log-std, each (B, T, A)."""
        mean_tangent, log_std_tangent = tangents
        return mean_tangent * torch.exp(-2 * self.log_std), 2 * log_std_tangent

    def mixed(self, other: DiagonalGaussian, weight: Tensor) -> DiagonalGaussian:
        """As for `Categorical`: a Gaussian whose precision, and precision times mean, are the weighted ones."""
        weight = weight.unsqueeze(-1)
        own, others = weight * torch.exp(-2 * self.log_std), (1 - weight) * torch.exp(-2 * other.log_std)
        precision = own + others
        return DiagonalGaussian((own * self.mean + others * other.mean) / precision, -0.5 * torch.log(precision))

    def detach(self) -> DiagonalGaussian:
        """A snapshot of the distribution, without graph; log_std is often a view of a parameter."""
        return DiagonalGaussian(self.mean.detach().clone(), self.log_std.detach().clone())

    def __getitem__(self, rows: Any) -> DiagonalGaussian:
        return DiagonalGaussian(self.mean[rows], self.log_std[rows])

    def _deviation(self, actions: Tensor) -> Tensor:
        # (N,) actions of one dimension beside (N, 1) means would broadcast to N x N without a word.
        # Several draws of every step, in further axes in front, are what they look like.
        if actions.shape[-self.mean.ndim :] != self.mean.shape:
            given, wanted = tuple(actions.shape), tuple(self.mean.shape)
            raise ValueError(f"actions of shape {given} for means of shape {wanted}: the last axis is the action's")
        return actions - self.mean.to(_precise(self.mean))


def _precise(x: Tensor) -> torch.dtype:
    """What log-probabilities are computed in: half precision has too few digits for a step's KL, which it may lose."""
    return torch.promote_types(x.dtype, torch.float32)


def require_members(distribution: Any, *names: str) -> None:
    """Check that what a policy returned has what is asked of it here, of all that `Distribution` names.

    Raises:
        TypeError: it has not; it names what is missing.
    """
    missing = [name for name in names if not hasattr(distribution, name)]
    if missing:
        kind = type(distribution)
        raise TypeError(
            f"the policy's distribution, a {kind.__module__}.{kind.__qualname__}, lacks {', '.join(missing)}; "
            "see lm_trust.core.Distribution"
        )


def per_step(function: Callable[..., Any], distributions: Sequence[Distribution], *tensors: Tensor) -> Any:
    """A function of several distributions and tensors at every step, in one go.

    Asking each distribution for each quantity would be the same, but a distribution that is too large to be held (a
    language model's vocabulary) then computes its probabilities anew for every question. Such a one has a `per_step`
    of its own, which applies the function to chunks of steps.

    Args:
        function: of the distributions and of the tensors, in this order, to one (B, T) tensor or to a tuple of them,
            each step's from that step alone. Detach what needs no gradient: for all others one is computed and kept.
        distributions: at the same (B, T) steps.
        tensors: (B, T, ...).
    """
    chunked = getattr(distributions[0], "per_step", None)
    return function(*distributions, *tensors) if chunked is None else chunked(function, distributions[1:], *tensors)


def kl_estimators(old_log_prob: Tensor, new_log_prob: Tensor) -> dict[str, Tensor]:
    """Single-sample estimators of KL(old || new) from actions drawn from old.

    Schulman, "Approximating KL Divergence" (2020), with r = new / old: k1 = -log r (unbiased), k2 = (log r)^2 / 2
    (biased, low variance), k3 = r - 1 - log r (unbiased, never negative). Bounds and reports of this
    library go by exact divergences; these serve where PPO-clip's `target_kl` is meant as others mean it, where only
    sampled tokens are known, and to be compared with others' logs.

    Args:
        old_log_prob: (B, T), nats.
        new_log_prob: (B, T), nats.

    Returns:
        {"k1", "k2", "k3"}, each (B, T) in nats per step.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: the two are not of one shape.
    """
    require_same_shape(old_log_prob=old_log_prob, new_log_prob=new_log_prob)
    log_ratio = new_log_prob - old_log_prob
    return {"k1": -log_ratio, "k2": 0.5 * log_ratio.square(), "k3": torch.expm1(log_ratio) - log_ratio}


def _expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Sum of p * value over the last axis, where p = 0 counts nothing even if the value is infinite."""
    # The infinite value is masked before the product: masked after it, its gradient would still be 0 * inf.
    return (probabilities * torch.where(probabilities > 0, values, 0.0)).sum(-1)

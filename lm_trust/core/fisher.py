"""Products with the Fisher matrix of a policy, never the matrix itself.

F is the Hessian, at the policy's present parameters theta_old, of the mean over valid steps of
KL(pi_theta_old || pi_theta).
Three routes to the same product, for an independent check of each and because not every model allows every derivative:

- `gauss_newton`: F = mean of J' M J, with J the Jacobian of the distribution's own parameters (logits, means, or a
  language model's last hidden states) and M the exact metric that the distribution knows (`fisher_product`). Both maps
  are those of `lm_trust.core.linearisation`, whose graph is kept: a product is one tangent pass and one backward.
- `kl_hessian`: the second derivative of the exact KL by double backward (Pearlmutter 1994), its graph kept as well.
- `finite_difference`: a forward difference of the KL's gradient. One gradient a product, exact only to about the square
  root of the arithmetic's precision, but it asks nothing of the model: any attention kernel, any wrapper.

At theta_old the three agree: the KL's gradient is zero there, so its Hessian has no term besides J' M J.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_trust.core.at_rest import at_rest
from lm_trust.core.distributions import Distribution, require_members
from lm_trust.core.linearisation import (
    NOT_TWICE,
    Linearisation,
    linearised,
    require_second_derivative,
    twice_differentiable,
)
from lm_trust.core.parameters import assign, flatten, trainable_parameters, unflatten
from lm_trust.core.passes import is_sharded, passes
from lm_trust.core.processes import placed_rows, summed
from lm_trust.core.rows import row_count, select_rows
from lm_trust.core.shapes import require_a_row_each, require_same_shape, require_tensors

METHODS = ("auto", "gauss_newton", "kl_hessian", "finite_difference")

Product = Callable[[Tensor], Tensor]
StepWeights = Callable[[Tensor], Tensor]  # of any (B, T) tensor, for its kind: the (B, T) weights of its steps


class FisherOperator:
    """v -> (F + damping I) v over the policy's P trainable parameters.

    It may keep what it computed at theta_old: once the policy has moved, make a new one. Where the run is spread over
    processes, F is of the rows of all of them, and each is given its own, if any.

    Args:
        policy: a module with `distribution(observations)`.
        observations: what the policy takes; B rows, selected by `[rows]` where only some are wanted and, without a
            mask, counted by `len`; of a dictionary or a tuple, the parts are.
        mask: (B, T) or (N,), True (or 1) at the steps that count; None counts all.
        damping: multiple of the identity that is added.
        method: see the module's text. "auto" is `gauss_newton`, or `finite_difference` where the policy's graph cannot
            be differentiated twice, as of one that is sharded; after the first product `method` names the one in use.
        linearisation: of the policy at these observations, where it was made already; for `gauss_newton`.
        microbatch_size: rows differentiated at a time. The graph is kept across products where one microbatch holds all
            rows, and rebuilt for each otherwise, so that memory does not grow with B.

    Raises:
        ValueError: an unknown method, one that a sharded policy cannot serve, a policy without trainable parameters, a
            mask of other rows, or none where the observations' parts are not of one number of rows; from a product, a
            mask that is not of the steps' shape or a vector that is not (P,).
    """

    def __init__(
        self,
        policy: nn.Module,
        observations: Any,
        *,
        mask: Tensor | None = None,
        damping: float = 0.1,
        method: str = "auto",
        linearisation: Linearisation | None = None,
        microbatch_size: int | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"unknown Fisher method {method!r}; choose one of {', '.join(METHODS)}")
        if is_sharded(policy) and method in ("gauss_newton", "kl_hessian"):
            raise ValueError(f"Fisher method {method!r}: {NOT_TWICE}: it is sharded")
        self.damping = damping
        self.method = "finite_difference" if is_sharded(policy) else method
        self._policy = policy
        self._parameters = trainable_parameters(policy)
        self._observations = observations
        if mask is not None:
            require_tensors(mask=mask)
            require_a_row_each(observations, mask=mask)
        self._mask = mask = None if mask is None else mask.bool()
        # Of all processes: rows where every step counts, steps otherwise.
        rows = row_count(observations) if mask is None else len(mask)
        self._count = placed_rows(rows).total if mask is None else summed(mask.sum()).clamp_min(1)
        self._chunks = passes(policy, rows, microbatch_size)
        self._kept: dict[str, Product] = {}
        if linearisation is not None:
            self._kept["gauss_newton"] = _gauss_newton_of(linearisation, self._parameters, self._weights(slice(None)))

    def __call__(self, vector: Tensor) -> Tensor:
        """(F + damping I) v, (P,)."""
        return self.undamped(vector) + self.damping * vector

    def undamped(self, vector: Tensor) -> Tensor:
        """F v, (P,)."""
        size = sum(parameter.numel() for parameter in self._parameters)
        if vector.shape != (size,):  # a column would broadcast to a matrix
            raise ValueError(f"a vector of shape {tuple(vector.shape)} for {size} trainable parameters")
        with torch.enable_grad(), at_rest(self._policy):
            return summed(self._own(vector))

    def _own(self, vector: Tensor) -> Tensor:
        """The part of F v that is of this process's rows."""
        if self.method != "auto":
            return self._product(self.method, vector)
        try:
            product = self._product("gauss_newton", vector)
            self.method = "gauss_newton"
        except RuntimeError as error:
            if not forbids_second_derivative(error):
                raise
            self._kept.clear()
            product = self._product("finite_difference", vector)
            self.method = "finite_difference"
        return product

    def _product(self, method: str, vector: Tensor) -> Tensor:
        linearise = {
            "gauss_newton": _gauss_newton,
            "kl_hessian": _kl_hessian,
            "finite_difference": _finite_difference,
        }[method]
        if len(self._chunks) == 1:
            if method not in self._kept:
                self._kept[method] = self._linearised(linearise, self._chunks[0])
            return self._kept[method](vector)
        total = torch.zeros_like(vector)
        for chunk in self._chunks:
            total += self._linearised(linearise, chunk)(vector)
        return total

    def _linearised(self, linearise: Callable[..., Product], rows: slice) -> Product:
        observations = self._observations if len(self._chunks) == 1 else select_rows(self._observations, rows)
        with twice_differentiable():
            return linearise(self._policy, observations, self._parameters, self._weights(rows))

    def _weights(self, rows: slice) -> StepWeights:
        """1 / N (N valid steps of all rows) a step, 0 where masked."""
        # Not of `self`: it keeps the products, and a cycle would hold their graphs until the collector comes by.
        mask, count = self._mask, self._count

        def weights(like: Tensor) -> Tensor:
            if mask is None:
                steps_a_row = like.numel() // max(len(like), 1)
                return torch.full_like(like, 1 / (count * steps_a_row))
            own = mask[rows]
            require_same_shape(mask=own, steps=like)
            return own.to(like.dtype) / count

        return weights


def _gauss_newton(
    policy: nn.Module, observations: Any, parameters: list[nn.Parameter], weights: StepWeights
) -> Product:
    return _gauss_newton_of(linearised(policy, observations), parameters, weights)


def _gauss_newton_of(linearisation: Linearisation, parameters: list[nn.Parameter], weights: StepWeights) -> Product:
    output, pushforward, pullback = linearisation
    distribution = output.detach()

    @torch.no_grad()
    def product(vector: Tensor) -> Tensor:
        moved = pushforward(unflatten(vector, parameters))
        return flatten(pullback(*_weighted_metric(distribution, moved, weights(moved[0][..., 0]))))

    return product


def _weighted_metric(distribution: Distribution, tangents: Sequence[Tensor], step_weights: Tensor) -> list[Tensor]:
    metric = distribution.fisher_product(*tangents)
    return [part * step_weights.unsqueeze(-1) for part in ((metric,) if isinstance(metric, Tensor) else metric)]


def _kl_hessian(policy: nn.Module, observations: Any, parameters: list[nn.Parameter], weights: StepWeights) -> Product:
    gradient = flatten(_kl_gradient(policy, observations, parameters, weights, create_graph=True))
    require_second_derivative([gradient])

    def product(vector: Tensor) -> Tensor:
        rows = torch.autograd.grad(gradient, parameters, vector, retain_graph=True, materialize_grads=True)
        return flatten(rows).detach()

    return product


def _finite_difference(
    policy: nn.Module, observations: Any, parameters: list[nn.Parameter], weights: StepWeights
) -> Product:
    theta = flatten([parameter.detach() for parameter in parameters])
    with torch.no_grad():
        found = policy.distribution(observations)
    require_members(found, "kl", "detach")
    old = found.detach()
    spacing = torch.finfo(theta.dtype).eps ** 0.5 * (1 + theta.norm())

    def product(vector: Tensor) -> Tensor:
        length = vector.norm()
        if length == 0:
            return torch.zeros_like(vector)
        step = spacing / length
        present = [parameter.detach().clone() for parameter in parameters]  # they may have moved on from theta_old
        try:
            assign(parameters, theta + step * vector)
            moved = flatten(_kl_gradient(policy, observations, parameters, weights, old=old))
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, present, strict=True):
                    parameter.copy_(value)
        # The gradient at theta_old is zero, so one evaluation is the whole difference.
        return moved.detach() / step

    return product


def _kl_gradient(
    policy: nn.Module,
    observations: Any,
    parameters: list[nn.Parameter],
    weights: StepWeights,
    *,
    old: Distribution | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Gradient of the weighted KL(old || policy); old is the policy itself, held fixed, where not given."""
    new = policy.distribution(observations)
    require_members(new, "kl", "detach")
    kl = (new.detach() if old is None else old).kl(new)
    step_weights = weights(kl)
    total = torch.where(step_weights > 0, step_weights * kl, 0.0).sum()
    return torch.autograd.grad(total, parameters, create_graph=create_graph, materialize_grads=True)


def forbids_second_derivative(error: RuntimeError) -> bool:
    """Whether it says that a graph cannot be differentiated twice: in our words, a kernel's or torch.compile's."""
    words = (NOT_TWICE, "not implemented", "double backward", "create_graph=False")
    return any(each in str(error) for each in words)

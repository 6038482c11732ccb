"""Products with the Fisher matrix of a policy, never the matrix itself.

F is the Hessian, at the policy's present parameters theta_old, of the mean over valid steps of
KL(pi_theta_old || pi_theta).
Three routes to the same product, for an independent check of each and because not every model allows every derivative:

- `gauss_newton`: F = mean of J' M J, with J the Jacobian of the distribution's own parameters (logits, means, or a
  language model's last hidden states) and M the exact metric that the distribution knows (`fisher_product`). J v is had
  from two backward passes ("double vjp") whose graph is kept, so that a product is one tangent pass and one backward;
  or from the policy itself, where it has a method `linearised` (see `lm_trust.core.linearisation`).
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from lm_trust.core.batch import row_chunks
from lm_trust.core.parameters import assign, flatten, trainable_parameters, unflatten

METHODS = ("auto", "gauss_newton", "kl_hessian", "finite_difference")

Product = Callable[[Tensor], Tensor]

_NOT_TWICE = "the policy's graph cannot be differentiated twice, use the method finite_difference"


class FisherOperator:
    """v -> (F + damping I) v over the policy's P trainable parameters.

    Args:
        policy: a module with `distribution(observations)`.
        observations: what the policy takes; B rows.
        mask: (B, T) or (N,), True at the steps that count; None counts all.
        damping: multiple of the identity that is added.
        method: see the module's text. "auto" is `gauss_newton`, or `finite_difference` where the policy's graph cannot
            be differentiated twice; after the first product `method` names the one in use.
        microbatch_size: rows differentiated at a time. The graph is kept across products where one microbatch holds all
            rows, and rebuilt for each otherwise, so that memory does not grow with B.

    Raises:
        ValueError: an unknown method, or a policy without trainable parameters.
    """

    def __init__(
        self,
        policy: nn.Module,
        observations: Any,
        *,
        mask: Tensor | None = None,
        damping: float = 0.1,
        method: str = "auto",
        microbatch_size: int | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"unknown Fisher method {method!r}; choose one of {', '.join(METHODS)}")
        self.damping = damping
        self.method = method
        self._policy = policy
        self._parameters = trainable_parameters(policy)
        self._observations = observations
        self._mask = mask
        self._chunks = list(row_chunks(len(observations), microbatch_size))
        self._kept: dict[str, Product] = {}

    def __call__(self, vector: Tensor) -> Tensor:
        """(F + damping I) v, (P,)."""
        return self.undamped(vector) + self.damping * vector

    def undamped(self, vector: Tensor) -> Tensor:
        """F v, (P,)."""
        with torch.enable_grad():
            if self.method != "auto":
                return self._product(self.method, vector)
            try:
                product = self._product("gauss_newton", vector)
                self.method = "gauss_newton"
            except RuntimeError as error:
                if not _forbids_second_derivative(error):
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
        observations = self._observations if len(self._chunks) == 1 else self._observations[rows]
        # The fused attention kernels have no second derivative; the plain one has. No effect on other policies.
        with sdpa_kernel(SDPBackend.MATH):
            return linearise(self._policy, observations, self._parameters, self._weights(rows))

    def _weights(self, rows: slice) -> Callable[[Tensor], Tensor]:
        """Per-step weights 1 / N (N valid steps of all rows), 0 where masked, given any (B, T) tensor for its kind."""

        def weights(like: Tensor) -> Tensor:
            if self._mask is None:
                steps_a_row = like.numel() // max(len(like), 1)
                return torch.full_like(like, 1 / (len(self._observations) * steps_a_row))
            return self._mask[rows].to(like.dtype) / self._mask.sum().clamp_min(1)

        return weights


def _gauss_newton(policy: nn.Module, observations: Any, parameters: list[nn.Parameter], weights: Callable) -> Product:
    if hasattr(policy, "linearised") and all(parameter.requires_grad for parameter in policy.parameters()):
        return _gauss_newton_without_autograd(policy, observations, parameters, weights)
    distribution = policy.distribution(observations)
    fixed = distribution.detach()
    outputs = distribution.parameters
    live = [output for output in outputs if output.requires_grad]
    # The pullback w -> J' w is linear in the dummy w, so differentiating it once more along v gives J v.
    dummies = [torch.zeros_like(output, requires_grad=True) for output in live]
    pullback = torch.autograd.grad(live, parameters, dummies, create_graph=True, materialize_grads=True)
    _require_second_derivative(pullback)
    step_weights = weights(outputs[0].detach()[..., 0])

    def product(vector: Tensor) -> Tensor:
        tangents = iter(
            torch.autograd.grad(
                pullback, dummies, unflatten(vector, parameters), retain_graph=True, materialize_grads=True
            )
        )
        moved = [next(tangents) if output.requires_grad else torch.zeros_like(output) for output in outputs]
        with torch.no_grad():
            weighted = _weighted_metric(fixed, moved, step_weights)
            cotangents = [part for part, output in zip(weighted, outputs, strict=True) if output.requires_grad]
        return flatten(torch.autograd.grad(live, parameters, cotangents, retain_graph=True, materialize_grads=True))

    return product


def _gauss_newton_without_autograd(
    policy: nn.Module, observations: Any, parameters: list[nn.Parameter], weights: Callable
) -> Product:
    """The same from a policy's own pushforward and pullback."""
    distribution, pushforward, pullback = policy.linearised(observations)
    step_weights = weights(distribution.parameters[0][..., 0])

    @torch.no_grad()
    def product(vector: Tensor) -> Tensor:
        moved = pushforward(unflatten(vector, parameters))
        return flatten(pullback(*_weighted_metric(distribution, moved, step_weights)))

    return product


def _weighted_metric(distribution: Any, tangents: Sequence[Tensor], step_weights: Tensor) -> list[Tensor]:
    metric = distribution.fisher_product(*tangents)
    return [part * step_weights.unsqueeze(-1) for part in ((metric,) if isinstance(metric, Tensor) else metric)]


def _kl_hessian(policy: nn.Module, observations: Any, parameters: list[nn.Parameter], weights: Callable) -> Product:
    gradient = flatten(_kl_gradient(policy, observations, parameters, weights, create_graph=True))
    _require_second_derivative([gradient])

    def product(vector: Tensor) -> Tensor:
        rows = torch.autograd.grad(gradient, parameters, vector, retain_graph=True, materialize_grads=True)
        return flatten(rows).detach()

    return product


def _finite_difference(
    policy: nn.Module, observations: Any, parameters: list[nn.Parameter], weights: Callable
) -> Product:
    start = [parameter.detach().clone() for parameter in parameters]
    theta = flatten(start)
    with torch.no_grad():
        old = policy.distribution(observations).detach()
    spacing = torch.finfo(theta.dtype).eps ** 0.5 * (1 + theta.norm())

    def product(vector: Tensor) -> Tensor:
        length = vector.norm()
        if length == 0:
            return torch.zeros_like(vector)
        step = spacing / length
        try:
            assign(parameters, theta + step * vector)
            moved = flatten(_kl_gradient(policy, observations, parameters, weights, old=old))
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
        # The gradient at theta_old is zero, so one evaluation is the whole difference.
        return moved.detach() / step

    return product


def _kl_gradient(
    policy: nn.Module,
    observations: Any,
    parameters: list[nn.Parameter],
    weights: Callable,
    *,
    old: Any = None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Gradient of the weighted KL(old || policy); old is the policy itself, held fixed, where not given."""
    new = policy.distribution(observations)
    kl = (new.detach() if old is None else old).kl(new)
    step_weights = weights(kl)
    total = torch.where(step_weights > 0, step_weights * kl, 0.0).sum()
    return torch.autograd.grad(total, parameters, create_graph=create_graph, materialize_grads=True)


def _require_second_derivative(gradients: Sequence[Tensor]) -> None:
    """Refuse a gradient whose graph is cut: `once_differentiable` operations drop out of J v without a word.

    Raises:
        RuntimeError: autograd put the node there that stands for such a cut.
    """
    waiting = [gradient.grad_fn for gradient in gradients if gradient.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if "Error" in node.name():
            raise RuntimeError(f"{_NOT_TWICE}: an operation of the policy is marked once_differentiable")
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _forbids_second_derivative(error: RuntimeError) -> bool:
    message = str(error)
    return _NOT_TWICE in message or "not implemented" in message

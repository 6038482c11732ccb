"""The distribution over the vocabulary, computed from hidden states in chunks of tokens.

All logits of a batch are never held at once: a chunk of tokens goes through the head, gives its log-probabilities,
entropies or divergences, and is dropped. A per-token scalar needs only one gradient vector a token, of the hidden
size, so that vector is computed while the chunk's logits are there and kept for the backward pass; nothing is
recomputed. Memory is tokens x hidden size plus one chunk x V, where a plain head holds tokens x V several times over.

Where the head itself is trained (no adapter, all weights move), a token's gradient by its weight is no single vector;
then a chunk's logits are computed once more in the backward pass, with the same memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from lm_trust.core.distributions import Categorical

CHUNK_ELEMENTS = 2**24  # logits in flight at a time: 64 MiB in float32
# Probabilities that are kept from one Fisher product to the next, at most: 256 MiB in float32, a small part of what the
# graph of a transformer over the same tokens takes.
KEPT_ELEMENTS = 2**26


class VocabularyCategorical:
    """Categorical over V tokens at each of (B, T) steps, held as hidden states and a head.

    Serves the core like `Categorical`. Its own parameters, in which the Fisher metric is taken, are the hidden states
    where the head is frozen, and the logits where it is trained. The logits are
    (hidden @ weight.T + bias) / temperature.

    Args:
        hidden: (B, T, H) last hidden states, after the final norm.
        weight: (V, H).
        bias: (V,) or None.
        temperature: of sampling; the distribution that is scored is the one that samples.
        trained: whether the head is; None: where its weight or bias requires a gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        *,
        trained: bool | None = None,
    ) -> None:
        self.hidden = hidden
        self._weight = weight
        self._bias = bias
        self._temperature = temperature
        self._trained = self._has_live_head if trained is None else trained
        self._kept_probabilities: list[Tensor] = []  # of each chunk, for the next Fisher product

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self._logits(self.hidden) if self._trained else self.hidden,)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of tokens (B, T), in nats."""
        return self.per_step(lambda own, tokens: own.log_prob(tokens), (), actions)

    def entropy(self) -> Tensor:
        """(B, T) entropy in nats per token, over the whole vocabulary."""
        return self.per_step(lambda own: own.entropy(), ())

    def kl(self, other: VocabularyCategorical) -> Tensor:
        """KL(self || other), exact over the whole vocabulary, (B, T) in nats per token; differentiable in both."""
        return self.per_step(lambda own, others: own.kl(others), (other,))

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B, T) tokens."""
        return self._gather(lambda chunk: chunk.sample(generator))

    @torch.no_grad()
    def mode(self) -> Tensor:
        """(B, T) most likely tokens."""
        return self._gather(lambda chunk: chunk.mode())

    @torch.no_grad()
    def fisher_product(self, *tangents: Tensor) -> Tensor:
        """The metric in `parameters`, applied to a tangent u of theirs.

        Of the logits, (diag(p) - p p') u, (B, T, V); of the hidden states, W' (diag(p) - p p') W u / temperature^2,
        (B, T, H).
        """
        (tangent,) = tangents
        flat = tangent.reshape(-1, tangent.shape[-1])
        product = torch.empty_like(flat)
        for rows, probabilities in self._probabilities():
            if self._trained:
                product[rows] = _centred(probabilities * flat[rows], probabilities)
            else:
                moved = F.linear(flat[rows], self._weight).mul_(probabilities)
                product[rows] = (_centred(moved, probabilities) @ self._weight).div_(self._temperature**2)
        return product.view_as(tangent)

    def detach(self) -> VocabularyCategorical:
        """A snapshot of the distribution, without graph."""
        bias = None if self._bias is None else _frozen(self._bias)
        return VocabularyCategorical(
            self.hidden.detach().clone(), _frozen(self._weight), bias, self._temperature, trained=self._trained
        )

    def dense(self) -> Categorical:
        """The same distribution as a plain `Categorical` that holds all logits, (B, T, V)."""
        return Categorical(self._logits(self.hidden))

    def __getitem__(self, rows: Any) -> VocabularyCategorical:
        return VocabularyCategorical(
            self.hidden[rows], self._weight, self._bias, self._temperature, trained=self._trained
        )

    @property
    def _has_live_head(self) -> bool:
        return self._weight.requires_grad or (self._bias is not None and self._bias.requires_grad)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self._weight, self._bias)
        return logits if self._temperature == 1.0 else logits / self._temperature

    def _chunks(self) -> Iterator[slice]:
        tokens = self.hidden.shape[:-1].numel()
        size = max(1, CHUNK_ELEMENTS // len(self._weight))
        for start in range(0, max(tokens, 1), size):  # without tokens: one chunk, empty
            yield slice(start, min(start + size, tokens))

    def _chunk(self, rows: slice) -> Categorical:
        return Categorical(self._logits(self.hidden.reshape(-1, self.hidden.shape[-1])[rows]))

    def _probabilities(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk with its (tokens, V) probabilities, which are kept where they are few."""
        kept = self._kept_probabilities
        fits = self.hidden.shape[:-1].numel() * len(self._weight) <= KEPT_ELEMENTS
        for number, rows in enumerate(self._chunks()):
            if number < len(kept):
                yield rows, kept[number]
                continue
            probabilities = self._chunk(rows).log_probs.exp()
            if fits:
                kept.append(probabilities)
            yield rows, probabilities

    def _gather(self, function: Callable[[Categorical], Tensor]) -> Tensor:
        return torch.cat([function(self._chunk(rows)) for rows in self._chunks()]).view(self.hidden.shape[:-1])

    def per_step(
        self, function: Callable[..., Any], others: Sequence[VocabularyCategorical], *tensors: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """`lm_trust.core.distributions.per_step`, a chunk of tokens at a time; its logits are computed once."""
        distributions = (self, *others)
        flat = [tensor.reshape(-1, *tensor.shape[self.hidden.ndim - 1 :]) for tensor in tensors]
        is_tuple = False

        def chunk(rows: slice, *hidden: Tensor) -> tuple[Tensor, ...]:
            own = [Categorical(d._logits(state)) for d, state in zip(distributions, hidden, strict=True)]
            nonlocal is_tuple
            values = function(*own, *(tensor[rows] for tensor in flat))
            is_tuple = isinstance(values, tuple)
            return values if is_tuple else (values,)

        hidden = [distribution.hidden for distribution in distributions]
        if torch.is_grad_enabled() and any(distribution._has_live_head for distribution in distributions):
            flat_hidden = [state.reshape(-1, state.shape[-1]) for state in hidden]
            parts = [
                checkpoint(
                    chunk, rows, *(state[rows] for state in flat_hidden), use_reentrant=False, preserve_rng_state=False
                )
                for rows in self._chunks()
            ]
            values = tuple(torch.cat(part).view(self.hidden.shape[:-1]) for part in zip(*parts, strict=True))
        else:
            values = _PerToken.apply(chunk, list(self._chunks()), *hidden)
        return values if is_tuple else values[0]


def _centred(weighted: Tensor, probabilities: Tensor) -> Tensor:
    """(diag(p) - p p') u from p * u, in place, (tokens, V)."""
    return weighted.addcmul_(probabilities, weighted.sum(-1, keepdim=True), value=-1)


# The copies of heads that are still in use: a batch is cut into many snapshots of the same weight.
_COPIES = WeakTensorKeyDictionary()


def _frozen(tensor: Tensor) -> Tensor:
    """The head's tensor as it is now, safe from the steps that move it; one copy for all who ask before it moves."""
    if not tensor.requires_grad:
        return tensor
    last = _COPIES.get(tensor, lambda: None)()
    # By content: a fused optimizer moves a parameter without counting it as a new version.
    if last is None or (last.dtype, last.device) != (tensor.dtype, tensor.device) or not torch.equal(last, tensor):
        last = tensor.detach().clone()
        _COPIES[tensor] = weakref.ref(last)
    return last


class _PerToken(torch.autograd.Function):
    """Chunked evaluation of per-token scalars of hidden states, with each token's gradients kept from the forward.

    One gradient is kept for each pair of an output that has a graph and an input that needs one.
    """

    @staticmethod
    def forward(ctx: Any, chunk: Callable[..., Any], chunks: list[slice], *hidden: Tensor) -> tuple[Tensor, ...]:
        needed = [index for index, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        flat = [state.reshape(-1, state.shape[-1]) for state in hidden]
        values: list[tuple[Tensor, ...]] = []
        gradients: dict[tuple[int, int], Tensor] = {}
        for rows in chunks:
            inputs = [state[rows].detach() for state in flat]
            for index in needed:
                inputs[index].requires_grad_()
            with torch.set_grad_enabled(bool(needed)):
                outputs = chunk(rows, *inputs)
            values.append(tuple(output.detach() for output in outputs))
            live = [number for number, output in enumerate(outputs) if output.requires_grad]
            for number in live:
                parts = torch.autograd.grad(
                    outputs[number],
                    [inputs[index] for index in needed],
                    torch.ones_like(outputs[number]),
                    retain_graph=number != live[-1],
                    materialize_grads=True,
                )
                for index, part in zip(needed, parts, strict=True):
                    if (number, index) not in gradients:
                        gradients[number, index] = torch.empty_like(flat[index])
                    gradients[number, index][rows] = part
        ctx.kept = list(gradients)
        ctx.save_for_backward(*(part.view_as(hidden[index]) for (_, index), part in gradients.items()))
        ctx.set_materialize_grads(False)
        result = tuple(torch.cat(parts).view(hidden[0].shape[:-1]) for parts in zip(*values, strict=True))
        differentiated = {number for number, _ in gradients}
        ctx.mark_non_differentiable(*(each for number, each in enumerate(result) if number not in differentiated))
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        # Autograd would take the kept gradients for constants, and a second derivative would lack their part.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked vocabulary head is differentiable once, its graph cannot be differentiated twice; "
                "take `dense()`"
            )
        result: list[Any] = [None] * len(ctx.needs_input_grad)
        for (number, index), gradient in zip(ctx.kept, ctx.saved_tensors, strict=True):
            if upstream[number] is not None:
                part = gradient * upstream[number].unsqueeze(-1)
                result[2 + index] = part if result[2 + index] is None else result[2 + index] + part
        return tuple(result)

"""What an update maximises, and the two exact KLs that bound it, measured on one batch.

The surrogate E[pi(a|s) / pi_old(a|s) A], the step KL(pi_old || pi) and, where there is a reference, the reference
KL(pi || reference): at theta_old with gradients, at candidates without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lm_trust.core.at_rest import at_rest
from lm_trust.core.batch import row_chunks
from lm_trust.core.distributions import Distribution, per_step, require_members
from lm_trust.core.linearisation import Linearisation, Pullback, linearised_by_autograd
from lm_trust.core.parameters import flatten
from lm_trust.core.passes import passes
from lm_trust.core.processes import largest, placed_rows, summed
from lm_trust.core.rows import select_rows
from lm_trust.core.shapes import require_a_row_each, require_a_step_each
from lm_trust.core.surrogate import ratio

RowIndex = slice | Tensor  # of a batch: a range, or indices


class Measurement(NamedTuple):
    """A policy beside theta_old, on all valid steps of a batch.

    Attributes:
        gain: of the objective over theta_old.
        step_kl, step_kl_max: mean and maximum exact KL(old || new), nats per step.
        reference_kl: exact KL(new || reference), nats per row (sequence); None where no reference is looked at.
    """

    gain: float
    step_kl: float
    step_kl_max: float
    reference_kl: float | None

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in self if value is not None)

    def improves(self, price: float = 0.0, least: float = 0.0) -> bool:
        """Whether the gain, less price * step_kl_max, is positive and at least `least`."""
        worth = self.gain - price * self.step_kl_max
        return worth > 0 and worth >= least


class _Steps(NamedTuple):
    """The steps that a mean is over: their mask, None for all valid ones, and how many they are in all processes."""

    mask: Tensor | None
    count: Tensor

    @classmethod
    def among(cls, mask: Tensor) -> _Steps:
        return cls(mask, summed(mask.sum()).clamp_min(1))

    def mean(self, x: Tensor, rows: RowIndex) -> Tensor:
        """Sum of the values of some rows, zero where not valid, over the number of all rows' steps; in float64."""
        counted = x if self.mask is None else torch.where(self.mask[rows], x, 0.0)
        return counted.sum(dtype=torch.float64) / self.count


class SurrogateObjective:
    """The surrogate at theta_old and at candidates, with the exact KLs, over all valid steps of a batch.

    Where the run is spread over processes the batch is all of theirs, and each is given its own rows of it.

    objective = mean over valid steps of ratio * advantage - reference_loss * KL(pi_theta || reference).

    It holds the distribution at theta_old, by one differentiated pass there or as it is given; candidates are measured
    against it.

    Args:
        policy, observations, actions, advantages, mask: as for `trust_region_step`.
        reference: a fixed distribution at the same steps.
        reference_loss: weight of the exact KL to it, in objective units per nat.
        bounded: look at the reference KL also where it has no weight, and differentiate it.
        holdout_fraction: share of the rows, the last ones, that the gradient is not taken on and that alone the gain is
            measured on; 0: both are of all rows. The KLs always are.
        microbatch_size: rows computed at a time; the sums are those of the whole batch.

    Attributes:
        placed: where these rows stand in the batch.
        reference_kl: at theta_old, nats per row: the sum over a row's valid steps, its mean over rows; None where no
            reference is looked at.
        reference_gradient: (P,) its gradient there, where `bounded`.
        linearisation: of the policy there, at the rows that `gradient` was asked to linearise.
        candidates: how often `measure` was asked, each time a forward pass over the batch.

    Raises:
        TypeError: actions, advantages or mask are no tensors.
        ValueError: they do not belong together, a reference is to count and there is none, or `holdout_fraction` leaves
            no row on one side.
    """

    def __init__(
        self,
        policy: nn.Module,
        observations: Any,
        actions: Tensor,
        advantages: Tensor,
        *,
        mask: Tensor | None = None,
        reference: Distribution | None = None,
        reference_loss: float = 0.0,
        bounded: bool = False,
        holdout_fraction: float = 0.0,
        microbatch_size: int | None = None,
    ) -> None:
        if (bounded or reference_loss) and reference is None:
            raise ValueError("a weight or a bound of the reference KL needs a reference distribution in the batch")
        require_a_step_each(actions, advantages=advantages, **({} if mask is None else {"mask": mask}))
        self.policy = policy
        self.mask = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask.bool()
        require_a_row_each(observations, actions=actions)
        self.reference_kl: float | None = None
        self.reference_gradient: Tensor | None = None
        self.linearisation: Linearisation | None = None
        self.candidates = 0
        self._observations = observations
        self._actions = actions if mask is None else _possible(actions, self.mask)
        self._advantages = torch.where(self.mask, advantages, 0.0)
        self._reference = reference if reference_loss or bounded else None
        self._reference_loss = reference_loss
        self._bounded = bounded
        self.placed = placed_rows(len(actions))
        self._valid = _Steps.among(self.mask)._replace(mask=None)
        # The steps that the gradient and the gain are means over.
        self._learnt, self._judged = self._split(holdout_fraction) if holdout_fraction else (self._valid, self._valid)
        self._microbatch_size = microbatch_size
        self._chunks: list[RowIndex] = list(passes(policy, len(actions), microbatch_size))
        self._linearised: RowIndex | None = None  # one of the chunks
        self._old: list[Distribution] = []
        self._start = 0.0

    @property
    def steps_per_row(self) -> float:
        """Mean number of valid steps in a row: what a mean over steps is multiplied by to be one a row."""
        return self._valid.count.item() / max(self.placed.total, 1)

    @torch.no_grad()
    def start_from(self, old: Distribution) -> None:
        """Take `old` (B rows, detached) as theta_old's distribution, for a rule that needs no gradient from here."""
        self._old, self._start, self.reference_kl = [old[rows] for rows in self._chunks], 0.0, None
        for rows, piece in zip(self._chunks, self._old, strict=True):
            self._add_to_start(rows, *self._per_step(_at_start, rows, piece))
        self._sum_start()

    def gradient(self, parameters: list[nn.Parameter], *, linearise: RowIndex | None = None) -> Tensor:
        """(P,) gradient of the objective at the present parameters, which become theta_old.

        Where the reference KL is bounded, `reference_gradient` is filled in from the same pass.

        Args:
            parameters: the policy's trainable ones.
            linearise: rows at which the policy is also linearised, by the same passes; they are one chunk, whatever
                the microbatch size.
        """
        self._old, self._start, self.reference_kl, self.reference_gradient = [], 0.0, None, None
        self.linearisation = self._linearised = None
        if linearise is not None:
            self._set_apart(linearise)
        totals: list[Tensor] = []
        for rows in self._chunks:
            pullback = None
            with torch.enable_grad(), at_rest(self.policy):
                if rows is self._linearised:
                    self.linearisation = linearised_by_autograd(self.policy, self._select(rows))
                    distribution, _, pullback = self.linearisation
                else:
                    distribution = self.policy.distribution(self._select(rows))
                    require_members(distribution, "log_prob", "kl", "detach")
                objective, *reference = self._per_step(_at_start, rows, distribution)
                wanted = [self._learnt.mean(objective, rows)]
                if self._bounded:
                    wanted += [self._valid.mean(each, rows) for each in reference]
                gradients = [
                    _gradient(value, parameters, distribution, pullback, keep=index + 1 < len(wanted))
                    for index, value in enumerate(wanted)
                ]
            self._old.append(distribution.detach())
            self._add_to_start(rows, objective, *reference)
            totals = [a + b for a, b in zip(totals, gradients, strict=True)] if totals else gradients
        self._sum_start()
        if not totals:  # without a row of its own
            totals = [torch.zeros_like(flatten(parameters))] * (1 + self._bounded)
        if self._bounded:
            self.reference_gradient = summed(totals[1]) * self.steps_per_row
        return summed(totals[0])

    @torch.no_grad()
    def measure(self) -> Measurement:
        """The present parameters beside theta_old."""
        self.candidates += 1
        value, mean_kl, max_kl, reference_kl = 0.0, 0.0, 0.0, 0.0
        for rows, old in zip(self._chunks, self._old, strict=True):
            with at_rest(self.policy):
                distribution = self.policy.distribution(self._select(rows))
            objective, kl, *reference = self._per_step(_at_candidate, rows, distribution, old)
            value += self._judged.mean(objective, rows).item()
            mean_kl += self._valid.mean(kl, rows).item()
            furthest = kl.max().item() if kl.numel() else 0.0
            max_kl = furthest if math.isnan(furthest) else max(max_kl, furthest)
            reference_kl += sum(self._valid.mean(each, rows).item() for each in reference)
        value, mean_kl, reference_kl = self._total(value, mean_kl, reference_kl)
        max_kl = largest(self._numbers(max_kl)).item()
        per_row = None if self._reference is None else reference_kl * self.steps_per_row
        # Of steps that hardly move, the rounding of the mean may go below zero, as that of the maximum does above.
        return Measurement(value - self._start, max(mean_kl, 0.0), max_kl, per_row)

    def _split(self, holdout_fraction: float) -> tuple[_Steps, _Steps]:
        """The valid steps of the first rows and those of the last."""
        first, count, total = self.placed
        learnt = total - round(total * holdout_fraction)
        if not 0 < learnt < total:
            raise ValueError(f"holdout_fraction {holdout_fraction:g} leaves no row of {total} on one side")
        heldout = (torch.arange(first, first + count) >= learnt).to(self.mask.device)
        heldout = heldout.view(-1, *[1] * (self.mask.ndim - 1))
        return _Steps.among(self.mask & ~heldout), _Steps.among(self.mask & heldout)

    def _set_apart(self, rows: RowIndex) -> None:
        """Make the rows the last chunk: its graph is kept, and so it is alone then."""
        indices = torch.arange(len(self._actions))
        others = indices[~torch.isin(indices, indices[rows])]
        pieces = row_chunks(len(others), self._microbatch_size) if len(others) else []
        self._chunks, self._linearised = [*(others[piece] for piece in pieces), rows], rows

    def _add_to_start(self, rows: RowIndex, objective: Tensor, reference_kl: Tensor | None = None) -> None:
        self._start += self._judged.mean(objective, rows).item()
        if reference_kl is not None:
            here = self._valid.mean(reference_kl, rows).item() * self.steps_per_row
            self.reference_kl = (self.reference_kl or 0.0) + here

    def _sum_start(self) -> None:
        """Over the processes."""
        self._start, reference_kl = self._total(self._start, self.reference_kl or 0.0)
        self.reference_kl = None if self._reference is None else reference_kl

    def _total(self, *numbers: float) -> list[float]:
        return summed(self._numbers(*numbers)).tolist()

    def _numbers(self, *numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self.mask.device)

    def _per_step(
        self, function: Callable[..., Any], rows: RowIndex, *distributions: Distribution
    ) -> tuple[Tensor, ...]:
        if self._reference is not None:
            distributions = (*distributions, self._reference[rows])
            function = partial(function, reference_loss=self._reference_loss, bounded=self._bounded)
        values = per_step(
            lambda *given: function(given[: len(distributions)], *given[len(distributions) :]),
            distributions,
            self._actions[rows],
            self._advantages[rows],
            self.mask[rows],
        )
        return values if isinstance(values, tuple) else (values,)

    def _select(self, rows: RowIndex) -> Any:
        return self._observations if len(self._chunks) == 1 else select_rows(self._observations, rows)


def _possible(actions: Tensor, mask: Tensor) -> Tensor:
    """The actions with a real one where masked, as a distribution may fail on what stands there: a label of -100."""
    if mask.all():
        return actions
    some = actions[mask][:1].sum(0)  # of none: 0
    return torch.where(mask.view(*mask.shape, *[1] * (actions.ndim - mask.ndim)), actions, some)


def _gradient(
    value: Tensor, parameters: list[nn.Parameter], distribution: Distribution, pullback: Pullback | None, *, keep: bool
) -> Tensor:
    """(P,) gradient of a value of the distribution, through its pullback where there is one."""
    if pullback is not None:
        outputs = distribution.parameters
        live = [each for each in outputs if each.requires_grad]
        found = torch.autograd.grad(value, live, retain_graph=True, allow_unused=True)
        # A vocabulary head that is trained makes its logits anew each time: no value knows those.
        if all(cotangent is not None for cotangent in found):
            given = iter(found)
            cotangents = [next(given) if each.requires_grad else torch.zeros_like(each) for each in outputs]
            return flatten(pullback(*cotangents))
        keep = True
    return flatten(torch.autograd.grad(value, parameters, retain_graph=keep, materialize_grads=True))


def _at_start(
    distributions: Sequence[Distribution],
    actions: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference_loss: float = 0.0,
    bounded: bool = False,
) -> tuple[Tensor, ...]:
    """Each step's objective where the policy is theta_old: the ratio is 1, its gradient that of log_prob."""
    new, *reference = distributions
    log_prob = new.log_prob(actions)
    objective, *reference_kl = _objective(new, log_prob.detach(), log_prob, advantages, mask, reference, reference_loss)
    return objective, *(each if bounded else each.detach() for each in reference_kl)


def _at_candidate(
    distributions: Sequence[Distribution],
    actions: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference_loss: float = 0.0,
    bounded: bool = False,
) -> tuple[Tensor, ...]:
    """The objective and the step KL of each step, and its reference KL."""
    new, old, *reference = distributions
    objective, *reference_kl = _objective(
        new, old.log_prob(actions), new.log_prob(actions), advantages, mask, reference, reference_loss
    )
    return objective, torch.where(mask, old.kl(new), 0.0), *reference_kl


def _objective(
    new: Distribution,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference: Sequence[Distribution],
    reference_loss: float,
) -> tuple[Tensor, ...]:
    if log_prob.shape != advantages.shape:  # they would broadcast to another mean
        given, wanted = tuple(advantages.shape), tuple(log_prob.shape)
        raise ValueError(f"advantages of shape {given} for steps of shape {wanted}: one of each a step")
    # A masked step may hold anything; a log-ratio of zero keeps it out of the value and of the gradient.
    objective = ratio(torch.where(mask, old_log_prob, 0.0), torch.where(mask, log_prob, 0.0)) * advantages
    divergences = [new.kl(other) for other in reference]
    if reference_loss:
        for kl in divergences:
            objective = objective - reference_loss * kl
    return tuple(torch.where(mask, each, 0.0) for each in (objective, *divergences))

"""The data that both worlds hand to the learner: a `Rollout` as collected, a `Batch` as an update rule sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lm_trust.core.distributions import Distribution
from lm_trust.core.rows import select_rows
from lm_trust.core.shapes import require_a_step_each


@dataclass
class Rollout:
    """One iteration's experience: B rows (environments or sequences) of T steps.

    Attributes:
        observations: what `policy.distribution` takes; rows are selected with `[rows]` (of a dictionary or a tuple, its
            parts'), and it has a length.
        actions: (B, T) or (B, T, A), as sampled (never clipped).
        rewards: (B, T), what the learner optimises; control may have scaled them.
        terminated: (B, T) bool, a true end.
        truncated: (B, T) bool, an outside limit.
        mask: (B, T) bool, True at real actions.
        critic_inputs: what the critic's network takes at each step, (B, T, ...); None where there is no critic.
        next_critic_inputs: the same for the state that each action led to, (B, T, ...).
        old: the distribution that sampled, detached; None where the policy is to compute it from the observations.
        reference: the frozen reference policy's distribution at the same steps, where there is one.
        engine_log_prob: (B, T) log-probabilities by which a generation engine drew the actions, nats; None where they
            were drawn from the policy's own distribution.
        group_size: consecutive rows that share a prompt.
        whole_sequences: True where rows are sequences that a minibatch must not cut.
        metrics: the world's own numbers for the log, unscaled.
        samples: what people may read of each row, B values a column; empty in a world where there is nothing to read.
    """

    observations: Any
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    mask: Tensor
    critic_inputs: Tensor | None = None
    next_critic_inputs: Tensor | None = None
    old: Distribution | None = None
    reference: Distribution | None = None
    engine_log_prob: Tensor | None = None
    group_size: int = 1
    whole_sequences: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list] = field(default_factory=dict)


@dataclass
class Batch:
    """What an update rule sees. Rows are sequences in the language world and single steps in the control world.

    Attributes:
        observations: as in `Rollout`.
        actions: (B, T), (B, T, A), (N,) or (N, A); possible ones where masked, too.
        old: the distribution that sampled, detached.
        old_log_prob: its log-probability of the actions, nats per step.
        advantages: like old_log_prob.
        mask: like old_log_prob, True (or 1) at real actions, held as bool; None where every step is real.
        reference: the reference policy's distribution, where there is one.
        progress: fraction of the training done, 0 to 1, for schedules.

    Raises:
        TypeError: what is to be a tensor is something else.
        ValueError: shapes that do not belong together.
    """

    observations: Any
    actions: Tensor
    old: Distribution
    old_log_prob: Tensor
    advantages: Tensor
    mask: Tensor | None
    reference: Distribution | None = None
    progress: float = 0.0

    def __post_init__(self) -> None:
        if self.mask is not None:  # a tokenizer's is of integers, which would select rows
            self.mask = self.mask.bool()
        masked = {} if self.mask is None else {"mask": self.mask}
        require_a_step_each(self.actions, advantages=self.advantages, old_log_prob=self.old_log_prob, **masked)

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, rows: Any) -> Batch:
        """The batch of the chosen rows."""
        return Batch(
            observations=select_rows(self.observations, rows),
            actions=self.actions[rows],
            old=self.old[rows],
            old_log_prob=self.old_log_prob[rows],
            advantages=self.advantages[rows],
            mask=None if self.mask is None else self.mask[rows],
            reference=None if self.reference is None else self.reference[rows],
            progress=self.progress,
        )

    def flattened(self) -> Batch:
        """The N real steps of (B, T) as single rows, for policies without memory. Observations are a tensor."""
        real = torch.ones_like(self.advantages, dtype=torch.bool) if self.mask is None else self.mask
        return replace(self[real], mask=None)


def row_chunks(count: int, size: int | None) -> Iterator[slice]:
    """Slices that cover `count` rows, `size` at a time; one slice where size is None.

    Raises:
        ValueError: a size below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"{size} rows at a time: a microbatch has at least 1")
    size = count if size is None else size
    for start in range(0, count, max(size, 1)):
        yield slice(start, min(start + size, count))


def spread_rows(count: int, fraction: float) -> Tensor:
    """Indices of a share of the rows, evenly spread and at least one: a subset that needs no random draw."""
    chosen = max(1, round(count * fraction))
    return torch.arange(chosen) * count // chosen

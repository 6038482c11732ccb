"""PPO whose clip looks at the divergence and not at the ratio: DPPO (Qi et al. 2026, "Rethinking the Trust Region in
LLM Reinforcement Learning", arXiv 2602.04879), as follows.

The mean of ratio * advantage is maximised by minibatch Adam, and a step has no part in it where its divergence D(old,
new) is over a threshold while its ratio is already beyond 1 in the direction that its advantage pulls to. PPO's clip is
the same with |ratio - 1| as the divergence: a noisy one, too strict on rare actions and too lax on frequent ones.

D is KL(old || new) or the total variation, over all actions (exact), or over the k likeliest and the rest together
(the paper's top-k); k = 1 is the taken action against all others (the paper's binary).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lm_trust.core.distributions import Categorical, Distribution
from lm_trust.core.surrogate import ratio
from lm_trust.errors import UserError
from lm_trust.updates.adam_rule import AdamRule
from lm_trust.updates.coarse import coarse


class DivergenceMask(AdamRule):
    """The surrogate without the steps that have moved too far and would go on.

    Args:
        divergence: "kl", or "tv" for the total variation, half the sum of |old - new|.
        threshold: the divergence beyond which a step is masked; nats, or a difference of probabilities.
        top_k: how many actions are told apart; None: all.
        settings: see `AdamRule`.
    """

    def __init__(
        self,
        *,
        divergence: Literal["kl", "tv"] = "kl",
        threshold: float = 0.05,
        top_k: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(self._masked, metrics=("masked_fraction",), **settings)
        self._divergence = {"kl": _kl, "tv": _total_variation}[divergence]
        self._threshold, self._top_k = threshold, top_k

    def _masked(
        self,
        new: Distribution,
        old: Distribution,
        actions: Tensor,
        advantages: Tensor,
        old_log_prob: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        probability_ratio = ratio(old_log_prob, torch.where(mask, new.log_prob(actions), 0.0))
        with torch.no_grad():
            own, other, _ = coarse(new, old, actions, self._top_k)
            onward = torch.where(advantages > 0, probability_ratio > 1, probability_ratio < 1)
            held = mask & onward & (self._divergence(other, own) > self._threshold)
        return torch.where(held, 0.0, probability_ratio * advantages), held.to(advantages.dtype)


def _kl(old: Distribution, new: Distribution) -> Tensor:
    return old.kl(new)


def _total_variation(old: Distribution, new: Distribution) -> Tensor:
    if not isinstance(old, Categorical):
        raise UserError("update.divergence: tv needs one discrete action a step; use kl")
    return 0.5 * (old.log_probs.exp() - new.log_probs.exp()).abs().sum(-1)

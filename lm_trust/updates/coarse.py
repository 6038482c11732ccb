"""A categorical distribution seen through few categories: the likeliest tokens one by one, and the rest as one."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_trust.core.distributions import Categorical, Distribution
from lm_trust.errors import UserError


def coarse(
    new: Distribution, old: Distribution, actions: Tensor, kept: int | None
) -> tuple[Distribution, Distribution, Tensor]:
    """Both distributions over the `kept` actions that are likeliest in old, the taken one among them, and a rest.

    No divergence grows by this (data processing), and the probability of the taken action stays what it is. With one
    action kept it is the taken one against all others.

    Args:
        new, old: at the same steps.
        actions: (B, T).
        kept: at least 1; None, or all V: nothing is put together.

    Returns:
        new and old over kept + 1 categories, and the actions' places among them.

    Raises:
        UserError: actions that are not one of a number of categories.
    """
    if kept is None:
        return new, old, actions
    if not isinstance(old, Categorical):
        raise UserError("update.top_k: needs one discrete action a step; use null")
    if kept >= old.logits.shape[-1]:
        return new, old, actions
    actions = actions.long().unsqueeze(-1)
    places = old.log_probs.detach().topk(kept, dim=-1).indices
    # Where the taken action is not among the likeliest, it takes the place of the last of them.
    missing = (places != actions).all(-1, keepdim=True)
    places = torch.cat([places[..., :-1], torch.where(missing, actions, places[..., -1:])], dim=-1)
    own, other = (_with_rest(one, places) for one in (new, old))
    return own, other, (places == actions).long().argmax(-1)


def _with_rest(distribution: Categorical, places: Tensor) -> Categorical:
    log_probs = distribution.log_probs
    others = log_probs.scatter(-1, places, -torch.inf)
    # Where all others are ruled out, the gradient of their sum would be 0 / 0.
    empty = (others == -torch.inf).all(-1, keepdim=True)
    rest = torch.where(empty, -torch.inf, torch.where(empty, 0.0, others).logsumexp(-1, keepdim=True))
    return Categorical(torch.cat([log_probs.gather(-1, places), rest], dim=-1))

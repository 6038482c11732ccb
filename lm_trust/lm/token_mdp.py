"""The token-level MDP: what its steps pay and how its episodes end, in one place for rollout and environment.

State: the prompt and the tokens so far. Action: the next token. An end of sequence terminates; the length limit
truncates, and what that means is a setting:

- `terminate`: the text is scored as it stands, and nothing follows it.
- `penalise`: the same, less `limit_penalty`.
- `bootstrap`: an unfinished text has no score; the value of its last state stands in.

A dense reward scores unfinished texts too, and a token is paid the change that it makes to the score of the text so
far. That is potential-based shaping (Ng, Harada and Russell 1999): a completion's rewards add up to its score less the
bare prompt's, so the best policy is the same, and each token's part in it is known without waiting for the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LimitRule = Literal["terminate", "penalise", "bootstrap"]


@dataclass(frozen=True)
class TokenRewards:
    """Rewards and ends at every step: rewards (B, T), terminated (B, T) bool, truncated (B, T) bool."""

    rewards: Tensor
    terminated: Tensor
    truncated: Tensor


def token_rewards(
    scores: Tensor,
    lengths: Tensor,
    ended: Tensor,
    *,
    steps: int,
    dense_scores: Tensor | None = None,
    at_limit: LimitRule = "terminate",
    limit_penalty: float = 0.0,
) -> TokenRewards:
    """Place each completion's score on its last token, or spread it where it is dense, and mark how it ended.

    Args:
        scores: (B,) score of the whole text.
        lengths: (B,) completion tokens, at least 1.
        ended: (B,) bool, whether an end of sequence came before the limit.
        steps: T.
        dense_scores: (B, T + 1), the dense rewards' part of the score after 0, 1, ... T tokens; what stands after a
            completion's end does not count. None where no reward is dense.
        at_limit, limit_penalty: see the module's text.
    """
    position = torch.arange(steps, device=lengths.device)
    last = position == (lengths - 1).unsqueeze(-1)
    cut = ~ended
    if dense_scores is not None:
        scores = scores - dense_scores.gather(-1, lengths.unsqueeze(-1)).squeeze(-1)
    if at_limit == "bootstrap":
        scores = torch.where(cut, 0.0, scores)
    elif at_limit == "penalise":
        scores = scores - limit_penalty * cut.to(scores.dtype)
    truncated = cut if at_limit == "bootstrap" else torch.zeros_like(cut)
    rewards = torch.where(last, scores.unsqueeze(-1), 0.0)
    if dense_scores is not None:
        rewards = rewards + torch.where(position < lengths.unsqueeze(-1), dense_scores.diff(dim=-1), 0.0)
    return TokenRewards(rewards, last & ~truncated.unsqueeze(-1), last & truncated.unsqueeze(-1))

"""The token-level MDP: what its steps pay and how its episodes end, in one place for rollout and environment.

State: the prompt and the tokens so far, with what they have earned and how many more there may be. Action: the next
token. An end of sequence terminates; the length limit truncates, and what that means is a setting:

- `terminate`: the text is scored as it stands, and nothing follows it.
- `penalise`: the same, less `limit_penalty`.
- `bootstrap`: an unfinished text has no score; the value of its last state stands in.

A dense reward scores unfinished texts too, and a token is paid the change that it makes to the score of the text so
far. That is potential-based shaping (Ng, Harada and Russell 1999): a completion's rewards add up to its score less the
bare prompt's, so the best policy is the same, and each token's part in it is known without waiting for the end.

Rewards for tokens and steps are paid at the token, or at the one that completes the step. A last step that no
delimiter ended is complete when the text is, and is paid like a score of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lm_trust.lm.completion_texts import CompletionTexts
from lm_trust.lm.rewards import RewardScores, WeightedRewards
from lm_trust.lm.text_pieces import completing_tokens

LimitRule = Literal["terminate", "penalise", "bootstrap"]

PROGRESS_SIZE = 2  # numbers a state in `progress`


@dataclass(frozen=True)
class Payments:
    """What B completions earn, before any scaling.

    Attributes:
        final: (B,) float64, for the finished text, paid with its last token.
        per_token: (B, T) float64, paid with each token as it is written; 0 behind a completion's end.
    """

    final: Tensor
    per_token: Tensor

    @property
    def totals(self) -> Tensor:
        """(B,) of all tokens, for texts that are finished."""
        return self.final + self.per_token.sum(-1)


@dataclass(frozen=True)
class TokenRewards:
    """Rewards and ends at every step: rewards (B, T), terminated (B, T) bool, truncated (B, T) bool."""

    rewards: Tensor
    terminated: Tensor
    truncated: Tensor


def payments(rewards: WeightedRewards, scores: RewardScores, texts: CompletionTexts) -> Payments:
    """When each part of the scores is paid: at the end, by a token's change of it, for its token, or for its step.

    Args:
        scores: of the completions; where they are unfinished, of the parts that pay as they are written.
    """
    per_token = torch.zeros(texts.written.tokens.shape, dtype=torch.float64)
    final = torch.zeros(len(per_token), dtype=torch.float64)
    if rewards.pays_by("change"):
        changes = _changes(rewards, texts)
        per_token[:, : changes.shape[1]] += changes
    for label, part in rewards.parts.items():
        if label not in scores.parts:
            continue
        if part.pays == "end":
            final += part.weight * scores.parts[label]
        for row, numbers in enumerate(scores.pieces.get(label, ())):
            places = range(len(numbers))
            if part.pays == "step":
                places = completing_tokens(texts.beginnings[row], part.step_delimiter)
            for place, number in zip(places, numbers, strict=True):
                if place is None:
                    final[row] += part.weight * number
                else:
                    per_token[row, place] += part.weight * number
    return Payments(final, per_token)


def _changes(rewards: WeightedRewards, texts: CompletionTexts) -> Tensor:
    """(B, T) the change that each token makes to the dense rewards' score of the text so far."""
    counts = [length + 1 for length in texts.lengths]
    chosen = texts.prompts.select([row for row, count in enumerate(counts) for _ in range(count)])
    scored = rewards.score(
        chosen.texts,
        [text for beginnings in texts.beginnings for text in beginnings],
        chosen.fields,
        lengths=[tokens for count in counts for tokens in range(count)],
        ended=[
            ended and tokens == count - 1
            for count, ended in zip(counts, texts.ended, strict=True)
            for tokens in range(count)
        ],
        chats=chosen.chat_column,
        pays=("change",),
    )
    return pad_sequence([score.diff() for score in scored.total.split(counts)], batch_first=True)


def token_rewards(
    final: Tensor,
    lengths: Tensor,
    ended: Tensor,
    *,
    per_token: Tensor,
    at_limit: LimitRule = "terminate",
    limit_penalty: float = 0.0,
) -> TokenRewards:
    """Place what each finished text is paid on its last token, and mark how it ended.

    Args:
        final: (B,) for the finished text.
        lengths: (B,) completion tokens, at least 1.
        ended: (B,) bool, whether an end of sequence came before the limit.
        per_token: (B, T) paid as the text is written, 0 behind its end.
        at_limit, limit_penalty: see the module's text.
    """
    last = torch.arange(per_token.shape[1], device=lengths.device) == (lengths - 1).unsqueeze(-1)
    cut = ~ended
    if at_limit == "bootstrap":
        final = torch.where(cut, 0.0, final)
    elif at_limit == "penalise":
        final = final - limit_penalty * cut.to(final.dtype)
    truncated = cut if at_limit == "bootstrap" else torch.zeros_like(cut)
    rewards = per_token + torch.where(last, final.unsqueeze(-1), 0.0)
    return TokenRewards(rewards, last & ~truncated.unsqueeze(-1), last & truncated.unsqueeze(-1))


def progress(rewards: Tensor, max_new_tokens: int, at_limit: LimitRule) -> Tensor:
    """What the states of T + 1 steps hold besides their texts, for a critic: (B, T + 1, PROGRESS_SIZE).

    The reward so far, and the share of the length limit that is left (Pardo et al. 2018, "Time limits in reinforcement
    learning"); 0 where the limit is no end of the episode, for then a value must not depend on it. What may still be
    earned hangs on both: a score that is high already can hardly rise, nor can that of a text that is nearly over.

    Args:
        rewards: (B, T), 0 behind a completion's end.
        max_new_tokens: the length limit.
        at_limit: see the module's text.
    """
    earned = torch.nn.functional.pad(rewards.cumsum(-1), (1, 0))
    left = 1 - torch.arange(earned.shape[1], device=earned.device) / max_new_tokens
    return torch.stack([earned, left.expand_as(earned) * (at_limit != "bootstrap")], -1)

"""What a policy writes on held-out prompts: reward with its interval, exact reference KL, fluency and diversity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from lm_trust.core.processes import all_rows, gathered, mean, mean_kl
from lm_trust.intervals import clustered_mean
from lm_trust.lm.generation import Completions
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.rewards import RewardScores


def reward_interval(scores: Tensor, prompts: Tensor) -> list[float] | None:
    """95 % t interval of the mean reward, [low, high]; None for fewer than two prompts.

    Samples of one prompt are not independent: the interval takes them together.

    Args:
        scores: (B,).
        prompts: (B,) which prompt each belongs to.
    """
    return clustered_mean(scores.numpy(force=True), prompts.numpy(force=True)).interval


def distinct_2(completions: Sequence[Sequence[int]]) -> float | None:
    """Different bigrams over all bigrams of the completions' tokens (Li et al. 2016); None where there is none."""
    bigrams = [pair for ids in completions for pair in pairwise(ids)]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


@torch.no_grad()
def divergence_and_perplexity(policy: CausalPolicy, completions: Completions) -> dict[str, float]:
    """Exact KL(policy || reference) in nats per sequence, and the completions' perplexity under the untouched base.

    The KL of a step is over the whole vocabulary; a sequence's is the sum over its steps, in states that the policy
    visited. Perplexity is exp of the mean negative log-likelihood a token, at the sampling temperature; infinite where
    that is beyond all floats, as a low temperature makes it. Both are of the completions of all processes.
    """
    mask, tokens = completions.mask, completions.tokens
    own = policy.distribution(completions.observations)
    with policy.as_reference():
        reference = policy.distribution(completions.observations)
    if policy.reference_is_base:
        base = reference
    else:
        with policy.as_base():
            base = policy.distribution(completions.observations)
    nats = torch.tensor(-mean(base.log_prob(tokens), mask), dtype=torch.float64)
    return {"reference_kl": mean_kl(own.kl(reference), mask), "perplexity": nats.exp().item()}


def evaluation_record(
    policy: CausalPolicy,
    completions: Completions,
    scores: RewardScores,
    prompts: Tensor,
    prompt_texts: Sequence[str],
    completion_texts: Sequence[str],
) -> dict[str, Any]:
    """One side ("before" or "after") of evaluation.json; `samples` are all completions with their rewards.

    prompts: (B,) which prompt each belongs to, equal ones being the same. Each part of the reward has its mean,
    `reward/NAME`, and its interval, `reward_interval/NAME`. What is given are the completions of this process; the
    record is of those of all.
    """
    ids = [row[:length].tolist() for row, length in zip(completions.tokens, completions.lengths.tolist(), strict=True)]
    samples = [
        {"prompt": prompt, "completion": completion, "reward": score}
        for prompt, completion, score in zip(prompt_texts, completion_texts, scores.total.tolist(), strict=True)
    ]
    prompts, total = all_rows(prompts), all_rows(scores.total)
    parts = {name: all_rows(part) for name, part in scores.parts.items()}
    return {
        "reward_mean": total.mean().item(),
        "reward_interval": reward_interval(total, prompts),
        "count": len(total),
        **{f"reward/{name}": part.mean().item() for name, part in parts.items()},
        **{f"reward_interval/{name}": reward_interval(part, prompts) for name, part in parts.items()},
        **divergence_and_perplexity(policy, completions),
        "distinct_2": distinct_2(list(chain(*gathered(ids)))),
        "completion_length": mean(completions.lengths),
        "samples": list(chain(*gathered(samples))),
    }

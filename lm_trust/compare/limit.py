"""How much reward a nat can buy: the frontier that no policy can lie above, estimated from the reference alone.

Of all policies at the same KL(p || p_ref) the tilted reference, p proportional to p_ref exp(r / beta), has the highest
reward (Korbak et al. 2022, arXiv 2205.11275); with one beta for all prompts it is the best at the same mean KL over
prompts. Best-of-n is beside it for scale: what is to be had without any training.

Both are taken exactly for the empirical reference, N samples of each prompt with weight 1 / N, so that best-of-n is
never above the tilted reference. What N samples do to the estimate has a known sign: at a given KL the curve is too low
on average. The limit at a KL of K is the minimum over beta of beta K + beta log E_ref exp(r / beta) (Hu and Hong 2013),
the samples put a mean into the logarithm, and by Jensen's inequality that makes every term, and so their minimum, too
low on average. A rule's share of the limit is hence, if anything, flattered. The error grows as fewer samples carry the
weight: no sample shows what is rarer than 1 in N. Points whose effective number of samples (1 / sum of squared weights,
harmonic mean over prompts) is below four are left out. What was lost of the reward's gain at that edge in simulations
with N = 128: 1 % for a reward between two bounds, 4 % for a Gaussian one, 20 % for an exponential one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import rankdata

from lm_trust.compare.statistics import bootstrap_mean
from lm_trust.core.seeding import make_generator
from lm_trust.errors import UserError
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.rollout import LanguageTask

BATCH_SIZE = 64  # completions sampled at a time
LEAST_EFFECTIVE = 4.0  # samples a prompt
# Betas, in standard deviations of the reward within a prompt: from a KL of about 1 / 2000 to the best samples alone.
BETAS = np.geomspace(30.0, 0.03, 61)


def reference_rewards(task: LanguageTask, policy: CausalPolicy, prompts: int, samples: int) -> np.ndarray:
    """(P, N) rewards of N samples of the reference policy for each of the first P held-out prompts.

    The random stream is the limit's own, so that it neither shifts a run's nor depends on one.

    Raises:
        UserError: there are fewer held-out prompts.
        RewardError: a reward failed.
    """
    known = len(task.heldout.ids)
    if prompts > known:
        raise UserError(f"limit.prompts: {prompts} are more than the {known} held-out prompts; ask for {known} or less")
    generator = make_generator(0, "compare.limit")
    totals = []
    for rows in torch.arange(prompts).repeat_interleave(samples).split(BATCH_SIZE):
        with policy.as_reference():
            completions = task.sample(policy, task.heldout, rows, generator)
        totals.append(task.score(task.heldout, rows, completions).total)
    return torch.cat(totals).reshape(prompts, samples).numpy()


def limit_curves(rewards: np.ndarray) -> dict[str, Any]:
    """Reward over KL of the tilted reference and of best-of-n.

    Args:
        rewards: (P, N), N samples of the reference for each of P prompts.

    Returns:
        {"tilted": points with "beta", KL rising; "best_of_n": points with "n" = 1, 2, 4, ...; "prompts": P,
        "samples": N}. A point has also "kl", "kl_low", "kl_high" (nats a sequence) and "reward", "low", "high": means
        over prompts with 95 % bootstrap intervals over prompts, whose ends are None for a single prompt. That of a
        tilted reward is the interval of the limit at the point's KL, which other prompts reach at another beta.

    Raises:
        ValueError: the rewards have another shape, or one is not finite.
    """
    if rewards.ndim != 2 or not rewards.size or not np.isfinite(rewards).all():
        raise ValueError(f"finite rewards (prompts, samples) are needed; these have shape {rewards.shape}")
    prompts, samples = rewards.shape
    spread = float(np.sqrt(rewards.var(1).mean())) or 1.0
    tilted = [(float(beta), softmax(rewards / beta, axis=1)) for beta in spread * BETAS]
    best = [(2**k, _best_of(2**k, rewards)) for k in range(samples.bit_length())]
    return {
        "tilted": [{"beta": beta} | _point(weights, rewards, beta) for beta, weights in tilted if _carried(weights)],
        "best_of_n": [{"n": n} | _point(weights, rewards) for n, weights in best if _carried(weights)],
        "prompts": prompts,
        "samples": samples,
    }


def _best_of(n: int, rewards: np.ndarray) -> np.ndarray:
    """(P, N) probability that each sample is the best of n draws with replacement; equal ones share evenly.

    The KL is that of this distribution: log n - (n - 1) / n, which is often quoted, is only a bound of it and far too
    high where rewards are equal (Beirami et al. 2024, arXiv 2401.01879).
    """
    below, upto = rankdata(rewards, "min", axis=1) - 1, rankdata(rewards, "max", axis=1)
    samples = rewards.shape[1]
    return ((upto / samples) ** n - (below / samples) ** n) / (upto - below)


def _carried(weights: np.ndarray) -> bool:
    """Whether enough samples carry the weight; of few samples half of them are enough."""
    least = min(LEAST_EFFECTIVE, weights.shape[1] / 2)
    return 1 / np.square(weights).sum(1).mean() >= least


def _point(weights: np.ndarray, rewards: np.ndarray, price: float = 0.0) -> dict[str, float | None]:
    """A policy that gives the (P, N) samples these probabilities.

    What its reward changes by at the same KL when prompts are others: a prompt whose KL is above the mean has it at the
    cost of others, at this price a nat. Of the tilted reference that is beta, the slope of its reward over its KL: the
    reward at a KL of K is the minimum over beta of beta K plus a mean over prompts, so that to first order nothing is
    changed by how beta moves.
    """
    # A KL of zero may come out as -1e-17.
    kls = rel_entr(weights, 1 / weights.shape[1]).sum(1).clip(min=0)
    kl, reward = bootstrap_mean(kls), bootstrap_mean((weights * rewards).sum(1) - price * (kls - kls.mean()))
    names = ("kl", "kl_low", "kl_high", "reward", "low", "high")
    return dict(zip(names, (*kl, *reward), strict=True))

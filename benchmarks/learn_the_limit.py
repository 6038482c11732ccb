"""What a policy learns from samples of the limit itself: maximum likelihood on the tilted reference.

    python benchmarks/learn_the_limit.py [--config configs/lm/sentiment_trpo.yaml] [--kl 2] [--rows 16] [--epochs 3]

The best policy at a KL is the reference tilted by exp(reward / beta); see `lm_trust/compare/limit.py`. Here its samples
are at hand: `--samples` completions of every training prompt, drawn again by those weights, `--picks` of a prompt an
epoch. An adapter is fitted to them by Adam, and the policy evaluated on the held-out prompts, exact KL and all. No
policy gradient has such data, so where this frontier is no better than that of trained policies, neither estimators
nor critics are what holds those back, but how much of the limit so many texts and steps can teach a model.
"""

from __future__ import annotations

import argparse
import math

import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lm_trust.core.batch import row_chunks
from lm_trust.core.parameters import trainable_parameters
from lm_trust.core.seeding import make_generator
from lm_trust.lm.generation import complete, eos_ids, left_pad
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.rollout import LanguageTask
from lm_trust.training.build import build_world
from lm_trust.training.config_file import load_config

Text = tuple[int, Tensor]  # a training prompt's number, and the tokens of its completion


@torch.no_grad()
def reference_texts(task: LanguageTask, policy: CausalPolicy, samples: int) -> tuple[list[list[Text]], Tensor]:
    """`samples` completions of each of P training prompts by the reference, and their (P, samples) rewards."""
    rows, generator = torch.arange(len(task.training.ids)), make_generator(0, "benchmark.learn_the_limit")
    texts: list[list[Text]] = [[] for _ in rows]
    totals = []
    for _ in range(samples):
        with policy.as_reference():
            completions = task.sample(policy, task.training, rows, generator)
        for row, (tokens, mask) in enumerate(zip(completions.tokens, completions.mask, strict=True)):
            texts[row].append((row, tokens[mask]))
        totals.append(task.score(task.training, rows, completions).total)
    return texts, torch.stack(totals, 1)


def tilted_weights(rewards: Tensor, kl: float) -> Tensor:
    """(P, N) probabilities of each prompt's samples, proportional to exp(reward / beta), at this mean KL in nats."""

    def tilted(log_beta: float) -> Tensor:
        return (rewards / math.exp(log_beta)).softmax(-1)

    def excess(log_beta: float) -> float:
        weights = tilted(log_beta)
        return torch.special.xlogy(weights, weights * rewards.shape[1]).sum(-1).mean().item() - kl

    spread = rewards.std().log().item()
    return tilted(brentq(excess, spread - 4, spread + 4))


def mean_log_prob(task: LanguageTask, policy: CausalPolicy, texts: list[Text]) -> Tensor:
    """Of a token of these texts, in nats, with its graph."""
    ends = eos_ids(task.tokenizer, policy)
    prompts, mask = left_pad([task.training.ids[row] for row, _ in texts], task.tokenizer.pad_token_id)
    tokens = pad_sequence([tokens for _, tokens in texts], batch_first=True, padding_value=ends[0])
    completions = complete(mask, prompts, tokens, eos_ids=ends)
    log_prob = policy.distribution(completions.observations).log_prob(completions.tokens)
    return log_prob[completions.mask].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/lm/sentiment_trpo.yaml", help="a language job")
    parser.add_argument("--samples", type=int, default=20, help="completions of each training prompt")
    parser.add_argument("--kl", type=float, default=2.0, help="of the tilted reference, nats a sequence")
    parser.add_argument("--picks", type=int, default=3, help="samples of each prompt that an epoch learns from")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="texts in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Adam's, falling to 0")
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--count", type=int, default=80, help="held-out completions of an evaluation")
    given = parser.parse_args()
    most = math.log(given.samples)
    if not 0 < given.kl < most:
        raise SystemExit(f"--kl {given.kl:g}: {given.samples} samples of a prompt carry 0 to {most:.2f} nats")
    trainer = build_world(load_config(given.config)).trainer
    task, policy = trainer.task, trainer.policy
    texts, rewards = reference_texts(task, policy, given.samples)
    weights = tilted_weights(rewards, given.kl)
    limit = (weights * rewards).sum(-1).mean().item()
    print(f"tilted reference, training prompts: {limit:.3f} at {given.kl:.2f} nats, from {rewards.mean().item():.3f}")
    generator = make_generator(0, "benchmark.learn_the_limit.picks")
    chosen = []
    for _ in range(given.epochs):
        picks = torch.multinomial(weights, given.picks, replacement=True, generator=generator)
        epoch = [texts[row][pick] for row, few in enumerate(picks.tolist()) for pick in few]
        chosen += [epoch[place] for place in torch.randperm(len(epoch), generator=generator).tolist()]
    batches = [chosen[rows] for rows in row_chunks(len(chosen), given.rows)]
    adam = torch.optim.AdamW(trainable_parameters(policy), lr=given.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, len(batches))
    every = -(-len(batches) // given.evaluations)
    print(f"{'steps':>6} {'loss':>7} {'reward':>7} {'95 %':>14} {'nats':>6}")
    for step, batch in enumerate(batches, 1):
        loss = -mean_log_prob(task, policy, batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % every == 0 or step == len(batches):
            found = task.evaluate(policy, given.count)
            low, high = found["reward_interval"]
            reward, nats = found["reward_mean"], found["reference_kl"]
            print(f"{step:>6} {loss.item():>7.3f} {reward:>7.3f} {low:>6.3f} - {high:.3f} {nats:>6.2f}", flush=True)


if __name__ == "__main__":
    main()

"""What a language policy's gradients say beyond their own batch, at the last checkpoint of a run.

    python benchmarks/gradient_noise.py runs/sentiment_trpo [--batches 8] [--rows 64]

First, by lambda of GAE: how alike the gradients of two batches are, and whether their mean points where that of
lambda = 1, which has no bias, and that of the reference KL do. Then, what a direction of ascent made from half of the
batches gains on the other half, for the same step KL: with less damping the Fisher counts for more. Products of two
gradients are taken between different batches only, whose noise is independent; gains are first order, a sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lm_trust.core.advantages import gae
from lm_trust.core.batch import Rollout
from lm_trust.core.conjugate_gradient import conjugate_gradient
from lm_trust.core.fisher import FisherOperator
from lm_trust.core.parameters import flatten, trainable_parameters
from lm_trust.training.build import build_world
from lm_trust.training.checkpoint import load_checkpoint
from lm_trust.training.config_file import load_config
from lm_trust.training.trainer import Trainer

LAMBDAS, UNBIASED = {0.0, 0.3, 0.6, 0.8, 1.0}, 1.0  # and the run's own
DAMPINGS, CG_ITERATIONS = (1.0, 0.1, 0.03), 6
STEP_KL = 0.005  # nats a token, that all directions are compared at


@dataclass(frozen=True)
class Gradients:
    """Of one batch, (P,) each: of the mean reward a token by lambda, and of the mean exact KL to the reference."""

    reward: dict[float, Tensor]
    kl: Tensor


def trainer_of(run: Path, rows: int) -> tuple[Trainer, float]:
    """The run's trainer with its last policy and critic, and the price of a nat in its objective."""
    given = {"rollout.batch_size": rows, "rollout.microbatch_size": rows}
    config = load_config(run / "config.yaml", [(key, str(value)) for key, value in given.items()])
    if config.advantage.kind != "gae":
        raise SystemExit(f"{run}: advantage.kind is {config.advantage.kind}, and what is varied here is gae's lambda")
    trainer = build_world(config).trainer
    state = load_checkpoint(run / "checkpoints")
    trainer.restore_policy(state)
    trainer.critic.load_state_dict(state["critic"])
    return trainer, config.reference.loss


def gradients_of_a_batch(trainer: Trainer) -> Gradients:
    experience = trainer.experience()
    rollout, mask = experience.rollout, experience.rollout.mask
    values, next_values = trainer.critic.values(rollout)
    now = trainer.policy.distribution(rollout.observations)
    log_prob, kl = now.log_prob(rollout.actions), now.kl(rollout.reference)
    parameters = trainable_parameters(trainer.policy)

    def gradient(per_step: Tensor) -> Tensor:
        mean = torch.where(mask, per_step, 0.0).sum() / mask.sum()
        return flatten(torch.autograd.grad(mean, parameters, retain_graph=True)).float()

    by_lambda = {}
    for lam in sorted({*LAMBDAS, trainer.advantage.lam}):
        ends, gamma = (rollout.terminated, rollout.truncated), trainer.advantage.gamma
        advantages, _ = gae(experience.scores["reward"], values, next_values, *ends, gamma=gamma, lam=lam)
        by_lambda[lam] = gradient(log_prob * advantages)
    return Gradients(by_lambda, gradient(kl))


def between(one: Tensor, other: Tensor) -> float:
    """The mean product of two gradients (N, P) over pairs of different batches."""
    products = one @ other.T
    return ((products.sum() - products.trace()) / (len(one) * (len(one) - 1))).item()


def cosine_of_means(one: Tensor, other: Tensor) -> float:
    """Of what two kinds of gradients (N, P) would be on infinitely many samples; not held to 1 by anything."""
    return between(one, other) / (between(one, one) * between(other, other)) ** 0.5


def print_noise(reward: dict[float, Tensor], kl: Tensor) -> None:
    print(f"{'lambda':>8} {'two batches':>12} {'to lambda 1':>12} {'to the KL':>10} {'size over the KL':>17}")
    for lam, gradients in reward.items():
        alike = between(gradients, gradients) / gradients.square().sum(1).mean().item()
        size = (between(gradients, gradients) / between(kl, kl)) ** 0.5
        unbiased = cosine_of_means(gradients, reward[UNBIASED])
        print(f"{lam:>8.1f} {alike:>12.3f} {unbiased:>12.3f} {cosine_of_means(gradients, kl):>10.3f} {size:>17.3f}")


def directions(objective: Tensor, fisher: FisherOperator) -> dict[str, Tensor]:
    unit = objective / objective.abs().max()
    found = {"gradient": unit}
    for damping in DAMPINGS:
        solved = conjugate_gradient(fisher.undamped, unit, max_iterations=CG_ITERATIONS, damping=damping)
        found[f"natural, damping {damping:g}"] = solved.solution
    return found


def print_gains(reward: Tensor, kl: Tensor, price: float, fisher: FisherOperator, measured: Callable) -> None:
    """What directions from one half gain on the other, of `reward` and `kl` (N, P) each, means of both ways."""
    halves = slice(None, len(kl) // 2), slice(len(kl) // 2, None)
    rows: dict[str, list[Tensor]] = {}
    for seen, fresh in (halves, halves[::-1]):
        objective = (reward[seen] - price * kl[seen]).mean(0)
        for name, direction in directions(objective, fisher).items():
            steps = direction * measured(direction)
            gains = [objective, (reward - price * kl)[fresh].mean(0), reward[fresh].mean(0), kl[fresh].mean(0)]
            rows.setdefault(name, []).append(torch.stack([gain @ steps for gain in gains]))
    print(f"\n{'':24} {'promised':>9} {'fresh':>9} {'reward':>9} {'nats':>9}")
    for name, gains in rows.items():
        print(f"{name:24} " + " ".join(f"{gain:>9.4f}" for gain in torch.stack(gains).mean(0).tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trainer, price = trainer_of(given.run, given.rows)
    batches = [gradients_of_a_batch(trainer) for _ in range(given.batches)]
    reward = {lam: torch.stack([batch.reward[lam] for batch in batches]) for lam in batches[0].reward}
    kl = torch.stack([batch.kl for batch in batches])
    print_noise(reward, kl)

    def fisher_of(rollout: Rollout) -> FisherOperator:
        return FisherOperator(trainer.policy, rollout.observations, mask=rollout.mask, microbatch_size=given.rows)

    solving, measuring = (trainer.experience().rollout for _ in range(2))
    fisher, independent = fisher_of(solving), fisher_of(measuring)
    tokens = measuring.mask.sum().item() / len(measuring.mask)

    def step_of(direction: Tensor) -> float:
        """What takes a direction to STEP_KL, by the Fisher of other rows; times the tokens of a sequence."""
        return (2 * STEP_KL / (direction @ independent.undamped(direction)).item()) ** 0.5 * tokens

    print_gains(reward[trainer.advantage.lam], kl, price, fisher, step_of)


if __name__ == "__main__":
    main()

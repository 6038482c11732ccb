"""How much reward a nat buys, by which KL an action is made to pay for: exact, on random trees.

    python benchmarks/kl_credit.py [--trees 8]

A text is a path from the root of a tree, the reference a distribution at each of its nodes; a few branches are paid,
and the reward of a path saturates as the lexicon's does. With a price on each nat there are three policies, each found
by going back from the leaves. Of the full credit (`reference.penalty`) an action pays for its own KL and for that of
all that follows: this is the reference tilted by whole paths, which nothing beats. Of the step's own (`reference.loss`)
it weighs the rewards that follow and the KL of its own step alone; without foresight its own payment and its own KL.
Prices are swept, and rewards interpolated at the same KL.
"""

from __future__ import annotations

import argparse

import numpy as np

DEPTH, BRANCHES = 7, 6
PAID, GOOD = 0.15, 0.65  # share of the branches that pay, and of those that pay 1 and not -1
KLS = (0.25, 0.5, 1.0, 2.0, 3.0)  # nats a path
PRICES = np.geomspace(0.02, 3.0, 60)
CREDITS = ("what follows too", "own step alone", "no foresight")

Levels = list[np.ndarray]  # of each depth (nodes, branches)


def random_tree(seed: int) -> tuple[Levels, Levels]:
    """The reference's probabilities and the payments of all branches; a path's payments add up to its reward."""
    generator = np.random.default_rng(seed)
    reference, payments, paid = [], [], np.zeros(1)
    for depth in range(DEPTH):
        shape = (BRANCHES**depth, BRANCHES)
        reference.append(generator.dirichlet(np.full(BRANCHES, 0.3), size=shape[0]))
        signs = generator.choice([1.0, -1.0], p=[GOOD, 1 - GOOD], size=shape)
        then = paid[:, None] + np.where(generator.random(shape) < PAID, signs, 0.0)
        payments.append(_saturated(then) - _saturated(paid)[:, None])
        paid = then.reshape(-1)
    return reference, payments


def _saturated(paid: np.ndarray) -> np.ndarray:
    return 3 * paid / np.sqrt((3 * paid) ** 2 + 15)


def reward_and_kl(reference: Levels, payments: Levels, credit: str, price: float) -> tuple[float, float]:
    """Of the policy that a price and a credit end at: each node is best for what its actions are told to weigh."""
    nodes = BRANCHES**DEPTH
    reward, kl = np.zeros(nodes), np.zeros(nodes)  # to come, from each node of the depth below
    for probabilities, paid in zip(reversed(reference), reversed(payments), strict=True):
        reward_after, kl_after = (to_come.reshape(paid.shape) for to_come in (reward, kl))
        weighed = {
            "what follows too": paid + reward_after - price * kl_after,
            "own step alone": paid + reward_after,
            "no foresight": paid,
        }[credit]
        tilted = probabilities * np.exp((weighed - weighed.max(1, keepdims=True)) / price)
        policy = tilted / tilted.sum(1, keepdims=True)
        ratio = np.log(np.maximum(policy, 1e-300) / np.maximum(probabilities, 1e-300))
        reward = (policy * (paid + reward_after)).sum(1)
        kl = (policy * (ratio + kl_after)).sum(1)
    return reward.item(), kl.item()


def frontier(seed: int, credit: str) -> np.ndarray:
    reference, payments = random_tree(seed)
    points = sorted(reward_and_kl(reference, payments, credit, price)[::-1] for price in PRICES)
    kls, rewards = zip(*points, strict=True)
    return np.interp(KLS, kls, rewards, left=np.nan, right=np.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trees", type=int, default=8)
    trees = parser.parse_args().trees
    print(f"{'reward at nats':>18} " + " ".join(f"{kl:>6g}" for kl in KLS) + f"   (means of {trees} trees)")
    for credit in CREDITS:
        means = np.mean([frontier(seed, credit) for seed in range(trees)], axis=0)
        print(f"{credit:>18} " + " ".join(f"{mean:>6.3f}" for mean in means))


if __name__ == "__main__":
    main()

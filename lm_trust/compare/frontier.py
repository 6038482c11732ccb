"""Reward over realised KL: a rule's frontier over its knob values, and rules side by side at the same KL.

A run that reached more KL has had more of what buys reward, so rules are compared where they are equally far from where
they started. A rule is given its best knob value at each KL, the same for all seeds: a choice a seed would flatter. The
best of several means flatters too, the more the more values a rule has been tried with, and no interval here knows of
that choice: give each rule as many values. (In control nothing is chosen: a seed's curve goes through all values.)

A rule counts as having reached a KL where every seed of the comparison has, `seeds` of them: as many as were asked for,
whatever became of their runs. The mean over the seeds that got there would leave out those that failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np

from lm_trust.compare.statistics import (
    Estimate,
    bootstrap_mean,
    interquartile_mean,
    known,
    mann_whitney,
    probability_of_improvement,
)
from lm_trust.training.run_folder import Record


@dataclass(frozen=True)
class Curve:
    """Rewards at the KLs that one run went through (language), or one seed's runs at all knob values (control).

    Attributes:
        rule: its name.
        value: of the rule's knob; None where the curve goes through several.
        seed: of the run or runs.
        kl: (M,) nats, in the order of training (language) or rising (control).
        reward: (M,) held-out; NaN where an evaluation failed, and such a point is left out.
        by_root: between two points the reward is linear in the root of the KL and not in the KL. So it goes from where
            a run starts (Gao et al. 2023, arXiv 2210.10760, of which d is that root), and a chord over the KL itself
            would lie below it, the more the further a rule goes between two evaluations.
    """

    rule: str
    value: float | None
    seed: int
    kl: np.ndarray
    reward: np.ndarray
    by_root: bool = False


def reward_at(curve: Curve, kl: float) -> float | None:
    """The reward where the curve first is at a KL, interpolated between its points; None where it never is.

    A trajectory may go back and forth, and may come to the KL from above.
    """
    places, rewards = _evaluated(curve)
    for index, place in enumerate(places):
        if place == kl:
            return float(rewards[index])
        if index and (places[index - 1] < kl) != (place < kl):
            before, here, after = _on_scale(curve, places[index - 1], kl, place)
            share = (here - before) / (after - before)
            # In this form equal rewards stay what they are: no tie between rules is broken by rounding.
            return float(rewards[index - 1] + share * (rewards[index] - rewards[index - 1]))
    return None


def _on_scale(curve: Curve, *kls: float) -> Sequence[float]:
    """KLs where the reward is linear in them; a sum of none may be below zero by rounding."""
    return np.sqrt(np.maximum(kls, 0.0)) if curve.by_root else kls


def _evaluated(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """KLs and rewards where both are known."""
    places, rewards = np.asarray(curve.kl, dtype=float), np.asarray(curve.reward, dtype=float)
    finite = np.isfinite(places) & np.isfinite(rewards)
    return places[finite], rewards[finite]


def unfinished_runs(report: Record, rule: str) -> int:
    """How many of a rule's runs have failed, were stopped or never began: what they would have reached is not known."""
    return sum(cell["rule"] == rule and cell["status"] != "finished" for cell in report.get("cells") or ())


def limit_at(limit: Record | None, kl: float) -> dict[str, float | None] | None:
    """The reward and interval of the limit's tilted reference at a KL, linear between its points; None outside."""
    rows = sorted((limit or {}).get("tilted") or (), key=lambda row: row["kl"])
    for one, two in pairwise(rows):
        if one["kl"] <= kl <= two["kl"]:
            share = (kl - one["kl"]) / ((two["kl"] - one["kl"]) or 1.0)
            return {
                key: one[key] + share * (two[key] - one[key]) if known(one[key]) and known(two[key]) else None
                for key in ("reward", "low", "high")
            }
    return None


def limit_of_other_prompts(limit: Record) -> str | None:
    """Why the limit is of other prompts than those that the rules are evaluated on, in words; None where it is not.

    Prompts differ in their rewards by as much as rules do, so that then no rule's part of the limit can be told.
    """
    if limit["of_seed"] is not None:
        return f"each seed holds out prompts of its own, and the limit is of those of seed {limit['of_seed']}"
    evaluated = limit["evaluated_prompts"]
    if evaluated == limit["prompts"]:
        return None
    return f"the rules are evaluated on {evaluated} prompts, and the limit is of {limit['prompts']}"


def frontier(curves: Sequence[Curve], grid: np.ndarray, *, seeds: int) -> list[dict[str, Any]]:
    """Each rule's best mean reward over all seeds at the KLs of the grid that it reached.

    Returns:
        An entry a rule, in the curves' order: {"rule", "kl", "reward", "low", "high", "value"}, lists of equal length:
        the mean over seeds, the ends of its 95 % interval (None for a single seed) and the knob value that it is of.
    """
    entries = []
    for rule, members in by_rule(curves).items():
        found = [(float(kl), _best(members, kl)) for kl in grid]
        reached = [(kl, best.value, bootstrap_mean(best.rewards)) for kl, best in found if len(best.rewards) == seeds]
        entry = {
            "rule": rule,
            "kl": [kl for kl, _, _ in reached],
            "reward": [mean.value for _, _, mean in reached],
            "low": [mean.low for _, _, mean in reached],
            "high": [mean.high for _, _, mean in reached],
            "value": [value for _, value, _ in reached],
        }
        entries.append(entry)
    return entries


def reached_kls(curves: Sequence[Curve], count: int, *, seeds: int) -> np.ndarray:
    """Evenly spaced KLs, `count` at most, from the least to the greatest that all seeds reached with a knob value.

    Args:
        curves: of one rule.
    """
    runs: dict[float | None, list[np.ndarray]] = {}
    for curve in curves:
        runs.setdefault(curve.value, []).append(_evaluated(curve)[0])
    whole = [places for places in runs.values() if len(places) == seeds and all(map(len, places))]
    spans = [(max(map(np.min, places)), min(map(np.max, places))) for places in whole]
    spans = [span for span in spans if span[0] <= span[1]]
    if not spans:
        return np.empty(0)
    return np.unique(np.linspace(min(low for low, _ in spans), max(high for _, high in spans), count))


def matched_table(curves: Sequence[Curve], kls: Sequence[float], *, seeds: int) -> list[dict[str, Any]]:
    """Each rule at each KL, by its best knob value there.

    Returns:
        Rows {"kl", "rule", "value", "seeds", "reached", "mean", "low", "high", "iqm", "iqm_low", "iqm_high"}: mean and
        interquartile mean over the seeds. Where not all seeds reached the KL they are None, `value` is the one with
        which most did (None where none did), and `reached` says how many.
    """
    rows = []
    for kl in kls:
        for rule, members in by_rule(curves).items():
            best = _best(members, kl)
            reached = len(best.rewards)
            row = {"kl": kl, "rule": rule, "value": best.value if reached else None, "seeds": seeds, "reached": reached}
            mean = iqm = (None, None, None)
            if reached == seeds:
                mean, iqm = bootstrap_mean(best.rewards), interquartile_mean(best.rewards)
            row |= zip(("mean", "low", "high"), mean, strict=True)
            row |= zip(("iqm", "iqm_low", "iqm_high"), iqm, strict=True)
            rows.append(row)
    return rows


def improvement_table(curves: Sequence[Curve], kls: Sequence[float], *, seeds: int) -> list[dict[str, Any]]:
    """The probability that a run of one rule is better than a run of another, each by its best knob value at the KL.

    Returns:
        Rows {"kl", "rule", "other", "probability", "low", "high", "p_value"}: P(rule > other), for every ordered pair
        of rules that all seeds of both reached; see `mann_whitney`.
    """
    rows = []
    for kl in kls:
        found = {rule: _best(members, kl).rewards for rule, members in by_rule(curves).items()}
        reached = {rule: rewards for rule, rewards in found.items() if len(rewards) == seeds}
        for one, other in combinations(reached, 2):
            pair = reached[one], reached[other]
            wins, p_value = probability_of_improvement(*pair), mann_whitney(*pair)
            for names, seen in (((one, other), wins), ((other, one), _reversed(wins))):
                row = zip(("kl", "rule", "other", "probability", "low", "high"), (kl, *names, *seen), strict=True)
                rows.append(dict(row) | {"p_value": p_value})
    return rows


def _reversed(wins: Estimate) -> Estimate:
    """P(b > a) from P(a > b): a bootstrap of its own would have another interval, by its other draws."""
    low, high = (None if end is None else 1 - end for end in (wins.high, wins.low))
    return Estimate(1 - wins.value, low, high)


class _Best(NamedTuple):
    """A rule at a KL: the knob value that stands for it, and the rewards of the seeds that reached the KL with it."""

    value: float | None
    rewards: list[float]


def _best(curves: Sequence[Curve], kl: float) -> _Best:
    """Of one rule's knob values the one that most seeds reached the KL with, and of several such the highest mean."""
    rewards: dict[float | None, list[float]] = {}
    for curve in curves:
        reward = reward_at(curve, kl)
        rewards.setdefault(curve.value, []).extend([] if reward is None else [reward])
    return max((_Best(*item) for item in rewards.items()), key=_rank)


def _rank(best: _Best) -> tuple[int, float]:
    return len(best.rewards), float(np.mean(best.rewards)) if best.rewards else -np.inf


def by_rule(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The curves of each rule, rules in the order of their first one."""
    members: dict[str, list[Curve]] = {}
    for curve in curves:
        members.setdefault(curve.rule, []).append(curve)
    return members

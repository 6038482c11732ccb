"""What a comparison shows, in plain words that are written from its numbers and say no more than their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import comb

import numpy as np

from lm_trust.compare.frontier import Curve, limit_at, limit_of_other_prompts, reward_at, unfinished_runs
from lm_trust.compare.statistics import bootstrap_mean, known
from lm_trust.compare.words import nats_text, number_text
from lm_trust.intervals import clustered_mean
from lm_trust.training.run_folder import Record

Interval = tuple[float, float] | None


def summarise(report: Record, curves: Sequence[Curve]) -> list[str]:
    """The sentences at the top of the page.

    Args:
        report: everything but its summary.
        curves: what its matched table was made from.
    """
    of = "reference KL" if report["world"] == "language" else "mean step KL"
    return [
        *_runs(report),
        *(sentence for kl in _matched_kls(report) for sentence in _at_kl(report, curves, kl, of)),
        *_finals(report),
        *_bounds(report),
        *_costs(report),
        *_one_update(report),
    ]


def _runs(report: Record) -> list[str]:
    cells = report["cells"]
    finished = sum(cell["status"] == "finished" for cell in cells)
    sentences = [
        f"{finished} of {len(cells)} runs finished: {len(report['rules'])} update rules, {len(report['seeds'])} seeds."
    ]
    failed = sorted({cell["rule"] for cell in cells if cell["status"] == "failed"})
    if failed:
        sentences.append(f"Runs of {_list(failed)} failed; what they said stands above the table of runs.")
    if report["same_start"]["checked"] and not report["same_start"]["equal"]:
        sentences.append("The rules did not start alike: their first batches differ, so nothing here is matched.")
    stages = {"limit": "The estimate of the limit", "one_update": "The one-update study"}
    sentences += [f"{stages[name]} failed: {error}" for name, error in report.get("errors", {}).items()]
    return sentences


def _matched_kls(report: Record) -> list[float]:
    return sorted({row["kl"] for row in report["matched"]})


def _at_kl(report: Record, curves: Sequence[Curve], kl: float, of: str) -> list[str]:
    rows = sorted(
        (row for row in report["matched"] if row["kl"] == kl and row["mean"] is not None),
        key=lambda row: -row["mean"],
    )
    ranked = {row["rule"] for row in rows}
    unranked = [rule["name"] for rule in report["rules"] if rule["name"] not in ranked]
    place = f"At {nats_text(kl)} of {of}"
    if report["world"] == "language":
        reached, missed = "reached it", "a seed did not reach it"
    else:  # a seed's curve begins at its run of the least KL, so that one may lie beyond this KL
        reached, missed = "has runs on both sides of it", "a seed has no runs on both sides of it"
    if not rows:
        return [f"{place} there is nothing to compare: no rule {reached} with all seeds."]
    return [
        *_ranking(place, rows, unranked, partial(paired_difference, curves, kl)),
        *_unranked([rule for rule in unranked if unfinished_runs(report, rule)], "not all runs finished"),
        *_unranked([rule for rule in unranked if not unfinished_runs(report, rule)], missed),
        *_share_of_limit(report, rows[0]),
    ]


def _finals(report: Record) -> list[str]:
    """How the rules end, where they are compared at no KL and have one knob value each."""
    if report["matched"] or any(len(rule["values"]) > 1 for rule in report["rules"]):
        return []
    rewards: dict[str, dict[int, float]] = {rule["name"]: {} for rule in report["rules"]}
    for cell in report["cells"]:
        if known(cell.get("reward")):
            rewards[cell["rule"]][cell["seed"]] = cell["reward"]
    if len(rewards) < 2 or not any(rewards.values()):
        return []
    rows, unranked = [], []
    for rule, of_seeds in rewards.items():
        if len(of_seeds) < len(report["seeds"]):
            unranked.append(rule)
        else:
            mean, low, high = bootstrap_mean(list(of_seeds.values()))
            rows.append({"rule": rule, "mean": mean, "low": low, "high": high})
    if not rows:
        return ["At the end there is nothing to compare: no rule finished with all seeds."]
    rows.sort(key=lambda row: -row["mean"])

    def difference(best: Record, row: Record, confidence: float) -> Interval:
        return _paired(rewards[best["rule"]], rewards[row["rule"]], confidence)

    sentences = _ranking("At the end", rows, unranked, difference)
    return [*sentences, *_unranked(unranked, "not all runs finished")]


def _unranked(rules: Sequence[str], why: str) -> list[str]:
    return [f"Not ranked, because {why}: {_list(rules)}."] if rules else []


def _ranking(
    place: str, rows: Sequence[Record], unranked: Sequence[str], difference: Callable[[Record, Record, float], Interval]
) -> list[str]:
    """Which rule has the highest mean, and whose lead is supported.

    The best is chosen by the same runs that it is then compared by, which might have chosen any pair: the intervals are
    those of all pairs together, by Bonferroni. Of rules that are alike at least 95 % of such rankings claim no lead, if
    all have as many knob values: the best of several is chosen by the same runs, too.

    Args:
        place: where that is, as a sentence begins.
        rows: rule, mean, low, high of one or more rules, the highest first; each mean is over all seeds, because the
            survivors of a rule that lost one would flatter it.
        unranked: the other rules.
        difference: the interval of the first row's lead over another at a confidence, which can reach below zero and
            not lie there; None: there is none.
    """
    best = rows[0]
    level = [row["rule"] for row in rows if row["mean"] == best["mean"]]
    others = [row for row in rows if row["rule"] not in level]
    if len(rows) == 1 and unranked:
        return [f"{place} only {best['rule']} can be ranked; its mean reward is {_estimate(best)}."]
    if len(level) == 1:
        it, its = "it", "its"
        sentences = [f"{place} {best['rule']} has the highest mean reward, {_estimate(best)}."]
    else:
        it, its = best["rule"], f"{best['rule']}'s"
        sentences = [f"{place} {_list(level)} share the highest mean reward, {_estimate(best)}."]
    pairs = comb(len(rows), 2)
    intervals = {row["rule"]: difference(best, row, 1 - 0.05 / pairs) for row in others}
    together = "95 %" if pairs == 1 else f"95 % for all {pairs} pairs of rules together"
    unknown = [rule for rule, interval in intervals.items() if interval is None]
    ahead = [rule for rule, interval in intervals.items() if interval is not None and interval[0] > 0]
    within = [rule for rule in intervals if rule not in (*unknown, *ahead)]
    if ahead:
        sentences.append(
            f"There {it} is ahead of {_list(ahead)}: the interval of the difference ({together}) is above zero."
        )
    if within:
        sentences.append(
            f"There {its} lead over {_list(within)} is not supported: the interval of it ({together}) holds zero."
        )
    if unknown:
        sentences.append(f"One seed is not enough to say whether {it} is ahead of {_list(unknown)}.")
    return sentences


def _share_of_limit(report: Record, best: Record) -> list[str]:
    limit = report.get("limit")
    most = limit_at(limit, best["kl"])
    if most is None:
        return []
    start, top = next(point["reward"] for point in limit["best_of_n"] if point["n"] == 1), most["reward"]
    share = (best["mean"] - start) / (top - start)
    bought = f": {best['rule']} gets {share:.0%} of that gain" if 0 <= share <= 1 else ""
    others = limit_of_other_prompts(limit)
    if others is not None:
        bought = f"; no rule's part of it can be told, because {others}"
    gain = f"{number_text(top)}, from {number_text(start)} at the start"
    return [f"The most that {nats_text(best['kl'])} can buy is estimated at {gain}{bought}."]


def paired_difference(
    curves: Sequence[Curve], kl: float, one: Record, other: Record, confidence: float = 0.95
) -> Interval:
    """Student's t interval of the difference in reward of two rules at a KL, over the seeds that both have.

    Runs of one seed share their start, prompts and noise, so that their difference is what is observed.

    Args:
        curves: of all rules.
        kl: where they are compared.
        one, other: rows of the matched table, with the knob value that each was chosen at.
        confidence: of the interval.

    Returns:
        (low, high), or None for fewer than two seeds.
    """
    rewards = []
    for row in (one, other):
        of_rule = [curve for curve in curves if curve.rule == row["rule"] and curve.value in (row["value"], None)]
        rewards.append({curve.seed: reward_at(curve, kl) for curve in of_rule})
    return _paired(*rewards, confidence)


def _paired(one: Mapping[int, float | None], other: Mapping[int, float | None], confidence: float) -> Interval:
    """Of the difference of two rules' rewards by seed."""
    shared = sorted(seed for seed in one if one[seed] is not None and other.get(seed) is not None)
    if len(shared) < 2:
        return None
    difference = clustered_mean([one[seed] - other[seed] for seed in shared], shared, confidence=confidence)
    return difference.low, difference.high


def _bounds(report: Record) -> list[str]:
    sentences = []
    step = "token" if report["world"] == "language" else "step"
    for rule in report["rules"]:
        cells = [
            cell
            for cell in report["cells"]
            if cell["rule"] == rule["name"] and cell.get("step_kl_mean_max") is not None
        ]
        if not cells:
            continue
        updates = sum(cell["iterations"] for cell in cells)
        rejected = sum(cell["rejected"] for cell in cells)
        without = f", of which {rejected} were rejected and moved nothing" if rejected else ""
        if rejected == updates:
            sentences.append(f"{rule['name']} moved nothing: all of its {updates} updates were rejected.")
        elif rule["bounded"]:
            broken = round(sum(cell["violations"] * cell["iterations"] for cell in cells))
            kept = "in every one" if not broken else f"in all but {broken}"
            sentences.append(
                f"{rule['name']} kept its bound on the exact step KL {kept} of {updates} updates{without}."
            )
        else:
            # The mean of a run that was stopped is of its first updates, which are not like the others.
            means = [cell["step_kl"] for cell in cells if cell["status"] == "finished"]
            ends = " to ".join(dict.fromkeys(f"{end(means):.2g}" for end in (min, max))) if means else ""
            average = f"its finished runs had {ends} nats a {step} on average, and " if means else ""
            highest = max(cell["step_kl_mean_max"] for cell in cells)
            sentences.append(
                f"{rule['name']} has no bound on the step KL: {average}the furthest of {updates} updates went "
                f"{highest:.2g} nats a {step}{without}."
            )
    return sentences


def _costs(report: Record) -> list[str]:
    words = []
    for rule in report["rules"]:
        cells = [cell for cell in report["cells"] if cell["rule"] == rule["name"] and cell["iterations"]]
        if cells:
            updates = sum(cell["iterations"] for cell in cells)
            gradients = sum(cell["gradients"] for cell in cells) / updates
            seconds = sum(cell["step_seconds"] for cell in cells) / updates
            words.append(f"{rule['name']} {gradients:.1f} gradients and {seconds:.3g} s")
    return [f"An update costs, without the rollout and the critic's fit: {'; '.join(words)}."] if words else []


def _one_update(report: Record) -> list[str]:
    study = report.get("one_update")
    rows = [row for row in study["rows"] if not row["error"]] if study else []
    rows = [row for row in rows if row["accepted"] and known(row["batch_gain"]) and known(row["fresh_gain"])]
    words = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        of_rule = [row for row in rows if row["rule"] == rule]
        seen, fresh = (np.mean([row[key] for row in of_rule]) for key in ("batch_gain", "fresh_gain"))
        above = sum(known(row["fresh_low"]) and row["fresh_low"] > 0 for row in of_rule)
        words.append(f"{rule} {seen:.2g} and {fresh:.2g} ({above} of {len(of_rule)} above zero)")
    if not words:
        return []
    return [
        "The gain that one update shows on the batch that it learnt from, and on fresh samples of the same policy, on "
        "average over the values of its knob that moved the policy, and for how many of them the 95 % interval on "
        f"fresh samples is above zero; of one policy and one batch: {'; '.join(words)}."
    ]


def _estimate(row: Record) -> str:
    interval = "" if row["low"] is None else f" [{number_text(row['low'])}, {number_text(row['high'])}]"
    return f"{number_text(row['mean'])}{interval}"


def _list(names: Sequence[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

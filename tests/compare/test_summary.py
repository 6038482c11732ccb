"""The sentences of the page say what the numbers say, and no more."""

import numpy as np
import pytest

from lm_trust.compare.frontier import Curve, matched_table
from lm_trust.compare.summary import paired_difference, summarise


def curve(rule, seed, reward, value=1.0):
    """Rises from 0.1 to `reward` at 2 nats."""
    return Curve(rule, value, seed, np.array([0.0, 2.0]), np.array([0.1, reward]))


def report_of(curves, **more):
    rules = list(dict.fromkeys(one.rule for one in curves))
    cell = {"status": "finished", "iterations": 10, "gradients": 20.0, "step_seconds": 5.0, "step_kl": 0.01}
    cell["rejected"] = 0
    report = {
        "world": "language",
        "rules": [{"name": rule, "bounded": rule == "trpo", "values": [1.0]} for rule in rules],
        "seeds": sorted({one.seed for one in curves}),
        "cells": [cell | {"rule": one.rule, "violations": 0.0, "step_kl_mean_max": 0.03} for one in curves],
        "same_start": {"checked": len(curves), "equal": True},
        "matched": matched_table(curves, [2.0], seeds=len({one.seed for one in curves})),
        "limit": None,
        "one_update": None,
    }
    return report | more


def test_one_nat_is_not_many():
    curves = [curve("trpo", seed, 0.5) for seed in range(3)]
    matched = [{**row, "kl": 1.0} for row in report_of(curves)["matched"]]
    text = " ".join(summarise(report_of(curves, matched=matched), curves))
    assert "At 1 nat of reference KL trpo has the highest mean reward" in text


def test_a_lead_is_claimed_only_where_the_paired_interval_supports_it():
    """trpo is ahead of b by the same on every seed; of c by as much on average, but not seed by seed."""
    curves = [curve("trpo", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    curves += [curve("b", seed, 0.4 + 0.1 * seed + 0.001 * seed) for seed in range(3)]
    curves += [curve("c", seed, (0.3, 0.7, 0.5)[seed]) for seed in range(3)]
    text = " ".join(summarise(report_of(curves), curves))
    assert "At 2 nats of reference KL trpo has the highest mean reward, 0.6 [" in text
    assert "ahead of b:" in text
    assert "its lead over c is not supported" in text


def test_a_lead_among_many_rules_needs_an_interval_of_all_their_pairs():
    """A lead of six standard errors over b: t's quantile for one pair is 4.3 of them, for each of three pairs 7.6."""
    two = [curve("a", seed, 0.5) for seed in range(3)]
    two += [curve("b", seed, 0.4 + extra) for seed, extra in enumerate((-0.0289, 0.0, 0.0289))]
    text = " ".join(summarise(report_of(two), two))
    assert "There it is ahead of b: the interval of the difference (95 %) is above zero." in text
    three = two + [curve("c", seed, 0.1 + 0.001 * seed) for seed in range(3)]
    text = " ".join(summarise(report_of(three), three))
    assert (
        "There it is ahead of c: the interval of the difference (95 % for all 3 pairs of rules together) is above "
        "zero. There its lead over b is not supported: the interval of it (95 % for all 3 pairs of rules together) "
        "holds zero."
    ) in text


def test_rules_that_are_level_have_no_lead():
    curves = [curve(rule, seed, 0.5) for rule in ("trpo", "b") for seed in range(3)]
    curves += [curve("c", seed, 0.4 - 0.001 * seed) for seed in range(3)]
    text = " ".join(summarise(report_of(curves), curves))
    assert "trpo and b share the highest mean reward, 0.5" in text and "There trpo is ahead of c:" in text
    assert "lead" not in text


def test_one_seed_has_no_interval():
    curves = [curve("trpo", 0, 0.5), curve("b", 0, 0.4)]
    text = " ".join(summarise(report_of(curves), curves))
    assert "One seed is not enough to say whether it is ahead of b." in text
    assert "interval" not in text


def test_rules_that_are_matched_nowhere_are_compared_at_their_end():
    curves = [curve(rule, seed, 0.5) for rule in ("plain", "clipped", "long") for seed in range(3)]
    report = report_of(curves, matched=[])
    rewards = {"plain": (0.5, 0.6, 0.7), "clipped": (0.4, 0.51, 0.61), "long": (0.2, 0.9, 0.5)}
    for cell, one in zip(report["cells"], curves, strict=True):
        cell.update(seed=one.seed, reward=rewards[one.rule][one.seed])
    report["rules"] = [rule | {"values": []} for rule in report["rules"]]
    text = " ".join(summarise(report, curves))
    assert "At the end plain has the highest mean reward, 0.6 [0.5, 0.7]." in text
    assert "ahead of clipped:" in text and "its lead over long is not supported" in text
    report["rules"][0]["values"] = [0.1, 0.2]
    assert "At the end" not in " ".join(summarise(report, curves))


def at_the_end(**rewards):
    """The sentences of a comparison at no KL, of these rewards by rule and seed; None: that run failed."""
    cells = [
        {"rule": rule, "seed": seed, "status": "finished" if reward else "failed", "reward": reward, "iterations": 0}
        for rule, of_seeds in rewards.items()
        for seed, reward in enumerate(of_seeds)
    ]
    report = report_of([curve(rule, seed, 0.5) for rule in rewards for seed in range(3)], matched=[], cells=cells)
    return " ".join(summarise({**report, "rules": [rule | {"values": []} for rule in report["rules"]]}, []))


def test_the_end_ranks_only_rules_with_all_seeds_and_names_the_others():
    text = at_the_end(a=(5.0, 5.1, None), b=(6.0, 6.1, -10.0), c=(4.0, 4.0, 4.1), d=(7.0, None, None))
    assert "At the end c has the highest mean reward, 4.03" in text
    assert "Not ranked, because not all runs finished: a and d." in text
    text = at_the_end(trpo=(3000.0, 1000.0, 800.0), ppo=(2900.0, None, None))
    assert "At the end only trpo can be ranked; its mean reward is 1,600 [800, 3,000]." in text
    assert "At the end there is nothing to compare" in at_the_end(a=(1.0, 2.0, None), b=(3.0, None, 4.0))
    assert "At the end" not in at_the_end(a=(None, None, None), b=(None, None, None))


def test_the_rules_that_did_not_reach_a_kl_with_all_seeds_are_named():
    curves = [curve(rule, seed, 0.5) for rule in ("trpo", "b") for seed in range(3)]
    short = [Curve(rule, 1.0, seed, np.array([0.0, 1.0]), np.array([0.1, 0.9])) for rule in "cd" for seed in range(3)]
    text = " ".join(summarise(report_of(curves + short), curves + short))
    assert "trpo and b share the highest mean reward" in text
    assert "Not ranked, because a seed did not reach it: c and d." in text
    text = " ".join(summarise(report_of(curves[:3] + short), curves[:3] + short))
    assert "At 2 nats of reference KL only trpo can be ranked; its mean reward is 0.5 [0.5, 0.5]." in text
    report = report_of(curves)
    report["rules"].append({"name": "lost", "bounded": False, "values": [1.0]})  # no run of it finished
    assert "Not ranked, because a seed did not reach it: lost." in " ".join(summarise(report, curves))


def test_a_rule_with_runs_that_are_not_finished_is_not_said_to_miss_a_kl():
    curves = [curve("trpo", seed, 0.5) for seed in range(3)] + [curve("b", 0, 0.6)]
    report = report_of(curves)
    report["cells"] += [report["cells"][0] | {"rule": "b", "seed": 1, "status": "missing"}]
    text = " ".join(summarise(report, curves))
    assert "Not ranked, because not all runs finished: b." in text
    assert "did not reach" not in text


def test_the_average_step_is_that_of_finished_runs():
    curves = [curve("ppo_clip", seed, 0.5) for seed in range(2)]
    report = report_of(curves)
    for cell, step_kl in zip(report["cells"], (0.004, 0.014), strict=True):
        cell |= {"step_kl": step_kl, "step_kl_mean_max": 0.02, "iterations": 12, "status": "finished"}
    stopped = {"status": "missing", "seed": 2, "step_kl": 0.027, "step_kl_mean_max": 0.05, "iterations": 2}
    report["cells"].append(report["cells"][0] | stopped)
    report["rules"] = [rule | {"bounded": False} for rule in report["rules"]]
    text = " ".join(summarise(report, curves))
    assert (
        "its finished runs had 0.004 to 0.014 nats a token on average, and the furthest of 26 updates went 0.05 nats"
    ) in text
    report["cells"] = report["cells"][2:]
    assert "has no bound on the step KL: the furthest of 2 updates went 0.05 nats" in " ".join(summarise(report, []))


def test_a_control_rule_that_is_beyond_a_kl_is_not_said_to_miss_it():
    """There a curve does not begin at the start."""
    curves = [curve("trpo", seed, 0.5) for seed in range(3)]
    far = [Curve("far", None, seed, np.array([5.0, 6.0]), np.array([0.1, 0.9])) for seed in range(3)]
    text = " ".join(summarise(report_of(curves + far, world="control"), curves + far))
    assert "Not ranked, because a seed has no runs on both sides of it: far." in text
    text = " ".join(summarise(report_of(far, world="control"), far))
    assert "there is nothing to compare: no rule has runs on both sides of it with all seeds." in text
    assert "reach" not in text


def test_the_difference_is_that_of_a_paired_t_test():
    one, other = [0.5, 0.9, 0.4], [0.45, 0.7, 0.41]
    curves = [curve("one", seed, reward) for seed, reward in enumerate(one)]
    curves += [curve("other", seed, reward) for seed, reward in enumerate(other)]
    from scipy.stats import ttest_rel

    expected = ttest_rel(one, other).confidence_interval(0.95)
    rows = [{"rule": "one", "value": 1.0}, {"rule": "other", "value": 1.0}]
    assert paired_difference(curves, 2.0, *rows) == pytest.approx(tuple(expected))
    surer = ttest_rel(one, other).confidence_interval(0.99)
    assert paired_difference(curves, 2.0, *rows, 0.99) == pytest.approx(tuple(surer))
    assert paired_difference([one for one in curves if one.seed == 0], 2.0, *rows) is None


def test_bounds_costs_and_failures_are_told():
    curves = [curve(rule, seed, 0.5) for rule in ("trpo", "ppo_clip") for seed in (0, 1)]
    report = report_of(curves)
    report["cells"][0]["violations"] = 0.1
    report["cells"].append({"rule": "broken", "status": "failed", "iterations": None})
    report["same_start"]["equal"] = False
    text = " ".join(summarise(report, curves))
    assert "4 of 5 runs finished" in text and "Runs of broken failed" in text
    assert "trpo kept its bound on the exact step KL in all but 1 of 20 updates" in text
    assert "its finished runs had 0.01 nats a token on average, and the furthest of 20 updates went 0.03 nats" in text
    assert "trpo 2.0 gradients and 0.5 s" in text
    assert "nothing here is matched" in text
    report["cells"][0]["rejected"], report["cells"][2]["rejected"], report["cells"][3]["rejected"] = 3, 10, 10
    text = " ".join(summarise(report, curves))
    assert "in all but 1 of 20 updates, of which 3 were rejected and moved nothing." in text
    assert "ppo_clip moved nothing: all of its 20 updates were rejected." in text


def test_the_share_of_the_limit_is_of_its_gain():
    curves = [curve(rule, seed, 0.5) for rule in ("trpo", "b") for seed in (0, 1)]
    points = [
        {"kl": kl, "reward": reward, "low": None, "high": None} for kl, reward in ((0.0, 0.1), (1.0, 0.7), (3.0, 1.1))
    ]
    limit = {"tilted": points, "best_of_n": [{"n": 1, "kl": 0.0, "reward": 0.1}], "prompts": 24, "samples": 8}
    limit |= {"evaluated_prompts": 24, "of_seed": None}
    text = " ".join(summarise(report_of(curves, limit=limit), curves))
    assert "estimated at 0.9, from 0.1 at the start: trpo gets 50% of that gain." in text
    for evaluated in (24, 64):
        text = " ".join(summarise(report_of(curves, limit=limit | {"evaluated_prompts": evaluated}), curves))
        assert ("of that gain" in text) == (evaluated == 24)
    assert "part of it can be told, because the rules are evaluated on 64 prompts, and the limit is of 24." in text
    text = " ".join(summarise(report_of(curves, limit=limit | {"of_seed": 1}), curves))
    assert "because each seed holds out prompts of its own, and the limit is of those of seed 1." in text
    worse = [curve("trpo", seed, 0.05) for seed in (0, 1)]
    assert "from 0.1 at the start." in " ".join(summarise(report_of(worse, limit=limit), worse))


def test_what_fresh_samples_confirm():
    curves = [curve("trpo", seed, 0.5) for seed in (0, 1)]
    row = {"rule": "trpo", "error": None, "accepted": True, "batch_gain": 0.2, "fresh_low": -0.01}
    rows = [
        row | {"fresh_gain": 0.05},
        row | {"fresh_gain": 0.15, "fresh_low": 0.01},
        row | {"fresh_gain": 0.0, "batch_gain": 0.0, "accepted": False},
        row | {"error": "broke", "batch_gain": None, "fresh_gain": None},
        row | {"batch_gain": 9.0, "fresh_gain": None},  # it was not finite
    ]
    text = " ".join(summarise(report_of(curves, one_update={"rows": rows}), curves))
    assert "trpo 0.2 and 0.1 (1 of 2 above zero)." in text

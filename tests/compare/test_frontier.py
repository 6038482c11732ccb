"""Reward at a KL and along the frontier: which crossing, which knob value, and who has reached it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lm_trust.compare.frontier import Curve, frontier, improvement_table, matched_table, reached_kls, reward_at
from lm_trust.compare.statistics import bootstrap_mean, probability_of_improvement

NAN = float("nan")


def curve(kl, reward, rule="trpo", value=0.01, seed=0):
    return Curve(rule, value, seed, np.array(kl, dtype=float), np.array(reward, dtype=float))


def straight(slope, *, end=4.0, **which):
    """A run whose reward is slope times KL up to `end`."""
    return curve([0, end], [0, slope * end], **which)


def test_between_two_evaluations_it_is_linear_and_at_one_it_is_its_reward():
    run = curve([0, 1, 3], [0.1, 0.5, 0.7])
    assert reward_at(run, 0) == 0.1
    assert reward_at(run, 1) == 0.5
    assert reward_at(run, 2.5) == pytest.approx(0.65)
    assert reward_at(run, 3) == 0.7


def test_the_course_of_a_run_is_interpolated_in_the_root_of_the_kl():
    """Rules on one frontier of that form are alike, however far they go between two evaluations."""

    def course(*kl):
        return replace(curve(kl, 0.1 + 0.4 * np.sqrt(kl)), by_root=True)

    for run in (course(0, 4), course(0, 1, 4), course(0, 0.01, 0.5, 2, 4)):
        assert reward_at(run, 0.5) == pytest.approx(0.1 + 0.4 * math.sqrt(0.5))
        assert reward_at(run, 3) == pytest.approx(0.1 + 0.4 * math.sqrt(3))


@pytest.mark.parametrize("by_root", [False, True])
def test_between_equal_rewards_lies_that_reward(by_root):
    run = replace(curve([0, 0.7, 3.1], [500, 500, 500]), by_root=by_root)
    assert {reward_at(run, kl) for kl in np.linspace(0, 3.1, 97)} == {500.0}


def test_a_kl_that_rounding_left_below_zero_is_none():
    start = Curve("trpo", 0.01, 0, np.array([0, -1e-8, 1.0]), np.array([0.1, 0.2, 0.6]), by_root=True)
    assert reward_at(start, 0.25) == pytest.approx(0.4)


def test_a_kl_that_is_never_reached_has_no_reward():
    assert reward_at(curve([0, 1, 3], [0.1, 0.5, 0.7]), 3.01) is None
    assert reward_at(curve([1, 2], [0.1, 0.5]), 0.5) is None
    assert reward_at(curve([], []), 0.0) is None
    assert reward_at(curve([2], [0.5]), 1.0) is None
    assert reward_at(curve([2], [0.5]), 2.0) == 0.5


def test_of_several_crossings_the_first_counts():
    """A trajectory that goes out to 3, back to 1 and out again."""
    run = curve([0, 3, 1, 4], [0.0, 0.3, 0.9, 1.2])
    assert reward_at(run, 2) == pytest.approx(0.2)
    assert reward_at(run, 1) == pytest.approx(0.1)
    assert reward_at(run, 3.5) == pytest.approx(1.15)


def test_a_trajectory_that_starts_above_a_kl_is_there_when_it_comes_down_to_it():
    run = curve([3, 2, 1, 2], [0.9, 0.6, 0.5, 0.0])
    assert reward_at(run, 1.5) == pytest.approx(0.55)
    assert reward_at(run, 2) == 0.6
    assert reward_at(run, 0.5) is None


def test_a_run_that_stands_still_counts_by_its_first_evaluation():
    run = curve([0, 1, 1, 2], [0.0, 0.4, 0.8, 1.0])
    assert reward_at(run, 1) == 0.4
    assert reward_at(run, 1.5) == pytest.approx(0.9)


def test_a_failed_evaluation_is_left_out():
    run = curve([0, 1, NAN, 3, 4], [0.0, NAN, 0.5, 0.6, NAN])
    assert reward_at(run, 1) == pytest.approx(0.2)
    assert reward_at(run, 3) == 0.6
    assert reward_at(run, 3.5) is None
    assert reward_at(curve([0, 1], [NAN, NAN]), 0.5) is None
    assert reward_at(Curve("trpo", 0.01, 0, [0, 1, 2], [0.0, None, 1.0]), 1) == 0.5  # null in a file


def sweep():
    """trpo has two knob values, the small one better per nat but never beyond 2; seeds differ by an offset."""
    runs = []
    for seed, extra in enumerate((-0.1, 0.0, 0.1)):
        runs.append(straight(0.5 + extra, end=2.0, value=0.01, seed=seed))
        runs.append(straight(0.3 + extra, end=4.0, value=0.03, seed=seed))
        runs.append(straight(0.21 + extra, end=3.0 + seed, rule="ppo", value=1e-3, seed=seed))
    return runs


def test_the_frontier_takes_the_best_knob_value_that_all_seeds_reach():
    trpo, ppo = frontier(sweep(), np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), seeds=3)
    assert trpo["rule"] == "trpo"
    assert trpo["kl"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert trpo["value"][1:] == [0.01, 0.01, 0.03, 0.03]
    assert trpo["reward"] == pytest.approx([0.0, 0.5, 1.0, 0.9, 1.2])
    assert trpo["low"] == pytest.approx([0.0, 0.4, 0.8, 0.6, 0.8])
    assert trpo["high"] == pytest.approx([0.0, 0.6, 1.2, 1.2, 1.6])
    # Two of three seeds went on to 4: their mean is not shown.
    assert ppo["rule"] == "ppo"
    assert ppo["kl"] == [0.0, 1.0, 2.0, 3.0]
    json.dumps([trpo, ppo], allow_nan=False)


def test_a_seed_that_no_rule_has_is_missing_all_the_same():
    """Of four that were asked for three have finished, or the fourth failed for every rule."""
    assert all(entry["kl"] == [] for entry in frontier(sweep(), [1.0], seeds=4))
    assert [(row["seeds"], row["reached"], row["mean"]) for row in matched_table(sweep(), [1.0], seeds=4)] == [
        (4, 3, None),
        (4, 3, None),
    ]
    assert improvement_table(sweep(), [1.0], seeds=4) == []


def test_one_knob_value_serves_all_seeds():
    """Each seed by its own best value would have 1.0; the better of the two values has 0.6."""
    runs = [
        *(straight(slope, value=0.01, seed=seed) for seed, slope in enumerate((1.0, 0.2))),
        *(straight(slope, value=0.03, seed=seed) for seed, slope in enumerate((0.1, 1.0))),
    ]
    (entry,) = frontier(runs, [1.0], seeds=2)
    assert entry["reward"] == pytest.approx([0.6])
    assert entry["value"] == [0.01]


def test_a_value_with_a_missing_seed_gives_way_to_one_with_all():
    runs = [straight(slope, value=0.01, seed=seed) for seed, slope in enumerate((0.9, 0.9))]
    runs += [straight(slope, value=0.03, seed=seed) for seed, slope in enumerate((0.2, 0.3, 0.4))]
    (entry,) = frontier(runs, [1.0], seeds=3)
    assert entry["value"] == [0.03]
    assert entry["reward"] == pytest.approx([0.3])


def test_a_rule_that_lost_a_seed_altogether_is_not_shown_by_its_survivors():
    runs = [straight(0.5, seed=seed) for seed in range(3)] + [straight(0.9, rule="ppo", seed=seed) for seed in range(2)]
    trpo, ppo = frontier(runs, [1.0], seeds=3)
    assert trpo["kl"] == [1.0]
    assert ppo == {"rule": "ppo", "kl": [], "reward": [], "low": [], "high": [], "value": []}
    assert not improvement_table(runs, [1.0], seeds=3)
    assert [(row["mean"], row["reached"]) for row in matched_table(runs, [1.0], seeds=3)] == [(0.5, 3), (None, 2)]


def test_control_has_a_curve_a_seed_through_its_knob_values():
    runs = [
        curve([0.01, 0.03], [100, 300 + 20 * seed], value=None, seed=seed, rule=rule)
        for rule in ("a", "b")
        for seed in (0, 1)
    ]
    for entry in frontier(runs, [0.005, 0.02, 0.03], seeds=2):
        assert entry["kl"] == [0.02, 0.03]
        assert entry["reward"] == pytest.approx([205, 310])
        assert entry["value"] == [None, None]


def test_the_kls_of_a_rule_are_those_that_all_seeds_reached():
    trpo = [run for run in sweep() if run.rule == "trpo"]
    assert reached_kls(trpo, 5, seeds=3).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    (entry,) = frontier(trpo, reached_kls(trpo, 5, seeds=3), seeds=3)
    assert entry["kl"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(reached_kls(trpo, 5, seeds=4)) == 0
    # Of seeds that met on a thousandth of what one of them went through.
    ends = ([0.001, 0.003], [0.002, 9.0], [NAN, 0.0015, 0.004])
    apart = [curve(kl, range(len(kl)), value=None, seed=seed) for seed, kl in enumerate(ends)]
    assert reached_kls(apart, 3, seeds=3) == pytest.approx([0.002, 0.0025, 0.003])
    assert reached_kls([*apart[:2], curve([0.5, 1], [0, 1], value=None)], 3, seeds=3).size == 0
    assert reached_kls([curve([NAN], [1])], 3, seeds=1).size == 0


def test_the_matched_table():
    rows = matched_table(sweep(), [1.0, 4.0], seeds=3)
    assert [(row["kl"], row["rule"]) for row in rows] == [(1.0, "trpo"), (1.0, "ppo"), (4.0, "trpo"), (4.0, "ppo")]
    first, _, third, last = rows
    assert first == {
        **{"kl": 1.0, "rule": "trpo", "value": 0.01, "seeds": 3, "reached": 3},
        **dict(zip(("mean", "low", "high"), bootstrap_mean([0.4, 0.5, 0.6]), strict=True)),
        **{"iqm": first["mean"], "iqm_low": first["low"], "iqm_high": first["high"]},
    }
    assert third["value"] == 0.03
    assert third["mean"] == pytest.approx(1.2)
    assert last == {
        **{"kl": 4.0, "rule": "ppo", "value": 1e-3, "seeds": 3, "reached": 2},
        **dict.fromkeys(("mean", "low", "high", "iqm", "iqm_low", "iqm_high")),
    }


def test_the_matched_table_of_four_seeds_has_its_own_interquartile_mean():
    rows = matched_table(
        [straight(slope, seed=seed) for seed, slope in enumerate((0.1, 0.2, 0.4, 9.0))], [1.0], seeds=4
    )
    assert rows[0]["iqm"] == pytest.approx(0.3)
    assert rows[0]["mean"] == pytest.approx(2.425)


def test_where_nobody_gets_there_no_value_is_named():
    (row,) = matched_table([straight(0.5)], [9.0], seeds=1)
    assert (row["value"], row["reached"], row["mean"]) == (None, 0, None)
    assert improvement_table([straight(0.5), straight(0.1, rule="ppo")], [9.0], seeds=1) == []


def test_a_single_seed_has_no_interval():
    (row,) = matched_table([straight(0.5)], [2.0], seeds=1)
    assert (row["mean"], row["low"], row["high"], row["iqm_low"]) == (1.0, None, None, None)
    (entry,) = frontier([straight(0.5)], [2.0], seeds=1)
    assert entry["low"] == entry["high"] == [None]


def test_the_improvement_table_has_both_orders_of_every_pair_that_got_there():
    rows = improvement_table(sweep(), [1.0, 3.0, 4.0], seeds=3)
    assert [(row["kl"], row["rule"], row["other"]) for row in rows] == [
        (1.0, "trpo", "ppo"),
        (1.0, "ppo", "trpo"),
        (3.0, "trpo", "ppo"),
        (3.0, "ppo", "trpo"),
    ]
    expected = probability_of_improvement([0.6, 0.9, 1.2], [0.33, 0.63, 0.93])
    assert (rows[2]["probability"], rows[2]["low"], rows[2]["high"]) == pytest.approx(tuple(expected))
    assert rows[2]["probability"] + rows[3]["probability"] == pytest.approx(1)
    assert rows[0]["probability"] == 1.0


def test_both_orders_of_a_pair_have_one_interval():
    random = np.random.default_rng(0)
    runs = [straight(slope, rule=rule, seed=seed) for rule, mean in (("trpo", 0.3), ("ppo", 0.0), ("reinforce", -0.2))
            for seed, slope in enumerate(random.normal(mean, 1, 5))]  # fmt: skip
    rows = {(row["rule"], row["other"]): row for row in improvement_table(runs, [1.0], seeds=5)}
    assert len(rows) == 6
    for (rule, other), row in rows.items():
        mirrored = rows[other, rule]
        assert row["low"] < row["probability"] < row["high"]
        assert (row["low"], row["high"]) == pytest.approx((1 - mirrored["high"], 1 - mirrored["low"]))
        assert row["p_value"] == mirrored["p_value"]
    (one,) = {row["low"] for row in improvement_table([run for run in runs if run.seed == 0], [1.0], seeds=1)}
    assert one is None

"""Statistics of a few seeds: against enumeration and against scipy's other routes, and what their intervals hold."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lm_trust.compare.statistics import (
    Estimate,
    bootstrap_coverage,
    bootstrap_mean,
    coverage_text,
    interquartile_mean,
    mann_whitney,
    probability_of_improvement,
)

THREE = [0.9, 0.2, 0.4]


def every_resample(values):
    return np.array(list(itertools.product(values, repeat=len(values))))


def test_the_mean_of_three_seeds_has_the_interval_of_all_27_resamples_which_is_their_range():
    found = bootstrap_mean(THREE)
    low, high = np.quantile(every_resample(THREE).mean(1), [0.025, 0.975], method="inverted_cdf")
    assert found == pytest.approx((0.5, low, high))
    assert (found.low, found.high) == pytest.approx((0.2, 0.9))


def test_the_interval_of_five_is_that_of_all_3125_resamples():
    values = [0.1, 0.5, 0.35, 0.8, 0.9]
    low, high = np.quantile(every_resample(values).mean(1), [0.025, 0.975])
    assert bootstrap_mean(values) == pytest.approx((0.53, low, high), abs=0.01)


def test_over_many_observations_it_is_the_normal_interval():
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    mean, half = values.mean(), 1.96 * values.std(ddof=1) / 20
    assert bootstrap_mean(values) == pytest.approx((mean, mean - half, mean + half), abs=0.03)


def test_over_three_seeds_the_interval_holds_the_mean_three_times_in_four():
    """As the module says: of three draws all lie on one side of the median in a quarter of cases."""
    draws = np.random.default_rng(2).normal(size=(300, 3))
    held = [found.low <= 0 <= found.high for found in map(bootstrap_mean, draws)]
    assert np.mean(held) == pytest.approx(0.75, abs=0.07)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10])
def test_an_interval_over_a_few_seeds_is_worth_what_is_said_of_it(count):
    samples = np.random.default_rng(count).normal(size=(1000, count))
    held = [found.low <= 0 <= found.high for found in map(bootstrap_mean, samples)]
    assert np.mean(held) == pytest.approx(bootstrap_coverage(count), abs=0.035)


def test_over_many_seeds_the_interval_is_worth_95():
    assert [coverage_text(count) for count in (3, 5, 10)] == ["75 %", "85 %", "90 %"]
    assert bootstrap_coverage(1000) == pytest.approx(0.95, abs=0.005)
    assert [coverage_text(count) for count in (1, 21)] == [None, None]


def test_the_interquartile_mean_leaves_out_a_quarter_on_either_side():
    assert interquartile_mean([100.0, 1, 2, 3, 4, 5, 6, -100]).value == 3.5
    assert interquartile_mean(THREE) == bootstrap_mean(THREE)
    four = interquartile_mean([0.0, 1.0, 2.0, 50.0])
    resampled = np.sort(every_resample([0.0, 1.0, 2.0, 50.0]))[:, 1:3].mean(1)
    assert four.value == 1.5
    assert (four.low, four.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.5)


def test_the_probability_of_improvement_is_the_share_of_pairs_and_ties_count_half():
    a, b = [1.0, 2.0, 3.0], [2.0, 2.0, 0.0]
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    found = probability_of_improvement(a, b)
    assert found.value == pytest.approx(np.mean(pairs)) == pytest.approx(6 / 9)
    assert found.value == pytest.approx(stats.mannwhitneyu(a, b).statistic / 9)
    assert probability_of_improvement(b, a).value == pytest.approx(1 - found.value)
    shares = [stats.mannwhitneyu(x, y).statistic / 9 for x in every_resample(a) for y in every_resample(b)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])), abs=1e-9)


def test_sides_of_different_sizes():
    a, b = np.arange(5.0), np.array([2.5, -1.0])
    assert probability_of_improvement(a, b).value == pytest.approx(stats.mannwhitneyu(a, b).statistic / 10)


def test_three_all_above_three_is_as_far_as_it_goes():
    assert probability_of_improvement([4, 5, 6], [1, 2, 3]) == Estimate(1.0, 1.0, 1.0)
    assert probability_of_improvement([1, 2, 3], [4, 5, 6]) == Estimate(0.0, 0.0, 0.0)


def orders(values):
    """Every way to give half of the values to either side."""
    indices = set(range(len(values)))
    for one in itertools.combinations(indices, len(values) // 2):
        yield [values[index] for index in one], [values[index] for index in indices.difference(one)]


@pytest.mark.parametrize("values", [range(6), range(8), range(10), [0, 1, 2, 3, 3, 3, 3, 4, 5, 6], [500] * 7 + [1]])
def test_the_exact_test_tells_equals_apart_by_chance_in_less_than_a_twentieth(values):
    """Unlike the interval of the probability of improvement."""
    found = [mann_whitney(*sides) < 0.05 for sides in orders(values)]
    assert np.mean(found) < 0.05
    assert any(found) == (len(set(values)) > 6)


def test_of_four_against_four_only_the_two_extreme_orders_are_told_apart():
    told = [sides for sides in orders(range(8)) if mann_whitney(*sides) < 0.05]
    assert told == [([0, 1, 2, 3], [4, 5, 6, 7]), ([4, 5, 6, 7], [0, 1, 2, 3])]
    assert mann_whitney(*told[0]) == pytest.approx(2 / math.comb(8, 4))
    assert mann_whitney([1.0], [2.0]) == 1.0


@pytest.mark.parametrize("statistic", [bootstrap_mean, interquartile_mean])
def test_one_two_and_equal_values(statistic):
    assert statistic([0.3]) == Estimate(0.3, None, None)
    assert statistic([0.3, 0.1]) == pytest.approx((0.2, 0.1, 0.3))
    for count in (2, 3, 4, 7, 50):
        found = statistic([0.1] * count)
        assert found == pytest.approx((0.1, 0.1, 0.1))
        assert found.low <= found.value <= found.high


def test_one_run_on_a_side_has_no_interval_and_equal_runs_are_even():
    assert probability_of_improvement([1.0], [0.0, 2.0, 3.0]) == Estimate(pytest.approx(1 / 3), None, None)
    assert probability_of_improvement([0.5] * 3, [0.5] * 3) == Estimate(0.5, 0.5, 0.5)


def test_the_same_every_time_and_no_global_generator_is_touched():
    values = np.random.default_rng(3).normal(size=9)
    before = np.random.get_state()[1].copy()
    assert bootstrap_mean(values) == bootstrap_mean(list(values))
    assert probability_of_improvement(values, -values) == probability_of_improvement(values, -values)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("wrong", [[], [0.1, float("nan")], [float("inf"), 1.0], [[0.1, 0.2]]])
def test_nothing_or_what_is_not_a_number_is_refused(wrong):
    for statistic in (bootstrap_mean, interquartile_mean, lambda values: probability_of_improvement([1.0], values)):
        with pytest.raises(ValueError, match="finite observations"):
            statistic(wrong)

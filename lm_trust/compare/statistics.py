"""What a few seeds say: mean, interquartile mean and probability of improvement, each with a 95 % bootstrap interval.

The intervals are percentiles of the bootstrap over the observations given, as in Agarwal et al. 2021 (arXiv
2108.13264). Percentiles are defined for every sample; finer kinds are not: BCa has no interval for equal values.

What such an interval is worth over three seeds: less than 95 %. That of a mean is exactly [lowest, highest] for two
and for three values, because each of the extreme resamples has a share of more than 2.5 %; for a symmetric distribution
it holds the true mean in 50 % of cases with two values and in 75 % with three. Nor is a probability of improvement of 1
with an interval of [1, 1] a certainty: three seeds all above three others are one of the 20 orders that chance has. The
test that knows this is `mann_whitney`. (`bootstrap_coverage` is of more seeds, too.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lm_trust.intervals import Estimate

_FEW_SEEDS = 20  # up to them the interval is told with what it is worth


def known(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def bootstrap_coverage(count: int) -> float:
    """How often the 95 % percentile interval of the mean of so many normal observations, two or more, holds the mean.

    With many resamples it is the mean and 1.96 of its standard errors, by the standard deviation without Bessel's
    correction. For two it ends at the observations themselves.
    """
    if count == 2:
        return 0.5
    return float(1 - 2 * stats.t.sf(stats.norm.ppf(0.975) * math.sqrt((count - 1) / count), count - 1))


def coverage_text(count: int) -> str | None:
    """That in whole percent, for so few seeds that it is to be told; None for a single one, which has no interval."""
    return f"{100 * bootstrap_coverage(count):.0f} %" if 2 <= count <= _FEW_SEEDS else None


def bootstrap_mean(values: ArrayLike) -> Estimate:
    """The mean of (N,) observations.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    return _estimate(np.mean, values)


def interquartile_mean(values: ArrayLike) -> Estimate:
    """The mean of what is left of (N,) observations without the lowest and the highest floor(N / 4) of them.

    Agarwal et al. 2021, section 4.3: it is not moved by an outlying run. Of fewer than four observations it is the
    mean.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    return _estimate(_middle, values)


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> Estimate:
    """P(a > b) for one of the (N,) observations a and one of the (M,) observations b at random; ties count half.

    Agarwal et al. 2021, section 4.3; the interval resamples both sides, each by itself.

    Raises:
        ValueError: there are none on a side, or one is not finite.
    """
    return _estimate(_wins, a, b)


def mann_whitney(a: ArrayLike, b: ArrayLike) -> float:
    """The two-sided p-value of the exact Mann-Whitney test of (N,) observations against (M,): are they alike.

    Of a few observations the interval of `probability_of_improvement` is too narrow to decide that by. By chance it
    lies on one side of a half in 5.7 % of cases with four against four, and in 9.5 % with five; this p is below 0.05
    in 2.9 % and in 3.2 %. Ties make it no more often so.
    """
    return float(stats.mannwhitneyu(a, b, method="exact").pvalue)


def _middle(values: np.ndarray, axis: int) -> np.ndarray:
    return stats.trim_mean(values, 0.25, axis=axis)


def _wins(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """The share of pairs that a wins, over the last axis, which is all that the bootstrap asks for."""
    return 0.5 + 0.5 * np.sign(a[..., :, None] - b[..., None, :]).mean((-2, -1))


def _estimate(statistic: Callable[..., np.ndarray], *samples: ArrayLike) -> Estimate:
    arrays = [np.asarray(each, dtype=float) for each in samples]
    for each in arrays:
        if not (each.ndim == 1 and len(each) and np.isfinite(each).all()):
            raise ValueError(f"a list of finite observations is needed, not {each}")
    value = float(statistic(*arrays, axis=-1))
    if min(map(len, arrays)) < 2:
        return Estimate(value, None, None)
    low, high = stats.bootstrap(arrays, statistic, method="percentile", vectorized=True, rng=0).confidence_interval
    # Rounding alone can put an end of the interval of equal values on the wrong side of them.
    return Estimate(value, min(float(low), value), max(float(high), value))

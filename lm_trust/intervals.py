"""The mean of observations that may come in clusters, and how sure it is; both worlds' evaluations end in one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit


class Estimate(NamedTuple):
    """A statistic and the ends of its 95 % interval, which are None for fewer than two observations."""

    value: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> list[float] | None:
        """[low, high], or None where there is none."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def clustered_mean(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Any] | np.ndarray, *, confidence: float = 0.95
) -> Estimate:
    """The mean of values that are independent only between clusters, with its interval.

    Student's t with the cluster-robust standard error (Liang and Zeger 1986), scaled for few clusters; where each value
    is a cluster, that is the usual interval of a mean. Not a bootstrap: over a handful of environments that is too
    narrow. The ends are None for fewer than two clusters.

    Args:
        values: (N,).
        clusters: (N,) which cluster each belongs to.
        confidence: of the interval.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    names, members = np.unique(clusters, return_inverse=True)
    count = len(names)
    if count < 2 or not math.isfinite(mean):
        return Estimate(mean, None, None)
    sums = np.bincount(members, weights=values - mean)
    error = math.sqrt(count / (count - 1) * np.square(sums).sum()) / len(values)
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * error
    return Estimate(mean, mean - half, mean + half)

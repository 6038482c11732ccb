"""When a run ends before its iterations are done: at a limit that was set, or where it no longer moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_trust.training.config import Config, LanguageConfig
from lm_trust.training.config_language import Stop
from lm_trust.training.progress import REASONS

# An iteration with nothing to learn from, all its rewards alike, is no failure: a sparse reward has many of them.
NOTHING_TO_LEARN = "zero_gradient"
CONTROL_ADVICE = "a smaller update.learning_rate, update.max_kl or critic.learning_rate"
ADVICE = {
    "non_finite": f"{CONTROL_ADVICE}, or model.autocast bfloat16 or null",
    "negative_curvature": "a larger update.damping",
    "kl_exceeded": "a larger update.max_backtracks or update.damping",
    "budget_exceeded": "a larger reference.budget, or a smaller update.max_kl or update.learning_rate",
    "no_improvement": "a larger rollout.batch_size or update.max_backtracks, or a smaller update.max_kl",
}


@dataclass(frozen=True)
class Ending:
    """Why a run ends now.

    Attributes:
        words: one line, without the iteration.
        failed: whether it ends because it cannot go on; otherwise it has reached a limit and ends as any run does.
    """

    words: str
    failed: bool = False


def stopping_of(config: Config) -> Stopping:
    """What ends a run of this configuration.

    A control run has no limits to set, and goes on where its updates are rejected, but not where nothing is finite any
    more: a network that is not stays so.
    """
    if isinstance(config, LanguageConfig):
        return Stopping(config.stop)
    return Stopping(Stop(), only_non_finite=True)


class Stopping:
    """Watches a run's metrics for the limits of its `stop` section.

    A rejected update with nothing to learn from counts neither for nor against a row of rejections. A run that is
    resumed counts from none, but does not go on beyond a limit (`reached`).

    Args:
        limits: the section.
        only_non_finite: a rejection for another reason breaks the row.
    """

    def __init__(self, limits: Stop, *, only_non_finite: bool = False) -> None:
        self._limits = limits
        self._only_non_finite = only_non_finite
        self._rejections: list[Mapping[str, Any]] = []

    def after(self, metrics: Mapping[str, Any]) -> Ending | None:
        """Whether the run ends after an iteration with this line of metrics; a number that is not finite ends none."""
        return self.reached(metrics) or self._rejected(metrics)

    def reached(self, metrics: Mapping[str, Any]) -> Ending | None:
        """Whether an iteration with this line of metrics is beyond a limit; rejections are not counted."""
        limits = self._limits
        reward, reference_kl, entropy = (_number(metrics, key) for key in ("reward_mean", "reference_kl", "entropy"))
        if limits.reward is not None and reward >= limits.reward:
            return Ending(f"the mean reward {reward:.4g} is at least stop.reward {limits.reward:g}")
        if limits.reference_kl is not None and reference_kl > limits.reference_kl:
            return Ending(f"the reference KL {reference_kl:.4g} is beyond stop.reference_kl {limits.reference_kl:g}")
        if limits.entropy is not None and entropy < limits.entropy:
            return Ending(f"the entropy {entropy:.4g} is below stop.entropy {limits.entropy:g}")
        return None

    def _rejected(self, metrics: Mapping[str, Any]) -> Ending | None:
        reason = metrics["reason"]
        if metrics["accepted"] or (self._only_non_finite and reason not in ("non_finite", NOTHING_TO_LEARN)):
            self._rejections.clear()
        elif reason != NOTHING_TO_LEARN:
            self._rejections.append(metrics)
        most = self._limits.rejections
        if most is not None and len(self._rejections) >= most:
            return Ending(self._stuck(), failed=True)
        return None

    def _stuck(self) -> str:
        reasons = dict.fromkeys(line["reason"] for line in self._rejections)
        words = ", ".join(REASONS.get(reason, reason.replace("_", " ")) for reason in reasons)
        offender = self._rejections[-1].get("offender")
        told = f"{len(self._rejections)} updates in a row were rejected: {words}{f' ({offender})' if offender else ''}"
        if self._only_non_finite:
            return f"{told}; try {CONTROL_ADVICE} in a new run"
        advice = "; ".join(ADVICE[reason] for reason in reasons if reason in ADVICE) or "other settings of update"
        return f"stop.rejections: {told}; try {advice} in a new run, or go on with --resume"


def _number(metrics: Mapping[str, Any], key: str) -> float:
    """What is not known, or was not finite when the line was written, as NaN, which is beyond no limit."""
    value = metrics.get(key)
    return math.nan if value is None else value

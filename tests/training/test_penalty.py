"""The adaptive penalty against the published controller (Ziegler et al. 2019, and TRL's defaults)."""

import pytest

from lm_trust.training.config_language import AdaptivePenalty
from lm_trust.training.penalty import adapted_penalty

PUBLISHED = AdaptivePenalty(target=6.0, horizon=10000)


def test_the_published_numbers_give_the_published_sequence():
    """Initial coefficient 0.2, target 6, horizon 10000, batches of 256: worked by hand, error clipped to 0.2."""
    kls = [0.0, 3.0, 5.4, 6.0, 6.6, 9.0, 60.0, float("inf")]
    errors = [-0.2, -0.2, -0.1, 0.0, 0.1, 0.2, 0.2, 0.2]
    coefficient, expected = 0.2, 0.2
    for kl, error in zip(kls, errors, strict=True):
        coefficient = adapted_penalty(PUBLISHED, coefficient, kl, 256)
        expected *= 1 + error * 0.0256
        assert coefficient == pytest.approx(expected, rel=1e-12)
    first = adapted_penalty(PUBLISHED, 0.2, 0.0, 256)
    assert first == pytest.approx(0.198976, abs=1e-12)
    assert adapted_penalty(PUBLISHED, first, 9.0, 256) == pytest.approx(0.19999475712, abs=1e-10)


def test_a_kl_that_is_not_a_number_changes_nothing():
    assert adapted_penalty(PUBLISHED, 0.2, float("nan"), 256) == 0.2


def test_the_shortest_horizon_that_a_config_admits_keeps_the_penalty_positive():
    batch = 64
    assert adapted_penalty(AdaptivePenalty(target=6.0, horizon=13), 0.2, 0.0, batch) > 0
    assert adapted_penalty(AdaptivePenalty(target=6.0, horizon=12), 0.2, 0.0, batch) < 0  # which it therefore refuses

"""Drawing a rollout's actions in numpy: the same ones as the policy's distribution gives by the same noise."""

import pickle

import numpy as np
import pytest
import torch

from lm_trust.control import ActionSpace, MLPPolicy, ObservationNormaliser
from lm_trust.control.acting import OfRows, sampler
from lm_trust.control.policies import ACTIVATIONS
from lm_trust.core import DiagonalGaussian

SPACES = {
    "discrete": ActionSpace("discrete", 3),
    "multi_discrete": ActionSpace("multi_discrete", 9, start=np.zeros(3, np.int64), sizes=(2, 3, 4)),
    "continuous": ActionSpace("continuous", 2, low=-np.ones(2, np.float32), high=np.ones(2, np.float32)),
}
OBSERVATIONS = np.random.default_rng(0).normal(2.0, 3.0, (40, 5)).astype(np.float32)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def lively(space, **settings):
    """A policy whose distributions differ from row to row."""
    policy = MLPPolicy(5, space, log_std=-0.5, **settings)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(1)) * 0.3)
    return policy


@pytest.mark.parametrize("seen", [None, 0, 200])  # observations that the normaliser learnt from; None: there is none
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", SPACES)
def test_actions_are_those_of_the_distribution(kind, activation, seen):
    normaliser = None if seen is None else ObservationNormaliser(5)
    if seen:
        normaliser.update(torch.randn(seen, 5, generator=generator(2)) * 0.4 + 1.0)  # a quarter of ours is clipped
    policy = lively(SPACES[kind], activation=activation, normaliser=normaliser)
    one, other = generator(3), generator(3)
    draw = sampler(policy, one, 5, len(OBSERVATIONS))
    given = OBSERVATIONS.copy()
    for _ in range(5):
        drawn = draw(given)
        expected = policy.distribution(torch.from_numpy(OBSERVATIONS)).sample(other).numpy()
        assert drawn.dtype == expected.dtype and drawn.shape == expected.shape
        np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(one.get_state(), other.get_state())
    np.testing.assert_array_equal(given, OBSERVATIONS)


def test_what_was_drawn_stays_when_more_is_drawn():
    draw = sampler(lively(SPACES["continuous"]), generator(0), 2, len(OBSERVATIONS))
    first = draw(OBSERVATIONS)
    kept = first.copy()
    draw(OBSERVATIONS)
    np.testing.assert_array_equal(first, kept)


def test_a_policy_in_float64_is_drawn_from_in_float64():
    policy = lively(SPACES["continuous"]).double()
    observations = OBSERVATIONS.astype(np.float64)
    drawn = sampler(policy, generator(0), 1, len(observations))(observations)
    expected = policy.distribution(torch.from_numpy(observations)).sample(generator(0)).numpy()
    np.testing.assert_allclose(drawn, expected, rtol=1e-12)


class Shifted(MLPPolicy):
    """Has a distribution of its own."""

    def distribution(self, observations):
        given = super().distribution(observations)
        return DiagonalGaussian(given.mean + 100.0, given.log_std)


def test_a_derived_policys_own_distribution_is_what_is_drawn_from():
    drawn = sampler(Shifted(5, SPACES["continuous"]), generator(0), 1, 40)(OBSERVATIONS)
    assert (drawn > 90).all()


@pytest.mark.parametrize(("make", "kind"), [*((MLPPolicy, kind) for kind in SPACES), (Shifted, "continuous")])
def test_some_rows_elsewhere_get_the_same_actions_to_the_bit(make, kind):
    policy, rows = make(5, SPACES[kind]), slice(3, 8)
    whole = sampler(policy, generator(0), 4, len(OBSERVATIONS))
    part = pickle.loads(pickle.dumps(OfRows(sampler(policy, generator(0), 4, len(OBSERVATIONS)), rows, 40)))
    for step in range(4):
        given = OBSERVATIONS + step
        np.testing.assert_array_equal(part(given[rows]), whole(given)[rows])


@pytest.mark.parametrize("kind", SPACES)
def test_two_short_rollouts_draw_what_a_long_one_does(kind):
    policy, one, other = lively(SPACES[kind]), generator(0), generator(0)
    given = OBSERVATIONS[:3]  # fewer numbers than torch draws at a time
    long, short = sampler(policy, one, 4, 3), [sampler(policy, other, 2, 3) for _ in range(2)]
    for draw in (short[0], short[0], short[1], short[1]):
        np.testing.assert_array_equal(draw(given), long(given))
    assert torch.equal(one.get_state(), other.get_state())

"""Observations that are dictionaries or tuples: what a policy would take apart is cut and counted in its parts."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from lm_trust.core import FisherOperator, trust_region_step
from lm_trust.core.rows import row_count, select_rows
from lm_trust.updates.ppo_clip import PPOClip
from lm_trust.updates.trpo_penalty import TRPOPenalty
from tests.tiny_policies import MASK, Policy, batch_for, vector_of

Pair = namedtuple("Pair", "x lengths")
KINDS = {
    "dict": (lambda x: {"x": x, "extra": None}, lambda given: given["x"]),
    "mapping": (lambda x: UserDict(x=x), lambda given: given["x"]),
    "nested": (lambda x: {"inner": {"x": x}, "y": x[:, 0]}, lambda given: given["inner"]["x"]),
    "tuple": (lambda x: (x, x, x), lambda given: given[1]),
    "named tuple": (lambda x: Pair(x, torch.arange(len(x))), lambda given: given.x),
}


class Taking(nn.Module):
    """The tiny policy, of an observation that stands in something else."""

    def __init__(self, take):
        super().__init__()
        self.inner, self.take = Policy(), take

    def distribution(self, observations):
        return self.inner.distribution(self.take(observations))


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([0, 3]), torch.arange(8) % 3 == 0])
def test_the_rows_of_the_parts_are_chosen(kind, rows):
    put, take = kind
    x = torch.randn(8, 3)
    assert torch.equal(take(select_rows(put(x), rows)), x[rows])
    assert row_count(put(x)) == 8


@pytest.mark.parametrize("parts", [(torch.zeros(3), torch.zeros(4)), {}, {"x": None}])
def test_rows_that_nobody_can_count_are_an_error(parts):
    with pytest.raises(ValueError, match="a mask must say how many"):
        row_count(parts)


@pytest.mark.parametrize("method", ["gauss_newton", "kl_hessian", "finite_difference"])
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_without_a_mask_the_fisher_is_the_mean_over_the_rows(kind, method, microbatch_size):
    """Counted by len, two keys were two rows and the product was four times too large."""
    put, take = kind
    policy, observations = Taking(take), torch.randn(8, 5, 3, dtype=torch.float64)
    vector = torch.randn(vector_of(policy).numel(), dtype=torch.float64)
    expected = FisherOperator(policy.inner, observations, method=method)(vector)
    product = FisherOperator(policy, put(observations), method=method, microbatch_size=microbatch_size)(vector)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"fisher_fraction": 0.5}, {"microbatch_size": 3}])
def test_the_step_is_that_of_a_tensor(kind, settings):
    put, take = kind
    policy, plain = Taking(take), Policy()
    batch = batch_for(plain)
    given = (batch.actions, batch.advantages)
    expected = trust_region_step(plain, batch.observations, *given, mask=MASK, **settings)
    report = trust_region_step(policy, put(batch.observations), *given, mask=MASK, **settings)
    assert report.accepted
    assert report == expected
    assert torch.equal(vector_of(policy), vector_of(plain))


@pytest.mark.parametrize("rule", [PPOClip, TRPOPenalty])
def test_minibatches_are_cut_from_the_parts(kind, rule):
    put, take = kind
    policy, plain = Taking(take), Policy()
    batch = batch_for(plain)
    expected = rule(epochs=2, microbatch_size=2).step(plain, batch)
    batch.observations = put(batch.observations)
    assert rule(epochs=2, microbatch_size=2).step(policy, batch) == expected
    assert torch.equal(vector_of(policy), vector_of(plain))

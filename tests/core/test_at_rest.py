"""A policy in training mode takes the step that it would take in evaluation: one with dropout has one distribution."""

import pytest
import torch
from torch import nn

from lm_trust.core import Categorical, FisherOperator, trust_region_step
from lm_trust.core.at_rest import at_rest
from lm_trust.updates.natural_gradient import NaturalGradient
from lm_trust.updates.ppo_clip import PPOClip
from lm_trust.updates.trpo import TRPO
from tests.tiny_policies import batch_for

B, T, D, V = 8, 5, 3, 4


class Feedforward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(T), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, V))

    def distribution(self, observations):
        return Categorical(self.net(observations))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = nn.GRU(D, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.outer = nn.Linear(8, V)

    def distribution(self, observations):
        return Categorical(self.outer(self.memory(observations)[0]))


class Attending(nn.Module):
    """Its dropout is no module: the layer asks its own mode."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 1, dropout=0.5, batch_first=True)
        self.outer = nn.Linear(D, V)

    def distribution(self, observations):
        return Categorical(self.outer(self.attention(observations, observations, observations)[0]))


@pytest.fixture(params=[Feedforward, Recurrent, Attending])
def make(request):
    def fresh(training):
        torch.manual_seed(0)
        return request.param().double().train(training)

    return fresh


def state_of(policy):
    return {name: value.clone() for name, value in policy.state_dict().items()}


@pytest.mark.parametrize("method", ["gauss_newton", "kl_hessian", "finite_difference"])
def test_the_fisher_is_that_of_evaluation(make, method):
    observations = torch.randn(B, T, D, dtype=torch.float64)
    vector = torch.randn(sum(each.numel() for each in make(True).parameters()), dtype=torch.float64)
    products = [FisherOperator(make(mode), observations, method=method)(vector) for mode in (True, False)]
    assert torch.equal(*products)


@pytest.mark.parametrize("rule", [TRPO, NaturalGradient, PPOClip])
def test_the_update_is_that_of_evaluation(make, rule):
    batch = batch_for(make(False))
    training, evaluating = make(True), make(False)
    report, expected = (rule().step(policy, batch) for policy in (training, evaluating))
    assert report == expected
    for name, value in evaluating.state_dict().items():
        assert torch.equal(training.state_dict()[name], value)


def test_modes_and_statistics_are_left_as_they_were(make):
    policy, batch = make(True), batch_for(make(False))
    before = state_of(policy)
    report = trust_region_step(policy, batch.observations, batch.actions, -batch.advantages * 0, mask=batch.mask)
    assert not report.accepted
    assert all(each.training for each in policy.modules())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert not any(getattr(each, "dropout", 0.5) == 0 for each in policy.modules())


def test_an_error_inside_leaves_the_modes_too(make):
    policy = make(True)
    with pytest.raises(KeyError), at_rest(policy):
        assert not policy.training
        raise KeyError
    assert policy.training


def test_a_recurrent_layer_stays_in_training_mode():
    """cuDNN would not differentiate it otherwise."""
    policy = Recurrent().train()
    with at_rest(policy):
        assert policy.memory.training
        assert policy.memory.dropout == 0
    assert policy.memory.dropout == 0.5

"""The critic: its losses by hand, what it never looks at, and the values it learns where they are known."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from lm_trust.control import Environments
from lm_trust.control.policies import MLPPolicy, value_network
from lm_trust.control.rollout import ControlTask
from lm_trust.core.batch import Rollout
from lm_trust.core.seeding import make_generator
from lm_trust.training.config_learning import Gae
from lm_trust.training.critic import ValueCritic, explained_variance
from lm_trust.training.trainer import Trainer
from lm_trust.updates import TRPO

MASK = torch.tensor([[True, True, True], [True, False, False]])
INPUTS = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
RETURNS = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])


class Line(nn.Module):
    """v = w x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs):
        return self.weight * inputs.squeeze(-1)


def rollout_of(inputs):
    ended = torch.zeros_like(MASK)
    return Rollout(inputs, MASK.long(), RETURNS, ended, ended, MASK, inputs, inputs + 1)


def fit(critic, inputs=INPUTS, returns=RETURNS):
    rollout = rollout_of(inputs)
    values, _ = critic.values(rollout)
    return critic.fit(rollout, returns, values)


def test_the_numbers_by_hand():
    # Too small a step to matter: the loss is that of v = x / 2 on x = 1, 2, 3, 4 and G = 1, 0, 2, 3.
    fitted = fit(ValueCritic(Line(), learning_rate=1e-12, epochs=2, minibatches=2))
    errors = np.array([0.5 - 1, 1.0 - 0, 1.5 - 2, 2.0 - 3])
    assert fitted["value_loss"] == pytest.approx(0.5 * np.mean(errors**2))
    assert fitted["explained_variance"] == pytest.approx(1 - np.var(errors) / np.var([1, 0, 2, 3]))


def test_values_of_states_and_successors():
    critic = ValueCritic(Line())
    values, next_values = critic.values(rollout_of(INPUTS))
    assert torch.equal(values, 0.5 * INPUTS.squeeze(-1)) and torch.equal(next_values, 0.5 * INPUTS.squeeze(-1) + 0.5)
    assert not values.requires_grad and not next_values.requires_grad


def test_constant_returns_explain_nothing():
    assert fit(ValueCritic(Line()), returns=torch.ones(2, 3))["explained_variance"] is None


@pytest.mark.parametrize("level", [0.1, 0.7, -1e6])
def test_the_rounding_of_equal_returns_is_no_variance(level):
    values = level * torch.randn(999, generator=torch.Generator().manual_seed(0))
    returns = torch.full((999,), level)
    for each in (returns, returns - values + values):
        assert explained_variance(each, values) is None
    spread = returns + 1e-4 * values
    assert explained_variance(spread, returns) == pytest.approx(0, abs=1e-3)
    assert explained_variance(spread, spread) == 1


def test_a_network_that_was_fitted_can_be_trained_by_others():
    critic = ValueCritic(value_network(1))
    fit(critic)
    for _ in range(2):  # the second is added to the first
        (critic.network(INPUTS) - RETURNS).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in critic.parameters())
    assert not any(each.is_inference() for state in critic._optimizer.state.values() for each in state.values())


def test_masked_steps_may_hold_anything():
    clean, dirty = ValueCritic(Line()), ValueCritic(Line())
    expected = fit(clean)
    nan = torch.nan
    found = fit(dirty, torch.where(MASK.unsqueeze(-1), INPUTS, nan), torch.where(MASK, RETURNS, nan))
    assert found == expected
    assert torch.equal(clean.network.weight, dirty.network.weight) and clean.network.weight != 0.5


def test_a_clipped_value_stops_where_the_clip_ends():
    free = ValueCritic(Line(), learning_rate=0.05, epochs=200, minibatches=1)
    held = ValueCritic(Line(), learning_rate=0.05, epochs=200, minibatches=1, clip=0.1)
    returns = 10 * INPUTS.squeeze(-1)
    fit(free, returns=returns)
    fit(held, returns=returns)
    # Beyond the clip the held error is the worse one, and it has no gradient.
    assert free.network.weight > 5
    assert 0.5 < held.network.weight < 1.5


def test_a_restored_critic_goes_on_bit_for_bit_and_another_seed_shuffles_otherwise():
    one, same, other = (ValueCritic(Line(), seed=seed) for seed in (1, 2, 3))
    fit(one)
    same.load_state_dict(copy.deepcopy(one.state_dict()))
    fit(one)
    fit(same)
    assert torch.equal(one.network.weight, same.network.weight)
    fit(other)
    fit(other)
    assert not torch.equal(one.network.weight, other.network.weight)


class Unit(gymnasium.Env):
    """Pays 1 a step for ever."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), 1.0, False, False, {}


class Ending(Unit):
    """The same, but every second step is the last: the episode terminates."""

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.time += 1
        return np.ones(1, np.float32), 1.0, self.time == 2, False, {}


@pytest.mark.parametrize(
    ("make", "expected"),
    # A time limit is no end: V = 1 / (1 - gamma). An end is one: the mean of 1 + gamma and 1.
    [(lambda: gymnasium.wrappers.TimeLimit(Unit(), 5), 5.0), (Ending, 1.4)],
    ids=["truncated", "terminated"],
)
def test_the_value_of_an_endless_task_with_a_time_limit(make, expected):
    environments = Environments("unit", [make() for _ in range(4)], seed=0)
    generator = make_generator(0, "test")
    policy = MLPPolicy(1, environments.action_space, hidden=[4], generator=generator)
    critic = ValueCritic(value_network(1, hidden=[4], generator=generator), learning_rate=0.02, epochs=10)
    task = ControlTask(environments, steps=20, gamma=0.8, seed=0)
    advantage = Gae(gamma=0.8, lam=0.95, whiten=False)
    trainer = Trainer(policy, task, critic, TRPO(), advantage, iterations=30)
    for _ in range(30):
        trainer.iterate()
    (value,) = critic.network(torch.ones(1, 1)).tolist()
    assert value == pytest.approx(expected, abs=0.1)
    task.close()

"""Normalisers and networks, each against an independent computation."""

import copy
import inspect
from unittest.mock import patch

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from lm_trust.control import ActionSpace, MLPPolicy, ObservationNormaliser, RewardNormaliser, value_network
from lm_trust.control.policies import ACTIVATIONS
from lm_trust.core import Categorical, DiagonalGaussian, FisherOperator, MultiCategorical
from lm_trust.core.linearisation import distribution_with_pullback
from lm_trust.errors import UserError

DISCRETE = ActionSpace("discrete", 3)
MULTI_DISCRETE = ActionSpace("multi_discrete", 9, start=np.zeros(3, np.int64), sizes=(2, 3, 4))
CONTINUOUS = ActionSpace("continuous", 2, low=-np.ones(2, np.float32), high=np.ones(2, np.float32))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(rows=1000, size=3, seed=0, offset=0.0):
    return torch.randn(rows, size, generator=generator(seed), dtype=torch.float64) * 5 + offset


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_are_numpys_whatever_the_chunks(offset):
    rows = data(offset=offset)
    normaliser = ObservationNormaliser(3)
    shuffled = rows[torch.randperm(len(rows), generator=generator(1))]
    for chunk in shuffled.split([1, 2, 7, 490, 500]):
        normaliser.update(chunk)
    assert normaliser.count == 1000
    np.testing.assert_allclose(normaliser.mean, rows.numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(normaliser.var, rows.numpy().var(0), rtol=1e-9)


def test_what_comes_out_is_standardised_and_clipped():
    rows = data(offset=4.0)
    rows[:2] += torch.tensor([[100.0], [-100.0]])  # two of a thousand: some 15 standard deviations off
    normaliser = ObservationNormaliser(3)
    normaliser.update(rows.reshape(10, 100, 3))
    expected = ((rows.numpy() - rows.numpy().mean(0)) / rows.numpy().std(0)).clip(-10, 10)
    assert (abs(expected[:2]) == 10).all()
    np.testing.assert_allclose(normaliser(rows.float()), expected, atol=1e-5)
    assert normaliser(rows.float()).dtype == torch.float32


def test_a_normaliser_that_has_seen_nothing_is_the_identity():
    rows = data() * 100
    assert torch.equal(ObservationNormaliser(3)(rows), rows)


def test_a_constant_observation_gives_zero_and_stays_finite():
    normaliser = ObservationNormaliser(2)
    normaliser.update(torch.full((5, 2), 3.0))
    assert torch.equal(normaliser(torch.full((4, 2), 3.0)), torch.zeros(4, 2))


def test_reward_scale_is_gymnasiums_running_deviation_of_returns():
    gamma, steps = 0.9, 400
    rewards = data(3, steps, seed=2) + 1
    ended = torch.rand(3, steps, generator=generator(3)) < 0.05
    normaliser = RewardNormaliser(3, gamma)
    chunks = zip(rewards.split(100, dim=1), ended.split(100, dim=1), strict=True)
    scaled = torch.cat([normaliser(*chunk) for chunk in chunks], dim=1)

    returns = np.zeros((3, steps))
    for row in range(3):
        for step in range(steps):
            carried = 0 if step == 0 or ended[row, step - 1] else returns[row, step - 1]
            returns[row, step] = rewards[row, step] + gamma * carried
    assert normaliser.var == pytest.approx(returns.var())
    for start in (0, 300):  # one scale a rollout, of all that was seen with it
        part = slice(start, start + 100)
        expected = rewards[:, part].numpy() / returns[:, : start + 100].std()
        np.testing.assert_allclose(scaled[:, part], expected.clip(-10, 10), rtol=1e-6)


def test_reward_scale_agrees_with_gymnasiums_wrapper():
    class Paid(gymnasium.Env):
        observation_space = gymnasium.spaces.Discrete(1)
        action_space = gymnasium.spaces.Discrete(1)

        def __init__(self, rewards):
            self.rewards = iter(rewards)

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 0, next(self.rewards), False, False, {}

    rewards = (data(1, 3000, seed=4) + 1)[0]
    wrapped = gymnasium.wrappers.NormalizeReward(Paid(rewards.tolist()), gamma=0.9)
    wrapped.reset()
    last = [wrapped.step(0)[1] for _ in range(3000)][-1]
    ours = RewardNormaliser(1, 0.9)(rewards[None], torch.zeros(1, 3000, dtype=torch.bool))[0, -1]
    assert ours == pytest.approx(last, rel=1e-3)


def test_reward_statistics_and_running_returns_are_saved():
    one, rewards, ended = RewardNormaliser(2, 0.9), data(2, 50), torch.zeros(2, 50, dtype=torch.bool)
    one(rewards, ended)
    other = RewardNormaliser(2, 0.9)
    other.load_state_dict(load(save(one.state_dict())))
    assert torch.equal(one(rewards, ended), other(rewards, ended))


def test_observation_statistics_travel_in_the_policys_state_dict():
    one = MLPPolicy(3, DISCRETE, normaliser=ObservationNormaliser(3), generator=generator(1))
    one.normaliser.update(data(offset=9.0))
    other = MLPPolicy(3, DISCRETE, normaliser=ObservationNormaliser(3), generator=generator(2))
    other.load_state_dict(load(save(one.state_dict())))
    rows = data(10).float()
    assert torch.equal(one.distribution(rows).logits, other.distribution(rows).logits)
    assert torch.equal(copy.deepcopy(one).distribution(rows).logits, one.distribution(rows).logits)


def test_restoring_parameters_and_buffers_one_by_one_restores_the_policy():
    one = MLPPolicy(3, DISCRETE, normaliser=ObservationNormaliser(3), generator=generator(1))
    one.normaliser.update(data(offset=9.0))
    other = MLPPolicy(3, DISCRETE, normaliser=ObservationNormaliser(3), generator=generator(1))
    with torch.no_grad():
        for buffer, saved in zip(other.buffers(), one.buffers(), strict=True):
            buffer.copy_(saved)
    rows = data(10).float()
    assert torch.equal(one.distribution(rows).logits, other.distribution(rows).logits)


def test_the_critic_sees_through_the_policys_normaliser():
    normaliser = ObservationNormaliser(3)
    critic = value_network(3, hidden=(8,), normaliser=normaliser)
    rows = data(6, offset=50.0).float()
    before = critic(rows)
    normaliser.update(rows)
    assert before.shape == (6,) and not torch.allclose(before, critic(rows))
    assert not {id(p) for p in normaliser.parameters()}  # statistics, nothing that a gradient moves


@pytest.mark.parametrize("lead", [(5,), (2, 4), ()])
def test_shapes_and_kinds_of_distribution(lead):
    observations = torch.randn(*lead, 4, generator=generator())
    discrete = MLPPolicy(4, DISCRETE).distribution(observations)
    assert isinstance(discrete, Categorical) and discrete.logits.shape == (*lead, 3)
    several = MLPPolicy(4, MULTI_DISCRETE).distribution(observations)
    assert isinstance(several, MultiCategorical) and several.sizes == (2, 3, 4)
    assert several.logits.shape == (*lead, 9) and several.sample().shape == (*lead, 3)
    continuous = MLPPolicy(4, CONTINUOUS, log_std=-0.5).distribution(observations)
    assert isinstance(continuous, DiagonalGaussian) and continuous.mean.shape == (*lead, 2)
    assert torch.equal(continuous.log_std, torch.full((*lead, 2), -0.5))
    assert value_network(4)(observations).shape == lead


def test_a_fresh_policy_is_near_uniform_and_a_fresh_critic_is_not_flat():
    observations = torch.randn(200, 4, generator=generator())
    assert MLPPolicy(4, DISCRETE).distribution(observations).logits.abs().max() < 0.1
    assert value_network(4)(observations).std() > 0.1


def test_weights_are_orthogonal_with_their_gains():
    policy = MLPPolicy(16, DISCRETE, hidden=(16, 8))
    gains = [2.0, 2.0, 1e-4]
    weights = [parameter for name, parameter in policy.named_parameters() if name.endswith("weight")]
    for weight, gain in zip(weights, gains, strict=True):
        assert torch.allclose(weight @ weight.T, gain * torch.eye(len(weight)), atol=1e-5)
    assert all(not p.any() for name, p in policy.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_network_is_what_it_says(activation):
    policy = MLPPolicy(4, DISCRETE, hidden=(8, 6), activation=activation, generator=generator(3))
    x = torch.randn(7, 4, generator=generator())
    weights = [parameter.detach() for parameter in policy.parameters()]
    module = {"tanh": "Tanh", "relu": "ReLU"}[activation]
    act = getattr(torch.nn, module)()
    hidden = act(act(x @ weights[0].T + weights[1]) @ weights[2].T + weights[3])
    expected = hidden @ weights[4].T + weights[5]
    assert torch.allclose(policy.distribution(x).logits, expected, atol=1e-6)


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(UserError, match=r"policy\.activation: 'tahn'.*did you mean 'tanh'\?"):
        MLPPolicy(4, DISCRETE, activation="tahn")


def test_networks_draw_from_their_generator_and_from_no_other():
    before = torch.get_rng_state()
    first, same, other = (MLPPolicy(4, CONTINUOUS, generator=generator(seed)) for seed in (1, 1, 2))
    value_network(4, normaliser=ObservationNormaliser(4))
    RewardNormaliser(2, 0.9)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.body.last.weight, other.body.last.weight)


def test_the_core_moves_this_policy():
    from lm_trust.core import trust_region_step

    policy = MLPPolicy(4, CONTINUOUS, normaliser=ObservationNormaliser(4), generator=generator())
    observations = torch.randn(2, 40, 4, generator=generator(1))
    policy.normaliser.update(observations)
    actions = policy.distribution(observations).sample(generator(2))
    report = trust_region_step(policy, observations, actions, actions.sum(-1), max_kl=0.01)
    assert report.accepted and 0.002 < report.step_kl <= 0.01
    assert "observations" in inspect.signature(policy.distribution).parameters


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(9,), (2, 700)])
@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS, MULTI_DISCRETE])
def test_the_derivative_of_the_policy_is_that_of_autograd(space, lead, activation):
    normaliser = ObservationNormaliser(4)
    normaliser.update(torch.randn(50, 4, generator=generator(5)) * 3 + 1)
    policy = MLPPolicy(4, space, hidden=(8, 6), activation=activation, normaliser=normaliser, generator=generator(3))
    policy = policy.double()
    x = torch.randn(*lead, 4, generator=generator(), dtype=torch.float64)

    names = [name for name, _ in policy.named_parameters()]

    def outputs(*parameters):
        # functional_call goes through forward, which a policy does not have
        with patch.object(policy, "forward", lambda: policy.distribution(x).parameters, create=True):
            return torch.func.functional_call(policy, dict(zip(names, parameters, strict=True)), ())

    parameters = tuple(parameter.detach() for parameter in policy.parameters())
    tangents = [random_like(parameter, 7) for parameter in parameters]
    expected, expected_moved = torch.func.jvp(outputs, parameters, tuple(tangents))
    distribution, pushforward, pullback = policy.linearised(x)
    for part, given in zip(distribution.parameters, expected, strict=True):
        assert torch.allclose(part, given, atol=1e-12) and not part.requires_grad
    for part, given in zip(pushforward(tangents), expected_moved, strict=True):
        assert torch.allclose(part, given, atol=1e-10) and given.any()
    cotangents = [random_like(part, 8) for part in expected]
    gradients = torch.autograd.grad(policy.distribution(x).parameters, list(policy.parameters()), cotangents)
    for ours, theirs in zip(pullback(*cotangents), gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10) and theirs.any()


def test_the_derivative_of_the_value_network_is_that_of_autograd():
    network = value_network(4, hidden=(8, 6), generator=generator(3)).double()
    x = torch.randn(3, 5, 4, generator=generator(), dtype=torch.float64)
    values, pushforward, pullback = network.linearised(x)
    cotangent = torch.randn(3, 5, generator=generator(7), dtype=torch.float64)
    gradients = torch.autograd.grad(network(x), list(network.parameters()), cotangent)
    assert torch.allclose(values, network(x), atol=1e-12)
    for ours, theirs in zip(pullback(cotangent), gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)
    # <w, J v> = <J' w, v>
    tangents = [random_like(parameter, 9) for parameter in network.parameters()]
    (moved,) = pushforward(tangents)
    paired = sum((gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True))
    assert torch.allclose((cotangent * moved).sum(), paired, atol=1e-10)


@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS, MULTI_DISCRETE])
def test_the_fisher_product_of_the_policys_own_derivative_is_that_of_the_kl_hessian(space):
    policy = MLPPolicy(4, space, hidden=(8, 6), generator=generator(3)).double()
    x = torch.randn(60, 4, generator=generator(), dtype=torch.float64)
    mask = torch.rand(60, generator=generator(2)) < 0.7
    vector = torch.randn(sum(p.numel() for p in policy.parameters()), generator=generator(4), dtype=torch.float64)
    products = [
        FisherOperator(policy, x, mask=mask, damping=0.0, method=method)(vector)
        for method in ("gauss_newton", "kl_hessian")
    ]
    assert torch.allclose(*products, atol=1e-10) and products[0].any()


class Masked(MLPPolicy):
    """A user's own: the last action is never allowed."""

    def distribution(self, observations):
        logits = super().distribution(observations).logits
        return Categorical(logits.masked_fill(torch.arange(logits.shape[-1]) == logits.shape[-1] - 1, -torch.inf))


def test_a_derived_policy_with_another_distribution_is_differentiated_as_that_one():
    policy = Masked(4, DISCRETE, hidden=(8, 6), generator=generator(3)).double()
    x = torch.randn(60, 4, generator=generator(), dtype=torch.float64)
    parameters = list(policy.parameters())
    distribution, pullback = distribution_with_pullback(policy, x)
    cotangent = torch.randn(60, 3, generator=generator(7), dtype=torch.float64)
    expected = torch.autograd.grad(policy.distribution(x).logits, parameters, cotangent)
    assert (distribution.log_probs[:, 2] == -torch.inf).all()
    for ours, theirs in zip(pullback(cotangent), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    # The Fisher of one step with two actions is p (1 - p) g g', g the slope of the log-odds.
    row, vector = x[:1], torch.randn(sum(p.numel() for p in parameters), generator=generator(4), dtype=torch.float64)
    logits = policy.distribution(row).logits[0]
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(logits[0] - logits[1], parameters)])
    chance = torch.sigmoid(logits[0] - logits[1]).detach()
    product = FisherOperator(policy, row, damping=0.0)(vector)
    assert torch.allclose(product, chance * (1 - chance) * slope * (slope @ vector), atol=1e-12) and product.any()


def random_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=generator(seed), dtype=tensor.dtype)

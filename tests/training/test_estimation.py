"""Advantages by each estimator against loops written out."""

import pytest
import torch

from lm_trust.core.batch import Rollout
from lm_trust.training.config_learning import Gae, GroupRelative, LeaveOneOut, ReturnsToGo
from lm_trust.training.critic import NoCritic
from lm_trust.training.estimation import estimate_advantages

B, T = 4, 5


@pytest.fixture
def rollout():
    """Sequences of unequal lengths, each paid on its last token; pairs of rows share a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 2, 3, 1])
    mask = torch.arange(T) < lengths.unsqueeze(-1)
    last = torch.arange(T) == (lengths - 1).unsqueeze(-1)
    rewards = torch.where(last, torch.randn(B, 1, generator=generator, dtype=torch.float64), 0.0)
    inputs = torch.randn(B, T + 1, 3, generator=generator, dtype=torch.float64)
    return Rollout(
        observations=inputs[:, :-1],
        actions=torch.zeros(B, T),
        rewards=rewards,
        terminated=last,
        truncated=torch.zeros_like(last),
        mask=mask,
        critic_inputs=inputs[:, :-1],
        next_critic_inputs=inputs[:, 1:],
        group_size=2,
        whole_sequences=True,
    )


def test_gae_and_returns_to_go_by_loops(rollout):
    values = rollout.critic_inputs[..., 0]
    next_values = rollout.next_critic_inputs[..., 0]
    arguments = rollout, rollout.rewards, values, next_values
    found, returns = estimate_advantages(Gae(gamma=0.9, lam=0.8, whiten=False), *arguments)
    togo, _ = estimate_advantages(ReturnsToGo(gamma=0.9, whiten=False), *arguments)
    for row in range(B):
        length = int(rollout.mask[row].sum())
        for step in range(length):
            advantage = reward = 0.0
            for later in range(step, length):
                following = 0.0 if later == length - 1 else next_values[row, later]
                delta = rollout.rewards[row, later] + 0.9 * following - values[row, later]
                advantage += (0.9 * 0.8) ** (later - step) * delta
                reward += 0.9 ** (later - step) * rollout.rewards[row, later]
            assert found[row, step].item() == pytest.approx(float(advantage), abs=1e-12)
            assert returns[row, step].item() == pytest.approx(float(advantage + values[row, step]), abs=1e-12)
            assert togo[row, step].item() == pytest.approx(float(reward - values[row, step]), abs=1e-12)


def test_returns_to_go_are_cut_at_ends_and_go_on_with_the_critics_value_at_limits(rollout):
    rollout.terminated[1:] = False  # row 1 meets a time limit at its second step, row 2 goes on where the rollout ends
    rollout.truncated[1, 1] = True
    values, next_values = rollout.critic_inputs[..., 0], rollout.next_critic_inputs[..., 0]
    rewards, config = rollout.rewards, ReturnsToGo(gamma=0.9, whiten=False)
    powers = 0.9 ** torch.arange(T, -1, -1, dtype=torch.float64)  # gamma^5 to 1
    earned = rewards[2, 2] * torch.cat([powers[-3:], torch.zeros(2)])

    advantages, returns = estimate_advantages(config, rollout, rewards, values, next_values)
    torch.testing.assert_close(returns[0], rewards[0, -1] * powers[1:])
    torch.testing.assert_close(returns[1, :2], (rewards[1, 1] + 0.9 * next_values[1, 1]) * powers[-2:])
    torch.testing.assert_close(returns[2], earned + next_values[2, -1] * powers[:-1])
    torch.testing.assert_close(advantages, returns - values)

    _, returns = estimate_advantages(config, rollout, rewards, *NoCritic().values(rollout))
    torch.testing.assert_close(returns[1, :2], rewards[1, 1] * powers[-2:])  # without a critic every limit is an end
    torch.testing.assert_close(returns[2], earned)


def test_grouped_estimators_spread_the_score_over_the_sequence(rollout):
    scores = rollout.rewards.sum(-1)
    zeros = torch.zeros(B, T, dtype=torch.float64)
    loo, _ = estimate_advantages(LeaveOneOut(whiten=False), rollout, rollout.rewards, zeros, zeros)
    relative, _ = estimate_advantages(GroupRelative(scale=False), rollout, rollout.rewards, zeros, zeros)
    for row in range(B):
        other = scores[row ^ 1]
        for step in range(T):
            real = rollout.mask[row, step].item()
            assert loo[row, step].item() == pytest.approx(float(scores[row] - other) * real)
            assert relative[row, step].item() == pytest.approx(float(scores[row] - other) / 2 * real)


def test_whitening_looks_at_real_steps_only(rollout):
    zeros = torch.zeros(B, T, dtype=torch.float64)
    whitened, _ = estimate_advantages(ReturnsToGo(gamma=1.0), rollout, rollout.rewards, zeros, zeros)
    real = whitened[rollout.mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-12)
    assert real.std().item() == pytest.approx(1)
    assert (whitened[~rollout.mask] == 0).all()


def test_no_critic_is_zero_everywhere(rollout):
    values, next_values = NoCritic().values(rollout)
    assert not values.any()
    assert not next_values.any()
    assert NoCritic().start_fit(rollout, rollout.rewards, values)() == {"value_loss": None, "explained_variance": None}

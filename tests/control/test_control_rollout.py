"""Rollouts: what is stored at an episode's end, chunks, seeds, clipping, reports, going on after a stop."""

import copy
import json

import gymnasium
import numpy as np
import pytest
import torch

from lm_trust.control import ControlTask, Environments, MLPPolicy, ObservationNormaliser, make_environments
from lm_trust.core import gae
from lm_trust.errors import UserError

KEYS = (
    "observations",
    "actions",
    "rewards",
    "terminated",
    "truncated",
    "critic_inputs",
    "next_critic_inputs",
)


def policy_for(environments, seed=0, normalise=False, **settings):
    normaliser = ObservationNormaliser(environments.observation_size) if normalise else None
    generator = torch.Generator().manual_seed(seed)
    return MLPPolicy(
        environments.observation_size,
        environments.action_space,
        hidden=(8,),
        normaliser=normaliser,
        generator=generator,
        **settings,
    )


def task_for(environments, steps, seed=0, **settings):
    return ControlTask(environments, steps=steps, gamma=0.9, seed=seed, **settings)


def assert_same(one, other):
    for key in KEYS:
        assert torch.equal(getattr(one, key), getattr(other, key)), key
    assert one.metrics == other.metrics


def joined(rollouts, key):
    return torch.cat([getattr(rollout, key) for rollout in rollouts], dim=1)


def test_the_rollout_of_a_truncated_clock(clocks):
    environments = clocks(2, limit=3)
    rollout = task_for(environments, steps=7).collect(policy_for(environments))
    times = [0, 1, 2, 0, 1, 2, 0]
    for row in range(2):
        assert rollout.observations[row].tolist() == [[row, time] for time in times]
        # The successor of the last step is the final observation, never the next episode's first.
        assert rollout.next_critic_inputs[row].tolist() == [[row, time + 1] for time in times]
    assert rollout.truncated.tolist() == [[False, False, True, False, False, True, False]] * 2
    assert not rollout.terminated.any()
    assert rollout.rewards.tolist() == [[1.0] * 7] * 2  # a dummy transition after a reset would pay nothing
    assert rollout.mask.all() and rollout.actions.shape == (2, 7)
    assert rollout.metrics == {"reward_mean": 3.0, "episode_length": 3.0, "episodes": 4}


def test_truncation_bootstraps_on_the_final_observation_and_termination_does_not(clocks):
    gamma, horizon = 0.9, 1 / (1 - 0.9)

    def advantages(environments):
        rollout = task_for(environments, steps=9).collect(policy_for(environments))
        # 1 / (1 - gamma) is the value of an endless unit reward: with it, going on costs and gains nothing.
        values, next_values = (torch.full(rollout.rewards.shape, horizon) for _ in range(2))
        ends = rollout.terminated, rollout.truncated
        return gae(rollout.rewards, values, next_values, *ends, gamma=gamma, lam=0.95)[0]

    assert advantages(clocks(2, limit=4)).abs().max() < 1e-5
    terminated = advantages(clocks(2, lives=4))
    assert torch.allclose(terminated[:, 3], torch.tensor(1 - horizon))
    assert (terminated[:, :8] < -1).all() and terminated[:, 8].abs().max() < 1e-5


def test_both_ends_at_once_are_a_termination(clocks):
    rollout = task_for(clocks(1, limit=4, lives=4), steps=4).collect(policy_for(clocks(1)))
    assert rollout.terminated[0, 3] and rollout.truncated[0, 3]
    ends = rollout.terminated, rollout.truncated
    values = torch.full((1, 4), 5.0)
    advantages, _ = gae(rollout.rewards, values, values, *ends, gamma=0.9, lam=0.0)
    assert advantages[0, 3] == 1.0 - 5.0


@pytest.mark.parametrize("id", ["CartPole-v1", "walk"])
def test_short_rollouts_one_after_another_are_one_long_rollout(id, walks):
    def make():
        return walks(3) if id == "walk" else make_environments(id, 3, seed=1)

    policy = policy_for(make())
    long = task_for(make(), steps=60).collect(policy)
    task = task_for(make(), steps=20)
    short = [task.collect(policy) for _ in range(3)]
    for key in KEYS:
        assert torch.equal(joined(short, key), getattr(long, key)), key
    assert short[-1].metrics == long.metrics and long.metrics["episodes"] > 3
    assert task.steps == 180


def test_one_seed_one_rollout(walks):
    policy = policy_for(walks(2))
    first, again, other = (task_for(walks(2, seed), 30, seed).collect(policy) for seed in (3, 3, 4))
    assert_same(first, again)
    assert not torch.equal(first.observations[:, 0], other.observations[:, 0])
    assert not torch.equal(first.actions, other.actions)


def test_every_episode_of_every_environment_has_its_own_seed(clocks):
    environments = clocks(3, limit=2)
    task_for(environments, steps=20).collect(policy_for(environments))
    seeds = [seed for env in environments.envs for seed in env.unwrapped.resets]
    assert len(seeds) == 3 * 11 == len(set(seeds)) and all(0 <= seed < 2**31 for seed in seeds)


def test_the_raw_action_is_stored_and_the_clipped_one_is_given(walks):
    environments = walks(2)
    policy = policy_for(environments, log_std=1.0)
    rollout = task_for(environments, steps=30).collect(policy)
    assert rollout.actions.abs().max() > 2
    given = torch.from_numpy(np.stack([env.given for env in environments.envs]))
    assert torch.equal(given, rollout.actions.clamp(-1, 1)) and given.dtype == torch.float32
    log_prob = policy.distribution(rollout.observations).log_prob(rollout.actions)
    assert torch.isfinite(log_prob).all()


def test_an_environment_that_writes_into_its_action_spoils_nothing(walks):
    environments, spoiling = walks(2), walks(2)
    for env in spoiling.envs:
        step = env.step

        def spoil(action, step=step):
            result = step(action)
            action[:] = 99
            return result

        spoiling._step_functions[spoiling.envs.index(env)] = spoil
    policy = policy_for(environments)
    task, spoiled = task_for(environments, 10), task_for(spoiling, 10)
    assert_same(task.collect(policy), spoiled.collect(policy))
    for row in "01":
        saved = (made.state_dict()["environments"]["actions"][row] for made in (task, spoiled))
        assert torch.equal(*saved)


def test_reported_returns_are_unscaled_and_of_the_last_hundred_episodes(clocks):
    environments = clocks(4, limit=5)
    task = task_for(environments, steps=200, normalise_rewards=True)
    rollout = task.collect(policy_for(environments))
    assert rollout.metrics == {"reward_mean": 5.0, "episode_length": 5.0, "episodes": 160}
    assert not torch.allclose(rollout.rewards, torch.ones(()))
    assert len(task.state_dict()["finished"]) == 100


def test_nothing_is_reported_before_an_episode_finished(clocks):
    environments = clocks(2, limit=50)
    task = task_for(environments, steps=30)
    assert task.collect(policy_for(environments)).metrics["reward_mean"] is None
    assert task.collect(policy_for(environments)).metrics["reward_mean"] == 50.0


def stored(state):
    """A state as a checkpoint would give it back: tensors in one file, the rest through JSON."""
    tensors = {}

    def split(value, path):
        if isinstance(value, torch.Tensor):
            tensors[path] = value.clone()
            return {"tensor": path}
        if isinstance(value, dict):
            return {key: split(item, f"{path}/{key}") for key, item in value.items()}
        return value

    def join(value):
        if isinstance(value, dict):
            return tensors[value["tensor"]] if set(value) == {"tensor"} else {k: join(v) for k, v in value.items()}
        return value

    return join(json.loads(json.dumps(split(state, ""))))


def assert_same_state(one, other):
    assert json.dumps(one, default=torch.Tensor.tolist) == json.dumps(other, default=torch.Tensor.tolist)


@pytest.mark.parametrize("id", ["CartPole-v1", "walk", "clock"])
def test_going_on_after_a_stop_in_mid_episode_is_exact(id, walks, clocks):
    def make():
        makers = {"walk": lambda: walks(3), "clock": lambda: clocks(3, limit=600)}
        return makers.get(id, lambda: make_environments(id, 3, seed=2))()

    policy = policy_for(make(), normalise=True)
    task = task_for(make(), steps=23, normalise_observations=True, normalise_rewards=True)
    for _ in range(15):  # long enough for the record of actions to be cut, or to grow
        task.after_update(policy, task.collect(policy))
    state, other = stored(task.state_dict()), copy.deepcopy(policy)
    resumed = task_for(make(), steps=23, seed=99, normalise_observations=True, normalise_rewards=True)
    resumed.load_state_dict(state)
    assert_same_state(resumed.state_dict(), state)
    for _ in range(15):
        expected, found = task.collect(policy), resumed.collect(other)
        assert_same(expected, found)
        task.after_update(policy, expected)
        resumed.after_update(other, found)
    assert_same_state(resumed.state_dict(), task.state_dict())


def test_the_record_of_actions_is_that_of_the_present_episodes(clocks):
    environments = clocks(3)
    for env, lives in zip(environments.envs, (17, 150, 400), strict=True):
        env.lives = lives
    draws, record = np.random.default_rng(0), [[], [], []]
    for _ in range(1200):
        actions = draws.integers(0, 2, 3)
        transition = environments.step(actions)
        for row in range(3):
            record[row] = [] if row in transition.final else [*record[row], actions[row]]
        saved = environments.state_dict()["actions"]
        assert [saved[str(row)].tolist() for row in range(3)] == record
    assert len(environments._log) <= 800  # the finished episodes are forgotten


def test_an_environment_that_cannot_be_resumed_exactly_is_warned_about(clocks, forgetful):
    task = task_for(clocks(2, kind=forgetful), steps=5)
    task.collect(policy_for(clocks(2)))
    resumed = task_for(clocks(2, kind=forgetful), steps=5)
    with pytest.warns(UserWarning, match="Clock is not deterministic"):
        resumed.load_state_dict(task.state_dict())
    resumed.collect(policy_for(clocks(2)))


def test_rewards_that_come_back_different_are_warned_about_too():
    """Those that gymnasium scales by what it has seen in all episodes so far."""

    def make():
        wrapped = [gymnasium.wrappers.NormalizeReward(gymnasium.make("CartPole-v1")) for _ in range(2)]
        return Environments("CartPole", wrapped, seed=0)

    task = task_for(make(), steps=50)
    task.collect(policy_for(make()))
    state = task.state_dict()
    with pytest.warns(UserWarning, match="CartPole is not deterministic"):
        task_for(make(), steps=50).load_state_dict(state)


def test_a_state_of_another_number_of_environments_is_refused(clocks):
    with pytest.raises(UserError, match=r"environment.count: the checkpoint is of 2, not 3"):
        task_for(clocks(3), 5).load_state_dict(task_for(clocks(2), 5).state_dict())


def test_normaliser_statistics_move_in_after_update_alone(walks):
    environments = walks(2)
    policy = policy_for(environments, normalise=True)
    task = task_for(environments, 40, normalise_observations=True, evaluation_environments=lambda n: walks(n, 5))
    rollout = task.collect(policy)
    before = copy.deepcopy(policy.state_dict())
    task.evaluate(policy, 3)
    policy.distribution(rollout.observations)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert policy.normaliser.count == 0
    task.after_update(policy, rollout)
    rows = rollout.observations.reshape(-1, 3).double()
    assert policy.normaliser.count == 80
    assert torch.allclose(policy.normaliser.mean, rows.mean(0))


def test_statistics_stand_still_unless_asked(walks):
    environments = walks(2)
    policy = policy_for(environments, normalise=True)
    task = task_for(environments, 10)
    task.after_update(policy, task.collect(policy))
    assert policy.normaliser.count == 0


def test_a_policy_without_a_normaliser_is_refused_where_one_is_needed(walks):
    environments = walks(2)
    with pytest.raises(UserError, match=r"normalise\.observations"):
        task_for(environments, 10, normalise_observations=True).collect(policy_for(environments))


def test_no_global_generator_is_touched(walks):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    environments = walks(2)
    task = task_for(environments, 10, evaluation_environments=lambda n: walks(n))
    policy = policy_for(environments)
    task.collect(policy)
    task.evaluate(policy, 2)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_what_a_rollout_holds_can_be_learnt_from(walks):
    environments = walks(2)
    policy = policy_for(environments)
    rollout = task_for(environments, 10).collect(policy)
    policy.distribution(rollout.observations).log_prob(rollout.actions).mean().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    rollout.observations.mul_(2)  # an inference tensor would refuse

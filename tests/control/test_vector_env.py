"""Vector environments of others: either autoreset mode gives what our own gives, and no dummy step is learnt from."""

import copy
import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import nn

from lm_trust.control import ControlTask, Environments, MLPPolicy, ObservationNormaliser, value_network
from lm_trust.control.vector_env import VectorEnvironments
from lm_trust.core import gae
from lm_trust.core.processes import RowRange
from lm_trust.errors import UserError
from lm_trust.training.config_learning import Gae
from lm_trust.training.critic import ValueCritic
from lm_trust.training.trainer import Trainer
from lm_trust.updates import TRPO, PPOClip

NEXT, SAME, OWN = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, None
FIELDS = ("observations", "actions", "rewards", "terminated", "truncated", "next_critic_inputs")


class Repeating(gymnasium.Env):
    """A walk whose k-th episode is a function of its number and k alone, whatever the seed it is reset with."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, number, limit=6):
        self.number, self.limit, self.episode, self.seeds, self.steps, self.broken = number, limit, -1, [], 0, {}

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.seeds.append(seed)
        self.draws, self.time = np.random.default_rng([self.number, self.episode]), 0
        self.position = self.draws.normal(size=3)
        return self.position.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        self.time += 1
        self.position = 0.9 * self.position + self.draws.normal(size=3)
        self.position[:2] += action
        shown, reward = self.position.copy(), float(np.square(self.position).sum())
        if self.steps == self.broken.get("observation"):
            shown[1] = np.nan
        if self.steps == self.broken.get("reward"):
            reward = np.inf
        return shown, reward, bool(self.position[2] > 1.5), self.time >= self.limit, {}


def make(mode, count=3, seed=0, kind=Repeating, **arguments):
    envs = [kind(number, **arguments) for number in range(count)]
    if mode is OWN:
        return Environments("Repeating", envs, seed=seed)
    vector_env = SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=mode)
    return VectorEnvironments("Repeating", vector_env, seed=seed)


class Follower(nn.Module):
    """Acts as a fixed function of what it sees, far over the bounds: no draws that dummies could shift."""

    def distribution(self, observations):
        self.seen = observations
        return self

    def sample(self, generator):
        return 2 * self.seen[..., :2].sin()


def valid_rows(rollout, key):
    """Of each environment, the entries of its real steps."""
    return [getattr(rollout, key)[row, rollout.mask[row]] for row in range(len(rollout.mask))]


def complete(rollout):
    """Of each environment, how many real steps belong to finished episodes."""
    ended = rollout.terminated | rollout.truncated
    return [int(rollout.mask[row, : ended[row].nonzero().max() + 1].sum()) for row in range(len(ended))]


@pytest.mark.parametrize("mode", [NEXT, SAME])
def test_both_autoreset_modes_and_our_own_environments_give_equal_steps_and_advantages(mode):
    rollouts = {key: ControlTask(make(key), steps=60, gamma=0.9, seed=0).collect(Follower()) for key in (OWN, mode)}
    value = value_network(3, hidden=(8,))

    def advantages(rollout):
        with torch.no_grad():
            values = value(rollout.critic_inputs), value(rollout.next_critic_inputs)
        ends = rollout.terminated, rollout.truncated
        rollout.advantages, rollout.returns = gae(rollout.rewards, *values, *ends, gamma=0.9, lam=0.95)

    for rollout in rollouts.values():
        advantages(rollout)
    ours, theirs = rollouts[OWN], rollouts[mode]
    assert ours.terminated.any() and ours.truncated.any()
    assert mode is NEXT or torch.equal(theirs.mask, ours.mask)
    for row, count in enumerate(complete(theirs)):
        assert count > 30
        for key in FIELDS:
            assert torch.equal(valid_rows(theirs, key)[row][:count], valid_rows(ours, key)[row][:count]), key
        for key in ("advantages", "returns"):
            found, expected = valid_rows(theirs, key)[row][:count], valid_rows(ours, key)[row][:count]
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), key


def test_the_dummy_step_is_never_in_the_mask():
    environments = make(NEXT)
    task = ControlTask(environments, steps=7, gamma=0.9, seed=0)
    rollouts = [task.collect(Follower()) for _ in range(20)]  # dummies at the borders of rollouts among them
    mask, terminated, truncated = (
        torch.cat([getattr(one, key) for one in rollouts], 1) for key in ("mask", *FIELDS[3:5])
    )
    after_an_end = torch.cat([torch.zeros(3, 1, dtype=torch.bool), (terminated | truncated)[:, :-1]], 1)
    assert torch.equal(mask, ~after_an_end)
    assert any(not one.mask[:, 0].all() for one in rollouts) and any(not one.mask[:, -1].all() for one in rollouts)
    stepped = [env.steps for env in environments.vector_env.envs]
    assert mask.sum(1).tolist() == stepped and task.steps == sum(stepped)
    rewards = torch.cat([one.rewards for one in rollouts], 1)
    assert not rewards[~mask].any() and rewards[mask].all()


@pytest.mark.parametrize("mode", [NEXT, SAME])
def test_reported_returns_lengths_and_steps_count_real_steps_alone(mode):
    ours, theirs = (ControlTask(make(key), steps=90, gamma=0.9, seed=0) for key in (OWN, mode))
    for task in (ours, theirs):
        rollout = task.collect(Follower())
        assert rollout.metrics["episodes"] == len(task.finished_episodes)
        assert task.finished_episodes[-1][2] <= task.steps == int(rollout.mask.sum())

    def by_length(task):
        return sorted((length, total) for total, length, _ in task.finished_episodes)

    if mode is SAME:
        assert theirs.finished_episodes == ours.finished_episodes
    assert set(by_length(theirs)) <= set(by_length(ours)) and len(theirs.finished_episodes) > 30


@pytest.mark.parametrize("rule", [TRPO(), PPOClip(epochs=2, minibatches=2)], ids=["trpo", "ppo_clip"])
def test_whatever_the_dummy_step_holds_nothing_is_learnt_from_it(rule):
    clean = ControlTask(make(NEXT), steps=40, gamma=0.9, seed=0).collect(MLPPolicy(3, make(NEXT).action_space))
    spoiled = copy.deepcopy(clean)
    dummies = ~spoiled.mask
    assert dummies.sum() > 10
    for key in ("observations", "actions", "rewards", "critic_inputs", "next_critic_inputs"):
        tensor = getattr(spoiled, key).clone()
        tensor[dummies] = 77.0
        setattr(spoiled, key, tensor)

    def learnt(rollout):
        environments = make(NEXT)
        normaliser = ObservationNormaliser(3)
        policy = MLPPolicy(3, environments.action_space, normaliser=normaliser)
        task = ControlTask(environments, steps=40, gamma=0.9, seed=0, normalise_observations=True)
        task.collect = lambda policy: copy.deepcopy(rollout)
        critic = ValueCritic(value_network(3, normaliser=normaliser), epochs=2)
        trainer = Trainer(policy, task, critic, copy.deepcopy(rule), Gae(whiten=True), iterations=3)
        metrics = [trainer.iterate() for _ in range(2)]
        keys = ("entropy", "surrogate_gain", "step_kl", "step_kl_max", "value_loss", "explained_variance")
        return policy, critic.network, [[line[key] for key in keys] for line in metrics]

    (policy, value, metrics), (other_policy, other_value, other_metrics) = learnt(clean), learnt(spoiled)
    for module, other in ((policy, other_policy), (value, other_value)):
        for name, tensor in module.state_dict().items():
            assert torch.allclose(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-7), name
    assert np.allclose(metrics, other_metrics, rtol=1e-4, atol=1e-7)
    assert policy.normaliser.count == 2 * clean.mask.sum()
    rows = clean.observations[clean.mask].double()
    assert torch.allclose(policy.normaliser.mean, rows.mean(0))


def test_the_dummy_step_is_in_no_statistics_of_the_rewards():
    masked = ControlTask(make(NEXT), steps=60, gamma=0.9, seed=0, normalise_rewards=True)
    rollout, seen = masked.collect(Follower()), []
    # The same steps of our own environments, one row at a time, because rows have different numbers of them.
    for row, steps in enumerate(rollout.mask.sum(1).tolist()):
        task = ControlTask(make(OWN), steps=steps, gamma=0.9, seed=0)
        played = task.collect(Follower())
        running = 0.0
        ended = played.terminated[row] | played.truncated[row]
        for reward, end in zip(played.rewards[row].tolist(), ended.tolist(), strict=True):
            seen.append(running + reward)
            running = 0.0 if end else 0.9 * seen[-1]
    normaliser = masked._reward_normaliser
    assert normaliser.count == len(seen) == masked.steps
    assert np.isclose(normaliser.var.item(), np.var(seen), rtol=1e-6)
    assert np.isclose(normaliser.mean.item(), np.mean(seen), rtol=1e-6)


def test_a_rollout_of_nothing_but_dummies_spoils_no_statistics():
    task = ControlTask(
        make(NEXT, 2, limit=1), steps=1, gamma=0.9, seed=0, normalise_observations=True, normalise_rewards=True
    )
    policy = MLPPolicy(3, task.environments.action_space, normaliser=ObservationNormaliser(3))
    for expected in (True, False):
        rollout = task.collect(policy)
        assert rollout.mask.all() == expected == rollout.mask.any()
        task.after_update(policy, rollout)
    for normaliser in (policy.normaliser, task._reward_normaliser):
        assert normaliser.count == 2 and normaliser.mean.isfinite().all() and normaliser.var.isfinite().all()


def stored(state):
    """As a checkpoint would give it back."""
    assert json.loads(json.dumps(state["environments"])) == state["environments"]
    return copy.deepcopy(state)


@pytest.mark.parametrize("mode", [NEXT, SAME])
def test_a_resume_begins_new_episodes_from_their_own_seeds_and_says_so(mode):
    def played(task):
        return [task.collect(Follower()).metrics for _ in range(2)], task.environments.vector_env.envs[0].seeds

    task = ControlTask(make(mode, limit=50), steps=23, gamma=0.9, seed=0, normalise_rewards=True)
    task.collect(Follower())
    assert task._lengths.any() and task._returns.any() and task._reward_normaliser.returns.any()
    state = stored(task.state_dict())
    resumed = []
    for _ in range(2):
        other = ControlTask(make(mode, limit=50), steps=23, gamma=0.9, seed=0, normalise_rewards=True)
        with pytest.warns(UserWarning, match="Repeating: .* begins a new episode"):
            other.load_state_dict(copy.deepcopy(state))
        assert other.steps == task.steps and not (other._lengths.any() or other._returns.any())
        assert not other._reward_normaliser.returns.any()
        assert other._reward_normaliser.count == task._reward_normaliser.count
        assert other.environments.state_dict() == task.environments.state_dict()
        resumed.append(played(other))
    assert resumed[0] == resumed[1]
    given = [seed for seed in resumed[0][1] if seed is not None]
    assert len(given) == 2 == len(set(given))  # at the beginning, and where it goes on


def test_the_end_before_a_checkpoint_leaves_no_dummy_after_it():
    environments = make(NEXT, limit=1)
    environments.step(np.zeros((3, 2), np.float32))
    with pytest.warns(UserWarning, match="begins a new episode"):
        environments.load_state_dict(environments.state_dict())
    assert environments.step(np.zeros((3, 2), np.float32)).valid.all()


def test_our_own_environments_go_on_in_mid_episode_after_a_resume():
    task, other = (ControlTask(make(OWN, limit=50), steps=23, gamma=0.9, seed=0) for _ in range(2))
    task.collect(Follower())
    with pytest.warns(UserWarning, match="not deterministic"):  # `Repeating` counts its resets
        other.load_state_dict(task.state_dict())
    assert other._lengths.tolist() == task._lengths.tolist() != [0, 0, 0]


def test_a_state_of_another_number_of_environments_is_refused():
    with pytest.raises(UserError, match=r"environment\.count: the checkpoint is of 2, not 3"):
        make(NEXT, 3).load_state_dict(make(NEXT, 2).state_dict())


def test_every_environment_has_its_own_seed_of_31_bits_and_one_run_one_set():
    def seeds(**arguments):
        return [env.seeds[0] for env in make(NEXT, **arguments).vector_env.envs]

    first = seeds(seed=1)
    assert len(set(first)) == 3 and all(0 <= seed < 2**31 for seed in first)
    assert seeds(seed=1) == first and not set(seeds(seed=2)) & set(first)


def test_reset_goes_back_to_the_seeds_of_the_beginning():
    environments = make(SAME)
    environments.step(np.zeros((3, 2), np.float32))
    environments.reset()
    for env in environments.vector_env.envs:
        assert len(env.seeds) == 2 and env.seeds[0] == env.seeds[1]


class Numbered(gymnasium.Env):
    """Counts its steps, as a one-hot number or a table of them; ends after three."""

    action_space = spaces.Discrete(2, start=5)

    def __init__(self, number, table=False):
        self.table = table
        self.observation_space = spaces.Box(0, 9, (2, 2), np.float64) if table else spaces.Discrete(5, start=1)

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return self._shown(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        return self._shown(), 1.0, self.time == 3, False, {}

    def _shown(self):
        return np.full((2, 2), float(self.time)) if self.table else self.time + 1


@pytest.mark.parametrize("mode", [NEXT, SAME])
@pytest.mark.parametrize("table", [False, True])
def test_observations_are_encoded_the_final_ones_too(mode, table):
    environments = make(mode, 2, kind=Numbered, table=table)
    encoded = [[float(time)] * 4 if table else [float(time == other) for other in range(5)] for time in range(4)]
    assert environments.observations.tolist() == [encoded[0]] * 2
    for time in (1, 2):
        environments.step(np.zeros(2, np.int64))
        assert environments.observations.tolist() == [encoded[time]] * 2
    transition = environments.step(np.ones(2, np.int64))
    assert {row: final.tolist() for row, final in transition.final.items()} == {0: encoded[3], 1: encoded[3]}
    assert environments.observations.tolist() == [encoded[3 if mode is NEXT else 0]] * 2
    transition = environments.step(np.ones(2, np.int64))
    assert transition.valid.tolist() == [mode is SAME] * 2 and not transition.final
    assert environments.observations.tolist() == [encoded[0 if mode is NEXT else 1]] * 2


def test_our_own_environments_call_every_step_valid_that_was_asked_for():
    environments = make(OWN)
    actions = np.zeros((3, 2), np.float32)
    assert environments.step(actions).valid.all()
    assert environments.step(actions, [0, 2]).valid.tolist() == [True, False, True]


@pytest.mark.parametrize("mode", [NEXT, SAME])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_nan_stops_the_run_and_says_where(mode, what):
    environments = make(mode, limit=50)
    environments.vector_env.envs[1].broken[what] = 1
    with pytest.raises(UserError, match=rf"environment Repeating, copy 1: nan or infinity in the {what} at step 1 "):
        environments.step(np.zeros((3, 2), np.float32))


def test_nan_in_a_final_observation_is_found_behind_the_next_ones_first():
    environments = make(SAME, limit=1)
    environments.vector_env.envs[2].broken["observation"] = 1
    with pytest.raises(UserError, match="copy 2: nan or infinity in the final observation"):
        environments.step(np.zeros((3, 2), np.float32))


def test_a_copy_is_named_by_its_number_in_the_whole_run():
    vector_env = SyncVectorEnv([lambda number=number: Repeating(number) for number in (3, 4)], autoreset_mode=SAME)
    environments = VectorEnvironments("Repeating", vector_env, seed=0, placed=RowRange(3, 2, 5))
    vector_env.envs[1].broken["reward"] = 1
    with pytest.raises(UserError, match="environment Repeating, copy 4: nan or infinity in the reward"):
        environments.step(np.zeros((2, 2), np.float32))


class Wrong(VectorEnv):
    """Resets on the same step, and shows less than it says or no final observation."""

    num_envs = 2
    single_observation_space, single_action_space = Repeating.observation_space, Repeating.action_space

    def __init__(self, size=3):
        self.size, self.metadata = size, {"autoreset_mode": SAME}

    def reset(self, *, seed=None, options=None):
        return np.zeros((2, self.size)), {}

    def step(self, actions):
        ended = np.array([True, False])
        return np.zeros((2, self.size)), np.zeros(2), ended, ~ended & False, {}


def test_what_a_vector_environment_must_say_is_asked_for_by_name():
    with pytest.raises(UserError, match=r"environment Wrong: .* no 'final_obs'"):
        VectorEnvironments("Wrong", Wrong(), seed=0).step(np.zeros((2, 2), np.float32))
    with pytest.raises(UserError, match=r"environment Wrong: the observations have shape \(2, 1\)"):
        VectorEnvironments("Wrong", Wrong(size=1), seed=0)
    disabled = SyncVectorEnv([lambda: Repeating(0)], autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(UserError, match=r"environment Mine: .*AutoresetMode\.DISABLED.*NEXT_STEP"):
        VectorEnvironments("Mine", disabled, seed=0)
    silent = Wrong()
    silent.metadata = {}
    with pytest.raises(UserError, match="autoreset_mode None"):
        VectorEnvironments("Silent", silent, seed=0)

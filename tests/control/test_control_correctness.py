"""What a whole control run must get right: values without a horizon, rollouts on end, resets, learning."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lm_trust.control import (
    ControlTask,
    Environments,
    MLPPolicy,
    ObservationNormaliser,
    make_environments,
    value_network,
)
from lm_trust.core import gae
from lm_trust.training.config_learning import Gae
from lm_trust.training.critic import ValueCritic
from lm_trust.training.estimation import estimate_advantages
from lm_trust.training.trainer import Trainer
from lm_trust.updates import TRPO, PPOClip

KEYS = ("observations", "actions", "rewards", "terminated", "truncated", "mask", "critic_inputs", "next_critic_inputs")


class Steady(gymnasium.Env):
    """Pays 1 a step for ever and shows noise, from which no one can tell the time; it ends after `lives` steps."""

    def __init__(self, lives=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.lives = lives

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.normal(size=2), {}

    def step(self, action):
        self.time += 1
        return self.np_random.normal(size=2), 1.0, self.time == self.lives, False, {}


class Levers(gymnasium.Env):
    """Shows where each of three levers should be put, and pays 1 for each that is; ends at random."""

    sizes = np.array([2, 3, 4])

    def __init__(self, ending=0.05):
        self.action_space = spaces.MultiDiscrete(self.sizes, start=[0, -1, 5])
        self.observation_space = spaces.Box(0.0, 1.0, (self.sizes.sum(),), np.float32)
        self.ending = ending

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._next(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        reward = float((action - self.action_space.start == self.wanted).sum())
        return self._next(), reward, bool(self.np_random.random() < self.ending), False, {}

    def _next(self):
        self.wanted = self.np_random.integers(self.sizes)
        return np.concatenate([np.eye(size)[wanted] for size, wanted in zip(self.sizes, self.wanted, strict=True)])


def copies(kind, count, limit=None, **arguments):
    envs = [kind(**arguments) for _ in range(count)]
    return Environments(
        kind.__name__, [gymnasium.wrappers.TimeLimit(env, limit) if limit else env for env in envs], seed=0
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trainer_for(environments, update, advantage, *, steps, iterations):
    size = environments.observation_size
    return Trainer(
        MLPPolicy(size, environments.action_space, hidden=(16,), generator=generator(1)),
        ControlTask(environments, steps=steps, gamma=advantage.gamma, seed=0),
        ValueCritic(value_network(size, hidden=(16,), generator=generator(2)), learning_rate=0.01, epochs=10),
        update,
        advantage,
        iterations=iterations,
    )


def learnt_values(environments, gamma):
    """The critic's values of the states of its last rollout, (B, T)."""
    seen = []
    trainer = trainer_for(environments, TRPO(), Gae(gamma=gamma, lam=1.0), steps=20, iterations=25)
    trainer.task.after_update = lambda policy, rollout: seen.append(rollout)
    for _ in range(trainer.iterations):
        trainer.iterate()
    return trainer.critic.values(seen[-1])[0]


def test_a_time_limit_does_not_shorten_an_endless_life():
    """The value of 1 a step for ever is 1 / (1 - gamma), however often the play is cut off."""
    values = learnt_values(copies(Steady, 8, limit=10), gamma=0.9)
    torch.testing.assert_close(values, torch.full_like(values, 10.0), rtol=0.05, atol=0)


def test_an_end_does_shorten_it():
    """The same play, but it ends: from a moment that cannot be told, 1 to 10 rewards are still to come."""
    values = learnt_values(copies(Steady, 8, lives=10), gamma=0.9)
    expected = np.mean([(1 - 0.9**left) / (1 - 0.9) for left in range(1, 11)])  # 4.1
    assert values.mean().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("id", ["CartPole-v1", "walk", "levers"])
def test_two_rollouts_on_end_are_one_twice_as_long(id, walks):
    """Bit for bit in what was seen and done; in advantages, up to the trace that a rollout's end cuts."""
    T, gamma, lam = 23, 0.97, 0.9

    def make():
        makers = {"walk": lambda: walks(3, limit=12), "levers": lambda: copies(Levers, 3, limit=12)}
        return makers.get(id, lambda: make_environments(id, 3, seed=1))()

    size = make().observation_size
    normaliser = ObservationNormaliser(size)
    normaliser.update(2 + 3 * torch.randn(100, size, generator=generator()))  # statistics that hold still throughout
    policy = MLPPolicy(size, make().action_space, hidden=(8,), normaliser=normaliser, generator=generator(1))
    critic = ValueCritic(value_network(size, hidden=(8,), normaliser=normaliser, generator=generator(2)))

    def collected(steps, times):
        task = ControlTask(make(), steps=steps, gamma=gamma, seed=5, normalise_observations=True)
        return [task.collect(policy) for _ in range(times)]

    def advantages(rollout):
        config = Gae(gamma=gamma, lam=lam, whiten=False)
        return estimate_advantages(config, rollout, rollout.rewards, *critic.values(rollout))[0]

    (whole,), (first, second) = collected(2 * T, 1), collected(T, 2)
    for key in KEYS:
        assert torch.equal(torch.cat([getattr(first, key), getattr(second, key)], dim=1), getattr(whole, key)), key

    ended = first.terminated | first.truncated
    open_end = ended.flip(1).cumsum(1).flip(1) == 0  # steps whose episode runs on into the second rollout
    assert open_end.any() and not open_end.all()
    assert torch.equal(first.next_critic_inputs[:, -1][~ended[:, -1]], second.observations[:, 0][~ended[:, -1]])
    cut, rest = advantages(first), advantages(second)
    carried = (gamma * lam) ** (T - torch.arange(T)) * rest[:, :1]
    joined = torch.cat([torch.where(open_end, cut + carried, cut), rest], dim=1)
    torch.testing.assert_close(joined, advantages(whole), rtol=1e-4, atol=1e-5)


def played_by_gymnasium(envs, mode, steps):
    """`steps` real transitions of each environment in a vector environment of gymnasium's: five lists of (T, ...) rows.

    Observation, reward, terminated, truncated, and the observation that the action led to.
    """
    vector = SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=mode)
    played, resetting = [[] for _ in envs], np.zeros(len(envs), bool)
    shown, _ = vector.reset()
    while min(map(len, played)) < steps:
        following, rewards, terminated, truncated, infos = vector.step(np.zeros(len(envs), np.int64))
        ended = terminated | truncated
        for row in np.flatnonzero(~resetting):
            final = infos["final_obs"][row] if ended[row] and mode is AutoresetMode.SAME_STEP else following[row]
            played[row].append((shown[row], rewards[row], terminated[row], truncated[row], final))
        if mode is AutoresetMode.NEXT_STEP:
            resetting = ended
        shown = following.copy()
    rows = [zip(*transitions[:steps], strict=True) for transitions in played]
    return [torch.from_numpy(np.array(column)) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_advantages_are_those_of_either_autoreset_mode(mode, clocks):
    def make():
        environments = clocks(3, limit=5)
        for env, lives in zip(environments.envs, (None, 3, 5), strict=True):  # truncated, terminated, both at once
            env.unwrapped.lives = lives
        return environments

    def advantages(observations, rewards, terminated, truncated, successors):
        values, next_values = (5 * torch.sin(x[..., 0] + 2 * x[..., 1]).double() for x in (observations, successors))
        return gae(rewards.double(), values, next_values, terminated, truncated, gamma=0.9, lam=0.8)[0]

    environments = make()
    policy = MLPPolicy(environments.observation_size, environments.action_space)
    rollout = ControlTask(environments, steps=17, gamma=0.9, seed=0).collect(policy)
    assert rollout.truncated.any() and rollout.terminated.any()
    ours = [getattr(rollout, key) for key in ("observations", "rewards", "terminated", "truncated")]
    theirs = played_by_gymnasium(make().envs, mode, steps=17)
    torch.testing.assert_close(advantages(*ours, rollout.next_critic_inputs), advantages(*theirs))


@pytest.mark.parametrize(
    "update", [TRPO(max_kl=0.05), PPOClip(learning_rate=0.01, epochs=6, minibatches=2)], ids=["trpo", "ppo_clip"]
)
def test_multi_discrete_actions_are_learnt(update):
    """All three levers right is 3 a step; by chance it is 1/2 + 1/3 + 1/4."""
    environments = copies(Levers, 8, limit=20)
    trainer = trainer_for(environments, update, Gae(gamma=0.5, lam=0.9), steps=32, iterations=40)
    paid, kl, task = [], [], trainer.task
    task.after_update = lambda policy, rollout: paid.append(rollout.rewards.mean().item())
    for _ in range(trainer.iterations):
        metrics = trainer.iterate()
        kl.append(metrics["step_kl"])
    assert paid[0] == pytest.approx(1 / 2 + 1 / 3 + 1 / 4, abs=0.3)
    assert paid[-1] > 2.8
    if isinstance(update, TRPO):
        assert max(kl) <= 0.05
    # Saved and gone on with: the record of actions holds all three dimensions.
    resumed = ControlTask(copies(Levers, 8, limit=20), steps=32, gamma=0.5, seed=1)
    resumed.load_state_dict(task.state_dict())
    assert torch.equal(resumed.collect(trainer.policy).rewards, task.collect(trainer.policy).rewards)

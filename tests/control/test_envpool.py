"""envpool against gymnasium, each environment that may be used: the same steps from the same states.

The states are brought together again after every step, so that what is compared is the task and not how fast two
roundings part in a chaotic system.
"""

import sys
from math import atan2
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from lm_trust.control import ControlTask, Environments, MLPPolicy, make_environments
from lm_trust.control.pool import CHECKED, Pool
from lm_trust.errors import UserError

envpool = pytest.importorskip("envpool")

CONTACTS = ("Ant-v5", "Humanoid-v5", "HumanoidStandup-v5")


LIMITED = ["Ant-v5", "Humanoid-v5", "Walker2d-v5"]
MUJOCO = ["Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "Walker2d-v5"]


def some_slow(ids, slow):
    return [pytest.param(id, marks=pytest.mark.slow) if id in slow else id for id in ids]


def angle(cosine, sine):
    return atan2(sine, cosine)


# The state that an observation shows, and a way to act that ends the task by itself where it has an end.
CLASSIC = {
    "CartPole-v1": (np.float64, lambda seen, step: 1),
    "Acrobot-v1": (
        lambda seen: np.array([angle(*seen[:2]), angle(*seen[2:4]), *seen[4:]], np.float64),
        lambda seen, step: 2 if seen[4] < 0 else 0,
    ),
    "MountainCar-v0": (np.float64, lambda seen, step: 2 if seen[1] > 0 else 0),
    "MountainCarContinuous-v0": (np.float64, lambda seen, step: np.array([1.5 * np.sign(seen[1])], np.float32)),
    "Pendulum-v1": (
        lambda seen: np.array([angle(*seen[:2]), seen[2]], np.float64),
        lambda seen, step: np.array([3 * np.sin(step)], np.float32),  # at times over the bounds
    ),
}
TO_THE_LIMIT = {
    "CartPole-v1": lambda seen, step: int(seen[2] + 0.3 * seen[3] > 0),
    "Acrobot-v1": lambda seen, step: 1,
    "MountainCar-v0": lambda seen, step: 1,
    "MountainCarContinuous-v0": lambda seen, step: np.array([np.sin(step)], np.float32),
    "Pendulum-v1": CLASSIC["Pendulum-v1"][1],
}


def classic_episode(id, act, **arguments):
    """An episode of both through our own interfaces: its length, how it ended, and the largest differences."""
    theirs = make_environments(id, 1, seed=0, backend="envpool", arguments=arguments)
    ours = make_environments(id, 1, seed=0, arguments=arguments)
    state = CLASSIC[id][0]
    seen = theirs.observations[0]
    for step in range(1, 1100):
        ours.envs[0].unwrapped.state = state(seen)
        action = np.asarray(act(seen, step))[None]
        found, expected = theirs.step(action), ours.step(action)
        assert found.valid.all() and np.abs(found.rewards - expected.rewards).max() < 2e-6
        end = [(bool(one.terminated[0]), bool(one.truncated[0])) for one in (expected, found)]
        if any(end[0]):
            assert np.abs(found.final[0] - expected.final[0]).max() < 2e-6
            return step, *end
        assert end[1] == end[0]
        seen = theirs.observations[0]
        assert np.abs(seen - ours.observations[0]).max() < 2e-6
    raise AssertionError("no end")


@pytest.mark.parametrize("id", CLASSIC)
def test_classic_control_runs_to_the_same_end_of_the_task(id):
    steps, expected, found = classic_episode(id, CLASSIC[id][1])
    assert found == expected == (id != "Pendulum-v1", id == "Pendulum-v1") and steps > 5


@pytest.mark.parametrize("id", CLASSIC)
def test_classic_control_runs_to_the_same_time_limit(id):
    steps, expected, found = classic_episode(id, TO_THE_LIMIT[id])
    assert found == expected == (False, True) and steps == gymnasium.spec(id).max_episode_steps


def test_an_end_of_the_task_at_the_time_limit_is_a_truncation_alone():
    steps, *_ = classic_episode("CartPole-v1", CLASSIC["CartPole-v1"][1])
    # Should envpool report both one day, this difference is gone and so is the note in `lm_trust.control.pool`.
    limited = classic_episode("CartPole-v1", CLASSIC["CartPole-v1"][1], max_episode_steps=steps)
    assert limited == (steps, (True, True), (False, True))


def mujoco_state(name, model, seen):
    """Positions and velocities that an observation shows; None for the velocities that it shows clipped."""
    if name == "InvertedDoublePendulum":
        positions, velocities = [seen[0], angle(seen[3], seen[1]), angle(seen[4], seen[2])], seen[5:8]
    elif name == "Reacher":
        positions = [angle(seen[0], seen[2]), angle(seen[1], seen[3]), *seen[4:6]]
        velocities = [*seen[6:8], 0, 0]
    elif name == "Pusher":  # object and goal slide from where the model puts them
        positions = [*seen[:7], seen[18] + 0.05, seen[17] - 0.45, seen[21] + 0.05, seen[20] - 0.45]
        velocities = [*seen[7:14], 0, 0, 0, 0]
    else:
        positions, velocities = seen[: model.nq], seen[model.nq : model.nq + model.nv]
    velocities = np.array(velocities)
    return np.array(positions), np.where(np.abs(velocities) < 10, velocities, np.nan)


def mujoco_episode(id, **arguments):
    """An episode under random actions: how it ended, and per step the differences relative to 1 + the size.

    Returns:
        (terminated, truncated), its length, and (steps,) each of the first observation's, the state's, the other
        observations' and the rewards' differences.
    """
    name = id.split("-")[0]
    if name not in ("InvertedPendulum", "InvertedDoublePendulum", "Reacher", "Pusher"):
        arguments["exclude_current_positions_from_observation"] = False
    theirs, ours = Pool(id, 1, arguments=arguments), gymnasium.make(id, **arguments)
    mujoco, draws = ours.unwrapped, np.random.default_rng(0)
    model, data = mujoco.model, mujoco.data
    ours.reset(seed=0)
    shown = theirs.reset(seed=[3])[0][0]
    mujoco.set_state(*mujoco_state(name, model, shown))
    first = np.abs(mujoco._get_obs() - shown).max()
    differences = []
    while True:
        action = draws.uniform(-1, 1, (1, model.nu)) * theirs.single_action_space.high
        (shown,), (reward,), (terminated,), (truncated,), _ = theirs.step(action)
        expected, expected_reward, *ends, _ = ours.step(action[0])
        difference = np.abs(shown - expected) / (1 + np.abs(expected))
        state, rest = difference[: model.nq + model.nv], difference[model.nq + model.nv :]
        reward_difference = abs(reward - expected_reward) / (1 + abs(expected_reward))
        differences.append((state.max(), rest.max(initial=0.0), reward_difference))
        assert [terminated, truncated] == ends
        if terminated or truncated:
            ours.close(), theirs.close()
            return (terminated, truncated), len(differences), first, *np.array(differences).T
        if name != "Pusher":  # its object turns, too: that is seen nowhere
            positions, velocities = mujoco_state(name, model, shown)
            turns = np.round((data.qpos - positions) / (2 * np.pi)) if name == "Reacher" else 0
            # Not by `set_state`, which would also renew what both compute from the state before the last substep.
            data.qpos[:] = positions + 2 * np.pi * turns
            data.qvel[:] = np.where(np.isnan(velocities), data.qvel, velocities)


def assert_alike(id, first, state, rest, rewards):
    assert first < 1e-14
    if id in CONTACTS:
        assert np.median(state) < 1e-4 and np.quantile(state, 0.99) < 5e-3
        assert np.median(rest) < 1e-3 and np.quantile(rest, 0.9) < 3e-2
        assert np.median(rewards) < 1e-4 and np.quantile(rewards, 0.99) < 5e-3
    else:
        assert max(state.max(), rest.max()) < 1e-6 and np.median(state) < 1e-11
        assert rewards.max() < 1e-7  # float32's rounding


@pytest.mark.parametrize("id", some_slow([id for id in CHECKED if id.endswith("-v5")], ["HumanoidStandup-v5"]))
def test_mujoco_takes_the_same_steps_to_the_same_end(id):
    ended, steps, *differences = mujoco_episode(id)
    assert_alike(id, *differences)
    healthy = id in ("HalfCheetah-v5", "HumanoidStandup-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5")
    assert ended == (not healthy, healthy) and steps >= 5
    if healthy:
        assert steps == gymnasium.spec(id).max_episode_steps


@pytest.mark.parametrize("id", some_slow(["Hopper-v5", *LIMITED], LIMITED))
def test_mujoco_runs_to_the_same_time_limit(id):
    ended, steps, *differences = mujoco_episode(id, terminate_when_unhealthy=False)
    assert_alike(id, *differences)
    assert ended == (False, True) and steps == 1000


@pytest.mark.parametrize("id", CHECKED)
def test_spaces_and_time_limits_are_gymnasiums(id):
    ours, theirs = gymnasium.make(id), Pool(id, 2)
    assert theirs.single_observation_space.shape == ours.observation_space.shape
    space, expected = theirs.single_action_space, ours.action_space
    assert type(space) is type(expected) and space.shape == expected.shape
    if space.shape:
        assert np.allclose(space.low, expected.low) and np.allclose(space.high, expected.high)
    else:
        assert space.n == expected.n and space.start == expected.start
    assert envpool.make_spec(id).config.max_episode_steps == ours.spec.max_episode_steps


@pytest.mark.parametrize("id", some_slow(["CartPole-v1", *MUJOCO], MUJOCO))
def test_first_states_have_the_same_distribution(id):
    count = 500
    theirs = Pool(id, count).reset(seed=list(range(count)))[0]
    env = gymnasium.make(id)
    ours = np.stack([env.reset(seed=seed)[0] for seed in range(count)])
    spread = np.maximum(ours.std(0), 1e-9)
    assert np.abs((theirs.mean(0) - ours.mean(0)) / spread).max() < 0.35  # of 348 numbers, at 1/16 standard errors
    varied = ours.std(0) > 1e-9
    assert np.abs(theirs.std(0)[varied] / spread[varied] - 1).max() < 0.2


def task(count=3, steps=60, seed=0, **arguments):
    environments = make_environments("CartPole-v1", count, seed=seed, backend="envpool", arguments=arguments)
    return ControlTask(environments, steps=steps, gamma=0.99, seed=seed)


def test_a_rollout_of_cartpole_masks_the_step_after_an_end_alone():
    made = task()
    rollout = made.collect(MLPPolicy(4, made.environments.action_space))
    ended = rollout.terminated | rollout.truncated
    assert ended[:, :-1].sum() > 3 and rollout.mask[:, 0].all()
    assert torch.equal(rollout.mask[:, 1:], ~ended[:, :-1])
    assert rollout.rewards[rollout.mask].eq(1).all() and made.steps == rollout.mask.sum()
    fallen = rollout.next_critic_inputs[rollout.terminated]
    assert ((fallen[:, 0].abs() > 2.4) | (fallen[:, 2].abs() > 0.2094)).all()
    begun = rollout.next_critic_inputs[~rollout.mask]
    assert begun.abs().max() <= 0.05


def test_one_seed_gives_one_rollout_however_many_threads():
    policy = MLPPolicy(11, make_environments("Hopper-v5", 1, seed=0, backend="envpool").action_space)

    def rollout(seed, threads=None):
        environments = make_environments("Hopper-v5", 4, seed=seed, backend="envpool")
        if threads:
            environments.vector_env._settings["num_threads"] = threads
            environments.reset()
        return ControlTask(environments, steps=100, gamma=0.99, seed=0).collect(policy)

    first, again, alone, other = rollout(0, 3), rollout(0), rollout(0, 1), rollout(1)
    for key in ("observations", "actions", "rewards", "terminated", "mask", "next_critic_inputs"):
        for same in (again, alone):
            assert torch.equal(getattr(first, key), getattr(same, key)), key
    assert not (first.observations[:, 0] == other.observations[:, 0]).all(-1).any()
    assert len(first.observations[:, 0].unique(dim=0)) == 4


def test_a_resume_begins_new_episodes_and_one_state_gives_one_run():
    made = task()
    policy = MLPPolicy(4, made.environments.action_space)
    made.collect(policy)
    state, rollouts = made.state_dict(), []
    for _ in range(2):
        resumed = task()
        begun = resumed.environments.observations
        with pytest.warns(UserWarning, match="CartPole-v1: .* begins a new episode"):
            resumed.load_state_dict(state)
        assert not (resumed.environments.observations == begun).all(-1).any()
        rollouts.append(resumed.collect(policy))
    assert torch.equal(rollouts[0].observations, rollouts[1].observations)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_threads_end_with_the_pool():
    def count():
        return len(list(Path("/proc/self/task").iterdir()))

    before, pool, counts = count(), Pool("CartPole-v1", 3, threads=3), []
    for _ in range(3):
        pool.reset(seed=[1, 2, 3])
        counts.append(count())
    assert counts[0] == counts[1] == counts[2] >= before + 3
    pool.close()
    assert count() == before


@pytest.mark.filterwarnings("error")
def test_arguments_reach_the_environment():
    made = task(count=1, steps=5, max_episode_steps=4)
    rollout = made.collect(MLPPolicy(4, made.environments.action_space))
    assert rollout.truncated.tolist() == [[False, False, False, True, False]]


def refused(*words, id="CartPole-v1", **settings):
    with pytest.raises(UserError) as caught:
        make_environments(id, 2, seed=0, backend="envpool", **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_cannot_be_used_is_refused_by_name(monkeypatch):
    refused("environment.id", "did you mean 'HalfCheetah-v5'?", id="HalfCheeta-v5")
    refused("environment.backend", "'Hopper-v4'", "did you mean 'Hopper-v5'?", "use gymnasium", id="Hopper-v4")
    refused("environment.backend", "mine:make", "use gymnasium", id="mine:make")
    refused("environment.arguments", "bogus", arguments={"bogus": 1})
    refused("environment.arguments", "envpool", "sutton_barto_reward", arguments={"sutton_barto_reward": True})
    refused("environment.arguments", "num_envs", arguments={"num_envs": 4})
    monkeypatch.setitem(sys.modules, "envpool", None)
    refused("environment.backend", "pip install 'lm-trust[envpool]'")


def test_gymnasium_stays_the_default():
    assert isinstance(make_environments("CartPole-v1", 1, seed=0), Environments)
    assert isinstance(make_environments("CartPole-v1", 1, seed=0, backend="gymnasium"), Environments)

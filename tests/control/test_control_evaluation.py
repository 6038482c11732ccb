"""Deterministic evaluation on environments of its own."""

import pytest
import torch

from lm_trust.control import ControlTask, Environments, MLPPolicy, make_environments
from lm_trust.control import evaluation as module
from lm_trust.control.evaluation import evaluate_policy
from lm_trust.errors import UserError


def policy_for(environments, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return MLPPolicy(environments.observation_size, environments.action_space, hidden=(8,), generator=generator)


class Fixed(torch.nn.Module):
    """Always one action, most likely but seldom sampled otherwise."""

    def __init__(self, action):
        super().__init__()
        self.action, self.seen = action, 0

    def distribution(self, observations):
        from lm_trust.core import Categorical

        self.seen += len(observations)
        return Categorical(torch.nn.functional.one_hot(torch.tensor(self.action), 2) * torch.ones(len(observations), 1))


def test_every_episode_counts_once_however_long(clocks):
    # Environment k lives k + 1 steps: counting the first episodes to finish would favour the short ones.
    environments = clocks(6)
    for number, env in enumerate(environments.envs):
        env.lives = number + 1
    result = evaluate_policy(policy_for(environments), environments)
    assert result["count"] == 6
    assert result["reward_mean"] == result["length_mean"] == pytest.approx(3.5)
    assert result["returns"] == [1, 2, 3, 4, 5, 6]
    assert [len(env.resets) for env in environments.envs] == [3] * 6  # made, begun, and after its one end


def test_evaluation_repeats_itself_and_leaves_training_alone():
    def evaluation(count):
        return make_environments("CartPole-v1", count, seed=7)

    def rollouts(evaluate):
        environments = make_environments("CartPole-v1", 2, seed=0)
        task = ControlTask(environments, steps=30, gamma=0.9, seed=0, evaluation_environments=evaluation)
        policy, found = policy_for(environments), []
        for _ in range(3):
            found.append(task.collect(policy).observations)
            results = [task.evaluate(policy, 5), task.evaluate(policy, 3)] if evaluate else []
        task.close()
        return torch.cat(found), results, task.steps

    with_evaluation, results, steps = rollouts(True)
    without, _, same_steps = rollouts(False)
    assert torch.equal(with_evaluation, without) and steps == same_steps == 180
    again = rollouts(True)[1]
    assert results == again and [result["count"] for result in results] == [5, 3]


def test_the_most_likely_action_is_taken():
    environments = make_environments("CartPole-v1", 20, seed=0)
    result = evaluate_policy(Fixed(1), environments)
    assert 8 <= result["reward_mean"] <= 11  # always to the right: the pole falls at once; by chance it takes twenty


def test_an_episode_without_an_end_is_refused(clocks, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_EPISODE", 50)
    environments = clocks(2)
    environments.envs[0].lives = 3
    with pytest.raises(UserError, match="environment Clock: an evaluation episode did not end in 50 steps"):
        evaluate_policy(policy_for(environments), environments)


def test_evaluation_needs_environments(clocks):
    task = ControlTask(clocks(1), steps=2, gamma=0.9, seed=0)
    with pytest.raises(ValueError, match="evaluation_environments"):
        task.evaluate(policy_for(clocks(1)), 1)


def test_environments_say_what_they_are(walks):
    environments = walks(3)
    assert isinstance(environments, Environments)
    assert (environments.count, environments.observation_size) == (3, 3)
    assert (environments.action_space.kind, environments.action_space.size) == ("continuous", 2)

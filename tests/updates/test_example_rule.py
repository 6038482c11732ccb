"""The example of an own update rule: its objective peaks where PPO clips, and it learns."""

import runpy
from pathlib import Path

import pytest
import torch
from tiny_policies import MASK, Policy, batch_for

from lm_trust.updates.adam_rule import AdamRule

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples/custom_update_rule.py"))


class Ratio:
    """A distribution whose log-probabilities are given."""

    def __init__(self, ratio):
        self.log = ratio.log()

    def log_prob(self, actions):
        return self.log


@pytest.mark.parametrize("advantage", [-2.0, 0.5])
def test_each_step_is_worth_most_where_ppo_would_clip_it(advantage):
    ratio = torch.linspace(0.5, 1.5, 1001, dtype=torch.float64)[None]
    steps = torch.full_like(ratio, advantage), torch.zeros_like(ratio), torch.ones_like(ratio, dtype=torch.bool)
    (objective,) = EXAMPLE["parabola"](Ratio(ratio), None, torch.zeros_like(ratio), *steps)
    expected = 1 + EXAMPLE["CLIP"] * (1 if advantage > 0 else -1)
    assert ratio[0, objective.argmax()].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_its_epochs_gain_and_stay_near_whatever_masked_steps_hold(kind):
    policy = Policy(kind)
    batch = batch_for(policy)
    batch.advantages[~MASK] = float("nan")
    report = AdamRule(EXAMPLE["parabola"], epochs=20, minibatches=1, learning_rate=0.02).step(policy, batch)
    assert report.accepted and report.surrogate_gain > 0 and 0 < report.step_kl < 0.1

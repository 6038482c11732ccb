"""Every rule learns CartPole in 20,000 steps."""

import pytest

from lm_trust.training.build import build_world
from lm_trust.training.config import ControlConfig

RULES = {
    "natural_gradient": {"step_size": 0.3},
    "reinforce": {"learning_rate": 0.01},
    "ppo_trust": {"learning_rate": 3e-3, "epochs": 6},
    "trpo_penalty": {"learning_rate": 3e-3, "epochs": 6},
    "projection": {"learning_rate": 3e-3, "epochs": 6},
    "divergence_mask": {"learning_rate": 3e-3, "epochs": 6},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_learns_cartpole(kind):
    config = ControlConfig(
        total_steps=20_000,
        environment={"id": "CartPole-v1", "count": 8},
        rollout={"steps": 64},
        critic={"kind": "mlp", "learning_rate": 3e-3},
        update={"kind": kind, **RULES[kind]},
        trackers=[],
    )
    world = build_world(config)
    trainer = world.trainer
    lines = [trainer.iterate() for _ in range(trainer.iterations)]
    assert trainer.task.steps <= 20_480
    assert trainer.task.evaluate(trainer.policy, 20)["reward_mean"] > 150
    if world.step_kl_bound is not None:
        assert max(line["step_kl"] for line in lines) <= world.step_kl_bound
    trainer.task.close()

"""An update rule of one's own, on CartPole: Simple Policy Optimization (Xie et al. 2024, arXiv 2401.16025).

    python examples/custom_update_rule.py                (in the folder above this one; a minute)

In place of PPO's clip each step's objective is a parabola, ratio * advantage - |advantage| / (2 clip) * (ratio - 1)^2,
whose maximum is where PPO would clip. A rule that is such an objective needs nothing else: `AdamRule` steps by it, in
minibatches, processes and both worlds, and measures the exact step KL. A rule of another form is any object with
`step(policy, batch) -> StepReport`, `state_dict()` and `load_state_dict(state)`, as in `lm_trust/updates/trpo.py`.
"""

from __future__ import annotations

import gymnasium
import torch
from torch import Tensor

from lm_trust.core import Distribution
from lm_trust.training.build import build_world
from lm_trust.training.config_file import load_config
from lm_trust.updates.adam_rule import AdamRule

CLIP = 0.2


def parabola(
    new: Distribution, old: Distribution, actions: Tensor, advantages: Tensor, old_log_prob: Tensor, mask: Tensor
) -> tuple[Tensor]:
    """Each step's objective, (B, T); a step that is masked may hold anything."""
    ratio = torch.where(mask, new.log_prob(actions) - old_log_prob, 0.0).exp()
    return (ratio * advantages - advantages.abs() / (2 * CLIP) * (ratio - 1).square(),)


def main() -> None:
    """Train, evaluate, and let the policy act in an environment made elsewhere."""
    trainer = build_world(load_config("configs/control/cartpole_ppo.yaml")).trainer
    trainer.update = AdamRule(parabola, epochs=10, minibatches=4, learning_rate=1e-3, anneal=True)
    try:
        while trainer.iteration < trainer.iterations:
            line = trainer.iterate()
            if trainer.iteration % 10 == 0:
                print(f"{line['steps']:7d} steps, return {line['reward_mean']:5.1f}, step KL {line['step_kl']:.4f}")
        print("evaluation:", trainer.task.evaluate(trainer.policy, 20)["reward_mean"])
    finally:
        trainer.task.close()

    env = gymnasium.make("CartPole-v1")
    (observation, _), total, over = env.reset(seed=0), 0.0, False
    while not over:
        with torch.no_grad():
            action = trainer.policy.distribution(torch.as_tensor(observation)[None]).mode()
        observation, reward, terminated, truncated, _ = env.step(action.item())
        total, over = total + reward, terminated or truncated
    print("by hand:", total)


if __name__ == "__main__":
    main()

"""Update rules: one file each, all `step(policy, batch) -> StepReport` on the same batch."""

from lm_trust.updates.ppo_clip import PPOClip
from lm_trust.updates.ppo_penalty import PPOPenalty
from lm_trust.updates.trpo import TRPO

__all__ = ["TRPO", "PPOClip", "PPOPenalty"]

"""Update rules: one file each, all `step(policy, batch) -> StepReport` on the same batch."""

from lm_trust.updates.divergence_mask import DivergenceMask
from lm_trust.updates.natural_gradient import NaturalGradient
from lm_trust.updates.ppo_clip import PPOClip
from lm_trust.updates.ppo_penalty import PPOPenalty
from lm_trust.updates.ppo_trust import PPOTrust
from lm_trust.updates.projection import Projection
from lm_trust.updates.reinforce import Reinforce
from lm_trust.updates.trpo import TRPO
from lm_trust.updates.trpo_penalty import TRPOPenalty

__all__ = [
    "TRPO",
    "DivergenceMask",
    "NaturalGradient",
    "PPOClip",
    "PPOPenalty",
    "PPOTrust",
    "Projection",
    "Reinforce",
    "TRPOPenalty",
]

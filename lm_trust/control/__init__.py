"""The control world: environments, policies, and rollouts. It stands on `lm_trust.core`."""

from lm_trust.control.environments import make_environments
from lm_trust.control.normaliser import ObservationNormaliser, RewardNormaliser
from lm_trust.control.policies import MLPPolicy, value_network
from lm_trust.control.rollout import ControlTask
from lm_trust.control.spaces import ActionSpace
from lm_trust.control.vector import Environments

__all__ = [
    "ActionSpace",
    "ControlTask",
    "Environments",
    "MLPPolicy",
    "ObservationNormaliser",
    "RewardNormaliser",
    "make_environments",
    "value_network",
]

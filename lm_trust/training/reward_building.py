"""From the `rewards` of a configuration to their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import torch

from lm_trust.lm.reward_functions import Reward as RewardFunction
from lm_trust.lm.rewards import DeferredReward, RewardPart, WeightedRewards
from lm_trust.training.config_rewards import Reward


def build_rewards(sections: Sequence[Reward], *, device: torch.device | str) -> WeightedRewards:
    """The rewards that a configuration lists; their models are not loaded until `WeightedRewards.load`.

    Args:
        device: for those that have a model.

    Raises:
        UserError: a function cannot be found.
    """
    return WeightedRewards([_part(section, f"rewards[{index}]", device) for index, section in enumerate(sections)])


def _part(section: Reward, key: str, device: torch.device | str) -> RewardPart:
    if section.kind == "function":
        return RewardPart(section.name, **section.model_dump(exclude={"kind", "name"}))

    def load() -> RewardFunction:
        # Here, and not above: they need what most rewards do not.
        if section.kind == "classifier":
            from lm_trust.lm.classifier_reward import load_classifier

            return load_classifier(section, key=key, device=device)
        from lm_trust.lm.human_rating import load_human_rating

        return load_human_rating(section, key=key, device=device)

    label = section.name or (section.kind == "classifier" and PurePath(section.path).name) or section.kind
    return RewardPart(DeferredReward(load), section.weight, section.dense, label=label)

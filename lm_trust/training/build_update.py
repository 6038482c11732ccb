"""From a configuration to its update rule."""

from __future__ import annotations

from lm_trust.training.config import Config, LanguageConfig
from lm_trust.training.config_checks import discount
from lm_trust.training.trainer import UpdateRule
from lm_trust.updates import (
    TRPO,
    DivergenceMask,
    NaturalGradient,
    PPOClip,
    PPOPenalty,
    PPOTrust,
    Projection,
    Reinforce,
    TRPOPenalty,
)

_RULES = {
    "trpo": TRPO,
    "natural_gradient": NaturalGradient,
    "ppo_clip": PPOClip,
    "ppo_penalty": PPOPenalty,
    "ppo_trust": PPOTrust,
    "reinforce": Reinforce,
    "trpo_penalty": TRPOPenalty,
    "projection": Projection,
    "divergence_mask": DivergenceMask,
}


def build_update(config: Config) -> UpdateRule:
    """The rule that a run's `update` section describes, with what other sections say of it."""
    kind = config.update.kind
    settings = config.update.model_dump(exclude={"kind"})
    if isinstance(config, LanguageConfig):
        settings["microbatch_size"] = config.rollout.microbatch_size
        settings["reference_loss"] = config.reference.loss
        settings["reference_budget"] = config.reference.budget
    if kind == "natural_gradient":
        settings.pop("reference_budget", None)  # null: the config refuses any other
    if settings.get("fisher_method") == "auto" and isinstance(config, LanguageConfig) and config.model.autocast:
        settings["fisher_method"] = "gauss_newton"  # auto may fall back on a finite difference, lost in half precision
    if kind == "trpo_penalty":
        settings["gamma"] = discount(config)
    if kind not in ("trpo", "natural_gradient"):  # these two draw nothing
        settings["seed"] = config.seed
    return _RULES[kind](**settings)

"""Settings that are each possible but not together: what is wrong with them, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_trust.training.config_language import Lora
from lm_trust.training.config_learning import GROUPED, Section
from lm_trust.training.config_rewards import FunctionReward
from lm_trust.training.penalty import LARGEST_ERROR

if TYPE_CHECKING:
    from lm_trust.training.config import Config, ControlConfig, LanguageConfig

Problems = list[tuple[str, str]]  # (dotted key, message)


class ConfigError(ValueError):
    """Settings that do not go together: `problems` is a list of (dotted key, message)."""

    def __init__(self, problems: Problems) -> None:
        super().__init__("; ".join(f"{key}: {message}" for key, message in problems))
        self.problems = problems


def language_problems(config: LanguageConfig) -> Problems:
    """What is wrong with a language run's settings as a whole."""
    size = config.rollout.batch_size
    problems = _critic_problems(config.advantage.kind, config.critic.kind)
    problems += _rollout_problems(config)
    problems += heldout_problems(config.prompts, "prompts")
    problems += _model_problems(config)
    problems += _reward_problems(config)
    problems += _fisher_problems(config)
    problems += _reference_problems(config)
    problems += _minibatch_problems(config, size, f"rollout.batch_size ({size})")
    return problems + _update_problems(config, size, config.rollout.samples_per_prompt)


def control_problems(config: ControlConfig) -> Problems:
    """What is wrong with a control run's settings as a whole."""
    size = config.environment.count * config.rollout.steps
    problems = _critic_problems(config.advantage.kind, config.critic.kind)
    problems += _minibatch_problems(config, size, f"environment.count * rollout.steps ({size})")
    problems += _update_problems(config, size)
    processes, count, videos = config.environment.processes, config.environment.count, config.evaluation.videos
    if processes > count:
        problems.append(("environment.processes", f"must be at most environment.count ({count}), got {processes}"))
    if processes > 1 and config.environment.backend == "envpool":
        problems.append(("environment.processes", "must be 1 with environment.backend envpool, which has threads"))
    if videos > config.evaluation.count:
        words = f"must be at most evaluation.count ({config.evaluation.count}), got {videos}"
        problems.append(("evaluation.videos", words))
    return problems


def discount(config: Config) -> float:
    """The discount a step; 1 for advantages of whole completions."""
    return getattr(config.advantage, "gamma", 1.0)


def heldout_problems(section: Section, key: str) -> Problems:
    """What is wrong with the held-out side of a section of prompts or rows."""
    if getattr(section, "heldout", None) is not None:
        return []
    words = f"has no effect without {key}.heldout; name the dataset there, or leave it out"
    parts = ("heldout_subset", "heldout_split")
    return [(f"{key}.{part}", words) for part in parts if getattr(section, part, None) is not None]


def _critic_problems(advantage: str, critic: str) -> Problems:
    if advantage == "gae" and critic == "none":
        return [("critic.kind", "advantage.kind gae needs a critic, got none")]
    if advantage in GROUPED and critic != "none":
        return [("critic.kind", f"must be none with advantage.kind {advantage}, got {critic}")]
    return []


def _rollout_problems(config: LanguageConfig) -> Problems:
    problems = []
    rollout, kind = config.rollout, config.advantage.kind
    size, samples = rollout.batch_size, rollout.samples_per_prompt
    if kind in GROUPED and samples < 2:
        problems.append(("rollout.samples_per_prompt", f"must be at least 2 with advantage.kind {kind}, got {samples}"))
    if size % samples:
        problems.append(
            ("rollout.batch_size", f"must be divisible by rollout.samples_per_prompt ({samples}), got {size}")
        )
    if rollout.at_limit == "bootstrap" and config.critic.kind == "none":
        problems.append(("rollout.at_limit", "bootstrap needs a critic, which values the state at the limit"))
    if rollout.at_limit == "penalise" and not rollout.limit_penalty:
        problems.append(("rollout.limit_penalty", "must be greater than 0 with rollout.at_limit penalise"))
    if rollout.at_limit != "penalise" and rollout.limit_penalty:
        words = f"has no effect with rollout.at_limit {rollout.at_limit}; use penalise"
        problems.append(("rollout.limit_penalty", words))
    return problems


def _model_problems(config: LanguageConfig) -> Problems:
    problems = []
    if config.model.lora is None and config.model.adapter is not None:
        problems.append(("model.adapter", "starts from an adapter, which needs model.lora; leave one out"))
    elif config.model.adapter is not None and config.model.lora != Lora():
        words = "has no effect with model.adapter, which has its own rank, scale and targets; leave it at its defaults"
        problems.append(("model.lora", words))
    if config.model.lora is None and config.critic.kind == "adapter":
        problems.append(("critic.kind", "adapter needs model.lora; without it use reference_head or model"))
    if config.critic.kind == "model" and config.critic.revision is not None and config.critic.path is None:
        problems.append(("critic.revision", "has no effect without critic.path; the model is model.path's"))
    return problems


def _reward_problems(config: LanguageConfig) -> Problems:
    problems = []
    for index, reward in enumerate(config.rewards):
        if reward.kind != "function":
            continue
        if reward.dense and reward.level != "sequence":
            words = f"has no meaning with level {reward.level}, which says itself what each token is paid"
            problems.append((f"rewards.{index}.dense", words))
        if reward.step_delimiter != FunctionReward.model_fields["step_delimiter"].default and reward.level != "step":
            words = f"has no effect with level {reward.level}; use step, or leave it out"
            problems.append((f"rewards.{index}.step_delimiter", words))
        if reward.memory is not None and not reward.process:
            problems.append((f"rewards.{index}.memory", "limits a process of its own, which needs process true"))
    return problems


def _fisher_problems(config: LanguageConfig) -> Problems:
    method = getattr(config.update, "fisher_method", "auto")
    if method in ("auto", "gauss_newton"):
        return []
    if config.model.autocast is not None:
        reason = f"needs float32, and model.autocast is {config.model.autocast}"
    elif method == "kl_hessian" and config.model.lora is not None:
        reason = "needs model.lora null, because it differentiates the vocabulary twice"
    else:
        return []
    return [("update.fisher_method", f"{method} {reason}; use auto or gauss_newton")]


def _reference_problems(config: LanguageConfig) -> Problems:
    problems = []
    reference = config.reference
    if reference.adaptive is not None and not reference.penalty:
        problems.append(("reference.penalty", "must be greater than 0 with reference.adaptive, which starts from it"))
    # Where the rollout is that large a part of the horizon, one error of the full size takes off all of the penalty.
    least = LARGEST_ERROR * config.rollout.batch_size
    if reference.adaptive is not None and reference.adaptive.horizon <= least:
        words = f"must be greater than rollout.batch_size / 5 ({least:g}), or the penalty would fall to 0 and below"
        problems.append(("reference.adaptive.horizon", f"{words}; got {reference.adaptive.horizon}"))
    if reference.budget is not None and config.update.kind == "natural_gradient":
        words = "cannot be kept with update.kind natural_gradient, a fixed step; use trpo"
        problems.append(("reference.budget", words))
    return problems


def _minibatch_problems(config: Config, size: int, words: str) -> Problems:
    parts = [("critic.minibatches", config.critic), ("update.minibatches", config.update)]
    return [
        (key, f"must divide {words}, got {section.minibatches}")
        for key, section in parts
        if hasattr(section, "minibatches") and size % section.minibatches
    ]


def _update_problems(config: Config, rows: int, group: int = 1) -> Problems:
    """What is wrong with the rule for batches of so many rows, of which groups share a prompt."""
    problems = []
    if config.update.kind == "trpo_penalty" and config.update.coefficient is None and discount(config) == 1:
        problems.append(
            ("update.coefficient", "must be given without a discount, where that of the theory is infinite")
        )
    fraction = getattr(config.update, "holdout_fraction", 0.0)
    heldout = round(rows * fraction)
    if fraction and (not 0 < heldout < rows or heldout % group):
        whole = "whole prompts" if group > 1 else "rows"
        problems.append(
            ("update.holdout_fraction", f"must leave {whole} on both sides of {rows} rows, got {fraction:g}")
        )
    return problems

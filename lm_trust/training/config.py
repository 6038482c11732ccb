"""What a run can be told: one frozen pydantic model a section, shared by both worlds where they share it.

The models are the single source of the keys, their defaults, their limits and the words that explain them
(`lm-trust config` prints them). `lm_trust.training.config_file` reads them from YAML and the command line.
Importing this module loads neither torch nor transformers nor gymnasium.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lm_trust.training.config_language import (
    CompletionTable,
    Model,
    PromptFile,
    ReasoningGym,
    Reference,
    Rollout,
    Stop,
)
from lm_trust.training.config_learning import (
    GROUPED,
    UPDATE,
    AdapterHead,
    Count,
    Gae,
    GroupRelative,
    LeaveOneOut,
    Mlp,
    ModelHead,
    Name,
    NoCritic,
    Positive,
    ReferenceHead,
    ReturnsToGo,
    Section,
    Seed,
    Update,
    default_kind,
)
from lm_trust.training.config_rewards import Rewards, RewardScaling


class ConfigError(ValueError):
    """Settings that are each possible but not together: `problems` is a list of (dotted key, message)."""

    def __init__(self, problems: list[tuple[str, str]]):
        super().__init__("; ".join(f"{key}: {message}" for key, message in problems))
        self.problems = problems


class Evaluation(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: only at the end")
    count: Positive = Field(64, description="completions of held-out prompts, in turn")


class ControlEvaluation(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: only at the end")
    count: Positive = Field(20, description="episodes")
    videos: Count = Field(0, description="episodes of each evaluation that are filmed")


Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio"]],
    Field(default_factory=lambda: ["tensorboard"], description="where metrics also go; []: nowhere"),
]


class Checkpoint(Section):
    every: Count = Field(10, description="iterations between checkpoints; 0: only at the end")
    keep_last: Positive = Field(2, description="checkpoints that are kept")


# ---- the language world


def _default_critic(validated: dict[str, Any]) -> NoCritic | ReferenceHead:
    grouped = getattr(validated.get("advantage"), "kind", None) in GROUPED
    return NoCritic() if grouped else ReferenceHead()


class LanguageConfig(Section):
    """A language run: a config with a `model` section."""

    seed: Seed = Field(0, description="of every random stream of the run")
    output: Name | None = Field(None, description="run folder; null: runs/NAME for NAME.yaml")
    iterations: Positive = Field(description="rounds of rollout and update")
    model: Model
    prompts: Annotated[PromptFile | ReasoningGym, Field(discriminator="kind"), default_kind("file")]
    rollout: Rollout = Field(default_factory=Rollout)
    rewards: Rewards
    reward_scaling: RewardScaling = Field(default_factory=RewardScaling)
    reference: Reference = Field(default_factory=Reference)
    advantage: Annotated[Gae | ReturnsToGo | LeaveOneOut | GroupRelative, Field(discriminator="kind")] = Field(
        default_factory=Gae
    )
    # after `advantage`, which its default looks at
    critic: Annotated[ReferenceHead | AdapterHead | ModelHead | NoCritic, Field(discriminator="kind")] = Field(
        default_factory=_default_critic
    )
    update: Update = UPDATE
    evaluation: Evaluation = Field(default_factory=Evaluation)
    completions: CompletionTable = Field(default_factory=CompletionTable)
    stop: Stop = Field(default_factory=Stop)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    trackers: Trackers

    @model_validator(mode="after")
    def _together(self) -> LanguageConfig:
        rollout, kind = self.rollout, self.advantage.kind
        problems = _critic_problems(kind, self.critic.kind)
        if kind in GROUPED and rollout.samples_per_prompt < 2:
            problems.append(
                (
                    "rollout.samples_per_prompt",
                    f"must be at least 2 with advantage.kind {kind}, got {rollout.samples_per_prompt}",
                )
            )
        if rollout.batch_size % rollout.samples_per_prompt:
            problems.append(
                (
                    "rollout.batch_size",
                    "must be divisible by rollout.samples_per_prompt "
                    f"({rollout.samples_per_prompt}), got {rollout.batch_size}",
                )
            )
        if rollout.at_limit == "bootstrap" and self.critic.kind == "none":
            problems.append(("rollout.at_limit", "bootstrap needs a critic, which values the state at the limit"))
        if rollout.at_limit == "penalise" and not rollout.limit_penalty:
            problems.append(("rollout.limit_penalty", "must be greater than 0 with rollout.at_limit penalise"))
        if rollout.at_limit != "penalise" and rollout.limit_penalty:
            problems.append(
                (
                    "rollout.limit_penalty",
                    f"has no effect with rollout.at_limit {rollout.at_limit}; use penalise",
                )
            )
        if self.model.lora is None and self.model.adapter is not None:
            problems.append(("model.adapter", "starts from an adapter, which needs model.lora; leave one out"))
        if self.model.lora is None and self.critic.kind == "adapter":
            problems.append(("critic.kind", "adapter needs model.lora; without it use reference_head or model"))
        problems += _reward_problems(self)
        problems += _fisher_problems(self)
        if self.reference.adaptive is not None and not self.reference.penalty:
            problems.append(
                ("reference.penalty", "must be greater than 0 with reference.adaptive, which starts from it")
            )
        problems += _minibatch_problems(self, rollout.batch_size, f"rollout.batch_size ({rollout.batch_size})")
        problems += _update_problems(self, rollout.batch_size, rollout.samples_per_prompt)
        if self.reference.budget is not None and self.update.kind == "natural_gradient":
            problems.append(
                ("reference.budget", "cannot be kept with update.kind natural_gradient, a fixed step; use trpo")
            )
        if problems:
            raise ConfigError(problems)
        return self


# ---- the control world


class Environment(Section):
    id: Name = Field(description="gymnasium's name, such as CartPole-v1")
    count: Positive = Field(8, description="environments stepped side by side")
    arguments: dict[Name, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
    processes: Positive = Field(1, description="that step them; 2 where a step is work and a core is free")
    backend: Literal["gymnasium", "envpool"] = Field("gymnasium", description="what steps the training environments")


class Policy(Section):
    hidden: list[Positive] = Field([64, 64], description="widths of the hidden layers")
    activation: Literal["tanh", "relu"] = Field("tanh", description="between the layers")
    log_std: float = Field(0.0, description="log standard deviation at the start (continuous actions)")


class ControlRollout(Section):
    steps: Positive = Field(256, description="steps an iteration of each environment")


class Normalise(Section):
    observations: bool = Field(False, description="to mean 0 and sd 1, by running statistics")
    rewards: bool = Field(False, description="by the running sd of returns; reports stay unscaled")


class ControlConfig(Section):
    """A control run: a config with an `environment` section."""

    seed: Seed = Field(0, description="of every random stream of the run")
    output: Name | None = Field(None, description="run folder; null: runs/NAME for NAME.yaml")
    total_steps: Positive = Field(description="environment steps in all")
    environment: Environment
    policy: Policy = Field(default_factory=Policy)
    rollout: ControlRollout = Field(default_factory=ControlRollout)
    normalise: Normalise = Field(default_factory=Normalise)
    advantage: Annotated[Gae | ReturnsToGo, Field(discriminator="kind")] = Field(default_factory=Gae)
    critic: Annotated[Mlp | NoCritic, Field(discriminator="kind")] = Field(default_factory=Mlp)
    update: Update = UPDATE
    evaluation: ControlEvaluation = Field(default_factory=ControlEvaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    trackers: Trackers

    @property
    def iterations(self) -> int:
        """Rounds of rollout and update: whole rollouts, so that the last may go beyond `total_steps`."""
        return -(-self.total_steps // (self.environment.count * self.rollout.steps))

    @model_validator(mode="after")
    def _together(self) -> ControlConfig:
        size = self.environment.count * self.rollout.steps
        problems = _critic_problems(self.advantage.kind, self.critic.kind)
        problems += _minibatch_problems(self, size, f"environment.count * rollout.steps ({size})")
        problems += _update_problems(self, size)
        processes, backend = self.environment.processes, self.environment.backend
        if processes > self.environment.count:
            problems.append(
                (
                    "environment.processes",
                    f"must be at most environment.count ({self.environment.count}), got {processes}",
                )
            )
        if processes > 1 and backend == "envpool":
            problems.append(("environment.processes", "must be 1 with environment.backend envpool, which has threads"))
        if self.evaluation.videos > self.evaluation.count:
            problems.append(
                (
                    "evaluation.videos",
                    f"must be at most evaluation.count ({self.evaluation.count}), got {self.evaluation.videos}",
                )
            )
        if problems:
            raise ConfigError(problems)
        return self


Config = LanguageConfig | ControlConfig


def _fisher_problems(config: LanguageConfig) -> list[tuple[str, str]]:
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


def _reward_problems(config: LanguageConfig) -> list[tuple[str, str]]:
    problems = []
    for index, reward in enumerate(config.rewards):
        if reward.kind != "function":
            continue
        if reward.dense and reward.level != "sequence":
            words = f"has no meaning with level {reward.level}, which says itself what each token is paid"
            problems.append((f"rewards.{index}.dense", words))
        if reward.memory is not None and not reward.process:
            problems.append((f"rewards.{index}.memory", "limits a process of its own, which needs process true"))
    return problems


def _critic_problems(advantage: str, critic: str) -> list[tuple[str, str]]:
    if advantage == "gae" and critic == "none":
        return [("critic.kind", "advantage.kind gae needs a critic, got none")]
    if advantage in GROUPED and critic != "none":
        return [("critic.kind", f"must be none with advantage.kind {advantage}, got {critic}")]
    return []


def discount(config: Config) -> float:
    """The discount a step; 1 for advantages of whole completions."""
    return getattr(config.advantage, "gamma", 1.0)


def _update_problems(config: Config, rows: int, group: int = 1) -> list[tuple[str, str]]:
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


def _minibatch_problems(config: Config, size: int, words: str) -> list[tuple[str, str]]:
    parts = [("critic.minibatches", config.critic), ("update.minibatches", config.update)]
    return [
        (key, f"must divide {words}, got {section.minibatches}")
        for key, section in parts
        if hasattr(section, "minibatches") and size % section.minibatches
    ]

"""What a run can be told: one frozen pydantic model a section, shared by both worlds where they share it.

The models are the single source of the keys, their defaults, their limits and the words that explain them
(`lm-trust config` prints them). `lm_trust.training.config_file` reads them from YAML and the command line.
Importing this module loads neither torch nor transformers nor gymnasium.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lm_trust.training.config_checks import ConfigError, control_problems, language_problems
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
    PositiveInt,
    ReferenceHead,
    ReturnsToGo,
    Section,
    Seed,
    Update,
    default_kind,
    with_default_minibatches,
)
from lm_trust.training.config_rewards import Rewards, RewardScaling


class Evaluation(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: only at the end")
    count: PositiveInt = Field(64, description="completions of held-out prompts, in turn; of a held-out file its first")


class ControlEvaluation(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: only at the end")
    count: PositiveInt = Field(20, description="episodes")
    videos: Count = Field(0, description="episodes of each evaluation that are filmed")


Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio"]],
    Field(default_factory=lambda: ["tensorboard"], description="where metrics also go; []: nowhere"),
]


class Checkpoint(Section):
    every: Count = Field(10, description="iterations between checkpoints; 0: only at the end")
    keep_last: PositiveInt = Field(2, description="checkpoints that are kept")


# ---- the language world


def _default_critic(validated: dict[str, Any]) -> NoCritic | ReferenceHead:
    grouped = getattr(validated.get("advantage"), "kind", None) in GROUPED
    return NoCritic() if grouped else ReferenceHead()


class LanguageConfig(Section):
    """A language run: a config with a `model` section."""

    seed: Seed = Field(0, description="of every random stream of the run")
    output: Name | None = Field(None, description="run folder; null: runs/NAME for NAME.yaml")
    iterations: PositiveInt = Field(description="rounds of rollout and update")
    model: Model
    prompts: Annotated[PromptFile | ReasoningGym, Field(discriminator="kind"), default_kind("file")]
    rollout: Rollout = Field(default_factory=Rollout)
    rewards: Rewards
    reward_scaling: RewardScaling = Field(default_factory=RewardScaling)
    reference: Reference = Field(default_factory=Reference)
    advantage: Annotated[Gae | ReturnsToGo | LeaveOneOut | GroupRelative, Field(discriminator="kind")] = Field(
        default_factory=Gae
    )
    # after `advantage`, which its default looks at, and, as `update`, after the rows that its minibatches are of
    critic: Annotated[ReferenceHead | AdapterHead | ModelHead | NoCritic, Field(discriminator="kind")] = Field(
        default_factory=_default_critic, validate_default=True
    )
    update: Update = UPDATE
    evaluation: Evaluation = Field(default_factory=Evaluation)
    completions: CompletionTable = Field(default_factory=CompletionTable)
    stop: Stop = Field(default_factory=Stop)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    trackers: Trackers

    @field_validator("critic", "update")
    @classmethod
    def _minibatches(cls, section: Any, info: ValidationInfo) -> Any:
        rollout = info.data.get("rollout")  # missing where it is wrong itself
        return section if rollout is None else with_default_minibatches(section, rollout.batch_size)

    @model_validator(mode="after")
    def _together(self, info: ValidationInfo) -> LanguageConfig:
        if not is_saved(info) and (problems := language_problems(self)):
            raise ConfigError(problems)
        return self


# ---- the control world


class Environment(Section):
    id: Name = Field(description="gymnasium's name, such as CartPole-v1")
    count: PositiveInt = Field(8, description="environments stepped side by side")
    arguments: dict[Name, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
    processes: PositiveInt = Field(1, description="that step them; 2 where a step is work and a core is free")
    backend: Literal["gymnasium", "envpool"] = Field(
        "gymnasium", description="what steps the training environments; envpool: in one process, and not every task"
    )


class Policy(Section):
    hidden: list[PositiveInt] = Field([64, 64], description="widths of the hidden layers")
    activation: Literal["tanh", "relu"] = Field("tanh", description="between the layers, the mlp critic's too")
    log_std: float = Field(0.0, description="log standard deviation at the start (continuous actions)")


class ControlRollout(Section):
    steps: PositiveInt = Field(256, description="steps an iteration of each environment")


class Normalise(Section):
    observations: bool = Field(False, description="to mean 0 and sd 1, by running statistics, then clipped to 10")
    rewards: bool = Field(False, description="by the running sd of returns, then clipped to 10; reports stay unscaled")


class ControlConfig(Section):
    """A control run: a config with an `environment` section."""

    seed: Seed = Field(0, description="of every random stream of the run")
    output: Name | None = Field(None, description="run folder; null: runs/NAME for NAME.yaml")
    total_steps: PositiveInt = Field(description="environment steps in all; with envpool a reset counts as one")
    environment: Environment
    policy: Policy = Field(default_factory=Policy)
    rollout: ControlRollout = Field(default_factory=ControlRollout)
    normalise: Normalise = Field(default_factory=Normalise)
    advantage: Annotated[Gae | ReturnsToGo, Field(discriminator="kind")] = Field(default_factory=Gae)
    # it and `update` after the rows that their minibatches are of
    critic: Annotated[Mlp | NoCritic, Field(discriminator="kind")] = Field(default_factory=Mlp, validate_default=True)
    update: Update = UPDATE
    evaluation: ControlEvaluation = Field(default_factory=ControlEvaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    trackers: Trackers

    @property
    def iterations(self) -> int:
        """Rounds of rollout and update: whole rollouts, so that the last may go beyond `total_steps`.

        With envpool a reset stands in the place of a step, so that the run takes up to one step an episode less.
        """
        return -(-self.total_steps // (self.environment.count * self.rollout.steps))

    @field_validator("critic", "update")
    @classmethod
    def _minibatches(cls, section: Any, info: ValidationInfo) -> Any:
        environment, rollout = info.data.get("environment"), info.data.get("rollout")
        if environment is None or rollout is None:  # wrong themselves
            return section
        return with_default_minibatches(section, environment.count * rollout.steps)

    @model_validator(mode="after")
    def _together(self, info: ValidationInfo) -> ControlConfig:
        if not is_saved(info) and (problems := control_problems(self)):
            raise ConfigError(problems)
        return self


def is_saved(info: ValidationInfo) -> bool:
    """Whether a run's own config is read back; see `load_config`."""
    return bool(info.context and info.context["saved"])


Config = LanguageConfig | ControlConfig

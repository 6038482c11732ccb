"""What a run can be told: one frozen pydantic model a section, shared by both worlds where they share it.

The models are the single source of the keys, their defaults, their limits and the words that explain them
(`lm-trust config` prints them). `lm_trust.training.config_file` reads them from YAML and the command line.
Importing this module loads neither torch nor transformers nor gymnasium.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lm_trust.training.config_learning import (
    GROUPED,
    UPDATE,
    Count,
    Gae,
    GroupRelative,
    LeaveOneOut,
    Mlp,
    Name,
    NoCritic,
    Positive,
    Rate,
    ReferenceHead,
    ReturnsToGo,
    Section,
    Seed,
    Update,
)

# The rewards that a config may call by a bare name; everything else is a dotted path to a function.
BUILTIN_REWARDS = ("vader",)
_REWARD_PATH = re.compile(r"(?=.*[.:])NAME(\.NAME)*(:NAME(\.NAME)*)?".replace("NAME", r"[^\W\d]\w*"))


class ConfigError(ValueError):
    """Settings that are each possible but not together: `problems` is a list of (dotted key, message)."""

    def __init__(self, problems: list[tuple[str, str]]):
        super().__init__("; ".join(f"{key}: {message}" for key, message in problems))
        self.problems = problems


def _reward_name(value: Any) -> Any:
    if isinstance(value, str) and value not in BUILTIN_REWARDS and not _REWARD_PATH.fullmatch(value):
        names = ", ".join(BUILTIN_REWARDS)
        raise ValueError(f"unknown reward {value!r}; give {names} or a function as package.module:function")
    return value


RewardName = Annotated[str, BeforeValidator(_reward_name)]


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


class Lora(Section):
    r: Positive = Field(8, description="rank of the adapter")
    alpha: Positive = Field(16, description="the adapter is scaled by alpha / r")
    targets: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="modules to adapt; null: chosen by architecture"
    )


class Model(Section):
    path: Name = Field(description="smollm2-135m, a local folder, or a hub id")
    revision: Name | None = Field(None, description="revision of a hub id")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    adapter: Name | None = Field(None, description="PEFT folder to start from")
    lora: Lora = Field(default_factory=Lora)


class Prompts(Section):
    path: Name = Field(description="JSONL, CSV or Parquet file, a dataset folder or a hub id")
    heldout: Name | None = Field(None, description="the held-out prompts, likewise; null: a share of path")
    field: Name = Field("prompt", description="field that holds the prompt")
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="share held out where heldout is null")
    max_tokens: Positive | None = Field(None, description="longest prompt allowed; null: what the model takes")


class Rollout(Section):
    batch_size: Positive = Field(64, description="completions an iteration")
    samples_per_prompt: Positive = Field(1, description="completions of one prompt, within batch_size")
    max_new_tokens: Positive = Field(20, description="length limit of a completion")
    temperature: Rate = Field(1.0, description="divides the logits, in sampling and scoring alike")
    at_limit: Literal["terminate", "bootstrap", "penalise"] = Field(
        "terminate", description="what a completion cut at the limit means"
    )
    limit_penalty: float = Field(0.0, ge=0, description="taken off its reward, with at_limit penalise")
    microbatch_size: Positive = Field(32, description="completions in one pass; changes memory only")


class Reward(Section):
    name: RewardName = Field(description="vader, or a function as package.module:function")
    weight: float = Field(1.0, description="factor in the sum of the rewards")
    dense: bool = Field(False, description="pay each token its change of the score so far")


class AdaptivePenalty(Section):
    """Steer the penalty to a reference KL (Ziegler et al. 2019); reference.penalty is where it starts."""

    target: Rate = Field(description="the reference KL to hold, nats a sequence")
    horizon: Positive = Field(description="completions over which a KL 10 % off changes the penalty by 10 %")


class Reference(Section):
    penalty: float = Field(0.0, ge=0, description="coefficient of the KL to the start, in the reward")
    loss: float = Field(0.0, ge=0, description="coefficient of the exact KL, in the objective")
    budget: Rate | None = Field(None, description="hard bound on the exact KL, nats a sequence; null: none")
    adaptive: AdaptivePenalty | None = Field(None, description="null: the penalty stays as it is")


def _default_critic(validated: dict[str, Any]) -> NoCritic | ReferenceHead:
    grouped = getattr(validated.get("advantage"), "kind", None) in GROUPED
    return NoCritic() if grouped else ReferenceHead()


class LanguageConfig(Section):
    """A language run: a config with a `model` section."""

    seed: Seed = Field(0, description="of every random stream of the run")
    output: Name | None = Field(None, description="run folder; null: runs/NAME for NAME.yaml")
    iterations: Positive = Field(description="rounds of rollout and update")
    model: Model
    prompts: Prompts
    rollout: Rollout = Field(default_factory=Rollout)
    rewards: list[Reward] = Field(min_length=1)
    reference: Reference = Field(default_factory=Reference)
    advantage: Annotated[Gae | ReturnsToGo | LeaveOneOut | GroupRelative, Field(discriminator="kind")] = Field(
        default_factory=Gae
    )
    # after `advantage`, which its default looks at
    critic: Annotated[ReferenceHead | NoCritic, Field(discriminator="kind")] = Field(default_factory=_default_critic)
    update: Update = UPDATE
    evaluation: Evaluation = Field(default_factory=Evaluation)
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
        if rollout.at_limit == "bootstrap" and kind != "gae":
            problems.append(
                ("rollout.at_limit", f"bootstrap needs advantage.kind gae, which values states, got {kind}")
            )
        if rollout.at_limit == "penalise" and not rollout.limit_penalty:
            problems.append(("rollout.limit_penalty", "must be greater than 0 with rollout.at_limit penalise"))
        if rollout.at_limit != "penalise" and rollout.limit_penalty:
            problems.append(
                (
                    "rollout.limit_penalty",
                    f"has no effect with rollout.at_limit {rollout.at_limit}; use penalise",
                )
            )
        if self.reference.adaptive is not None and not self.reference.penalty:
            problems.append(
                ("reference.penalty", "must be greater than 0 with reference.adaptive, which starts from it")
            )
        problems += _minibatch_problems(self, rollout.batch_size, f"rollout.batch_size ({rollout.batch_size})")
        if problems:
            raise ConfigError(problems)
        return self


# ---- the control world


class Environment(Section):
    id: Name = Field(description="gymnasium's name, such as CartPole-v1")
    count: Positive = Field(8, description="environments stepped side by side")
    arguments: dict[Name, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
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

    @model_validator(mode="after")
    def _together(self) -> ControlConfig:
        size = self.environment.count * self.rollout.steps
        problems = _critic_problems(self.advantage.kind, self.critic.kind)
        problems += _minibatch_problems(self, size, f"environment.count * rollout.steps ({size})")
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


def _critic_problems(advantage: str, critic: str) -> list[tuple[str, str]]:
    if advantage == "gae" and critic == "none":
        return [("critic.kind", "advantage.kind gae needs a critic, got none")]
    if advantage in GROUPED and critic != "none":
        return [("critic.kind", f"must be none with advantage.kind {advantage}, got {critic}")]
    return []


def _minibatch_problems(config: Config, size: int, words: str) -> list[tuple[str, str]]:
    parts = [("critic.minibatches", config.critic), ("update.minibatches", config.update)]
    return [
        (key, f"must divide {words}, got {section.minibatches}")
        for key, section in parts
        if hasattr(section, "minibatches") and size % section.minibatches
    ]

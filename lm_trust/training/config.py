"""What a run can be told: one frozen pydantic model a section, shared by both worlds where they share it.

The models are the single source of the keys, their defaults, their limits and the words that explain them
(`lm-trust config` prints them). `lm_trust.training.config_file` reads them from YAML and the command line.
Importing this module loads neither torch nor transformers nor gymnasium.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# The rewards that a config may call by a bare name; everything else is a dotted path to a function.
BUILTIN_REWARDS = ("vader",)
GROUPED = ("leave_one_out", "group_relative")  # estimators whose baseline is the other samples of a prompt
_REWARD_PATH = re.compile(r"(?=.*[.:])NAME(\.NAME)*(:NAME(\.NAME)*)?".replace("NAME", r"[^\W\d]\w*"))


class ConfigError(ValueError):
    """Settings that are each possible but not together: `problems` is a list of (dotted key, message)."""

    def __init__(self, problems: list[tuple[str, str]]):
        super().__init__("; ".join(f"{key}: {message}" for key, message in problems))
        self.problems = problems


def _whole(value: Any) -> Any:
    """1e6 is a float in YAML, and what people write for a number of steps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no_budget(value: Any) -> None:
    if value is not None:
        raise ValueError("a hard bound is not available yet; use reference.penalty or reference.loss")


def _reward_name(value: Any) -> Any:
    if isinstance(value, str) and value not in BUILTIN_REWARDS and not _REWARD_PATH.fullmatch(value):
        names = ", ".join(BUILTIN_REWARDS)
        raise ValueError(f"unknown reward {value!r}; give {names} or a function as package.module:function")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[Whole, Field(gt=0, le=10**12)]  # beyond it a count is a slip, and would overflow
Count = Annotated[Whole, Field(ge=0, le=10**12)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
RewardName = Annotated[str, BeforeValidator(_reward_name)]
Seed = Annotated[Whole, Field(ge=0, le=2**32 - 1)]


class Section(BaseModel):
    """A mapping of the config: unknown keys and silently converted types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# ---- advantage estimators


class Gae(Section):
    """Generalised advantage estimation."""

    kind: Literal["gae"] = "gae"
    gamma: Fraction = Field(0.99, description="discount a step; 1.0 is usual for language")
    lam: Fraction = Field(0.95, description="decay of the trace: 0 one-step, 1 Monte Carlo")
    whiten: bool = Field(True, description="shift and scale a batch's advantages to mean 0, sd 1")


class ReturnsToGo(Section):
    """Discounted returns to go, less the critic's value where there is a critic."""

    kind: Literal["returns_to_go"] = "returns_to_go"
    gamma: Fraction = Field(0.99, description="discount a step; 1.0 is usual for language")
    whiten: bool = Field(True, description="shift and scale a batch's advantages to mean 0, sd 1")


class LeaveOneOut(Section):
    """A completion's score less the mean of the other completions of its prompt."""

    kind: Literal["leave_one_out"] = "leave_one_out"
    whiten: bool = Field(True, description="shift and scale a batch's advantages to mean 0, sd 1")


class GroupRelative(Section):
    """A completion's score less the mean of all completions of its prompt."""

    kind: Literal["group_relative"] = "group_relative"
    scale: bool = Field(True, description="divide by the standard deviation within the prompt")
    whiten: bool = Field(False, description="shift and scale a batch's advantages to mean 0, sd 1")


# ---- critics


class NoCritic(Section):
    """No value function."""

    kind: Literal["none"] = "none"


class Mlp(Section):
    """A network of its own on the observations."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[Positive] = Field([64, 64], description="widths of the hidden layers")
    learning_rate: Rate = Field(1e-3, description="Adam's step size")
    epochs: Positive = Field(10, description="passes over an iteration's experience")
    minibatches: Positive = Field(4, description="parts that a pass is cut into")
    clip: Rate | None = Field(None, description="how far a value may move before its loss is clipped")


class ReferenceHead(Section):
    """A value head on the frozen reference model's hidden states: it cannot move the policy."""

    kind: Literal["reference_head"] = "reference_head"
    hidden: list[Positive] = Field([256], description="widths of the head's hidden layers")
    learning_rate: Rate = Field(1e-3, description="AdamW's step size")
    epochs: Positive = Field(4, description="passes over an iteration's experience")
    minibatches: Positive = Field(4, description="parts that a pass is cut into")
    clip: Rate | None = Field(None, description="how far a value may move before its loss is clipped")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")


# ---- update rules


class Trpo(Section):
    """Natural gradient step on the bound of the step KL, with a line search on the exact KL."""

    kind: Literal["trpo"] = "trpo"
    max_kl: float = Field(0.01, gt=0, description="bound on the mean step KL, nats a token or step")
    damping: float = Field(0.1, ge=0, description="multiple of the identity added to the Fisher matrix")
    cg_iterations: Positive = Field(10, description="most conjugate gradient iterations")
    fisher_fraction: float = Field(1.0, gt=0, le=1, description="share of the rows the Fisher is taken on")
    fisher_method: Literal["auto", "gauss_newton", "kl_hessian", "finite_difference"] = Field(
        "auto", description="how its products are computed"
    )
    backtrack_ratio: float = Field(0.8, gt=0, lt=1, description="factor on the step at each backtrack")
    max_backtracks: Count = Field(10, description="backtracks before the step is rejected")
    accept_ratio: Fraction = Field(0.0, description="least share of the predicted gain to accept a step")


class PpoClip(Section):
    """Clipped surrogate, several epochs of Adam a batch (PPO)."""

    kind: Literal["ppo_clip"] = "ppo_clip"
    clip: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped at 1 - clip ...")
    clip_high: Rate | None = Field(None, description="... and at 1 + clip_high; null: as clip")
    epochs: Positive = Field(4, description="passes over an iteration's experience")
    minibatches: Positive = Field(4, description="parts that a pass is cut into")
    learning_rate: Rate = Field(3e-4, description="Adam's step size")
    anneal: bool = Field(False, description="let the learning rate fall to 0 over the run")
    entropy: float = Field(0.0, ge=0, description="coefficient of the entropy bonus")
    max_grad_norm: Rate | None = Field(0.5, description="gradients are clipped to this norm; null: never")
    target_kl: Rate | None = Field(None, description="step KL that ends the epochs early; null: never")


Update = Annotated[Trpo | PpoClip, Field(discriminator="kind")]
UPDATE = Field(default_factory=Trpo, description="how the policy moves")


class Evaluation(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: only at the end")
    count: Positive = Field(64, description="completions of held-out prompts, in turn")


class ControlEvaluation(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: only at the end")
    count: Positive = Field(20, description="episodes")


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


class Reference(Section):
    penalty: float = Field(0.0, ge=0, description="coefficient of the KL to the start, in the reward")
    loss: float = Field(0.0, ge=0, description="coefficient of the exact KL, in the objective")
    budget: Annotated[None, BeforeValidator(_no_budget)] = Field(None, description="not available yet")


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
        problems += _minibatch_problems(self, rollout.batch_size, f"rollout.batch_size ({rollout.batch_size})")
        if problems:
            raise ConfigError(problems)
        return self


# ---- the control world


class Environment(Section):
    id: Name = Field(description="gymnasium's name, such as CartPole-v1")
    count: Positive = Field(8, description="environments stepped side by side")


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

    @model_validator(mode="after")
    def _together(self) -> ControlConfig:
        size = self.environment.count * self.rollout.steps
        problems = _critic_problems(self.advantage.kind, self.critic.kind)
        problems += _minibatch_problems(self, size, f"environment.count * rollout.steps ({size})")
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

"""The configurations of the stages before reinforcement learning: supervised fine-tuning and the reward model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lm_trust.training.config_checks import ConfigError, heldout_problems
from lm_trust.training.config_language import Lora
from lm_trust.training.config_learning import Count, Name, PositiveFloat, PositiveInt, Section, Seed


class StageModel(Section):
    path: Name = Field(description="smollm2-135m, a local folder, or a hub id")
    revision: Name | None = Field(None, description="revision of a hub id")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    lora: Lora | None = Field(default_factory=Lora, description="null: all of the model's weights are trained")
    autocast: Literal["bfloat16"] | None = Field(None, description="what the model's passes compute in; null: float32")


class StageData(Section):
    path: Name = Field(description="JSONL, CSV or Parquet file, a dataset folder or a hub id")
    subset: Name | None = Field(None, description="subset (configuration) of a dataset that has several")
    split: Name | None = Field(None, description="split of a dataset; null: its only one, or train")
    heldout: Name | None = Field(None, description="the held-out rows, likewise; null: a share of path")
    heldout_subset: Name | None = Field(None, description="subset of that dataset")
    heldout_split: Name | None = Field(None, description="split of that dataset; null: its only one, or test")
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="share held out where heldout is null")
    on_bad_row: Literal["error", "skip"] = Field("error", description="a malformed row ends the run, or is left out")


class TextData(StageData):
    """Texts to learn from, one a row."""

    field: Name | None = Field(
        None, description="field of a text or of chat messages; null: messages, prompt and completion, or text"
    )


class PairData(StageData):
    """Preferences, one a row: `chosen`, `rejected` and, if they go on from one, `prompt`; texts or chat messages."""


class StageTraining(Section):
    epochs: PositiveInt = Field(1, description="passes over the rows")
    max_steps: PositiveInt | None = Field(None, description="updates after which to stop; null: after the epochs")
    batch_size: PositiveInt = Field(16, description="rows an update")
    microbatch_size: PositiveInt | None = Field(
        None, description="rows in one pass, which changes memory, and results by rounding alone; null: batch_size"
    )
    learning_rate: PositiveFloat = Field(
        2e-4, description="AdamW's step size; without model.lora a tenth of it is usual"
    )
    scheduler: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="its course after warm-up, to 0 or constant"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the updates in which it rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    max_length: PositiveInt = Field(
        512, ge=2, description="tokens of a row; longer texts are cut, longer pairs left out"
    )


class RewardTraining(StageTraining):
    learning_rate: PositiveFloat = Field(
        1e-4, description="AdamW's step size; without model.lora a tenth of it is usual"
    )
    centre_rewards_coefficient: float = Field(
        0.0, ge=0, description="pulls a pair's rewards to mean 0; 0.01 is usual (Eisenstein et al. 2023)"
    )


class StageEvaluation(Section):
    every: Count = Field(0, description="updates between held-out evaluations; 0: before and at the end only")
    count: PositiveInt = Field(256, description="most held-out rows; of a held-out file its first")


class SftConfig(Section):
    """A supervised fine-tuning: what `lm-trust sft` reads."""

    seed: Seed = Field(0, description="of every random stream of the run")
    output: Name | None = Field(None, description="run folder; null: runs/NAME for NAME.yaml")
    model: StageModel
    data: TextData
    training: StageTraining = Field(default_factory=StageTraining)
    evaluation: StageEvaluation = Field(default_factory=StageEvaluation)

    @model_validator(mode="after")
    def _together(self) -> SftConfig:
        return _checked(self)


class RewardModelConfig(Section):
    """A reward model: what `lm-trust reward-model` reads."""

    seed: Seed = Field(0, description="of every random stream of the run")
    output: Name | None = Field(None, description="run folder; null: runs/NAME for NAME.yaml")
    model: StageModel
    data: PairData
    training: RewardTraining = Field(default_factory=RewardTraining)
    evaluation: StageEvaluation = Field(default_factory=StageEvaluation)

    @model_validator(mode="after")
    def _together(self) -> RewardModelConfig:
        return _checked(self)


StageConfig = SftConfig | RewardModelConfig


def _checked(config: StageConfig) -> StageConfig:
    if problems := heldout_problems(config.data, "data"):
        raise ConfigError(problems)
    training = config.training
    if training.batch_size % (training.microbatch_size or training.batch_size):
        raise ConfigError(
            [
                (
                    "training.microbatch_size",
                    f"must divide training.batch_size ({training.batch_size}), got {training.microbatch_size}",
                )
            ]
        )
    return config

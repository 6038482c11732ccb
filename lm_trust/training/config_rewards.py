"""The parts of a configuration that say what a completion is worth: rewards told apart by `kind`, and their scaling."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lm_trust.lm.reward_functions import BUILT_IN
from lm_trust.training.config_learning import Name, PositiveFloat, PositiveInt, Section, default_kind

_REWARD_PATH = re.compile(r"(?=.*[.:])NAME(\.NAME)*(:NAME(\.NAME)*)?".replace("NAME", r"[^\W\d]\w*"))


def _reward_name(value: Any) -> Any:
    if isinstance(value, str) and value not in BUILT_IN and not _REWARD_PATH.fullmatch(value):
        names = ", ".join(BUILT_IN)
        raise ValueError(f"unknown reward {value!r}; give {names} or a function as package.module:function")
    return value


RewardName = Annotated[str, BeforeValidator(_reward_name)]
Text = Literal["text", "completion"]


class FunctionReward(Section):
    """A Python function, or a built-in one."""

    kind: Literal["function"] = "function"
    name: RewardName = Field(description=f"{', '.join(BUILT_IN)}, or a function as package.module:function")
    weight: float = Field(1.0, description="factor in the sum of the rewards")
    dense: bool = Field(False, description="pay each token its change of the score so far")
    level: Literal["sequence", "token", "step"] = Field("sequence", description="what the function scores")
    step_delimiter: Name = Field("\n", description="ends a step of a completion, with level step")
    timeout: PositiveFloat | None = Field(None, description="seconds that one call may take; null: no limit")
    parallel: PositiveInt = Field(1, description="calls at once, each of one sample; 1: one call for all samples")
    process: bool = Field(False, description="call it in a process of its own, which may crash, hang or be ended")
    memory: PositiveInt | None = Field(None, description="MiB that process may take beside its imports; null: no limit")


class ClassifierReward(Section):
    """A sequence classifier or reward model of transformers, with its own tokenizer."""

    kind: Literal["classifier"] = "classifier"
    name: Name | None = Field(None, description="what metrics call it; null: the last part of path")
    path: Name = Field(description="a local folder (a model, or an adapter of one) or a hub id")
    revision: Name | None = Field(None, description="revision of a hub id, or of an adapter's base if it records none")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    label: Name | None = Field(None, description="the class whose score counts; null: the last one")
    output: Literal["logit", "log_probability", "probability"] = Field("logit", description="what of it")
    reads: Literal["text", "completion", "chat"] = Field(
        "text",
        description="prompt and completion, the completion alone, or both as a chat (of itself if trained so here)",
    )
    batch_size: PositiveInt = Field(32, description="texts in one pass; changes memory, and results by rounding alone")
    weight: float = Field(1.0, description="factor in the sum of the rewards")
    dense: bool = Field(False, description="pay each token its change of the score so far")


class HumanRating(Section):
    """What people would rate a text: ridge regression on sentence embeddings, fitted to ratings at the start."""

    kind: Literal["human_rating"] = "human_rating"
    name: Name | None = Field(None, description="what metrics call it; null: human_rating")
    ratings: Name | None = Field(None, description="JSONL or CSV file of text and rating; null: movie snippets")
    embedder: Name | None = Field(None, description="embedding model's folder or hub id; null: MiniLM's package")
    ridge: PositiveFloat = Field(1.0, description="strength of the regression's penalty")
    reads: Text = Field("text", description="prompt and completion, or the completion alone")
    batch_size: PositiveInt = Field(64, description="texts in one pass; changes memory, and results by rounding alone")
    weight: float = Field(1.0, description="factor in the sum of the rewards")
    dense: bool = Field(False, description="pay each token its change of the score so far")


Reward = FunctionReward | ClassifierReward | HumanRating
Rewards = Annotated[list[Annotated[Reward, Field(discriminator="kind")]], Field(min_length=1), default_kind("function")]


class RewardScaling(Section):
    """How the learner sees the weighted sum; what is reported stays as it was scored."""

    by: Literal["none", "running", "reference", "whiten"] = Field(
        "none",
        description="running: by mean and sd so far; reference: by those of the reference's completions; "
        "whiten: by the batch's sd, keeping its mean",
    )
    clip: PositiveFloat | None = Field(None, description="then clipped to this magnitude; null: not")

"""The sections of a language run's configuration that control does not have."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lm_trust.training.config_learning import Count, Name, PositiveFloat, PositiveInt, Section, Targets


class Lora(Section):
    r: PositiveInt = Field(8, description="rank of the adapter")
    alpha: PositiveInt = Field(16, description="the adapter is scaled by alpha / r")
    targets: Targets | None = Field(
        None, description="modules to adapt, or all-linear: all but the output head; null: chosen by architecture"
    )


class Model(Section):
    path: Name = Field(description="smollm2-135m, a local folder, or a hub id")
    revision: Name | None = Field(None, description="revision of a hub id")
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model, and with that of critic.path"
    )
    adapter: Name | None = Field(None, description="PEFT folder to start from")
    lora: Lora | None = Field(
        default_factory=Lora, description="of a new adapter; null: all of the model's weights are trained"
    )
    autocast: Literal["bfloat16", "float16"] | None = Field(
        None, description="what the model's passes compute in; null: float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute layers again in backward passes; costs time, saves memory"
    )


class PromptFile(Section):
    """Prompts from a file or a dataset, one a row."""

    kind: Literal["file"] = "file"
    path: Name = Field(description="JSONL, CSV or Parquet file, a dataset folder or a hub id")
    subset: Name | None = Field(None, description="subset (configuration) of a dataset that has several")
    split: Name | None = Field(None, description="split of a dataset; null: its only one, or train")
    heldout: Name | None = Field(None, description="held-out prompts, likewise; null: a share of path")
    heldout_subset: Name | None = Field(None, description="subset of that dataset")
    heldout_split: Name | None = Field(None, description="split of that dataset; null: its only one, or test")
    field: Name = Field("prompt", description="field of the prompt: a text, or a list of chat messages")
    chat: bool = Field(False, description="a text becomes a user's message in the model's chat template")
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="share held out where heldout is null")
    on_bad_row: Literal["error", "skip"] = Field("error", description="a malformed row ends the run, or is left out")
    truncate: PositiveInt | None = Field(None, description="only a text's first tokens are the prompt; null: all of it")
    max_tokens: PositiveInt | None = Field(None, description="longest prompt allowed; null: what the model takes")


class ReasoningGym(Section):
    """Problems whose answers can be checked, made by reasoning-gym; rewards receive each one's `answer`."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    task: Name = Field(description="the name of its dataset, such as chain_sum")
    arguments: dict[Name, Any] = Field(default_factory=dict, description="settings of that dataset")
    count: PositiveInt = Field(2000, description="training problems")
    heldout_count: PositiveInt = Field(256, description="held-out problems, none of them among the training ones")
    template: str = Field("{question}", description="the prompt; {question} stands for the problem")
    chat: bool = Field(True, description="the prompt becomes a user's message in the model's chat template")
    max_tokens: PositiveInt | None = Field(None, description="longest prompt allowed; null: what the model takes")


class Mismatch(Section):
    """Where an engine draws from another distribution than the policy scores: what to do about it (Yao et al. 2025)."""

    correct: bool = Field(True, description="weigh each token by its ratio policy / engine, up to the cap")
    cap: float = Field(2.0, ge=1, description="largest weight of a token")
    limit: PositiveFloat | None = Field(
        None, description="an estimated KL(engine || policy) beyond it ends the run, nats a token; null: never"
    )


class Rollout(Section):
    batch_size: PositiveInt = Field(64, description="completions an iteration")
    samples_per_prompt: PositiveInt = Field(1, description="completions of one prompt, within batch_size")
    max_new_tokens: PositiveInt = Field(20, description="length limit of a completion")
    temperature: PositiveFloat = Field(1.0, description="divides the logits, in sampling and scoring alike")
    at_limit: Literal["terminate", "bootstrap", "penalise"] = Field(
        "terminate",
        description="what a completion cut at the limit means: its end; that it would go on, so that it is paid the "
        "critic's value and no score; its end, less limit_penalty",
    )
    limit_penalty: float = Field(0.0, ge=0, description="taken off its reward, with at_limit penalise")
    microbatch_size: PositiveInt = Field(
        32, description="completions in one pass; changes memory, and results by rounding alone"
    )
    engine: Literal["generate", "continuous_batching"] = Field(
        "generate", description="what samples the completions of training; the second needs transformers 5.23"
    )
    mismatch: Mismatch = Field(default_factory=Mismatch)


class AdaptivePenalty(Section):
    """Steer the penalty to a reference KL (Ziegler et al. 2019); reference.penalty is where it starts."""

    target: PositiveFloat = Field(description="the reference KL to hold, nats a sequence")
    horizon: PositiveInt = Field(description="completions over which a KL 10 % off changes the penalty by 10 %")


class Reference(Section):
    penalty: float = Field(0.0, ge=0, description="of log(policy / reference), taken off each sampled token's reward")
    loss: float = Field(0.0, ge=0, description="of the exact KL to the reference, taken off the objective")
    budget: PositiveFloat | None = Field(None, description="hard bound on the exact KL, nats a sequence; null: none")
    adaptive: AdaptivePenalty | None = Field(None, description="null: the penalty stays as it is")


class CompletionTable(Section):
    every: Count = Field(10, description="iterations between tables of completions; 0: none")
    show: Count = Field(2, description="completions of each table that the terminal shows")


class Stop(Section):
    """End the training early; null: never for that reason."""

    reward: float | None = Field(None, description="once an iteration's mean reward is at least this")
    reference_kl: PositiveFloat | None = Field(
        None, description="once the reference KL is beyond this, nats a sequence"
    )
    entropy: PositiveFloat | None = Field(None, description="once the entropy is below this, nats a token")
    rejections: PositiveInt | None = Field(
        3, description="after so many rejected updates in a row, those with nothing to learn aside"
    )

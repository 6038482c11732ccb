"""A reward model: a sequence classifier learns which of two texts is preferred, by trl's RewardTrainer.

    lm-trust reward-model configs/lm/pipeline/reward_model.yaml

The probability that the chosen text is preferred is the sigmoid of the difference of the two rewards (Bradley and Terry
1952). The saved folder is a reward by itself: {kind: classifier, path: runs/reward_model/adapter}. It notes whether
the pairs were chats, so that the reward reads the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import binomtest
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig as RewardArguments
from trl import RewardTrainer

from lm_trust.core.seeding import stream_seed
from lm_trust.errors import UserError
from lm_trust.lm.classifier_reward import TRAINED_ON_CHATS
from lm_trust.lm.loading import attach_adapter
from lm_trust.lm.text_models import load_model
from lm_trust.stages.curve import Panel
from lm_trust.stages.data import load_pairs
from lm_trust.stages.training import heldout_outputs, prepare, quiet_libraries, run_stage, trainer_settings
from lm_trust.training.config_stages import RewardModelConfig
from lm_trust.training.progress import format_number
from lm_trust.training.run_folder import RunFolder

KEYS = {"accuracy": "accuracy", "margin": "margin", "mean_reward": "reward_mean"}
PANELS = [
    Panel("loss\n(nats per pair)", "loss"),
    Panel("accuracy", "accuracy", interval="accuracy_interval"),
    Panel("margin", "margin"),
]


def _accuracy(values: dict[str, Any]) -> str:
    low, high = map(format_number, values["accuracy_interval"])
    return f"{format_number(values['accuracy'])} [{low}, {high}]"


ROWS = [
    ("accuracy [95 % interval]", _accuracy),
    ("mean margin", lambda values: format_number(values["margin"])),
    ("loss (nats/pair)", lambda values: format_number(values["loss"])),
    ("mean reward", lambda values: format_number(values["reward_mean"])),
]


def reward_model(config: RewardModelConfig, output: Path) -> int:
    """Train a reward model as the config says, into a run folder.

    Returns:
        The exit status: 0, or 130 / 143 after a signal, with the model as it was then saved.

    Raises:
        UserError: something that the user can mend.
    """
    prepared = prepare(config, load_pairs)
    prepared.tokenizer.init_kwargs[TRAINED_ON_CHATS] = isinstance(prepared.training.rows[0]["chosen"], list)
    model = load_reward_base(config.model.path, seed=config.seed, **prepared.source)
    if config.model.lora is None:
        model.requires_grad_(True)
    else:
        model = attach_adapter(
            model,
            **config.model.lora.model_dump(),
            seed=stream_seed(config.seed, "stages.reward_adapter"),
            revision=config.model.revision,
            task_type="SEQ_CLS",
        )
    folder = RunFolder(output)
    with folder.claimed(), quiet_libraries():
        arguments = RewardArguments(
            max_length=prepared.length,
            center_rewards_coefficient=config.training.centre_rewards_coefficient or None,
            **trainer_settings(config, output),
        )
        trainer = RewardTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(prepared.training.rows),
            eval_dataset=Dataset.from_list(prepared.heldout.rows),
            processing_class=prepared.tokenizer,
        )
        # None is cut: what tells two texts apart may stand at their ends.
        prepared.check_kept(trainer, f"a text of more than {prepared.length} tokens")
        return run_stage(
            config,
            prepared,
            folder,
            trainer,
            evaluate=lambda: heldout_accuracy(trainer),
            keys=KEYS,
            panels=PANELS,
            rows=ROWS,
        )


def load_reward_base(
    path: str, *, seed: int, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model with a head of one number, in float32, frozen; the head is random and the seed's own.

    Raises:
        UserError: it cannot be loaded, or has no such head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, "stages.reward_head"))
        model, random = load_model(
            AutoModelForSequenceClassification,
            path,
            key="model.path",
            device="cuda" if torch.cuda.is_available() else "cpu",
            num_labels=1,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    wanting = [name for name in random if not name.startswith("score.")]
    if wanting:
        raise UserError(f"model.path: {path!r} holds no weights for {wanting[0]} of {type(model).__name__}")
    return model


@torch.no_grad()
def heldout_accuracy(trainer: RewardTrainer) -> dict[str, Any]:
    """How often the chosen text of a held-out pair has the higher reward, with Wilson's interval, and by how much."""
    pairs: list[Tensor] = []
    for output, _ in heldout_outputs(trainer):
        pairs.append(output.logits.double().view(2, -1).cpu())  # the collator puts the chosen texts first
    chosen, rejected = torch.cat(pairs, dim=1)
    margins = chosen - rejected
    right = int((margins > 0).sum())
    low, high = binomtest(right, len(margins)).proportion_ci(method="wilson")
    return {
        "accuracy": right / len(margins),
        "accuracy_interval": [low, high],
        "margin": margins.mean().item(),
        "loss": -nn.functional.logsigmoid(margins).mean().item(),
        "reward_mean": torch.cat([chosen, rejected]).mean().item(),
        "count": len(margins),
    }

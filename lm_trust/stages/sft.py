"""Supervised fine-tuning: a language model learns from texts, by trl's SFTTrainer.

    lm-trust sft configs/lm/pipeline/sft.yaml

A text is learnt with the end of sequence behind it; of a prompt and its completion, the completion alone; of chat
messages, the conversation as the model's template writes it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig as SFTArguments
from trl import SFTTrainer

from lm_trust.lm.loading import attach_adapter, load_base
from lm_trust.stages.curve import Panel
from lm_trust.stages.data import load_texts
from lm_trust.stages.training import heldout_outputs, prepare, quiet_libraries, run_stage, trainer_settings
from lm_trust.training.config_stages import SftConfig
from lm_trust.training.progress import format_number
from lm_trust.training.run_folder import RunFolder

KEYS = {"mean_token_accuracy": "token_accuracy"}
PANELS = [Panel("loss\n(nats per token)", "loss"), Panel("token accuracy", "token_accuracy")]
ROWS = [
    ("loss (nats/token)", lambda values: format_number(values["loss"])),
    ("perplexity", lambda values: format_number(values["perplexity"], 2)),
    ("token accuracy", lambda values: format_number(values["token_accuracy"])),
]


def sft(config: SftConfig, output: Path) -> int:
    """Fine-tune as the config says, into a run folder.

    Returns:
        The exit status: 0, or 130 / 143 after a signal, with the model as it was then saved.

    Raises:
        UserError: something that the user can mend.
    """
    prepared = prepare(config, load_texts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(config.model.path, device=device, **prepared.source)
    if config.model.lora is None:
        model.requires_grad_(True)
    else:
        lora = config.model.lora
        model = attach_adapter(model, **lora.model_dump(), seed=config.seed, revision=config.model.revision)
    folder = RunFolder(output)
    with folder.claimed(), quiet_libraries():
        trainer = SFTTrainer(
            model,
            SFTArguments(max_length=prepared.length, **trainer_settings(config, output)),
            train_dataset=Dataset.from_list(prepared.training.rows),
            eval_dataset=Dataset.from_list(prepared.heldout.rows),
            processing_class=prepared.tokenizer,
        )
        prepared.check_kept(trainer, f"a prompt of {prepared.length} tokens or more leaves no completion to learn")
        prepared.tell_cut(trainer)
        return run_stage(
            config,
            prepared,
            folder,
            trainer,
            evaluate=lambda: heldout_loss(trainer),
            keys=KEYS,
            panels=PANELS,
            rows=ROWS,
        )


@torch.no_grad()
def heldout_loss(trainer: SFTTrainer) -> dict[str, Any]:
    """The mean loss of the held-out rows' learnt tokens, in nats a token, whatever the batches; its exponential."""
    nats = right = tokens = 0.0
    for output, batch in heldout_outputs(trainer, fused_lm_head=True):
        learnt = batch["labels"][:, 1:] != -100
        nats -= output.log_probs.double()[learnt].sum().item()
        right += output.is_top1[learnt].sum().item()
        tokens += learnt.sum().item()
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": right / tokens,
        "tokens": int(tokens),
        "count": len(trainer.eval_dataset),
    }

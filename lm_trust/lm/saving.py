"""The trained policy in a run's folder, and back: a PEFT adapter, or the whole model where all weights were trained.

Both are plain: `adapter/` and `model/` load with peft and transformers alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lm_trust.errors import UserError, first_line
from lm_trust.lm.generation import eos_ids
from lm_trust.lm.loading import check_holds_adapter
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.pretrained import quiet, refuse_pickle
from lm_trust.verified_folder import replace_folder

ADAPTER, MODEL = "adapter", "model"
_CARD = "README.md"


def trained_name(policy: CausalPolicy) -> str:
    """What the policy's folder is called in a run: "adapter" or "model"."""
    return ADAPTER if isinstance(policy.model, PeftModel) else MODEL


def save_trained(policy: CausalPolicy, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write the policy into a run's folder, whole or not at all."""
    if trained_name(policy) == ADAPTER:
        save_adapter(policy, run / ADAPTER)
    else:
        generation = generation_config(tokenizer, policy)
        replace_folder(run / MODEL, lambda target: write_model(policy.model, tokenizer, generation, target))


def save_adapter(policy: CausalPolicy, folder: Path) -> None:
    """Write the trained adapter as a plain PEFT folder, whole or not at all."""

    replace_folder(folder, lambda target: write_adapter(policy.model, target))


def write_adapter(model: PeftModel, target: Path) -> None:
    """A plain PEFT folder of the adapter named default, without a card; the same adapter gives the same bytes."""
    config = model.peft_config["default"]
    if isinstance(config.target_modules, set):  # written as it stands, in an order that changes with each process
        config.target_modules = sorted(config.target_modules)
    # Never ask the hub whether the vocabulary has grown: it has not, and there may be no network.
    model.save_pretrained(target, selected_adapters=["default"], save_embedding_layers=False)
    (target / _CARD).unlink(missing_ok=True)  # peft's, a form that nobody filled in


def write_model(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, target: Path
) -> None:
    """A model folder that `from_pretrained` and `generate` take alone."""
    kept = model.generation_config
    model.generation_config = generation
    try:
        with quiet(bars=False):
            model.save_pretrained(target)
    finally:
        model.generation_config = kept
    tokenizer.save_pretrained(target)


def generation_config(tokenizer: PreTrainedTokenizerBase, policy: CausalPolicy) -> GenerationConfig:
    """Sampling from the distribution that was trained, and no other: by default transformers would bend it."""
    return GenerationConfig(
        do_sample=True,
        temperature=policy.temperature,
        top_k=0,
        top_p=1.0,
        bos_token_id=policy.causal_lm.generation_config.bos_token_id,
        eos_token_id=eos_ids(tokenizer, policy),
        pad_token_id=tokenizer.pad_token_id,
    )


def load_trained(policy: CausalPolicy, folder: Path) -> None:
    """Load what was saved in a run's adapter/ or model/ into the policy's own weights; the reference stays.

    Raises:
        UserError: the folder holds no adapter, or no model, that fits.
    """
    name = trained_name(policy)
    try:
        differing = (_load_adapter if name == ADAPTER else _load_model)(policy, folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: the {name} could not be loaded: {first_line(error)}") from error
    if differing:
        made_for = "another model or other LoRA targets" if name == ADAPTER else "another model"
        raise UserError(f"{folder}: the {name} was made for {made_for}")


def _load_adapter(policy: CausalPolicy, folder: Path) -> list[str]:
    """The names of weights that only one of the two has."""
    check_holds_adapter(folder)
    weights = load_peft_weights(str(folder), device=str(policy.device))
    result = set_peft_model_state_dict(policy.model, weights)
    # The base's own weights are always missing from an adapter.
    return [*result.unexpected_keys, *(key for key in result.missing_keys if ".default." in key)]


def _load_model(policy: CausalPolicy, folder: Path) -> list[str]:
    """The names of what only one of the two has; transformers would make up the weights that it misses."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("there is no config.json in it")
    refuse_pickle(folder, MODEL)
    # Looked at first: a class that is given another one's configuration fills it up with sizes of its own.
    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] != policy.model.config.model_type:
        return ["model_type"]
    with quiet(bars=False, reports=False):
        saved, report = type(policy.model).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, use_safetensors=True
        )
    differing = [*report["missing_keys"], *report["unexpected_keys"]]
    if not differing:
        policy.model.load_state_dict(saved.state_dict())
    return differing

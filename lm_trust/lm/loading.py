"""Loading a language model and its tokenizer, and putting a LoRA adapter on it.

A model is named by the special name `smollm2-135m`, by a local folder, or by a hub id; a local one touches no network.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from lm_trust.core.seeding import stream_seed
from lm_trust.errors import UserError
from lm_trust.lm.policy import REFERENCE_ADAPTER, CausalPolicy
from lm_trust.lm.smollm2 import smollm2_folder
from lm_trust.verified_folder import replace_folder

SMOLLM2 = "smollm2-135m"


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with left padding; where it has no pad token, the end of sequence pads.

    Raises:
        UserError: it cannot be loaded, or has no end-of-sequence token.
    """
    source, options = _source(path, revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise UserError(f"model.path: no tokenizer could be loaded from {path!r}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {path!r} has no end-of-sequence token; completions need one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The causal language model in float32, frozen and in evaluation mode.

    Raises:
        UserError: it cannot be loaded, or its head is not one linear map of the last hidden state.
    """
    source, options = _source(path, revision, trust_remote_code)
    try:
        with _quiet(bars="local_files_only" not in options):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    except Exception as error:
        raise UserError(f"model.path: no language model could be loaded from {path!r}: {_first_line(error)}") from error
    return prepare_base(model).to(device)


def prepare_base(model: nn.Module) -> nn.Module:
    """Freeze the model, put it in evaluation mode and clear generation settings that would bend its distribution.

    Raises:
        UserError: the model's logits are not its output embedding applied to its last hidden state.
    """
    model.requires_grad_(False)
    model.eval()
    generation = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=generation.eos_token_id,
        bos_token_id=generation.bos_token_id,
        pad_token_id=generation.pad_token_id,
    )
    _check_head(model)
    return model


def attach_adapter(
    base: nn.Module, *, r: int = 8, alpha: int = 16, targets: list[str] | None = None, seed: int = 0
) -> PeftModel:
    """Put a fresh LoRA adapter on the base (Hu et al. 2021): B starts at zero, so the policy starts as the base.

    Args:
        base: frozen model.
        r, alpha: rank and scale.
        targets: module names; None lets peft choose by architecture (attention's query and value projections).
        seed: of the initial A matrices; the caller's generators are left as they were.

    Raises:
        UserError: the targets do not exist or include the output head, or peft knows none for this architecture.
    """
    conv1d = any(isinstance(module, Conv1D) for module in base.modules())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=0.0,
        fan_in_fan_out=conv1d,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, "lm.adapter"))
        try:
            with _quiet():
                model = get_peft_model(base, config)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {_first_line(error)}") from error
    if _changes_head(model):
        raise UserError(
            f"model.lora.targets: {', '.join(targets or [])} includes the output head, which must stay frozen"
        )
    return model


def load_adapter(base: nn.Module, folder: str | Path, *, keep_reference: bool = True) -> PeftModel:
    """Start from a saved PEFT adapter, with a frozen copy of it as the reference.

    Args:
        base: frozen model.
        folder: a plain PEFT adapter.
        keep_reference: load the frozen copy as well; without it the reference is the base.

    Raises:
        UserError: the folder holds no adapter that fits the base.
    """
    try:
        if Path(folder).is_dir():
            _check_holds_adapter(Path(folder))
        with _quiet():
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        if keep_reference:
            model.load_adapter(str(folder), REFERENCE_ADAPTER, is_trainable=False)
            model.set_adapter("default")
    except Exception as error:
        raise UserError(f"adapter {str(folder)!r} could not be loaded: {_first_line(error)}") from error
    if _changes_head(model):
        raise UserError(f"adapter {str(folder)!r} changes the output head, which must stay frozen")
    return model


def load_policy(
    path: str,
    *,
    adapter: str | Path | None = None,
    r: int = 8,
    alpha: int = 16,
    targets: list[str] | None = None,
    temperature: float = 1.0,
    microbatch_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CausalPolicy:
    """Base model, adapter (fresh, or from a folder) and reference as one policy; see the functions above."""
    base = load_base(path, revision=revision, trust_remote_code=trust_remote_code, device=device)
    model = (
        attach_adapter(base, r=r, alpha=alpha, targets=targets, seed=seed)
        if adapter is None
        else load_adapter(base, adapter)
    )
    return CausalPolicy(model, temperature, microbatch_size)


def context_length(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """Positions that the model has, read from its configuration alone; None where it sets no limit.

    Raises:
        UserError: the configuration cannot be loaded.
    """
    source, options = _source(path, revision, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:
        raise UserError(f"model.path: no model configuration in {path!r}: {_first_line(error)}") from error
    return getattr(config, "max_position_embeddings", None)


def save_adapter(policy: CausalPolicy, folder: Path) -> None:
    """Write the trained adapter as a plain PEFT folder, whole or not at all."""

    def build(target: Path) -> None:
        # Never ask the hub whether the vocabulary has grown: it has not, and there may be no network.
        policy.model.save_pretrained(target, selected_adapters=["default"], save_embedding_layers=False)

    replace_folder(folder, build)


def load_trained(policy: CausalPolicy, folder: Path) -> None:
    """Load a saved adapter's weights into the policy's own adapter; the reference stays.

    Raises:
        UserError: the folder holds no adapter that fits.
    """
    try:
        _check_holds_adapter(folder)
        weights = load_peft_weights(str(folder), device=str(policy.device))
        result = set_peft_model_state_dict(policy.model, weights)
    except Exception as error:
        raise UserError(f"{folder}: the adapter could not be loaded: {_first_line(error)}") from error
    # The base's own weights are always missing from an adapter.
    missing = [key for key in result.missing_keys if ".default." in key]
    if result.unexpected_keys or missing:
        raise UserError(f"{folder}: the adapter was made for another model or other LoRA targets")


def _source(path: str, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: a folder, with the network ruled out, or a hub id."""
    folder = smollm2_folder() if path == SMOLLM2 else Path(path).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True, "trust_remote_code": trust_remote_code}
    return path, {"revision": revision or "main", "trust_remote_code": trust_remote_code}


@contextmanager
def _quiet(*, bars: bool = True) -> Iterator[None]:
    """Keep off the terminal that peft asks transformers by an old name and, without `bars`, transformers' own bars."""
    hidden = not bars and transformers_logging.is_progress_bar_enabled()
    if hidden:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        if hidden:
            transformers_logging.enable_progress_bar()


@torch.no_grad()
def _check_head(model: nn.Module) -> None:
    """Scores are computed from hidden states through the output embedding; see that this is what the model does."""
    ids = torch.arange(1, 5, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    head = model.get_output_embeddings()
    if head is not None:
        seen: dict[str, torch.Tensor] = {}

        def replace(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            # Large logits in place of the head's own: a cap or a scale shows, however small the weights are.
            seen["states"], seen["output"] = given[0], output
            seen["logits"] = torch.linspace(-1e3, 1e3, output.numel(), device=output.device).view_as(output)
            return seen["logits"]

        handle = head.register_forward_hook(replace)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
        states = model.base_model(**inputs).last_hidden_state
        linear = nn.functional.linear(states, head.weight, getattr(head, "bias", None))
        if (
            torch.allclose(logits, seen["logits"])
            and torch.allclose(states, seen["states"], atol=1e-3, rtol=1e-3)
            and torch.allclose(linear, seen["output"], atol=1e-3, rtol=1e-3)
        ):
            return
    raise UserError(
        f"model.path: {type(model).__name__} transforms its logits after the output embedding; "
        "exact scores need a plain linear head (GPT-2, GPT-NeoX, OPT, Llama, Qwen and their like)"
    )


def _check_holds_adapter(folder: Path) -> None:
    """Look before peft does, which asks the hub for a local folder that is not there."""
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"there is no {CONFIG_NAME} in it")


def _changes_head(model: PeftModel) -> bool:
    """Whether an adapter sits on the output embedding: scores go through its frozen weight and would pass it by."""
    head = model.get_base_model().get_output_embeddings()
    return isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

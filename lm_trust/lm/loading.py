"""Loading a language model and its tokenizer, and making a policy of it: with a LoRA adapter on it, or all of it.

A model is named by the special name `smollm2-135m`, by a local folder, or by a hub id; a local one touches no network.
"""

from __future__ import annotations

import math
from pathlib import Path

import huggingface_hub
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lm_trust.core.seeding import stream_seed
from lm_trust.errors import UserError, first_line
from lm_trust.lm.architecture_check import check_architecture
from lm_trust.lm.checkpointing import checkpoint_layers
from lm_trust.lm.policy import REFERENCE_ADAPTER, CausalPolicy
from lm_trust.lm.pretrained import described, quiet, refuse_pickle, source_of
from lm_trust.lm.sharding import shard
from lm_trust.lm.text_models import load_model, positions_of, require_vocabulary

ALL_LINEAR = "all-linear"  # peft's word for them


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with left padding.

    Where it has no pad token, or one that the model has no embedding of, the end of sequence pads.

    Raises:
        UserError: it cannot be loaded, has no vocabulary, or no end-of-sequence token that the model knows.
    """
    source, options = source_of(path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise UserError(
            f"model.path: no tokenizer could be loaded from {described(path)}: {first_line(error)}"
        ) from error
    require_vocabulary(tokenizer, path, key="model.path")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {path!r} has no end-of-sequence token; completions need one")
    known = vocabulary_size(load_text_config(path, revision=revision, trust_remote_code=trust_remote_code))
    size = math.inf if known is None else known
    if tokenizer.eos_token_id >= size:
        raise UserError(
            f"model.path: the tokenizer of {path!r} ends a sequence by token {tokenizer.eos_token_id}, and the model "
            f"has {size} embeddings; resize them, or give the tokenizer that the model was trained with"
        )
    # What pads is masked, and its embedding is looked up all the same.
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
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
        UserError: it cannot be loaded, its weights are in a pickle file, or `prepare_base` refuses it.
    """
    model, lacking = load_model(
        AutoModelForCausalLM,
        path,
        key="model.path",
        device="cpu",
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if lacking:
        raise UserError(f"model.path: {path!r} lacks weights of the model, {lacking[0]} for one; they would be random")
    return prepare_base(model).to(device)


def prepare_base(model: nn.Module) -> nn.Module:
    """Freeze the model, put it in evaluation mode and clear generation settings that would bend its distribution.

    Raises:
        UserError: the model's logits are not its output embedding applied to its last hidden state, that state of a
            token changes with left padding or later tokens, or the model cannot be run that way.
    """
    model.requires_grad_(False)
    model.eval()
    generation = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=generation.eos_token_id,
        bos_token_id=generation.bos_token_id,
        pad_token_id=generation.pad_token_id,
    )
    check_architecture(model)
    return model


def attach_adapter(
    base: nn.Module,
    *,
    r: int = 8,
    alpha: int = 16,
    targets: list[str] | None = None,
    seed: int = 0,
    name: str = "default",
    revision: str | None = None,
    task_type: str = "CAUSAL_LM",
) -> PeftModel:
    """Put a fresh LoRA adapter on the base (Hu et al. 2021): B starts at zero, so the policy starts as the base.

    Args:
        base: frozen model; or a PEFT model, which gets one adapter more and goes on with the one it had.
        r, alpha: rank and scale.
        targets: module names, or `ALL_LINEAR` alone: every linear layer but the output head; None lets peft choose by
            architecture (attention's query and value projections).
        seed: of the initial A matrices; the caller's generators are left as they were.
        name: the adapter's.
        revision: of the base, which the adapter records.
        task_type: peft's; for "SEQ_CLS" it trains and saves the classification head whole.

    Raises:
        UserError: the targets do not exist or include the output head, or peft knows none for this architecture.
    """
    if targets != [ALL_LINEAR]:
        _require_modules(base, targets or [])
    conv1d = any(isinstance(module, Conv1D) for module in base.modules())
    config = LoraConfig(
        task_type=task_type,
        r=r,
        lora_alpha=alpha,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        lora_dropout=0.0,
        fan_in_fan_out=conv1d,
        revision=revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, "lm.adapter"))
        try:
            with quiet():
                if isinstance(base, PeftModel):
                    model = base
                    model.add_adapter(name, config)
                else:
                    model = get_peft_model(base, config, adapter_name=name)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {first_line(error)} ({_linear_layers(base)})") from error
    if _changes_head(model):
        raise UserError(
            f"model.lora.targets: {', '.join(targets or [])} includes the output head, which must stay frozen"
        )
    return model


def _require_modules(base: nn.Module, targets: list[str]) -> None:
    """See that each target is there: peft speaks up only where none of them is."""
    names = [name for name, _ in base.named_modules()]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise UserError(f"model.lora.targets: the model has no module {target!r} ({_linear_layers(base)})")


def _linear_layers(base: nn.Module) -> str:
    """The different names of its linear layers, without where they lie, in words."""
    linear = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return f"its linear layers: {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"


def load_adapter(base: nn.Module, folder: str | Path, *, keep_reference: bool = True) -> PeftModel:
    """Start from a saved PEFT adapter, with a frozen copy of it as the reference.

    Args:
        base: frozen model.
        folder: a plain PEFT adapter.
        keep_reference: load the frozen copy as well; without it the reference is the base.

    Raises:
        UserError: the folder holds no adapter that fits the base, one that does not act inside its layers alone, or one
            that changes the base's own weights.
    """
    made_for = ""
    try:
        local = str(adapter_folder(folder))
        config = PeftConfig.from_pretrained(local)
        made_for = f", made for {config.base_model_name_or_path}," if config.base_model_name_or_path else ""
        if _changes_base(config):
            raise UserError(
                f"adapter {str(folder)!r} changes the base's own weights as it is loaded, as PiSSA, OLoRA, CorDA, "
                "LoftQ, LoRA-GA and KaSA do; give a plain LoRA (peft: path_initial_model_for_weight_conversion)"
            )
        if _acts_elsewhere(config):
            raise UserError(
                f"adapter {str(folder)!r} acts elsewhere than in the model's own layers, as aLoRA, layer_replication "
                "and adaption prompts do; give a plain LoRA"
            )
        # New weights are drawn before they are loaded.
        with quiet(), torch.random.fork_rng(devices=[]):
            model = PeftModel.from_pretrained(base, local, is_trainable=True)
            if keep_reference:
                model.load_adapter(local, REFERENCE_ADAPTER, is_trainable=False)
                model.set_adapter("default")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"adapter {str(folder)!r}{made_for} could not be loaded: {first_line(error)}") from error
    if _changes_head(model):
        raise UserError(f"adapter {str(folder)!r} changes the output head, which must stay frozen")
    return model


def load_policy(
    path: str,
    *,
    adapter: str | Path | None = None,
    r: int | None = 8,
    alpha: int = 16,
    targets: list[str] | None = None,
    temperature: float = 1.0,
    microbatch_size: int | None = None,
    autocast: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    gradient_checkpointing: bool = False,
    sharding: FullyShardedDataParallelPlugin | None = None,
) -> CausalPolicy:
    """Base model, adapter (fresh, or from a folder) and reference as one policy; see the functions above.

    Without an adapter to start from and with r None all of the model's weights are trained. `autocast` is the name of
    the dtype that `CausalPolicy` takes. With `sharding`, accelerate's settings, the frozen weights are spread over the
    processes; the model is loaded on the CPU then, so that no card has to hold all of it.
    """
    first_device = device if sharding is None else "cpu"
    model = load_base(path, revision=revision, trust_remote_code=trust_remote_code, device=first_device)
    if adapter is not None:
        model = load_adapter(model, adapter)
    elif r is not None:
        model = attach_adapter(model, r=r, alpha=alpha, targets=targets, seed=seed, revision=revision)
    else:
        model.requires_grad_(True)
    policy = CausalPolicy(
        model, temperature, microbatch_size, autocast=None if autocast is None else getattr(torch, autocast)
    )
    if gradient_checkpointing:
        checkpoint_layers(policy.causal_lm)
    if sharding is not None:
        shard(policy, sharding, device)
    return policy


def load_text_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The language model's configuration, which a multimodal one holds inside; the model is not loaded.

    Raises:
        UserError: it cannot be loaded.
    """
    source, options = source_of(path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(source, **options).get_text_config()
    except Exception as error:
        raise UserError(f"model.path: no model configuration in {path!r}: {first_line(error)}") from error


def sampling_length(config: PreTrainedConfig) -> int | None:
    """Positions up to which a text model is one distribution; None: no limit.

    Beyond the original ones longrope (Phi-3's) turns every position of a pass by other frequencies, as soon as the
    pass's longest row is there. Tokens would be drawn by some and scored by others, and rows depend on their batch.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return original or positions_of(config)


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """Tokens that a text model has an embedding of, ids from 0; None where its configuration does not say."""
    return getattr(config, "vocab_size", None)


def adapter_folder(path: str | Path) -> Path:
    """Where an adapter lies: the folder itself, or what a hub id's repository holds of one, and no pickle of it.

    Raises:
        UserError: its weights are in a pickle file.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) > 2:  # no id of a repository
            raise FileNotFoundError("there is no such folder")
        wanted = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
        folder = Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted))
    check_holds_adapter(folder)
    return folder


def check_holds_adapter(folder: Path) -> None:
    """Look before peft does, which asks the hub for a local folder that is not there, and would read a pickle.

    Raises:
        UserError: its weights are in a pickle file.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"there is no {CONFIG_NAME} in it")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        refuse_pickle(folder, "adapter")
        raise FileNotFoundError(f"there is no {SAFETENSORS_WEIGHTS_NAME} in it")


def wrapped_by_adapter(module: nn.Module) -> bool:
    """Whether an adapter, or a trained copy that is saved with one, changes what the module computes."""
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _changes_head(model: PeftModel) -> bool:
    """Whether an adapter sits on the output embedding: scores go through its frozen weight and would pass it by."""
    return wrapped_by_adapter(model.get_base_model().get_output_embeddings())


def _changes_base(config: PeftConfig) -> bool:
    """Whether the base is another model once the adapter is there, and yet another one with a second copy of it."""
    initialised = getattr(config, "init_lora_weights", True)
    named = isinstance(initialised, str) and initialised.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    return named or getattr(config, "kasa_config", None) is not None


def _acts_elsewhere(config: PeftConfig) -> bool:
    """Whether an adapter also acts around the model or on which layers it has: a policy computes with the model itself.

    Such an adapter would be left out in part, or make the start another policy than the reference.
    """
    settings = ("alora_invocation_tokens", "layer_replication")
    return config.peft_type == PeftType.ADAPTION_PROMPT or any(getattr(config, name, None) for name in settings)

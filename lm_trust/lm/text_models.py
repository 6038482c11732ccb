"""Models that read whole texts, each with its own tokenizer: what the rewards that are models have in common.

A completion reaches such a model as text and is tokenised anew: its vocabulary need not be the policy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from lm_trust.errors import UserError, first_line
from lm_trust.lm.pretrained import as_uploaded, described, quiet, refuse_pickle, refuse_pickle_of_hub, source_of


@dataclass(frozen=True)
class TextModel:
    """A frozen model in evaluation mode and float32, and how texts become its input.

    Attributes:
        model: called with input_ids and attention_mask, (n, T) each, padded on the right.
        tokenizer: its own.
        pad_id: fills up the shorter rows.
        context: tokens that it can read; of a longer text it reads the end. None: no limit.
        end: tokens put behind every text.
        special_tokens: whether the tokenizer adds those that it sets by itself.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    context: int | None
    end: tuple[int, ...] = ()
    special_tokens: bool = True

    @torch.no_grad()
    def run(self, texts: Sequence[str], batch_size: int, read: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """What `read` takes of the model's output for each of N texts, whatever the batches.

        Args:
            texts: N texts.
            batch_size: texts in one pass; the passes are of texts of like length.
            read: (output, attention_mask (n, T) bool) to (n, K).

        Returns:
            (N, K) float32 on the CPU, in the order of the texts; N must not be 0.
        """
        rows = self.token_ids(texts)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        device = next(self.model.parameters()).device
        parts = []
        for start in range(0, len(order), batch_size):
            batch = [torch.tensor(rows[index]) for index in order[start : start + batch_size]]
            ids = pad_sequence(batch, batch_first=True, padding_value=self.pad_id).to(device)
            # From the lengths: a text may hold the pad token, which is the end of sequence for many.
            lengths = torch.tensor([len(row) for row in batch], device=device)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            with torch.autocast(device.type, enabled=False):
                output = self.model(input_ids=ids, attention_mask=mask.long())
                parts.append(read(output, mask).float().cpu())
        placed = torch.cat(parts)
        return torch.empty_like(placed).index_copy_(0, torch.tensor(order), placed)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, at least one: the last that the context holds, and its special tokens."""
        room = None if self.context is None else self.context - len(self.end)
        cut = {"truncation": room is not None, "max_length": room, "add_special_tokens": self.special_tokens}
        rows = self.tokenizer(list(texts), **cut, verbose=False)["input_ids"]
        # The empty text has no token where the tokenizer adds none, and a model cannot read nothing.
        return [[*row, *self.end] or [self.pad_id] for row in rows]


def load_model(
    auto: Any,
    path: str,
    *,
    key: str,
    device: torch.device | str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[nn.Module, list[str]]:
    """A pretrained model in float32, frozen and in evaluation mode, and the names of its weights that are random.

    Args:
        auto: transformers' class that loads it, such as AutoModel.
        path: a folder or hub id.
        key: what errors name.
        settings: what the model's configuration is to say otherwise.

    Returns:
        The model, and the weights that its files lack or have in another size; what that means the caller knows.

    Raises:
        UserError: it cannot be loaded.
    """
    source, place = source_of(path, revision=revision, trust_remote_code=trust_remote_code)
    local = "local_files_only" in place
    if local:
        refuse_pickle(Path(source), key)
    else:
        refuse_pickle_of_hub(source, place["revision"], key)
    settings |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    settings["use_safetensors"] = True
    try:
        # The caller's generator stays as it was: what the files lack is drawn at random.
        with quiet(bars=not local, reports=False), as_uploaded(), torch.random.fork_rng(devices=[]):
            model, info = auto.from_pretrained(source, **place, **settings)
    except Exception as error:
        if not local and "`use_safetensors" in str(error):
            raise UserError(
                f"{key}: {path!r} holds no weights in safetensors, and a pickle file may run code when it is read; "
                "convert them (save_pretrained does it)"
            ) from error
        raise UserError(f"{key}: no model could be loaded from {described(path)}: {first_line(error)}") from error
    lacking = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    _fuse_activations(model)
    return model.requires_grad_(False).eval().to(device), sorted(lacking)


def _fuse_activations(model: nn.Module) -> None:
    """Have GPT-2's activation, where a model has it, computed by the one kernel that torch has for it.

    In transformers it is written out as eight operations on the widest tensor of a layer: the same numbers to float32's
    rounding, in three times the time, and with more to keep for a gradient.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def with_tokenizer(
    model: nn.Module,
    path: str,
    *,
    key: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TextModel:
    """The model with the tokenizer that lies beside it.

    Where the tokenizer has no pad token that the model has an embedding of, the end of sequence pads.

    Raises:
        UserError: the tokenizer cannot be loaded, has no vocabulary, or no token to pad with.
    """
    source, place = source_of(path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **place)
    except Exception as error:
        raise UserError(f"{key}: no tokenizer could be loaded from {described(path)}: {first_line(error)}") from error
    require_vocabulary(tokenizer, path, key=key)
    config = model.config.get_text_config()
    choices = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id)
    size = getattr(config, "vocab_size", math.inf)  # a few models take characters
    pad_id = next((choice for choice in choices if choice is not None and choice < size), None)
    if pad_id is None:
        raise UserError(f"{key}: {path!r} has neither a pad nor an end-of-sequence token of its model to pad with")
    # A model that takes its score at the last token finds it as the last that is not this one.
    config.pad_token_id = pad_id
    # What is to be judged stands at the end of a text, behind its prompt.
    tokenizer.truncation_side = "left"
    return TextModel(model, tokenizer, pad_id, context_of(model, tokenizer))


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str, *, key: str) -> None:
    """See that a tokenizer is not what transformers makes of a folder without its files: one that knows no word.

    Raises:
        UserError: it is; names `key`.
    """
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
        raise UserError(f"{key}: {path!r} holds no tokenizer; put the model's own beside it")


def positions_of(config: PreTrainedConfig) -> int | None:
    """Positions that a text model has; None where its configuration sets no limit."""
    # MPT's name is the second.
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0
    return positions if positions > 0 else None  # XLNet's -1 is no limit


def context_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that the model can read; None where neither it nor its tokenizer sets a limit."""
    limits = [tokenizer.model_max_length]  # an astronomic number where it is not set
    if positions := positions_of(model.config.get_text_config()):
        limits.append(positions)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            # RoBERTa and its like count positions from behind the pad token's number.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits) if min(limits) < 10**9 else None

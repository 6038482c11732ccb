"""The causal language model as a policy: states are token prefixes, actions are next tokens.

One module holds the trainable policy and its frozen reference, which is the policy that training starts from. With a
LoRA adapter that is the base with the adapter off, or, when training starts from an adapter, a frozen copy of that
adapter; base weights never change. Without one all weights are trained, and the reference is a frozen copy of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_trust.core.passes import passes
from lm_trust.lm.half_precision import in_full_precision, last_hidden_states
from lm_trust.lm.host_memory import give_back_free_memory
from lm_trust.lm.vocabulary_head import VocabularyCategorical

REFERENCE_ADAPTER = "reference"


@dataclass(frozen=True)
class TokenObservations:
    """The states of B sequences: left-padded prompts of common width, followed by T completion tokens.

    The state at step t is the prompt and the first t completion tokens; its position is prompt_width - 1 + t.

    Attributes:
        input_ids: (B, prompt_width + T).
        attention_mask: (B, prompt_width + T) bool, from lengths and never from token ids.
        prompt_width: columns that the prompts take.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_width: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Any) -> TokenObservations:
        return TokenObservations(self.input_ids[rows], self.attention_mask[rows], self.prompt_width)

    def one_row(self) -> TokenObservations:
        """A row of the same widths that stands for nothing."""
        ids = self.input_ids.new_zeros(1, self.input_ids.shape[1])
        return TokenObservations(ids, torch.ones_like(ids, dtype=torch.bool), self.prompt_width)

    @property
    def position_ids(self) -> Tensor:
        """(B, prompt_width + T) positions that count real tokens only, so that padding changes nothing."""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp_min(0)


class CausalPolicy(nn.Module):
    """A causal language model with `distribution(observations)`.

    It is put in evaluation mode for good: dropout would make the scored distribution another one.

    Args:
        model: a PEFT model, whose adapter named "default" is trained, with one named "reference" for the reference if
            there is one; or a transformers model, all of whose weights are trained, and which is copied here.
        temperature: of sampling and of every score, policy and reference alike.
        microbatch_size: rows in one pass where no graph is wanted; None takes all. Changes memory, not the result.
        autocast: what the model computes in up to its last hidden state, in sampling and scoring alike; what comes
            after is in the weights' own precision. None: all of it is.

    Attributes:
        sharded: whether the frozen weights are spread over the processes; see `lm_trust.core.passes`.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        temperature: float = 1.0,
        microbatch_size: int | None = None,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.start = None if isinstance(model, PeftModel) else copy.deepcopy(model).requires_grad_(False)
        self.temperature = temperature
        self.microbatch_size = microbatch_size
        self.autocast = autocast
        self.sharded = False
        self._at_start = False
        if autocast is not None:
            for causal_lm in filter(None, (self.causal_lm, self.start)):
                in_full_precision(causal_lm.get_output_embeddings())
        self.eval()

    def train(self, mode: bool = True) -> CausalPolicy:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model that computes now, its adapted layers inside."""
        if self.start is None:
            return self.model.get_base_model()
        return self.start if self._at_start else self.model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def distribution(self, observations: TokenObservations) -> VocabularyCategorical:
        """The distribution over the next token at every step, (B, T) categoricals over V."""
        return self.head(self.step_states(observations))

    def hidden_states(self, observations: TokenObservations) -> Tensor:
        """(B, prompt_width + T, H) last hidden states, after the final norm."""
        if not len(observations):  # the layers want a row; the pass is made for the other processes' sake
            return self.hidden_states(observations.one_row())[:0]
        if torch.is_grad_enabled() and self.device.type == "cpu":
            give_back_free_memory()
        trunk = self.causal_lm.base_model
        inputs = {
            "input_ids": observations.input_ids,
            "attention_mask": observations.attention_mask.long(),
            "position_ids": observations.position_ids,
            "use_cache": False,
        }
        if self.autocast is None:
            return trunk(**inputs).last_hidden_state
        return last_hidden_states(trunk, self.autocast, inputs)

    def generating(self) -> torch.autocast:
        """The context for `causal_lm.generate`, in which it computes the hidden states as scoring does."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def step_states(self, observations: TokenObservations, *, final: bool = False) -> Tensor:
        """Hidden states from which each token was drawn, (B, T, H); with `final` also the last state's, (B, T + 1, H).

        Where no graph is wanted, a microbatch of rows is computed at a time.
        """
        size = None if torch.is_grad_enabled() else self.microbatch_size
        first, last = observations.prompt_width - 1, None if final else -1
        chunks = passes(self, len(observations), size)
        parts = [
            self.hidden_states(observations if len(chunks) == 1 else observations[rows])[:, first:last]
            for rows in chunks
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def head(self, hidden: Tensor) -> VocabularyCategorical:
        """The distribution over the vocabulary at hidden states (..., H)."""
        output = self.causal_lm.get_output_embeddings()
        return VocabularyCategorical(hidden, output.weight, getattr(output, "bias", None), self.temperature)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within the context the module computes the reference policy."""
        if self.reference_is_base:
            with self.as_base():
                yield
            return
        self.model.base_model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        try:
            yield
        finally:
            self.model.base_model.set_adapter("default")

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Within the context the module computes the untouched base model."""
        if self.start is None:
            with self.model.disable_adapter():
                yield
            return
        self._at_start = True
        try:
            yield
        finally:
            self._at_start = False

    @property
    def reference_is_base(self) -> bool:
        """Whether training started from the base model, so that reference and base are one."""
        return self.start is not None or REFERENCE_ADAPTER not in self.model.peft_config

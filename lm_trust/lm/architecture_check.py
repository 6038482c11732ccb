"""Whether a language model computes as a policy needs it: a plain head, and states of the past alone, cached or not.

Scores are computed from hidden states through the output embedding, of prompts padded on the left. A model of another
kind would be drawn from by one distribution and scored by another.
"""

from __future__ import annotations

import torch
from torch import nn

from lm_trust.errors import UserError, first_line


@torch.no_grad()
def check_architecture(model: nn.Module) -> None:
    """See on a few tokens that the model's computation is what sampling and scoring take for granted.

    Raises:
        UserError: it is not, or the model cannot be run that way; names the class.
    """
    name = type(model).__name__
    ids = torch.arange(1, 5, device=model.device).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        states = model.base_model(**inputs).last_hidden_state
        plain, causal = _has_plain_head(model, inputs, states), _sees_the_past_alone(model, ids, states)
        cached = _finds_it_in_its_cache(model, inputs, states)
    except Exception as error:
        raise UserError(f"model.path: {name} cannot be run as a policy: {first_line(error)}") from error
    if not plain:
        raise UserError(
            f"model.path: {name} transforms its logits after the output embedding; "
            "exact scores need a plain linear head (GPT-2, GPT-NeoX, OPT, Llama, Qwen and their like)"
        )
    if not causal:
        raise UserError(
            f"model.path: {name} computes another state for a token where padding stands before it or a token behind "
            "it; prompts of different lengths need a causal model that takes an attention mask and position ids"
        )
    if not cached:
        raise UserError(
            f"model.path: {name} computes another state for a token from its cache than without one; it would be drawn "
            "from by one distribution and scored by another"
        )


def _has_plain_head(model: nn.Module, inputs: dict[str, torch.Tensor], states: torch.Tensor) -> bool:
    """Whether logits are the output embedding applied to the last hidden states, which scores are computed by."""
    head = model.get_output_embeddings()
    if head is None:
        return False
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
    linear = nn.functional.linear(states, head.weight, getattr(head, "bias", None))
    return (
        torch.allclose(logits, seen["logits"])
        and torch.allclose(states, seen["states"], atol=1e-3, rtol=1e-3)
        and torch.allclose(linear, seen["output"], atol=1e-3, rtol=1e-3)
    )


def _sees_the_past_alone(model: nn.Module, ids: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether the tokens (1, T) keep their states (1, T, H) with a padded column before them and a token behind."""
    row = torch.cat([ids[:, -1:], ids, ids[:, :1]], 1)
    mask = torch.ones_like(row)
    mask[:, 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    among = model.base_model(input_ids=row, attention_mask=mask, position_ids=positions, use_cache=False)
    return _same(among.last_hidden_state[:, 1:-1], states)


def _finds_it_in_its_cache(model: nn.Module, inputs: dict[str, torch.Tensor], states: torch.Tensor) -> bool:
    """Whether the last of T tokens has its state (1, T, H) also where those before it are cached, if they can be."""
    ids = inputs["input_ids"]
    before = model.base_model(input_ids=ids[:, :-1], attention_mask=inputs["attention_mask"][:, :-1], use_cache=True)
    cache = getattr(before, "past_key_values", None)
    if cache is None:
        return True
    last = model.base_model(input_ids=ids[:, -1:], attention_mask=inputs["attention_mask"], past_key_values=cache)
    return _same(last.last_hidden_state, states[:, -1:])


def _same(states: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether states (..., H) are equal but for rounding; a position or a token too many is far above that."""
    tolerance = torch.finfo(others.dtype).eps ** 0.5
    return bool(((states - others).norm(dim=-1) <= tolerance * others.norm(dim=-1)).all())

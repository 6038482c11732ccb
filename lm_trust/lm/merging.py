"""Plain merged weights from a run's adapter, which `from_pretrained` and `generate` take alone."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from torch import nn

from lm_trust.errors import UserError, first_line
from lm_trust.lm.loading import check_holds_adapter, load_adapter, load_base, load_tokenizer, wrapped_by_adapter
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.saving import generation_config, write_model
from lm_trust.verified_folder import replace_folder


def check_free(output: Path) -> None:
    """A folder that holds something is never written over.

    Raises:
        UserError: the output is such a folder, or a file.
    """
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty; choose another folder, or remove it first")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; give a folder")


def merge_adapter(
    path: str,
    adapter: Path,
    output: Path,
    *,
    temperature: float = 1.0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the base model with the adapter's weights added into its own, its tokenizer and how to sample from it.

    Args:
        path: the base model, as for `load_base`.
        adapter: a trained adapter; it holds all that training changed, also where training started from another one.
        output: a folder that does not exist or is empty; it is whole or not there.
        temperature: that the policy samples at.

    Raises:
        UserError: the output is not free, cannot be written, the model or the adapter cannot be loaded, or the adapter
            cannot be merged, as one whose weights are not finite.
    """
    check_free(output)
    try:
        check_holds_adapter(adapter)
    except FileNotFoundError as error:
        raise UserError(f"{adapter}: the run has no adapter yet ({error})") from error
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(path, **source)
    model = load_adapter(load_base(path, **source), adapter, keep_reference=False)
    generation = generation_config(tokenizer, CausalPolicy(model, temperature))
    _keep_head(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # each kind of adapter has its own for what it cannot add to a weight
        raise UserError(f"{adapter}: the adapter could not be merged: {first_line(error)}") from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(output, lambda target: write_model(merged, tokenizer, generation, target))
    except OSError as error:
        raise UserError(f"--output: {output} could not be written: {error.strerror or error}") from error


def _keep_head(model: PeftModel) -> None:
    """Where the adapter changes the input embedding, give the output one, which may be the same weight, its own."""
    base = model.get_base_model()
    if wrapped_by_adapter(base.get_input_embeddings()):
        head = base.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False

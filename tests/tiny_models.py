"""Tiny GPT-2 and Llama models with a real tokenizer, made from their configurations and saved to a folder."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    *("the", "a", "film", "plot", "was", "is", "good", "bad", "dull", "bright"),
    *("and", "but", "very", "never", "it", "I", "we", "saw", "liked", "hated"),
]
EOS, PAD = 0, len(WORDS) + 1  # the pad token exists only where a tokenizer is made with one
V = len(WORDS) + 2


def write_model(folder, architecture, *, seed=0, own_pad=False):
    """Save a random model of two layers, 32 wide, with strong weights so that context and position show."""
    common = {"vocab_size": V, "initializer_range": 0.25, "bos_token_id": None, "eos_token_id": EOS}
    if architecture == "gpt2":
        # Dropout is GPT-2's own 0.1; input and output embedding are one.
        make, config = GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
    else:
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_dropout=0.1,
            tie_word_embeddings=False,
            **common,
        )
        make = LlamaForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = make(config)
    model.save_pretrained(folder)
    vocabulary = {"<eos>": EOS, **{word: index for index, word in enumerate(WORDS, 1)}, "<pad>": PAD}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>"} if own_pad else {}
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", **special).save_pretrained(folder)
    return folder

"""Completions as texts that go on from their prompts, whatever the tokenizer's decoder does to the start of a text."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lm_trust.lm.completion_texts import CompletionTexts
from lm_trust.lm.generation import complete, left_pad
from lm_trust.lm.prompts import Prompts

PIECES = ["<unk>", "<s>", "</s>", "▁the", "▁film", "▁was", "▁not", "▁good", "▁", "n", "'t"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture
def llama_2():
    """As Llama 2 and Mistral do it: a word brings its space, and decoding takes the first one for the text's start."""
    vocabulary = {piece: index for index, piece in enumerate(PIECES + BYTES)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def byte_level():
    """As GPT-2 does it, without merges: a token is a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(["</s>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def written(tokenizer, *pairs, ends=()):
    """The texts of completions, from pairs of the ids of a prompt and of what was written behind it."""
    prompts, mask = left_pad([prompt for prompt, _ in pairs], tokenizer.eos_token_id)
    longest = max(len(row) for _, row in pairs)
    tokens = torch.tensor([[*row, *[tokenizer.eos_token_id] * (longest - len(row))] for _, row in pairs])
    found = complete(mask, prompts, tokens, eos_ids=[tokenizer.eos_token_id, *ends])
    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt, _ in pairs]
    return CompletionTexts(tokenizer, Prompts(texts, {}, "made", "line", list(range(len(texts)))), found)


def ids(*pieces):
    return [PIECES.index(piece) for piece in pieces]


def test_a_completion_keeps_the_space_between_it_and_its_prompt(llama_2):
    prompt = llama_2("the film was")["input_ids"]
    assert prompt == ids("<s>", "▁the", "▁film", "▁was")
    texts = written(llama_2, (prompt, ids("▁not", "▁good", "</s>")), (prompt, ids("n", "'t", "▁good")))
    assert texts.texts == [" not good", "n't good"]
    assert texts.prompts.texts[0] + texts.texts[0] == "the film was not good"
    assert texts.beginnings == [["", " not", " not good", " not good"], ["", "n", "n't", "n't good"]]
    assert texts.tokens == [[" not", " good", ""], ["n", "'t", " good"]]


def test_behind_a_special_token_or_a_space_a_text_begins_as_it_is_decoded(llama_2):
    pairs = [
        (ids("▁was", "</s>"), ids("▁not", "</s>")),
        (ids("▁was", "▁"), ids("▁not", "</s>")),
        (llama_2("the☕")["input_ids"], ids("▁not", "</s>")),
        (ids("▁was"), ids("</s>")),
    ]
    texts = written(llama_2, *pairs)
    assert texts.texts == ["not", " not", " not", ""]
    assert [beginnings[0] for beginnings in texts.beginnings] == [""] * 4


def test_a_tokenizer_of_bytes_decodes_a_completion_as_if_it_stood_alone(byte_level):
    prompts = ["the film was", "a ☕", "so\n", " ", "é"]
    completions = [" not good", "not", "☕ ☕", "", "\n"]
    pairs = [
        (byte_level(prompt)["input_ids"], [*byte_level(text)["input_ids"], byte_level.eos_token_id])
        for prompt in prompts
        for text in completions
    ]
    texts = written(byte_level, *pairs)
    assert texts.texts == completions * len(prompts)
    for (_, row), beginnings in zip(pairs, texts.beginnings, strict=True):
        alone = [byte_level.decode(row[:count], skip_special_tokens=True) for count in range(len(row) + 1)]
        assert beginnings == alone


def test_a_character_that_a_cut_prompt_began_is_shown_as_unfinished(byte_level):
    first, *rest = byte_level("☕ good")["input_ids"]
    texts = written(byte_level, ([first], rest))
    assert texts.texts == ["\ufffd\ufffd good"]


def test_an_end_is_no_part_of_the_text_whether_or_not_it_is_a_special_token(byte_level):
    start, (dot,) = byte_level("so")["input_ids"], byte_level(".")["input_ids"]
    rows = [byte_level(text)["input_ids"] for text in (" it.", ".", " isn")]
    texts = written(byte_level, *((start, row) for row in rows), ends=[dot])
    assert texts.texts == [" it", "", " isn"]
    assert texts.beginnings == [["", " ", " i", " it", " it"], ["", ""], ["", " ", " i", " is", " isn"]]
    assert texts.tokens == [[" ", "i", "t", ""], [""], [" ", "i", "s", "n"]]
    assert texts.lengths == [4, 1, 4]

"""Completions as texts: whole, after each number of tokens, and token by token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from lm_trust.lm.generation import Completions, decode, decode_after
from lm_trust.lm.prompts import Prompts
from lm_trust.lm.text_pieces import token_texts


@dataclass(frozen=True)
class CompletionTexts:
    """The texts of B completions, and the prompts that they complete."""

    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    written: Completions

    @cached_property
    def texts(self) -> list[str]:
        """B texts, without the tokens that end them and special ones."""
        return decode(self.tokenizer, self.written)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each, an end of sequence included."""
        return self.written.lengths.tolist()

    @cached_property
    def ended(self) -> list[bool]:
        """Whether each ended by itself, before the limit."""
        return self.written.ended.tolist()

    @cached_property
    def beginnings(self) -> list[list[str]]:
        """The texts after 0, 1, ... length tokens of each completion; an end of sequence adds nothing."""
        rows = self.written.text_tokens
        flat = [ids[:count] for ids in rows for count in range(len(ids) + 1)]
        before = [
            token for token, ids in zip(self.written.last_prompt_tokens, rows, strict=True) for _ in range(len(ids) + 1)
        ]
        texts = iter(decode_after(self.tokenizer, before, flat))
        beginnings = [[next(texts) for _ in range(len(ids) + 1)] for ids in rows]
        return [each + each[-1:] * ended for each, ended in zip(beginnings, self.ended, strict=True)]

    @cached_property
    def tokens(self) -> list[list[str]]:
        """What each token added to the text of each completion."""
        return [token_texts(beginnings) for beginnings in self.beginnings]

"""From prompts to token ids: plain texts by the tokenizer, chats by the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from lm_trust.errors import UserError, in_line
from lm_trust.lm.prompts import Chat, Prompts
from lm_trust.lm.rows import BadRows


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    context: int | None,
    max_new_tokens: int,
    vocabulary: int | None = None,
    max_tokens: int | None = None,
    truncate: int | None = None,
    bad: BadRows | None = None,
) -> tuple[Prompts, list[list[int]]]:
    """The prompts that can be used, and the token ids of each.

    A plain text is encoded as the tokenizer does it, with a start token where it sets one, but open: without what it
    sets behind a text. Where the text spells a special token, that token is meant. A chat goes through the chat
    template, which sets its own start token and opens the model's answer; its messages may not spell special tokens,
    which would end or forge a message.

    Args:
        context: positions that the model has, None where it sets no limit.
        max_new_tokens: how many of them the completion may need.
        vocabulary: tokens that the model has an embedding of; None: all of the tokenizer's.
        max_tokens: the longest prompt allowed besides.
        truncate: how many of a plain text's first tokens are the prompt; None: all of them. What is left of the text
            is what rewards receive.
        bad: takes the prompts without tokens, too long, with tokens that the model lacks, or not fit for the template.

    Raises:
        UserError: the first of these where bad rows are errors, with the number of the others; no prompt can be used,
            or has room; chats without a chat template, or to be truncated.
    """
    bad = bad or BadRows()
    ids = _ids(tokenizer, prompts)
    if truncate is not None:
        prompts, ids = _truncated(tokenizer, prompts, ids, truncate)
    room = _Room(context, max_new_tokens, max_tokens, vocabulary)
    longest = max((len(row) for row in ids if not isinstance(row, str)), default=0)
    if context is not None and context <= max_new_tokens:
        raise UserError(
            f"rollout.max_new_tokens: {max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{context} tokens; the longest prompt has {longest}"
        )
    problems = {
        index: words
        for index, row in enumerate(ids)
        if (words := row if isinstance(row, str) else room.problem(row, prompts.texts[index]))
    }
    for index, words in problems.items():
        if bad.on_bad_row == "error" and len(problems) > 1:
            words += f" (and {len(problems) - 1} more such prompts; the longest has {longest} tokens)"
        bad.add(prompts.where(index), words)
    good = [index for index in range(len(prompts)) if index not in problems]
    if not good:
        first = next(iter(problems))
        raise UserError(
            f"{prompts.source}: none of {len(prompts)} prompts can be used; the first: {prompts.where(first)}: "
            f"{problems[first]}"
        )
    return prompts.select(good) if problems else prompts, [ids[index] for index in good]


def cut(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, length: int) -> Prompts:
    """The prompts as `encode` leaves them with truncate `length`.

    Raises:
        UserError: they are chats.
    """
    return _truncated(tokenizer, prompts, _ids(tokenizer, prompts), length)[0]


@dataclass(frozen=True)
class _Room:
    """How long a prompt may be, and of which tokens."""

    context: int | None
    max_new_tokens: int
    max_tokens: int | None
    vocabulary: int | None

    def problem(self, ids: list[int], text: str) -> str | None:
        if not ids:
            return f"the tokenizer makes no token of the prompt {text[:60]!r}; a prompt needs at least one"
        if self.context is not None and len(ids) + self.max_new_tokens > self.context:
            return (
                f"a prompt of {len(ids)} tokens and max_new_tokens {self.max_new_tokens} exceed the model's context of "
                f"{self.context} tokens; shorten it to {self.context - self.max_new_tokens} tokens or lower "
                "rollout.max_new_tokens"
            )
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            return f"a prompt of {len(ids)} tokens, more than prompts.max_tokens {self.max_tokens}"
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            return (
                f"the prompt has token {max(ids)}, and the model of model.path has {self.vocabulary} embeddings; "
                "resize them, or give the tokenizer that the model was trained with"
            )
        return None


def _ids(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> list[list[int] | str]:
    """The token ids of every prompt, or why it has none."""
    plain = [index for index in range(len(prompts)) if prompts.chat(index) is None]
    ids: list[list[int] | str] = [[]] * len(prompts)
    if plain:
        texts = [prompts.texts[index] for index in plain]
        encoded = tokenizer(texts, padding=False, truncation=False, return_special_tokens_mask=True, verbose=False)
        for index, row, set_by_itself in zip(plain, encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            ids[index] = _open(list(row), set_by_itself)
    if len(plain) == len(prompts):
        return ids
    if not tokenizer.chat_template:
        raise UserError(
            f"{prompts.source}: the prompts are chats and the tokenizer of {tokenizer.name_or_path!r} has no chat "
            "template; take an instruction-tuned model, or plain texts and prompts.chat false"
        )
    special = _special_tokens(tokenizer)
    for index in range(len(prompts)):
        chat = prompts.chat(index)
        if chat is not None:
            ids[index] = _chat_ids(tokenizer, chat, special)
    return ids


def _open(ids: list[int], set_by_itself: list[int]) -> list[int]:
    """Without what the tokenizer sets behind a text: the model is to go on from the text, not from its end."""
    length = len(ids)
    while length and set_by_itself[length - 1]:
        length -= 1
    return ids[:length] or ids  # of nothing but what it sets a start may be all that there is


def _truncated(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, ids: list[list[int] | str], length: int
) -> tuple[Prompts, list[list[int]]]:
    if prompts.chats is not None:
        raise UserError(f"prompts.truncate: {prompts.source} holds chats, which cannot be cut; leave it null")
    ids = [row[:length] for row in ids]
    return replace(prompts, texts=tokenizer.batch_decode(ids, skip_special_tokens=True)), ids


def _chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, special: list[str]) -> list[int] | str:
    spelt = next((token for message in chat for token in special if token in message["content"]), None)
    if spelt is not None:
        return f"a message spells the special token {spelt!r}, which the model would take for the token itself"
    try:
        return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    except Exception as error:  # whatever a template raises: it is a program that came with the model
        reason = in_line(error)[:200] or type(error).__name__
        return f"the chat template does not take these messages: {reason}"


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens))

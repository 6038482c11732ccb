"""Sampling completions from exactly the distribution that is scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from lm_trust.lm.policy import CausalPolicy, TokenObservations


@dataclass(frozen=True)
class Completions:
    """Sampled completions of B prompts.

    Attributes:
        observations: prompts and completions as the policy takes them, T the longest completion.
        tokens: (B, T); what stands after a completion's end is padding.
        lengths: (B,) tokens, the end of sequence included.
        ended: (B,) bool, whether the last token is an end of sequence; otherwise the length limit cut it.
        engine_log_prob: (B, T) log-probabilities by which the engine drew the tokens, nats; None where it draws from
            what the policy scores.
        step_states: (B, T, H) the policy's, from which the tokens were drawn; None where the engine's are not those
            that scoring computes.
    """

    observations: TokenObservations
    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    engine_log_prob: Tensor | None = None
    step_states: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, True at real tokens, the first end of sequence among them."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths.unsqueeze(-1)

    @property
    def text_tokens(self) -> list[list[int]]:
        """B lists of the tokens before each end of sequence, which need not be a special token."""
        counts = self.lengths - self.ended.long()
        return [row[:count] for row, count in zip(self.tokens.tolist(), counts.tolist(), strict=True)]

    @property
    def last_prompt_tokens(self) -> list[int]:
        """B tokens, the one before each completion."""
        return self.observations.input_ids[:, self.observations.prompt_width - 1].tolist()


class GenerationEngine(Protocol):
    """What samples the completions of a rollout: any callable like `sample_completions`.

    Prompts and the completions' ends are as there, the policy's weights and temperature are those of the call, and the
    draw depends on nothing but `generator`. An engine that may draw from another distribution than the policy scores,
    by its own kernels or precision, returns `engine_log_prob`; training then measures and corrects the difference.
    """

    def __call__(
        self,
        policy: CausalPolicy,
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        pad_id: int,
        generator: torch.Generator,
    ) -> Completions: ...


def decode(tokenizer: PreTrainedTokenizerBase, completions: Completions) -> list[str]:
    """The completions' texts as they go on from their prompts, without the tokens that end them and special ones."""
    return decode_after(tokenizer, completions.last_prompt_tokens, completions.text_tokens)


def decode_after(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], rows: Sequence[list[int]]) -> list[str]:
    """The text that each row of tokens adds behind the token before it, without special tokens.

    Alone, a row may lose its first space: decoders of the kind of Llama 2's take it for the start of a text.
    """
    distinct = list(set(before))
    starts = dict(
        zip(distinct, tokenizer.batch_decode([[token] for token in distinct], skip_special_tokens=True), strict=True)
    )
    joined = [[token, *row] for token, row in zip(before, rows, strict=True)]
    texts = tokenizer.batch_decode(joined, skip_special_tokens=True)
    for index, (token, text) in enumerate(zip(before, texts, strict=True)):
        if text.startswith(starts[token]):
            texts[index] = text[len(starts[token]) :]
        else:  # such as where the two tokens share a character
            texts[index] = tokenizer.batch_decode([rows[index]], skip_special_tokens=True)[0]
    return texts


def eos_ids(tokenizer: PreTrainedTokenizerBase, policy: CausalPolicy) -> list[int]:
    """The tokens that end a completion: the model's own, which may be several, and the tokenizer's."""
    own = policy.causal_lm.generation_config.eos_token_id
    listed = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*listed, tokenizer.eos_token_id})


def left_pad(prompt_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as (B, P) ids padded on the left, and their (B, P) bool mask, from lengths."""
    width = max(len(ids) for ids in prompt_ids)
    padded = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompt_ids])
    lengths = torch.tensor([len(ids) for ids in prompt_ids])
    return padded, torch.arange(width) >= width - lengths.unsqueeze(-1)


def complete(
    prompt_mask: Tensor,
    prompts: Tensor,
    tokens: Tensor,
    *,
    eos_ids: Sequence[int],
    engine_log_prob: Tensor | None = None,
    step_states: Tensor | None = None,
) -> Completions:
    """Completions from prompts (B, P) and generated tokens (B, T): each ends at its first end of sequence."""
    steps = tokens.shape[1]
    is_end = torch.isin(tokens, torch.tensor(list(eos_ids), dtype=tokens.dtype, device=tokens.device))
    ended = is_end.any(-1)
    first = is_end.long().argmax(-1)
    lengths = torch.where(ended, first + 1, steps)
    real = torch.arange(steps, device=tokens.device) < lengths.unsqueeze(-1)
    observations = TokenObservations(
        torch.cat([prompts, tokens], -1), torch.cat([prompt_mask, real], -1), prompts.shape[1]
    )
    return Completions(observations, tokens, lengths, ended, engine_log_prob, step_states)


@contextmanager
def seeded(device: torch.device, generator: torch.Generator) -> Iterator[int]:
    """Within the context the global generators are seeded from `generator`; afterwards they are as they were.

    Yields:
        The seed.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not `torch.manual_seed`, which would also reseed devices that are not forked here.
        torch.default_generator.manual_seed(seed)
        for forked in devices:
            with torch.cuda.device(forked):
                torch.cuda.manual_seed(seed)
        yield seed


class EndWhereBroken(LogitsProcessor):
    """Lets a completion end where its logits are NaN or infinite, so that there is no distribution to draw from.

    Nothing passes by it unseen: scoring meets the same logits, and whoever scores finds that token's log-probability.
    """

    supports_continuous_batching = True  # it looks at the logits alone

    def __init__(self, eos_id: int, temperature: float) -> None:
        self._eos_id, self._temperature = eos_id, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A logit of -inf is a probability of zero, as long as one is above it.
        broken = ~(scores.amax(-1, keepdim=True) / self._temperature).isfinite()
        end = torch.full_like(scores[:1], -torch.inf)
        end[:, self._eos_id] = 0.0
        return torch.where(broken, end, scores)


class ExponentialRace(LogitsProcessor):
    """Draws each row's next token, for `generate` to find as the one with the highest score.

    Of clocks that ring after exponential times, word v's at the rate p_v, the first to ring is v's with probability
    p_v: that is the largest p_v / E_v of exponential E. `torch.multinomial` draws in this way, too, but on a CPU its
    exponentials take five times as long as numpy's, and the draw as a whole twice as long.

    Args:
        temperature: that the scores are divided by.
        seed: of the draws on a CPU; on other devices the global generator makes them.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._generator = np.random.Generator(np.random.SFC64(seed))
        self._times = np.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rates = (scores / self._temperature).softmax(-1)
        return rates.div_(self._times_of(rates))

    def _times_of(self, rates: Tensor) -> Tensor:
        if rates.device.type != "cpu":
            return torch.empty_like(rates).exponential_()
        if self._times.shape != rates.shape:  # else it is used again: memory that is new is slow
            self._times = np.empty(rates.shape)
        # In double precision: a single one has zeros among a million, and would give rare words more than their share.
        return torch.from_numpy(self._generator.standard_exponential(out=self._times))


def greedy_settings(*, max_new_tokens: int, eos_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    """Settings of `generate` by which it takes the token with the highest score; arguments as below.

    What else the model's own settings would do to the scores is undone where it is loaded.
    """
    return GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids) or -1,  # in place of None transformers takes the model's own
        pad_token_id=pad_id,
        use_cache=True,
    )


@torch.no_grad()
def sample_completions(
    policy: CausalPolicy,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator,
) -> Completions:
    """Sample one completion a prompt with the key-value cache.

    The draw is seeded from `generator`; the global generators are left as they were.

    Args:
        policy: samples at its own temperature.
        prompt_ids: B prompts as token ids.
        max_new_tokens: the length limit.
        eos_ids: tokens that end a completion; none: each goes to the limit.
        pad_id: any token; what it is changes nothing.
        generator: CPU generator.
    """
    prompts, prompt_mask = (tensor.to(policy.device) for tensor in left_pad(prompt_ids, pad_id))
    settings = greedy_settings(max_new_tokens=max_new_tokens, eos_ids=eos_ids, pad_id=pad_id)
    broken = EndWhereBroken(eos_ids[0] if eos_ids else pad_id, policy.temperature)
    with seeded(policy.device, generator) as seed, policy.generating(), _kept_states(policy) as states:
        sequences = policy.causal_lm.generate(
            input_ids=prompts,
            attention_mask=prompt_mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([broken, ExponentialRace(policy.temperature, seed)]),
            synced_gpus=policy.sharded,  # go on until the last process's rows have ended
        )
    tokens = sequences[:, prompts.shape[1] :]
    # In half precision the same state, computed alone and among others, differs by its rounding.
    step_states = torch.stack(states[: tokens.shape[1]], 1) if policy.autocast is None else None
    return complete(prompt_mask, prompts, tokens, eos_ids=eos_ids, step_states=step_states)


@contextmanager
def _kept_states(policy: CausalPolicy) -> Iterator[list[Tensor]]:
    """Within the context each pass of `generate` leaves the hidden states (B, H) that it draws from."""
    states: list[Tensor] = []
    head = policy.causal_lm.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, given: states.append(given[0][:, -1]))
    try:
        yield states
    finally:
        handle.remove()

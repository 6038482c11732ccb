"""A generation engine on transformers' continuous batching: what ends makes room for the next prompt.

`generate` carries the ended rows of a batch along until the last one has ended, and pads its prompts; here neither is
computed. The paged cache and its attention are other code than the scoring pass, so the engine returns its own
log-probabilities.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    ContinuousBatchingManager,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
)
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import GenerationOutput

from lm_trust.errors import UserError
from lm_trust.lm.generation import Completions, EndWhereBroken, complete, left_pad, seeded
from lm_trust.lm.policy import CausalPolicy

UNDER_WAY = 64  # completions at a time: without flash attention each looks at the keys of all, and masks them
PAGE = 16  # tokens a page of the cache
PREFILL = 1024  # most prompt tokens in one pass: the mask has a row for each of them and a column for all of the cache


def check_model(policy: CausalPolicy) -> None:
    """See that the model's attention can be replaced by one that knows the engine's cache.

    Without that the engine runs and draws, silently, from another distribution.

    Raises:
        UserError: it cannot, as in GPT-Neo, GPT-J and BLOOM.
    """
    if not getattr(policy.causal_lm, "_supports_attention_backend", False):
        name = type(policy.causal_lm).__name__
        raise UserError(f"rollout.engine: continuous_batching cannot run {name}; use generate")


@torch.no_grad()
def sample_continuously(
    policy: CausalPolicy,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator,
) -> Completions:
    """Sample one completion a prompt, `UNDER_WAY` of them at a time.

    Arguments and result are those of `sample_completions`, with the engine's log-probabilities. It computes in the
    weights' own precision whatever `policy.autocast` says: its pass runs in a thread, which no context here reaches.
    Where a state's logits are not finite, the completions that share its pass end with it; scoring finds that state,
    and nothing learns from such a batch.

    Raises:
        UserError: the engine cannot run this model, or failed.
    """
    check_model(policy)
    every_device = range(torch.cuda.device_count())
    with _attention_put_back(policy.causal_lm), _garbage_aside(), torch.random.fork_rng(devices=every_device):
        manager = _manager(policy, prompt_ids, max_new_tokens, eos_ids, pad_id)
        with seeded(policy.device, generator):
            results = _results(manager, [list(ids) for ids in prompt_ids])
    prompts, prompt_mask = (tensor.to(policy.device) for tensor in left_pad(prompt_ids, pad_id))
    tokens = _right_pad([result.generated_tokens for result in results], pad_id).to(policy.device)
    log_prob = _right_pad([result.logprobs for result in results], 0.0).to(policy.device)
    return complete(prompt_mask, prompts, tokens, eos_ids=eos_ids, engine_log_prob=log_prob)


def _manager(
    policy: CausalPolicy,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
) -> ContinuousBatchingManager:
    """Transformers' manager with a cache for all completions under way, and nothing that bends the distribution.

    Making the cache seeds the global generators of every device.
    """
    under_way = min(len(prompt_ids), UNDER_WAY)
    longest = max(len(ids) for ids in prompt_ids) + max_new_tokens
    settings = GenerationConfig(do_sample=True, max_new_tokens=max_new_tokens, eos_token_id=list(eos_ids) or -1)
    engine = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=under_way * -(-longest // PAGE),
        max_batch_tokens=max(under_way, min(PREFILL, sum(len(ids) for ids in prompt_ids))),
        max_requests_per_batch=under_way,
        safety_margin=0.0,
        allow_block_sharing=False,
        use_async_batching=False,
        auto_switch_to_flash=False,
        return_logprobs=True,
    )
    broken = EndWhereBroken(eos_ids[0] if eos_ids else pad_id, policy.temperature)
    processors = LogitsProcessorList([broken, TemperatureLogitsWarper(policy.temperature)])
    try:
        manager = policy.causal_lm.init_continuous_batching(settings, engine)
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(processors)
        manager.warmup()
    except (ValueError, MemoryError) as error:
        raise UserError(f"rollout.engine: continuous_batching cannot run this model ({error}); use generate") from error
    return manager


def _results(manager: ContinuousBatchingManager, prompts: list[list[int]]) -> list[GenerationOutput]:
    """What became of each prompt, in their order."""
    # All prompts wait before the first pass: if they came in beside it, the time would decide which of them share one.
    names = manager.add_requests(prompts)
    manager.start()
    try:
        manager.stop()  # waits until all is done
    except BaseException:
        manager.stop(hard_stop=True)
        raise
    done: dict[str, GenerationOutput] = {}
    while (result := manager.get_result()) is not None:
        done[result.request_id] = result
    for name in names:
        error = done[name].error if name in done else "a prompt without a completion"
        if error is not None:
            raise UserError(f"rollout.engine: continuous_batching failed ({error}); use generate")
    return [done[name] for name in names]


@contextmanager
def _attention_put_back(model: nn.Module) -> Iterator[None]:
    """The engine may switch the attention to one that knows its cache."""
    before = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def _garbage_aside() -> Iterator[None]:
    """The manager collects garbage twice as it stops, half a second each among all that a run has imported.

    What is there before it need not be looked through.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _right_pad(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    """(B, T) of rows of unequal lengths, T the longest."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

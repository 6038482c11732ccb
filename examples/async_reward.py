"""A slow reward, asked many times at once: an async function, as one writes it for a judge behind a server.

    rewards:
      - {name: examples.async_reward:variety, timeout: 10, parallel: 16}

With `parallel: 16` the function is called for one completion at a time, and 16 calls are under way together, so that
a batch waits for the slowest of them and not for their sum. A call that takes longer than `timeout` seconds ends the
run and names the completion. All calls run in one event loop: a client made at the first call can be kept.

    lm-trust train configs/lm/custom_async.yaml
"""

import asyncio


async def variety(prompts: list[str], completions: list[str], **fields: list) -> list[float]:
    """The share of a completion's words that are different from each other; 0 for none."""
    await asyncio.sleep(0.05)  # in the place of `await client.post(...)`
    return [_different(completion.lower().split()) for completion in completions]


def _different(words: list[str]) -> float:
    return len(set(words)) / len(words) if words else 0.0

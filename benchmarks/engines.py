"""Sampling a rollout by `generate` against continuous batching.

    python benchmarks/engines.py [MODEL] [BATCH] [TOKENS]

Interleaved, median of three after one that counts for nothing: once with every completion at the length limit, and once
with ends that come by chance, at a token in twenty of those that the model likes, so that most rows end early.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from lm_trust.lm.engines import load_engine
from lm_trust.lm.generation import sample_completions
from lm_trust.lm.loading import load_policy
from lm_trust.lm.policy import CausalPolicy

ROUNDS, ENGINES = 3, ("generate", "continuous_batching")


def mixed_prompts(count: int) -> list[list[int]]:
    """Prompts of 4 to 11 tokens."""
    return [list(range(10, 14 + row % 8)) for row in range(count)]


def usual_tokens(policy: CausalPolicy, prompts: list[list[int]], tokens: int) -> list[int]:
    """Every twentieth token that the policy itself writes, in the order of its draws."""
    settings = {"max_new_tokens": tokens, "eos_ids": [], "pad_id": 0}
    drawn = sample_completions(policy, prompts, generator=torch.Generator().manual_seed(0), **settings).tokens
    return sorted(set(drawn.flatten().tolist()[::20]))


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 16
    limit = int(sys.argv[3]) if len(sys.argv) > 3 else 20
    policy, prompts = load_policy(model), mixed_prompts(batch)
    print(f"{model}, {batch} prompts, at most {limit} tokens, {torch.get_num_threads()} threads")
    for name, ends in (("to the limit", []), ("ends by chance", usual_tokens(policy, prompts, limit))):
        seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for seed in range(1 + ROUNDS):
            for engine in ENGINES:
                started = time.perf_counter()
                found = load_engine(engine)(
                    policy,
                    prompts,
                    max_new_tokens=limit,
                    eos_ids=ends,
                    pad_id=0,
                    generator=torch.Generator().manual_seed(seed),
                )
                seconds[engine].append(time.perf_counter() - started)
        medians = {engine: statistics.median(values[1:]) for engine, values in seconds.items()}
        words = "  ".join(f"{engine} {median:.2f} s" for engine, median in medians.items())
        print(f"{name:15s} {words}  (mean length {found.lengths.double().mean():.1f})")


if __name__ == "__main__":
    main()

"""Sampling with the adapter as it is against sampling with it merged into the base weights.

    python benchmarks/merged_sampling.py [MODEL] [BATCH]

Interleaved, median of five. Merging is only counted for sampling itself; the merge and the exact restoration of the
base weights would come on top.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from lm_trust.lm.generation import sample_completions
from lm_trust.lm.loading import load_policy
from lm_trust.lm.policy import CausalPolicy

ROUNDS, TOKENS = 5, 20


def seconds(policy: CausalPolicy, prompts: list[list[int]]) -> float:
    started = time.perf_counter()
    sample_completions(
        policy, prompts, max_new_tokens=TOKENS, eos_ids=[], pad_id=0, generator=torch.Generator().manual_seed(0)
    )
    return time.perf_counter() - started


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    policy = load_policy(model)
    prompts = [list(range(10, 20))] * batch
    times: dict[str, list[float]] = {"adapter": [], "merged": []}
    for _ in range(ROUNDS):
        times["adapter"].append(seconds(policy, prompts))
        policy.model.merge_adapter()
        times["merged"].append(seconds(policy, prompts))
        policy.model.unmerge_adapter()
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:8s} {median:6.2f} s  {batch * TOKENS / median:6.0f} tokens/s")
    print(f"merged takes {medians['merged'] / medians['adapter']:.2f} of the adapter's time")


if __name__ == "__main__":
    main()

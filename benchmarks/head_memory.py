"""Peak memory of the vocabulary head in one trust-region update: chunked from hidden states, or all logits at once.

The head's part of an update is a scoring pass (log-probability and entropy of every token), then the exact KL between
two policies and its gradient, then one Fisher product. Sizes are SmolLM2-135M's: V = 49,152 tokens, H = 576. Each
measurement is a fresh process: its peak resident memory less what it held before the work began.

    python benchmarks/head_memory.py [TOKENS ...]      (512 and 4096 if none are given)
"""

from __future__ import annotations

import resource
import subprocess
import sys

VOCABULARY, HIDDEN = 49_152, 576
KINDS = ("chunked", "plain")


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(kind: str, tokens: int) -> float:
    """MiB that the head's work adds."""
    import torch

    from lm_trust.core import Distribution
    from lm_trust.lm.vocabulary_head import VocabularyCategorical

    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5
    old = torch.randn(1, tokens, HIDDEN)
    new = (old + 0.1 * torch.randn_like(old)).requires_grad_()
    actions, tangent = torch.randint(VOCABULARY, (1, tokens)), torch.randn_like(old)
    before = peak_mib()

    def distribution(hidden: torch.Tensor) -> Distribution:
        chunked = VocabularyCategorical(hidden, weight)
        return chunked if kind == "chunked" else chunked.dense()

    with torch.no_grad():
        fixed = distribution(old)
        fixed.log_prob(actions)
        fixed.entropy()
    fixed.kl(distribution(new)).mean().backward()
    if kind == "chunked":
        fixed.fisher_product(tangent)
    else:
        with torch.no_grad():
            fixed.fisher_product(tangent @ weight.T) @ weight
    return peak_mib() - before


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(measure(sys.argv[2], int(sys.argv[3])))
        return
    print(f"{'tokens':>8} {'one logits tensor':>18} " + " ".join(f"{kind:>12}" for kind in KINDS))
    for tokens in map(int, sys.argv[1:] or ["512", "4096"]):
        row = [f"{tokens:>8,} {tokens * VOCABULARY * 4 / 2**20:>14,.0f} MiB"]
        for kind in KINDS:
            command = [sys.executable, __file__, "--measure", kind, str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True)
            row.append(f"{float(done.stdout):>8,.0f} MiB" if done.returncode == 0 else f"{'failed':>12}")
        print(" ".join(row), flush=True)


if __name__ == "__main__":
    main()

"""Peak memory of scoring and of one policy gradient on a whole model, as completion tokens grow.

    python benchmarks/update_memory.py [MODEL]         (SmolLM2-135M if none is given)

Policy and reference score every completion token (log-probability, entropy, exact KL over the vocabulary), then the
surrogate's gradient is accumulated over microbatches, without and with gradient checkpointing. Each number is of a
fresh process: its peak resident memory less what it held with the model loaded. One full logits tensor stands beside
it.
"""

from __future__ import annotations

import resource
import subprocess
import sys

STEPS, PROMPT, MICROBATCH = 32, 8, 16
TOKENS = (512, 2048, 8192)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(model: str, tokens: int, gradient_checkpointing: bool) -> tuple[float, int]:
    """MiB that the work adds, and V."""
    import torch

    from lm_trust.core.objective import SurrogateObjective
    from lm_trust.core.parameters import trainable_parameters
    from lm_trust.lm.generation import complete
    from lm_trust.lm.loading import load_policy

    policy = load_policy(model, microbatch_size=MICROBATCH, gradient_checkpointing=gradient_checkpointing)
    vocabulary, rows = policy.causal_lm.config.vocab_size, tokens // STEPS
    prompts = torch.randint(vocabulary, (rows, PROMPT))
    written = complete(
        torch.ones_like(prompts, dtype=torch.bool), prompts, torch.randint(vocabulary, (rows, STEPS)), eos_ids=[]
    )
    before = peak_mib()
    with torch.no_grad():
        own = policy.distribution(written.observations)
        with policy.as_reference():
            reference = policy.distribution(written.observations)
        own.log_prob(written.tokens), own.entropy(), own.kl(reference)
    advantages = torch.randn(rows, STEPS)
    objective = SurrogateObjective(
        policy, written.observations, written.tokens, advantages, mask=written.mask, microbatch_size=MICROBATCH
    )
    objective.gradient(trainable_parameters(policy))
    return peak_mib() - before, vocabulary


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(*measure(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "checkpointed"))
        return
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    print(f"{'completion tokens':>18} {'one logits tensor':>18} {'the work adds':>14} {'checkpointed':>14}")
    for tokens in TOKENS:
        added, vocabulary = zip(*(measured(model, tokens, how) for how in ("plain", "checkpointed")), strict=True)
        logits = tokens * int(vocabulary[0]) * 4 / 2**20
        print(f"{tokens:>18,} {logits:>14,.0f} MiB " + " ".join(f"{float(each):>10,.0f} MiB" for each in added))


def measured(model: str, tokens: int, how: str) -> list[str]:
    """What `measure` says in a fresh process."""
    command = [sys.executable, __file__, "--measure", model, str(tokens), how]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]


if __name__ == "__main__":
    main()

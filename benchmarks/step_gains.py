"""What a TRPO step is worth on samples it has not seen, by how its direction is found and how it is judged.

    python benchmarks/step_gains.py                                  (SmolLM2 on movie reviews, three seeds)
    python benchmarks/step_gains.py --seeds 0 --rows 16

From one policy, a few iterations from its start, every variant steps on one batch; then the same objective is measured
on a second rollout of that policy. A step that fits its batch's noise gains more on the batch and no more on the
second. Adapters are on queries and values, damping is 0.03 where a variant says nothing else. Gains are in units of the
reward, means over the seeds. "promised" is the gain that the step was accepted on: where rows are held out, that of
those rows. "kept" is the fresh gain over it.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from lm_trust.compare.config import Candidate
from lm_trust.compare.one_update import one_update_study
from lm_trust.training.config_file import load_config

CONFIG = "configs/lm/sentiment_trpo.yaml"
ITERATIONS_BEFORE, EVALUATIONS = 4, 2
GRADIENT = {"preconditioner": "gradient", "cg_iterations": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "2 iterations, quarter of the rows": {"cg_iterations": 2},
    "4 iterations, quarter": {"cg_iterations": 4},
    "10 iterations, quarter": {"cg_iterations": 10},
    "10 iterations, all rows": {"cg_iterations": 10, "fisher_fraction": 1.0},
    "3 preconditioned, quarter": GRADIENT,
    "3 preconditioned, damping 0.3": GRADIENT | {"damping": 0.3},
    "3 preconditioned, damping 0.003": GRADIENT | {"damping": 0.003},
    "3 preconditioned, max_kl 0.005": GRADIENT | {"max_kl": 0.005},
    "3 preconditioned, quarter held out": GRADIENT | {"holdout_fraction": 0.25},
    "4 iterations, quarter held out": {"cg_iterations": 4, "holdout_fraction": 0.25},
}


def study(seed: int, rows: int, autocast: str) -> list[dict[str, Any]]:
    """One row a variant."""
    given = {"seed": seed, "model.autocast": autocast, "model.lora.targets": "null", "update.damping": 0.03}
    given |= {"rollout.batch_size": rows, "rollout.microbatch_size": min(rows, 64)}
    candidates = []
    for name, update in VARIANTS.items():
        overrides = given | {f"update.{key}": value for key, value in update.items()}
        config = load_config(CONFIG, [(key, str(value)) for key, value in overrides.items()])
        candidates.append(Candidate(name, "variant", 0.0, config))
    return one_update_study(candidates, iterations_before=ITERATIONS_BEFORE, evaluations=EVALUATIONS)["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--autocast", default="null", help="bfloat16 where the processor has it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    studies = []
    for seed in given.seeds:
        studies.append(study(seed, given.rows, given.autocast))
        print(f"seed {seed}: " + " ".join(f"{row['batch_gain']:.4f}/{row['fresh_gain']:.4f}" for row in studies[-1]))
    print(f"\n{'':36} {'promised':>9} {'fresh':>9} {'least to most':>18} {'kept':>6} {'step KL':>8} {'seconds':>8}")
    for rows in zip(*studies, strict=True):
        promised, fresh, kl, seconds = (
            [row[name] for row in rows] for name in ("batch_gain", "fresh_gain", "step_kl", "seconds")
        )
        print(
            f"{rows[0]['rule']:36} {statistics.mean(promised):>9.4f} {statistics.mean(fresh):>9.4f} "
            f"{f'{min(fresh):.4f} to {max(fresh):.4f}':>18} {statistics.mean(fresh) / statistics.mean(promised):>6.0%} "
            f"{statistics.mean(kl):>8.4f} {statistics.mean(seconds):>8.1f}"
        )


if __name__ == "__main__":
    main()

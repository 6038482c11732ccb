"""Ours in `lm_training.py`: python language_ours.py RULE SETTINGS, in turns with the peers.

RULE is one of `RULES`: the update, then `own_critic` (a model of its own, as trl's PPO has) or `grouped` (no critic).
TRPO's update section is the demo's, and `ppo_trust` the one Adam step under a hard bound of `sentiment_long.yaml`; the
rest is what the peers have as well.
"""

from __future__ import annotations

import json
import sys

import torch
from language_turns import Settings, Turns  # beside this file

from lm_trust.training.build import build_world
from lm_trust.training.config import LanguageConfig
from lm_trust.training.trainer import Trainer

RULES = ("trpo", "ppo_trust", "ppo", "ppo_own_critic", "trpo_grouped", "ppo_trust_grouped", "ppo_grouped")


def build(rule: str, settings: Settings) -> Trainer:
    grouped = rule.endswith("grouped")
    updates = {
        "trpo": {"kind": "trpo", "max_kl": 0.02, "damping": 0.1, "cg_iterations": 2, "fisher_fraction": 0.25},
        "ppo_trust": {"kind": "ppo_trust", "max_kl": 0.02, "epochs": 1, "minibatches": 1, "learning_rate": 0.003},
        "ppo": {
            "kind": "ppo_clip",
            "clip": settings.clip,
            "epochs": settings.epochs,
            "minibatches": 1,
            "learning_rate": settings.learning_rate,
        },
    }
    gae = {"kind": "gae", "gamma": 1.0, "lam": settings.lam, "whiten": True}
    critic = {"kind": "reference_head"}
    if rule == "ppo_own_critic":
        lora = {"r": settings.rank, "alpha": settings.alpha, "targets": list(settings.targets)}
        critic = {"kind": "model", **lora, "epochs": settings.epochs, "minibatches": 1}
    config = {
        "iterations": 10**6,  # nothing here is annealed
        "model": {
            "path": settings.policy,
            "lora": {"r": settings.rank, "alpha": settings.alpha, "targets": list(settings.targets)},
        },
        "prompts": {"path": settings.prompts},
        "rollout": {
            "batch_size": settings.rows,
            "samples_per_prompt": settings.group if grouped else 1,
            "max_new_tokens": settings.steps,
            "microbatch_size": settings.microbatch,
        },
        "rewards": [
            {"kind": "function", "name": "language_turns:variety"}
            if grouped
            else {"kind": "classifier", "path": settings.reward_model}
        ],
        "advantage": {"kind": "leave_one_out"} if grouped else gae,
        "critic": {"kind": "none"} if grouped else critic,
        "update": updates[rule.removesuffix("_own_critic").removesuffix("_grouped")],
        "reference": {"penalty": settings.penalty},
    }
    return build_world(LanguageConfig.model_validate(config)).trainer


def main() -> None:
    turns = Turns()
    rule, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    if rule not in RULES:
        raise SystemExit(f"RULE is one of {', '.join(RULES)}, got {rule!r}")
    torch.use_deterministic_algorithms(True, warn_only=True)  # as `lm-trust train`
    trainer = build(rule, settings)
    turns.ready()
    while True:
        line = trainer.iterate()
        if line["completion_length"] != settings.steps:
            raise SystemExit(f"completions of {line['completion_length']:.2f} tokens instead of {settings.steps}")
        turns.done()


if __name__ == "__main__":
    main()

"""Processes that are forks of a server which has imported everything: each takes a fraction of a second to start."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("pandas", "lm_trust.cli", "lm_trust.training.run", "lm_trust.training.plots"),
        *(f"lm_trust.control.{name}" for name in ("environments", "normaliser", "policies", "rollout", "saving")),
        *(f"lm_trust.lm.{name}" for name in ("loading", "rewards", "rollout", "saving")),
    ]
)

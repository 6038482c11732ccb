"""`lm-trust` commands as forks of a server that has imported what they need: that takes seconds, and is done once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

# Elsewhere a fork of what has been imported is not safe, and each process imports for itself.
FORKS = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
FORKS.set_forkserver_preload(
    [
        *("lm_trust.cli", "lm_trust.training.run", "lm_trust.training.completion_table"),
        *(f"lm_trust.control.{name}" for name in ("environments", "normaliser", "policies", "rollout", "saving")),
        *(f"lm_trust.lm.{name}" for name in ("engines", "loading", "rewards", "rollout", "saving", "value_model")),
        "torch._inductor.config",  # which every optimizer of torch imports, when it is made
    ]
)


def start(arguments: Sequence[str], log: Path, *, threads: int) -> BaseProcess:
    """Begin `lm-trust ARGUMENTS` in a session of its own; its exit code is the command's.

    Args:
        arguments: of the command.
        log: what it prints is added to this file.
        threads: that it computes with, where OMP_NUM_THREADS does not say.
    """
    process = FORKS.Process(target=_run, args=(list(arguments), log, dict(os.environ), threads))
    process.start()
    return process


def _run(arguments: list[str], log: Path, environment: dict[str, str], threads: int) -> None:
    import torch

    from lm_trust.cli import main

    os.setsid()  # a Ctrl-C at the terminal reaches it once, through who started it
    os.environ |= {"OMP_NUM_THREADS": str(threads)} | environment | {"COLUMNS": "80"}
    # The server's torch has read that variable already; it may be a list, one number a level of nesting.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    with log.open("ab") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    sys.exit(main(arguments))

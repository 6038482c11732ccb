"""What ours and the peers have in common in `lm_training.py`: settings, the plain reward, and taking turns.

Nothing of lm_trust or trl is imported here: each side has an environment of its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import IO

from measuring import peak_memory, start_of_memory, synchronize  # beside this file
from torch import nn

# In seconds. The processor's, of all threads, does not count what other programs take of it.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Settings:
    """What every competitor is given; models, prompts and reward model are in `folder`."""

    folder: str
    targets: tuple[str, ...]  # the modules with an adapter
    rows: int = 64  # completions an iteration
    prompt: int = 16  # tokens of a prompt
    steps: int = 48  # tokens of a completion, none of which ends early
    group: int = 4  # completions of a prompt, where the baseline is the others
    epochs: int = 4
    microbatch: int = 16  # sequences differentiated at a time
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 3e-4
    clip: float = 0.2
    penalty: float = 0.05  # coefficient of the reference KL
    lam: float = 0.95

    @property
    def policy(self) -> str:
        return f"{self.folder}/policy"

    @property
    def reward_model(self) -> str:
        return f"{self.folder}/reward_model"

    @property
    def prompts(self) -> str:
        return f"{self.folder}/prompts.jsonl"


def variety(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """The plain reward: the share of characters, which are tokens here, that a completion has only once."""
    return [len(set(text)) / max(len(text), 1) for text in completions]


class Turns:
    """A competitor's side of taking turns: it waits for a line on stdin, works, and reports in a line of JSON.

    What libraries print goes to stderr instead.
    """

    def __init__(self) -> None:
        self._reports: IO[str] = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._started: dict[str, float] = {}

    def ready(self) -> None:
        """Everything is loaded: report the memory that is held, then wait."""
        for thing in gc.get_objects():
            if issubclass(type(thing), nn.Module):
                for parameter in thing.parameters(recurse=False):
                    parameter.detach().sum()  # weights that lie in a mapped file count once they were read
        self._report(mib=start_of_memory())

    def done(self) -> None:
        """An iteration is done: report it, then wait."""
        synchronize()
        self._report(mib=peak_memory(), **{clock: read() - self._started[clock] for clock, read in CLOCKS.items()})

    def _report(self, **line: float) -> None:
        print(json.dumps(line), file=self._reports)
        if not sys.stdin.readline():
            sys.exit()
        self._started = {clock: read() for clock, read in CLOCKS.items()}

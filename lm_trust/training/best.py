"""best/: the policy of the best held-out evaluation so far, with that evaluation, beside the last one.

Each of its files is replaced by one rename, the policy before the evaluation that it is known by, so that a kill at
any moment leaves a policy that can be loaded.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_trust.errors import UserError
from lm_trust.training.run_folder import RunFolder, json_text, read_json

NAME, EVALUATION = "best", "evaluation.json"


def best_folder(run: Path) -> Path:
    """Where the best policy of a run lies.

    Raises:
        UserError: the run has none yet.
    """
    if not (run / NAME / EVALUATION).is_file():
        raise UserError(f"{run}: no best policy; a run keeps one from its first evaluation on (evaluation.every)")
    return run / NAME


class Best:
    """Keeps a run's best policy.

    Args:
        folder: the run's.
        save_policy: writes the policy, with its normaliser, into a folder.
        resumed: whether what lies there is of this run; otherwise it is removed.

    Raises:
        UserError: the evaluation of this run's best policy is not whole.
    """

    def __init__(self, folder: RunFolder, save_policy: Callable[[Path], None], *, resumed: bool) -> None:
        self._folder, self._save_policy = folder, save_policy
        self._path = folder.path / NAME
        self.reward: float | None = None
        if not resumed:
            shutil.rmtree(self._path, ignore_errors=True)
        elif (self._path / EVALUATION).is_file():
            self.reward = read_json(self._path / EVALUATION).get("reward_mean")

    def offer(self, evaluation: dict[str, Any]) -> None:
        """Keep the policy as it is now if its `reward_mean` is above all before it.

        Args:
            evaluation: the policy's, with `iteration` and `steps`.

        Raises:
            UserError: it cannot be written; the best so far is still there.
        """
        reward = evaluation["reward_mean"]
        if reward is None or not math.isfinite(reward) or (self.reward is not None and reward <= self.reward):
            return
        aside = self._path.with_name(f".{NAME}.tmp")
        with self._folder.writing(NAME):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            self._save_policy(aside)
            (aside / EVALUATION).write_text(json_text(evaluation), encoding="utf-8")
            _move_in(aside, self._path)
        self.reward = reward


def _move_in(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for file in sorted(files, key=lambda file: (file.name == EVALUATION, file)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
    shutil.rmtree(source)
    for stale in {path.relative_to(target) for path in target.rglob("*") if path.is_file()} - files:
        (target / stale).unlink()  # a card that a finished run wrote for the policy before

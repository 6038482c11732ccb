"""Where a run's numbers also go: TensorBoard, Weights & Biases, Trackio, by way of accelerate's tracker classes.

metrics.jsonl stays the record. A tracker that cannot be started is the user's error; one that fails later, because a
network does, is warned of once and left, and the run goes on.
Importing this module loads none of them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_trust.errors import UserError, first_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "lm-trust"  # where the environment names none
IDENTITY = "trackers.json"  # in the run folder: what a resumed run is found by

_CRITIC = {"value_loss", "explained_variance"}
_TIME = {"iteration", "steps", "steps_per_second"}
_ROLLOUT = ("reward", "episode", "completion", "reference_kl", "truncated_fraction", "entropy")

logger = logging.getLogger(__name__)


def check_installed(names: Sequence[str]) -> None:
    """Cheap enough to be asked before anything loads.

    Raises:
        UserError: a tracker's package is missing.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        # wandb leaves a folder `wandb` in the working directory, which Python takes for a package without a file.
        if spec is None or spec.origin is None:
            raise UserError(f"trackers: {name} is not installed; pip install {name}, or leave it out of trackers")


def iteration_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl under names that a dashboard groups: rollout/reward_mean, update/step_kl.

    Text, unknown numbers and those that are not finite are left out; True is 1.
    """
    return {f"{_group(key)}/{key}": float(value) for key, value in metrics.items() if _is_number(value)}


def evaluation_values(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation, likewise: evaluation/reward_mean; its interval as reward_low and reward_high."""
    low, high = record.get("reward_interval") or (None, None)
    numbers = {**record, "reward_low": low, "reward_high": high}
    return {
        f"evaluation/{key}": float(value)
        for key, value in numbers.items()
        if key not in ("iteration", "steps") and _is_number(value)
    }


class Trackers:
    """The trackers of one run.

    Args:
        names: of tensorboard, wandb and trackio.
        folder: the run folder; TensorBoard's event files go into its `tensorboard/`.
        hyperparameters: the resolved configuration by dotted keys.
        resume_at: the first step that is still to come where a run goes on; None for a new run. What TensorBoard has
            at this step and beyond will be done again and is purged.

    Raises:
        UserError: one cannot be started.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, hyperparameters: Mapping[str, object], *, resume_at: int | None = None
    ) -> None:
        self._running: dict[str, GeneralTracker] = {}
        if resume_at is None:
            (folder / IDENTITY).unlink(missing_ok=True)
        if names:
            from accelerate import PartialState

            # accelerate's trackers refuse to work before the process has this; alone, it starts nothing.
            PartialState()
        for name in dict.fromkeys(names):
            try:
                tracker = _MAKERS[name](folder, hyperparameters, resume_at)
                tracker.start()
                self._running[name] = tracker
                if name == "tensorboard":
                    _add_hyperparameters(tracker.tracker, hyperparameters)
            except Exception as error:
                self.close()
                raise UserError(f"trackers: {name} could not be started ({first_line(error)})") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the values to every tracker that still works."""
        for name, tracker in list(self._running.items()):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:
                del self._running[name]
                logger.warning(
                    "the tracker %s failed (%s); the run goes on without it, metrics.jsonl is complete",
                    name,
                    first_line(error),
                )

    def close(self) -> None:
        """Let every tracker finish."""
        while self._running:
            name, tracker = self._running.popitem()
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("the tracker %s could not be closed (%s)", name, first_line(error))


def _tensorboard(folder: Path, hyperparameters: Mapping[str, object], resume_at: int | None) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", folder, purge_step=resume_at)


def _wandb(folder: Path, hyperparameters: Mapping[str, object], resume_at: int | None) -> GeneralTracker:
    from accelerate.tracking import WandBTracker

    return WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=_identity(folder),
        resume="allow",
        dir=str(folder),
        config=dict(hyperparameters),
    )


def _trackio(folder: Path, hyperparameters: Mapping[str, object], resume_at: int | None) -> GeneralTracker:
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(
        os.environ.get("TRACKIO_PROJECT", PROJECT),
        # A run is found again by its name alone, and folders of one name may be many.
        name=f"{folder.name}-{_identity(folder)}",
        resume="allow",
        config=dict(hyperparameters),
    )


_MAKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def _identity(folder: Path) -> str:
    """What the run is called at a tracker's server: one name for all, kept for the day when the run goes on."""
    path = folder / IDENTITY
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    identity = uuid.uuid4().hex[:8]
    path.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")
    return identity


def _add_hyperparameters(writer: Any, hyperparameters: Mapping[str, object]) -> None:
    """Put them into the run's own event file; accelerate's way would show each start as one more, empty run."""
    from torch.utils.tensorboard.summary import hparams

    values = {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in hyperparameters.items()
    }
    for summary in hparams(values, {"rollout/reward_mean": None, "evaluation/reward_mean": None}):
        writer.file_writer.add_summary(summary)
    writer.flush()


def _group(key: str) -> str:
    if key in _TIME or key.endswith("_seconds"):
        return "time"
    if key in _CRITIC:
        return "critic"
    return "rollout" if key.startswith(_ROLLOUT) and key != "reference_kl_after" else "update"


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)

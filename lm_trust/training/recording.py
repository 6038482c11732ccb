"""All that is noted of a run while it trains: its metrics, its episodes, its evaluations, its best policy."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from lm_trust.training.best import Best
from lm_trust.training.build import World
from lm_trust.training.config import Config, ControlConfig
from lm_trust.training.config_leaves import leaves
from lm_trust.training.monitor import Monitor
from lm_trust.training.run_folder import RunFolder
from lm_trust.training.trackers import Trackers, evaluation_values, iteration_values


class Recorder:
    """Sends a run's numbers to its folder and its trackers; a context manager.

    The trackers' axis is what people of each world expect: environment steps in control, iterations in language.

    Args:
        config: the run's.
        world: at the iteration that the run starts or goes on from.
        folder: the run's; what lies beyond that iteration has been dropped from its metrics.
        resumed: whether the run goes on.

    Raises:
        UserError: a tracker cannot be started, or the folder cannot be written.
    """

    def __init__(self, config: Config, world: World, folder: RunFolder, *, resumed: bool) -> None:
        self._trainer, self._folder = world.trainer, folder
        self._control = isinstance(config, ControlConfig)
        if self._trainer.iteration < self._trainer.iterations:
            self._go_on_from_the_end()
        self._best = Best(folder, world.save_policy, resumed=resumed)
        self._monitor = None
        if isinstance(config, ControlConfig):
            steps = self._trainer.task.steps if resumed else None
            self._monitor = Monitor(folder, config.environment.id, resume_at=steps)
        # The evaluation before training stands at step 0, and a run that goes on from there makes it again.
        next_step = self._step + 1 if self._trainer.iteration else 0
        self._trackers = Trackers(
            config.trackers, folder.path, leaves(config.model_dump()), resume_at=next_step if resumed else None
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._trackers.close()

    def iteration(self, metrics: dict[str, Any]) -> None:
        """Note an iteration's line of metrics and the episodes that it finished."""
        self._folder.append_metrics(metrics)
        if self._monitor is not None:
            self._monitor.append(self._trainer.task.finished_episodes)
        self._trackers.log(iteration_values(metrics), self._step)

    def evaluation_before(self, record: dict[str, Any]) -> None:
        """Note the evaluation before training."""
        self._folder.write_evaluation({"before": record})
        self._trackers.log(evaluation_values(record), self._step)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Note a periodic evaluation, and keep the policy if it is the best so far."""
        self._folder.append_evaluation(self._evaluation_line(record))
        self._trackers.log(evaluation_values(record), self._step)
        self._best.offer(self._located(record))

    def evaluation_after(self, record: dict[str, Any]) -> None:
        """Note the evaluation after training, and keep the policy if it is the best so far."""
        noted = self._folder.evaluation()
        # A finished run that is resumed does nothing but this again, and the trackers have it.
        if "after" not in noted:
            self._trackers.log(evaluation_values(record), self._step)
        self._folder.write_evaluation(noted | {"after": record})
        self._best.offer(self._located(record))

    def _go_on_from_the_end(self) -> None:
        """Where a finished run is made longer, the evaluation of its end is one of its course from now on."""
        after = self._folder.evaluation().get("after")
        if after is None:
            return
        if self._trainer.iteration not in [line["iteration"] for line in self._folder.evaluations()]:
            self._folder.append_evaluation(self._evaluation_line(after))
        self._folder.forget_end()

    def _evaluation_line(self, record: dict[str, Any]) -> dict[str, Any]:
        """An evaluation as a line of evaluations.jsonl: where it stands, and its numbers of all samples or episodes."""
        return {key: value for key, value in self._located(record).items() if key not in ("samples", "returns")}

    def _located(self, record: dict[str, Any]) -> dict[str, Any]:
        return {"iteration": self._trainer.iteration, "steps": self._trainer.task.steps, **record}

    @property
    def _step(self) -> int:
        return self._trainer.task.steps if self._control else self._trainer.iteration

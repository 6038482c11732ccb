"""Evaluated episodes of a control run to look at: which are filmed or played, and when.

How is `lm_trust.control.video`'s business; gymnasium is imported only where there is something to watch.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lm_trust.errors import UserError
from lm_trust.terminal import say
from lm_trust.training.build import World
from lm_trust.training.config import Config, ControlConfig

if TYPE_CHECKING:
    from lm_trust.control.rollout import ControlTask


def check_videos(config: Config) -> None:
    """Before training: can what `evaluation.videos` asks for be had?

    Raises:
        UserError: no; it names what is missing.
    """
    if isinstance(config, ControlConfig) and config.evaluation.videos:
        from lm_trust.control.video import check_films

        check_films(*_environment(config))


def film_iteration(config: Config, world: World, run: Path) -> None:
    """Film the first episodes of the evaluation that has just been, where `evaluation.videos` asks for it.

    Raises:
        UserError: a film cannot be made or written.
    """
    if isinstance(config, ControlConfig) and config.evaluation.videos:
        from lm_trust.control.video import film

        name = f"iteration-{world.trainer.iteration:08d}"
        film(*_environment(config), world.trainer.task.remembered(), run / "videos", name)


def to_watch(config: Config, run: Path, *, count: int, videos: int, render: bool) -> Config:
    """The configuration of an evaluation whose episodes are to be watched, or of one that nobody watches.

    Args:
        config: of the run.
        run: its folder, for messages.
        count: episodes that will be evaluated.
        videos: how many of them will be filmed.
        render: they will be played in a window.

    Raises:
        UserError: they cannot be watched, found out before they are played.
    """
    if not isinstance(config, ControlConfig):
        if videos or render:
            option = "--render" if render else "--videos"
            raise UserError(f"{option}: {run} is a language run; only the episodes of a control run can be watched")
        return config
    if videos > count:
        raise UserError(f"--videos: {videos} is more than the {count} episodes of the evaluation; raise --count")
    if videos or render:
        from lm_trust.control.video import check_films, open_window

        if videos:
            check_films(*_environment(config))
        if render:
            open_window(*_environment(config)).close()
    evaluation = config.evaluation.model_copy(update={"videos": count if render else videos})
    return config.model_copy(update={"evaluation": evaluation})


def watch(config: Config, task: ControlTask, run: Path, *, videos: int, render: bool, console: Console) -> None:
    """Film and play what the task has just evaluated, as `to_watch` was told.

    Raises:
        UserError: a film cannot be made or written.
    """
    if not (videos or render):
        return
    from lm_trust.control.video import film, open_window, show

    episodes = task.remembered()
    if videos:
        film(*_environment(config), episodes[:videos], run / "videos", "evaluation")
        say(f"Films: {run / 'videos'}", console)
    if render:
        say("Playing the episodes in a window; Ctrl-C ends it.", console)
        with closing(open_window(*_environment(config))) as env:
            for number, episode in enumerate(episodes):
                steps = len(episode.actions)
                say(f"episode {number}: return {episode.total:.6g}, {steps} steps", console)
                show(config.environment.id, env, episode)


def _environment(config: ControlConfig) -> tuple[str, dict[str, Any]]:
    return config.environment.id, config.environment.arguments

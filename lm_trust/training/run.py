"""A run from its configuration to its trained policy: the loop, what is noted on the way, how it stops and goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import torch
from rich.console import Console

from lm_trust.core.processes import in_the_first, process_index
from lm_trust.errors import UserError, first_line
from lm_trust.launching import join_processes, leave_processes
from lm_trust.terminal import say
from lm_trust.training.build import World, build_world
from lm_trust.training.checkpoint import holds_checkpoint, load_checkpoint, save_checkpoint
from lm_trust.training.completion_table import show_completions, write_completions
from lm_trust.training.config import Config, LanguageConfig
from lm_trust.training.config_file import dump
from lm_trust.training.config_language import CompletionTable
from lm_trust.training.interruption import Interruption
from lm_trust.training.model_card import write_cards
from lm_trust.training.plots import learning_curve
from lm_trust.training.progress import Progress
from lm_trust.training.recording import Recorder
from lm_trust.training.run_folder import RunFolder
from lm_trust.training.stopping import Ending, Stopping, stopping_of
from lm_trust.training.summary import print_summary
from lm_trust.training.trainer import Trainer
from lm_trust.training.watching import check_videos, film_iteration
from lm_trust.training.wrappers import check_wrappers


def train(config: Config, output: Path, resume: Path | None = None) -> int:
    """Train to the end, to a limit of the `stop` section, or to the first Ctrl-C or SIGTERM.

    Where a launcher has started several processes, each of them calls this, and the first one alone writes and speaks.

    Args:
        config: validated.
        output: the run folder.
        resume: a run folder to go on from; its newest whole checkpoint is taken. A run that ended before its first
            checkpoint begins again.

    Returns:
        The exit status: 0, or 130 / 143 after a signal.

    Raises:
        UserError: something that the user can mend; what was done so far is in a checkpoint.
    """
    check_wrappers(config)
    join_processes()
    try:
        folder = RunFolder(output)
        if process_index() == 0:
            with folder.claimed():
                return _train(config, folder, resume)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return _train(config, folder, resume)
    finally:
        leave_processes()


def _train(config: Config, folder: RunFolder, resume: Path | None) -> int:
    console = Console()
    # Determinism is worth more than the speed of kernels that may change from run to run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    world = build_world(config)
    trainer = world.trainer
    first = process_index() == 0
    try:
        check_videos(config)
        if resume is not None:
            checkpoints = RunFolder(resume).checkpoints
            if in_the_first(lambda: holds_checkpoint(checkpoints)):
                _restore(trainer, checkpoints)
                _check_length(config, trainer)
            else:
                say("There is no checkpoint yet: the run begins again.", console)
        if first:
            if resume is not None:
                folder.forget_after(trainer.iteration)
            folder.write_config(dump(config))
            folder.note_chats(world.kind == "language" and trainer.task.training.prompts.all_chats)
        noting = Recorder(config, world, folder, resumed=resume is not None) if first else nullcontext()
        with noting as recorder, Interruption() as interruption:
            if world.kind == "language" and trainer.iteration == 0:
                say("Evaluating the policy before training ...", console)
                before = trainer.task.evaluate(trainer.policy, config.evaluation.count)
                if first:
                    recorder.evaluation_before(before)
            _iterate(config, world, folder, recorder, console, interruption)
            if interruption.requested():
                _save(config, world, folder)
                say(
                    f"{interruption.signal.name}: stopped after iteration {trainer.iteration} of {trainer.iterations}. "
                    f"Go on with: lm-trust train --resume {config.output}",
                    console,
                )
                return interruption.exit_status
            _finish(config, world, folder, recorder, console)
        return 0
    finally:
        trainer.task.close()


def _restore(trainer: Trainer, checkpoints: Path) -> None:
    state = load_checkpoint(checkpoints)
    try:
        trainer.load_state_dict(state)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume: {checkpoints} is of another model or configuration ({first_line(error)})"
        ) from error


def _check_length(config: Config, trainer: Trainer) -> None:
    """A run that is resumed cannot be made shorter than it is.

    Raises:
        UserError: it is to have fewer iterations than its checkpoint has.
    """
    if trainer.iteration <= trainer.iterations:
        return
    if isinstance(config, LanguageConfig):
        key, given, least = "iterations", config.iterations, trainer.iteration
    else:
        key, given, least = "total_steps", config.total_steps, trainer.task.steps
    raise UserError(f"--resume: {key} is {given} and the run has {least} behind it; give at least {least}, or leave it")


def _iterate(
    config: Config,
    world: World,
    folder: RunFolder,
    recorder: Recorder | None,
    console: Console,
    interruption: Interruption,
) -> None:
    trainer = world.trainer
    stopping = stopping_of(config)
    tables = config.completions if isinstance(config, LanguageConfig) else CompletionTable(every=0)
    with Progress(
        trainer.iterations,
        step_kl_bound=world.step_kl_bound,
        world=world.kind,
        console=console,
        completed=trainer.iteration,
    ) as progress:
        if trainer.iteration < trainer.iterations:
            ending = in_the_first(lambda: _ended_before(folder, stopping))
            if ending is not None:
                progress.message(_stopped(trainer, ending))
                return
        while trainer.iteration < trainer.iterations and not interruption.requested():
            with _saving(config, world, folder, f"iteration {trainer.iteration + 1}", collecting=True):
                metrics = trainer.iterate()
            if recorder is not None:
                recorder.iteration(metrics)
            progress.update(metrics)
            is_last = trainer.iteration == trainer.iterations
            ending = None if is_last else stopping.after(metrics)
            if tables.every and (is_last or ending or trainer.iteration % tables.every == 0):
                samples = trainer.samples_of_all()
                if recorder is not None:
                    write_completions(folder, trainer.iteration, samples)
                    show_completions(trainer.iteration, samples, tables.show, console)
            if ending is not None and ending.failed:
                with _saving(config, world, folder, f"iteration {trainer.iteration}"):
                    raise UserError(ending.words)
            if ending is not None:
                progress.message(_stopped(trainer, ending))
                return
            if _due(config.evaluation.every, trainer.iteration, trainer.iterations):
                with _saving(config, world, folder, f"evaluation after iteration {trainer.iteration}"):
                    _evaluate(config, world, folder, recorder)
            if _due(config.checkpoint.every, trainer.iteration, trainer.iterations):
                _save(config, world, folder)


def _evaluate(config: Config, world: World, folder: RunFolder, recorder: Recorder | None) -> None:
    """A periodic evaluation; what fails where the first process notes and films it fails in all of them."""
    trainer = world.trainer
    record = trainer.task.evaluate(trainer.policy, config.evaluation.count)

    def note() -> None:
        recorder.evaluation(record)
        film_iteration(config, world, folder.path)

    in_the_first(note)


def _ended_before(folder: RunFolder, stopping: Stopping) -> Ending | None:
    """Whether a run that is resumed is beyond a limit already."""
    done = folder.metrics()
    return stopping.reached(done[-1]) if done else None


def _stopped(trainer: Trainer, ending: Ending) -> str:
    return f"Stopped after iteration {trainer.iteration} of {trainer.iterations}: {ending.words}"


@contextmanager
def _saving(config: Config, world: World, folder: RunFolder, when: str, *, collecting: bool = False) -> Iterator[None]:
    """What fails within the context leaves a checkpoint, and says so where the error is the user's.

    Args:
        config, world, folder: the run's.
        when: for the message.
        collecting: only while a rollout is collected; beyond that, policy and critic may have learnt a part.
    """
    try:
        yield
    except Exception as error:
        if collecting and not world.trainer.collecting:
            raise
        _save(config, world, folder)
        if isinstance(error, UserError):
            raise UserError(f"{error} ({when}; a checkpoint was written)") from error
        raise


def _finish(config: Config, world: World, folder: RunFolder, recorder: Recorder | None, console: Console) -> None:
    """Save the policy, evaluate it held out, draw the learning curve, print the table."""
    trainer = world.trainer
    _save(config, world, folder)
    after = trainer.task.evaluate(trainer.policy, config.evaluation.count)
    if recorder is None:
        return
    recorder.evaluation_after(after)
    with folder.writing(folder.learning_curve.name):
        learning_curve(
            folder.metrics(),
            folder.learning_curve,
            step_kl_bound=world.step_kl_bound,
            title=folder.path.name,
            reward_label="reward" if world.kind == "language" else "episode return",
            evaluations=folder.held_out(),
        )
    if isinstance(config, LanguageConfig):
        write_cards(config, world.policy_name, folder)
    print_summary(folder.evaluation(), console, world=world.kind)
    film_iteration(config, world, folder.path)
    say(f"Run folder: {config.output}", console)


def _save(config: Config, world: World, folder: RunFolder) -> None:
    """Write checkpoint and policy, by the first process; all of them give their part of the state."""
    trainer = world.trainer
    state = trainer.state_dict()
    if process_index() > 0:
        return
    save_checkpoint(
        folder.checkpoints,
        state,
        iteration=trainer.iteration,
        keep_last=config.checkpoint.keep_last,
    )
    with folder.writing(world.policy_name):
        world.save_policy(folder.path)


def _due(every: int, iteration: int, iterations: int) -> bool:
    """The end has its own evaluation and checkpoint."""
    return bool(every) and iteration % every == 0 and iteration < iterations

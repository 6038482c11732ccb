"""What the command line does with a run: train it, evaluate it, generate from it, merge its adapter."""

from __future__ import annotations

import os
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
from rich.console import Console

from lm_trust.core.processes import in_the_first, process_index
from lm_trust.errors import UserError, first_line
from lm_trust.launching import join_processes, leave_processes
from lm_trust.training.best import best_folder
from lm_trust.training.build import World, build_language_policy, build_tokenizer, build_world
from lm_trust.training.checkpoint import holds_checkpoint, load_checkpoint, save_checkpoint
from lm_trust.training.completion_table import show_completions, write_completions
from lm_trust.training.config import Config, LanguageConfig
from lm_trust.training.config_file import dump, load_config
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
from lm_trust.training.watching import check_videos, film_iteration, to_watch, watch
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
                console.print("There is no checkpoint yet: the run begins again.", highlight=False)
        if first:
            if resume is not None:
                folder.forget_after(trainer.iteration)
            folder.write_config(dump(config))
            folder.note_chats(world.kind == "language" and trainer.task.training.prompts.all_chats)
        noting = Recorder(config, world, folder, resumed=resume is not None) if first else nullcontext()
        with noting as recorder, Interruption() as interruption:
            if world.kind == "language" and trainer.iteration == 0:
                console.print("Evaluating the policy before training ...", highlight=False)
                before = trainer.task.evaluate(trainer.policy, config.evaluation.count)
                if first:
                    recorder.evaluation_before(before)
            _iterate(config, world, folder, recorder, console, interruption)
            if interruption.requested():
                _save(config, world, folder)
                console.print(
                    f"{interruption.signal.name}: stopped after iteration {trainer.iteration} of {trainer.iterations}. "
                    f"Go on with: lm-trust train --resume {folder.path}",
                    highlight=False,
                    soft_wrap=True,
                )
                return interruption.exit_status
            _finish(config, world, folder, recorder, console)
        return 0
    finally:
        trainer.task.close()


def evaluate(run: Path, count: int | None = None, best: bool = False, *, videos: int = 0, render: bool = False) -> int:
    """Evaluate a run's policy anew and print the table; language: beside what the run noted from before training.

    Args:
        run: its folder.
        count: episodes or completions; as in the run's configuration where None.
        best: the policy of the best evaluation instead of the last one.
        videos: control: how many of the episodes, from the first, are filmed to `videos/` in the folder.
        render: control: play the episodes in a window, one after another.

    Raises:
        UserError: the folder is not that of a run, has no best policy, or cannot be shown.
    """
    config, console = _config_of(run), Console()
    policy = best_folder(run) if best else run
    count = count or config.evaluation.count
    config = to_watch(config, run, count=count, videos=videos, render=render)
    world = build_world(config)
    world.load_policy(policy)
    trainer = world.trainer
    record = RunFolder(run).evaluation()
    sides = {"before": record["before"]} if "before" in record else {}
    sides["after"] = trainer.task.evaluate(trainer.policy, count)
    print_summary(sides, console, world=world.kind)
    watch(config, trainer.task, run, videos=videos, render=render, console=console)
    trainer.task.close()
    return 0


def generate(
    run: Path,
    prompt: str,
    count: int = 1,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    reference: bool = False,
    best: bool = False,
) -> int:
    """Print completions of a prompt by a run's last policy, by its best one, or by its frozen reference.

    The prompt is put as training put a row's text: into its template and the model's chat template where it used them,
    as a user's only message where its rows were chats.

    Raises:
        UserError: the folder is not that of a language run, or the prompt does not fit the model.
    """
    from lm_trust.core.seeding import make_generator
    from lm_trust.lm.encoding import encode
    from lm_trust.lm.generation import decode, eos_ids, sample_completions
    from lm_trust.lm.prompts import typed_prompt
    from lm_trust.lm.reasoning import fill
    from lm_trust.lm.saving import load_trained, trained_name

    # Only the model is needed: the prompts and the reward may have moved since.
    config = _config_of(run, check_files=False)
    if not isinstance(config, LanguageConfig):
        raise UserError(f"{run}: this is a control run; `generate` is for language runs")
    if not prompt:
        raise UserError("prompt: it is empty; give at least one character")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no text
        raise UserError("prompt: it is not text in UTF-8") from None
    limit = max_new_tokens or config.rollout.max_new_tokens
    tokenizer, context, vocabulary = build_tokenizer(config)
    template = getattr(config.prompts, "template", None)  # what training made of a problem, or of a row's text
    chat = config.prompts.chat or RunFolder(run).noted_chats
    typed = typed_prompt(prompt if template is None else fill(template, prompt), chat=chat)
    _, ids = encode(tokenizer, typed, context=context, vocabulary=vocabulary, max_new_tokens=limit)
    policy = build_language_policy(config)
    load_trained(policy, (best_folder(run) if best else run) / trained_name(policy))
    with policy.as_reference() if reference else nullcontext():
        completions = sample_completions(
            policy,
            ids * count,
            max_new_tokens=limit,
            eos_ids=eos_ids(tokenizer, policy),
            pad_id=tokenizer.pad_token_id,
            generator=make_generator(config.seed if seed is None else seed, "generate"),
        )
    for text in decode(tokenizer, completions):
        print(text if chat else prompt + text)  # an answer, or the text gone on with
    return 0


def merge(run: Path, output: Path | None = None, best: bool = False) -> int:
    """Write a run's last policy, or its best one, as a plain model, in `merged/` in the run's folder if nowhere else.

    Raises:
        UserError: the folder is not that of a language run with an adapter, or the output is not free.
    """
    from lm_trust.lm.merging import merge_adapter
    from lm_trust.lm.saving import ADAPTER, MODEL

    config = _config_of(run, check_files=False)
    if not isinstance(config, LanguageConfig):
        raise UserError(f"{run}: this is a control run; `merge` is for language runs")
    policy = best_folder(run) if best else run
    if config.model.lora is None:
        raise UserError(f"{run}: all weights were trained, so {policy / MODEL} is a plain model already; use that one")
    output = run / "merged" if output is None else output
    model = config.model
    merge_adapter(
        model.path,
        policy / ADAPTER,
        output,
        temperature=config.rollout.temperature,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    print(f"Merged model: {output}")
    return 0


def _config_of(run: Path, *, check_files: bool = True) -> Config:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder (it has no config.yaml)")
    return load_config(run / "config.yaml", check_files=check_files, saved=True)


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
            try:
                metrics = trainer.iterate()
            except Exception as error:
                if trainer.collecting:
                    _save(config, world, folder)
                    if isinstance(error, UserError):
                        raise _with_checkpoint(error, f"iteration {trainer.iteration + 1}") from error
                raise
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
                _save(config, world, folder)
                raise _with_checkpoint(UserError(ending.words), f"iteration {trainer.iteration}")
            if ending is not None:
                progress.message(_stopped(trainer, ending))
                return
            if _due(config.evaluation.every, trainer.iteration, trainer.iterations):
                try:
                    _evaluate(config, world, folder, recorder)
                except Exception as error:
                    _save(config, world, folder)
                    if isinstance(error, UserError):
                        raise _with_checkpoint(error, f"evaluation after iteration {trainer.iteration}") from error
                    raise
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


def _with_checkpoint(error: UserError, when: str) -> UserError:
    return UserError(f"{error} ({when}; a checkpoint was written)")


def _finish(config: Config, world: World, folder: RunFolder, recorder: Recorder | None, console: Console) -> None:
    """Save the policy, evaluate it held out, draw the learning curve, print the table."""
    trainer = world.trainer
    _save(config, world, folder)
    after = trainer.task.evaluate(trainer.policy, config.evaluation.count)
    if recorder is None:
        return
    recorder.evaluation_after(after)
    evaluations = [line for line in folder.evaluations() if line["iteration"] < trainer.iteration]
    evaluations.append(recorder.evaluation_line(after))
    before = folder.evaluation().get("before")
    if before is not None:
        evaluations.insert(0, {"iteration": 0, "steps": 0, **before})
    with folder.writing(folder.learning_curve.name):
        learning_curve(
            folder.metrics(),
            folder.learning_curve,
            step_kl_bound=world.step_kl_bound,
            title=folder.path.name,
            reward_label="reward" if world.kind == "language" else "episode return",
            evaluations=evaluations,
        )
    if isinstance(config, LanguageConfig):
        write_cards(config, world.policy_name, folder)
    print_summary(folder.evaluation(), console, world=world.kind)
    film_iteration(config, world, folder.path)
    console.print(f"Run folder: {folder.path}", highlight=False, soft_wrap=True)


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

"""The command line: `lm-trust train | launch | evaluate | generate | plot | compare | config` and others.

What can be checked without loading a model is checked before anything heavy is imported, and what is wrong is
told in `error:` lines on stderr with status 2. A run that a signal stopped exits with 130 (Ctrl-C) or 143
(SIGTERM).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm_trust.arguments import make_parser, split_overrides
from lm_trust.errors import UserError
from lm_trust.launching import is_first_process, launch
from lm_trust.training.config_leaves import MAY_DIFFER, MAY_DIFFER_IN_REWARDS, course, differing_keys

if TYPE_CHECKING:
    from lm_trust.training.config import Config

# The commands whose config's keys may stand on the command line.
_WITH_CONFIG = ("train", "sft", "reward-model", "compare")
# What a resumed run may change besides: how long it is, how it is evaluated, and where the same files lie now.
_MAY_CHANGE = (
    *MAY_DIFFER,
    "iterations",
    "total_steps",
    "evaluation.",
    "stop.",
    "critic.path",
    "model.path",
    "model.adapter",
    "prompts.path",
    "prompts.heldout",
)
# How the same rows are named depends on where they lie: a file has neither subsets nor splits.
_MAY_CHANGE_WITH_PROMPTS = ("prompts.subset", "prompts.split", "prompts.heldout_subset", "prompts.heldout_split")
_MAY_CHANGE_IN_REWARDS = (*MAY_DIFFER_IN_REWARDS, "path", "ratings", "embedder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        overrides: list[tuple[str, str]] = []
        if given[:1] and given[0] in _WITH_CONFIG:
            given, overrides = split_overrides(given)
        parsed = make_parser().parse_args(given)
        if parsed.command == "train":
            return _train(parsed, overrides)
        if parsed.command in ("sft", "reward-model"):
            return _stage(parsed, overrides)
        if parsed.command == "compare":
            return _compare(parsed, overrides)
        commands = {
            "launch": _launch,
            "evaluate": _evaluate,
            "generate": _generate,
            "merge": _merge,
            "plot": _plot,
            "config": _config,
        }
        return commands[parsed.command](parsed)
    except UserError as error:
        if not is_first_process():  # what stops one process stops all (`together`), and the first one tells
            return 2
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the runner takes over the signals; nothing has been done yet
        return 130
    except BrokenPipeError:  # `lm-trust config language | head`
        if given[:1] and given[0] in _WITH_CONFIG:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train(parsed: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    config, output, resume = _resolved(parsed, overrides)

    from lm_trust.training.run import train

    return train(config, output, resume)


def _resolved(parsed: argparse.Namespace, overrides: list[tuple[str, str]]) -> tuple[Config, Path, Path | None]:
    """What `train` is asked for: the configuration, the run folder, and the run to go on from."""
    from lm_trust.training.config_file import load_config
    from lm_trust.training.trackers import check_installed

    if parsed.output == "":
        raise UserError("--output: must not be empty")
    if parsed.resume is None:
        if parsed.config is None:
            raise UserError("give a CONFIG file, or --resume DIR; see lm-trust train --help")
        config = load_config(parsed.config, overrides)
        output, resume = Path(parsed.output or config.output).expanduser(), None
        _check_output(output, f"continue it with --resume {output}")
    else:
        output = resume = _run_folder(parsed.resume)
        if parsed.output is not None and Path(parsed.output).expanduser().resolve() != resume.resolve():
            raise UserError("--output: a resumed run goes on in its own folder; leave out --output or --resume")
        config = load_config(parsed.config or resume / "config.yaml", overrides)
        _check_unchanged(config, load_config(resume / "config.yaml", check_files=False, saved=True), resume)
    config = config.model_copy(update={"output": str(output)})
    check_installed(config.trackers)
    return config, output, resume


def _launch(parsed: argparse.Namespace) -> int:
    if parsed.training[:1] != ["train"]:
        raise UserError("launch: what is launched is `train ...`, as in lm-trust launch --processes 2 train CONFIG")
    # What is wrong with the command line or the config is told once, and before anything starts.
    given, overrides = split_overrides(parsed.training)
    _resolved(make_parser().parse_args(given), overrides)
    return launch(parsed.training, processes=parsed.processes, config_file=parsed.accelerate_config)


def _stage(parsed: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from lm_trust.training.config_file import load_config
    from lm_trust.training.config_stages import RewardModelConfig, SftConfig

    if parsed.output == "":
        raise UserError("--output: must not be empty")
    config = load_config(parsed.config, overrides, root=SftConfig if parsed.command == "sft" else RewardModelConfig)
    output = Path(parsed.output or config.output).expanduser()
    _check_output(output, "remove it")
    config = config.model_copy(update={"output": str(output)})

    if parsed.command == "sft":
        from lm_trust.stages.sft import sft as stage
    else:
        from lm_trust.stages.reward_model import reward_model as stage

    return stage(config, output)


def _compare(parsed: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from lm_trust.compare.config import load_comparison

    if parsed.output == "":
        raise UserError("--output: must not be empty")
    comparison = load_comparison(parsed.config, overrides, parsed.output)

    from lm_trust.compare.run import compare, replot

    return replot(comparison.output) if parsed.plot_only else compare(comparison)


def _evaluate(parsed: argparse.Namespace) -> int:
    from lm_trust.training.config_file import load_config

    run = _run_folder(parsed.run)
    load_config(run / "config.yaml", saved=True)  # here: a wrong file is told before anything heavy is imported

    from lm_trust.training.trained import evaluate

    return evaluate(run, parsed.count, parsed.best, videos=parsed.videos, render=parsed.render)


def _generate(parsed: argparse.Namespace) -> int:
    from lm_trust.training.config import LanguageConfig
    from lm_trust.training.config_file import load_config

    run = _run_folder(parsed.run)
    if not isinstance(load_config(run / "config.yaml", check_files=False, saved=True), LanguageConfig):
        raise UserError(f"{run}: this is a control run; generate needs a language run")
    if not parsed.prompt:
        raise UserError("PROMPT: must not be empty")

    from lm_trust.training.trained import generate

    return generate(run, parsed.prompt, parsed.count, parsed.max_new_tokens, parsed.seed, parsed.reference, parsed.best)


def _merge(parsed: argparse.Namespace) -> int:
    run = _run_folder(parsed.run)
    if parsed.output == "":
        raise UserError("--output: must not be empty")

    from lm_trust.training.trained import merge

    return merge(run, None if parsed.output is None else Path(parsed.output).expanduser(), parsed.best)


def _plot(parsed: argparse.Namespace) -> int:
    runs = [_run_folder(run) for run in parsed.runs]

    from lm_trust.terminal import say
    from lm_trust.training.compare_curves import plot_runs

    output = Path(parsed.output).expanduser()
    for line in plot_runs(runs, output, metric=parsed.metric, x=parsed.x):
        say(line)
    say(f"Picture: {output}")
    return 0


def _config(parsed: argparse.Namespace) -> int:
    from lm_trust.compare.config import CompareConfig
    from lm_trust.training.config import ControlConfig, LanguageConfig
    from lm_trust.training.config_help import key_listing
    from lm_trust.training.config_stages import RewardModelConfig, SftConfig

    roots = {
        "language": LanguageConfig,
        "control": ControlConfig,
        "compare": CompareConfig,
        "sft": SftConfig,
        "reward-model": RewardModelConfig,
    }
    print(key_listing(roots[parsed.world]), flush=True)
    return 0


def _run_folder(given: str) -> Path:
    run = Path(os.path.expanduser(given))
    if not os.path.isdir(run):
        raise UserError(f"{given}: no such run folder")
    if not os.path.isfile(run / "config.yaml"):
        raise UserError(f"{given}: not a run folder: it holds no config.yaml")
    return run


def _check_output(output: Path, instead: str) -> None:
    """A new run never writes over an old one; of several processes the first one looks, and may then write."""
    if not is_first_process():
        return
    if os.path.exists(output / "metrics.jsonl"):
        raise UserError(f"output: {output} already holds a run; {instead}, or choose another --output")
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"output: {output} is a file; choose another --output")


def _check_unchanged(config: Config, saved: Config, run: Path) -> None:
    """A resumed run is the same run: only what does not touch its course may change."""
    if type(config) is not type(saved):
        raise UserError(f"--resume: {run} is a run of the other world; give its own CONFIG, or none")
    now, then = (course(one.model_dump(), _MAY_CHANGE_IN_REWARDS) for one in (config, saved))
    moved = any(then.get(key) != now.get(key) for key in ("prompts.path", "prompts.heldout"))
    changed = [
        f"--resume: {key} is {then.get(key)!r} in {run} and {now.get(key)!r} here; "
        "it cannot change in a resumed run, start a new one instead"
        for key in differing_keys(then, now, (*_MAY_CHANGE, *(_MAY_CHANGE_WITH_PROMPTS if moved else ())))
    ]
    if changed:
        raise UserError("\n".join(changed))

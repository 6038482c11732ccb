"""The command line's language: its options, its help, and the config keys that may stand among them."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from lm_trust import __version__
from lm_trust import help_texts as texts
from lm_trust.errors import UserError, did_you_mean

# The options beside a CONFIG that are not keys of it (`--output` is one, and text whatever it looks like).
_VALUE_OPTIONS = ("--output", "--resume")
_FLAGS = ("--help", "--plot-only")


class _Parser(argparse.ArgumentParser):
    """argparse, with wrong usage as one line like every other error."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's; what is unknown to a command is told by that command and not by the whole program."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            meant = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        if re.match(r"unrecognized arguments: --\w+\.", message):
            message += " (a config's keys are set where it trains; here are options, such as evaluate's --count)"
        raise UserError(f"{' '.join(message.split())}; see {self.prog} --help")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take `--section.key VALUE` and `--section.key=VALUE` out of the arguments.

    argparse cannot: it would take the value of an option that it does not know for CONFIG.
    The argument after a key is its value whatever it starts with, unless it looks like the next `--option`.

    Returns:
        The other arguments, and the (key, value) pairs in their order.

    Raises:
        UserError: a key without a value.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    waiting = list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        name, equals, value = argument.partition("=")
        if argument == "--":
            return [*rest, argument, *reversed(waiting)], overrides
        if not argument.startswith("--") or name in _FLAGS:
            rest.append(argument)
        elif name in _VALUE_OPTIONS:
            rest += [argument] if equals or not waiting else [argument, waiting.pop()]
        else:
            near = difflib.get_close_matches(name, (*_VALUE_OPTIONS, *_FLAGS), n=1, cutoff=0.8)
            if near:
                raise UserError(f"command line: {name}: unknown option; did you mean {near[0]}?")
            if not equals:
                if not waiting or re.match(r"--[A-Za-z]", waiting[-1]):
                    raise UserError(f"command line: {name}: a value is missing, as in {name} VALUE")
                value = waiting.pop()
            overrides.append((name[2:], value))
    return rest, overrides


_Commands = argparse._SubParsersAction  # what `add_subparsers` returns


def make_parser() -> argparse.ArgumentParser:
    """The parser of everything but overrides; wrong usage is a UserError."""
    parser = _Parser(
        prog="lm-trust",
        description=texts.DESCRIPTION,
        epilog=texts.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lm-trust {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    _add_train(commands)
    _add_launch(commands)
    _add_stages(commands)
    _add_evaluate(commands)
    _add_generate(commands)
    _add_merge(commands)
    _add_plot(commands)
    _add_compare(commands)
    _add_config(commands)
    return parser


def _add_train(commands: _Commands) -> None:
    train = _command(
        commands,
        "train",
        "train as a config file says",
        texts.TRAIN,
        texts.TRAIN_EXAMPLES,
        "CONFIG [--output DIR] [--section.key VALUE ...]\n"
        "       lm-trust train [CONFIG] --resume DIR [--section.key VALUE ...]",
    )
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; with --resume, the run's own")
    train.add_argument("--output", metavar="DIR", help="run folder (default: runs/NAME for a CONFIG NAME.yaml)")
    train.add_argument(
        "--resume", metavar="DIR", help="go on with the run in this folder, exactly where its checkpoint is"
    )
    train.add_argument(
        "--section.key", metavar="VALUE", dest="_override", help="set a key of the config, as often as needed"
    )


def _add_launch(commands: _Commands) -> None:
    launched = _command(
        commands,
        "launch",
        "train in several processes",
        texts.LAUNCH,
        texts.LAUNCH_EXAMPLES,
        "[--processes N] [--accelerate-config FILE] train ...",
    )
    launched.add_argument("--processes", type=_positive, metavar="N", help="how many (default: the number of GPUs)")
    launched.add_argument(
        "--accelerate-config", metavar="FILE", help="made by `accelerate config`: several machines, FSDP"
    )
    launched.add_argument("training", nargs=argparse.REMAINDER, metavar="train ...", help="as without launch")


def _add_stages(commands: _Commands) -> None:
    for name, summary, text, examples in (
        ("sft", "fine-tune a language model on texts", texts.SFT, texts.SFT_EXAMPLES),
        ("reward-model", "train a reward model on preferences", texts.REWARD_MODEL, texts.REWARD_MODEL_EXAMPLES),
    ):
        stage = _command(commands, name, summary, text, examples, "CONFIG [--output DIR] [--section.key VALUE ...]")
        _add_config_file(stage, "run folder", "--section.key")


def _add_evaluate(commands: _Commands) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        "evaluate a trained policy",
        texts.EVALUATE,
        texts.EVALUATE_EXAMPLES,
        "RUN [--count N] [--best]\n                         [--videos N] [--render]",
    )
    evaluate.add_argument("run", metavar="RUN", help="run folder")
    evaluate.add_argument(
        "--count",
        type=_positive,
        metavar="N",
        help="completions of held-out prompts, or episodes (default: as in the config)",
    )
    evaluate.add_argument("--best", action="store_true", help="the policy of the run's best evaluation, not its last")
    evaluate.add_argument(
        "--videos",
        type=_positive,
        default=0,
        metavar="N",
        help="film the first N episodes of a control run to RUN/videos",
    )
    evaluate.add_argument("--render", action="store_true", help="play the episodes of a control run in a window")


def _add_generate(commands: _Commands) -> None:
    generate = _command(
        commands,
        "generate",
        "print completions by a trained language model",
        texts.GENERATE,
        texts.GENERATE_EXAMPLES,
        'RUN "PROMPT" [--count N] [--max-new-tokens N]\n                         [--seed N] [--best | --reference]',
    )
    generate.add_argument("run", metavar="RUN", help="run folder of a language run")
    generate.add_argument("prompt", metavar="PROMPT", help="text to go on from")
    generate.add_argument("--count", type=_positive, default=1, metavar="N", help="completions (default: 1)")
    generate.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="longest completion (default: as in the run's config)",
    )
    generate.add_argument(
        "--seed",
        type=_seed,
        metavar="N",
        help="of the sampling (default: the run's); the same seed, the same text",
    )
    which = generate.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="by the policy of the run's best evaluation instead")
    which.add_argument("--reference", action="store_true", help="by the model that training started from instead")


def _add_merge(commands: _Commands) -> None:
    merge = _command(
        commands,
        "merge",
        "write a run's model with its adapter merged",
        texts.MERGE,
        texts.MERGE_EXAMPLES,
        "RUN [--output DIR] [--best]",
    )
    merge.add_argument("run", metavar="RUN", help="run folder of a language run")
    merge.add_argument("--output", metavar="DIR", help="a new or empty folder (default: RUN/merged)")
    merge.add_argument("--best", action="store_true", help="the policy of the run's best evaluation, not its last")


def _add_plot(commands: _Commands) -> None:
    plot = _command(
        commands,
        "plot",
        "draw learning curves of several runs",
        texts.PLOT,
        texts.PLOT_EXAMPLES,
        "RUN... [--output FILE.png] [--metric KEY] [--x AXIS]",
    )
    plot.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    plot.add_argument("--output", default="curves.png", metavar="FILE.png", help="the picture (default: curves.png)")
    plot.add_argument(
        "--metric",
        default="reward_mean",
        metavar="KEY",
        help="a key of metrics.jsonl, or evaluation/KEY for one of the held-out evaluations (default: reward_mean)",
    )
    plot.add_argument(
        "--x", choices=("steps", "iteration", "seconds"), default="steps", help="the other axis (default: steps)"
    )


def _add_compare(commands: _Commands) -> None:
    compare = _command(
        commands,
        "compare",
        "compare update rules, matched by KL",
        texts.COMPARE,
        texts.COMPARE_EXAMPLES,
        "CONFIG [--output DIR] [--plot-only] [--key VALUE ...]",
    )
    _add_config_file(compare, "its folder", "--key")
    compare.add_argument("--plot-only", action="store_true", help="make the page again from what is in the folder")


def _add_config(commands: _Commands) -> None:
    worlds = ("language", "control", "compare", "sft", "reward-model")
    config = _command(
        commands, "config", "list the keys of a config", texts.CONFIG, texts.CONFIG_EXAMPLES, f"{{{','.join(worlds)}}}"
    )
    config.add_argument("world", choices=worlds, help="the kind of run")


def _command(
    commands: _Commands, name: str, summary: str, text: str, examples: str, usage: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=examples,
        usage=f"lm-trust {name} {usage}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_config_file(parser: argparse.ArgumentParser, folder: str, key: str) -> None:
    """CONFIG, its output folder, and the option that stands for all of its keys."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("--output", metavar="DIR", help=f"{folder} (default: runs/NAME for a CONFIG NAME.yaml)")
    parser.add_argument(key, metavar="VALUE", dest="_override", help="set a key of the config, as often as needed")


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)

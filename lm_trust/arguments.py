"""The command line's language: its options, its help, and the config keys that may stand among them."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from lm_trust import __version__
from lm_trust.errors import UserError

_DESCRIPTION = """\
Train a language model or a control policy with updates that keep to a bound,
in nats, on how far the policy may move.
"""
_EXAMPLES = """\
examples:
  lm-trust train configs/control/cartpole_trpo.yaml
  lm-trust train configs/lm/sentiment_trpo.yaml --update.max_kl 0.02
  lm-trust evaluate runs/sentiment_trpo
  lm-trust generate runs/sentiment_trpo "The film was"
  lm-trust plot runs/cartpole_trpo runs/cartpole_ppo
  lm-trust sft configs/lm/pipeline/sft.yaml
  lm-trust reward-model configs/lm/pipeline/reward_model.yaml

`lm-trust COMMAND --help` tells more of each.
"""
_TRAIN = """\
Train as the YAML file CONFIG says and write a run folder: config.yaml
(resolved), metrics.jsonl (a line an iteration), evaluation.json, checkpoints/
and the policy (adapter/, model/ or policy.safetensors; that of the best
evaluation is in best/). TensorBoard's files are in tensorboard/ (see the key
trackers), and a control run's finished episodes in monitor.csv.

Every key of the config can be set here too, by its dotted name; the value is
YAML. Setting another `kind` replaces that section with the kind's defaults.
`lm-trust config language` and `lm-trust config control` list all keys.

Ctrl-C and SIGTERM finish the iteration, write a checkpoint and exit with
status 130 or 143.
"""
_TRAIN_EXAMPLES = """\
examples:
  lm-trust train configs/lm/sentiment_trpo.yaml
  lm-trust train configs/lm/sentiment_trpo.yaml --seed 1 --output runs/second
  lm-trust train configs/control/cartpole_trpo.yaml --update.kind ppo_clip
  lm-trust train configs/control/cartpole_trpo.yaml --policy.log_std -0.5
  lm-trust train configs/lm/sentiment_trpo.yaml --rewards.0.weight 2
  lm-trust train --resume runs/sentiment_trpo
  lm-trust train --resume runs/sentiment_trpo --iterations 60
"""
_EVALUATE = """\
Evaluate a trained policy again: a language model on the held-out prompts of
its run, beside the model it started from; a control policy on fresh episodes,
without exploration.
"""
_EVALUATE_EXAMPLES = """\
examples:
  lm-trust evaluate runs/sentiment_trpo
  lm-trust evaluate runs/cartpole_trpo --count 100
  lm-trust evaluate runs/cartpole_trpo --videos 3
  lm-trust evaluate runs/cartpole_trpo --render
  lm-trust evaluate runs/cartpole_trpo --best
"""
_GENERATE = """\
Print completions of a prompt by the language model of a run.
"""
_GENERATE_EXAMPLES = """\
examples:
  lm-trust generate runs/sentiment_trpo "The film was"
  lm-trust generate runs/sentiment_trpo "The film was" --count 4 --seed 1
  lm-trust generate runs/sentiment_trpo "The film was" --reference
  lm-trust generate runs/sentiment_trpo -- "-- a prompt that starts with a dash"
"""
_MERGE = """\
Add the adapter of a language run into its base model's weights and write the
result as a plain model: safetensors, tokenizer and generation config, which
`AutoModelForCausalLM.from_pretrained` and `generate` take alone.
"""
_MERGE_EXAMPLES = """\
examples:
  lm-trust merge runs/sentiment_trpo
  lm-trust merge runs/sentiment_trpo --best --output models/sentiment
"""
_PLOT = """\
Draw learning curves of several runs into one picture. Runs that differ in
nothing but their seed are one curve: their mean, with its 95 % interval
(Student's t). The legend names what differs between the curves.
"""
_PLOT_EXAMPLES = """\
examples:
  lm-trust plot runs/cartpole_trpo runs/cartpole_ppo
  lm-trust plot runs/hopper_* --output hopper.png --x seconds
  lm-trust plot runs/hopper_* --metric evaluation/reward_mean
"""
_SFT = """\
Fine-tune a language model on texts, by trl's SFTTrainer, and write a run
folder: config.yaml (resolved), metrics.jsonl (a line an update),
evaluation.json (held-out loss and perplexity, before and after),
learning_curve.png and adapter/, a plain PEFT adapter that `lm-trust train`
starts from by --model.adapter (model/ where model.lora is null).

A row of the data is a `text`, a `prompt` with its `completion` (which alone is
learnt), or a list of chat `messages`. Every key of the config can be set here
too, by its dotted name; `lm-trust config sft` lists them all.

Ctrl-C and SIGTERM finish the update, write the adapter as it is and exit with
status 130 or 143.
"""
_SFT_EXAMPLES = """\
examples:
  lm-trust sft configs/lm/pipeline/sft.yaml
  lm-trust sft my.yaml --data.path my.jsonl --training.epochs 3
  lm-trust sft my.yaml --training.max_steps 5 --output runs/trial
  lm-trust train configs/lm/pipeline/trpo.yaml --model.adapter runs/sft/adapter
"""
_REWARD_MODEL = """\
Train a reward model on preference pairs, by trl's RewardTrainer, and write a
run folder: config.yaml (resolved), metrics.jsonl (a line an update),
evaluation.json (held-out accuracy and margin, before and after),
learning_curve.png and adapter/, a plain PEFT adapter with its score head and
tokenizer (model/ where model.lora is null), which is a reward by itself:

  rewards: [{kind: classifier, path: runs/reward_model/adapter}]

A row of the data has `chosen` and `rejected` and, where both go on from one, a
`prompt`: texts or lists of chat messages. Every key of the config can be set
here too, by its dotted name; `lm-trust config reward-model` lists them all.

Ctrl-C and SIGTERM finish the update, write the adapter as it is and exit with
status 130 or 143.
"""
_REWARD_MODEL_EXAMPLES = """\
examples:
  lm-trust reward-model configs/lm/pipeline/reward_model.yaml
  lm-trust reward-model my.yaml --data.path pairs.jsonl --model.path gpt2
  lm-trust reward-model my.yaml --training.max_steps 5 --output runs/trial
"""
_CONFIG = """\
List every key of a config with its default and its meaning. A config with an
`environment` section is a control run, one with a `model` section a language
run; the configs of `lm-trust sft` and `lm-trust reward-model` have a `data`
section. In a file the keys nest; on the command line they are dotted:
`update: {max_kl: 0.02}` is --update.max_kl 0.02.

`extends: other.yaml` at the top of a file takes that file's keys (the name is
relative to the file). Sections merge; lists, values and sections of another
`kind` replace.
"""
_CONFIG_EXAMPLES = """\
examples:
  lm-trust config language
  lm-trust config control
  lm-trust config sft
"""

# The options beside a CONFIG that are not keys of it (`--output` is one, and text whatever it looks like).
_VALUE_OPTIONS = ("--output", "--resume")
_FLAGS = ("--help",)


class _Parser(argparse.ArgumentParser):
    """argparse, with wrong usage as one line like every other error."""

    def error(self, message: str) -> NoReturn:
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


def make_parser() -> argparse.ArgumentParser:
    """The parser of everything but overrides; wrong usage is a UserError."""
    parser = _Parser(
        prog="lm-trust",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lm-trust {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def command(name: str, summary: str, text: str, examples: str, usage: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=text,
            epilog=examples,
            usage=f"lm-trust {name} {usage}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    train = command(
        "train",
        "train as a config file says",
        _TRAIN,
        _TRAIN_EXAMPLES,
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

    for name, summary, text, examples in (
        ("sft", "fine-tune a language model on texts", _SFT, _SFT_EXAMPLES),
        ("reward-model", "train a reward model on preferences", _REWARD_MODEL, _REWARD_MODEL_EXAMPLES),
    ):
        stage = command(name, summary, text, examples, "CONFIG [--output DIR] [--section.key VALUE ...]")
        stage.add_argument("config", metavar="CONFIG", help="YAML file")
        stage.add_argument("--output", metavar="DIR", help="run folder (default: runs/NAME for a CONFIG NAME.yaml)")
        stage.add_argument(
            "--section.key", metavar="VALUE", dest="_override", help="set a key of the config, as often as needed"
        )

    evaluate = command(
        "evaluate",
        "evaluate a trained policy",
        _EVALUATE,
        _EVALUATE_EXAMPLES,
        "RUN [--count N] [--best]\n                         [--videos N] [--render]",
    )
    evaluate.add_argument("run", metavar="RUN", help="run folder")
    evaluate.add_argument(
        "--count",
        type=_positive,
        metavar="N",
        help="held-out prompts or episodes (default: as in the run's config)",
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

    generate = command(
        "generate",
        "print completions by a trained language model",
        _GENERATE,
        _GENERATE_EXAMPLES,
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

    merge = command(
        "merge",
        "write a run's model with its adapter merged",
        _MERGE,
        _MERGE_EXAMPLES,
        "RUN [--output DIR] [--best]",
    )
    merge.add_argument("run", metavar="RUN", help="run folder of a language run")
    merge.add_argument("--output", metavar="DIR", help="a new or empty folder (default: RUN/merged)")
    merge.add_argument("--best", action="store_true", help="the policy of the run's best evaluation, not its last")

    plot = command(
        "plot",
        "draw learning curves of several runs",
        _PLOT,
        _PLOT_EXAMPLES,
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

    worlds = ("language", "control", "sft", "reward-model")
    config = command("config", "list the keys of a config", _CONFIG, _CONFIG_EXAMPLES, f"{{{','.join(worlds)}}}")
    config.add_argument("world", choices=worlds, help="the kind of run")
    return parser


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)

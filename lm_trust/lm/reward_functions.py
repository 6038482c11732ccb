"""Reward functions: the built-in ones, and the finding of those that a configuration names by a dotted path."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any

from lm_trust.errors import UserError, did_you_mean
from lm_trust.lm.reward_words import one_line, short
from lm_trust.user_code import import_user_module

Reward = Callable[..., Sequence | Awaitable[Sequence]]


@functools.cache
def _vader_analyser() -> Any:
    # Imported and built at the first use: reading the lexicon takes a moment, and only this reward needs it.
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: list[str], completions: list[str]) -> list[float]:
    """Sentiment of prompt + completion: VADER's compound score, in [-1, 1] (Hutto and Gilbert 2014)."""
    analyser = _vader_analyser()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return [analyser.polarity_scores(text)["compound"] for text in texts]


def length(completion_lengths: list[int]) -> list[float]:
    """Completion tokens, an end of sequence included."""
    return [float(tokens) for tokens in completion_lengths]


def missing_eos(completion_ended: list[bool]) -> list[float]:
    """The missing-EOS penalty: -1 for a completion that the length limit cut, 0 for one that ended by itself."""
    return [0.0 if ended else -1.0 for ended in completion_ended]


# A sign counts where no word or number stands right before it: the 3 of `5-3` is 3. Commas group thousands.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def exact_match(completions: list[str], answer: list) -> list[float]:
    """1 where the completion gives the sample's answer, else 0; nothing in between.

    It gives the answer where the two are the same text, white space at both ends aside, or where the answer is a
    number and the last number of the completion equals it. A number is ASCII digits with an optional sign, decimal
    fraction and commas between thousands, and does not begin inside a word: `1,234.50` equals 1234.5; in `x2` there
    is none.

    Raises:
        ValueError: a sample's answer is None, NaN or blank.
    """
    return [_gives(completion, wanted) for completion, wanted in zip(completions, answer, strict=True)]


def _gives(completion: str, answer: Any) -> float:
    wanted = str(answer).strip()
    if answer is None or not wanted or (isinstance(answer, float) and math.isnan(answer)):
        raise ValueError("the sample has no answer")
    if completion.strip() == wanted:
        return 1.0
    numbers = _NUMBER.findall(completion) if _NUMBER.fullmatch(wanted) else []
    return float(bool(numbers) and _value(numbers[-1]) == _value(wanted))


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


BUILT_IN: dict[str, Reward] = {
    "vader": vader,
    "length": length,
    "missing_eos": missing_eos,
    "exact_match": exact_match,
}


def resolve_reward(name: str, *, key: str = "rewards[0].name") -> Reward:
    """The reward function that a configuration names.

    Args:
        name: a built-in name, `package.module:function` or `package.module.function`; the working directory is
            importable, as with `python -m`.
        key: the configuration key that errors name.

    Raises:
        UserError: an unknown name, a module that cannot be imported, or a thing that is not callable.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not attribute:
        raise UserError(
            f"{key}: no built-in reward {name!r}{did_you_mean(name, BUILT_IN)}; "
            f"built-in: {', '.join(BUILT_IN)}; a function of your own is named package.module:function"
        )
    try:
        module = import_user_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{key}: importing {module_name!r} for the reward {name!r} raised {one_line(error)}; "
            f"modules are looked for in the working directory and among the installed packages"
        ) from error
    try:
        reward = functools.reduce(getattr, attribute.split("."), module)
    except Exception as error:  # a module may load its names lazily, and fail at it
        near = did_you_mean(attribute, [entry for entry, value in vars(module).items() if callable(value)])
        raise UserError(f"{key}: the module {module_name!r} has no function {attribute!r}{near}") from error
    if not callable(reward):
        raise UserError(
            f"{key}: {name!r} is {short(reward)}, not callable; name a function of (prompts, completions, **fields)"
        )
    return reward

"""Rewards: functions from (prompts, completions, sample fields) to numbers, and their weighted sum.

A reward is a plain function, in the shape that TRL's users know:

    def brevity(prompts: list[str], completions: list[str], **fields: list) -> list[float]: ...

It is called by keyword. Every other column of the prompts arrives under its own name, as a list of B values;
a function without `**fields` gets the columns that it names and no others. A configuration names it by a
built-in name or by a dotted path (`rewards: [{name: vader, weight: 1.0}, {name: my_package.scores:brevity,
weight: 0.5}]`).

What a reward returns is never repaired: a wrong count, a None or a NaN stops the run with the reward and the
sample.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_trust.errors import UserError
from lm_trust.user_code import import_user_module

Reward = Callable[..., Sequence[float]]


class RewardError(UserError):
    """A reward raised, or returned something other than one finite number for each completion."""


@dataclass(frozen=True)
class RewardScores:
    """What a batch of B completions scored.

    total: (B,) float64 on the CPU, the weighted sum.
    parts: each reward's own score by its name, (B,) float64, before its weight.
    """

    total: Tensor
    parts: dict[str, Tensor]


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


BUILT_IN: dict[str, Reward] = {"vader": vader}


def resolve_reward(name: str, *, key: str = "rewards[0].name") -> Reward:
    """The reward function that a configuration names.

    name: a built-in name, `package.module:function` or `package.module.function`; the working directory is
    importable, as with `python -m`. key: the configuration key that errors name.
    Raises UserError for an unknown name, a module that cannot be imported and a thing that is not callable.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not attribute:
        raise UserError(
            f"{key}: no built-in reward {name!r}{_did_you_mean(name, BUILT_IN)}; "
            f"built-in: {', '.join(BUILT_IN)}; a function of your own is named package.module:function"
        )
    try:
        module = import_user_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{key}: importing {module_name!r} for the reward {name!r} raised {_one_line(error)}; "
            f"modules are looked for in the working directory and among the installed packages"
        ) from error
    try:
        reward = functools.reduce(getattr, attribute.split("."), module)
    except Exception as error:  # a module may load its names lazily, and fail at it
        near = _did_you_mean(attribute, [entry for entry, value in vars(module).items() if callable(value)])
        raise UserError(f"{key}: the module {module_name!r} has no function {attribute!r}{near}") from error
    if not callable(reward):
        raise UserError(
            f"{key}: {name!r} is {_short(reward)}, not callable; name a function of (prompts, completions, **fields)"
        )
    return reward


@dataclass(frozen=True)
class _Part:
    key: str  # where in the configuration: "rewards[1]"
    name: str  # as configured
    label: str  # short and distinct: the name of the part in metrics
    weight: float
    function: Reward
    dense: bool

    def __str__(self) -> str:
        return f"reward {self.name!r} ({self.key})"


class WeightedRewards:
    """Several rewards as one: total = sum over the parts of weight x score.

    rewards: (name, weight) pairs in the configuration's order; a callable may stand in the place of a name. A third
    element, True, makes a reward dense: it scores unfinished texts too, and each token is paid the change it makes.
    Every name is resolved at once, so that a wrong one is found before any model loads. Parts are labelled by
    the last piece of their name, and a repeated label gets a number: `vader`, `vader_2`.
    """

    def __init__(self, rewards: Iterable[tuple[str | Reward, float] | tuple[str | Reward, float, bool]]) -> None:
        self._parts: list[_Part] = []
        for index, (name, weight, *dense) in enumerate(rewards):
            key = f"rewards[{index}]"
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise UserError(f"{key}.weight: {_short(weight)} is not a finite number")
            if isinstance(name, str):
                function = resolve_reward(name, key=f"{key}.name")
            else:
                function, name = name, getattr(name, "__name__", type(name).__name__)
            label = _distinct(name.replace(":", ".").rpartition(".")[2], self.names)
            self._parts.append(_Part(key, name, label, float(weight), function, any(dense)))
        if not self._parts:
            raise UserError("rewards: the list is empty; name at least one, such as {name: vader, weight: 1.0}")

    @property
    def names(self) -> list[str]:
        """The labels of the parts, distinct, in the configuration's order."""
        return [part.label for part in self._parts]

    @property
    def has_dense(self) -> bool:
        """Whether any part is dense."""
        return any(part.dense for part in self._parts)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise UserError where a reward takes a column that is not there: call it before models load."""
        columns = list(columns)
        for reserved in ("prompts", "completions"):
            if reserved in columns:
                raise UserError(f"the prompts have a column {reserved!r}, a name that rewards receive: rename it")
        for part in self._parts:
            missing = [name for name in _required(part.function) if name not in (*columns, "prompts", "completions")]
            if missing:
                raise UserError(
                    f"{part} takes {missing[0]!r}, which is neither 'prompts', 'completions' nor a column of "
                    f"the prompts{_did_you_mean(missing[0], columns)}; "
                    f"columns: {', '.join(columns) or 'none'}"
                )

    def score(
        self,
        prompts: list[str],
        completions: list[str],
        fields: Mapping[str, list] | None = None,
        *,
        dense_only: bool = False,
    ) -> RewardScores:
        """Score B completions.

        prompts, completions: B texts each. fields: the prompts' other columns, B values each. dense_only: ask the
        dense parts alone, for texts that are not finished.
        Raises RewardError, from the original exception where there is one, naming the reward and, where it
        can be found, the first offending sample.
        """
        samples: dict[str, list] = {**(fields or {})}
        self.check_columns(samples)
        samples |= {"prompts": prompts, "completions": completions}
        lengths = {name: len(column) for name, column in samples.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of unequal length: {lengths}")
        total = torch.zeros(len(completions), dtype=torch.float64)
        parts: dict[str, Tensor] = {}
        for part in self._parts:
            if dense_only and not part.dense:
                continue
            parts[part.label] = _score_part(part, samples)
            total = total + part.weight * parts[part.label]
        if not total.isfinite().all():
            index = int(total.isfinite().logical_not().nonzero()[0])
            raise RewardError(
                f"the weighted sum of the rewards overflows for {_sample(samples, index)}; lower the weights"
            )
        return RewardScores(total, parts)


def _score_part(part: _Part, samples: dict[str, list]) -> Tensor:
    count = len(samples["completions"])
    try:
        returned = _call(part.function, samples, 0, count)
    except Exception as error:
        index = _first_failure(part.function, samples, count)
        where = f"a batch of {count} samples" if index is None else _sample(samples, index)
        raise RewardError(
            f"{part} raised {_one_line(error)} on {where}; "
            "make it return a number for every text that the model can write, the empty one too"
        ) from error
    try:
        values = _as_list(returned)
    except Exception as error:
        raise RewardError(
            f"{part} returned {_short(returned)}, a {type(returned).__name__} that cannot be read: "
            f"{_one_line(error)}; return a list of {count} numbers, one for each completion"
        ) from error
    if len(values) != count:
        raise RewardError(
            f"{part} returned {len(values)} scores for {count} completions; return one for each, in their order"
        )
    scores = []
    for index, value in enumerate(values):
        problem, cause = None, None
        try:
            scores.append(_as_float(value))
            if not math.isfinite(scores[-1]):
                problem = _short(value)
        except Exception as error:
            problem, cause = f"{_short(value)} (a {type(value).__name__})", error
        if problem:
            raise RewardError(
                f"{part} returned {problem} for {_sample(samples, index)}; return one finite number for each completion"
            ) from cause
    return torch.tensor(scores, dtype=torch.float64)


def _call(function: Reward, samples: dict[str, list], start: int, stop: int) -> Any:
    """The reward of samples start to stop. It gets lists of its own: what it does to them stays there."""
    given = {name: column[start:stop] for name, column in samples.items()}
    parameters = _parameters(function)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        named = {parameter.name for parameter in parameters} if parameters else {"prompts", "completions"}
        given = {name: column for name, column in given.items() if name in named}
    return function(**given)


def _parameters(function: Reward) -> list[inspect.Parameter]:
    """What the function takes; empty where it does not tell, as many functions written in C do not."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _required(function: Reward) -> list[str]:
    return [
        parameter.name
        for parameter in _parameters(function)
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _first_failure(function: Reward, samples: dict[str, list], count: int) -> int | None:
    """The first sample on which the function raises, by halving: few calls, each sample about once more.

    None where no single sample raises alone, so that it is the batch, or chance, that made it fail.
    """

    def raises(start: int, stop: int) -> bool:
        try:
            _call(function, samples, start, stop)
        except Exception:
            return True
        return False

    if count <= 1:
        return 0 if count else None
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if raises(low, middle) else (middle, high)
    return low if raises(low, high) else None


def _as_list(values: Any) -> list:
    """A list, tuple, numpy array or tensor of one axis as a list; TypeError for anything else."""
    if isinstance(values, (list, tuple)):
        return list(values)
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    elif not isinstance(values, np.ndarray) or values.dtype.kind not in "biufO":
        raise TypeError("not a list, tuple, array or tensor of numbers")
    if values.ndim != 1:
        raise TypeError(f"its shape is {tuple(values.shape)}, with {values.ndim} axes in the place of 1")
    return values.tolist()


def _as_float(value: Any) -> float:
    """A real number, a numpy scalar or a tensor without axes as a float; TypeError for anything else."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (Real, np.bool_)):
        return float(value)
    raise TypeError("not a number")


def _sample(samples: dict[str, list], index: int) -> str:
    prompt, completion = samples["prompts"][index], samples["completions"][index]
    return f"sample {index}: prompt {_short(prompt)}, completion {_short(completion)}"


def _short(value: Any) -> str:
    """The value's repr on one line, cut in its middle to about 80 characters."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 80
    try:
        return " ".join(shortener.repr(value).split())
    except Exception:  # an object without a repr, inside a container that asks for it
        return f"<{type(value).__name__}>"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _distinct(label: str, taken: Sequence[str]) -> str:
    candidates = (label if number == 1 else f"{label}_{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)

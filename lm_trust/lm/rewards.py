"""Rewards: functions from (prompts, completions, sample fields) to numbers, and their weighted sum.

A reward is a plain function, in the shape that TRL's users know, or an async one:

    def brevity(prompts: list[str], completions: list[str], **fields: list) -> list[float]: ...

It is called by keyword. Every other column of the prompts arrives under its own name, as a list of B values;
a function without `**fields` gets the columns that it names and no others. These come besides:

- `completion_lengths`: B numbers of tokens, an end of sequence included.
- `completion_ended`: B booleans, False where the length limit cut the completion.
- `chats`: for each prompt its list of messages where it is a chat, of which `prompts` has the last user message, and
  None where it is a plain text.
- `completion_tokens`, with level token: for each completion the list of what its tokens added to the text. The
  function returns for each a list of as many numbers, and each token is paid its own.
- `steps`, with level step: for each completion the list of its steps (`text_pieces.cut_steps`). The function
  returns for each a list of as many numbers, each paid at the token that completes the step.

A configuration names a function by a built-in name or by a dotted path (`rewards: [{name: vader, weight: 1.0}, {name:
my_package.scores:brevity, weight: 0.5}]`). What a reward returns is never repaired: a wrong count, a None or a NaN
stops the run with the reward and the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from lm_trust.errors import UserError, did_you_mean
from lm_trust.lm.prompts import Chat
from lm_trust.lm.reward_answers import Question, RewardError, columns_taken, required_columns
from lm_trust.lm.reward_functions import Reward, resolve_reward
from lm_trust.lm.reward_process import RewardProcess
from lm_trust.lm.reward_words import sample_words, short
from lm_trust.lm.text_pieces import cut_steps

# When a reward pays: at the end of the text, for each token's change of the score so far, or for each token or step.
Pays = Literal["end", "change", "token", "step"]

_COLUMNS = ("prompts", "completions", "completion_lengths", "completion_ended", "chats")
_LEVEL_COLUMNS = {"sequence": (), "token": ("completion_tokens",), "step": ("steps",)}


@dataclass(frozen=True)
class RewardPart:
    """One reward of a weighted sum.

    Attributes:
        function: a name as in a configuration, or a callable.
        weight: its factor in the sum.
        dense: it scores unfinished texts too, and each token is paid the change it makes; with level sequence.
        level: what it gives numbers for.
        step_delimiter: ends a step, with level step.
        timeout, parallel: see `Question`.
        process, memory: see `RewardProcess`, which needs a name.
        label: what metrics call it; None: the last piece of the function's name.
    """

    function: str | Reward
    weight: float = 1.0
    dense: bool = False
    level: Literal["sequence", "token", "step"] = "sequence"
    step_delimiter: str = "\n"
    timeout: float | None = None
    parallel: int = 1
    process: bool = False
    memory: int | None = None
    label: str | None = None

    @property
    def pays(self) -> Pays:
        """When."""
        if self.level != "sequence":
            return self.level
        return "change" if self.dense else "end"


class DeferredReward:
    """A reward that is costly to make, such as one with a model: made by `load`, or when it is first asked."""

    def __init__(self, make: Callable[[], Reward]) -> None:
        self._make = make
        self._reward: Reward | None = None

    def load(self) -> Reward:
        """Make it, once."""
        if self._reward is None:
            self._reward = self._make()
        return self._reward

    def __call__(self, **columns: list) -> Sequence[float]:
        reward = self.load()
        return reward(**{name: columns[name] for name in columns_taken(reward, columns)})


@dataclass(frozen=True)
class RewardScores:
    """What a batch of B completions scored.

    Attributes:
        total: (B,) float64 on the CPU, the weighted sum.
        parts: each reward's own score by its label, (B,) float64, before its weight; of token and step rewards the sum.
        pieces: by label the B lists of numbers that token and step rewards gave.
    """

    total: Tensor
    parts: dict[str, Tensor]
    pieces: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    given: RewardPart
    label: str  # short and distinct: the name of the part in metrics
    question: Question

    @property
    def reserved(self) -> tuple[str, ...]:
        return (*_COLUMNS, *_LEVEL_COLUMNS[self.given.level])


class WeightedRewards:
    """Several rewards as one: total = sum over the parts of weight x score.

    Every name is resolved at once, so that a wrong one is found before any model loads. A repeated label gets a number:
    `vader`, `vader_2`.

    Args:
        rewards: parts in the configuration's order; a tuple (function, weight) or (function, weight, dense) may stand
            for one.
    """

    def __init__(self, rewards: Iterable[RewardPart | tuple[str | Reward, float] | tuple[str | Reward, float, bool]]):
        self._parts: list[_Part] = []
        for index, given in enumerate(rewards):
            part = given if isinstance(given, RewardPart) else RewardPart(*given)
            self._parts.append(_resolved(part, f"rewards[{index}]", self.names))
        if not self._parts:
            raise UserError("rewards: the list is empty; name at least one, such as {name: vader, weight: 1.0}")

    @property
    def names(self) -> list[str]:
        """The labels of the parts, distinct, in the configuration's order."""
        return [part.label for part in self._parts]

    @property
    def parts(self) -> dict[str, RewardPart]:
        """The parts by their labels."""
        return {part.label: part.given for part in self._parts}

    def pays_by(self, *pays: Pays) -> bool:
        """Whether any part pays in one of these ways."""
        return any(part.given.pays in pays for part in self._parts)

    def load(self) -> None:
        """Load what is costly: call it after the cheap checks of a run."""
        for part in self._parts:
            if isinstance(part.question.function, DeferredReward):
                part.question.function.load()

    def check_columns(self, columns: Iterable[str]) -> None:
        """See that the prompts have the columns that the rewards take; call it before models load.

        Raises:
            UserError: one is not there, or has a name under which rewards receive something else.
        """
        columns = list(columns)
        for part in self._parts:
            for name in part.reserved:
                if name in columns:
                    raise UserError(f"the prompts have a column {name!r}, a name that rewards receive: rename it")
            known = (*columns, *part.reserved)
            missing = [name for name in required_columns(part.question.function) if name not in known]
            if missing:
                raise UserError(
                    f"{part.question.name} takes {missing[0]!r}, which is neither "
                    f"{', '.join(map(repr, part.reserved))} nor a column of the prompts"
                    f"{did_you_mean(missing[0], columns)}; columns: {', '.join(columns) or 'none'}"
                )

    def score(
        self,
        prompts: list[str],
        completions: list[str],
        fields: Mapping[str, list] | None = None,
        *,
        lengths: list[int] | None = None,
        ended: list[bool] | None = None,
        chats: list[Chat | None] | None = None,
        tokens: list[list[str]] | None = None,
        pays: Collection[Pays] = get_args(Pays),
    ) -> RewardScores:
        """Score B completions.

        Args:
            prompts, completions: B texts each.
            fields: the prompts' other columns, B values each.
            lengths, ended, chats, tokens: the columns `completion_lengths`, `completion_ended`, `chats` and
                `completion_tokens`, needed where a reward takes them.
            pays: ask only the parts that pay in one of these ways, for texts that are not finished.

        Raises:
            RewardError: a reward failed; from the original exception where there is one. It names the reward and,
                where it can be found, the first offending sample.
        """
        self.check_columns(fields or ())
        samples: dict[str, list] = {**(fields or {}), "prompts": prompts, "completions": completions}
        known = {"completion_lengths": lengths, "completion_ended": ended, "chats": chats}
        samples |= {name: column for name, column in known.items() if column is not None}
        columns = {name: len(column) for name, column in samples.items()}
        if len(set(columns.values())) != 1:
            raise ValueError(f"columns of unequal length: {columns}")
        total = torch.zeros(len(completions), dtype=torch.float64)
        parts: dict[str, Tensor] = {}
        pieces: dict[str, list[list[float]]] = {}
        for part in self._parts:
            if part.given.pays not in pays:
                continue
            if part.given.level == "sequence":
                values = part.question.numbers(samples)
            else:
                pieces[part.label] = _ask_inside(part, samples, tokens)
                values = [sum(numbers) for numbers in pieces[part.label]]
            parts[part.label] = torch.tensor(values, dtype=torch.float64)
            total = total + part.given.weight * parts[part.label]
        if not total.isfinite().all():
            index = int(total.isfinite().logical_not().nonzero()[0])
            raise RewardError(
                f"the weighted sum of the rewards overflows for {sample_words(samples, index)}; lower the weights"
            )
        return RewardScores(total, parts, pieces)


def _resolved(part: RewardPart, key: str, taken: Sequence[str]) -> _Part:
    if not isinstance(part.weight, Real) or not math.isfinite(part.weight):
        raise UserError(f"{key}.weight: {short(part.weight)} is not a finite number")
    if not part.step_delimiter:
        raise UserError(f"{key}.step_delimiter: it is empty; give the text that ends a step")
    function, name = part.function, part.function
    if isinstance(name, str) and part.process:
        function = RewardProcess(name, key=key, timeout=part.timeout, memory=part.memory)
    elif isinstance(name, str):
        function = resolve_reward(name, key=f"{key}.name")
    elif part.process:
        raise UserError(
            f"{key}.process: a process of its own imports its function by a name; give package.module:function"
        )
    else:
        name = part.label or getattr(function, "__name__", type(function).__name__)
    label = _distinct(part.label or name.replace(":", ".").rpartition(".")[2], taken)
    return _Part(part, label, Question(function, f"reward {name!r} ({key})", part.timeout, part.parallel))


def _ask_inside(part: _Part, samples: dict[str, list], tokens: list[list[str]] | None) -> list[list[float]]:
    """For each sample one number for each of its tokens or steps."""
    level = part.given.level
    if level == "step":
        cut = [cut_steps(text, part.given.step_delimiter) for text in samples["completions"]]
        column = [[step for step, _ in steps] for steps in cut]
    elif tokens is None:
        raise ValueError("rewards of level token need the tokens' texts")
    else:
        column = tokens
    counts = [len(each) for each in column]
    return part.question.number_lists({**samples, _LEVEL_COLUMNS[level][0]: column}, counts, level)


def _distinct(label: str, taken: Sequence[str]) -> str:
    candidates = (label if number == 1 else f"{label}_{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)

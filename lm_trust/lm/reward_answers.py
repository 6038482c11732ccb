"""What one reward function says of a batch: called with the columns that it takes, and every answer checked.

Nothing is repaired. A call that raises, exceeds its time or ends its process, a wrong count, a None or a NaN is a
RewardError that names the reward and the first sample at fault.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from lm_trust.errors import UserError
from lm_trust.lm.reward_calls import CallTimeout, Outcome, run_calls
from lm_trust.lm.reward_functions import Reward
from lm_trust.lm.reward_process import Mishap, RewardProcess
from lm_trust.lm.reward_words import one_line, raised, sample_words, short

Samples = Mapping[str, list]
Answer = TypeVar("Answer")


class RewardError(UserError):
    """A reward raised, took too long, or returned something other than the finite numbers that were asked for."""


@dataclass(frozen=True)
class Question:
    """A reward function and how it is called.

    Attributes:
        function: sync or async.
        name: what errors call it.
        timeout: seconds a call may take; None: no limit.
        parallel: calls at once, each of one sample; 1: one call for all samples.
    """

    function: Reward
    name: str
    timeout: float | None = None
    parallel: int = 1

    def numbers(self, samples: Samples) -> list[float]:
        """One number a sample."""

        def read(value: Any, index: int) -> float:
            return self._number(value, samples, index, "", "one finite number for each completion")

        return self._answers(samples, read)

    def number_lists(self, samples: Samples, counts: list[int], unit: str) -> list[list[float]]:
        """`counts[i]` numbers of sample i, one for each of its `unit`s ("token" or "step")."""

        def read(value: Any, index: int) -> list[float]:
            wanted = f"a list with one finite number for each {unit} of it"
            try:
                listed = _as_list(value)
            except Exception as error:
                raise RewardError(
                    f"{self.name} returned {short(value)} for {sample_words(samples, index)}; return {wanted}"
                ) from error
            if len(listed) != counts[index]:
                raise RewardError(
                    f"{self.name} returned {len(listed)} numbers for the {counts[index]} {unit}s of "
                    f"{sample_words(samples, index)}; return {wanted}"
                )
            return [
                self._number(each, samples, index, f"{unit} {place} of ", wanted) for place, each in enumerate(listed)
            ]

        return self._answers(samples, read)

    def _answers(self, samples: Samples, read: Callable[[Any, int], Answer]) -> list[Answer]:
        """What `read` makes of each sample's answer; the first fault of all is raised."""
        count = len(samples["completions"])
        size = count if self.parallel == 1 else 1
        spans = [(start, start + size) for start in (range(count) if self.parallel > 1 else (0,))]
        calls = [_given(self.function, samples, *span) for span in spans]
        outcomes = self._run(calls)
        answers: list[Answer] = []
        for (start, stop), outcome in zip(spans, outcomes, strict=False):  # none follows a failed call
            if outcome.error is not None:
                raise self._failure(outcome.error, samples, start, stop) from outcome.error
            listed = self._listed(outcome.value, samples, start, stop)
            answers += [read(value, index) for index, value in enumerate(listed, start)]
        return answers

    def _failure(self, error: BaseException, samples: Samples, start: int, stop: int) -> RewardError:
        late = isinstance(error, CallTimeout)
        # A call that takes too long on many samples says nothing of any one of them.
        index = start if stop - start == 1 else None if late else self._first_failure(samples, stop)
        said = str(error) if isinstance(error, Mishap) else raised(error)
        where = f"a batch of {stop - start} samples" if index is None else sample_words(samples, index)
        if late:
            return RewardError(
                f"{self.name} did not return within {self.timeout:g} s on {where}; make it faster, or raise its timeout"
            )
        if index is None:
            return RewardError(
                f"{self.name} {said} on {where}, and on no part of it when it was asked again: it was the batch, or "
                "chance; have it try again what may fail"
            )
        return RewardError(
            f"{self.name} {said} on {where}; "
            "make it return a number for every text that the model can write, the empty one too"
        )

    def _first_failure(self, samples: Samples, count: int) -> int | None:
        """The first of `count` samples on which the function fails, by halving: each is asked about once more.

        None where no single sample fails alone, so that it is the batch, or chance, that made it fail.
        """

        def fails(start: int, stop: int) -> bool:
            call = _given(self.function, samples, start, stop)
            return self._run([call])[0].error is not None

        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fails(low, middle) else (middle, high)
        return low if count and fails(low, high) else None

    def _run(self, calls: list[dict[str, list]]) -> list[Outcome]:
        # A process ends its late calls itself.
        timeout = None if isinstance(self.function, RewardProcess) else self.timeout
        return run_calls(self.function, calls, timeout=timeout, parallel=self.parallel)

    def _listed(self, returned: Any, samples: Samples, start: int, stop: int) -> list:
        """The answers of samples start to stop as a list of as many."""
        count = stop - start
        try:
            listed = _as_list(returned)
        except Exception as error:
            raise RewardError(
                f"{self.name} returned {short(returned)}, a {type(returned).__name__} that cannot be read: "
                f"{one_line(error)}; return a list of {count} numbers, one for each completion"
            ) from error
        if len(listed) != count:
            where = f" (it was called for one, {sample_words(samples, start)})" if self.parallel > 1 else ""
            raise RewardError(
                f"{self.name} returned {len(listed)} scores for {count} completions{where}; "
                "return one for each, in their order"
            )
        return listed

    def _number(self, value: Any, samples: Samples, index: int, place: str, wanted: str) -> float:
        problem, cause = short(value), None
        try:
            number = _as_float(value)
            if math.isfinite(number):
                return number
        except Exception as error:
            problem, cause = f"{problem} (a {type(value).__name__})", error
        raise RewardError(
            f"{self.name} returned {problem} for {place}{sample_words(samples, index)}; return {wanted}"
        ) from cause


def required_columns(function: Reward) -> list[str]:
    """The columns without which the function cannot be called."""
    return [
        parameter.name
        for parameter in _parameters(function)
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def columns_taken(function: Reward, columns: Iterable[str]) -> list[str]:
    """Those of the columns that the function is called with; one with `**fields` takes all of them."""
    parameters = _parameters(function)
    named = {parameter.name for parameter in parameters} if parameters else {"prompts", "completions"}
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return [name for name in columns if everything or name in named]


def _given(function: Reward, samples: Samples, start: int, stop: int) -> dict[str, list]:
    """The columns that it takes of samples start to stop, lists of its own: what it does to or in them stays there."""
    return {
        name: [copy.deepcopy(value) if isinstance(value, dict | list) else value for value in samples[name][start:stop]]
        for name in columns_taken(function, samples)
    }


def _parameters(function: Reward) -> list[inspect.Parameter]:
    """What the function takes; empty where it does not tell, as many functions written in C do not."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


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

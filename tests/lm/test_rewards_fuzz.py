"""Anything at all from a reward: the numbers that it returned, exactly, or one plain line; never something else."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_trust.errors import UserError
from lm_trust.lm.rewards import RewardPart, WeightedRewards

# numpy and torch warn of what is put into their arrays here.
pytestmark = pytest.mark.filterwarnings("ignore")

FINITE = st.floats(-1e6, 1e6) | st.integers(-5, 5) | st.sampled_from([0.0, -0.0, 1e308, 5e-324, 10**300])
NUMBERS = (
    FINITE
    | st.booleans()
    | st.sampled_from([np.float16(0.5), np.float32(0.1), np.float64(-2), np.int8(3), np.uint64(2**63), np.bool_(True)])
    | st.sampled_from([torch.tensor(0.1), torch.tensor(7), torch.tensor(0.5, requires_grad=True), np.array(2.5)])
    | st.sampled_from([Fraction(1, 3), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(True)])
)


class Nasty:
    """Whatever it is asked, it fails."""

    def __float__(self):
        raise RuntimeError("no number\nfor you")

    def __repr__(self):
        raise RuntimeError("no words either")

    __len__ = __iter__ = __getitem__ = __str__ = __repr__


class WordlessError(Exception):
    """An error that cannot even be printed."""

    def __str__(self):
        raise RuntimeError("not printed")


NO_NUMBERS = [
    *(None, "", "1.5", b"1", 1j, [], [1.0], (2.0,), {}, {"score": 1.0}, object(), Nasty(), float, Ellipsis),
    *(math.nan, math.inf, -math.inf, 10**400, Decimal("0.5"), np.float32(math.nan), torch.tensor(math.inf)),
    *(np.array([1.0]), torch.tensor([1.0]), np.array("1.5"), np.datetime64("2001-01-01"), np.complex64(1)),
    *(torch.tensor(1j), np.array(None), "\ud800", "line\nbreak"),
]
ERRORS = [ValueError("bad\nluck"), KeyError(), StopIteration(), WordlessError(), AssertionError("\ud800"), OSError(5)]
CONTAINERS = [
    *(list, tuple, iter, set, np.array, lambda values: [values], lambda values: values[0] if values else None),
    *(lambda values: dict.fromkeys(values, 1.0), lambda values: (value for value in values), str, lambda values: None),
    *(lambda values: np.array(values, dtype=object), lambda values: np.array(values, dtype=np.float32)),
    *(lambda values: np.array(values)[:, None], torch.tensor, lambda values: torch.tensor(values).unsqueeze(0)),
    *(lambda values: "0" * len(values), lambda values: range(len(values)), lambda values: Nasty()),
    *(
        lambda values: [str(value) for value in values],
        lambda values: {index: value for index, value in enumerate(values)},
    ),
]
TEXTS = st.text(max_size=6) | st.sampled_from(["", "🙂", "<eos>", "\x00", "a b " * 50])
WEIGHTS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2)


@st.composite
def answers(draw, count):
    """What a reward returns for so many completions, or an error that it raises; it is usually nearly right."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(ERRORS))
    length = draw(st.sampled_from([count] * 6 + [count + 1, max(count - 1, 0), 0]))
    values = draw(st.lists(NUMBERS, min_size=length, max_size=length))
    for index in range(length):
        if draw(st.integers(0, 3 * length)) == 0:
            values[index] = draw(st.sampled_from(NO_NUMBERS))
    container = draw(st.sampled_from([list] * len(CONTAINERS) + CONTAINERS))
    try:
        return container(values)
    except Exception:  # these values do not go into that container
        return values


def as_numbers(answer, count):
    """The numbers that an answer says, one a completion; None where it does not say so many finite ones."""
    if isinstance(answer, np.ndarray | torch.Tensor):
        answer = answer.tolist() if answer.ndim == 1 else None
    if not isinstance(answer, list | tuple) or len(answer) != count:
        return None
    numbers = []
    for value in answer:
        if isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0:
            value = value.item()
        if not isinstance(value, int | float | Fraction | np.floating | np.integer | np.bool_):
            return None
        try:
            numbers.append(float(value))
        except OverflowError:
            return None
    return numbers if all(map(math.isfinite, numbers)) else None


def returning(answer):
    def reward(prompts, completions, **fields):
        if isinstance(answer, Exception):
            raise answer.with_traceback(None)
        return answer

    return reward


def scored(parts, texts, **columns):
    """The scores, or None where they are refused, in plain words."""
    try:
        return WeightedRewards(parts).score([f"{text}?" for text in texts], texts, **columns)
    except UserError as error:
        words = str(error)
        assert words.startswith(("reward ", "the weighted sum of the rewards overflows"))
        assert words.isprintable() and len(words) < 1000
        return None


def any_answer_is_read_or_refused(data):
    texts = data.draw(st.lists(TEXTS, min_size=1, max_size=4))
    weights = data.draw(st.lists(WEIGHTS, min_size=1, max_size=2))
    read_or_refused(texts, weights, [data.draw(answers(len(texts))) for _ in weights])


def read_or_refused(texts, weights, given_back):
    """Several rewards' answers are what makes the scores, or one of them is refused."""
    found = scored([(returning(answer), weight) for answer, weight in zip(given_back, weights, strict=True)], texts)
    said = [as_numbers(answer, len(texts)) for answer in given_back]
    if any(numbers is None for numbers in said):
        assert found is None
        return
    totals = [0.0] * len(texts)
    for weight, numbers in zip(weights, said, strict=True):
        totals = [total + weight * number for total, number in zip(totals, numbers, strict=True)]
    if not all(map(math.isfinite, totals)):
        assert found is None
        return
    assert [part.tolist() for part in found.parts.values()] == said
    assert found.total.tolist() == totals
    assert found.total.dtype == torch.float64 and found.total.shape == (len(texts),)


def any_list_of_numbers_inside_is_read_or_refused(data):
    """Rewards of single tokens: a list of numbers for each completion."""
    tokens = data.draw(st.lists(st.lists(TEXTS, max_size=3), min_size=1, max_size=3))
    answer = [data.draw(answers(len(each))) for each in tokens]
    said = [as_numbers(one, len(each)) for one, each in zip(answer, tokens, strict=True)]
    part = RewardPart(lambda completions, completion_tokens: answer, 2.0, level="token")
    found = scored([part], ["".join(each) for each in tokens], tokens=tokens)
    sums = None if None in said else [sum(numbers) for numbers in said]
    if sums is None or not all(math.isfinite(2.0 * each) for each in sums):
        assert found is None
        return
    assert list(found.pieces.values()) == [said]
    assert found.total.tolist() == [2.0 * each for each in sums]


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container(container):
    read_or_refused(["a", "b", "c"], [2.0], [container([3.5, -1.0, 0.25])])
    read_or_refused(["a"], [1.0], [container([3.5])])


@pytest.mark.parametrize("value", [*NO_NUMBERS, *ERRORS], ids=type)
def test_everything_that_is_no_number(value):
    for answer in (value, [1.0, value], [value, 1.0]):
        assert scored([(returning(answer), 1.0)], ["a", "b"]) is None
    assert scored([(returning([value]), 1.0)], ["a"]) is None


CHECKS = [any_answer_is_read_or_refused, any_list_of_numbers_inside_is_read_or_refused]


@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_answer(check, data):
    check(data)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_any_answer_at_length(check, data):
    check(data)

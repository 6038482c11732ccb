"""What a reward function may return, and that no garbage passes for a number."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_trust.lm.reward_answers import RewardError
from lm_trust.lm.rewards import WeightedRewards

PROMPTS, COMPLETIONS = ["The film", "The plot", "The cast"], [" was dull", "", " shone"]


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def score(reward, prompts=PROMPTS, completions=COMPLETIONS, fields=None):
    return WeightedRewards([(reward, 1.0)]).score(prompts, completions, fields)


@pytest.mark.parametrize(
    "values",
    [
        [1, 0, True],
        (1.0, Fraction(0), np.float32(1)),
        [torch.tensor(1.0), np.array(0), np.bool_(True)],
        np.array([1, 0, 1], dtype=np.int8),
        np.array([1, 0, 1], dtype=np.float16),
        np.array([True, False, True]),
        np.array([1, 0.0, True], dtype=object),
        torch.tensor([1, 0, 1]),
        torch.tensor([1, 0, 1], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0, 1.0], requires_grad=True) * 1,
        torch.tensor([True, False, True]),
    ],
    ids=lambda values: type(values).__name__,
)
def test_every_usual_container_of_numbers_is_taken(values):
    total = score(lambda completions: values).total
    assert total.tolist() == [1.0, 0.0, 1.0] and total.dtype == torch.float64 and not total.requires_grad


def test_what_a_reward_does_to_nested_columns_stays_with_the_call():
    def counts(meta, words):
        for one, other in zip(meta, words, strict=True):
            one["calls"] = one.get("calls", 0) + 1
            other.append("more")
        return [one["calls"] + len(other) for one, other in zip(meta, words, strict=True)]

    shared = {}  # samples of one prompt share its row
    fields = {"meta": [shared, shared, {"deep": {}}], "words": [[], [], ["a"]]}
    reward = WeightedRewards([(counts, 1.0), (counts, 1.0)])
    for _ in range(2):
        assert reward.score(PROMPTS, COMPLETIONS, fields).total.tolist() == [4.0, 4.0, 6.0]
    assert fields == {"meta": [{}, {}, {"deep": {}}], "words": [[], [], ["a"]]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_scores_may_lie_on_another_device():
    total = score(lambda completions: torch.tensor([1.0, 0.0, 1.0], device="cuda")).total
    assert total.tolist() == [1.0, 0.0, 1.0] and total.device.type == "cpu"


@pytest.mark.parametrize(
    "values",
    [
        None,
        1.0,
        "123",
        b"123",
        {1.0, 2.0, 3.0},
        {0: 1.0, 1: 1.0, 2: 1.0},
        pytest.param(iter([1.0, 2.0, 3.0]), id="iterator"),
        torch.tensor(1.0),
        torch.ones(3, 1),
        torch.ones(3, device="meta"),
        np.float64(1.0),
        np.ones((3, 1)),
        np.array(1.0),
        np.array(["a", "b", "c"]),
        np.array([1, 2, 3], dtype="datetime64[ns]"),
        np.array([1 + 0j, 0, 1]),
    ],
    ids=repr,
)
def test_what_is_no_list_of_numbers_is_refused(values):
    with pytest.raises(RewardError, match=r"reward '<lambda>' \(rewards\[0\]\) returned .*list of 3 numbers"):
        score(lambda completions: values)


@pytest.mark.parametrize("count", [0, 2, 4])
@pytest.mark.parametrize("make", [lambda count: [1.0] * count, torch.ones, np.ones], ids=["list", "torch", "numpy"])
def test_a_wrong_count_is_refused(count, make):
    with pytest.raises(RewardError, match=f"returned {count} scores for 3 completions"):
        score(lambda completions: make(count))


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        None,
        "1.0",
        1 + 0j,
        [1.0],
        torch.ones(1),
        10**400,
        torch.tensor(math.nan),
        np.inf,
    ],
    ids=repr,
)
def test_what_is_no_finite_number_names_the_reward_and_the_first_such_sample(value):
    with pytest.raises(RewardError, match=r"reward 'broken' \(rewards\[1\]\) returned .* for sample 1") as caught:

        def broken(prompts, completions):
            return [0.0, value, value]

        WeightedRewards([(length, 1.0), (broken, 1.0)]).score(PROMPTS, COMPLETIONS)
    message = str(caught.value)
    assert "prompt 'The plot', completion ''" in message and "one finite number" in message and "\n" not in message


def test_a_tensor_with_a_nan_names_the_sample_too():
    with pytest.raises(RewardError, match="returned nan for sample 2"):
        score(lambda completions: torch.tensor([0.0, 1.0, math.nan]))


def test_a_long_text_is_shortened_in_the_message():
    with pytest.raises(RewardError) as caught:
        score(lambda completions: [math.nan], ["a " * 5000], ["b\n" * 5000])
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", range(5))
@pytest.mark.parametrize("alone", [True, False])
def test_the_sample_on_which_a_reward_raises_is_found(bad, alone):
    calls = []

    def fragile(completions):
        calls.append(len(completions))
        marked = [completion for completion in completions if completion in ("bad", *(["worse"] if not alone else []))]
        if marked:
            raise ZeroDivisionError("float\ndivision")
        return [0.0] * len(completions)

    completions = [f"c{index}" for index in range(5)]
    completions[bad] = "bad"
    if bad < 4:
        completions[4] = "worse"
    with pytest.raises(RewardError, match=f"sample {bad}: prompt 'p{bad}', completion 'bad'") as caught:
        score(fragile, [f"p{index}" for index in range(5)], completions)
    assert "raised ZeroDivisionError: float division" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert len(calls) <= 5 and sum(calls[1:]) <= 7


def test_a_reward_that_fails_only_on_the_batch_names_no_sample():
    def only_alone(completions):
        if len(completions) > 1:
            raise MemoryError
        return [0.0]

    with pytest.raises(RewardError, match=r"raised MemoryError \(.*\) on a batch of 3 samples, and on no part of it"):
        score(only_alone)
    with pytest.raises(RewardError, match="batch of 0 samples"):
        score(lambda completions: completions[0], [], [])


def test_an_error_is_told_with_the_place_in_the_users_code_where_it_was_raised(tmp_path, monkeypatch):
    (tmp_path / "judging.py").write_text(
        "import json\n\ndef parse(text):\n    return json.loads(text)\n\n"
        "def judge(completions):\n    return [parse(text) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match=r"raised JSONDecodeError: .* \(\S+judging\.py:4, in parse\) on sample 0"):
        score("judging:judge")
    with pytest.raises(RewardError, match=r"raised ZeroDivisionError: .* \(\S*test_reward_answers\.py:\d+, in <"):
        score(lambda completions: [1 / 0])


def test_an_interrupt_is_no_failure_of_the_reward():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


class Hostile:
    def __repr__(self):
        raise RuntimeError("no repr")

    def __float__(self):
        raise RuntimeError("no float")


NUMBERS = st.floats(-1e30, 1e30) | st.integers(-(10**9), 10**9) | st.booleans()
GARBAGE = st.one_of(
    st.none(),
    st.text(),
    st.binary(),
    st.floats(),
    st.integers(),
    st.complex_numbers(),
    st.dates(),
    st.fractions(),
    st.decimals(),
    st.just(Hostile()),
    st.just(object),
    st.lists(st.floats(), max_size=2),
    st.floats().map(torch.tensor),
    st.floats().map(np.array),
)
RETURNED = st.one_of(
    GARBAGE,
    st.lists(NUMBERS, min_size=3, max_size=3),
    st.lists(NUMBERS | GARBAGE, max_size=4),
    st.lists(GARBAGE, max_size=4).map(tuple),
    st.lists(st.floats(), max_size=4).map(np.array),
    st.lists(st.floats(), max_size=4).map(torch.tensor),
    st.dictionaries(st.text(), GARBAGE, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(RETURNED)
def test_anything_returned_is_three_finite_numbers_or_a_reward_error(returned):
    try:
        result = score(lambda completions: returned)
    except RewardError as error:
        assert "'<lambda>' (rewards[0])" in str(error) and len(str(error).splitlines()) == 1
    else:
        assert result.total.shape == (3,) and result.total.isfinite().all()
        expected = [float(value) for value in returned]
        assert result.total.tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(NUMBERS, min_size=3, max_size=3))
def test_numbers_come_back_as_they_were(values):
    assert score(lambda completions: values).total.tolist() == [float(value) for value in values]

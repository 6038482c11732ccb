"""Rewards: what a function receives, how parts add up, and that no garbage passes for a number."""

import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_trust.errors import UserError
from lm_trust.lm.rewards import RewardError, WeightedRewards, resolve_reward, vader

ROOT = Path(__file__).parents[2]
PROMPTS, COMPLETIONS = ["The film", "The plot", "The cast"], [" was dull", "", " shone"]


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def score(reward, prompts=PROMPTS, completions=COMPLETIONS, fields=None):
    return WeightedRewards([(reward, 1.0)]).score(prompts, completions, fields)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into an otherwise empty working directory, and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def write(name, source):
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


# What a function receives


def test_a_function_gets_the_columns_that_it_names_and_no_others():
    seen = {}

    def named(completions, answer, missing=7):
        seen["named"] = (completions, answer, missing)
        return [0.0] * len(completions)

    def all_of_them(prompts, completions, **fields):
        seen["all"] = fields
        return [0.0] * len(completions)

    rewards = WeightedRewards([(named, 1.0), (all_of_them, 1.0)])
    rewards.score(PROMPTS, COMPLETIONS, {"answer": [1, 2, 3], "source": list("abc")})
    assert seen["named"] == (COMPLETIONS, [1, 2, 3], 7)
    assert seen["all"] == {"answer": [1, 2, 3], "source": ["a", "b", "c"]}


def test_a_column_that_a_reward_takes_and_the_prompts_lack_is_found_before_any_score():
    rewards = WeightedRewards([(length, 1.0), (lambda completions, answer: completions, 1.0)])
    with pytest.raises(UserError, match=r"rewards\[1\].*'answer'.*did you mean 'answers'.*columns: answers"):
        rewards.check_columns(["answers"])
    with pytest.raises(UserError, match=r"'answer'.*columns: none"):
        rewards.score(PROMPTS, COMPLETIONS)
    with pytest.raises(UserError, match=r"column 'prompts'.*rename"):
        rewards.check_columns(["prompts", "answer"])
    rewards.check_columns(["answer", "other"])


def test_what_a_reward_does_to_its_lists_stays_there():
    def greedy(prompts, completions, answer):
        count = len(completions)
        for column in (prompts, completions, answer):
            column.clear()
        return [1.0] * count

    fields = {"answer": [1, 2, 3]}
    result = WeightedRewards([(greedy, 1.0), (length, 1.0)]).score(PROMPTS, COMPLETIONS, fields)
    assert result.parts["length"].tolist() == [9.0, 0.0, 6.0]
    assert fields == {"answer": [1, 2, 3]} and len(PROMPTS) == 3


def test_columns_of_unequal_length_are_the_callers_mistake():
    with pytest.raises(ValueError, match="unequal length"):
        score(length, PROMPTS, COMPLETIONS[:2])


# How parts add up


def test_the_total_is_the_weighted_sum_and_the_parts_are_unweighted():
    rewards = WeightedRewards([("vader", 2.0), (length, -0.5)])
    result = rewards.score(PROMPTS, COMPLETIONS)
    assert rewards.names == list(result.parts) == ["vader", "length"]
    assert result.total.dtype == torch.float64 and result.total.shape == (3,)
    for index in range(3):
        compound = vader([PROMPTS[index]], [COMPLETIONS[index]])[0]
        assert result.parts["vader"][index].item() == compound
        assert math.isclose(result.total[index].item(), 2.0 * compound - 0.5 * len(COMPLETIONS[index]))


def test_repeated_names_get_distinct_parts():
    def a_2(prompts, completions):
        return length(prompts, completions)

    rewards = WeightedRewards([("vader", 1.0), ("vader", 0.5), (a_2, 1.0), (a_2, 1.0), (a_2, 1.0), ("vader", 1.0)])
    assert rewards.names == ["vader", "vader_2", "a_2", "a_2_2", "a_2_3", "vader_3"]
    assert len(rewards.score(PROMPTS, COMPLETIONS).parts) == 6


def test_no_completions_score_nothing():
    assert score("vader", [], []).total.shape == (0,)


@pytest.mark.parametrize("weight", [math.nan, math.inf, None, "1", torch.ones(2)])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(UserError, match=r"rewards\[0\]\.weight"):
        WeightedRewards([(length, weight)])


def test_an_empty_list_of_rewards_is_refused():
    with pytest.raises(UserError, match="rewards: the list is empty"):
        WeightedRewards([])


def test_a_sum_that_overflows_is_no_score():
    rewards = WeightedRewards([(lambda completions: [0.0, 1e308, 0.0], 100.0)])
    with pytest.raises(RewardError, match="overflows for sample 1"):
        rewards.score(PROMPTS, COMPLETIONS)


# VADER


def test_vader_scores_the_whole_text():
    good, bad = vader(["A wonderful film", "A film"], [", I loved it", " so awful that I left"])
    assert good > 0.5 > -0.3 > bad
    assert vader(["This film is gre"], ["at"]) == vader(["This film is great"], [""]) != [0.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_vader_gives_any_text_a_number_in_its_range(pairs):
    result = score("vader", [prompt for prompt, _ in pairs], [completion for _, completion in pairs])
    assert ((result.total >= -1) & (result.total <= 1)).all()


# Names


def test_a_dotted_path_finds_a_module_in_the_working_directory(module):
    module(
        "my_scores.own",
        "from my_scores.helper import two\ndef twice(completions):\n    return [two] * len(completions)\n",
    )
    module("my_scores.helper", "two = 2\n")
    path = list(sys.path)
    for name in ("my_scores.own:twice", "my_scores.own.twice"):
        assert score(name).total.tolist() == [2.0, 2.0, 2.0]
        assert WeightedRewards([(name, 1.0)]).names == ["twice"]
    assert sys.path == path


def test_the_example_runs_by_the_path_that_it_gives(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert score("examples.custom_reward:brevity").total.tolist() == [1 / 3, 1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vadr", "no built-in reward 'vadr' \\(did you mean 'vader'\\?\\); built-in: vader; a function"),
        ("", "no built-in reward ''"),
        ("broken:", "no built-in reward"),
        ("no_such_module_here:f", "importing 'no_such_module_here'.*ModuleNotFoundError"),
        ("broken:f", "importing 'broken'.*ZeroDivisionError"),
        ("wrong:f", "importing 'wrong'.*SyntaxError"),
        ("leaves:f", "importing 'leaves'.*SystemExit"),
        ("whole:lenght", "no function 'lenght' \\(did you mean 'length'"),
        ("whole:length.more", "no function 'length.more'"),
        ("whole.number", "'whole.number' is 3, not callable"),
        (".whole:length", "importing '.whole'"),
        ("a..b:length", "importing 'a..b'"),
    ],
)
def test_a_wrong_name_is_one_line_that_names_the_key(module, name, message):
    module("broken", "1 / 0\n")
    module("wrong", "def f(:\n")
    module("leaves", "raise SystemExit(3)\n")
    module("whole", "number = 3\ndef length(completions):\n    return completions\n")
    path = list(sys.path)
    with pytest.raises(UserError, match=message) as caught:
        resolve_reward(name, key="rewards[4].name")
    assert str(caught.value).startswith("rewards[4].name: ") and "\n" not in str(caught.value)
    assert sys.path == path


def test_the_key_of_a_wrong_name_counts_from_the_list():
    with pytest.raises(UserError, match=r"^rewards\[1\]\.name: "):
        WeightedRewards([("vader", 1.0), ("nothing", 1.0)])


# What a reward may return


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
        iter([1.0, 2.0, 3.0]),
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

    with pytest.raises(RewardError, match="raised MemoryError on a batch of 3 samples"):
        score(only_alone)
    with pytest.raises(RewardError, match="batch of 0 samples"):
        score(lambda completions: completions[0], [], [])


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

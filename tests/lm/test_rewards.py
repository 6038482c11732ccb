"""Rewards: what a function receives, how parts add up, and numbers for tokens and steps."""

import math

import numpy as np
import pytest
import torch

from lm_trust.errors import UserError
from lm_trust.lm.reward_functions import vader
from lm_trust.lm.rewards import DeferredReward, RewardError, RewardPart, WeightedRewards

PROMPTS, COMPLETIONS = ["The film", "The plot", "The cast"], [" was dull", "", " shone"]


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def score(reward, prompts=PROMPTS, completions=COMPLETIONS, fields=None):
    return WeightedRewards([(reward, 1.0)]).score(prompts, completions, fields)


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


def test_a_label_of_ones_own_names_a_part():
    rewards = WeightedRewards([RewardPart(length, label="size"), RewardPart("vader"), RewardPart(length, label="size")])
    assert rewards.names == ["size", "vader", "size_2"]
    with pytest.raises(RewardError, match=r"reward 'size' \(rewards\[0\]\)"):
        WeightedRewards([RewardPart(lambda completions: None, label="size")]).score(PROMPTS, COMPLETIONS)


# What the rollout knows besides


def test_a_function_may_take_lengths_and_ends():
    seen = {}

    def named(completion_lengths, completion_ended):
        seen["named"] = (completion_lengths, completion_ended)
        return [0.0] * 3

    def all_of_them(prompts, completions, **fields):
        seen["all"] = fields
        return [0.0] * 3

    rewards = WeightedRewards([(named, 1.0), (all_of_them, 1.0)])
    rewards.check_columns(["answer"])
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    known = {"lengths": [1, 2, 3], "ended": [True, False, True], "chats": [None, chat, None]}
    rewards.score(PROMPTS, COMPLETIONS, {"answer": list("abc")}, **known, tokens=[["x"]] * 3)
    assert seen["named"] == ([1, 2, 3], [True, False, True])
    assert seen["all"] == {
        "answer": ["a", "b", "c"],
        "completion_lengths": [1, 2, 3],
        "completion_ended": [True, False, True],
        "chats": [None, chat, None],
    }
    with pytest.raises(ValueError, match="unequal length"):
        rewards.score(PROMPTS, COMPLETIONS, lengths=[1, 2])


@pytest.mark.parametrize("level", ["sequence", "token", "step"])
@pytest.mark.parametrize(
    ("column", "of"),
    [
        ("completions", {"sequence", "token", "step"}),
        ("completion_lengths", {"sequence", "token", "step"}),
        ("completion_ended", {"sequence", "token", "step"}),
        ("chats", {"sequence", "token", "step"}),
        ("completion_tokens", {"token"}),
        ("steps", {"step"}),
    ],
)
def test_names_that_a_level_gives_are_taken(level, column, of):
    scope = {}
    exec(f"def takes({column}): pass", scope)
    rewards = WeightedRewards([RewardPart(scope["takes"], level=level)])
    if level in of:
        rewards.check_columns(["answer"])
        with pytest.raises(UserError, match=f"column '{column}'.*rename"):
            rewards.check_columns([column])
    else:
        rewards.check_columns([column])
        with pytest.raises(UserError, match=f"takes '{column}', which is neither 'prompts'"):
            rewards.check_columns(["answer"])


# Numbers for tokens and steps


TOKENS = [[" was", " dull"], [""], [" sh", "one", ""]]


def test_a_token_level_function_gives_each_token_a_number():
    def letters(completion_tokens, completions):
        assert completions == COMPLETIONS
        numbers = [[float(len(token)) for token in tokens] for tokens in completion_tokens]
        completion_tokens[0].clear()
        return numbers

    rewards = WeightedRewards([RewardPart(letters, -0.5, level="token"), (length, 1.0)])
    found = rewards.score(PROMPTS, COMPLETIONS, tokens=TOKENS)
    assert found.pieces == {"letters": [[4.0, 5.0], [0.0], [3.0, 3.0, 0.0]]}
    assert found.parts["letters"].tolist() == [9.0, 0.0, 6.0]
    assert found.total.tolist() == [4.5, 0.0, 3.0]
    assert TOKENS[0] == [" was", " dull"]
    with pytest.raises(ValueError, match="level token need"):
        rewards.score(PROMPTS, COMPLETIONS)


def test_a_step_level_function_gives_each_step_a_number():
    seen = []

    def lines(steps):
        seen.append(steps)
        return [np.arange(1.0, 1 + len(each)) for each in steps]

    rewards = WeightedRewards([RewardPart(lines, 2.0, level="step", step_delimiter=";")])
    found = rewards.score(PROMPTS, ["one; two;three", "", ";;"])
    assert seen == [[["one;", " two;", "three"], [], []]]
    assert found.pieces == {"lines": [[1.0, 2.0, 3.0], [], []]}
    assert found.total.tolist() == [12.0, 0.0, 0.0]


def test_steps_that_nothing_ends_are_refused():
    with pytest.raises(UserError, match=r"rewards\[0\]\.step_delimiter: it is empty"):
        WeightedRewards([RewardPart("length", level="step", step_delimiter="")])


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([[1, 2], [3], [4, 5]], "returned 2 numbers for the 3 tokens of sample 2: prompt 'The cast'"),
        ([[1, 2], [], [4, 5, 6]], "returned 0 numbers for the 1 tokens of sample 1: prompt 'The plot'"),
        ([[1, 2], 3.0, [4, 5, 6]], "returned 3.0 for sample 1: .*a list with one finite number for each token"),
        ([[1, 2], None, [4, 5, 6]], "returned None for sample 1"),
        ([[1, math.nan], [3], [4, 5, 6]], "returned nan for token 1 of sample 0"),
        ([[1, 2], [3], [4, "5", 6]], r"returned '5' \(a str\) for token 1 of sample 2"),
        ([[1, 2], [3], [1e308, 1e308, 0]], "overflows for sample 2"),
    ],
)
def test_wrong_numbers_for_tokens_name_the_sample(numbers, message, parallel):
    def given(completions, completion_tokens):
        return [numbers[COMPLETIONS.index(completion)] for completion in completions]

    rewards = WeightedRewards([RewardPart(given, level="token", parallel=parallel)])
    with pytest.raises(RewardError, match=message) as caught:
        rewards.score(PROMPTS, COMPLETIONS, tokens=TOKENS)
    assert "\n" not in str(caught.value)


def test_parts_are_asked_by_when_they_pay():
    asked = []

    def part(name, **settings):
        def function(completions, **fields):
            asked.append(name)
            return [[0.0]] if "level" in settings else [1.0]

        return RewardPart(function, label=name, **settings)

    rewards = WeightedRewards(
        [part("end"), part("change", dense=True), part("token", level="token"), part("step", level="step")]
    )
    for pays in (["end"], ["change"], ["token", "step"], ["end", "change", "token", "step"]):
        asked.clear()
        found = rewards.score(["p"], ["c"], tokens=[["c"]], pays=pays)
        assert asked == list(found.parts) == pays
        assert rewards.pays_by(*pays)
    assert not WeightedRewards([part("end")]).pays_by("change", "token", "step")


# Rewards that are costly to make


def test_a_deferred_reward_is_made_once_and_not_before_it_is_wanted():
    made = []

    def make():
        made.append("made")
        return length

    rewards = WeightedRewards([RewardPart(DeferredReward(make), 0.5, label="size")])
    rewards.check_columns(["answer"])
    assert made == []
    rewards.load()
    assert rewards.score(PROMPTS, COMPLETIONS, {"answer": [1, 2, 3]}).total.tolist() == [4.5, 0.0, 3.0]
    rewards.load()
    assert made == ["made"]
    read = WeightedRewards([RewardPart(DeferredReward(lambda: lambda chats: [len(chat) for chat in chats]))])
    assert read.score(PROMPTS, COMPLETIONS, chats=[["a"], [], ["a", "b"]]).total.tolist() == [1.0, 0.0, 2.0]

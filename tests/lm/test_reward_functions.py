"""The built-in reward functions, and the finding of others by name."""

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_trust.errors import UserError
from lm_trust.lm.reward_functions import exact_match, length, missing_eos, resolve_reward, vader
from lm_trust.lm.rewards import RewardError, RewardPart, WeightedRewards

ROOT = Path(__file__).parents[2]
PROMPTS, COMPLETIONS = ["The film", "The plot", "The cast"], [" was dull", "", " shone"]


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


# Length, missing end, exact match


def test_length_and_missing_end_read_what_the_rollout_knows():
    rewards = WeightedRewards([("length", 0.5), ("missing_eos", 2.0)])
    found = rewards.score(["a"] * 3, ["b"] * 3, lengths=[4, 1, 7], ended=[True, True, False])
    assert found.parts["length"].tolist() == [4.0, 1.0, 7.0]
    assert found.parts["missing_eos"].tolist() == [0.0, 0.0, -1.0]
    assert found.total.tolist() == [2.0, 0.5, 3.5 - 2.0]
    assert length([]) == missing_eos([]) == []


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        # the same text
        ("Paris", "Paris", 1),
        (" Paris\n", "  Paris", 1),
        ("paris", "Paris", 0),
        ("It is Paris", "Paris", 0),
        ("True", True, 1),
        # the last number
        ("3 and 4 make 7.", "7", 1),
        ("7 is 3 and 4", "7", 0),
        ("so 7.0", 7, 1),
        ("so 7.50", "7.5", 1),
        ("so 7.5", 7.5, 1),
        (".5", "0.5", 1),
        ("1,234.50!", "1234.5", 1),
        ("1,2,3", "3", 1),
        ("12,3456", "3456", 1),
        ("it is -3", "-3", 1),
        ("it is (-3)", -3, 1),
        ("it is +3", "3", 1),
        ("5-3", "3", 1),
        ("5 - 3", "-3", 0),
        ("$12", "12", 1),
        ("12km", "12", 1),
        ("x2", "2", 0),
        ("2.5.1", "2.5", 1),
        ("9007199254740993", 9007199254740993, 1),
        ("9007199254740992", 9007199254740993, 0),
        ("the answer", "7", 0),
        ("", "7", 0),
        ("\u0663", "3", 0),
        # an answer that is no number
        ("it is 1/2", "1/2", 0),
        ("1/2", "1/2", 1),
        ("it is 7 apples", "7 apples", 0),
    ],
)
def test_what_an_exact_match_is(completion, answer, expected):
    assert exact_match([completion], [answer]) == [expected]


@pytest.mark.parametrize("answer", [None, "", " \n", math.nan])
def test_a_sample_without_an_answer_is_named(answer):
    with pytest.raises(RewardError, match=r"'exact_match'.*no answer on sample 1: prompt 'The plot'"):
        score("exact_match", fields={"answer": ["1", answer, "2"]})


def test_exact_match_needs_the_column():
    with pytest.raises(UserError, match=r"'exact_match'.*takes 'answer'.*did you mean 'answers'"):
        WeightedRewards([("exact_match", 1.0)]).check_columns(["answers"])


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers() | st.decimals(allow_nan=False, allow_infinity=False).map(lambda value: f"{value:f}"))
def test_a_number_at_the_end_is_the_answer_whatever_stands_before(before, answer):
    assert exact_match([f"{before} {answer}"], [answer]) == [1.0]


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


@pytest.mark.parametrize("settings", [{}, {"timeout": 60}])
def test_a_function_may_import_what_is_beside_it_as_late_as_it_is_called(module, settings):
    module("late", "def two(completions):\n    import late_helper\n    return [late_helper.two] * len(completions)\n")
    module("late_helper", "two = 2\n")
    path = list(sys.path)
    rewards = WeightedRewards([RewardPart("late:two", **settings)])
    assert rewards.score(["a"], ["b"]).total.tolist() == [2.0]
    assert sys.path == path


def test_the_example_runs_by_the_path_that_it_gives(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert score("examples.custom_reward:brevity").total.tolist() == [1 / 3, 1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vadr", r"no built-in reward 'vadr' \(did you mean 'vader'\?\); built-in: vader, length, missing_eos, exact"),
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

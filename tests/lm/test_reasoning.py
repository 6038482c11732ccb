"""Problems of reasoning-gym: distinct, held out for good, the seed's alone; whatever is wrong is named by its key."""

import random
import sys

import pytest

from lm_trust.errors import UserError
from lm_trust.lm.reasoning import fill, load_reasoning

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 problems in all


def load(task="chain_sum", *, arguments=ONE_DIGIT, count=60, heldout_count=40, **others):
    options = {"template": "{question}", "chat": False, "seed": 0} | others
    return load_reasoning(task, arguments=arguments, count=count, heldout_count=heldout_count, **options)


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym")


def test_no_held_out_problem_is_trained_on_and_none_comes_twice(gym):
    training, heldout = load()
    assert (len(training), len(heldout)) == (60, 40)
    assert len({*training.texts, *heldout.texts}) == 100
    for side in (training, heldout):
        for index, (text, answer) in enumerate(zip(side.texts, side.fields["answer"], strict=True)):
            sum_ = text.removeprefix("State the final answer to the following arithmetic problem: ").removesuffix(" =")
            assert str(eval(sum_)) == answer
            assert side.fields["question"][index] == text and side.fields["metadata"][index]["expression"] == sum_
            assert side.chats is None


def test_all_problems_of_a_small_task_are_found_and_their_number_is_told(gym):
    training, heldout = load(count=150, heldout_count=50)
    assert len({*training.texts, *heldout.texts}) == 200
    with pytest.raises(UserError, match=r"prompts\.count: 150 and prompts\.heldout_count 51 .* only 200 distinct"):
        load(count=150, heldout_count=51)


def test_common_problems_are_on_both_sides_alike(gym):
    """Sums of two come up early, being few; they must not all be trained on."""
    training, heldout = load(arguments=ONE_DIGIT | {"max_terms": 3}, count=300, heldout_count=300)
    shares = [sum(data["num_terms"] == 2 for data in side.fields["metadata"]) / 300 for side in (training, heldout)]
    assert 0.2 < shares[0] < 0.4 and abs(shares[0] - shares[1]) < 0.1


def test_the_problems_are_the_seeds_alone(gym):
    random.seed(1)
    first = load(seed=3)
    random.seed(2)
    state = random.getstate()
    assert load(seed=3) == first
    assert random.getstate() == state
    assert load(seed=4)[0].texts != first[0].texts


def test_the_template_and_the_chat(gym):
    training, _ = load(template="Q: {question}\n{answer} A:", chat=True)
    question = training.fields["question"][0]
    assert training.texts[0] == f"Q: {question}\n{{answer}} A:" == fill("Q: {question}\n{answer} A:", question)
    assert training.chats[0] == [{"role": "user", "content": training.texts[0]}]
    assert training.where(0).startswith("reasoning-gym's chain_sum, problem ")


def test_any_scorer_of_the_package_can_be_called_with_the_columns(gym):
    training, _ = load("bitwise_arithmetic", arguments={}, count=3, heldout_count=2)
    scorer = gym.create_dataset("bitwise_arithmetic", size=1, seed=0).score_answer
    columns = zip(*(training.fields[name] for name in ("question", "answer", "metadata")), strict=True)
    for question, answer, metadata in columns:
        assert scorer(answer, {"question": question, "answer": answer, "metadata": metadata}) == 1.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task": "chain_sums"}, r"prompts\.task: reasoning-gym has no task 'chain_sums'; did you mean chain_sum"),
        ({"task": "?"}, r"prompts\.task: reasoning-gym has no task '\?'; there are "),
        ({"arguments": {"min_term": 2}}, r"prompts\.arguments: chain_sum does not take {'min_term': 2}: .*unexpected"),
        ({"arguments": {"min_terms": 5, "max_terms": 2}}, r"prompts\.arguments: .* max_terms must be >= min_terms"),
        ({"arguments": {"min_terms": "x"}}, r"prompts\.arguments: chain_sum does not take"),
        ({"arguments": {"size": 9}}, r"prompts\.arguments\.size: it follows from prompts\.count"),
        ({"arguments": {"seed": 9}}, r"prompts\.arguments\.seed: it follows from the run's seed"),
        ({"template": "{Question}"}, r"prompts\.template: '{Question}' has no {question}"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(gym, options, told):
    with pytest.raises(UserError, match=told) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def test_without_the_package_its_installation_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"prompts\.kind: reasoning_gym needs .*pip install 'lm-trust\[reasoning\]'"):
        load()

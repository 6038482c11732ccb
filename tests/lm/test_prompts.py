"""Prompts: texts and chats with their fields, a held-out side that was never trained on, epochs that lose nothing."""

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import torch
from dataset_folders import write_subsets
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lm_trust.errors import UserError
from lm_trust.lm.prompts import Prompts, PromptSampler, load_prompts, split_heldout, user_chat
from lm_trust.lm.rows import BadRows

CHAT = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "2 + 2?"},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def made(texts, fields=None):
    texts = list(texts)
    return Prompts(texts, fields or {}, "made.jsonl", "line", list(range(1, len(texts) + 1)))


# Loading


def test_every_row_keeps_its_other_fields(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "The film", "answer": "a"}, {"prompt": "Its plot", "answer": "b"}])
    prompts = load_prompts(path)
    assert prompts.texts == ["The film", "Its plot"] and prompts.fields == {"answer": ["a", "b"]}
    assert len(prompts) == 2 and prompts.source == str(path) and prompts.chats is None
    assert prompts.where(1) == f"{path}, line 2"
    swapped = load_prompts(str(path), field="answer")
    assert swapped.texts == ["a", "b"] and list(swapped.fields) == ["prompt"]


def test_fields_that_only_some_rows_have_are_none_elsewhere(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "n": 1.5}, {"m": [1], "prompt": "c"}])
    assert load_prompts(path).fields == {"n": [None, 1.5, None], "m": [None, None, [1]]}


def test_rows_that_are_left_out_leave_no_trace_in_the_columns(tmp_path):
    rows = [{"prompt": "", "n": 0, "only": 1}, {"prompt": "b", "n": 1}, {"promt": "c"}, {"prompt": "d", "n": 3}]
    bad = BadRows("skip")
    prompts = load_prompts(jsonl(tmp_path / "p.jsonl", rows), bad=bad)
    assert prompts.texts == ["b", "d"] and prompts.fields == {"n": [1, 3]} and prompts.numbers == [2, 4]
    assert len(bad.problems) == 2 and "did you mean 'promt'" in bad.problems[1]
    with pytest.raises(UserError, match=r"p\.jsonl, line 1: field 'prompt' is an empty string"):
        load_prompts(tmp_path / "p.jsonl")


def test_the_split_of_a_dataset(tmp_path):
    import datasets

    sides = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test", "other")}
    datasets.DatasetDict(sides).save_to_disk(tmp_path / "d")
    assert load_prompts(tmp_path / "d").texts == ["train"]
    assert load_prompts(tmp_path / "d", split="other").texts == ["other"]
    assert load_prompts(tmp_path / "d", heldout=True).texts == ["test"]
    assert load_prompts(tmp_path / "d", heldout=True, split="other").texts == ["other"]
    datasets.DatasetDict({"a": sides["train"], "b": sides["test"]}).save_to_disk(tmp_path / "unusual")
    with pytest.raises(UserError, match=r"none named 'test'; set prompts\.heldout_split to one of 'a', 'b'"):
        load_prompts(tmp_path / "unusual", heldout=True)
    with pytest.raises(UserError, match=r"set prompts\.split to one of"):
        load_prompts(tmp_path / "d", split="tset")
    with pytest.raises(UserError, match=r"prompts\.heldout: .*no such file"):
        load_prompts(tmp_path / "e.jsonl", heldout=True)


def test_the_subset_of_a_dataset(tmp_path):
    path = write_subsets(tmp_path / "d", {name: [{"prompt": name}] for name in ("one", "two")})
    assert load_prompts(path, subset="two").texts == ["two"]
    assert load_prompts(path, subset="one", heldout=True).texts == ["one"]
    with pytest.raises(UserError, match=r"several subsets; set prompts\.subset to one of 'one', 'two'"):
        load_prompts(path)
    with pytest.raises(UserError, match=r"several subsets; set prompts\.heldout_subset to one of 'one', 'two'"):
        load_prompts(path, heldout=True)


# Chats


def chats_in(folder, kind, rows):
    import datasets

    if kind == "jsonl":
        return jsonl(folder / "c.jsonl", rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "c.parquet")
        return folder / "c.parquet"
    datasets.Dataset.from_list(rows).save_to_disk(folder / "c")
    return folder / "c"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_messages_are_chats_and_their_text_is_the_last_of_the_user(kind, tmp_path):
    named = [{"role": "user", "content": "Who?", "name": "Ada"}]
    path = chats_in(tmp_path, kind, [{"prompt": CHAT, "answer": "4"}, {"prompt": named, "answer": "5"}])
    prompts = load_prompts(path)
    assert prompts.chats == [CHAT, named]  # without the name: None that a table gives the other messages
    assert prompts.texts == ["2 + 2?", "Who?"] and prompts.fields == {"answer": ["4", "5"]}
    assert prompts.select([1, 0, 1]).chats == [named, CHAT, named]


def test_a_text_becomes_a_users_message_where_chats_are_asked_for(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "Hello"}, {"prompt": CHAT}])
    prompts = load_prompts(path, chat=True)
    assert prompts.chats == [[{"role": "user", "content": "Hello"}], CHAT] and prompts.texts == ["Hello", "2 + 2?"]
    mixed = load_prompts(path)
    assert mixed.chats == [None, CHAT] and mixed.chat(0) is None and mixed.texts == prompts.texts


@pytest.mark.parametrize(
    ("chat", "told"),
    [
        ([], "is an empty list"),
        (["Hello"], "is a list of str, not of chat messages"),
        ([{"role": "user"}], "has no text under 'content' in message 1"),
        ([{"role": None, "content": "a"}], "has no text under 'role' in message 1"),
        ([CHAT[0], {"role": "user", "content": [{"type": "text"}]}], "has no text under 'content' in message 2"),
        ([{"role": "system", "content": "a"}], "holds no message with the role 'user'"),
        (CHAT[:3], "ends with a message of the assistant"),
        ([{"role": "user", "content": ""}], "has an empty last message"),
        ([{"role": "user", "content": "\ud83d"}], "holds, in message 1, half of a surrogate pair"),
        ({"role": "user", "content": "a"}, "is dict, not a string or a list of chat messages"),
    ],
)
def test_a_malformed_chat_is_named_by_its_line(chat, told, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{json.dumps({"prompt": chat})}\n')
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: field 'prompt' " + told):
        load_prompts(path)
    assert len(load_prompts(path, bad=BadRows("skip"))) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "prompt"]) | st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | json_values, "content": json_values}
)


@settings(max_examples=200, deadline=None)
@given(st.lists(json_values | st.lists(messages, max_size=3), max_size=4), st.booleans())
def test_any_prompt_value_loads_whole_or_is_named(tmp_path_factory, values, chat):
    path = jsonl_of_any(tmp_path_factory.getbasetemp() / "any.jsonl", values)
    bad = BadRows("skip")
    try:
        prompts = load_prompts(path, chat=chat, bad=bad)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert len(prompts) + len(bad.problems) == len(values)
    for index, number in enumerate(prompts.numbers):
        value = values[number - 1]
        if isinstance(value, str):
            assert prompts.texts[index] == value and prompts.chat(index) == (user_chat(value) if chat else None)
        else:
            assert prompts.texts[index] in [message["content"] for message in value]
            assert [m["content"] for m in prompts.chat(index)] == [m["content"] for m in value]


def jsonl_of_any(path, values):
    path.write_text("".join(json.dumps({"prompt": value}) + "\n" for value in values))
    return path


# The held-out split


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=30),
    st.floats(0.05, 0.95),
    st.integers(0, 2**40),
)
def test_no_held_out_text_is_trained_on_and_no_row_is_lost(texts, fraction, seed):
    prompts = made(texts, {"row": list(range(len(texts)))})
    try:
        training, held_out = split_heldout(prompts, fraction, seed)
    except UserError:
        assert max(1, round(fraction * len(set(texts)))) == len(set(texts))
        return
    assert len(set(held_out.texts)) == max(1, round(fraction * len(set(texts))))
    assert not set(training.texts) & set(held_out.texts)
    rows = training.fields["row"] + held_out.fields["row"]
    assert sorted(rows) == list(range(len(texts)))
    assert training.fields["row"] == sorted(training.fields["row"])
    for side in (training, held_out):
        assert side.fields["row"] == [number - 1 for number in side.numbers]
        assert side.texts == [texts[row] for row in side.fields["row"]]


def test_the_split_is_the_seeds_alone():
    prompts = made(f"p{index}" for index in range(100))
    torch.manual_seed(1)
    first = split_heldout(prompts, 0.2, 3)[1].texts
    torch.manual_seed(2)
    torch.rand(5)
    assert split_heldout(prompts, 0.2, 3)[1].texts == first and len(first) == 20
    assert split_heldout(prompts, 0.2, 4)[1].texts != first


def test_the_first_held_out_prompts_of_sorted_ones_are_of_every_kind():
    prompts = made((f"p{index}" for index in range(200)), {"label": [0] * 100 + [1] * 100})
    labels = split_heldout(prompts, 0.2, 3)[1].fields["label"]
    assert 0.25 < sum(labels[:12]) / 12 < 0.75 and sum(labels) > 12


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0, float("nan"), 0.99])
def test_a_side_may_not_be_empty(fraction):
    with pytest.raises(UserError, match=r"made\.jsonl: holding out .* of 10 distinct .* or others in prompts\.heldout"):
        split_heldout(made("abcdefghij"), fraction, 0)


@pytest.mark.parametrize(("texts", "fraction"), [("ab", 0.1), ("abab", 0.1), ("abcd", 0.1), ("abcdefghij", 0.01)])
def test_a_small_share_of_a_few_prompts_is_one_of_them(texts, fraction):
    training, held_out = split_heldout(made(texts), fraction, 0)
    assert len(set(held_out.texts)) == 1 and set(training.texts) == set(texts) - set(held_out.texts)


def test_messages_name_the_rows_of_the_file_after_a_selection():
    chosen = made("abcde").select(torch.tensor([4, 1, 1]))
    assert chosen.texts == ["e", "b", "b"]
    assert chosen.where(0) == "made.jsonl, line 5" and chosen.where(2) == "made.jsonl, line 2"


def test_chats_are_told_apart_by_all_of_their_messages():
    again = [{"role": "user", "content": "Go on"}]
    chats = [[{"role": "system", "content": name}, *again] for name in "aabbccdd"]
    prompts = Prompts(["Go on"] * 8, {}, "made.jsonl", "line", list(range(1, 9)), chats)
    training, heldout = split_heldout(prompts, 0.25, 0)
    assert (len(training), len(heldout)) == (6, 2)
    assert heldout.chats[0] == heldout.chats[1] and heldout.chats[0] not in training.chats


# The sampler


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**40))
def test_every_epoch_holds_every_prompt_once(count, batch_prompts, seed):
    sampler = PromptSampler(count, batch_prompts, seed)
    batches = [sampler.next() for _ in range(2 * count)]
    assert all(batch.shape == (batch_prompts,) and batch.dtype == torch.long for batch in batches)
    stream = torch.cat(batches).tolist()
    for start in range(0, len(stream) - count + 1, count):
        assert Counter(stream[start : start + count]) == Counter(range(count))


def test_epochs_are_shuffled_and_the_stream_is_the_seeds_alone():
    def stream(seed):
        sampler = PromptSampler(50, 50, seed)
        return [sampler.next().tolist() for _ in range(3)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = stream(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert stream(0) == first != stream(1)
    assert first[0] != first[1] != first[2] and first[0] != list(range(50))


@pytest.mark.parametrize("batch_prompts", [4, 5, 13])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_restored_sampler_continues_exactly_through_a_file(batch_prompts, taken):
    straight = PromptSampler(20, batch_prompts, seed=7)
    for _ in range(taken):
        straight.next()
    state = straight.state_dict()
    tensors = load(save({name: value for name, value in state.items() if torch.is_tensor(value)}))
    kept = tensors | json.loads(
        json.dumps({name: value for name, value in state.items() if not torch.is_tensor(value)})
    )
    expected = [straight.next() for _ in range(12)]
    other = PromptSampler(20, batch_prompts, seed=99)
    other.next()
    for _ in range(2):  # twice, since loading must not consume the state
        other.load_state_dict(kept)
        assert all(torch.equal(batch, other.next()) for batch in expected)


def test_a_state_for_other_prompts_is_refused():
    state = PromptSampler(20, 4, 0).state_dict()
    with pytest.raises(UserError, match="made with 20 training prompts and there are 21 now"):
        PromptSampler(21, 4, 0).load_state_dict(state)


@pytest.mark.parametrize(("count", "batch_prompts"), [(0, 1), (1, 0)])
def test_nothing_to_draw_is_the_callers_mistake(count, batch_prompts):
    with pytest.raises(ValueError, match="must be positive"):
        PromptSampler(count, batch_prompts, 0)

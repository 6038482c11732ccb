"""Rows of texts and preferences: their formats, what is refused and how it is named, and the split."""

import json
from types import SimpleNamespace

import pytest
from dataset_folders import write_subsets

from lm_trust.errors import UserError
from lm_trust.stages.data import load_pairs, load_texts
from lm_trust.training.config_stages import PairData, TextData

PLAIN = SimpleNamespace(chat_template=None)
USER, ASSISTANT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}


class Chatty:
    """A tokenizer whose template refuses a role."""

    chat_template = "made"

    def apply_chat_template(self, messages, tokenize):
        if any(message["role"] == "wizard" for message in messages):
            raise ValueError("no such role\nin a chat")
        return " ".join(message["content"] for message in messages)


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def texts_of(folder, rows, tokenizer=PLAIN, **settings):
    sides = load_texts(TextData(path=write(folder, rows), heldout_fraction=0.5, **settings), tokenizer, 0)
    return [row for side in sides for row in side.rows]


def pairs_of(folder, rows, tokenizer=PLAIN, **settings):
    sides = load_pairs(PairData(path=write(folder, rows), heldout_fraction=0.5, **settings), tokenizer, 0)
    return [row for side in sides for row in side.rows]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a", "n": 1}, {"text"}),
        ({"prompt": "a", "completion": "b", "n": 1}, {"prompt", "completion"}),
        ({"prompt": "a", "completion": "b", "text": "c"}, {"prompt", "completion"}),
        ({"messages": [USER, ASSISTANT], "n": 1}, {"messages"}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"prompt", "completion"}),
    ],
)
def test_formats_of_texts(tmp_path, row, columns):
    path = write(tmp_path, [row, {**row, "n": 2}])
    training, heldout = load_texts(TextData(path=path, heldout=path), Chatty(), 0)
    assert training.rows == heldout.rows == [{column: row[column] for column in columns}] * 2


def test_a_named_field_holds_texts_or_messages(tmp_path):
    rows = texts_of(tmp_path, [{"review": "a", "text": "x"}, {"review": "b", "text": "x"}], field="review")
    assert sorted(row["text"] for row in rows) == ["a", "b"]
    rows = texts_of(tmp_path, [{"chat": [USER]}, {"chat": [ASSISTANT]}], Chatty(), field="chat")
    assert sorted(row["messages"][0]["role"] for row in rows) == ["assistant", "user"]


def test_a_named_field_that_is_not_there_is_the_keys_fault(tmp_path):
    with pytest.raises(UserError, match=r"line 1: no field 'revew'; .* \(did you mean 'review'\?\); set data\.field"):
        texts_of(tmp_path, [{"review": "a"}, {"review": "b"}], field="revew")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"txt": "a"}, "no field 'text'; its fields are 'txt' (did you mean 'txt'?); set data.field"),
        ({"text": None}, "field 'text' is null, not a string"),
        ({"text": ""}, "field 'text' is an empty string"),
        ('{"text": ', "not JSON"),
        ({"text": "\ud800"}, "field 'text' holds half of a surrogate pair"),
    ],
)
def test_a_malformed_text_is_named_by_file_and_line(tmp_path, bad, words):
    rows = [{"text": "a"}, {"text": "b"}, bad, {"text": "c"}]
    with pytest.raises(UserError) as caught:
        texts_of(tmp_path, rows)
    assert f"data.jsonl, line 3: {words}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "field 'messages' is an empty list"),
        (["hello"], "field 'messages' is a list of str, not of chat messages"),
        ([USER, {"role": "user"}], "field 'messages' has no text under 'content' in message 2"),
        ([{"role": "wizard", "content": "x"}], "chat template refuses its messages: no such role in a chat"),
    ],
)
def test_malformed_messages_are_named(tmp_path, messages, words):
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: ") as caught:
        texts_of(tmp_path, [{"messages": [USER]}, {"messages": messages}], Chatty())
    assert words in str(caught.value)


def test_texts_and_messages_do_not_mix(tmp_path):
    rows = [{"said": "a"}, {"said": "b"}, {"said": [USER]}]
    with pytest.raises(UserError, match="line 3: it holds chat messages and the first row texts; give one kind"):
        texts_of(tmp_path, rows, Chatty(), field="said")
    pairs = [{"chosen": [USER], "rejected": [ASSISTANT]}, {"chosen": "a", "rejected": "b"}]
    with pytest.raises(UserError, match="line 2: it holds texts and the first row chat messages"):
        pairs_of(tmp_path, pairs, Chatty())


def test_messages_need_a_template_even_where_bad_rows_are_skipped(tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        texts_of(tmp_path, [{"messages": [USER]}] * 3, on_bad_row="skip")


def test_skipped_rows_are_counted_and_reported(tmp_path, capsys):
    rows = texts_of(tmp_path, [{"text": "a"}, {"text": 3}, "{", {"text": "b"}], on_bad_row="skip")
    assert sorted(row["text"] for row in rows) == ["a", "b"]
    out = capsys.readouterr().out
    assert "2 rows were left out (data.on_bad_row skip)" in out
    assert "line 2: field 'text' is int" in out


def test_pairs_go_on_from_their_prompt(tmp_path):
    rows = [{"prompt": "a ", "chosen": "b", "rejected": "c"}, {"chosen": "d", "rejected": "e", "prompt": None}]
    found = pairs_of(tmp_path, rows)
    assert {"chosen": "a b", "rejected": "a c"} in found
    assert {"chosen": "d", "rejected": "e"} in found
    chats = [{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": str(n)}]} for n in (1, 2)]
    # two answers to one prompt are one thing to split
    with pytest.raises(UserError, match=r"1 different prompts .* leaves a side empty; .* or others in data\.heldout"):
        pairs_of(tmp_path, chats, Chatty())
    chats[1]["prompt"] = [{**USER, "content": "other"}]
    assert all(
        row["chosen"][1:] == [ASSISTANT] and len(row["rejected"]) == 2 for row in pairs_of(tmp_path, chats, Chatty())
    )


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"chosen": "a"}, "no field 'rejected'"),
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": "a", "rejected": 2}, "field 'rejected' is int"),
        (
            {"chosen": "a", "rejected": [ASSISTANT]},
            "chosen and rejected must both be texts, or both lists of chat mess",
        ),
        (
            {"chosen": [ASSISTANT], "rejected": "b"},
            "chosen and rejected must both be texts, or both lists of chat mess",
        ),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "must both be texts, or both lists of chat messages"),
    ],
)
def test_a_malformed_pair_is_named(tmp_path, bad, words):
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: ") as caught:
        pairs_of(tmp_path, [{"chosen": "a", "rejected": "b"}, bad], Chatty())
    assert words in str(caught.value)


def test_the_split_is_the_seeds_and_keeps_equal_rows_together(tmp_path):
    section = TextData(
        path=write(tmp_path, [{"text": f"row {n // 2}", "n": n} for n in range(40)]), heldout_fraction=0.25
    )
    training, heldout = load_texts(section, PLAIN, 0)
    assert (len(training), len(heldout)) == (30, 10)
    assert not {row["text"] for row in training.rows} & {row["text"] for row in heldout.rows}
    assert load_texts(section, PLAIN, 0)[1].numbers == heldout.numbers
    assert load_texts(section, PLAIN, 1)[1].numbers != heldout.numbers
    assert heldout.where(0) == f"{section.path}, line {heldout.numbers[0]}"


def test_a_small_share_of_a_few_rows_is_one_of_them(tmp_path):
    section = TextData(path=write(tmp_path, [{"text": text} for text in "abcd"]), heldout_fraction=0.1)
    training, heldout = load_texts(section, PLAIN, 0)
    assert (len(training), len(heldout)) == (3, 1)


def test_the_first_held_out_rows_of_sorted_ones_are_of_every_kind(tmp_path):
    section = TextData(path=write(tmp_path, [{"text": f"row {n}"} for n in range(200)]), heldout_fraction=0.2)
    training, heldout = load_texts(section, PLAIN, 0)
    assert training.numbers == sorted(training.numbers)
    assert 3 < sum(number > 100 for number in heldout.numbers[:12]) < 9


def test_held_out_rows_of_their_own(tmp_path):
    heldout = write(tmp_path, [{"text": "c"}], "heldout.jsonl")
    section = TextData(path=write(tmp_path, [{"text": "a"}, {"text": "b"}]), heldout=heldout)
    training, held_out = load_texts(section, PLAIN, 0)
    assert (len(training), held_out.rows) == (2, [{"text": "c"}])


def test_held_out_rows_of_a_named_split(tmp_path):
    import datasets

    sides = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train_sft", "test_sft")}
    datasets.DatasetDict(sides).save_to_disk(tmp_path / "d")
    names = {"path": str(tmp_path / "d"), "split": "train_sft", "heldout": str(tmp_path / "d")}
    training, heldout = load_texts(TextData(**names, heldout_split="test_sft"), PLAIN, 0)
    assert (training.rows, heldout.rows) == ([{"text": "train_sft"}], [{"text": "test_sft"}])
    with pytest.raises(UserError, match=r"none named 'test'; set data\.heldout_split to one of"):
        load_texts(TextData(**names), PLAIN, 0)


def test_held_out_rows_of_a_named_subset(tmp_path):
    path = str(write_subsets(tmp_path / "d", {name: [{"text": name}] for name in ("one", "two")}))
    names = {"path": path, "subset": "one", "heldout": path, "heldout_split": "train"}
    training, heldout = load_texts(TextData(**names, heldout_subset="two"), PLAIN, 0)
    assert (training.rows, heldout.rows) == ([{"text": "one"}], [{"text": "two"}])
    with pytest.raises(UserError, match=r"several subsets; set data\.heldout_subset to one of 'one', 'two'"):
        load_texts(TextData(**names), PLAIN, 0)

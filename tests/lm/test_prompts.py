"""Prompts: every source reads alike, bad data is named by file and line, epochs lose nothing."""

import json
import os
import socket
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lm_trust.errors import UserError
from lm_trust.lm.prompts import Prompts, PromptSampler, encode, load_prompts, split_heldout

ROWS = [
    {"prompt": "The film", "answer": "a"},
    {"prompt": 'Its "plot",\nwell', "answer": "b"},
    {"prompt": "Ünder\u2028water 🎬", "answer": "c"},
]


@pytest.fixture(autouse=True)
def no_network_and_no_cache(monkeypatch, tmp_path_factory):
    """Local data is read without the network and without a trace in the user's cache."""

    def refuse(*_, **__):
        raise AssertionError("a local file touched the network")

    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not list(cache.iterdir())


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def made(texts, fields=None):
    texts = list(texts)
    return Prompts(texts, fields or {}, "made.jsonl", "line", list(range(1, len(texts) + 1)))


# Sources


def csv_file(folder):
    lines = [f'"{row["prompt"].replace(chr(34), chr(34) * 2)}",{row["answer"]}\r\n' for row in ROWS]
    return write(folder / "p.csv", "\ufeffprompt,answer\r\n" + "".join(lines))


def parquet_file(folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "p.parquet")
    return folder / "p.parquet"


def saved_dataset(folder):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder):
    import datasets

    other = datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict(test=other, train=datasets.Dataset.from_list(ROWS)).save_to_disk(folder / "splits")
    return folder / "splits"


def folder_of_files(folder):
    (folder / "files").mkdir()
    jsonl(folder / "files" / "train.jsonl", ROWS)
    return folder / "files"


SOURCES = [
    lambda folder: jsonl(folder / "p.jsonl", ROWS),
    lambda folder: write(folder / "p.json", "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in ROWS)),
    csv_file,
    parquet_file,
    saved_dataset,
    saved_splits,
    folder_of_files,
]
NAMES = ["jsonl", "json", "csv", "parquet", "saved", "splits", "files"]


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_every_source_gives_the_same_prompts_with_their_fields(source, tmp_path):
    path = source(tmp_path)
    prompts = load_prompts(path)
    assert prompts.texts == [row["prompt"] for row in ROWS]
    assert prompts.fields == {"answer": ["a", "b", "c"]}
    assert len(prompts) == 3 and prompts.source == str(path)
    swapped = load_prompts(str(path), field="answer")
    assert swapped.texts == ["a", "b", "c"] and list(swapped.fields) == ["prompt"]


def test_a_split_is_chosen_by_name(tmp_path):
    path = saved_splits(tmp_path)
    assert len(load_prompts(path, split="test")) == 1
    with pytest.raises(UserError, match=r"splits: no split 'tset'; set prompts.split to one of 'test', 'train'"):
        load_prompts(path, split="tset")
    with pytest.raises(UserError, match="no split 'test'"):
        load_prompts(saved_dataset(tmp_path), split="test")
    with pytest.raises(UserError, match="a file has no splits"):
        load_prompts(csv_file(tmp_path), split="train")


def test_several_splits_without_a_train_split_must_be_chosen_from(monkeypatch):
    import datasets

    asked = []
    both = datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS), b=datasets.Dataset.from_list(ROWS[:1]))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: (asked.append((path, options)), both)[1])
    with pytest.raises(UserError, match=r"several splits and none named 'train'; set prompts.split to one of 'a', 'b'"):
        load_prompts("someone/reviews")
    assert len(load_prompts("someone/reviews", split="b")) == 1
    assert asked == [("someone/reviews", {})] * 2


def test_a_hub_that_cannot_be_reached_is_a_user_error(monkeypatch):
    import datasets

    def load_dataset(path, **_):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"reviews: not a local file, nor a dataset on the hub .*ConnectionError: no route"
    ):
        load_prompts("someone/reviews")


def test_fields_that_only_some_rows_have_are_none_elsewhere(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "n": 1.5}, {"m": [1], "prompt": "c"}])
    assert load_prompts(path).fields == {"n": [None, 1.5, None], "m": [None, None, [1]]}


def test_csv_values_stay_the_strings_that_they_are(tmp_path):
    prompts = load_prompts(write(tmp_path / "p.csv", "prompt,answer\nNA,007\n1984,\n"))
    assert prompts.texts == ["NA", "1984"] and prompts.fields == {"answer": ["007", ""]}


# Malformed data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', r"p\.jsonl, line 3: not JSON: .* at column"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', r"line 2: a JSON list where an object"),
        (
            "p.jsonl",
            '{"promt": "a"}\n',
            r"line 1: no field 'prompt'; its fields are 'promt' \(did you mean 'promt'",
        ),
        ("p.jsonl", "{}", r"line 1: no field 'prompt'; its fields are none"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r"line 2: field 'prompt' is int, not a string"),
        ("p.jsonl", '{"prompt": null}', r"line 1: field 'prompt' is null, not a string"),
        ("p.jsonl", '{"prompt": ""}', r"line 1: field 'prompt' is an empty string"),
        ("p.jsonl", '{"prompt": "\\ud83d"}', r"line 1: field 'prompt' holds half of a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "n": %s}' % ("9" * 5000), r"line 1: not JSON that can be read"),
        ("p.jsonl", "[" * 200_000, r"line 1: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"p\.jsonl, line 2: not UTF-8"),
        ("p.jsonl", "", r"p\.jsonl: it holds no rows"),
        ("p.csv", "", r"p\.csv: it holds no rows"),
        ("p.csv", "prompt\n", r"p\.csv: it holds no rows"),
        ("p.csv", 'prompt,x\n"a\nb",1\n\nc\n', r"p\.csv, line 5: 1 values under 2 column names"),
        ("p.csv", 'prompt,x\na,1\n"b\n', r"p\.csv, line 3: not CSV"),
        ("p.csv", "prompt,x\n,1\n", r"p\.csv, line 2: field 'prompt' is an empty string"),
        ("p.csv", "x,prompt,x\n", r"p\.csv, line 1: two columns are named 'x'"),
        ("p.csv", "text\na\n", r"p\.csv, line 2: no field 'prompt'; its fields are 'text'"),
        ("p.parquet", "PAR1", r"p\.parquet: not a Parquet file"),
        ("p.txt", "a", r"p\.txt: prompts are read from \.jsonl, .*not from '\.txt'"),
    ],
)
def test_what_is_malformed_is_named_by_file_line_and_field(name, content, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_value_in_parquet_is_named_by_its_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet, row 2: field 'prompt' is null"):
        load_prompts(tmp_path / "p.parquet")


def test_an_empty_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a dataset folder that can be read"):
        load_prompts(tmp_path)


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    write(tmp_path / "reviews.jsonl", "")
    with pytest.raises(UserError, match=r"review\.jsonl: no such file \(did you mean '.*reviews\.jsonl'"):
        load_prompts(tmp_path / "review.jsonl")
    for path in ("nowhere/else/p.jsonl", "p\0.jsonl", "./p", "~nobody/p", "a/b/c", "x" * 5000 + "/a/b", ""):
        with pytest.raises(UserError):
            load_prompts(path)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60)
    | st.lists(
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: st.dictionaries(
                st.sampled_from(["prompt", "x", ""]) | st.text(max_size=3), inner, max_size=3
            ),
        ),
        max_size=4,
    ).map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
    | st.lists(st.sampled_from(['{"prompt":', '"', "a", "}", "\n", ",", "\\ud800", "\r", "\x00"]), max_size=12).map(
        lambda parts: "".join(parts).encode()
    ),
    st.sampled_from([".jsonl", ".csv", ".parquet"]),
)
def test_any_content_is_prompts_or_a_user_error_that_names_the_file(tmp_path_factory, content, suffix):
    path = write(tmp_path_factory.getbasetemp() / f"any{suffix}", content)
    try:
        prompts = load_prompts(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert len(prompts) > 0 and all(text and text.encode() for text in prompts.texts)
        assert all(len(column) == len(prompts) for column in prompts.fields.values())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was_written(tmp_path_factory, texts):
    path = jsonl(tmp_path_factory.getbasetemp() / "same.jsonl", [{"prompt": text} for text in texts])
    assert load_prompts(path).texts == texts


# Encoding


@pytest.fixture(scope="module")
def tokenizer():
    """A real fast tokenizer of words, small enough to build here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_max_length=4)


def test_ids_are_the_tokenizers_own_for_each_prompt(tokenizer):
    ids = encode(tokenizer, made(["a b", "b", "a c b a a a"]), context=16, max_new_tokens=10)
    assert ids == [[1, 2], [2], [1, 0, 2, 1, 1, 1]]


def test_the_longest_prompt_that_fits_is_taken_and_the_next_refused(tokenizer):
    prompts = made(["a", "a a a", "b b b b", "a"])
    assert len(encode(tokenizer, prompts, context=10, max_new_tokens=6)) == 4
    assert len(encode(tokenizer, prompts, context=None, max_new_tokens=10**9)) == 4
    with pytest.raises(
        UserError, match=r"made\.jsonl, line 3: a prompt of 4 tokens and max_new_tokens 7 .* context of 10"
    ):
        encode(tokenizer, prompts, context=10, max_new_tokens=7)
    with pytest.raises(UserError, match=r"line 2: .*\(and 1 more\); shorten prompts to 2 tokens \(the longest has 4\)"):
        encode(tokenizer, prompts, context=10, max_new_tokens=8)
    with pytest.raises(UserError, match=r"rollout\.max_new_tokens: 10 leaves no room"):
        encode(tokenizer, prompts, context=10, max_new_tokens=10)


def test_a_prompt_without_tokens_is_named(tokenizer):
    with pytest.raises(UserError, match=r"made\.jsonl, line 2: the tokenizer makes no token of the prompt ' '.*1 more"):
        encode(tokenizer, made(["a", " ", "\t"]), context=10, max_new_tokens=2)


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
        assert round(fraction * len(set(texts))) in (0, len(set(texts)))
        return
    assert len(set(held_out.texts)) == round(fraction * len(set(texts)))
    assert not set(training.texts) & set(held_out.texts)
    rows = training.fields["row"] + held_out.fields["row"]
    assert sorted(rows) == list(range(len(texts)))
    for side in (training, held_out):
        assert side.fields["row"] == sorted(side.fields["row"]) == [number - 1 for number in side.numbers]
        assert side.texts == [texts[row] for row in side.fields["row"]]


def test_the_split_is_the_seeds_alone():
    prompts = made(f"p{index}" for index in range(100))
    torch.manual_seed(1)
    first = split_heldout(prompts, 0.2, 3)[1].texts
    torch.manual_seed(2)
    torch.rand(5)
    assert split_heldout(prompts, 0.2, 3)[1].texts == first and len(first) == 20
    assert split_heldout(prompts, 0.2, 4)[1].texts != first


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0, float("nan"), 0.01, 0.99])
def test_a_side_may_not_be_empty(fraction):
    with pytest.raises(UserError, match=r"made\.jsonl: holding out .* of 10 distinct"):
        split_heldout(made("abcdefghij"), fraction, 0)


def test_messages_name_the_rows_of_the_file_after_a_selection():
    chosen = made("abcde").select(torch.tensor([4, 1, 1]))
    assert chosen.texts == ["e", "b", "b"]
    assert chosen.where(0) == "made.jsonl, line 5" and chosen.where(2) == "made.jsonl, line 2"


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_user_error(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        load_prompts(path)

"""Rows: every source reads alike, and a row that cannot be used is named by file and line or left out and counted."""

import json
import os
import socket

import pyarrow
import pyarrow.parquet
import pytest
from dataset_folders import write_subsets
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_trust.errors import UserError
from lm_trust.lm.rows import BadRows, good_rows, read_rows, text_problem

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


def check(row):
    return text_problem(row, "prompt", "prompts.field")


def good(path, bad=None, **options):
    """The rows of a file whose `prompt` is a text, without their numbers."""
    return [row for _, row in good_rows(read_rows(path, **options), check, bad or BadRows())]


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
def test_every_source_gives_the_same_rows_and_their_places(source, tmp_path):
    path = source(tmp_path)
    file = read_rows(path)
    numbers, rows = zip(*file, strict=True)
    assert list(rows) == ROWS and file.source == str(path)
    if path.suffix == ".csv":  # its second row takes two lines, and the first line is the header
        assert file.unit == "line" and numbers == (2, 3, 5)
    elif path.suffix == ".json":  # with empty lines between
        assert file.unit == "line" and numbers == (1, 3, 5)
    else:
        assert file.unit == ("line" if path.suffix == ".jsonl" else "row") and numbers == (1, 2, 3)
    assert file.where(3) == f"{path}, {file.unit} 3"


def test_a_split_is_chosen_by_name(tmp_path):
    path = saved_splits(tmp_path)
    assert len(good(path)) == 3
    assert len(good(path, split="test")) == 1
    assert len(good(path, usual_split="test")) == 1
    with pytest.raises(UserError, match=r"splits: no split 'tset'; set a.split to one of 'test', 'train'"):
        good(path, split="tset", part_keys="a.")
    saved = saved_dataset(tmp_path)
    assert len(good(saved, usual_split="test")) == 3  # the only one there is
    with pytest.raises(UserError, match="no split 'test'"):
        good(saved, split="test")
    with pytest.raises(UserError, match=r"p\.jsonl: a file has no splits; leave out a\.split 'train'"):
        good(jsonl(tmp_path / "p.jsonl", ROWS), split="train", part_keys="a.")


def test_several_splits_without_a_train_split_must_be_chosen_from(monkeypatch):
    import datasets

    asked = []
    both = datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS), b=datasets.Dataset.from_list(ROWS[:1]))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: (asked.append((path, options)), both)[1])
    words = "several splits and none named 'train'; "
    with pytest.raises(UserError, match=words + "set prompts.split to one of 'a', 'b'"):
        good("someone/reviews", part_keys="prompts.")
    with pytest.raises(UserError, match=words + "its splits are 'a', 'b'"):
        good("someone/reviews")
    assert len(good("someone/reviews", split="b")) == 1
    assert len(good("someone/reviews", subset="films", split="b")) == 1
    assert asked == [("someone/reviews", {"name": None})] * 3 + [("someone/reviews", {"name": "films"})]


def test_a_subset_is_chosen_by_name(tmp_path):
    path = write_subsets(tmp_path / "hub", {"main": ROWS, "short": ROWS[:1]})
    assert len(good(path, subset="main")) == 3
    assert len(good(path, subset="short", split="train")) == 1
    with pytest.raises(UserError, match=r"hub: several subsets; set prompts\.subset to one of 'main', 'short'$"):
        good(path, part_keys="prompts.")
    with pytest.raises(UserError, match=r"hub: no subset 'mian'; its subsets are 'main', 'short'$"):
        good(path, subset="mian")
    with pytest.raises(UserError, match=r"no subset 'main'; a folder of save_to_disk has none"):
        good(saved_dataset(tmp_path), subset="main")
    with pytest.raises(UserError, match=r"p\.jsonl: a file has no subsets; leave out prompts\.subset 'main'"):
        good(jsonl(tmp_path / "p.jsonl", ROWS), subset="main", part_keys="prompts.")


@pytest.mark.parametrize("subset", [None, "main"])
def test_a_folder_of_which_datasets_makes_nothing_is_a_user_error(tmp_path, subset):
    jsonl(tmp_path / "test.jsonl", ROWS)
    write(tmp_path / "train.csv", "prompt\nThe film\n")
    with pytest.raises(UserError, match=r"not a dataset folder that can be read \(ValueError: Couldn't infer the same"):
        good(tmp_path, subset=subset)


def test_a_hub_that_cannot_be_reached_is_a_user_error(monkeypatch):
    import datasets

    def load_dataset(path, **_):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"reviews: not a local file, nor a dataset on the hub .*ConnectionError: no route"
    ):
        good("someone/reviews")


def test_without_a_network_the_subsets_are_those_that_datasets_names(monkeypatch):
    """It calls whatever lies in its cache `default` then."""
    import datasets

    def load_dataset(path, **_):
        raise ValueError("Couldn't find cache for config 'two'\nAvailable configs in the cache: ['one']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["default"])
    with pytest.raises(
        UserError, match=r"someone/reviews: not .*config 'two' Available configs in the cache: \['one'\]"
    ):
        good("someone/reviews", subset="two")


def test_csv_values_stay_the_strings_that_they_are(tmp_path):
    path = write(tmp_path / "p.csv", "prompt,answer\nNA,007\n1984,\n")
    assert good(path) == [{"prompt": "NA", "answer": "007"}, {"prompt": "1984", "answer": ""}]


def test_a_csv_value_may_be_as_long_as_a_book(tmp_path):
    long = "very " * 30_000
    assert good(write(tmp_path / "p.csv", f"prompt\n{long}\nshort\n")) == [{"prompt": long}, {"prompt": "short"}]


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
        ("p.csv", '"prompt"x,y\na,b\n', r"p\.csv, line 1: not CSV"),
        ("p.csv", b"prompt\na\n\xff\n", r"p\.csv, line 3: not UTF-8"),
        ("p.csv", "x,prompt,x\n", r"p\.csv, line 1: two columns are named 'x'"),
        ("p.csv", "text\na\n", r"p\.csv, line 2: no field 'prompt'; its fields are 'text'"),
        ("p.parquet", "PAR1", r"p\.parquet: not a Parquet file"),
        ("p.txt", "a", r"p\.txt: rows are read from \.jsonl, .*not from '\.txt'"),
    ],
)
def test_what_is_malformed_is_named_by_file_line_and_field(name, content, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        good(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_value_in_parquet_is_named_by_its_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet, row 2: field 'prompt' is null"):
        good(tmp_path / "p.parquet")


def test_an_empty_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a dataset folder that can be read"):
        good(tmp_path)


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    write(tmp_path / "reviews.jsonl", "")
    with pytest.raises(
        UserError, match=r"prompts\.path: .*review\.jsonl: no such file \(did you mean '.*reviews\.jsonl'"
    ):
        good(tmp_path / "review.jsonl")
    for path in ("nowhere/else/p.jsonl", "p\0.jsonl", "./p", "~nobody/p", "a/b/c", "x" * 5000 + "/a/b", ""):
        with pytest.raises(UserError):
            good(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_user_error(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        good(path)


def test_a_missing_file_is_named_with_its_key():
    with pytest.raises(UserError, match=r"^rewards\.0\.ratings: nowhere/p\.csv: no such file, and no folder 'nowhere'"):
        read_rows("nowhere/p.csv", key="rewards.0.ratings")


# Bad rows that are left out


BAD_LINES = [
    (".jsonl", b'{"prompt": "a"}\n{"prompt"\n[1]\n{"prompt": "\xff"}\n{"prompt": ""}\n{"prompt": "b"}', [2, 3, 4, 5]),
    (".csv", b'prompt,x\na,1\n,1\nc\n"d"d,1\nb,2\n', [3, 4, 5]),
]


@pytest.mark.parametrize(("suffix", "content", "lines"), BAD_LINES)
def test_bad_rows_are_left_out_counted_and_reported(suffix, content, lines, tmp_path, capsys):
    path = write(tmp_path / f"p{suffix}", content)
    bad = BadRows("skip", key="prompts.on_bad_row")
    assert [row["prompt"] for row in good(path, bad)] == ["a", "b"]
    assert len(bad.problems) == len(lines)
    assert all(words.startswith(f"{path}, line {line}: ") for words, line in zip(bad.problems, lines, strict=True))
    bad.print_report()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith(f"{len(lines)} rows were left out (prompts.on_bad_row skip): {path}, line {lines[0]}: ")
    assert f"line {lines[2]}: " in out and out.endswith("; and 1 more\n") == (len(lines) > 3)


def test_nothing_is_reported_where_nothing_was_left_out(tmp_path, capsys):
    bad = BadRows("skip")
    assert len(good(jsonl(tmp_path / "p.jsonl", ROWS), bad)) == 3
    assert bad.report() is None
    bad.print_report()
    assert capsys.readouterr().out == ""


def test_a_file_of_bad_rows_alone_is_an_error_though_they_may_be_left_out(tmp_path):
    bad = BadRows("skip")
    bad.add("other.jsonl, line 1", "no")  # of a file before this one
    with pytest.raises(UserError, match=r"p\.jsonl: none of its 2 rows can be used; the first: .*line 1: a JSON int"):
        good(write(tmp_path / "p.jsonl", "1\n2\n"), bad)
    with pytest.raises(UserError, match=r"e\.jsonl: it holds no rows"):
        good(write(tmp_path / "e.jsonl", ""), bad)


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
def test_any_content_is_rows_or_a_user_error_that_names_the_file(tmp_path_factory, content, suffix):
    path = write(tmp_path_factory.getbasetemp() / f"any{suffix}", content)
    bad = BadRows("skip")
    try:
        kept = good(path, bad)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert kept and all(row["prompt"] and row["prompt"].encode() for row in kept)
    # Without leave to skip, the same rows come or the first bad one is named.
    if not bad.problems:
        assert good(path) == kept or (suffix == ".jsonl" and b"NaN" in content)
    else:
        with pytest.raises(UserError) as caught:
            good(path)
        assert str(caught.value) == bad.problems[0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was_written(tmp_path_factory, texts):
    path = jsonl(tmp_path_factory.getbasetemp() / "same.jsonl", [{"prompt": text} for text in texts])
    assert [row["prompt"] for row in good(path)] == texts

"""What each token added, and steps with the tokens that complete them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_trust.lm.text_pieces import completing_tokens, cut_steps, token_texts


def beginnings(*pieces):
    return ["".join(pieces[:count]) for count in range(len(pieces) + 1)]


@given(st.lists(st.text().filter(lambda text: "\ufffd" not in text)))
def test_tokens_add_up_to_the_text(pieces):
    assert token_texts(beginnings(*pieces)) == pieces


def test_a_character_belongs_to_the_token_that_completes_it():
    # Three tokens write a coffee cup's four bytes; the last text ends within another character.
    assert token_texts(["", "a", "a\ufffd", "a\ufffd", "a☕", "a☕\ufffd"]) == ["a", "", "", "☕", ""]


def test_a_long_text_is_not_compared_character_by_character():
    class Text(str):
        def __iter__(self):
            raise AssertionError("a completion of T tokens would cost T times its length")

    assert token_texts([Text(text) for text in beginnings("very", " very", " good")]) == ["very", " very", " good"]


def test_where_decoding_takes_back_a_space_what_differs_is_added():
    assert token_texts(["", "well", "well ", "well,", "well, so"]) == ["well", " ", ",", " so"]


@pytest.mark.parametrize(
    ("text", "delimiter", "steps"),
    [
        ("", "\n", []),
        ("one", "\n", [("one", 3)]),
        ("one\n", "\n", [("one\n", 4)]),
        ("one\ntwo", "\n", [("one\n", 4), ("two", 7)]),
        ("\n\none\n\n \ntwo\n", "\n", [("one\n", 6), ("two\n", 13)]),
        ("one\n  ", "\n", [("one\n", 4)]),
        ("a\n\nb\nc\n\n\nd", "\n\n", [("a\n\n", 3), ("b\nc\n\n", 8), ("\nd", 10)]),
        ("a. b... c", ".", [("a.", 2), (" b.", 5), (" c", 9)]),
    ],
)
def test_how_a_text_is_cut(text, delimiter, steps):
    assert cut_steps(text, delimiter) == steps
    assert all(text[:end].endswith(step) for step, end in steps)


def test_the_token_that_completes_a_step():
    assert completing_tokens(beginnings("on", "e", "\n", "tw", "o\nth", "ree"), "\n") == [2, 4, None]
    assert completing_tokens(beginnings("one\ntwo\n", ""), "\n") == [0, 0]
    assert completing_tokens(beginnings("one.", " two", "\n", "\n", ""), "\n\n") == [3]
    assert completing_tokens(beginnings("one", ""), "\n") == [None]
    assert completing_tokens([""], "\n") == []


@given(
    st.lists(st.sampled_from(["a", "\n", "a\n", "\na", " ", "", "\n\n", "ab\nc\nd"])), st.sampled_from(["\n", "\n\n"])
)
def test_a_step_is_complete_when_it_can_be_read_and_no_later_text_changes_that(pieces, delimiter):
    """So that it can be paid while the text is being written."""
    texts = beginnings(*pieces)
    steps, places = cut_steps(texts[-1], delimiter), completing_tokens(texts, delimiter)
    assert len(places) == len(steps)
    for count in range(len(texts)):
        closed = [place for place in places if place is not None and place < count]
        early = [place for place in completing_tokens(texts[: count + 1], delimiter) if place is not None]
        assert early == closed
        assert cut_steps(texts[count], delimiter)[: len(early)] == steps[: len(early)]
    assert None not in places[:-1]

"""The prompts that ship with the project: what a neutral opening of a movie review is, checked on each."""

import json
import re
from pathlib import Path

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import lm_trust

DATA = Path(lm_trust.__file__).parent / "data"
COUNTS = {"train": 320, "heldout": 80}


def openings(split: str) -> list[str]:
    lines = (DATA / f"movie_openings.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row.keys() == {"prompt"} for row in rows)
    return [row["prompt"] for row in rows]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9'-]+", text.lower())


@pytest.mark.parametrize("split", COUNTS)
def test_form(split):
    prompts = openings(split)
    assert len(prompts) == COUNTS[split]
    for prompt in prompts:
        assert prompt.isascii() and prompt == " ".join(prompt.split()), prompt
        assert 4 <= len(prompt.split()) <= 9, prompt
        # The model is to go on with the sentence, not to begin another.
        assert prompt[0].isupper() and prompt[-1] not in ".!?", prompt


@pytest.mark.parametrize("split", COUNTS)
def test_the_openings_say_nothing_good_or_bad(split):
    """So a completion's reward is the completion's own."""
    analyser = SentimentIntensityAnalyzer()
    assert {prompt: analyser.polarity_scores(prompt)["compound"] for prompt in openings(split)} == {
        prompt: 0.0 for prompt in openings(split)
    }


def test_no_opening_comes_twice():
    prompts = [" ".join(words(prompt)) for split in COUNTS for prompt in openings(split)]
    assert len(set(prompts)) == len(prompts)


def test_held_out_openings_are_not_near_copies_of_training_ones():
    training = [(prompt, set(words(prompt))) for prompt in openings("train")]
    for heldout in openings("heldout"):
        own = set(words(heldout))
        nearest, overlap = max(
            ((prompt, len(own & other) / len(own | other)) for prompt, other in training),
            key=lambda pair: pair[1],
        )
        assert overlap <= 0.5, (heldout, nearest)


def test_the_openings_do_not_all_begin_alike():
    prompts = [words(prompt) for prompt in openings("train")]
    firsts = [prompt[0] for prompt in prompts]
    beginnings = [" ".join(prompt[:3]) for prompt in prompts]
    assert max(map(firsts.count, set(firsts))) <= len(prompts) / 4
    assert max(map(beginnings.count, set(beginnings))) <= 4

"""What stands inside a completion's text: what each token added, and its steps.

Everything here goes by the texts of a completion's beginnings, after 0, 1, ... tokens, and says of a token or a step
only what was known when it was written: so what they are paid can be told while the text is being written.
"""

from __future__ import annotations

from itertools import takewhile

_UNFINISHED_CHARACTER = "\ufffd"  # what decoding shows where a token is a part of a character


def token_texts(beginnings: list[str]) -> list[str]:
    """What each token added, from the texts after 0, 1, ... tokens: a special token nothing.

    A token that leaves a character unfinished adds nothing; the one that completes it adds the character.
    """
    added, said = [], beginnings[0]
    for text in beginnings[1:]:
        if text.endswith(_UNFINISHED_CHARACTER):
            added.append("")
            continue
        added.append(text[_shared(said, text) :])
        said = text
    return added


def _shared(said: str, text: str) -> int:
    """How many characters of what was said before the text begins with.

    Decoding may change some, as tokenizers do that take out spaces: then what differs is added.
    """
    if text.startswith(said):  # nearly always; character by character a completion of 500 tokens took half a second
        return len(said)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, text, strict=False)))


def cut_steps(text: str, delimiter: str) -> list[tuple[str, int]]:
    """The steps of a text and where each ends in it, in characters.

    Each occurrence of the delimiter ends a step and belongs to it; what follows the last one is a step too. Pieces
    that are blank, the delimiter aside, are none.
    """
    steps, start = [], 0
    while start < len(text):
        found = text.find(delimiter, start)
        end = len(text) if found < 0 else found + len(delimiter)
        if text[start : end if found < 0 else found].strip():
            steps.append((text[start:end], end))
        start = end
    return steps


def completing_tokens(beginnings: list[str], delimiter: str) -> list[int | None]:
    """For each step of the last beginning, the index of the token that completes it with a delimiter.

    None where no delimiter ended the step, which is then the last one and complete when the text is.
    """
    text, places, count = beginnings[-1], [], 1
    for step, end in cut_steps(text, delimiter):
        if not step.endswith(delimiter):
            places.append(None)
            continue
        while count < len(beginnings) - 1 and not beginnings[count].startswith(text[:end]):
            count += 1
        places.append(count - 1)
    return places

"""Movie-review snippets with people's ratings, from the source package `vaderSentiment` 3.2.1 (MIT).

10,605 snippets of reviews, each rated by about 15 people from -4 (most negative) to 4 (most positive); a snippet's
rating here is their mean (C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis
of Social Media Text", ICWSM 2014). The wheels of the package leave them out, so pip fetches the source package once,
checked against its SHA-256, and the ratings are kept in the user's cache:

    python -c "from lm_trust.lm.movie_ratings import movie_ratings; print(movie_ratings())"
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lm_trust.errors import UserError
from lm_trust.lm.cache import cache_root, cached_folder
from lm_trust.terminal import say

PACKAGE, VERSION = "vaderSentiment", "3.2.1"
ARCHIVE = f"{PACKAGE}-{VERSION}.tar.gz"
SHA256 = "5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803"
# The ratings are in an archive within the archive.
INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# The last part counts changes to what is made of them: a new number makes every user's cache anew.
FOLDER = f"movie-ratings-{PACKAGE}-{VERSION}-1"
SECONDS = 300  # that pip may take


def movie_ratings() -> Path:
    """The cached JSONL file, a line `{"text": ..., "rating": ...}` for each snippet.

    The first call looks for the source package in the cache's folder, where one may put it by hand, and else has pip
    fetch it; later ones only verify the checksum.

    Raises:
        UserError: the package cannot be fetched or is damaged (says what to run), or the cache cannot be written.
    """
    return cached_folder(FOLDER, _build) / "ratings.jsonl"


def snippets_of(archive: bytes) -> list[tuple[str, float]]:
    """(text, mean rating) of every snippet in the source package. Nothing is unpacked to the disk."""
    # A line is: number, mean rating, text, set apart by tabs.
    lines = _member(_member(archive, INNER), MEMBER).decode().split("\r\n")
    rows = [line.split("\t") for line in lines if line]
    return [(text, float(rating)) for _, rating, text in rows]


def _build(folder: Path) -> None:
    by_hand = cache_root() / ARCHIVE
    if by_hand.is_file():
        archive = by_hand.read_bytes()
        remedy = "remove it"
    else:
        archive = _fetched()
        remedy = "the package index serves another file than it did; install from another index"
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise UserError(f"{by_hand}: its SHA-256 is not {SHA256[:12]}...: {remedy}")
    with (folder / "ratings.jsonl").open("w", encoding="utf-8") as file:
        for text, rating in snippets_of(archive):
            file.write(json.dumps({"text": text, "rating": rating}) + "\n")


def _fetched() -> bytes:
    """The source package, by pip.

    Raises:
        UserError: pip is missing or fails; says what to run by hand.
    """
    say(f"Fetching rated movie snippets: {PACKAGE} {VERSION} (once) ...")
    with tempfile.TemporaryDirectory() as temporary:
        # pip asks a source package about itself by running its setup.py: the hash makes it look before that.
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "--no-input"]
        command += ["--disable-pip-version-check", "--retries", "1", "--require-hashes", "--dest", temporary]
        try:
            done = subprocess.run(
                [*command, "-r", str(requirements)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise _not_fetched(f"no answer in {SECONDS} seconds") from None
        archive = Path(temporary) / ARCHIVE
        if done.returncode or not archive.is_file():
            raise _not_fetched(_reason(done.stderr))
        return archive.read_bytes()


def _not_fetched(reason: str) -> UserError:
    command = f"python -m pip download --no-deps --no-binary {PACKAGE} --dest {cache_root()} {PACKAGE}=={VERSION}"
    return UserError(
        f"the movie snippets with people's ratings could not be fetched ({reason}); where there is a network run: "
        f"{command} (or copy {ARCHIVE} there), or give ratings of your own"
    )


def _reason(output: str) -> str:
    """pip's own word for what went wrong: its last line that says so, or its last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["pip said nothing"]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1].removeprefix("ERROR: ")[:200]


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.extractfile(name).read()

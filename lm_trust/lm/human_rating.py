"""What people would rate a text, as a reward: ridge regression on sentence embeddings, fitted to ratings at the start.

    rewards: [{kind: human_rating}]

The score has the unit of the ratings; those of the movie snippets (`lm_trust.lm.movie_ratings`) go from -4 to 4. A
tenth of the texts is held out of the fit, and the correlation of scores and ratings on it, which is printed, says how
far the reward can be trusted.

The rated texts are embedded once, which takes a minute for ten thousand, and their embeddings kept in the user's
cache.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm_trust.errors import UserError
from lm_trust.lm.cache import cached_folder
from lm_trust.lm.embeddings import embed, fingerprint, load_embedder
from lm_trust.lm.heldout import split_rows
from lm_trust.lm.movie_ratings import movie_ratings
from lm_trust.lm.rows import BadRows, Row, good_rows, read_rows, text_problem
from lm_trust.lm.text_models import TextModel
from lm_trust.terminal import say

HELD_OUT = 0.1  # of the distinct texts
FEWEST = 50  # rated texts: with fewer a tenth says nothing
LABEL = "human_rating"


@dataclass(frozen=True)
class Ridge:
    """A linear map of embeddings: weight (D,) float64, and an intercept."""

    weight: Tensor
    intercept: float

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(N, D) to (N,) float64."""
        return embeddings.double() @ self.weight + self.intercept


def fit_ridge(embeddings: Tensor, ratings: Tensor, ridge: float) -> Ridge:
    """The map with the least sum of squared errors plus ridge x |weight|^2; the intercept is free.

    Args:
        embeddings: (N, D).
        ratings: (N,).
        ridge: greater than 0, so that there is one such map however few the texts.
    """
    x, y = embeddings.double(), ratings.double()
    x_mean, y_mean = x.mean(0), y.mean()
    x = x - x_mean
    gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ (y - y_mean))
    return Ridge(weight, float(y_mean - x_mean @ weight))


class HumanRatingReward:
    """A reward function: (prompts, completions), B texts each, to B floats.

    Attributes:
        held_out_correlation: Pearson's r of scores and ratings on the held-out tenth; NaN where either is constant.
        held_out_count: rated texts in that tenth.
    """

    def __init__(
        self,
        text_model: TextModel,
        head: Ridge,
        *,
        held_out_correlation: float,
        held_out_count: int,
        reads: str,
        batch_size: int,
        name: str,
    ) -> None:
        self.text_model = text_model
        self.head = head
        self.held_out_correlation = held_out_correlation
        self.held_out_count = held_out_count
        self.__name__ = name
        self._whole = reads == "text"
        self._batch_size = batch_size

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        if not completions:
            return []
        texts = [a + b for a, b in zip(prompts, completions, strict=True)] if self._whole else completions
        return self.head(embed(self.text_model, texts, self._batch_size)).tolist()


def load_human_rating(section: Any, *, key: str, device: torch.device | str) -> HumanRatingReward:
    """The reward function of a `kind: human_rating` section, fitted.

    Args:
        key: the section's place in the configuration, such as `rewards[0]`, which errors name.

    Raises:
        UserError: the ratings cannot be read, are too few or all equal, or the embedding model cannot be loaded.
    """
    texts, ratings = load_ratings(section.ratings or movie_ratings(), key=f"{key}.ratings")
    text_model = load_embedder(section.embedder, key=f"{key}.embedder", device=device)
    embeddings = _rated_embeddings(text_model, texts, section.batch_size)
    held_out = held_out_rows(texts)
    head = fit_ridge(embeddings[~held_out], ratings[~held_out], section.ridge)
    reward = HumanRatingReward(
        text_model,
        head,
        held_out_correlation=correlation(head(embeddings[held_out]), ratings[held_out]),
        held_out_count=int(held_out.sum()),
        reads=section.reads,
        batch_size=section.batch_size,
        name=section.name or LABEL,
    )
    say(
        f"{reward.__name__}: scores agree with people's ratings at r = {reward.held_out_correlation:.2f} "
        f"on the {reward.held_out_count} texts held out of the fit."
    )
    return reward


def load_ratings(path: str | Path, *, key: str) -> tuple[list[str], Tensor]:
    """The texts and their ratings, (N,) float64, of a JSONL or CSV file with the fields text and rating.

    Raises:
        UserError: naming file and line, for a row without a text and a finite number; for too few of them, or one
            rating only.
    """
    file = read_rows(path, key=key)
    rows = good_rows(file, lambda row: _problem(row, key), BadRows())
    texts, ratings = zip(*((row["text"], float(row["rating"])) for _, row in rows), strict=True)
    if (count := len(set(texts))) < FEWEST:
        raise UserError(f"{file.source}: {count} rated texts are too few to learn from; give {FEWEST} or more")
    if len(set(ratings)) == 1:
        raise UserError(f"{file.source}: every text is rated {ratings[0]:g}; give ratings that differ")
    return list(texts), torch.tensor(ratings, dtype=torch.float64)


def held_out_rows(texts: list[str]) -> Tensor:
    """(N,) bool, True at a tenth of the distinct texts, always the same; rows of the same text go together."""
    _, heldout = split_rows(texts, HELD_OUT, seed=0, stream="lm.human_rating")
    return torch.zeros(len(texts), dtype=torch.bool).index_fill_(0, torch.tensor(heldout, dtype=torch.long), True)


def correlation(scores: Tensor, ratings: Tensor) -> float:
    """Pearson's r; NaN where either is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        return float(scipy.stats.pearsonr(scores.numpy(), ratings.numpy()).statistic)


def _problem(row: Row, key: str) -> str | None:
    """What is wrong with a rated text, if anything."""
    fields = f"{key} to a file with the fields text and rating"
    if words := text_problem(row, "text", fields):
        return words
    if "rating" not in row:
        return f"no field 'rating'; its fields are {', '.join(map(repr, row))}; set {fields}"
    rating = row["rating"]
    try:
        # CSV values are texts; JSON's true and false are no numbers.
        is_number = not isinstance(rating, bool) and math.isfinite(float(rating))
    except (TypeError, ValueError, OverflowError):
        is_number = False
    return None if is_number else f"field 'rating' is {rating!r:.60}, not a finite number"


def _rated_embeddings(text_model: TextModel, texts: list[str], batch_size: int) -> Tensor:
    """(N, D) embeddings of the rated texts, from the cache or made and kept there."""

    def build(folder: Path) -> None:
        say(f"Embedding {len(texts)} rated texts (once) ...")
        save_file({"embeddings": embed(text_model, texts, batch_size)}, folder / "embeddings.safetensors")

    folder = cached_folder(f"embeddings-{fingerprint(text_model, texts)[:32]}", build)
    return load_file(folder / "embeddings.safetensors")["embeddings"]

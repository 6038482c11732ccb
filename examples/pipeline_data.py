"""Data for the pipeline of configs/lm/pipeline: from supervised fine-tuning and a reward model to TRPO.

Made from snippets of film reviews that people rated (see `lm_trust.lm.movie_ratings`), none of them used twice:

    python examples/pipeline_data.py            # writes runs/pipeline_data
    lm-trust sft configs/lm/pipeline/sft.yaml
    lm-trust reward-model configs/lm/pipeline/reward_model.yaml
    lm-trust train configs/lm/pipeline/trpo.yaml

- sft.jsonl: 1,280 snippets as `text`, the language that the model is to learn, good reviews and bad ones alike.
- preferences.jsonl: 1,120 pairs whose ratings differ clearly, the better one `chosen`, the other `rejected`.
- prompts.jsonl: the first words of 1,000 others, as `prompt`.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from lm_trust.lm.movie_ratings import movie_ratings

TEXTS, PAIRS, OPENINGS = 1280, 1120, 1000  # for stages of about four minutes on two cores
CLEARLY = 1.5  # points on the scale from -4 to 4
LEAST_WORDS, OPENING_WORDS = 8, 4


def main(folder: Path, ratings: Path) -> None:
    """Write the three files. ratings: JSONL of `text` and `rating`."""
    rows = [json.loads(line) for line in ratings.read_text(encoding="utf-8").splitlines()]
    rating_of = {row["text"].strip(): row["rating"] for row in rows}  # what stands there twice is taken once
    snippets = [text for text in rating_of if len(text.split()) >= LEAST_WORDS]
    random.Random(0).shuffle(snippets)
    texts, rest = cut(snippets, TEXTS)
    opened, compared = cut(rest, OPENINGS)
    openings = dict.fromkeys(" ".join(text.split()[:OPENING_WORDS]) for text in opened)

    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "sft.jsonl", ({"text": text} for text in texts))
    write(folder / "preferences.jsonl", preferences(compared, rating_of)[:PAIRS])
    write(folder / "prompts.jsonl", ({"prompt": opening} for opening in openings))


def preferences(texts: list[str], rating_of: dict[str, float]) -> list[dict[str, str]]:
    """Pairs of the better and the worse half of the texts, of like rank within, where the ratings differ clearly."""
    ranked = sorted(texts, key=rating_of.get)
    worse, better = cut(ranked, len(ranked) // 2)
    pairs = [
        {"chosen": high, "rejected": low}
        for low, high in zip(worse, better, strict=False)
        if rating_of[high] - rating_of[low] >= CLEARLY
    ]
    random.Random(1).shuffle(pairs)
    return pairs


def cut(items: list[str], count: int) -> tuple[list[str], list[str]]:
    return items[:count], items[count:]


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pipeline_data"), movie_ratings())

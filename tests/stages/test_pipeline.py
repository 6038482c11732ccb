"""The pipeline example from its data to TRPO, by its own configs and script, on a tiny model."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from tiny_models import WORDS

from lm_trust.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/lm/pipeline"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("pipeline_data", ROOT / "examples/pipeline_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ratings(tmp_path):
    """Snippets of the tiny vocabulary, rated by their good and bad words."""
    generator, path = random.Random(0), tmp_path / "ratings.jsonl"
    points = {"good": 1, "bright": 1, "liked": 1, "bad": -1, "dull": -1, "hated": -1}
    rows = []
    for _ in range(1600):
        words = generator.choices(WORDS, k=9)
        rows.append({"text": " ".join(words), "rating": float(sum(points.get(word, 0) for word in words))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(name):
    return [json.loads(line) for line in Path("runs/pipeline_data", name).read_text().splitlines()]


def test_three_commands_from_reviews_to_a_policy(
    curve, tmp_path, monkeypatch, models, example, ratings, evaluation, lines
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "TEXTS", 200)
    monkeypatch.setattr(example, "OPENINGS", 100)
    example.main(Path("runs/pipeline_data"), ratings)
    ratings_of = {row["text"]: row["rating"] for row in map(json.loads, ratings.read_text().splitlines())}
    preferences, texts = rows_of("preferences.jsonl"), {row["text"] for row in rows_of("sft.jsonl")}
    assert len(texts) == 200
    assert len(preferences) > 50
    for pair in preferences:
        assert ratings_of[pair["chosen"]] - ratings_of[pair["rejected"]] >= example.CLEARLY
        assert not {pair["chosen"], pair["rejected"]} & texts
    assert all(len(row["prompt"].split()) == example.OPENING_WORDS for row in rows_of("prompts.jsonl"))

    model = ["--model.path", str(models())]
    quick = ["--training.learning_rate", "0.01", "--training.max_steps", "10"]
    assert main(["sft", str(CONFIGS / "sft.yaml"), *model, *quick]) == 0
    assert main(["reward-model", str(CONFIGS / "reward_model.yaml"), *model, *quick]) == 0
    trpo = ["--iterations", "2", "--rollout.batch_size", "8", "--rollout.max_new_tokens", "4"]
    trpo += ["--evaluation.count", "8", "--trackers", "[]", "--completions.every", "0"]
    assert main(["train", str(CONFIGS / "trpo.yaml"), *model, *trpo]) == 0

    for run in ("sft", "reward_model"):
        record = evaluation(f"runs/{run}/evaluation.json")
        assert record["after"]["loss"] < record["before"]["loss"]
    assert len(lines("runs/pipeline_trpo/metrics.jsonl")) == 2
    # The policy started from the first stage's adapter, so its distance from there is nothing at first.
    assert evaluation("runs/pipeline_trpo/evaluation.json")["before"]["reference_kl"] == pytest.approx(0, abs=1e-5)
    assert Path("runs/pipeline_trpo/adapter/adapter_config.json").is_file()

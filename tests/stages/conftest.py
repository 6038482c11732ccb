"""Tiny models and data for the stages, and the commands run as a person runs them."""

import json
import random
from pathlib import Path

import pytest
from tiny_models import write_model

from lm_trust.cli import main

GOOD, BAD = ["good", "bright", "liked", "very"], ["bad", "dull", "hated", "never"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + message.role) }}{% endif %}{{ message.content }} {% endfor %}"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The folder of a tiny model by its architecture, made once."""
    made = {}

    def folder(architecture="llama", *, own_pad=False):
        key = (architecture, own_pad)
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp(architecture), architecture, own_pad=own_pad)
        return made[key]

    return folder


@pytest.fixture
def chat_model(models, tmp_path):
    """A tiny model whose tokenizer has a chat template."""
    from transformers import AutoTokenizer

    folder = write_model(tmp_path / "chat", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def review(words, generator):
    return " ".join(["the film was", *generator.choices(words, k=4)])


@pytest.fixture
def texts():
    """64 rows of one word after a fixed beginning."""
    generator = random.Random(0)
    return [{"text": review(GOOD, generator)} for _ in range(64)]


@pytest.fixture
def pairs():
    """64 pairs, of which the one with the good words is chosen."""
    generator = random.Random(0)
    return [{"chosen": review(GOOD, generator), "rejected": review(BAD, generator)} for _ in range(64)]


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def curve():
    """Asks for the learning curve, which costs more than all else that a tiny stage does."""


@pytest.fixture
def stage(request, tmp_path, monkeypatch, models):
    """stage("sft", rows, **keys) runs the command on the rows and gives its exit status; the run folder is `run`."""
    monkeypatch.chdir(tmp_path)
    if "curve" not in request.fixturenames:
        import lm_trust.stages.training

        monkeypatch.setattr(lm_trust.stages.training, "stage_curve", lambda *_, **__: None)

    def run(command, rows, **keys):
        data = write_jsonl(tmp_path / "data.jsonl", rows)
        defaults = {
            "output": "run",
            "model.path": models(),
            "data.path": data,
            "data.heldout_fraction": 0.25,
            "training.batch_size": 16,
            "training.learning_rate": 0.01,
        }
        Path("stage.yaml").write_text("model: {path: none}\ndata: {path: none}\n")
        given = [part for key, value in (defaults | keys).items() for part in (f"--{key}", str(value))]
        return main([command, "stage.yaml", *given])

    return run


@pytest.fixture
def lines():
    """The records of a run's metrics.jsonl."""

    def read(path="run/metrics.jsonl"):
        return [json.loads(line) for line in Path(path).read_text().splitlines()]

    return read


@pytest.fixture
def evaluation():
    """The content of a run's evaluation.json."""
    return lambda path="run/evaluation.json": json.loads(Path(path).read_text())

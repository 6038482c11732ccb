"""The GPT-2 + IMDB recipe where there is no hub: tiny stand-ins of the same architectures, by the command line."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, write_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    PreTrainedTokenizerFast,
)

from lm_trust.cli import main
from lm_trust.training.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "configs" / "lm"
REVIEWS = ["I saw the film and it was very good but the plot", "we never liked the dull plot and hated it was a film"]


def write_classifier(folder):
    """A random DistilBERT that tells NEGATIVE from POSITIVE, with words of its own order."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *reversed(WORDS)]
    config = DistilBertConfig(
        vocab_size=len(names),
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        initializer_range=0.25,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rule", ["ppo", "trpo"])
def test_the_recipe_runs_on_local_stand_ins(rule, tmp_path):
    model, reward = write_model(tmp_path / "gpt2", "gpt2"), write_classifier(tmp_path / "distilbert")
    reviews = tmp_path / "reviews.jsonl"
    rows = [{"text": f"{word} {review}", "label": 0} for word in WORDS for review in REVIEWS]
    reviews.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "run"
    small = {"iterations": 2, "rollout.batch_size": 8, "rollout.max_new_tokens": 5, "evaluation.count": 6}
    changes = [argument for key, value in small.items() for argument in (f"--{key}", str(value))]
    paths = ["--model.path", str(model), "--reward.path", str(reward), "--prompts.path", str(reviews)]
    command = ["train", str(CONFIGS / f"gpt2_imdb_{rule}.yaml"), "--output", str(output)]
    assert main([*command, *paths, *changes]) == 0

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["accepted"] for line in lines] == [True, True]
    # The published coefficient, then what the controller makes of it: e = -0.2 far below the target.
    assert lines[0]["reference_penalty"] == 0.2
    assert lines[1]["reference_penalty"] == pytest.approx(0.2 * (1 - 0.2 * 8 / 10000))
    samples = json.loads((output / "evaluation.json").read_text())["after"]["samples"]
    classifier, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(reward),
        AutoTokenizer.from_pretrained(reward),
    )
    for sample in samples:
        assert len(sample["prompt"].split()) == 8
        text = tokenizer(sample["prompt"] + sample["completion"], return_tensors="pt")
        expected = classifier.eval()(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits[0, 1]
        assert sample["reward"] == pytest.approx(expected.item(), abs=1e-4)
    # All weights were trained, and are a plain model.
    trained = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(
        not torch.equal(trained[name], start[name])
        for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight")
    )


def test_the_published_hyperparameters():
    ppo = load_config(CONFIGS / "gpt2_imdb_ppo.yaml")
    assert (ppo.rollout.batch_size, ppo.update.epochs, ppo.update.clip, ppo.update.learning_rate) == (
        512,
        4,
        0.2,
        1.41e-5,
    )
    assert (ppo.advantage.gamma, ppo.advantage.lam, ppo.advantage.whiten) == (1.0, 0.95, True)
    adaptive = ppo.reference.adaptive
    assert (ppo.reference.penalty, adaptive.target, adaptive.horizon) == (0.2, 6.0, 10000)
    (reward,) = ppo.rewards
    assert (ppo.model.path, reward.path, ppo.prompts.path) == (
        *("lvwerra/gpt2-imdb", "lvwerra/distilbert-imdb", "stanfordnlp/imdb"),
    )
    trpo = load_config(CONFIGS / "gpt2_imdb_trpo.yaml")
    assert trpo.update.kind == "trpo"
    assert trpo.model_copy(update={"update": ppo.update, "output": ppo.output}) == ppo

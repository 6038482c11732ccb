"""The README's few lines on bringing one's own model, data, reward and policy are run as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_models import write_model

from lm_trust.cli import main
from lm_trust.training.config_yaml import read_yaml, write_yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SENTIMENT = ROOT / "configs" / "lm" / "sentiment_trpo.yaml"
QUICK = {
    "iterations": 1,
    "rollout": {"batch_size": 4, "max_new_tokens": 3},
    "critic": {"minibatches": 1, "epochs": 1},
    "evaluation": {"every": 0, "count": 2},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def block_with(language: str, text: str) -> str:
    (found,) = [block for block in blocks(language) if text in block]
    return found


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder of the reader's own, with a model, and prompts whose rows have more fields."""
    write_model(tmp_path / "my-gpt2", "gpt2")
    words = ["the film", "a plot", "it was", "we saw", "I liked", "the plot", "a film", "we hated", "it is", "never a"]
    rows = [json.dumps({"prompt": text, "source": "mine"}) for text in words]
    (tmp_path / "my_prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "my_rewards.py").write_text(block_with("python", "def brevity"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ones_own_model_data_and_reward(workplace):
    command = shlex.split(block_with("bash", "my-gpt2"))
    rewards = read_yaml(block_with("yaml", "my_rewards:brevity"))
    prompts = read_yaml(block_with("yaml", "my_prompts.jsonl"))
    (workplace / "mine.yaml").write_text(write_yaml({"extends": str(SENTIMENT), **rewards, **prompts, **QUICK}))
    assert command[:3] == ["lm-trust", "train", "configs/lm/sentiment_trpo.yaml"]
    assert main(["train", "mine.yaml", *command[3:]]) == 0
    line = json.loads((workplace / "runs" / "mine" / "metrics.jsonl").read_text())
    assert {"reward/brevity", "reward/vader"} <= line.keys()
    assert (workplace / "runs" / "mine" / "adapter" / "adapter_config.json").is_file()


def test_ones_own_policy():
    example = block_with("python", "class Bandit")
    setting, call = example.split("report = ")
    names = {"torch": torch}
    exec(setting, names)
    policy = names["policy"] = names["Bandit"]()
    names["observations"] = torch.zeros(60, 1)
    names["actions"] = torch.arange(60) % 3
    names["advantages"] = (names["actions"] == 2).float() - 1 / 3
    exec("report = " + call, names)
    assert names["report"].accepted
    assert 0 < names["report"].step_kl <= 0.01
    assert policy.logits.argmax() == 2


def test_every_command_names_files_that_are_there_and_settings_that_exist(capsys):
    commands = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    for command in commands:
        words = shlex.split(command)
        for word in words:
            if word.startswith(("configs/", "examples/")):
                assert (ROOT / word).is_file(), command
        if words and words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert main(["config", "language"]) == 0
    listing = capsys.readouterr().out
    for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", README):
        section, _, name = key.rpartition(".")
        if section in ("update", "reference", "model", "prompts", "rollout", "model.lora"):
            assert name in listing, key

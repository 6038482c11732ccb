"""The reward model from end to end on a tiny model: what it learns, writes, and that it is a reward by itself."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

KEYS = ["step", "epoch", "loss", "accuracy", "margin", "reward_mean", "learning_rate", "gradient_norm", "tokens"]
TRAINED = {"training.epochs": 6, "training.batch_size": 8}


def score(rows, folder, prompts=None):
    """Rewards of texts, or of answers to prompts, by the function that a `kind: classifier` makes of the folder."""
    from lm_trust.lm.classifier_reward import load_classifier
    from lm_trust.training.config_rewards import ClassifierReward

    reward = load_classifier(ClassifierReward(path=str(Path(folder).absolute())), key="rewards.0", device="cpu")
    return torch.tensor(reward(prompts or [""] * len(rows), rows), dtype=torch.float64)


@pytest.mark.parametrize(("architecture", "own_pad"), [("llama", False), ("gpt2", True)])
def test_it_learns_and_is_a_reward_by_itself(stage, pairs, models, architecture, own_pad, capsys, evaluation, lines):
    assert stage("reward-model", pairs, **TRAINED, **{"model.path": models(architecture, own_pad=own_pad)}) == 0
    assert [list(line)[:9] for line in lines()] == [KEYS] * 36
    before, after = evaluation()["before"], evaluation()["after"]
    assert after["accuracy"] > 0.8
    assert after["margin"] > before["margin"] + 1
    low, high = after["accuracy_interval"]
    assert low < after["accuracy"] <= high <= 1
    out = capsys.readouterr().out
    assert "accuracy [95 % interval]" in out
    assert max(map(len, out.splitlines())) <= 80

    # The margins that the stage reports are those of the reward that reads its folder.
    from lm_trust.stages.data import load_pairs
    from lm_trust.training.config_file import load_config
    from lm_trust.training.config_stages import RewardModelConfig

    config = load_config("run/config.yaml", root=RewardModelConfig)
    _, heldout = load_pairs(config.data, AutoTokenizer.from_pretrained("run/adapter"), config.seed)
    chosen, rejected = (score([row[side] for row in heldout.rows], "run/adapter") for side in ("chosen", "rejected"))
    assert after["count"] == len(heldout) == 16
    assert after["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-4)
    assert after["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())


def test_its_adapter_records_the_revision_of_its_base(stage, pairs):
    assert stage("reward-model", pairs, **{"training.max_steps": 1, "model.revision": "v1"}) == 0
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["revision"] == "v1"


def test_the_interval_is_wilsons(stage, pairs, evaluation):
    assert stage("reward-model", pairs, **{"training.max_steps": 1}) == 0
    record = evaluation()["before"]
    n, p, z = record["count"], record["accuracy"], 1.959964
    centre, half = p + z**2 / (2 * n), z * ((p * (1 - p) + z**2 / (4 * n)) / n) ** 0.5
    ends = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert record["accuracy_interval"] == pytest.approx(ends, abs=1e-6)


def test_the_prompt_is_read_before_both(stage, pairs, lines):
    rows = [{"prompt": f"I saw {number} ", **pair} for number, pair in enumerate(pairs)]
    assert stage("reward-model", rows, **{"training.max_steps": 1, "training.batch_size": 8}) == 0
    assert lines()[0]["tokens"] == 16 * (3 + 7 + 1)  # the end of sequence too


@pytest.mark.parametrize("lora", ["{r: 4}", "null"])
def test_one_of_chats_is_a_reward_that_reads_chats(stage, pairs, chat_model, evaluation, lora):
    def chat(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": chat("user", f"we saw it {'very ' * (number % 9)}")}
        | {side: chat("assistant", text) for side, text in pair.items()}
        for number, pair in enumerate(pairs)
    ]
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = "{% for message in messages %}I {{ message.content }} and {% endfor %}"
    tokenizer.save_pretrained(chat_model)
    Path("heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model.path": chat_model, "model.lora": lora, "data.heldout": "heldout.jsonl", "training.max_steps": 2}
    assert stage("reward-model", rows, **keys) == 0
    folder = "run/adapter" if lora != "null" else "run/model"
    prompts = [row["prompt"][0]["content"] for row in rows]
    good, bad = (score([row[side][0]["content"] for row in rows], folder, prompts) for side in ("chosen", "rejected"))
    after = evaluation()["after"]
    assert after["margin"] == pytest.approx((good - bad).mean().item(), abs=1e-5)
    assert after["reward_mean"] == pytest.approx(torch.cat([good, bad]).mean().item(), abs=1e-5)


def test_the_same_seed_gives_the_same_bits(stage, pairs, models):
    keys = {"model.path": models("gpt2"), "training.max_steps": 2}
    for output, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert stage("reward-model", pairs, output=output, seed=seed, **keys) == 0
    one, two, three = (
        hashlib.sha256(Path(f"{name}/adapter/adapter_model.safetensors").read_bytes()).hexdigest()
        for name in ("one", "two", "three")
    )
    assert one == two != three


def test_the_coefficient_centres_the_rewards(stage, pairs, evaluation):
    """With the coefficient at work the rewards end nearer to 0, and the pairs are told apart all the same."""
    for output, coefficient in (("free", 0.0), ("centred", 1.0)):
        keys = {"training.centre_rewards_coefficient": coefficient, "output": output}
        assert stage("reward-model", pairs, **TRAINED, **keys) == 0
    free, centred = (evaluation(f"{name}/evaluation.json")["after"] for name in ("free", "centred"))
    assert abs(centred["reward_mean"]) < 0.5 * abs(free["reward_mean"])
    assert centred["accuracy"] > 0.8


def test_without_lora_the_whole_model_is_saved(stage, pairs):
    assert stage("reward-model", pairs, **TRAINED, **{"model.lora": "null"}) == 0
    chosen, rejected = (score([pair[side] for pair in pairs], "run/model") for side in ("chosen", "rejected"))
    assert (chosen > rejected).double().mean() > 0.8


def test_long_pairs_are_left_out_and_counted(stage, pairs, capsys):
    long = {"chosen": " ".join(["film"] * 30), "rejected": "the film"}
    keys = {"training.max_length": 10, "training.max_steps": 1}
    assert stage("reward-model", [*pairs, long], **keys) == 0
    assert "1 row was left out: a text of more than 10 tokens" in capsys.readouterr().out
    assert stage("reward-model", pairs, **keys | {"training.max_length": 3, "output": "other"}) == 2
    assert "no row can be used: a text of more than 3 tokens; raise training.max_length" in capsys.readouterr().err

"""What a finished language run leaves, with an adapter and with all weights trained: policy, card, merged model."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny_models import write_model
from transformers import AutoModelForCausalLM

from lm_trust.cli import main
from lm_trust.training.build import build_world
from lm_trust.training.config_file import load_config
from lm_trust.training.config_yaml import write_yaml
from lm_trust.training.model_card import model_card

PROMPTS = [
    "the film",
    "a",
    "I saw the plot",
    "we never liked",
    "it is very bright",
    "but the plot",
    "the bad film",
    "it",
]


@pytest.fixture(scope="module", params=["adapter", "model"])
def run(request, tmp_path_factory):
    """(folder, "adapter" or "model") of two iterations, evaluated after each."""
    place = tmp_path_factory.mktemp("run")
    write_model(place / "gpt2", "gpt2")
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    config = {
        "iterations": 2,
        "model": {"path": str(place / "gpt2"), "lora": {"r": 2} if request.param == "adapter" else None},
        "prompts": {"path": str(place / "prompts.jsonl"), "heldout_fraction": 0.3},
        "rollout": {"batch_size": 8, "max_new_tokens": 4, "temperature": 0.9},
        "rewards": [{"name": "length"}],
        "critic": {"kind": "reference_head", "hidden": [4], "epochs": 1, "minibatches": 1},
        "update": {"kind": "trpo", "max_kl": 0.02, "cg_iterations": 3},
        "evaluation": {"every": 1, "count": 4},
        "trackers": [],
    }
    (place / "tiny.yaml").write_text(write_yaml(config))
    assert main(["train", str(place / "tiny.yaml"), "--output", str(place / "out")]) == 0
    return place / "out", request.param


def trained(folder):
    world = build_world(load_config(folder / "config.yaml"))
    world.load_policy(folder)
    return world.trainer


@torch.no_grad()
def logits(causal_lm):
    return causal_lm(input_ids=torch.tensor([[1, 3, 5, 7, 2]])).logits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_policy_loads_without_this_library_and_with_it(run):
    folder, name = run
    assert {"adapter", "model"} & {path.name for path in folder.iterdir()} == {name}
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "gpt2")
    started = logits(base.eval())
    if name == "adapter":
        plain = PeftModel.from_pretrained(base, folder / name)
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder / name)
    policy = trained(folder).policy
    torch.testing.assert_close(logits(plain.eval()), logits(policy.causal_lm), rtol=0, atol=1e-5)
    assert (logits(policy.causal_lm) - started).abs().max() > 1e-3
    with policy.as_reference():
        torch.testing.assert_close(logits(policy.causal_lm), started, rtol=0, atol=1e-5)


def test_evaluate_generate_and_resume_find_the_policy(run, capsys):
    folder, _ = run
    trainer = trained(folder)
    noted = json.loads((folder / "evaluation.json").read_text())["after"]
    assert trainer.task.evaluate(trainer.policy, 4)["reward_mean"] == pytest.approx(noted["reward_mean"])
    assert main(["evaluate", str(folder), "--best"]) == 0
    texts = []
    for options in ([], ["--reference"]):
        assert main(["generate", str(folder), "the film", "--count", "20", "--seed", "3", *options]) == 0
        texts.append(capsys.readouterr().out.splitlines()[-20:])
    assert texts[0] != texts[1]
    before = (folder / "metrics.jsonl").read_text()
    assert main(["train", "--resume", str(folder)]) == 0
    assert (folder / "metrics.jsonl").read_text() == before


def test_generate_escapes_what_the_terminal_lacks(run, monkeypatch):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", terminal)
        assert main(["generate", str(run[0]), "the caf\u00e9", "--count", "2"]) == 0
    assert [line.startswith(b"the caf\\xe9") for line in written.getvalue().splitlines()] == [True, True]


@pytest.mark.parametrize("run", ["adapter"], indirect=True)
def test_generate_needs_the_run_alone_and_not_the_adapter_that_it_began_with(run, tmp_path, capsys, monkeypatch):
    folder, name = run
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / name, "start")
    config = yaml.safe_load((folder.parent / "tiny.yaml").read_text())
    Path("on.yaml").write_text(write_yaml(config | {"iterations": 1, "model": {**config["model"], "adapter": "start"}}))
    assert main(["train", "on.yaml", "--model.lora.r", "8", "--output", "on"]) == 0
    asked, texts = ["generate", "on", "the film", "--count", "20", "--seed", "3"], []
    for _ in range(2):
        capsys.readouterr()
        assert main(asked) == 0
        texts.append(capsys.readouterr().out)
        shutil.rmtree("start", ignore_errors=True)
    assert texts[0] == texts[1]
    assert main([*asked, "--reference"]) == 2
    assert "start" in capsys.readouterr().err


def test_the_card_is_what_the_hub_reads(run):
    folder, name = run
    for policy in (folder / name, folder / "best" / name):
        text = (policy / "README.md").read_text()
        card = ModelCard(text)
        assert card.data.library_name == {"adapter": "peft", "model": "transformers"}[name]
        assert card.data.base_model is None  # a local folder is no hub id, and the hub would refuse the card
        assert {"lm_trust", "trpo"} <= set(card.data.tags)
        assert (policy / "learning_curve.png").read_bytes() == (folder / "learning_curve.png").read_bytes()
        assert "![Learning curve](learning_curve.png)" in text
        fenced = re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL).group(1)
        assert yaml.safe_load(fenced) == yaml.safe_load((folder / "config.yaml").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    rows = dict(re.findall(r"^\| ([^|]*) \| (.+) \|$", (folder / name / "README.md").read_text(), re.MULTILINE))
    for column, side in enumerate(("before", "after")):
        noted = evaluation[side]
        low, high = noted["reward_interval"]
        mean = rows["mean reward [95 % interval]"].split(" | ")[column]
        assert mean == f"{noted['reward_mean']:.3f} [{low:.3f}, {high:.3f}]"
        assert rows["reference KL (nats/sequence)"].split(" | ")[column] == f"{noted['reference_kl']:.3f}"
    assert evaluation["before"]["reference_kl"] < evaluation["after"]["reference_kl"]
    best = json.loads((folder / "best" / "evaluation.json").read_text())
    assert f"{best['reward_mean']:.3f}" in (folder / "best" / name / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_cards_way_to_load_works(run):
    folder, name = run
    code = re.search(r"```python\n(.*?)\n```", (folder / name / "README.md").read_text(), re.DOTALL).group(1)
    names = {}
    exec(code.replace("path/to/this/folder", str(folder / name)), names)
    torch.testing.assert_close(
        logits(names["model"].eval()), logits(trained(folder).policy.causal_lm), rtol=0, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_merge_writes_a_plain_model_once(run, capsys):
    folder, name = run
    if name == "model":
        assert main(["merge", str(folder)]) == 2
        assert f"{folder / 'model'} is a plain model already" in capsys.readouterr().err
        return
    assert main(["merge", str(folder)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(trained(folder).policy.causal_lm), rtol=0, atol=1e-4)
    assert merged.generation_config.temperature == 0.9
    assert main(["merge", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", str(folder), "--best", "--output", str(folder.parent / "best")]) == 0
    best = AutoModelForCausalLM.from_pretrained(folder.parent / "best").eval()
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder.parent / "gpt2"), folder / "best" / "adapter"
    )
    torch.testing.assert_close(logits(best), logits(plain.eval()), rtol=0, atol=1e-4)
    assert main(["merge", str(folder), "--output", ""]) == 2


NASTY = "a`b```\n---\n</details> | <script>"


def test_nothing_in_a_config_breaks_the_card(run):
    folder, _ = run
    config = load_config(folder / "config.yaml")
    (reward,) = config.rewards
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": f"/{NASTY}"}),
            "rewards": [reward.model_copy(update={"name": NASTY})],
            "output": NASTY,
        }
    )
    record = json.loads((folder / "evaluation.json").read_text())
    text = model_card(config, record, picture="learning_curve.png")
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-generation"
    fence = re.search(r"(`{3,})yaml\n(.*?)\n\1(?!`)", text, re.DOTALL)
    assert len(fence.group(1)) > 3
    assert yaml.safe_load(fence.group(2))["output"] == NASTY
    # Outside of code the words are not there.
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)
    assert "script" not in outside
    assert outside.count("</details>") == 1


def test_the_card_loads_the_base_as_training_did(run):
    folder, name = run
    config = load_config(folder / "config.yaml")
    given = {"path": "org/base", "revision": "step1000", "trust_remote_code": True}
    config = config.model_copy(update={"model": config.model.model_copy(update=given)})
    text = model_card(config, json.loads((folder / "evaluation.json").read_text()), picture="x.png")
    calls = re.findall(r"Auto\w+\.from_pretrained\((\w+|\".*?\"), (.*?)\)", text)
    options = "revision='step1000', trust_remote_code=True" if name == "adapter" else "trust_remote_code=True"
    assert [said for _, said in calls] == [options] * 2


@pytest.mark.parametrize(
    ("path", "base"),
    [("openai-community/gpt2", "openai-community/gpt2"), ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct")],
)
def test_a_base_on_the_hub_is_named(run, path, base):
    folder, name = run
    config = load_config(folder / "config.yaml")
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    text = model_card(config, {"after": json.loads((folder / "evaluation.json").read_text())["after"]}, picture="x.png")
    assert ModelCard(text).data.base_model == base
    assert (
        yaml.safe_load(text.split("---")[1])["base_model_relation"] == {"adapter": "adapter", "model": "finetune"}[name]
    )
    assert "| | after |\n|---|---:|\n" in text

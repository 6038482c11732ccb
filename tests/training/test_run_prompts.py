"""What a run's `prompts` section makes of data: chats, bad rows left out, problems of reasoning-gym; and what ships."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import write_model
from transformers import AutoTokenizer, Phi3Config

import lm_trust
from lm_trust.cli import main
from lm_trust.errors import UserError
from lm_trust.lm import generation
from lm_trust.lm.rows import BadRows
from lm_trust.training.build import _prompts, build_world
from lm_trust.training.config_file import load_config
from lm_trust.training.config_yaml import write_yaml

CONFIGS = Path(lm_trust.__file__).parents[1] / "configs" / "lm"
TEMPLATE = (
    "{% for m in messages %}we saw {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} but it{% endif %}"
)
RUN = {
    "iterations": 1,
    "model": {"path": "chatty", "lora": {"r": 2, "alpha": 4}},
    "rollout": {"batch_size": 4, "max_new_tokens": 3, "microbatch_size": 4},
    "rewards": [{"name": "length"}],
    "advantage": {"kind": "returns_to_go", "gamma": 1.0},
    "critic": {"kind": "none"},
    "evaluation": {"every": 0, "count": 2},
    "trackers": [],
}
ROWS = [{"prompt": "the film", "n": 1}, {"prompt": ""}, {"prompt": "the " * 62, "n": 3}, {"prompt": "a plot", "n": 4}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_model(root / "plain", "gpt2")
    shutil.copytree(root / "plain", root / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(root / "chatty")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "chatty")
    return root


@pytest.fixture
def write(tmp_path, monkeypatch, models):
    """Writes a config with these sections, in a folder of its own with models and prompts."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "chatty"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def config(**sections):
        (tmp_path / "run.yaml").write_text(write_yaml(RUN | {"output": str(tmp_path / "run")} | sections))
        return "run.yaml"

    return config


@pytest.fixture
def sampled(monkeypatch):
    """The token ids of the prompts that the commands have sampled completions of."""
    seen, sample = [], generation.sample_completions
    monkeypatch.setattr(
        generation, "sample_completions", lambda policy, ids, **o: seen.extend(ids) or sample(policy, ids, **o)
    )
    return seen


def task_of(path):
    return build_world(load_config(path)).trainer.task


def test_a_token_that_the_model_has_no_embedding_of_is_refused_before_it_loads(write, models):
    path = write(model={"path": "grown"}, prompts={"path": "p.jsonl", "heldout": "p.jsonl"})
    tokenizer = AutoTokenizer.from_pretrained(models / "plain")
    tokenizer.add_tokens(["[X]"])
    tokenizer.save_pretrained("grown")
    shutil.copy(models / "plain" / "config.json", "grown")
    Path("p.jsonl").write_text('{"prompt": "the film"}\n{"prompt": "the [X]"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: the prompt has token 22, .* has 22 embeddings"):
        build_world(load_config(path))


def test_a_prompt_beyond_longropes_original_positions_is_refused_before_the_model_loads(write, models):
    path = write(model={"path": "long"}, prompts={"path": "p.jsonl", "heldout": "p.jsonl"})
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [3.0]}
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 10, "vocab_size": 22}
    AutoTokenizer.from_pretrained(models / "plain").save_pretrained("long")
    Phi3Config(rope_parameters=rope, hidden_size=8, num_attention_heads=4, **sizes).save_pretrained("long")
    Path("p.jsonl").write_text(json.dumps({"prompt": "the " * 8}) + "\n")
    with pytest.raises(UserError, match="8 tokens and max_new_tokens 3 exceed the model's context of 10 tokens"):
        build_world(load_config(path))


def test_bad_rows_of_both_kinds_are_left_out_and_told_in_one_line(write, capsys):
    prompts = {"path": "p.jsonl", "on_bad_row": "skip", "heldout": "p.jsonl"}
    task = task_of(write(prompts=prompts))
    assert task.training.prompts.texts == ["the film", "a plot"] and task.training.prompts.fields["n"] == [1, 4]
    assert len(task.training.ids) == len(task.heldout.ids) == 2
    out = capsys.readouterr().out
    assert out.count("left out") == 1 and out.startswith("4 rows were left out (prompts.on_bad_row skip): ")
    assert "p.jsonl, line 2: " in out and "line 3: a prompt of 62 tokens" in out and out.endswith("; and 1 more\n")
    for left, told in ((ROWS[1], "line 2: field 'prompt' is an empty"), (None, "line 2: a prompt of 62 tokens")):
        rows = [row for row in ROWS if left or row["prompt"]]
        Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["train", write(prompts=prompts | {"on_bad_row": "error"})]) == 2
        assert told in capsys.readouterr().err


def test_a_chat_is_trained_on_and_generated_from_by_one_template(write, capsys):
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("film", "plot", "a film")))
    path = write(prompts={"path": "p.jsonl", "chat": True, "heldout": "p.jsonl"})
    task = task_of(path)
    assert task.tokenizer.decode(task.training.ids[0]) == "we saw film but it"
    assert task.training.prompts.texts[0] == "film"  # what the rewards receive
    assert main(["train", path]) == 0
    capsys.readouterr()
    assert main(["generate", "run", "the plot", "--count", "3"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3 and "the plot" not in out  # answers alone
    assert main(["generate", "run", "the <eos> plot"]) == 2
    assert "prompt, row 1: a message spells the special token '<eos>'" in capsys.readouterr().err


@pytest.mark.parametrize(("row", "put"), [([{"role": "user", "content": "a film"}], "we saw {} but it"), ("I", "{}")])
def test_generate_follows_the_rows_where_the_configuration_does_not_tell(write, sampled, capsys, row, put):
    rows = [[{"role": "user", "content": "the film"}], row]
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    assert main(["train", write(prompts={"path": "p.jsonl", "heldout": "p.jsonl"})]) == 0
    Path("p.jsonl").unlink()
    sampled.clear()
    capsys.readouterr()
    assert main(["generate", "run", "the plot"]) == 0
    assert AutoTokenizer.from_pretrained("chatty").decode(sampled[0]) == put.format("the plot")
    assert capsys.readouterr().out.startswith("the plot") == (put == "{}")  # answers alone, of a chat


def test_generate_puts_a_problem_into_the_runs_templates(write, sampled):
    pytest.importorskip("reasoning_gym")
    prompts = {
        "kind": "reasoning_gym",
        "task": "chain_sum",
        "arguments": {"max_digits": 1, "max_terms": 3},
        "count": 8,
        "heldout_count": 4,
        "template": "the {question} is",
    }
    path = write(prompts=prompts, rewards=[{"name": "exact_match"}])
    task = task_of(path)
    assert (len(task.training.ids), len(task.heldout.ids)) == (8, 4)
    assert not set(task.training.prompts.texts) & set(task.heldout.prompts.texts)
    assert main(["train", path]) == 0
    sampled.clear()
    assert main(["generate", "run", "film"]) == 0
    assert task.tokenizer.decode(sampled[0]) == "we saw the film is but it"


def test_no_held_out_prompt_is_trained_on_where_prompts_are_cut(write, tmp_path):
    rows = [{"prompt": f"{start} {' '.join(['very'] * number)} film"} for start in ("the", "a") for number in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"path": "p.jsonl", "truncate": 3, "heldout_fraction": 0.4}
    task = task_of(write(model={"path": "plain"}, prompts=prompts))
    assert not set(task.training.prompts.texts) & set(task.heldout.prompts.texts)
    assert sorted(task.training.prompts.numbers + task.heldout.prompts.numbers) == list(range(1, len(rows) + 1))


def test_a_model_without_a_template_is_refused_before_it_is_loaded(write, capsys):
    path = write(
        model={"path": "plain"}, prompts={"path": "p.jsonl", "chat": True, "heldout": "p.jsonl", "on_bad_row": "skip"}
    )
    assert main(["train", path]) == 2
    err = capsys.readouterr().err
    assert "p.jsonl: the prompts are chats and the tokenizer of" in err and "has no chat template" in err


@pytest.mark.parametrize("rule", ["trpo", "ppo"])
def test_the_sums_that_ship_hold_out_problems_never_trained_on(rule):
    pytest.importorskip("reasoning_gym")
    config = load_config(str(CONFIGS / f"chain_sum_{rule}.yaml"))
    training, heldout = _prompts(config, BadRows(), lambda: None)
    assert config.evaluation.count == 3 * len(heldout) >= 200  # each problem is asked three times
    assert len(training) == config.prompts.count
    assert not set(training.texts) & set(heldout.texts)
    assert config.update.kind.startswith(rule)

"""The configs of the stages: read, written back, refused in words; and their commands' help."""

from pathlib import Path

import pytest

from lm_trust.cli import main
from lm_trust.errors import UserError
from lm_trust.training.config_file import dump, load_config
from lm_trust.training.config_stages import RewardModelConfig, SftConfig

ROOT = Path(__file__).resolve().parents[2]
STAGE = "model: {path: gpt2}\ndata: {path: data.jsonl}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"text": "a"}\n')
    Path("stage.yaml").write_text(STAGE)
    return tmp_path


def problems(*overrides, root=SftConfig, text=STAGE):
    Path("stage.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config("stage.yaml", overrides, root=root)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("root", [SftConfig, RewardModelConfig])
def test_a_stage_is_read_and_written_back_equal(root, folder):
    config = load_config("stage.yaml", [("training.max_length", "64"), ("model.lora.r", "4")], root=root)
    assert type(config) is root
    assert (config.output, config.training.max_length, config.model.lora.r) == ("runs/stage", 64, 4)
    assert config.data.path == str(folder / "data.jsonl")
    Path("again.yaml").write_text(dump(config))
    assert load_config("again.yaml", root=root) == config


@pytest.mark.parametrize(("name", "root"), [("sft", SftConfig), ("reward_model", RewardModelConfig)])
def test_the_pipelines_configs_are_whole(name, root):
    config = load_config(ROOT / f"configs/lm/pipeline/{name}.yaml", root=root, check_files=False)
    assert config.output == f"runs/{name}"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (("prompts.path", "x"), "command line: prompts: unknown key here; it belongs to language runs"),
        (("training.epoch", "3"), "command line: training.epoch: unknown key; did you mean training.epochs?"),
        (("training.epochs", "0"), "command line: training.epochs: must be greater than 0, got 0"),
        (
            ("training.scheduler", "cosin"),
            "command line: training.scheduler: must be one of linear, cosine, constant, got 'cosin'; "
            "did you mean cosine?",
        ),
        (
            ("training.microbatch_size", "5"),
            "command line: training.microbatch_size: must divide training.batch_size (16), got 5",
        ),
        (
            ("data.heldout_split", "test_sft"),
            "command line: data.heldout_split: has no effect without data.heldout; name the dataset there, or leave it "
            "out",
        ),
        (("data.path", "dato.jsonl"), "command line: data.path: no such file: dato.jsonl; did you mean data.jsonl?"),
        (("data.heldout", "no.jsonl"), "command line: data.heldout: no such file: no.jsonl"),
        (("model.path", "./no"), "command line: model.path: no such folder: ./no"),
    ],
)
def test_a_wrong_setting_is_one_line(override, line):
    assert problems(override) == [line]


def test_what_is_missing_is_named():
    lines = problems(text="model: {path: gpt2}\n", root=RewardModelConfig)
    assert len(lines) == 1
    assert lines[0].startswith("stage.yaml: data: required but not given")


def test_a_stages_config_given_to_train_is_told():
    with pytest.raises(UserError, match="as for lm-trust sft or lm-trust reward-model"):
        load_config("stage.yaml")


@pytest.mark.parametrize("command", ["sft", "reward-model"])
def test_help_and_keys_fit_eighty_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  lm-trust {command}" in text
    assert main(["config", command]) == 0
    keys = capsys.readouterr().out
    assert "training\n  epochs" in keys
    assert max(map(len, (text + keys).splitlines())) <= 80


@pytest.mark.parametrize("command", ["sft", "reward-model"])
def test_what_is_wrong_is_told_before_anything_loads(command, capsys):
    assert main([command, "stage.yaml", "--data.path", "no.jsonl"]) == 2
    assert main([command, "stage.yaml", "--output"]) == 2
    assert main([command, "stage.yaml", "--resume", "run"]) == 2
    assert main([command]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] * 4

"""The command line: what reaches the runner, what is refused before it, and how it is told."""

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_trust import __version__
from lm_trust.arguments import split_overrides
from lm_trust.cli import main
from lm_trust.errors import UserError
from lm_trust.training.config import ControlConfig, LanguageConfig
from lm_trust.training.config_file import dump, load_config

LANGUAGE = """\
iterations: 3
model: {path: gpt2}
prompts: {path: prompts.jsonl}
rewards: [{name: vader}]
"""
CONTROL = """\
total_steps: 1000
environment: {id: CartPole-v1}
"""
COMMANDS = ([], ["train"], ["evaluate"], ["generate"], ["plot"], ["config"], ["sft"], ["reward-model"], ["merge"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "The film"}\n')
    Path("lm.yaml").write_text(LANGUAGE)
    Path("control.yaml").write_text(CONTROL)
    return tmp_path


@pytest.fixture
def calls(folder, monkeypatch):
    """What the runner was called with; it stands in for the modules that import torch."""
    record = []

    def taker(name, status):
        return lambda *arguments, **options: record.append((name, *arguments, *options.values())) or status

    runner = types.ModuleType("runner")
    runner.train, runner.evaluate, runner.generate = (
        taker("train", 143),
        taker("evaluate", 0),
        taker("generate", 0),
    )
    for name in ("run", "trained"):
        monkeypatch.setitem(sys.modules, f"lm_trust.training.{name}", runner)
    return record


def make_run(name, config_file, metrics=True):
    run = Path(name)
    run.mkdir(parents=True)
    config = load_config(config_file).model_copy(update={"output": name})
    (run / "config.yaml").write_text(dump(config))
    if metrics:
        (run / "metrics.jsonl").write_text("{}\n")
    return run


def refused(capsys, *arguments):
    """The lines of a refusal: status 2, nothing on stdout, each line an error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


def python(*arguments, cwd=None, stdout=subprocess.PIPE):
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=60,
    )


# ---- help


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "lm-trust")
def test_help_fits_eighty_columns_and_shows_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("usage: lm-trust")
    assert "examples:\n  lm-trust" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"lm-trust {__version__}\n"


def test_config_lists_the_keys(capsys):
    assert main(["config", "control"]) == 0
    text = capsys.readouterr().out
    assert "total_steps" in text
    assert "update, kind: ppo_clip" in text
    assert main(["config", "language"]) == 0
    assert "model.lora" in capsys.readouterr().out


def test_nothing_heavy_is_imported_before_the_config_is_valid(folder):
    heavy = "[name for name in ('torch', 'transformers', 'gymnasium', 'numpy') if name in sys.modules]"
    done = python("-c", f"import sys, lm_trust.cli; print({heavy}, 'pydantic' in sys.modules)", cwd=folder)
    assert (done.stdout, done.stderr) == ("[] False\n", "")
    call = "main(['train', 'lm.yaml', '--seed', 'x'])"
    code = f"import sys; from lm_trust.cli import main; print({call}, {heavy})"
    done = python("-c", code, cwd=folder)
    assert done.stdout == "2 []\n"
    assert done.stderr == "error: command line: seed: expected a whole number, got 'x' (text)\n"


def test_help_is_quick():
    spent = []
    for _ in range(3):  # the best of three, for a machine that is busy with something else
        start = time.perf_counter()
        done = python("-m", "lm_trust", "--help")
        spent.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert min(spent) < 0.5


# ---- overrides among the arguments


@pytest.mark.parametrize(
    ("arguments", "rest", "overrides"),
    [
        (["train", "c", "--update.max_kl", "1"], ["train", "c"], [("update.max_kl", "1")]),
        (["train", "--update.max_kl", "1", "c"], ["train", "c"], [("update.max_kl", "1")]),
        (["train", "--seed=3", "c"], ["train", "c"], [("seed", "3")]),
        (["train", "c", "--policy.log_std", "-0.5"], ["train", "c"], [("policy.log_std", "-0.5")]),
        (["train", "c", "--policy.log_std=-0.5"], ["train", "c"], [("policy.log_std", "-0.5")]),
        (["train", "c", "--model.path", "-odd"], ["train", "c"], [("model.path", "-odd")]),
        (["train", "c", "--model.path=--odd"], ["train", "c"], [("model.path", "--odd")]),
        (["train", "c", "--model.path", "--"], ["train", "c"], [("model.path", "--")]),
        (["train", "c", "--a.b=c=d", "--a.b="], ["train", "c"], [("a.b", "c=d"), ("a.b", "")]),
        (["train", "c", "--output", "o", "--resume=r"], ["train", "c", "--output", "o", "--resume=r"], []),
        (["train", "--output", "--x", "c"], ["train", "--output", "--x", "c"], []),
        (["train", "-h", "--", "--c"], ["train", "-h", "--", "--c"], []),
    ],
)
def test_overrides_are_told_from_arguments(arguments, rest, overrides):
    assert split_overrides(arguments) == (rest, overrides)


def test_an_override_without_a_value(folder, capsys):
    for arguments in (["--update.max_kl"], ["--update.max_kl", "--seed", "1"]):
        assert refused(capsys, "train", "lm.yaml", *arguments) == [
            "command line: --update.max_kl: a value is missing, as in --update.max_kl VALUE"
        ]
    (line,) = refused(capsys, "train", "lm.yaml", "--resme", "runs/x")
    assert line == "command line: --resme: unknown option; did you mean --resume?"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["lm.yaml", "--update.max_kl", "--seed=1", "-1", "--", "-", "--=", "--resume", "--output", "-x"]
        )
        | st.text(max_size=8).filter(lambda text: text not in ("-h", "--help")),
        max_size=5,
    )
)
def test_any_arguments_are_answered_in_plain_lines(calls, arguments):
    if any(argument.startswith(("-h", "--h")) for argument in arguments):
        return
    assert main(["train", *arguments]) in (2, 143)


# ---- train


def test_train_hands_over_a_validated_config(calls):
    assert main(["train", "control.yaml", "--update.max_kl", "0.5", "--policy.log_std", "-1"]) == 143
    ((name, config, output, resume),) = calls
    assert (name, output, resume) == ("train", Path("runs/control"), None)
    assert isinstance(config, ControlConfig)
    assert (config.update.max_kl, config.policy.log_std, config.output) == (0.5, -1.0, "runs/control")


def test_output_is_text_whatever_it_looks_like(calls, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for given_, expected in (("007", "007"), ("~/x", "/home/someone/x"), ("a: b", "a: b")):
        assert main(["train", "lm.yaml", "--output", given_]) == 143
        _, config, output, _ = calls.pop()
        assert isinstance(config, LanguageConfig)
        assert output == Path(expected)
        assert config.output == expected
    assert main(["train", "lm.yaml", "--output="]) == 2


def test_all_problems_are_printed(calls, capsys):
    assert refused(capsys, "train", "lm.yaml", "--update.max_kl", "0", "--update.dampin", "1") == [
        "command line: update.max_kl: must be greater than 0, got 0",
        "command line: update.dampin: unknown key; did you mean update.damping?",
    ]
    assert refused(capsys, "train", "lmm.yaml") == ["no such file: lmm.yaml; did you mean lm.yaml?"]
    assert calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "a", "b"],
        ["evaluate"],
        ["generate", "x"],
        ["config"],
        ["config", "x"],
        ["--x"],
    ],
)
def test_wrong_usage_is_one_line(arguments, folder, capsys):
    (line,) = refused(capsys, *arguments)
    assert "--help" in line


def test_a_folder_that_holds_a_run_is_refused(calls, capsys):
    make_run("runs/lm", "lm.yaml")
    assert refused(capsys, "train", "lm.yaml") == [
        "output: runs/lm already holds a run; continue it with --resume runs/lm, or choose another --output"
    ]
    assert refused(capsys, "train", "lm.yaml", "--output", "lm.yaml") == [
        "output: lm.yaml is a file; choose another --output"
    ]
    make_run("runs/early", "lm.yaml", metrics=False)  # stopped before its first iteration
    assert main(["train", "lm.yaml", "--output", "runs/early"]) == 143


def test_launch_looks_for_the_settings_before_anything_starts(calls, capsys):
    assert refused(capsys, "launch", "--accelerate-config", "nope.yaml", "train", "control.yaml") == [
        "--accelerate-config: no such file: nope.yaml; `accelerate config` makes one"
    ]


# ---- resume


def test_resume_alone_reads_the_config_of_the_run(calls):
    run = make_run("runs/first", "lm.yaml")
    assert main(["train", "--resume", "runs/first"]) == 143
    assert main(["train", "--resume", "runs/first", "--iterations", "9"]) == 143
    assert main(["train", "lm.yaml", "--resume=runs/first", "--iterations", "9", "--output", "./runs/first"]) == 143
    same, longer, again = calls
    assert same[2:] == longer[2:] == again[2:] == (run, run)
    assert same[1] == load_config(run / "config.yaml")
    assert (longer[1].iterations, longer[1].output) == (9, "runs/first")
    assert again[1] == longer[1]


def test_a_moved_run_goes_on_where_it_lies_now(calls):
    make_run("runs/first", "control.yaml").rename("elsewhere")
    assert main(["train", "--resume", "elsewhere", "--total_steps", "2e3"]) == 143
    assert calls[0][1].output == "elsewhere"
    assert calls[0][1].total_steps == 2000


def test_resume_refuses_what_would_make_it_another_run(calls, capsys):
    make_run("runs/first", "lm.yaml")
    assert refused(capsys, "train", "--resume", "runs/first", "--model.lora.r", "4", "--update.max_kl", "1") == [
        "--resume: model.lora.r is 8 in runs/first and 4 here; "
        "it cannot change in a resumed run, start a new one instead",
        "--resume: update.max_kl is 0.01 in runs/first and 1.0 here; "
        "it cannot change in a resumed run, start a new one instead",
    ]
    assert len(refused(capsys, "train", "--resume", "runs/first", "--update.kind", "ppo_clip")) > 1
    (line,) = refused(capsys, "train", "--resume", "runs/first", "--prompts.heldout_fraction", "0.5")
    assert "prompts.heldout_fraction is" in line  # where the held-out prompts lie may change, and not which they are
    (line,) = refused(capsys, "train", "control.yaml", "--resume", "runs/first")
    assert "other world" in line
    (line,) = refused(capsys, "train", "--resume", "runs/first", "--output", "runs/second")
    assert line == "--output: a resumed run goes on in its own folder; leave out --output or --resume"
    assert calls == []


def test_resume_may_change_what_does_not_touch_its_course(calls):
    make_run("runs/first", "lm.yaml")
    Path("prompts.jsonl").rename("moved.jsonl")
    changes = ["--trackers=[]", "--evaluation.every=2", "--checkpoint.keep_last", "5", "--rollout.microbatch_size", "4"]
    assert main(["train", "--resume", "runs/first", "--prompts.path", "moved.jsonl", *changes]) == 143
    assert calls[0][1].rollout.microbatch_size == 4


def test_resume_follows_a_dataset_that_has_become_a_file(calls, capsys):
    Path("films").mkdir()
    Path("parts.yaml").write_text(LANGUAGE.replace("prompts.jsonl", "./films, subset: main, split: test"))
    make_run("runs/first", "parts.yaml")
    named = ["--prompts.subset", "null", "--prompts.split", "null"]
    assert main(["train", "--resume", "runs/first", "--prompts.path", "prompts.jsonl", *named]) == 143
    assert calls.pop()[1].prompts.subset is None
    lines = refused(capsys, "train", "--resume", "runs/first", *named)  # of the same folder they are other rows
    assert [line.split(" is ")[0] for line in lines] == ["--resume: prompts.subset", "--resume: prompts.split"]


JUDGED = """\
critic: {kind: model, path: ./critic}
rewards: [{kind: classifier, path: ./judge}, {kind: human_rating, ratings: ratings.csv, embedder: ./words}]
"""


def test_resume_follows_models_and_files_that_have_moved(calls, capsys):
    for name in ("critic", "judge", "words", "elsewhere"):
        Path(name).mkdir()
    Path("ratings.csv").write_text("text,rating\n")
    Path("judged.yaml").write_text(LANGUAGE.replace("rewards: [{name: vader}]\n", JUDGED))
    make_run("runs/first", "judged.yaml")
    for name in ("critic", "judge", "words"):
        Path(name).rename(Path("elsewhere", name))
    Path("ratings.csv").rename("moved.csv")
    moved = {
        "critic.path": "./elsewhere/critic",
        "rewards.0.path": "./elsewhere/judge",
        "rewards.1.embedder": "./elsewhere/words",
        "rewards.1.ratings": "moved.csv",
    }
    given = [part for key, value in moved.items() for part in (f"--{key}", value)]
    assert main(["train", "--resume", "runs/first", *given]) == 143
    config = calls.pop()[1]
    assert config.critic.path == str(Path("elsewhere/critic").resolve())
    assert config.rewards[0].path == str(Path("elsewhere/judge").resolve())
    # After an error of memory there, say.
    assert main(["train", "--resume", "runs/first", *given, "--rewards.0.batch_size", "4"]) == 143
    assert calls.pop()[1].rewards[0].batch_size == 4
    # What they are worth may not change, and is told by its own key.
    assert refused(capsys, "train", "--resume", "runs/first", *given, "--rewards.1.weight", "2") == [
        "--resume: rewards.1.weight is 1.0 in runs/first and 2.0 here; "
        "it cannot change in a resumed run, start a new one instead"
    ]


@pytest.mark.parametrize("command", [["train", "--resume"], ["evaluate"], ["generate"]])
def test_a_folder_without_a_run(command, calls, capsys):
    prompt = ["x"] if command == ["generate"] else []
    assert refused(capsys, *command, "none", *prompt) == ["none: no such run folder"]
    Path("plain").mkdir()
    assert refused(capsys, *command, "plain", *prompt) == ["plain: not a run folder: it holds no config.yaml"]


# ---- evaluate and generate


def test_evaluate(calls, capsys):
    run = make_run("runs/first", "control.yaml")
    assert main(["evaluate", "runs/first"]) == 0
    assert main(["evaluate", "runs/first", "--count", "5", "--best", "--videos", "3", "--render"]) == 0
    assert calls == [("evaluate", run, None, False, 0, False), ("evaluate", run, 5, True, 3, True)]
    (line,) = refused(capsys, "evaluate", "runs/first", "--count", "0")
    assert "expected a whole number of 1 or more, got '0'" in line
    (line,) = refused(capsys, "evaluate", "runs/first", "--evaluation.count", "5")
    assert "unrecognized arguments: --evaluation.count 5 (a config's keys are set where it trains;" in line
    assert line.endswith("see lm-trust evaluate --help")


def test_a_run_of_a_version_that_was_less_strict_can_be_evaluated(calls, capsys):
    saved = make_run("runs/first", "control.yaml") / "config.yaml"
    text = saved.read_text()
    saved.write_text(text.replace("minibatches: 4", "minibatches: 5"))
    assert saved.read_text() != text
    assert main(["evaluate", "runs/first"]) == 0
    saved.write_text(text.replace("total_steps: 1000", "total_steps: 0"))  # what it could never be
    (line,) = refused(capsys, "evaluate", "runs/first")
    assert "total_steps" in line


def test_generate(calls, capsys):
    run = make_run("runs/first", "lm.yaml")
    Path("prompts.jsonl").unlink()  # not needed any more
    assert main(["generate", "runs/first", "The film"]) == 0
    options = ["--count", "2", "--max-new-tokens", "7", "--seed", "0", "--reference"]
    assert main(["generate", "runs/first", *options, "--", "-1 star"]) == 0
    assert calls == [
        ("generate", run, "The film", 1, None, None, False, False),
        ("generate", run, "-1 star", 2, 7, 0, True, False),
    ]
    assert main(["generate", "runs/first", "The film", "--best"]) == 0
    assert calls[-1][-2:] == (False, True)
    (line,) = refused(capsys, "generate", "runs/first", "The film", "--best", "--reference")
    assert "not allowed with" in line
    assert refused(capsys, "generate", "runs/first", "The film", "--max_new_tokens", "7") == [
        "unrecognized arguments: --max_new_tokens 7 (did you mean '--max-new-tokens'?); see lm-trust generate --help"
    ]
    assert refused(capsys, "generate", "runs/first", "") == ["PROMPT: must not be empty"]
    make_run("runs/control", "control.yaml")
    assert refused(capsys, "generate", "runs/control", "x") == [
        "runs/control: this is a control run; generate needs a language run"
    ]


# ---- ends


def test_an_error_of_the_runner_is_told_without_a_traceback(calls, capsys, monkeypatch):
    def fail(*arguments):
        raise UserError("reward vader returned NaN for sample 3")

    monkeypatch.setattr(sys.modules["lm_trust.training.run"], "train", fail)
    assert refused(capsys, "train", "lm.yaml") == ["reward vader returned NaN for sample 3"]


def test_an_interrupt_before_training_is_130(calls, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["lm_trust.training.run"], "train", interrupt)
    assert main(["train", "lm.yaml"]) == 130


def test_a_closed_pipe_is_no_error(folder):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python("-m", "lm_trust", "config", "control", stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_module_and_entry_agree(folder):
    done = python("-m", "lm_trust", "train", "none.yaml", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no such file: none.yaml\n")

"""Limits that end a run early, and updates that are rejected time and again."""

import json
import math

import pytest
import tiny_runs

from lm_trust.cli import main
from lm_trust.training.checkpoint import load_checkpoint
from lm_trust.training.config import ControlConfig, LanguageConfig
from lm_trust.training.config_errors import keys_of
from lm_trust.training.config_language import Stop
from lm_trust.training.progress import REASONS
from lm_trust.training.stopping import ADVICE, CONTROL_ADVICE, Stopping

FINE = {"reward_mean": 0.5, "reference_kl": 2.0, "entropy": 1.5, "accepted": True, "reason": "accepted"}


def rejected(reason, **more):
    return FINE | {"accepted": False, "reason": reason} | more


def endings(limits, *lines):
    stopping = Stopping(Stop(**limits))
    return [stopping.after(line) for line in lines]


# The limits


@pytest.mark.parametrize(
    ("limit", "fine", "reached", "words"),
    [
        ("reward", (0.79, -3.0), (0.8, 0.9), "the mean reward 0.9 is at least stop.reward 0.8"),
        ("reference_kl", (0.8, 0.1), (0.801, 7.0), "the reference KL 7 is beyond stop.reference_kl 0.8"),
        ("entropy", (0.8, 2.0), (0.79, 0.0), "the entropy 0 is below stop.entropy 0.8"),
    ],
)
def test_each_limit_ends_the_run_where_it_is_passed(limit, fine, reached, words):
    key = "reward_mean" if limit == "reward" else limit
    # A number that is not finite is null in the file that a resumed run reads.
    assert endings({limit: 0.8}, *({**FINE, key: value} for value in (*fine, math.nan, None))) == [None] * 4
    found = [endings({limit: 0.8}, {**FINE, key: value})[0] for value in reached]
    assert all(ending and not ending.failed for ending in found)
    assert found[-1].words == words


def test_without_limits_nothing_but_rejections_ends_a_run():
    extreme = FINE | {"reward_mean": 1e9, "reference_kl": 1e9, "entropy": 0.0}
    assert endings({}, *[extreme] * 9) == [None] * 9
    assert endings({"rejections": None}, *[rejected("no_improvement")] * 9) == [None] * 9


def test_three_rejections_in_a_row_end_the_run():
    no = rejected("no_improvement")
    found = endings({}, no, no, FINE, no, no, no)
    assert found[:-1] == [None] * 5 and found[-1].failed
    assert endings({"rejections": 1}, no)[0].failed


def test_what_has_nothing_to_learn_from_is_no_failure():
    no, nothing = rejected("kl_exceeded"), rejected("zero_gradient")
    assert endings({}, *[nothing] * 9) == [None] * 9
    # Nor does it make good those before it.
    assert endings({}, no, nothing, no, nothing, no)[-1].failed


def test_the_reasons_and_what_to_try_are_told():
    lines = [
        rejected("kl_exceeded"),
        rejected("non_finite", offender="the reward is inf at token 2"),
        rejected("odd_one"),
    ]
    assert endings({}, *lines)[-1].words == (
        "stop.rejections: 3 updates in a row were rejected: KL over its bound, NaN or infinite, odd one; "
        f"try {ADVICE['kl_exceeded']}; {ADVICE['non_finite']} in a new run, or go on with --resume"
    )
    assert "NaN or infinite (the reward is inf at token 2); try" in endings({"rejections": 1}, lines[1])[0].words
    assert "try other settings of update in" in endings({"rejections": 1}, lines[2])[0].words


def test_the_advice_names_keys_that_there_are():
    keys = {".".join(key) for root in (LanguageConfig, ControlConfig) for key in keys_of(root)}
    named = {word.strip(",") for advice in (*ADVICE.values(), CONTROL_ADVICE) for word in advice.split() if "." in word}
    assert named <= keys and len(named) > 5
    assert ADVICE.keys() <= REASONS.keys()


def test_a_control_run_ends_only_where_nothing_is_finite_any_more():
    stopping = Stopping(Stop(), only_non_finite=True)
    broken, no, nothing = rejected("non_finite"), rejected("kl_exceeded"), rejected("zero_gradient")
    lines = (*[no] * 9, broken, broken, no, broken, FINE, broken, broken)
    assert not any(stopping.after(line) for line in lines)
    assert stopping.after(nothing) is None
    ending = stopping.after(broken | {"offender": "the value is nan at step 1"})
    assert ending.failed
    assert ending.words == (
        "3 updates in a row were rejected: NaN or infinite (the value is nan at step 1); "
        f"try {CONTROL_ADVICE} in a new run"
    )


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    tiny_runs.prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def place(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_run_that_reaches_a_limit_ends_as_any_run_does(place, capsys):
    assert tiny_runs.train("whole") == 0
    kl = [line["reference_kl"] for line in tiny_runs.metrics("whole")]
    first = next(index for index, value in enumerate(kl) if value > 0.05)
    assert first < 3
    assert tiny_runs.train("early", stop={"reference_kl": 0.05}, completions={"every": 9, "show": 0}) == 0
    out = capsys.readouterr().out
    told = (
        f"Stopped after iteration {first + 1} of 4: the reference KL {kl[first]:.4g} is beyond stop.reference_kl 0.05"
    )
    assert told in out and "Held-out evaluation" in out.split(told)[1]
    early = place / "early"
    assert [line["reference_kl"] for line in tiny_runs.metrics(early)] == kl[: first + 1]
    assert json.loads((early / "evaluation.json").read_text()).keys() == {"before", "after"}
    assert load_checkpoint(early / "checkpoints")["iteration"] == first + 1
    names = {path.name for path in early.iterdir()}
    assert names >= {"learning_curve.png", "adapter", "best", "completions"}
    assert [path.name for path in (early / "completions").iterdir()] == [f"iteration-{first + 1:08d}.parquet"]
    # It stays where it has ended.
    assert main(["train", "--resume", "early"]) == 0
    assert told in capsys.readouterr().out
    assert [line["reference_kl"] for line in tiny_runs.metrics(early)] == kl[: first + 1]
    # With the limit taken off it goes on as if it had never been there.
    assert main(["train", "--resume", "early", "--stop.reference_kl", "null"]) == 0
    assert [line["reference_kl"] for line in tiny_runs.metrics(early)] == kl


def test_a_limit_that_the_last_iteration_passes_changes_nothing(capsys):
    assert tiny_runs.train("last", iterations=1, stop={"reward": -9.0}) == 0
    assert "Stopped after" not in capsys.readouterr().out


def test_a_run_that_cannot_move_stops_with_a_checkpoint_and_advice(place, capsys):
    # A step much too long for the linear model, and a line search of one try that wants all that it foretold.
    update = {"kind": "trpo", "max_kl": 5.0, "max_backtracks": 0, "accept_ratio": 1.0}
    assert tiny_runs.train("stuck", iterations=9, update=update) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("error: stop.rejections: 3 updates in a row were rejected: ")
    assert any(advice in err for advice in ADVICE.values()) and "(iteration 3; a checkpoint was written)" in err
    assert "Held-out" not in out
    stuck = place / "stuck"
    assert (stuck / "adapter" / "adapter_config.json").exists()
    assert load_checkpoint(stuck / "checkpoints")["iteration"] == 3
    assert "after" not in json.loads((stuck / "evaluation.json").read_text())
    # The count starts again.
    assert main(["train", "--resume", "stuck"]) == 2
    assert [line["iteration"] for line in tiny_runs.metrics(stuck)] == [1, 2, 3, 4, 5, 6]
    assert main(["train", "--resume", "stuck", "--stop.rejections", "null"]) == 0
    assert len(tiny_runs.metrics(stuck)) == 9


def test_rewards_that_are_all_alike_stop_no_run():
    settings = {
        "rewards": [{"name": "tiny_run_rewards:one"}],
        "rollout": {"batch_size": 6, "max_new_tokens": 4, "samples_per_prompt": 2},
        "advantage": {"kind": "leave_one_out"},
        "critic": {"kind": "none"},
    }
    assert tiny_runs.train("alike", iterations=5, **settings) == 0
    assert [line["reason"] for line in tiny_runs.metrics("alike")] == ["zero_gradient"] * 5

"""A whole comparison from its file: what is refused, what runs and does not run again, what the report says."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pyarrow import parquet

from lm_trust.cli import main
from lm_trust.compare.config import load_comparison
from lm_trust.compare.frontier import Curve, matched_table
from lm_trust.compare.report import make_report
from lm_trust.compare.results import CellResult, curves_of, gradients, read_cell
from lm_trust.compare.run import _limit, _noted, _run_stage, _stages
from lm_trust.compare.running import check_unchanged, failure, train_cells
from lm_trust.errors import UserError
from lm_trust.training.config_file import dump, load_config
from lm_trust.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
BASE = """
seed: 0
total_steps: 240
environment: {id: CartPole-v1, count: 4}
policy: {hidden: [8]}
rollout: {steps: 10}
critic: {hidden: [8], minibatches: 2}
update: {kind: trpo, max_kl: 0.01}
evaluation: {every: 2, count: 3}
checkpoint: {every: 2}
trackers: []
"""
COMPARISON = """
base: base.yaml
shared: {total_steps: 160}
seeds: [0, 1]
rules:
  trpo: {update: {kind: trpo}, knob: update.max_kl, values: [0.01, 0.03]}
  ppo_clip: {update: {kind: ppo_clip, epochs: 2}, knob: update.learning_rate, values: [1.0e-3]}
matched_kl: [0.002]
one_update: {iterations_before: 1, evaluations: 4, values: {trpo: [0.01]}}
jobs: 2
"""

STUDY = {"iterations_before": 1, "rows": []}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "comparison.yaml").write_text(COMPARISON)
    return tmp_path


def load(files, *overrides):
    return load_comparison(files / "comparison.yaml", overrides, str(files / "out"))


def test_every_rule_runs_with_every_value_and_seed_and_differs_in_nothing_else(files):
    comparison = load(files)
    assert [(cell.rule, cell.value, cell.config.seed) for cell in comparison.cells] == [
        ("trpo", 0.01, 0),
        ("trpo", 0.03, 0),
        ("ppo_clip", 0.001, 0),
        ("trpo", 0.01, 1),
        ("trpo", 0.03, 1),
        ("ppo_clip", 0.001, 1),
    ]
    updates = [cell.config.update for cell in comparison.cells[:3]]
    assert [update.kind for update in updates] == ["trpo", "trpo", "ppo_clip"]
    assert (updates[0].max_kl, updates[1].max_kl, updates[2].learning_rate) == (0.01, 0.03, 0.001)
    rest = [cell.config.model_dump(exclude={"update", "seed", "output"}) for cell in comparison.cells]
    assert all(one == rest[0] for one in rest) and rest[0]["total_steps"] == 160
    assert len({cell.folder for cell in comparison.cells}) == 6
    assert [candidate.value for candidate in comparison.candidates] == [0.01, 0.001]


def test_a_knob_has_the_values_of_its_key(files):
    pendulum = [("shared.environment", "{id: Pendulum-v1}"), ("one_update", "null")]
    for knob, values in (("policy.log_std", [-1.0, 0.0]), ("rollout.steps", [10.0, 20.0])):
        cells = load(files, *pendulum, ("rules.trpo.knob", knob), ("rules.trpo.values", str(values))).cells
        section, key = knob.split(".")
        assert [getattr(getattr(cell.config, section), key) for cell in cells[:2]] == values
        assert cells[0].folder.parent.name == f"{values[0]:g}"
    study = [("rules.ppo_clip.knob", "update.entropy"), ("rules.ppo_clip.values", "[0, 0.01]")]
    comparison = load(files, *study, ("one_update.values", "{ppo_clip: [0.0]}"))
    assert comparison.candidates[-1].config.update.entropy == 0.0


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([("rules.trpo.values", "[0.0]")], "rules.trpo.knob: update.max_kl: must be greater than 0, got 0.0"),
        ([("rules.trpo.values", "[.inf]")], "rules.trpo.values.0: expected a finite number, got inf"),
        ([("rules.trpo.values", "[]")], "rules.trpo.values: a knob needs values"),
        ([("rules.trpo.values", "[0.1, 0.1]")], "the same value stands there twice"),
        ([("rules.trpo.values", "[0.01, 0.01000001]")], "the same value stands there twice, in six digits"),
        ([("rules.reference", "{update: {kind: trpo}}")], "rules.reference: the page calls the start so"),
        ([("rules.trpo.knob", "update.max_lk")], "update.max_lk: unknown key"),
        ([("rules.ppo_clip.update.clip", "2")], "rules.ppo_clip: update.clip: must be less than 1"),
        ([("shared.total_steps", "no")], "shared: total_steps"),
        ([("seeds", "[1, 1]")], "the same seed stands there twice"),
        ([("base", "other.yaml")], "no such file"),
        ([("limit", "{}")], "limit: it is of reward per nat of reference KL"),
        ([("one_update.values.ppo", "[1.0]")], "there is no rule of this name"),
        (
            [("one_update.iterations_before", "4")],
            "one_update.iterations_before: must be less than the 4 iterations of a run, got 4",
        ),
        ([("rules.trpo.also", "{critic: {clip: 0.2}}")], "one_update: needs rules that differ in their update"),
        (
            [("rules.ppo_clip.knob", "advantage.lam"), ("rules.ppo_clip.values", "[0.9]")],
            "one_update: candidates differ in more than their update: trpo has advantage.lam 0.95 and ppo_clip 0.9;",
        ),
        ([("rules.trpo.also", "{update: {}}")], "the update section stands in update"),
        ([("rules.trpo.also", "{seed: 5}")], "rules.trpo: seed is what seeds sets"),
        ([("rules.trpo.knob", "seed"), ("rules.trpo.values", "[3, 4]")], "rules.trpo: seed is what seeds sets"),
        ([("seed", "[0]")], "seed: unknown key; did you mean seeds?"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_runs(files, overrides, words):
    with pytest.raises(UserError, match=r"(?s).*" + words.replace("[", r"\[").replace("?", r"\?")):
        load(files, *overrides)
    assert not (files / "out").exists()


def compare(files, *options):
    return main(["compare", str(files / "comparison.yaml"), "--output", str(files / "out"), *options])


def test_a_comparison_from_its_file_to_its_page(files, capsys, monkeypatch):
    """Also: nothing finished is run again, a failed cell is reported and stops nothing, a page is remade from disk."""
    assert (
        compare(
            files,
            "--rules.broken",
            "{update: {kind: natural_gradient}, also: {environment: {id: No-v0}}}",
            "--one_update",
            "null",
        )
        == 1
    )
    out = capsys.readouterr().out
    assert "broken, seed 0: FAILED" in out and "No-v0" in out
    report = json.loads((files / "out/report.json").read_text())
    assert [cell["status"] for cell in report["cells"]] == (["finished"] * 3 + ["failed"]) * 2
    assert all("No-v0" in cell["error"] for cell in report["cells"] if cell["status"] == "failed")
    assert any("broken failed" in sentence for sentence in report["summary"])
    times = {path: path.stat().st_mtime_ns for path in (files / "out/cells").glob("*/*/*/metrics.jsonl")}
    assert len(times) == 6

    assert compare(files) == 0  # without the broken rule, and with the study
    assert "6 of 6 runs were finished before." in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    report = json.loads((files / "out/report.json").read_text())
    assert report["same_start"] == {"checked": 6, "equal": True}
    assert [row["rule"] for row in report["one_update"]["rows"]] == ["trpo", "ppo_clip"]
    assert {row["rule"] for row in report["matched"]} == {"trpo", "ppo_clip"}
    trpo = next(cell for cell in report["cells"] if cell["rule"] == "trpo")
    assert trpo["violations"] == 0 and trpo["steps"] == 160 and trpo["iterations"] == 4 and trpo["seconds"] > 0
    rows = parquet.read_table(files / "out/results.parquet").to_pylist()
    assert len(rows) == 6 * 4
    assert [row["bound"] for row in rows if row["rule"] == "ppo_clip"] == [None] * 8
    study = (files / "out/one_update.json").stat().st_mtime_ns
    page = (files / "out/report.html").read_text()
    assert "ppo_clip" in page

    (files / "out/report.html").unlink()
    assert compare(files, "--plot-only") == 0
    assert (files / "out/report.html").read_text() == page
    assert (files / "out/one_update.json").stat().st_mtime_ns == study

    # A longer comparison keeps what there is; one of other settings is refused.
    assert (
        main(["compare", str(files / "comparison.yaml"), "--output", str(files / "out"), "--shared.total_steps", "80"])
        == 2
    )
    assert "holds a run with total_steps 160, which is 80 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, words",
    [(UserError("rewards: broke"), "rewards: broke"), (RuntimeError("out of\nmemory"), "RuntimeError: out of memory")],
)
def test_a_study_that_fails_is_reported_and_the_page_is_made_without_it(files, monkeypatch, capsys, error, words):
    def study(*_, **__):
        raise error

    monkeypatch.setattr("lm_trust.compare.run.train_cells", lambda *_: 0)
    monkeypatch.setattr("lm_trust.compare.one_update.one_update_study", study)
    assert compare(files) == 1
    assert f"one_update: FAILED: {words}" in capsys.readouterr().out
    report = json.loads((files / "out/report.json").read_text())
    assert report["one_update"] is None and report["errors"] == {"one_update": words}
    assert f"<li>The one-update study failed: {words}</li>" in (files / "out/report.html").read_text()
    monkeypatch.setattr("lm_trust.compare.one_update.one_update_study", lambda *_, **__: STUDY)
    assert compare(files) == 0  # it is tried again
    assert json.loads((files / "out/report.json").read_text())["errors"] == {}


def test_what_a_stage_found_before_is_in_the_report_of_an_interrupted_comparison(files, monkeypatch):
    monkeypatch.setattr("lm_trust.compare.run.train_cells", lambda *_: 0)
    monkeypatch.setattr("lm_trust.compare.one_update.one_update_study", lambda *_, **__: STUDY)
    assert compare(files) == 0
    monkeypatch.setattr("lm_trust.compare.run.train_cells", lambda *_: 143)
    assert compare(files) == 143
    assert json.loads((files / "out/report.json").read_text())["one_update"] == STUDY
    # A study of other settings is neither shown nor begun.
    assert compare(files, "--one_update.evaluations", "5") == 143
    assert json.loads((files / "out/report.json").read_text())["one_update"] is None


TOUCHING_NO_RUN = [
    ("shared.rollout.microbatch_size", "3"),
    ("shared.rewards", "[{name: vader, dense: true, timeout: 60}]"),
]


@pytest.mark.parametrize(
    ("name", "overrides", "is_found_again"),
    [
        ("limit", [("rules.trpo.values", "[0.5]"), ("shared.iterations", "8"), ("matched_kl", "[0.1]")], True),
        ("limit", TOUCHING_NO_RUN, True),
        ("limit", [("shared.rollout.temperature", "0.9")], False),
        ("limit", [("shared.rewards", "[{name: length}]")], False),
        ("limit", [("shared.model.revision", "v2")], False),
        ("limit", [("shared.prompts.heldout", "null")], False),
        ("limit", [("shared.evaluation.count", "7")], False),
        ("limit", [("seeds", "[9, 0, 1]")], False),
        ("limit", [("limit.samples", "8")], False),
        ("one_update", TOUCHING_NO_RUN, True),
        ("one_update", [("shared.reference.loss", "0.3")], False),
        ("one_update", [("one_update.evaluations", "8")], False),
        ("one_update", [("one_update.values", "{trpo: [0.5]}")], False),
    ],
)
def test_what_a_stage_found_is_found_anew_only_where_it_is_another(
    tmp_path, monkeypatch, name, overrides, is_found_again
):
    monkeypatch.chdir(ROOT)
    folder = RunFolder(tmp_path)

    def stage(*overrides):
        stages = _stages(load_comparison("configs/compare/sentiment.yaml", overrides))
        return next(each for each in stages if each.name == name)._replace(find=lambda: {"found": 1})

    _run_stage(stage(), folder, errors := {})
    assert not errors and _noted(stage(), folder) == {"found": 1}
    assert _noted(stage(*overrides), folder) == ({"found": 1} if is_found_again else None)
    # A key that came with a later version, and what another one noted.
    path = tmp_path / f"{name}.json"
    noted = json.loads(path.read_text())
    noted["of"][1]["model"].pop("revision")
    path.write_text(json.dumps(noted))
    assert _noted(stage(), folder) == {"found": 1}
    for older in (["kind: x"], [{"kind": "x"}]):
        path.write_text(json.dumps(noted | {"of": [noted["of"][0], *older * len(stage().configs)]}))
        assert _noted(stage(), folder) is None


def test_the_limit_closes_what_it_samples_with(monkeypatch):
    closed = []
    trainer = SimpleNamespace(task=SimpleNamespace(close=lambda: closed.append(True)), policy=None)
    monkeypatch.setattr("lm_trust.training.build.build_world", lambda config: SimpleNamespace(trainer=trainer))
    monkeypatch.setattr("lm_trust.compare.limit.reference_rewards", lambda *_: np.full((2, 8), np.nan))
    comparison = SimpleNamespace(
        cells=[SimpleNamespace(config=None)], config=SimpleNamespace(limit=SimpleNamespace(prompts=2, samples=8))
    )
    with pytest.raises(ValueError, match="finite rewards"):
        _limit(comparison)
    assert closed == [True]


def test_the_report_counts_the_seeds_that_were_asked_for(files, monkeypatch):
    """Of three the third has finished for no rule."""
    kl, reward = np.array([0.001, 0.01]), np.array([0.0, 9.0])
    curves = [Curve(rule, None, seed, kl, reward) for rule in ("trpo", "ppo_clip") for seed in (0, 1)]
    monkeypatch.setattr("lm_trust.compare.report.curves_of", lambda *_, **__: curves)
    report, _ = make_report(load(files, ("seeds", "[0, 1, 2]")), None, None, {})
    assert [(row["seeds"], row["reached"], row["mean"]) for row in report["matched"]] == [(3, 2, None)] * 2
    assert report["improvement"] == [] and [entry["kl"] for entry in report["frontier"]] == [[], []]
    report, _ = make_report(load(files), None, None, {})
    assert [(row["seeds"], row["mean"]) for row in report["matched"]] == [(2, pytest.approx(1.0))] * 2


def test_a_rule_that_went_far_leaves_the_others_their_frontier(files, monkeypatch):
    reward = np.array([0.0, 9.0])
    curves = [
        Curve(rule, None, seed, np.array(kl), reward)
        for rule, kl in (("trpo", [0.001, 0.01]), ("ppo_clip", [0.02, 3.0]))
        for seed in (0, 1)
    ]
    monkeypatch.setattr("lm_trust.compare.report.curves_of", lambda *_, **__: curves)
    report, _ = make_report(load(files), None, None, {})
    assert [(entry["kl"][0], entry["kl"][-1], len(entry["kl"])) for entry in report["frontier"]] == [
        (0.001, 0.01, 40),
        (0.02, 3.0, 40),
    ]


def test_a_control_seed_without_one_of_the_values_has_no_curve(files):
    """Of three values the middle one earns the most; a line from the first to the last would cross it far below."""
    comparison = load(files, ("rules.trpo.values", "[0.01, 0.02, 0.03]"), ("one_update", "null"))
    ends = {0.01: 100.0, 0.02: 1000.0, 0.03: 100.0}
    results = [
        CellResult(
            cell, {"status": "finished"}, [], {"kl": [0.0, cell.value], "reward": [0.0, ends[cell.value]]}, (), {}
        )
        for cell in comparison.cells
        if cell.rule == "trpo"
    ]
    whole = curves_of(results, language=False)
    assert [(one.rule, one.value, one.seed) for one in whole] == [("trpo", None, 0), ("trpo", None, 1)]
    assert all(list(one.kl) == list(ends) and list(one.reward) == list(ends.values()) for one in whole)
    results[4].summary["status"] = "failed"  # the middle value of seed 1
    (row,) = matched_table(curves_of(results, language=False), [0.02], seeds=2)
    assert (row["reached"], row["mean"]) == (1, None)
    assert len(curves_of(results, language=True)) == 5  # there each value is a curve of its own


LANGUAGE = """
iterations: 2
model: {path: gpt2, gradient_checkpointing: false}
prompts: {path: prompts.jsonl}
rewards: [{name: "time:time", timeout: 5}]
"""


def test_a_comparison_follows_files_that_have_moved_and_takes_no_others_for_them(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "base.yaml").write_text(LANGUAGE)
    (files / "comparison.yaml").write_text("base: base.yaml\nseeds: [0]\nrules: {trpo: {}}\n")
    (files / "prompts.jsonl").write_text('{"prompt": "The film"}\n')
    (cell,) = load(files).cells
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(dump(cell.config))
    called = ("shared.rewards", '[{name: "time:time", timeout: 9}]')
    check_unchanged(load(files, called, ("shared.model.gradient_checkpointing", "true")).cells)
    moved = ("shared.prompts.path", str(files / "moved.jsonl"))
    shutil.copy(files / "prompts.jsonl", files / "moved.jsonl")
    with pytest.raises(UserError, match=r"holds a run with prompts\.path '.*/prompts\.jsonl', which"):
        check_unchanged(load(files, moved).cells)
    (files / "prompts.jsonl").unlink()
    check_unchanged(load(files, moved).cells)
    with pytest.raises(UserError, match=r"holds a run with model\.path 'gpt2'"):
        check_unchanged(load(files, moved, ("shared.model.path", "gpt2-medium")).cells)
    with pytest.raises(UserError, match=r"holds a run with rewards\.0\.name 'time:time'"):
        check_unchanged(load(files, moved, ("shared.rewards", "[{name: 'time:sleep'}]")).cells)


def test_what_another_process_writes_to_is_left_alone(files, capsys):
    """Of a comparison that was killed a run may go on, its folder like that of a failed one."""
    cell = load(files).cells[0].folder
    for taken in (files / "out", cell):
        with RunFolder(taken).claimed():
            (taken / "metrics.jsonl").write_text("")
            assert compare(files) == 2
            assert f"another process is writing to {taken}" in " ".join(capsys.readouterr().err.split())
            assert (taken / "metrics.jsonl").exists() and not (files / "out/report.html").exists()


def test_the_page_alone_needs_a_report(files, capsys):
    assert compare(files, "--plot-only") == 2
    assert "there is no report.json yet" in capsys.readouterr().err
    (files / "out").mkdir()
    (files / "out/report.json").write_text("[]")
    assert compare(files, "--plot-only") == 2
    assert "there is no results.parquet yet" in capsys.readouterr().err
    shutil.copy(files / "base.yaml", files / "out/results.parquet")
    assert compare(files, "--plot-only") == 2
    assert "report.json: not a file that a run wrote" in " ".join(capsys.readouterr().err.split())


def test_a_report_that_lacks_a_key_is_one_line(files, monkeypatch, capsys):
    monkeypatch.setattr("lm_trust.compare.run.train_cells", lambda *_: 0)
    assert compare(files, "--one_update", "null") == 0
    report = json.loads((files / "out/report.json").read_text())
    cell = {key: value for key, value in report["cells"][0].items() if key != "seed"}
    undated = {key: value for key, value in report.items() if key != "created"}
    for edited, word in ((report | {"cells": [cell]}, "KeyError: 'seed'"), (undated, "no attribute 'created'")):
        (files / "out/report.json").write_text(json.dumps(edited))
        assert compare(files, "--plot-only") == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "lacks something that the page shows" in told and word in told


def test_a_page_that_cannot_be_written_is_one_line(files, monkeypatch, capsys):
    monkeypatch.setattr("lm_trust.compare.run.train_cells", lambda *_: 0)
    (files / "out/report.html").mkdir(parents=True)
    for options in (["--one_update", "null"], ["--plot-only"]):
        assert compare(files, *options) == 2
        assert "out/report.html could not be written" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_cannot_be_begun_ends_the_comparison_and_its_runs(files, capsys):
    first, second = load(files).cells[:2]
    second.folder.with_suffix(".yaml").mkdir(parents=True)
    assert compare(files, "--shared.total_steps", "4000000", "--one_update", "null") == 2
    assert "trpo/0.03/seed0.yaml could not be written" in " ".join(capsys.readouterr().err.split())
    assert first.folder.with_suffix(".log").is_file()
    assert not multiprocessing.active_children()


def test_a_failure_that_cannot_be_noted_is_told(files, monkeypatch):
    """As on a full disk, which is what ended the run."""
    monkeypatch.syspath_prepend(files)
    cell = load(files).cells[0]
    note = cell.folder.with_suffix(".failed")
    (files / "full_disk_simulator.py").write_text(
        f"import os\n\ndef build():\n    os.mkdir({str(note)!r})\n    raise MemoryError('no room for it')\n"
    )
    environment = cell.config.environment.model_copy(update={"id": "full_disk_simulator:build"})
    lines = []
    broken = replace(cell, config=cell.config.model_copy(update={"environment": environment}))
    assert train_cells([broken], 1, lines.append) == 0
    assert len(lines) == 1 and "MemoryError: no room for it" in lines[0]
    note.rmdir()
    note.touch()  # there was room for its name, and for no text
    assert read_cell(cell).summary["status"] == "failed"


@pytest.mark.parametrize(
    ("name", "line", "forward", "backward"),
    [
        # Eight times through the batch, and two candidates; with a budget once forward and twice back before.
        ("sentiment_ppo", {"gradient_steps": 15, "gradients_computed": 16, "candidates": 2}, 8 + 2, 8),
        ("sentiment_ppo_budget", {"gradient_steps": 16, "gradients_computed": 16, "candidates": 2}, 8 + 2 + 1, 8 + 2),
        # Where a minibatch's step that is furthest off is looked for before each gradient, eight times forward for it.
        (
            "sentiment_ppo",
            {"gradient_steps": 16, "gradients_computed": 16, "forwards_computed": 16, "candidates": 1},
            8 + 8 + 1,
            8,
        ),
        # The gradient, four Fisher products on a quarter of the rows, a candidate; with a budget once more back.
        ("sentiment_trpo", {"cg_iterations": 4, "candidates": 1}, 2 + 1, 2),
        ("sentiment_trpo_budget", {"cg_iterations": 4, "candidates": 1}, 2 + 1, 2 + 1),
    ],
)
def test_an_updates_cost_is_that_of_its_passes(name, line, forward, backward):
    overrides = [("update.minibatches", "2")] if "gradient_steps" in line else [("update.fisher_fraction", "0.25")]
    if "forwards_computed" in line:
        overrides = [("update", "{kind: trpo_penalty, minibatches: 2}")]
    config = load_config(ROOT / f"configs/lm/{name}.yaml", overrides)
    assert gradients(line, config) == pytest.approx((forward + 2 * backward) / 3)


def test_a_cell_reads_as_its_run_tells(files):
    cell = load(files, ("seeds", "[3]"), ("rules.trpo.values", "[0.03]")).cells[0]
    lines = []
    assert train_cells([cell], 1, lines.append) == 0
    assert len(lines) == 1 and lines[0].startswith("1 of 1: trpo 0.03, seed 3: ")
    result = read_cell(cell)
    metrics = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step_kl"] for row in result.rows] == [line["step_kl"] for line in metrics]
    # A gradient, the Fisher products on all rows, a forward pass for each candidate of the line search.
    spent = sum(1 + line["cg_iterations"] + line["candidates"] / 3 for line in metrics)
    assert result.summary["gradients"] == pytest.approx(spent)
    assert result.rows[-1]["seconds"] == pytest.approx(sum(line["iteration_seconds"] for line in metrics))
    taken = [line["step_seconds"] for line in metrics]
    assert [row["step_seconds"] for row in result.rows] == taken
    assert result.summary["step_seconds"] == pytest.approx(sum(taken))
    assert 0 < result.summary["step_seconds"] < result.summary["update_seconds"]
    # Control: the evaluations of iterations 2 and 4, at the mean step KL until then.
    kls = [line["step_kl"] for line in metrics]
    assert result.trajectory["kl"] == pytest.approx([sum(kls[:2]) / 2, sum(kls) / 4])
    assert result.trajectory["steps"] == [80, 160]
    assert (
        result.trajectory["reward"][-1]
        == json.loads((cell.folder / "evaluation.json").read_text())["after"]["reward_mean"]
    )
    (cell.folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"trpo/0\.03/seed3: the run is finished and has no metrics\.jsonl"):
        read_cell(cell)


def test_an_update_is_judged_by_the_bound_that_was_in_force(files):
    cell = load(files, ("seeds", "[3]"), ("rules.trpo.values", "[0.03]")).cells[0]
    assert train_cells([cell], 1, lambda line: None) == 0
    metrics = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["bound"] for row in read_cell(cell).rows] == [0.03] * 4
    metrics[1]["max_kl"] = metrics[1]["step_kl"] / 2  # as where it is annealed, and was not kept
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    result = read_cell(cell)
    assert [row["bound"] for row in result.rows] == [0.03, metrics[1]["step_kl"] / 2, 0.03, 0.03]
    assert result.summary["violations"] == 0.25 and result.summary["bound"] == 0.03


def test_a_failed_cell_says_what_its_last_attempt_said(files, monkeypatch):
    """Its log holds the earlier ones as well."""
    monkeypatch.syspath_prepend(files)
    (files / "spoilt_simulator.py").write_text("def build(**settings):\n    raise MemoryError('no room for it')\n")
    cell = load(files).cells[0]
    for name, reason in (("Spoilt-v0", "environment.id: "), ("spoilt_simulator:build", "MemoryError: no room")):
        environment = cell.config.environment.model_copy(update={"id": name})
        broken = replace(cell, config=cell.config.model_copy(update={"environment": environment}))
        assert train_cells([broken], 1, lambda line: None) == 0
        assert failure(cell).startswith(reason)
    said = cell.folder.with_suffix(".log").read_text()
    assert "error: environment.id: " in said and said.endswith("MemoryError: no room for it\n")


def test_a_signal_ends_the_runs_with_checkpoints_and_the_same_command_goes_on(files):
    options = [("shared.total_steps", "40000"), ("seeds", "[0]"), ("rules.trpo.values", "[0.01]")]
    cell = load(files, *options).cells[0]
    command = [word for key, value in options for word in (f"--{key}", value)]
    metrics = cell.folder / "metrics.jsonl"

    def stopped_after(lines):
        """The exit status of the comparison, stopped by SIGTERM when the cell's metrics have so many lines."""

        def stop():
            while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop, daemon=True).start()
        return compare(files, *command, "--one_update", "null")

    assert stopped_after(5) == 143
    before = metrics.read_text()
    assert any((metrics.parent / "checkpoints").iterdir())
    report = json.loads((files / "out/report.json").read_text())
    assert [cell["status"] for cell in report["cells"]] == ["missing", "missing"]
    assert stopped_after(before.count("\n") + 1) == 143
    assert metrics.read_text().startswith(before)
    assert [row["iteration"] for row in read_cell(cell).rows][:6] == [1, 2, 3, 4, 5, 6]

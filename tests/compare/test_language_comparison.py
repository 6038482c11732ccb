"""A small comparison of language runs: two rules, two seeds, the limit, completions side by side."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import write_model

from lm_trust.cli import main
from lm_trust.compare.results import CellResult, side_by_side

BASE = """
iterations: 4
model: {path: model, lora: {r: 2, alpha: 8}}
prompts: {path: prompts.jsonl, heldout_fraction: 0.5}
rollout: {batch_size: 16, max_new_tokens: 4, microbatch_size: 16}
rewards: [{name: tiny_rewards_of_comparison:warmth}]
critic: {hidden: [8], epochs: 1, minibatches: 2}
update: {kind: trpo, max_kl: 0.05}
evaluation: {every: 2, count: 8}
checkpoint: {every: 2}
trackers: []
"""
COMPARISON = """
base: base.yaml
seeds: [0, 1]
rules:
  trpo: {update: {kind: trpo}, knob: update.max_kl, values: [0.02, 0.05]}
  ppo_clip: {update: {kind: ppo_clip, epochs: 2, minibatches: 2}, knob: update.learning_rate, values: [0.01]}
matched_kl: [0.02, 1000.0]
limit: {prompts: 4, samples: 32}
one_update: {iterations_before: 1, evaluations: 8}
jobs: 2
"""
REWARDS = """
def warmth(prompts, completions):
    return [text.count("good") + text.count("bright") - text.count("bad") for text in completions]
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_model(folder / "model", "gpt2")
    words = ["film", "plot", "was", "good", "bad", "dull"]
    rows = [{"prompt": f"the {one} {two}"} for one in words for two in words]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny_rewards_of_comparison.py").write_text(REWARDS)
    (folder / "base.yaml").write_text(BASE)
    (folder / "comparison.yaml").write_text(COMPARISON)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(["compare", "comparison.yaml", "--output", "out"]) == 0
    return json.loads((folder / "out/report.json").read_text()) | {"folder": folder / "out"}


def test_every_run_is_there_and_began_alike(report):
    assert [cell["status"] for cell in report["cells"]] == ["finished"] * 6
    assert report["same_start"] == {"checked": 6, "equal": True}
    assert all(cell["violations"] == 0 for cell in report["cells"] if cell["rule"] == "trpo")
    assert all(cell["violations"] is None and cell["reference_kl"] > 0 for cell in report["cells"][2::3])


def test_a_trajectory_is_the_runs_held_out_evaluations(report):
    assert len(report["trajectories"]) == 6
    for trajectory in report["trajectories"]:
        assert trajectory["kl"][0] == 0 and trajectory["steps"][0] == 0 and len(trajectory["kl"]) == 3
        run = report["folder"] / f"cells/{trajectory['rule']}/{trajectory['value']:g}/seed{trajectory['seed']}"
        sides = json.loads((run / "evaluation.json").read_text())
        middle = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])
        expected = [sides["before"], middle, sides["after"]]
        assert trajectory["kl"] == [record["reference_kl"] for record in expected]
        assert trajectory["reward"] == [record["reward_mean"] for record in expected]
    starts = {(one["seed"], one["reward"][0]) for one in report["trajectories"]}
    assert len(starts) == 2  # of a seed, all runs are evaluated with the same noise


def test_matched_where_reached_and_not_where_not(report):
    near = [row for row in report["matched"] if row["kl"] == 0.02]
    far = [row for row in report["matched"] if row["kl"] == 1000.0]
    assert [row["mean"] is None for row in near] == [False, False]
    assert all(row["mean"] is None and row["reached"] == 0 for row in far)
    assert any("no rule reached it" in sentence for sentence in report["summary"])


def test_the_limit_begins_at_the_reference(report):
    limit = report["limit"]
    first = next(point for point in limit["best_of_n"] if point["n"] == 1)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert (limit["prompts"], limit["samples"], limit["evaluated_prompts"]) == (4, 32, 8)
    kls = [point["kl"] for point in sorted(limit["tilted"], key=lambda point: point["reward"])]
    assert np.all(np.diff(kls) > -1e-9)


def test_completions_stand_side_by_side(report):
    assert len(report["completions"]) == 8
    for line in report["completions"]:
        assert set(line["rules"]) == {"trpo", "ppo_clip"}
        assert line["rules"]["trpo"]["value"] in (0.02, 0.05) and line["rules"]["ppo_clip"]["value"] == 0.01
    run = report["folder"] / "cells/ppo_clip/0.01/seed0/evaluation.json"
    after = json.loads(run.read_text())["after"]["samples"]
    assert [line["rules"]["ppo_clip"]["completion"] for line in report["completions"]] == [
        sample["completion"] for sample in after
    ]


def test_a_rule_that_is_evaluated_on_fewer_prompts_stands_beside_the_others_where_it_can():
    def result(rule, prompts):
        samples = [{"prompt": text, "completion": f"{rule} {row}", "reward": 0.0} for row, text in enumerate(prompts)]
        cell = SimpleNamespace(rule=rule, value=0.1, config=SimpleNamespace(seed=0))
        return CellResult(cell, {"reference_kl": 1.0}, [], None, (), {"before": samples, "after": samples})

    results = [result("few", ["b", "a"]), result("all", ["a", "b", "a"])]
    lines = side_by_side(results, {"few": 0.1, "all": 0.1}, 0)
    assert [line["prompt"] for line in lines] == ["a", "b", "a"]
    found = [{rule: text["completion"] for rule, text in line["rules"].items()} for line in lines]
    assert found == [{"few": "few 1", "all": "all 0"}, {"few": "few 0", "all": "all 1"}, {"all": "all 2"}]


def test_the_study_has_every_rule(report):
    assert [(row["rule"], row["value"]) for row in report["one_update"]["rows"]] == [
        ("trpo", 0.02),
        ("trpo", 0.05),
        ("ppo_clip", 0.01),
    ]
    assert all(row["error"] is None and row["improvement_low"] is not None for row in report["one_update"]["rows"])

"""Curves of several runs: which are one group, what it is called, its mean and interval, and what is refused."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy import stats

from lm_trust.cli import main
from lm_trust.errors import UserError
from lm_trust.training import compare_curves, plots
from lm_trust.training.compare_curves import group_curve, plot_runs
from lm_trust.training.config_yaml import write_yaml

CONTROL = {"total_steps": 1000, "environment": {"id": "CartPole-v1"}}
LANGUAGE = {
    "iterations": 3,
    "model": {"path": "smollm2-135m"},
    "prompts": {"path": "gone.jsonl"},
    "rewards": [{"name": "vader"}],
}


@pytest.fixture
def make(tmp_path):
    """Writes the folder of a run that has rewards 0, slope, 2 slope, ..."""

    def call(name, *, slope=1.0, count=5, base=CONTROL, metrics=None, **sections):
        run = tmp_path / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(write_yaml(base | {"output": str(run)} | sections))
        lines = metrics or [
            {"iteration": k + 1, "steps": 100 * (k + 1), "reward_mean": slope * k, "iteration_seconds": 2.0}
            for k in range(count)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return call


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """plot_runs; returns what it said and the axis that it drew."""
    figures = []

    def remember(*args, **kwargs):
        # Low resolution: what is drawn is the same, and sooner.
        figures.append(Figure(*args, **(kwargs | {"dpi": 50})))
        return figures[-1]

    monkeypatch.setattr(plots, "Figure", remember)

    def call(*runs, **options):
        lines = plot_runs(runs, tmp_path / "out" / "curves.png", **options)
        return lines, figures[-1].axes[0]

    return call


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_seeds_are_one_curve_with_its_interval(make, draw):
    runs = [make(f"trpo_{seed}", seed=seed, slope=slope) for seed, slope in enumerate((1.0, 2.0, 6.0))]
    lines, axis = draw(*runs, make("ppo", update={"kind": "ppo_clip"}))
    assert legend(axis) == ["trpo (3 runs)", "ppo_clip (1 run)"]
    assert axis.lines[0].get_data()[0].tolist() == [100, 200, 300, 400, 500]
    assert axis.lines[0].get_data()[1] == pytest.approx([0, 3, 6, 9, 12])
    (band,) = axis.collections
    low, high = stats.t.interval(0.95, 2, loc=12.0, scale=stats.sem([4.0, 8.0, 24.0]))
    corners = band.get_paths()[0].vertices
    assert corners[corners[:, 0] == 500][:, 1].min() == pytest.approx(low)
    assert corners[corners[:, 0] == 500][:, 1].max() == pytest.approx(high)
    assert lines == [
        f"trpo: 3 runs, 12.000 [{low:.3f}, {high:.3f}] at 500 steps",
        "ppo_clip: 1 run, 4.000 at 500 steps",
    ]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("environment steps", "episode return")
    assert axis.get_figure().get_suptitle() == "CartPole-v1"


def test_a_group_is_drawn_where_all_its_runs_are_and_interpolated_between():
    one = np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.0, 10.0, 20.0, 30.0])
    other = np.array([5.0, 25.0]), np.array([5.0, 45.0])
    curve = group_curve("x", [one, other])
    assert curve.x.tolist() == [5, 10, 20, 25]
    assert curve.mean.tolist() == [5, 12.5, 27.5, 35]
    many = [(np.linspace(0, 1000, 1000) + shift, np.linspace(0, 1000, 1000) + shift) for shift in (0, 0.3)]
    curve = group_curve("x", many)
    assert len(curve.x) == compare_curves.GRID and curve.mean == pytest.approx(curve.x)


@pytest.mark.parametrize(("x", "last"), [("steps", 500), ("iteration", 5), ("seconds", 10)])
def test_each_axis(make, draw, x, last):
    _, axis = draw(make("run"), x=x)
    assert axis.lines[0].get_data()[0].max() == last


def test_unknown_numbers_are_left_out(make, draw):
    values = [None, 1.0, None, float("nan"), 4.0]
    metrics = [{"iteration": k, "steps": k, "reward_mean": value} for k, value in enumerate(values, 1)]
    _, axis = draw(make("run", metrics=metrics))
    assert axis.lines[0].get_data()[0].tolist() == [2, 5]


def test_evaluations(make, draw):
    run = make("run", seed=1)
    evaluations = [{"iteration": k, "steps": 100 * k, "reward_mean": 10.0 * k} for k in (2, 4, 5)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    (run / "evaluation.json").write_text(json.dumps({"after": {"reward_mean": 77.0}}))
    _, axis = draw(run, metric="evaluation/reward_mean", x="seconds")
    assert np.transpose(axis.lines[0].get_data()).tolist() == [[4, 20], [8, 40], [10, 77]]
    assert axis.get_ylabel() == "episode return, held out"
    (run / "evaluation.json").write_text(json.dumps({"before": {"reward_mean": 1.0}}))
    _, axis = draw(run, metric="evaluation/reward_mean")
    assert np.transpose(axis.lines[0].get_data()).tolist() == [[0, 1], [200, 20], [400, 40], [500, 50]]


def test_a_language_run_needs_no_prompts_any_more(make, draw):
    _, axis = draw(make("run", base=LANGUAGE))
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("completion tokens", "reward")
    _, axis = draw(make("one", base=LANGUAGE), make("two"))
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("steps", "reward_mean")


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ({"a": {}, "b": {"update": {"max_kl": 0.1}}}, ["update.max_kl 0.01", "update.max_kl 0.1"]),
        (
            {"a": {}, "b": {"update": {"max_kl": 0.1}}, "c": {"update": {"kind": "ppo_clip"}}},
            ["trpo, update.max_kl 0.01", "trpo, update.max_kl 0.1", "ppo_clip"],
        ),
        (
            {"a": {}, "b": {"environment": {"id": "Hopper-v5"}, "policy": {"hidden": [8]}}},
            ["CartPole-v1, policy.hidden [64, 64]", "Hopper-v5, policy.hidden [8]"],
        ),
        (
            {
                "a": {"trackers": []},
                "b": {"checkpoint": {"every": 3}, "seed": 5},
                "c": {"output": "x", "environment": {"id": "CartPole-v1", "processes": 2}},
                "d": {"evaluation": {"videos": 2}},
            },
            ["trpo"],
        ),
        (
            {
                "a": {"base": LANGUAGE},
                "b": {"base": LANGUAGE, "rewards": [{"name": "vader", "timeout": 30.0}]},
                "c": {"base": LANGUAGE, "rewards": [{"name": "vader", "weight": 0.5}]},
            },
            ["rewards.0.weight 1.0", "rewards.0.weight 0.5"],
        ),
        (
            {
                name: {"seed": seed, "policy": {"hidden": [width], "log_std": -width}, "total_steps": width}
                | {"normalise": {"rewards": width > 5}}
                for name, seed, width in [("big_seed0", 0, 9), ("big_seed1", 1, 9), ("small", 0, 3)]
            },
            ["big", "small"],
        ),
        (
            {
                name: {"seed": seed, "policy": {"hidden": [width], "log_std": -width}, "total_steps": width}
                | {"normalise": {"rewards": width > 5}}
                for name, seed, width in [("big/0", 0, 9), ("big/1", 1, 9), ("small/0", 0, 3)]
            },
            ["big", "small"],
        ),
    ],
    ids=["one key", "kinds", "several", "same", "rewards", "stems", "parents"],
)
def test_groups_are_named_by_what_differs(make, draw, runs, labels):
    _, axis = draw(*(make(name, **sections) for name, sections in runs.items()))
    found = [text.rpartition(" (")[0] for text in legend(axis)]
    if labels == ["trpo"]:  # nothing differs
        assert len(found) == 1 and legend(axis)[0].endswith(f"({len(runs)} runs)")
    else:
        assert found == labels


def test_a_run_given_twice_counts_once(make, draw):
    run = make("run")
    lines, _ = draw(run, run.parent / "." / "run", run)
    assert len(lines) == 1 and "1 run," in lines[0]


def test_a_group_without_the_metric_is_left_out(make, draw):
    clipped = [{"iteration": 1, "steps": 5, "clip_fraction": 0.5}, {"iteration": 2, "steps": 9, "clip_fraction": 0.25}]
    lines, axis = draw(make("a"), make("b", update={"kind": "ppo_clip"}, metrics=clipped), metric="clip_fraction")
    assert lines == ["trpo: left out, it has no clip_fraction", "ppo_clip: 1 run, 0.250 at 9 steps"]
    assert legend(axis) == ["ppo_clip (1 run)"]


def test_what_cannot_be_drawn_is_one_line(make, tmp_path, capsys):
    run, empty = make("run"), make("empty")
    (empty / "metrics.jsonl").unlink()
    output = str(tmp_path / "x.png")
    for arguments, told in (
        ([str(tmp_path / "none")], "no such run folder"),
        ([str(tmp_path)], "not a run folder: it holds no config.yaml"),
        ([str(run), str(empty)], f"{empty}: nothing to plot yet"),
        ([str(run), "--metric", "rewrd_mean"], "no run has rewrd_mean; did you mean reward_mean?"),
        ([str(run), "--metric", "zzz"], "there are iteration, iteration_seconds, reward_mean, steps"),
        ([str(run), "--metric", "evaluation/reward_mean"], "no run has evaluation/reward_mean"),
        ([str(run), "--x", "epochs"], "invalid choice"),
        ([], "RUN"),
    ):
        assert main(["plot", *arguments, "--output", output]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and told in line
    assert main(["plot", str(run), "--output", str(tmp_path / "x.pdf")]) == 2
    assert "end in .png" in capsys.readouterr().err
    assert main(["plot", str(run), "--output", str(run / "metrics.jsonl" / "x.png")]) == 2
    assert "could not be written" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    early = [{"iteration": 1, "steps": 5, "reward_mean": 1.0}]
    late = [{"iteration": 2, "steps": 9, "reward_mean": 1.0}]
    with pytest.raises(UserError, match="no steps in common"):
        plot_runs([make("s0", seed=0, metrics=early), make("s1", seed=1, metrics=late)], tmp_path / "x.png")


@pytest.mark.filterwarnings("error")
def test_the_command_writes_the_picture(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    many = [make(f"run{number}", update={"max_kl": 0.01 * number}) for number in range(1, 11)]
    assert main(["plot", *map(str, many)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 11 and out[-1] == "Picture: curves.png" and max(map(len, out)) <= 80
    assert imread(tmp_path / "curves.png").shape[:2] == (1000, 1600)

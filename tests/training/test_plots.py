"""The learning curve: what is drawn from which metrics, and a file that appears whole."""

import subprocess
import sys

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lm_trust import verified_folder
from lm_trust.training import plots
from lm_trust.training.plots import learning_curve


def metrics(count, **changes):
    return [
        {
            "iteration": k,
            "steps": 1000 * k,
            "reward_mean": 0.1 * k,
            "step_kl": 0.0 if k % 5 == 0 else 0.015,
            "accepted": k % 5 != 0,
            "reference_kl": 0.2 * k,
        }
        | changes
        for k in range(1, count + 1)
    ]


def control(lines):
    return [{key: value for key, value in line.items() if key != "reference_kl"} for line in lines]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """learning_curve with defaults; returns the figure's axes. The PNG is at tmp_path / "curve.png"."""
    figures = []

    def remember(*args, **kwargs):
        # Low resolution: what is drawn is the same, and sooner.
        figures.append(Figure(*args, **(kwargs | {"dpi": 50})))
        return figures[-1]

    monkeypatch.setattr(plots, "Figure", remember)

    def call(lines, **changes):
        arguments = {"step_kl_bound": 0.02, "title": "a run", "reward_label": "reward"} | changes
        learning_curve(lines, tmp_path / "curve.png", **arguments)
        return figures[-1].axes

    return call


def curve(axis, index=0):
    return [list(values) for values in axis.lines[index].get_data()]


def texts(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []


def test_a_language_run_has_three_panels_with_units(draw):
    axes = draw(metrics(20), reward_label="sentiment")
    assert [axis.get_ylabel() for axis in axes] == [
        "sentiment", "step KL\n(nats per token)", "reference KL\n(nats per sequence)"
    ]  # fmt: skip
    assert axes[-1].get_xlabel() == "completion tokens"
    assert curve(axes[0])[1] == pytest.approx([0.1 * k for k in range(1, 21)])
    assert curve(axes[2])[1] == pytest.approx([0.2 * k for k in range(1, 21)])


def test_a_control_run_has_no_reference_kl(draw):
    axes = draw(control(metrics(20)))
    assert len(axes) == 2
    assert axes[-1].get_xlabel() == "environment steps" and "nats per step" in axes[1].get_ylabel()


def test_the_bound_is_drawn_and_named_and_rejected_steps_are_marks_not_dips(draw):
    axis = draw(metrics(20))[1]
    steps, values = curve(axis)
    assert set(values) == {0.015} and 5000 not in steps
    assert curve(axis, 1) == [[5000, 10000, 15000, 20000], [0, 0, 0, 0]]
    assert set(curve(axis, 2)[1]) == {0.02}
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 0.02
    assert texts(axis) == ["bound 0.02", "rejected (4 of 20)"]


def test_an_annealed_bound_is_drawn_as_it_was_in_force(draw):
    lines = [line | {"max_kl": 0.02 * (1 - k / 20)} for k, line in enumerate(metrics(20))]
    del lines[6]["max_kl"]  # nothing to learn from, so no step and no bound
    axis = draw(lines)[1]
    steps, bounds = curve(axis, 2)
    assert steps == [1000 * k for k in range(1, 21) if k != 7]
    assert bounds == pytest.approx([0.02 - step * 1e-6 + 0.001 for step in steps])
    assert texts(axis) == ["bound 0.02 to 0.001", "rejected (4 of 20)"]


def test_without_a_bound_or_a_rejection_there_is_nothing_to_name(draw):
    axis = draw(metrics(4), step_kl_bound=None)[1]
    assert len(axis.lines) == 1 and texts(axis) == []


def test_the_smoothed_curve_keeps_a_straight_line_straight(draw):
    for count in (10, 60):
        steps, smooth = curve(draw(metrics(count))[0], 1)
        assert smooth == pytest.approx([step * 1e-4 for step in steps])


def test_the_smoothed_curve_is_a_mean(draw):
    lines = metrics(9)
    for line in lines:
        line["reward_mean"] = 9.0 if line["iteration"] == 5 else 0.0
    axis = draw(lines)[0]
    assert "mean of 3 iterations" in texts(axis)
    assert curve(axis, 1)[1] == pytest.approx([0, 0, 0, 3, 3, 3, 0, 0, 0])


def test_evaluations_are_marks_with_their_intervals(draw):
    axis = draw(
        metrics(20),
        evaluations=[
            {"steps": 0, "reward_mean": 0.2, "reward_interval": [0.1, 0.4]},
            {"steps": 9000, "reward_mean": 0.9, "reward_interval": None},
            {"steps": 20000, "reward_mean": None, "reward_interval": [None, None]},
        ],
    )[0]
    assert [container[0].get_data()[1][0] for container in axis.containers] == [0.2, 0.9]
    (bar,) = axis.containers[0][2]
    assert bar.get_segments()[0][:, 1] == pytest.approx([0.1, 0.4])
    assert texts(axis).count("held out, 95 % interval") == 1


@pytest.mark.parametrize(
    "lines",
    [
        [],
        metrics(1),
        metrics(6, reward_mean=None),
        metrics(6, reward_mean=None, step_kl=None, reference_kl=None, accepted=None),
        metrics(6, reward_mean=float("nan"), step_kl=float("inf"), reference_kl=float("nan")),
        metrics(6, reward_mean=-1e12, step_kl=1e-12, reference_kl=1e9),
        metrics(6, steps=None),
        [{"steps": 5}],
    ],
    ids=["empty", "one", "no-reward", "nulls", "non-finite", "huge", "no-steps", "no-keys"],
)
@pytest.mark.filterwarnings("error")
def test_any_metrics_give_a_picture(draw, tmp_path, lines):
    draw(lines, step_kl_bound=None)
    assert imread(tmp_path / "curve.png").shape[1] == 400


@pytest.mark.filterwarnings("error")
def test_titles_and_labels_are_text_not_mathematics(draw):
    axes = draw(metrics(3), title="a $ run_{", reward_label="$\\oops{$ reward")
    assert axes[0].get_ylabel() == "$\\oops{$ reward"


def test_the_file_is_replaced_whole_or_not_at_all(draw, tmp_path, monkeypatch):
    draw(metrics(3))
    before = (tmp_path / "curve.png").read_bytes()
    draw(metrics(3))
    assert (tmp_path / "curve.png").read_bytes() == before, "the same metrics give the same bytes"

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(verified_folder.os, "replace", fail)
        draw(metrics(9))
    assert (tmp_path / "curve.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_the_picture_is_1600_pixels_wide(tmp_path):
    learning_curve(metrics(3), tmp_path / "new" / "c.png", step_kl_bound=0.02, title="t", reward_label="r")
    assert imread(tmp_path / "new" / "c.png").shape[:2] == (1400, 1600)


def test_a_callers_matplotlib_is_left_alone(draw):
    settings = dict(matplotlib.rcParams)
    draw(metrics(3))
    assert dict(matplotlib.rcParams) == settings
    code = "import sys, lm_trust.training.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

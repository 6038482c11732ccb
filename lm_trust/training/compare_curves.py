"""Learning curves of several runs in one picture: a line a run, or the mean of a group of seeds with its interval.

Nothing is smoothed; a control run's `reward_mean` is a mean over its last finished episodes already.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy.special import stdtrit

from lm_trust.errors import UserError
from lm_trust.training.config import Config, ControlConfig
from lm_trust.training.config_file import load_config
from lm_trust.training.curve_groups import group_runs
from lm_trust.training.plots import BLUE, GREEN, GREY, INK, PURPLE, VERMILION, picture, tidy
from lm_trust.training.progress import format_number
from lm_trust.training.run_folder import Record, RunFolder

XAxis = Literal["steps", "iteration", "seconds"]

GRID = 400  # points that a group's runs are interpolated to
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, "#b8860b", "#56b4e9", INK, GREY)
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))  # a ninth group is the first colour, dashed
EVALUATION = "evaluation/"  # before a metric: of the held-out evaluations


@dataclass(frozen=True)
class GroupCurve:
    """What is drawn of a group of N runs: (M,) places, mean, and the interval's ends, None for a single run."""

    label: str
    runs: int
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def plot_runs(
    runs: Sequence[Path], output: Path, *, metric: str = "reward_mean", x: XAxis = "steps", title: str | None = None
) -> list[str]:
    """Draw the runs' learning curves to a PNG of 1,600 pixels' width; it appears whole or not at all.

    Runs whose configurations differ only in the seed, and in what touches no run, are a group: the mean of its runs and
    the 95 % interval of that mean (Student's t over runs, each interpolated linearly to a common grid). It is drawn
    where all of its runs have values, so that no run's end makes a jump. A single run is a plain line.

    Args:
        runs: run folders.
        output: the picture; an older one is replaced.
        metric: a key of metrics.jsonl, or evaluation/KEY for a number of the held-out evaluations.
        x: environment steps (language: completion tokens), iterations, or seconds of rollout and update.
        title: stands over the picture; by default the environment's name, where there is one.

    Returns:
        A line a group: its label, how many runs, and its last value with its interval.

    Raises:
        UserError: a folder is no run or has no metrics, no run has the metric, or the picture cannot be written.
    """
    if output.suffix != ".png":
        raise UserError(f"--output: {output} is not the name of a picture; let it end in .png")
    runs = list({run.resolve(): run for run in runs}.values())
    configs = {run: load_config(run / "config.yaml", check_files=False, saved=True) for run in runs}
    metrics = {run: _metrics(run) for run in runs}
    evaluated = metric.startswith(EVALUATION)
    records = {run: RunFolder(run).held_out() if evaluated else metrics[run] for run in runs}
    series = {run: _series(records[run], metrics[run], metric, x) for run in runs}
    if not any(len(places) for places, _ in series.values()):
        raise UserError(_no_metric(metrics.values(), metric))
    curves, lines = [], []
    for label, members in group_runs(configs).items():
        found = [series[run] for run in members if len(series[run][0])]
        if not found:
            lines.append(f"{label}: left out, it has no {metric}")
            continue
        curve = group_curve(label, found)
        if not len(curve.x):
            raise UserError(f"{label}: its runs have no {x} in common; plot them one at a time")
        curves.append(curve)
        lines.append(_in_words(curve, x))
    x_label, y_label, environment = _words(configs.values(), metric, x)
    try:
        with picture(output, (8, 5), environment if title is None else title) as figure:
            _draw_curves(figure, curves, x_label, y_label)
    except OSError as error:
        raise UserError(f"--output: {output} could not be written ({error})") from error
    return lines


def group_curve(label: str, series: Sequence[tuple[np.ndarray, np.ndarray]]) -> GroupCurve:
    """The mean of several runs' (places, values), and its 95 % interval.

    Args:
        label: of the group.
        series: each run's places in rising order, and its values there.
    """
    if len(series) == 1:
        return GroupCurve(label, 1, *series[0])
    start, end = max(places[0] for places, _ in series), min(places[-1] for places, _ in series)
    shared = np.unique(np.concatenate([places for places, _ in series]))
    shared = shared[(shared >= start) & (shared <= end)]
    # The runs' own places where they are few: a grid beside them would cut the corners of the curve.
    grid = shared if len(shared) <= GRID else np.linspace(start, end, GRID)
    values = np.stack([np.interp(grid, places, run) for places, run in series])
    mean = values.mean(0)
    half = stdtrit(len(series) - 1, 0.975) * values.std(0, ddof=1) / math.sqrt(len(series))
    return GroupCurve(label, len(series), grid, mean, mean - half, mean + half)


def _metrics(run: Path) -> list[Record]:
    metrics = RunFolder(run).metrics()
    if not metrics:
        raise UserError(f"{run}: nothing to plot yet: it has no metrics.jsonl, or an empty one")
    return metrics


def _series(
    records: Sequence[Record], metrics: Sequence[Record], metric: str, x: XAxis
) -> tuple[np.ndarray, np.ndarray]:
    """(M,) places and values of a run, where the value is known."""
    # Summed, because each session of a resumed run has a clock of its own.
    seconds = accumulate((line.get("iteration_seconds") or 0.0 for line in metrics), initial=0.0)
    elapsed = dict(zip([0, *(line["iteration"] for line in metrics)], seconds, strict=True))
    key = metric.removeprefix(EVALUATION)
    known = [record for record in records if _is_number(record.get(key))]
    places = [elapsed[record["iteration"]] if x == "seconds" else record[x] for record in known]
    return np.array(places, dtype=float), np.array([record[key] for record in known], dtype=float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _no_metric(runs: Iterable[Sequence[Record]], metric: str) -> str:
    if metric.startswith(EVALUATION):
        return f"--metric: no run has {metric}; see the keys of its evaluation.json"
    keys = {key for metrics in runs for line in metrics for key, value in line.items() if _is_number(value)}
    near = difflib.get_close_matches(metric, keys, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(keys))}"
    return f"--metric: no run has {metric}; {hint}"


def _in_words(curve: GroupCurve, x: XAxis) -> str:
    last = format_number(float(curve.mean[-1]))
    if curve.low is not None:
        last += f" [{format_number(float(curve.low[-1]))}, {format_number(float(curve.high[-1]))}]"
    end = {"steps": "{:,.0f} steps", "iteration": "iteration {:,.0f}", "seconds": "{:,.1f} s"}[x]
    return f"{curve.label}: {_count(curve.runs)}, {last} at {end.format(curve.x[-1])}"


def _count(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def _words(configs: Iterable[Config], metric: str, x: XAxis) -> tuple[str, str, str]:
    """What the axes are called, and the environment that all runs share, if any."""
    control = {isinstance(config, ControlConfig) for config in configs}
    environments = {config.environment.id if isinstance(config, ControlConfig) else "" for config in configs}
    steps = {(True,): "environment steps", (False,): "completion tokens"}.get(tuple(control), "steps")
    reward = {(True,): "episode return", (False,): "reward"}.get(tuple(control), "reward_mean")
    x_label = {"steps": steps, "iteration": "iterations", "seconds": "seconds of rollout and update"}[x]
    y_label = {"reward_mean": reward, f"{EVALUATION}reward_mean": f"{reward}, held out"}.get(metric, metric)
    return x_label, y_label, environments.pop() if len(environments) == 1 else ""


def _draw_curves(figure: Figure, curves: Sequence[GroupCurve], x_label: str, y_label: str) -> None:
    axis = figure.subplots()
    tidy(axis)
    for number, curve in enumerate(curves):
        _draw(axis, curve, COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)])
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label, parse_math=False)
    if max(curve.x[-1] for curve in curves) >= 1000:  # below it half a second would be 500m
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlim(left=0)
    legend = axis.legend(frameon=False, fontsize=9, loc="best", handlelength=1.6)
    for text in legend.get_texts():
        text.set_parse_math(False)
    if any(curve.low is not None for curve in curves):
        note = "lines: mean of the runs; bands: its 95 % interval"
        figure.supxlabel(note, fontsize=8.5, color=GREY, x=0.98, ha="right")


def _draw(axis: Axes, curve: GroupCurve, colour: str, dash: Any) -> None:
    if curve.low is not None:
        axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    label = f"{curve.label} ({_count(curve.runs)})"
    marker = "o" if len(curve.x) < 3 else ""
    axis.plot(
        curve.x, curve.mean, color=colour, linestyle=dash, linewidth=1.9, marker=marker, markersize=4, label=label
    )

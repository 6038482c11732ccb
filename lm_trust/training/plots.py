"""The picture of a run: reward, step KL against its bound and, for a language model, reference KL.

Drawn with matplotlib's objects alone, so it needs no display and leaves a caller's pyplot figures as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from lm_trust.training.run_folder import Record
from lm_trust.verified_folder import replacing

# After Okabe and Ito: told apart with any kind of colour vision.
BLUE, VERMILION, GREEN, PURPLE, INK, GREY = "#0072b2", "#d55e00", "#00785a", "#a9558a", "#262626", "#6b6b6b"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": "#b0b0b0",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "path.simplify": True,
    "text.usetex": False,
}


def learning_curve(
    metrics: Sequence[Record],
    path: Path | str,
    *,
    step_kl_bound: float | None,
    title: str,
    reward_label: str,
    evaluations: Sequence[Record] | None = None,
) -> None:
    """Draw a run's metrics to a PNG of 1,600 pixels' width, meant to be shown at half of it.

    The reference KL has a panel where the metrics know it (the language world). Missing, null and non-finite numbers
    are left out. The file appears whole or not at all.

    Args:
        metrics: the lines of metrics.jsonl.
        path: where the PNG goes; an older one is replaced.
        step_kl_bound: the update rule's bound, nats per step, where the lines do not tell one that changes (`max_kl`);
            None where it has none.
        title: stands over the picture.
        reward_label: what the reward is, for the axis.
        evaluations: held-out evaluations, {"steps", "reward_mean", "reward_interval": [low, high] or None}.
    """
    language = any("reference_kl" in line for line in metrics)
    step = "token" if language else "step"
    with picture(Path(path), (8, 7 if language else 5.25), title) as figure:
        ratios = [1.7, 1.0, 1.0] if language else [1.7, 1.0]
        axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        for axis in axes:
            tidy(axis)
        evaluated = "held out" if language else "evaluation"
        _draw_reward(axes[0], metrics, reward_label, evaluations or [], f"{evaluated}, 95 % interval")
        _draw_step_kl(axes[1], metrics, step_kl_bound, f"step KL\n(nats per {step})")
        if language:
            _draw_reference_kl(axes[2], metrics)
        axes[-1].set_xlabel("completion tokens" if language else "environment steps")
        axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[-1].set_xlim(left=0)
        figure.align_ylabels(axes)


@contextmanager
def picture(path: Path, size: tuple[float, float], title: str) -> Iterator[Figure]:
    """A figure to draw on within the context; then a PNG of 200 dots an inch, whole or not at all."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=200, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.09, w_pad=0.1)
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", parse_math=False)
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


def tidy(axis: Axes) -> None:
    """The look of every panel: no box, faint horizontal lines, few round numbers."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.tick_params(length=3)
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _draw_reward(
    axis: Axes, metrics: Sequence[Record], label: str, evaluations: Sequence[Record], evaluated: str
) -> None:
    axis.set_ylabel(label, parse_math=False)
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    steps, rewards = _series(metrics, "reward_mean")
    window = 2 * max(1, round(len(rewards) / 24)) + 1
    if len(rewards) <= window:
        axis.plot(steps, rewards, color=BLUE, linewidth=1.8, marker="o", markersize=4, label="one iteration")
    else:
        axis.plot(steps, rewards, color=BLUE, linewidth=0.9, alpha=0.4, label="one iteration")
        smooth = _moving_average(rewards, window)
        axis.plot(steps, smooth, color=BLUE, linewidth=2.2, label=f"mean of {window} iterations")
    held_out = [line for line in evaluations if _known(line.get("steps")) and _known(line.get("reward_mean"))]
    for number, line in enumerate(held_out):
        mean = line["reward_mean"]
        interval = line.get("reward_interval")
        low, high = interval if interval and all(map(_known, interval)) else (mean, mean)
        axis.errorbar(
            line["steps"],
            mean,
            yerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
            color=INK,
            marker="D",
            markersize=5.5,
            markerfacecolor="white",
            markeredgewidth=1.4,
            elinewidth=1.4,
            capsize=3.5,
            linestyle="none",
            zorder=5,
            clip_on=False,
            label=None if number else evaluated,
        )
    if len(rewards) or held_out:
        axis.legend(frameon=False, fontsize=9, loc="best", handlelength=1.6)
    else:
        _say_nothing_known(axis)


def _draw_step_kl(axis: Axes, metrics: Sequence[Record], bound: float | None, label: str) -> None:
    axis.set_ylabel(label)
    # A rejected step's KL is zero because nothing moved: a mark at the foot, not a dip of the line.
    taken = [line for line in metrics if line.get("accepted") is not False]
    rejected = [line["steps"] for line in metrics if line.get("accepted") is False and _known(line.get("steps"))]
    steps, values = _series(taken, "step_kl")
    many = len(values) > 150
    axis.plot(steps, values, color=GREEN, linewidth=0.9 if many else 1.4, marker="" if many else "o", markersize=3)
    if len(rejected):
        axis.plot(
            rejected, [0] * len(rejected), color=VERMILION, marker="x", markersize=6, markeredgewidth=1.6,
            linestyle="none", clip_on=False, zorder=5,
        )  # fmt: skip
    dashes = {"color": INK, "linewidth": 1.3, "linestyle": (0, (5, 3))}
    bounded, bounds = _series(metrics, "max_kl")
    named = None if bound is None else f"bound {bound:.3g}"
    if len(set(bounds)) > 1:
        axis.plot(bounded, bounds, **dashes)
        named = f"bound {bounds[0]:.3g} to {bounds[-1]:.3g}"
    elif bound is not None:
        axis.axhline(bound, **dashes)
    top = max([*values, *bounds, bound or 0], default=0)
    axis.set_ylim(0, 1.12 * top if top > 0 else 1)
    handles = []
    if named is not None:
        handles.append(Line2D([], [], **dashes, label=named))
    if len(rejected):
        handles.append(
            Line2D([], [], color=VERMILION, marker="x", markersize=6, markeredgewidth=1.6, linestyle="none",
                   label=f"rejected ({len(rejected)} of {len(metrics)})")
        )  # fmt: skip
    if handles:
        # Beside the data nothing is hidden: the line lives just under the bound and the marks on the floor.
        axis.legend(
            handles=handles, frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2,
            borderaxespad=0, handlelength=1.8,
        )  # fmt: skip
    if not len(values) and not len(rejected):
        _say_nothing_known(axis)


def _draw_reference_kl(axis: Axes, metrics: Sequence[Record]) -> None:
    axis.set_ylabel("reference KL\n(nats per sequence)")
    steps, values = _series(metrics, "reference_kl")
    axis.plot(steps, values, color=PURPLE, linewidth=1.8, marker="o" if len(values) < 3 else "", markersize=4)
    top = max(values, default=0)
    axis.set_ylim(0, 1.08 * top if top > 0 else 1)
    if not len(values):
        _say_nothing_known(axis)


def _series(metrics: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that know both."""
    known = [line for line in metrics if _known(line.get("steps")) and _known(line.get(key))]
    return [line["steps"] for line in known], [float(line[key]) for line in known]


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _moving_average(values: list[float], window: int) -> list[float]:
    """Centred mean of `window` values; towards the ends of as many as there are on both sides alike."""
    half = window // 2
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        means.append(math.fsum(values[index - reach : index + reach + 1]) / (2 * reach + 1))
    return means


def _say_nothing_known(axis: Axes) -> None:
    axis.set_yticks([])
    axis.text(0.5, 0.5, "no values", transform=axis.transAxes, ha="center", va="center", color=GREY)

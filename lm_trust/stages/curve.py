"""The picture of a stage: its numbers update by update, and the held-out ones among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lm_trust.training.plots import BLUE, INK, picture, tidy


@dataclass(frozen=True)
class Panel:
    """One panel. label: of its axis; key: in metrics.jsonl and in the evaluation; interval: there too, where it is."""

    label: str
    key: str
    interval: str | None = None


def stage_curve(
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    path: Path,
    panels: Sequence[Panel],
    *,
    title: str,
) -> None:
    """Draw a PNG of 1,600 pixels' width, whole or not at all; numbers that are null are left out.

    Args:
        metrics: the lines of metrics.jsonl.
        evaluations: held-out evaluations with the `step` that each stands at.
    """
    with picture(path, (8, 1 + 2.25 * len(panels)), title) as figure:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            tidy(axis)
            axis.set_ylabel(panel.label)
            known = [line for line in metrics if line[panel.key] is not None]
            axis.plot(
                [line["step"] for line in known],
                [line[panel.key] for line in known],
                color=BLUE,
                linewidth=1.2,
                label="one update",
            )
            _draw_evaluations(axis, evaluations, panel)
            axis.legend(frameon=False, fontsize=9, loc="best", handlelength=1.6)
        axes[-1].set_xlabel("updates")
        axes[-1].set_xlim(left=0)
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.align_ylabels(axes)


def _draw_evaluations(axis: Axes, evaluations: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    steps = [line["step"] for line in evaluations]
    means = [line[panel.key] for line in evaluations]
    look = {
        "color": INK,
        "marker": "D",
        "markersize": 5.5,
        "markerfacecolor": "white",
        "linestyle": "none",
        "zorder": 5,
        "clip_on": False,
    }
    if panel.interval is None:
        axis.plot(steps, means, label="held out", **look)
        return
    lengths = [
        (max(mean - low, 0), max(high - mean, 0))
        for mean, (low, high) in zip(means, (line[panel.interval] for line in evaluations), strict=True)
    ]
    axis.errorbar(
        steps, means, yerr=list(zip(*lengths, strict=True)), capsize=3.5, label="held out, 95 % interval", **look
    )

"""The report's figures of the course of the runs: rewards and KLs, the bound, what was predicted, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_trust.compare.figure_parts import (
    RuleStyle,
    Styles,
    Trace,
    axis,
    band,
    error_bars,
    faint,
    figure,
    identity,
    layout,
    line,
    points,
    rounded,
    safe,
    spread,
)
from lm_trust.compare.statistics import known
from lm_trust.compare.words import cell_text, knob_text
from lm_trust.training.compare_curves import group_curve
from lm_trust.training.plots import INK
from lm_trust.training.run_folder import Record

PLACES = 120  # that a curve is drawn from
MARKS = 300  # iterations of a rule in a scatter
SECONDS = "seconds of rollout and update"

Groups = dict[tuple[str, Any], list[list[Record]]]  # (rule, knob value): the lines of each run, in order


def runs_of(rows: Iterable[Record]) -> Groups:
    """The iterations of results.parquet by rule and knob value, and there run by run."""
    runs: dict[tuple[str, Any], dict[int, list[Record]]] = {}
    for row in rows:
        runs.setdefault((row["rule"], row["value"]), {}).setdefault(row["seed"], []).append(row)
    return {cell: [sorted(run, key=lambda row: row["iteration"]) for run in seeds.values()]
            for cell, seeds in runs.items()}  # fmt: skip


def course_figures(report: Record, runs: Groups, styles: Styles) -> list[dict[str, Any]]:
    """Rewards and both KLs over steps and over seconds.

    The page shows one of the `axes` and one knob value a rule at a time, and fits the figure to the lines that it
    shows, not below `floor`: the area of two seeds would leave no room for anything else.
    """
    language = report.get("world") == "language"
    per = "token" if language else "step"
    held_out = _evaluations(report)
    drawn = [
        ("heldout", "held-out reward" if language else "return in evaluation", "Episodes or completions that no update "
         "learns from.", held_out, "reward"),
        ("reward", "reward of the training batch", "What the rules saw while they learnt.", runs, "reward_mean"),
        ("reference-kl", "reference KL, nats a sequence", "How far the policy is from where it started: exact KL "
         "of the policy to the reference, on the training batches.", runs, "reference_kl"),
        ("step-kl", f"step KL, nats a {per}", "How far each update moved: exact KL of the old policy to the new, "
         "the mean over the batch; zero where an update was rejected.", runs, "step_kl"),
        ("clip-fraction", "clipped share of the steps", "Of the rules that clip: the share of the steps whose ratio is "
         "beyond the clip, so that they pull no more.", runs, "clip_fraction"),
    ]  # fmt: skip
    figures = []
    for name, label, caption, groups, key in drawn:
        if (name == "reference-kl" and not language) or (name == "clip-fraction" and not _any_has(key, groups)):
            continue
        data = [trace for (rule, value), members in groups.items() if rule in styles
                for trace in _course(rule, value, members, key, styles[rule])]  # fmt: skip
        one = figure(
            f"course-{name}",
            label[:1].upper() + label[1:],
            f"{caption} Lines: the mean over seeds; areas: its 95 % interval (Student's t), where there are several; "
            "wide ones may leave the figure.",
            data,
            layout(axis(""), axis(""), height=300),
        )
        axes = {"steps": report.get("steps_label") or "steps", "seconds": SECONDS}
        figures.append(one | {"axes": axes, "floor": None if key.startswith("reward") else 0})
    return figures


def _any_has(key: str, groups: Groups) -> bool:
    return any(known(row.get(key)) for runs in groups.values() for run in runs for row in run)


def _evaluations(report: Record) -> Groups:
    groups: Groups = {}
    for course in report.get("trajectories") or ():
        columns = {key: course.get(key) or () for key in ("reward", "steps", "seconds")}
        lines = [dict(zip(columns, entry, strict=True)) for entry in zip(*columns.values(), strict=False)]
        groups.setdefault((course["rule"], course["value"]), []).append(lines)
    return groups


def _course(rule: str, value: Any, runs: Sequence[Sequence[Record]], key: str, style: RuleStyle) -> list[Trace]:
    traces = []
    for places in ("steps", "seconds"):
        series = [points([row.get(places) for row in run], [row.get(key) for row in run]) for run in runs]
        arrays = [tuple(np.array(column, dtype=float) for column in zip(*one, strict=True)) for one in series if one]
        if not arrays:
            continue
        curve = group_curve(rule, arrays)
        kept = np.unique(np.linspace(0, len(curve.x) - 1, PLACES).round().astype(int)) if len(curve.x) else []
        meta = {"rule": rule, "value": knob_text(value), "axis": places}
        if curve.low is not None:
            traces += band(curve.x[kept], curve.low[kept], curve.high[kept], style.colour, meta=meta)
        hover = f"%{{y:.3g}} at %{{x:.4s}}<extra>{safe(cell_text(rule, value))}</extra>"
        traces.append(line(curve.x[kept], curve.mean[kept], style, rule, meta=meta, hovertemplate=hover))
    return traces


def bound_figure(report: Record, runs: Groups, styles: Styles) -> dict[str, Any]:
    """How far updates went beside how far they were allowed to go."""
    per = "token" if report.get("world") == "language" else "step"
    data, labels, bounds = [], [], []
    for number, (rule, value) in enumerate(_in_order(report, runs)):
        lines = [row for run in runs[rule, value] for row in run]
        kls = [row["step_kl"] for row in lines if known(row.get("step_kl")) and row["step_kl"] > 0]
        labels.append(f"{safe(cell_text(rule, value))}<br><span style='font-size:11px'>{_broken(report, rule, value)}"
                      "</span>")  # fmt: skip
        if not kls:
            continue
        low, first, middle, third, high = rounded(np.quantile(kls, [0, 0.25, 0.5, 0.75, 1]).tolist())
        data.append({
            "type": "box", "orientation": "h", "y": [number], "width": 0.5, "whiskerwidth": 0.6,
            "lowerfence": [low], "q1": [first], "median": [middle], "q3": [third], "upperfence": [high],
            "line": {"color": styles[rule].colour, "width": 1.6}, "fillcolor": faint(styles[rule].colour),
            "name": safe(cell_text(rule, value)), "hoverinfo": "x+name", "meta": {"rule": rule},
        })  # fmt: skip
        bounds += [(row["bound"], number, rule) for row in lines[:1] if known(row.get("bound"))]
    for bound, number, rule in bounds:
        data.append({
            "type": "scatter", "mode": "markers", "x": [bound], "y": [number], "meta": {"rule": rule},
            "marker": {"symbol": "line-ns", "size": 30, "line": {"color": INK, "width": 2.6}},
            "hovertemplate": "bound %{x:.3g}<extra></extra>",
        })  # fmt: skip
    ends = [end for trace in data for key in ("lowerfence", "upperfence", "x") for end in trace.get(key, ())]
    rows = {
        "tickvals": list(range(len(labels))),
        "ticktext": labels,
        "ticklabelstandoff": 6,
        "range": [len(labels) - 0.4, -0.6],
    }
    return figure(
        "bound",
        "Step KL of the updates, and the bound",
        "Exact step KL of every update that was taken, all seeds together: the box holds the middle half, the whiskers "
        "reach from the smallest to the largest. The upright mark is the rule's nominal bound; a whisker beyond it is "
        "a violation. Under each name: how many of the updates were over the bound.",
        data,
        layout(
            axis(f"step KL, nats a {per}", **spread(ends, 8)),
            axis("", showgrid=False, zeroline=False, **rows),
            height=110 + 46 * len(labels),
        ),
    )


def _in_order(report: Record, runs: Groups) -> list[tuple[str, Any]]:
    """What there are runs of, in the report's order of rules and then by value."""
    order = {rule["name"]: number for number, rule in enumerate(report.get("rules") or ())}
    return sorted((cell for cell in runs if cell[0] in order), key=lambda cell: (order[cell[0]], cell[1] or 0.0))


def _broken(report: Record, rule: str, value: Any) -> str:
    cells = [cell for cell in report.get("cells") or () if (cell["rule"], cell["value"]) == (rule, value)]
    shares = points([cell.get("violations") for cell in cells], [cell.get("iterations") for cell in cells])
    if not shares:
        return "no bound"
    updates = sum(count for _, count in shares)
    return f"{round(sum(share * count for share, count in shares)):,} of {updates:,} over"


def predicted_figure(runs: Groups, styles: Styles) -> dict[str, Any]:
    """The linear model's gain beside the gain of the step that was taken."""
    data: list[Trace] = []
    seen: list[float] = []
    for rule, style in styles.items():
        lines = [row for (name, _), members in runs.items() if name == rule for run in members for row in run]
        taken = [row for row in lines if row.get("accepted") is not False]
        pairs = points([row.get("predicted_gain") for row in taken], [row.get("surrogate_gain") for row in taken])
        if not pairs:
            continue
        pairs = [pairs[index] for index in np.unique(np.linspace(0, len(pairs) - 1, MARKS).round().astype(int))]
        x, y = map(rounded, zip(*pairs, strict=True))
        seen += [*x, *y]
        data.append({
            "type": "scatter", "mode": "markers", "x": x, "y": y, "name": safe(rule), "meta": {"rule": rule},
            "marker": {"color": style.colour, "symbol": style.symbol, "size": 6, "opacity": 0.6},
            "hovertemplate": f"predicted %{{x:.3g}}, realised %{{y:.3g}}<extra>{safe(rule)}</extra>",
        })  # fmt: skip
    return figure(
        "predicted",
        "Gain of the surrogate, predicted and realised",
        "One mark an update that was taken, on the batch that it learnt from: what the rule's model of the surrogate "
        "promised, and what the surrogate gained. On the dashed line the promise was kept; below it the model "
        f"was too hopeful. Rules that predict nothing are not in it; of more than {MARKS} updates of a rule, {MARKS} "
        "evenly spread ones are drawn.",
        identity(seen) + data,
        layout(axis("predicted gain"), axis("realised gain", zeroline=True)),
    )


def cost_figures(runs: Groups, styles: Styles) -> list[dict[str, Any]]:
    """What an update costs in time and in passes."""
    seconds: dict[str, list[float]] = {}
    gradients: dict[str, list[float]] = {}
    for (rule, _), members in runs.items():
        for run in members:
            seconds.setdefault(rule, []).append(float(np.mean([row["step_seconds"] for row in run])))
            if known(run[-1].get("gradients")):
                gradients.setdefault(rule, []).append(run[-1]["gradients"] / run[-1]["iteration"])
    bars = "Bars: the mean over the rule's runs, all knob values together; ticks: the least and the most of them."
    return [
        _bars("cost-seconds", "Seconds an update", "Time of the update rule's own step, without the rollout "
              f"and the critic's fit. {bars}", seconds, styles, "seconds"),
        _bars("cost-gradients", "Gradient-equivalents an update", "Passes over the batch that an update makes, "
              f"counted in gradients (forward and backward) of all of it. {bars}", gradients, styles, "gradients"),
    ]  # fmt: skip


def _bars(name: str, title: str, caption: str, costs: Mapping[str, list[float]], styles: Styles, unit: str) -> Record:
    rules = [rule for rule in styles if rule in costs]
    data = []
    for number, rule in enumerate(rules):
        colour, found = styles[rule].colour, costs[rule]
        mean = [float(np.mean(found))]
        data.append({
            "type": "bar", "orientation": "h", "x": rounded(mean), "y": [number], "width": 0.6,
            "marker": {"color": colour}, "error_x": error_bars(mean, [min(found)], [max(found)], INK),
            "hovertemplate": f"%{{x:.3g}} {unit}<extra>{safe(rule)}</extra>", "meta": {"rule": rule},
        })  # fmt: skip
    rows = {"tickvals": list(range(len(rules))), "ticktext": [safe(rule) for rule in rules], "ticklabelstandoff": 6}
    shape = layout(
        axis(unit, rangemode="tozero"),
        axis("", showgrid=False, zeroline=False, range=[len(rules) - 0.4, -0.6], **rows),
        height=80 + 38 * len(rules),
    )
    return figure(name, title, caption, data, shape)

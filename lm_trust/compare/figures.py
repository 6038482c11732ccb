"""The report's figures of what the comparison found: the frontier with its limit, and the one-update study.

A figure is {"id", "title", "caption", "data", "layout"}, of which the last two are plotly's; a trace's `meta` names the
rule that it belongs to, so that the page can hide a rule everywhere at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_trust.compare.figure_parts import (
    RuleStyle,
    Styles,
    Trace,
    axis,
    band,
    error_bars,
    figure,
    identity,
    layout,
    line,
    rounded,
    safe,
    spread,
)
from lm_trust.compare.frontier import limit_of_other_prompts
from lm_trust.compare.statistics import bootstrap_mean, coverage_text, known
from lm_trust.compare.words import cell_name, cell_text
from lm_trust.training.plots import GREY, INK
from lm_trust.training.run_folder import Record

# How the limit stands beside the rules: as one of them, under names that no rule can have.
LIMIT, BEST_OF_N = "the limit", "best of n"
LIMIT_STYLES = {LIMIT: RuleStyle(INK, "2px,3px", ""), BEST_OF_N: RuleStyle(INK, "", "star-open")}


def frontier_figure(report: Record, styles: Styles) -> dict[str, Any]:
    """Reward over realised KL, every rule's best with its interval, and what a nat can buy at most."""
    limit = report.get("limit") or {}
    data = _limit_traces(limit)
    if report.get("world") == "control":
        data += _run_points(report, styles)
    lines = {entry["rule"]: _frontier_traces(entry, styles[entry["rule"]]) for entry in report.get("frontier") or ()}
    data += [trace for traces in lines.values() for trace in traces]
    if report.get("world") == "control":
        data += _lone_means(report, {rule: style for rule, style in styles.items() if not lines.get(rule)})
    kls = [place for trace in data for place in trace["x"]]
    farthest = max((place for place in kls if place is not None), default=0.0)  # what nobody reached would need room
    matched = sorted({row["kl"] for row in report.get("matched") or () if row["kl"] <= farthest})
    if report.get("world") == "language":
        caption = [
            "Higher at the same place is better: more reward for the same distance from where the rules started.",
            "Lines: the mean over seeds, interpolated between a run's evaluations in the root of the KL, at each KL of "
            "the rule's best knob value of those that all seeds reached it with (hover to read it; where another one "
            "takes over, the line may jump); areas: its 95 % bootstrap interval.",
        ]
    else:
        caption = [
            "Higher at the same place is better: more reward for updates of the same size.",
            "Lines: the mean over seeds, of which each has a straight line from one of its runs to the next, one a "
            "knob value; areas: its 95 % bootstrap interval.",
        ]
    seeds = len(report.get("seeds") or ())
    share = coverage_text(seeds)
    if share is not None:
        caption.append(f"Over {seeds} seeds such an interval holds the true mean in about {share} of cases.")
    if seeds < 2:
        caption[1] = "Lines: one seed, so no interval can be given, and no difference here is supported by one."
    if report.get("world") == "control":
        caption.append(
            "Faint marks: single runs; marks with bars: the mean of a rule with one knob value, "
            "where all of its seeds finished."
        )
    if limit:
        caption.append(
            "Dotted: the tilted reference, the most that any policy can get for that KL; stars: best of n samples of "
            f"the reference. Both are estimated from {limit['samples']} samples of each of {limit['prompts']} prompts, "
            "which makes the limit too low rather than too high; areas and bars: their 95 % intervals over prompts."
        )
        others = limit_of_other_prompts(limit)
        if others is not None:
            caption.append(f"The limit of the rules' own prompts may lie elsewhere: {others}.")
    if matched:
        caption.append("Thin upright lines: the KLs of the table below.")
    shape = layout(
        axis(report.get("x_label") or "KL, nats", rangemode="tozero", **_control_scale(report, kls)),
        axis(report.get("reward_label") or "reward"),
        height=470,
        shapes=[_upright(kl) for kl in matched],
    )
    return figure("frontier", "Reward over realised KL", " ".join(caption), data, shape)


def _control_scale(report: Record, kls: Sequence[Any]) -> dict[str, Any]:
    return spread(kls) if report.get("world") == "control" else {}


def _upright(kl: float) -> dict[str, Any]:
    place = {"x0": kl, "x1": kl, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    return {"type": "line", "layer": "below", "line": {"color": GREY, "width": 0.7, "dash": "1px,3px"}, **place}


def _frontier_traces(entry: Record, style: RuleStyle) -> list[Trace]:
    meta = {"rule": entry["rule"]}
    drawn = line(
        entry["kl"],
        entry["reward"],
        style,
        entry["rule"],
        meta=meta,
        customdata=[[cell_text(entry["rule"], value), *_interval_text(low, high)]
                    for value, low, high in zip(entry["value"], entry["low"], entry["high"], strict=True)],
        hovertemplate="%{y:.3g} at %{x:.3g} nats%{customdata[1]}<extra>%{customdata[0]}</extra>",
    )  # fmt: skip
    if not drawn["x"]:
        return []
    area = band(entry["kl"], entry["low"], entry["high"], style.colour, meta=meta)
    if not area:
        drawn["error_y"] = error_bars(entry["reward"], entry["low"], entry["high"], style.colour)
    return [*area, drawn]


def _interval_text(low: Any, high: Any) -> list[str]:
    return [f"<br>95 % [{low:.3g}, {high:.3g}]" if known(low) and known(high) else ""]


def _run_points(report: Record, styles: Styles) -> list[Trace]:
    """Every run of a control comparison by itself, faint."""
    traces = []
    for rule, style in styles.items():
        rows = _measured_cells(report, rule)
        if rows:
            traces.append({
                "type": "scatter",
                "mode": "markers",
                "x": rounded(cell["step_kl"] for cell in rows),
                "y": rounded(cell["reward"] for cell in rows),
                "text": [safe(cell_name(rule, cell["value"], cell["seed"])) for cell in rows],
                "marker": {"color": style.colour, "symbol": style.symbol, "size": 6, "opacity": 0.4},
                "hovertemplate": "%{y:.4g} at %{x:.3g} nats<extra>%{text}</extra>",
                "meta": {"rule": rule},
            })  # fmt: skip
    return traces


def _measured_cells(report: Record, rule: str) -> list[Record]:
    cells = [cell for cell in report.get("cells") or () if cell["rule"] == rule]
    return [cell for cell in cells if known(cell.get("step_kl")) and known(cell.get("reward"))]


def _lone_means(report: Record, styles: Styles) -> list[Trace]:
    """The mean over all seeds of each rule of a control comparison that has no line, having one knob value."""
    traces = []
    for rule, style in styles.items():
        rows = _measured_cells(report, rule)
        if len(rows) < max(2, len(report["seeds"])) or len({cell["value"] for cell in rows}) > 1:
            continue
        kl = float(np.mean([cell["step_kl"] for cell in rows]))
        reward, low, high = bootstrap_mean([cell["reward"] for cell in rows])
        traces.append(
            line(
                [kl],
                [reward],
                style,
                rule,
                meta={"rule": rule},
                error_y=error_bars([reward], [low], [high], style.colour),
                hovertemplate=f"%{{y:.4g}} at %{{x:.3g}} nats{_interval_text(low, high)[0]}<extra>{safe(rule)}</extra>",
            )
        )
    return traces


def _limit_traces(limit: Record) -> list[Trace]:
    if not limit:
        return []
    columns = _columns(limit.get("tilted") or (), "kl", "reward", "low", "high")
    meta = {"rule": LIMIT}
    traces = band(columns["kl"], columns["low"], columns["high"], GREY, meta=meta)
    if columns["kl"]:
        hover = "%{y:.3g} at %{x:.3g} nats<extra>limit: tilted reference</extra>"
        shown = {"markers": None, "hovertemplate": hover, "meta": meta}
        traces.append(line(columns["kl"], columns["reward"], LIMIT_STYLES[LIMIT], LIMIT, **shown))
        traces[-1]["line"]["width"] = 2.6
    best = _columns(limit.get("best_of_n") or (), "kl", "kl_low", "kl_high", "reward", "low", "high", "n")
    if best["kl"]:
        traces.append({
            "type": "scatter",
            "mode": "markers",
            "x": rounded(best["kl"]),
            "y": rounded(best["reward"]),
            "text": [f"best of {n}" for n in best["n"]],
            "error_x": error_bars(best["kl"], best["kl_low"], best["kl_high"], GREY),
            "error_y": error_bars(best["reward"], best["low"], best["high"], GREY),
            "marker": {"color": INK, "symbol": LIMIT_STYLES[BEST_OF_N].symbol, "size": 10, "line": {"width": 1.4}},
            "hovertemplate": "%{y:.3g} at %{x:.3g} nats<extra>%{text}</extra>",
            "meta": {"rule": BEST_OF_N},
        })  # fmt: skip
    return traces


def _columns(rows: Sequence[Record], *keys: str) -> dict[str, list[Any]]:
    return {key: [row.get(key) for row in rows] for key in keys}


def study_figures(report: Record, styles: Styles) -> list[dict[str, Any]]:
    """The one-update study: what a nat of one step buys, and how much of the gain on the batch is real."""
    study = report.get("one_update") or {}
    rows = [row for row in study.get("rows") or () if not row.get("error")]
    per = "token" if report.get("world") == "language" else "step"
    step_kls = [row.get("step_kl") for row in rows if known(row.get("step_kl")) and row["step_kl"] > 0]
    reward = "held-out reward after less before"
    gains = [row.get(key) for row in rows for key in ("batch_gain", "fresh_gain")]
    return [
        figure(
            "study-step",
            "Improvement over the size of the step",
            "Each mark is one update from the same policy and batch; a line joins a rule's knob values. Higher at the "
            "same step KL is better; an error bar (95 %) that crosses zero shows no improvement. Updates that were "
            "rejected moved nothing and are left out.",
            _study_traces(rows, styles, "step_kl", "improvement", log=True),
            layout(axis(f"step KL, nats a {per}", **spread(step_kls, 5)), axis(reward, zeroline=True)),
        ),
        figure(
            "study-fresh",
            "Gain on fresh samples over gain on the batch",
            "Of the gain that an update shows on the batch that it learnt from, as much is real as fresh samples "
            "confirm: on the dashed line all of it, below it the rest is the batch's own noise. Error bars: 95 %.",
            identity(gains) + _study_traces(rows, styles, "batch_gain", "fresh_gain"),
            layout(axis("surrogate gain on the batch"), axis("the same on fresh samples", zeroline=True)),
        ),
        figure(
            "study-improvement",
            "Improvement over gain on the batch",
            "Whether the surrogate's gain became reward. The axes have different units (advantages and rewards), so "
            "read off the order and the sign. Error bars: 95 %.",
            _study_traces(rows, styles, "batch_gain", "improvement"),
            layout(axis("surrogate gain on the batch"), axis(reward, zeroline=True)),
        ),
    ]


def _study_traces(rows: Sequence[Record], styles: Styles, x: str, y: str, *, log: bool = False) -> list[Trace]:
    stem = y.removesuffix("_gain")
    traces = []
    for rule, style in styles.items():
        of_rule = [row for row in rows if row["rule"] == rule and known(row.get(x)) and known(row.get(y))]
        of_rule = sorted((row for row in of_rule if not log or row[x] > 0), key=lambda row: row[x])
        if not of_rule:
            continue
        columns = _columns(of_rule, x, y, f"{stem}_low", f"{stem}_high")
        trace = line(
            columns[x],
            columns[y],
            style,
            rule,
            markers=len(of_rule),
            text=[safe(cell_text(rule, row.get("value"))) for row in of_rule],
            hovertemplate="%{y:.3g} at %{x:.3g}<extra>%{text}</extra>",
            error_y=error_bars(columns[y], columns[f"{stem}_low"], columns[f"{stem}_high"], style.colour),
            meta={"rule": rule},
        )
        trace["line"]["width"] = 1.2
        traces.append(trace)
    return traces

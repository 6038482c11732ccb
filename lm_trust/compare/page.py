"""report.html: a comparison on one page that needs no network, opens from disk, and prints.

The page holds plotly's script, the figures as JSON, and everything else as HTML. Texts of completions and messages of
errors come from outside: the template escapes them, the JSON holds no character that HTML knows, and the page's own
policy lets no script run but plotly's and its own, which it names by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lm_trust.compare import page_tables
from lm_trust.compare.figure_parts import ON_DARK, SYMBOLS, RuleStyle, Styles, faint, rule_styles
from lm_trust.compare.figures import LIMIT_STYLES, frontier_figure, study_figures
from lm_trust.compare.figures_training import (
    bound_figure,
    cost_figures,
    course_figures,
    predicted_figure,
    runs_of,
)
from lm_trust.compare.statistics import coverage_text
from lm_trust.compare.words import knob_text
from lm_trust.training.run_folder import Record
from lm_trust.verified_folder import replacing


def write_page(report: Record, rows: pyarrow.Table, path: Path) -> None:
    """Write the page; it appears whole or not at all.

    Args:
        report: the content of report.json. Stages that a comparison does not have are None or empty.
        rows: the table of results.parquet.
        path: of the page; an older one is replaced.

    Raises:
        OSError: it cannot be written.
    """
    # A text may hold half of a surrogate pair, which no encoding has.
    with replacing(path) as temporary:
        temporary.write_bytes(_page(report, rows).encode("utf-8", "replace"))


def _page(report: Record, rows: pyarrow.Table) -> str:
    styles = rule_styles(rule["name"] for rule in report.get("rules") or ())
    sections = _sections(report, rows, styles)
    drawn = [figure for figures in sections.values() for figure in figures if figure["data"]]
    data = {
        "dark": ON_DARK | {faint(light): faint(dark) for light, dark in ON_DARK.items()},
        "figures": [{key: figure.get(key) for key in ("id", "data", "layout", "axes", "floor")} for figure in drawn],
    }
    scripts = [get_plotlyjs(), _asset("report.js")]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals |= {"number": page_tables.number, "knob_text": knob_text}
    environment.filters["printable"] = page_tables.printable
    return environment.from_string(_asset("report.html.jinja")).render(
        report=report,
        language=report.get("world") == "language",
        sections=sections,
        styles={name: _swatch(style) for name, style in styles.items()},
        limit_styles={name: _swatch(style) for name, style in LIMIT_STYLES.items()} if report.get("limit") else {},
        shown=shown_values(report),
        matched=page_tables.matched(report),
        coverage=coverage_text(len(report.get("seeds") or ())),
        improvement=page_tables.improvement(report),
        study=page_tables.study(report),
        cells=page_tables.cells(report),
        failures=page_tables.failures(report),
        completions=page_tables.completions(report, list(styles)),
        data=_json(data),
        css=Markup(_asset("report.css")),
        colours=Markup(_colours(styles)),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )


def _sections(report: Record, rows: pyarrow.Table, styles: Styles) -> dict[str, list[Record]]:
    runs = runs_of(rows.to_pylist())
    return {
        "frontier": [frontier_figure(report, styles)],
        "course": course_figures(report, runs, styles),
        "bound": [bound_figure(report, runs, styles), predicted_figure(runs, styles)],
        "study": study_figures(report, styles) if report.get("one_update") else [],
        "cost": cost_figures(runs, styles),
    }


def shown_values(report: Record) -> dict[str, str]:
    """The knob value of each rule that the page shows first: the one that most of the matched table is of.

    A rule that is nowhere in it is shown with the middle one of its values.
    """
    shown = {}
    for rule in report.get("rules") or ():
        values = rule.get("values") or [None]
        best = Counter(
            row["value"]
            for row in report.get("matched") or ()
            if row["rule"] == rule["name"] and row["mean"] is not None
        )
        shown[rule["name"]] = knob_text(best.most_common(1)[0][0] if best else values[(len(values) - 1) // 2])
        if shown[rule["name"]] not in map(knob_text, values):  # a curve through all values has none of its own
            shown[rule["name"]] = knob_text(values[(len(values) - 1) // 2])
    return shown


def _swatch(style: RuleStyle) -> dict[str, str]:
    """What the legend draws: the colour's class, and the dash and marker as SVG has them."""
    dash = {"solid": "none", "": "0,99"}.get(style.dash, style.dash.replace("px", ""))
    return {"colour": _class(style.colour), "dash": dash, "marker": SYMBOLS.get(style.symbol, "")}


def _class(colour: str) -> str:
    return f"colour-{colour[1:]}"


def _colours(styles: Styles) -> str:
    """CSS classes of the rules' colours, on white and on dark."""
    colours = sorted({style.colour for style in (*styles.values(), *LIMIT_STYLES.values())})
    light = "".join(f".{_class(colour)}{{--rule:{colour}}}" for colour in colours)
    dark = "".join(f".{_class(colour)}{{--rule:{ON_DARK[colour]}}}" for colour in colours)
    return f"{light}@media screen and (prefers-color-scheme:dark){{{dark}}}"


def _json(data: Any) -> Markup:
    """JSON that may stand in a script element: no character in it means anything to HTML."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _policy(scripts: Sequence[str]) -> str:
    """What the page may do: run these scripts, style itself, save a picture of a figure; no network at all."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _asset(name: str) -> str:
    return resources.files("lm_trust.compare").joinpath("assets", name).read_text(encoding="utf-8")

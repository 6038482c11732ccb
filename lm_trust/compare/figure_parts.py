"""What the report's figures are made of: a rule's colour, dash and marker, and plotly traces as plain dicts.

Colours are written as they are on white; the page's script swaps them for those of `ON_DARK` where the reader's
screen is dark. Everything that comes from a name is escaped, because plotly reads a text as a little HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lm_trust.compare.statistics import known
from lm_trust.training.compare_curves import COLOURS
from lm_trust.training.plots import BLUE, GREEN, GREY, INK, PURPLE, VERMILION

GRID, AXIS = "#e6e6e6", "#b0b0b0"
ON_DARK = {
    BLUE: "#4aa3e8",
    VERMILION: "#ff8f4d",
    GREEN: "#35c79d",
    PURPLE: "#dc93c6",
    "#b8860b": "#e3b94a",
    "#56b4e9": "#a5dcff",
    INK: "#e9e9e6",
    GREY: "#a2a5aa",
    GRID: "#2f343b",
    AXIS: "#5b626c",
}
DASHES = ("solid", "9px,4px", "2px,3px", "9px,3px,2px,3px", "14px,5px")
# plotly's name of a marker, and the same shape around (0, 0) for the legend in the page's own HTML.
SYMBOLS = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "square": "M-3.5,-3.5H3.5V3.5H-3.5Z",
    "diamond": "M0,-5L5,0L0,5L-5,0Z",
    "triangle-up": "M0,-4.5L4.5,3.5H-4.5Z",
    "x": "M-4,-2.2L-2.2,-4L0,-1.8L2.2,-4L4,-2.2L1.8,0L4,2.2L2.2,4L0,1.8L-2.2,4L-4,2.2L-1.8,0Z",
    "triangle-down": "M0,4.5L4.5,-3.5H-4.5Z",
    "cross": "M-1.5,-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "pentagon": "M0,-4.6L4.4,-1.4L2.7,3.7H-2.7L-4.4,-1.4Z",
    "hourglass": "M-4,-4H4L-4,4H4Z",
    "star-open": "M0,-5L1.3,-1.6L5,-1.5L2.1,0.8L3.1,4.3L0,2.2L-3.1,4.3L-2.1,0.8L-5,-1.5L-1.3,-1.6Z",  # of no rule
}

Trace = dict[str, Any]


def faint(colour: str) -> str:
    """A colour for areas, which lets what is under them be seen."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.13)"


class RuleStyle(NamedTuple):
    """How a rule looks in every figure."""

    colour: str
    dash: str
    symbol: str


Styles = Mapping[str, RuleStyle]  # by the rules' names


def rule_styles(names: Iterable[str]) -> dict[str, RuleStyle]:
    """A style a rule, in the rules' order: the colours begin again after eight, the dash and marker then differ."""
    symbols = [symbol for symbol in SYMBOLS if not symbol.endswith("open")]
    return {
        name: RuleStyle(COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)], symbols[index % len(symbols)])
        for index, name in enumerate(names)
    }


def rounded(values: Iterable[Any]) -> list[float | None]:
    """Five significant digits, which is more than a figure shows; None for what is not a finite number."""
    return [float(f"{value:.5g}") if known(value) else None for value in map(_plain, values)]


def points(*columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The rows of these columns of which every entry is a finite number."""
    return [row for row in zip(*columns, strict=False) if all(known(_plain(value)) for value in row)]


def safe(text: Any) -> str:
    """A text that plotly shows as it is."""
    return html.escape(str(text), quote=False)


def line(
    x: Sequence[Any], y: Sequence[Any], style: RuleStyle, name: str, *, markers: int | None = 8, **more: Any
) -> Trace:
    """A rule's line with a few of its markers.

    Args:
        x, y: (M,) places and values.
        style: of the rule.
        name: for the hover label.
        markers: how many at most; None: none.
        more: keys of the trace.
    """
    trace = {
        "type": "scatter",
        "mode": "lines" if markers is None else "lines+markers",
        "x": rounded(x),
        "y": rounded(y),
        "name": safe(name),
        "line": {"color": style.colour, "dash": style.dash, "width": 2},
        **more,
    }
    if markers is not None:
        shown = 0 if len(x) <= markers else markers
        trace["marker"] = {"color": style.colour, "symbol": style.symbol, "size": 8, "maxdisplayed": shown}
    return trace


def band(x: Sequence[Any], low: Sequence[Any], high: Sequence[Any], colour: str, **more: Any) -> list[Trace]:
    """The area between two curves where both are known; no trace where that is nowhere."""
    rows = points(x, low, high)
    if len(rows) < 2:
        return []
    places, lows, highs = map(list, zip(*rows, strict=True))
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": rounded([*places, *reversed(places)]),
            "y": rounded([*lows, *reversed(highs)]),
            "fill": "toself",
            "fillcolor": faint(colour),
            "line": {"width": 0, "color": colour},
            "hoverinfo": "skip",
            **more,
        }
    ]


def error_bars(values: Sequence[Any], low: Sequence[Any], high: Sequence[Any], colour: str) -> dict[str, Any]:
    """Of plotly's error_x or error_y: from `low` to `high`, of no length where one of them is not known."""
    ends = list(zip(values, low, high, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": rounded(h - v if known(v) and known(h) else 0.0 for v, _, h in ends),
        "arrayminus": rounded(v - a if known(v) and known(a) else 0.0 for v, a, _ in ends),
        "color": colour,
        "thickness": 1.4,
        "width": 4,
    }


def identity(values: Sequence[Any]) -> list[Trace]:
    """The line on which both axes are equal, over the range of these values and zero."""
    numbers = [value for value in values if known(value)]
    if not numbers:
        return []
    ends = rounded([min(0.0, *numbers), max(0.0, *numbers)])
    drawn = {"color": GREY, "width": 1.2, "dash": "4px,4px"}
    return [{"type": "scatter", "mode": "lines", "x": ends, "y": ends, "line": drawn, "hoverinfo": "skip"}]


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": safe(title), "standoff": 10},
        "gridcolor": GRID,
        "linecolor": AXIS,
        "zerolinecolor": AXIS,
        "zerolinewidth": 1,
        "automargin": True,
        **more,
    }


def layout(x: Mapping[str, Any], y: Mapping[str, Any], *, height: int = 340, **more: Any) -> dict[str, Any]:
    """A figure's layout: no box, faint lines across, one font; `x` and `y` as `axis` makes them."""
    return {
        "xaxis": {"showgrid": False, "ticks": "outside", "ticklen": 4, "tickcolor": AXIS, "showline": True, **x},
        "yaxis": {"showline": False, **y},
        "height": height,
        "margin": {"l": 8, "r": 14, "t": 14, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"font": {"size": 13}},
        **more,
    }


def figure(name: str, title: str, caption: str, data: list[Trace], shape: dict[str, Any]) -> dict[str, Any]:
    """A figure of the page; one without traces is left out of it, with a sentence in its place."""
    return {"id": f"figure-{name}", "title": title, "caption": caption, "data": data, "layout": shape}


def spread(values: Sequence[Any], ratio: float = 30.0) -> dict[str, Any]:
    """The type of an axis for these values: logarithmic where they are positive and range over more than `ratio`."""
    numbers = [value for value in values if known(value)]
    if not numbers or min(numbers) <= 0 or max(numbers) <= ratio * min(numbers):
        return {}
    decades = math.log10(max(numbers) / min(numbers))
    return {"type": "log", "dtick": 1 if decades > 2.5 else "D2", "tickformat": "~g"}  # D2: at 1, 2 and 5


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's."""
    return value.item() if hasattr(value, "item") else value

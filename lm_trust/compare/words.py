"""How the things of a comparison are written: numbers, knob values, cells."""

from __future__ import annotations


def number_text(value: float) -> str:
    """Three digits, or all that are before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def nats_text(kl: float) -> str:
    """A KL as it is matched at: "1 nat", "0.5 nats"."""
    return f"{kl:g} nat{'' if kl == 1 else 's'}"


def knob_text(value: float | None) -> str:
    """A knob's value as it is written in a config, or nothing where a rule has no knob."""
    return "" if value is None else f"{value:g}"


def cell_text(rule: str, value: float | None) -> str:
    """A rule at a value, as in "trpo 0.02"."""
    return f"{rule} {knob_text(value)}".strip()


def cell_name(rule: str, value: float | None, seed: int) -> str:
    """A cell, as in "trpo 0.02, seed 0"."""
    return f"{cell_text(rule, value)}, seed {seed}"

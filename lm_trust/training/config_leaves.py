"""A config as a flat mapping, for what compares configs or shows them as a list."""

from __future__ import annotations

from collections.abc import Mapping


def leaves(section: Mapping[str, object], at: str = "") -> dict[str, object]:
    """The values of a nested mapping by their dotted keys: {"update": {"clip": 0.2}} gives {"update.clip": 0.2}."""
    flat: dict[str, object] = {}
    for name, value in section.items():
        flat |= leaves(value, f"{at}{name}.") if isinstance(value, Mapping) else {f"{at}{name}": value}
    return flat

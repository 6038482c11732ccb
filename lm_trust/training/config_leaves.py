"""A config as a flat mapping, for what compares configs or shows them as a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def leaves(section: Mapping[str, object], at: str = "") -> dict[str, object]:
    """The values of a nested mapping by their dotted keys: {"update": {"clip": 0.2}} gives {"update.clip": 0.2}."""
    flat: dict[str, object] = {}
    for name, value in section.items():
        flat |= leaves(value, f"{at}{name}.") if isinstance(value, Mapping) else {f"{at}{name}": value}
    return flat


def differing_keys(one: Mapping[str, object], other: Mapping[str, object], may_differ: Sequence[str] = ()) -> list[str]:
    """The dotted keys in which two flat mappings differ, without those that begin with one of `may_differ`."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [key for key in keys if not key.startswith(tuple(may_differ))]

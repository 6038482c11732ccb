"""A config as a flat mapping, for what compares configs or shows them as a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# What touches nothing of a run's course: what is noted on the way, and in how many processes or pieces it is computed.
MAY_DIFFER = (
    "output",
    "trackers",
    "checkpoint.",
    "completions.",
    "rollout.microbatch_size",
    "rollout.mismatch.limit",
    "environment.processes",
    "evaluation.videos",
    "critic.own_process",
    "model.gradient_checkpointing",
)
# Likewise of each reward: how it is called, which is what a run that its reward has stopped needs to change.
MAY_DIFFER_IN_REWARDS = ("timeout", "parallel", "process", "memory", "batch_size")


def leaves(section: Mapping[str, object], at: str = "") -> dict[str, object]:
    """The values of a nested mapping by their dotted keys: {"update": {"clip": 0.2}} gives {"update.clip": 0.2}."""
    flat: dict[str, object] = {}
    for name, value in section.items():
        flat |= leaves(value, f"{at}{name}.") if isinstance(value, Mapping) else {f"{at}{name}": value}
    return flat


def differing_keys(one: Mapping[str, object], other: Mapping[str, object], may_differ: Sequence[str] = ()) -> list[str]:
    """The dotted keys in which two flat mappings differ, without those of `may_differ`: "a." is all that is below a."""
    below = tuple(key for key in may_differ if key.endswith("."))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [key for key in keys if key not in may_differ and not key.startswith(below)]


def course(config: Mapping[str, object], may_differ_in_rewards: Sequence[str]) -> dict[str, object]:
    """A run's values by dotted keys, those of its rewards by index, without what may differ in these."""
    values = leaves(config)
    for index, reward in enumerate(values.pop("rewards", [])):
        kept = {key: value for key, value in reward.items() if key not in may_differ_in_rewards}
        values |= leaves(kept, f"rewards.{index}.")
    return values

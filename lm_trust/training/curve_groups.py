"""Which runs are one curve, and what to call it: runs that share everything but their seed are samples of one thing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm_trust.training.config import Config
from lm_trust.training.config_leaves import MAY_DIFFER, MAY_DIFFER_IN_REWARDS, course

_IGNORED = ("seed", *MAY_DIFFER)  # two runs that differ only here are still samples of the same thing
_MOST_NAMED = 3  # differing keys that a legend can bear; beyond them the folders' names say it better

Settings = Mapping[str, object]


def group_runs(runs: Mapping[Path, Config]) -> dict[str, list[Path]]:
    """Run folders by the label of their group, in the order given."""
    members: dict[str, list[Path]] = {}
    settings: dict[str, Settings] = {}
    for run, config in runs.items():
        flat = course(config.model_dump(), MAY_DIFFER_IN_REWARDS)
        flat = {key: value for key, value in flat.items() if not key.startswith(_IGNORED)}
        identity = json.dumps(flat, sort_keys=True, default=str)
        members.setdefault(identity, []).append(run)
        settings[identity] = flat
    groups = list(members.values())
    return dict(zip(_labels(list(settings.values()), groups), groups, strict=True))


def _labels(settings: Sequence[Settings], groups: Sequence[Sequence[Path]]) -> list[str]:
    keys = _differing(settings)
    if 0 < len(keys) <= _MOST_NAMED:
        labels = [", ".join(_named(key, flat[key]) for key in keys if key in flat) for flat in settings]
        if all(labels) and len(set(labels)) == len(labels):
            return labels
    for name in (_stem, _parent, _path):
        labels = [name(runs) for runs in groups]
        if all(labels) and len(set(labels)) == len(labels):
            return labels
    return [f"{_path(runs)} ({number})" for number, runs in enumerate(groups, 1)]


def _differing(settings: Sequence[Settings]) -> list[str]:
    """The keys that tell the groups apart; a section's keys only among groups of the same `kind` of it.

    TRPO and PPO differ in their kind, and not also in every key that only one of them has.
    """
    differing = []
    for key in dict.fromkeys(key for flat in settings for key in flat):
        kind = f"{key.rpartition('.')[0]}.kind"
        values: dict[object, set[str]] = {}
        for flat in settings:
            among = flat.get(kind) if key != kind else None
            values.setdefault(among, set()).add(json.dumps(flat.get(key), default=str))
        if any(len(among) > 1 for among in values.values()):
            differing.append(key)
    return differing


def _named(key: str, value: object) -> str:
    """A kind or an environment's name speaks for itself; a number does not."""
    if isinstance(value, str) and key.rpartition(".")[2] in ("kind", "id", "path", "name"):
        return os.path.basename(value) if "/" in value else value
    return f"{key} {value if isinstance(value, str) else json.dumps(value, default=str)}"


def _stem(runs: Sequence[Path]) -> str:
    """The folders' names less their seeds: hopper_trpo of hopper_trpo_0 and hopper_trpo_1; empty where they differ."""
    names = [_absolute(run).name for run in runs]
    stems = {re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", name) for name in names}
    return names[0] if len(names) == 1 else stems.pop() if len(stems) == 1 else ""


def _parent(runs: Sequence[Path]) -> str:
    return os.path.basename(os.path.commonpath([_absolute(run).parent for run in runs]))


def _path(runs: Sequence[Path]) -> str:
    return str(runs[0])


def _absolute(run: Path) -> Path:
    return Path(os.path.abspath(run))

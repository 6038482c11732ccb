"""Read a run's config from YAML, `extends` and the command line, and write it back resolved.

A config file may name a parent, `extends: other.yaml`, relative to itself; a run's other paths are relative to the
working directory. Mappings merge, lists and single values replace, and a section whose `kind` differs from its
parent's replaces it whole: the keys of TRPO mean nothing to PPO. Overrides from the command line are one more such
layer on top. Every problem found is one line that names the file (or the command line), the key and what to do; all
of them come in one `UserError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lm_trust.errors import UserError
from lm_trust.training.config import Config, ControlConfig, LanguageConfig
from lm_trust.training.config_errors import Key, dotted, plain, problems_of, shown
from lm_trust.training.config_learning import GROUPED
from lm_trust.training.config_paths import no_such, resolve_paths
from lm_trust.training.config_stages import RewardModelConfig, SftConfig, StageConfig
from lm_trust.training.config_yaml import YamlTextError, read_yaml, write_yaml

COMMAND_LINE = "command line"
_TRAIN, _STAGES, _COMPARE = "lm-trust train", "lm-trust sft or lm-trust reward-model", "lm-trust compare"
# Which commands a config is for, by the sections that tell; the first that are all there.
_COMMANDS = {
    ("base", "rules"): _COMPARE,
    ("data", "model"): _STAGES,
    ("prompts", "model"): _TRAIN,
    ("environment",): _TRAIN,
}
_DEEPEST = 8  # parts of an override's key; no config is nearly as deep

Layer = tuple[str, dict[str, Any]]  # a mapping, and what messages call the place that it comes from
Root = TypeVar("Root", bound=BaseModel)


def load_config(
    path: str | os.PathLike,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    root: type[StageConfig] | None = None,
    layers: Sequence[Layer] = (),
    check_files: bool = True,
    saved: bool = False,
) -> Config | StageConfig:
    """The validated config of a file: defaults filled in, `output` chosen, local paths absolute.

    Args:
        path: the YAML file.
        overrides: (dotted key, YAML text) pairs, as ("update.max_kl", "0.02"); an item of a list by its
            index, "rewards.0.weight".
        root: the stage that the config is of; without it a run of either world, told by its sections.
        check_files: whether the prompts, the adapter and a local model must exist; a finished run can be
            looked at without its prompts.
        saved: whether it is a run's own, to be looked at. Which settings may stand together was then checked by the
            version that trained it; a later one may be stricter.
        layers: mappings between the file and the overrides, each with the name of its place.

    Raises:
        UserError: one line for each problem.
    """
    path = os.fspath(path)
    stack = _stack(path, layers, overrides)
    _require_command(_TRAIN if root is None else _STAGES, stack, path)
    root = root or _world(stack, path)
    config, sources = _validated(root, [(path, _default_kinds(root, stack)), *stack], path, saved=saved)
    config, found = resolve_paths(config, path)
    if found and check_files:
        raise UserError(_lines(found, sources, path))
    return config


def load_compare_config(path: str | os.PathLike, root: type[Root], overrides: Sequence[tuple[str, str]] = ()) -> Root:
    """The validated config of a comparison; it describes no run, so nothing in it is looked up or filled in.

    Raises:
        UserError: one line for each problem.
    """
    path = os.fspath(path)
    stack = _stack(path, (), overrides)
    _require_command(_COMPARE, stack, path)
    return _validated(root, stack, path)[0]


def dump(config: Config | StageConfig) -> str:
    """The config as YAML that `load_config` reads back equal, every default written out."""
    return write_yaml(config.model_dump())


# ---- layers


def _stack(path: str, layers: Sequence[Layer], overrides: Sequence[tuple[str, str]]) -> list[Layer]:
    if "\0" in path:
        raise UserError(f"{plain(path)}: a file's name cannot hold a null byte")
    return [*_layers(path, ()), *layers, (COMMAND_LINE, _override_layer(overrides))]


def _validated(
    root: type[Root], stack: Sequence[Layer], path: str, *, saved: bool = False
) -> tuple[Root, dict[Key, str]]:
    """The config that the layers make, and which of them each key was last set by."""
    sources: dict[Key, str] = {}
    tree: dict[str, Any] = {}
    for source, layer in stack:
        tree = _merge(tree, layer, source, sources)
    try:
        return root.model_validate(tree, context={"saved": saved}), sources
    except ValidationError as error:
        found = problems_of(error, tree, root, ControlConfig if root is LanguageConfig else LanguageConfig)
        raise UserError(_lines(found, sources, path)) from None


def _layers(path: str, children: tuple[str, ...]) -> Iterator[Layer]:
    """The (file, mapping) layers of a file, its furthest ancestor first."""
    real = os.path.realpath(path)
    if real in children:
        raise UserError(f"{plain(path)}: extends: the files extend one another in a circle")
    try:
        tree = read_yaml(_read(path))
    except YamlTextError as problem:
        raise UserError(f"{plain(path)}: {problem}") from None
    if tree is None:
        raise UserError(f"{plain(path)}: the file is empty")
    if not isinstance(tree, dict):
        raise UserError(f"{plain(path)}: expected `key: value` lines, got {shown(tree)}")
    parent = tree.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{plain(path)}: extends: expected the name of a file, got {shown(parent)}")
        parent = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(parent)))
        if not os.path.exists(parent):
            raise UserError(f"{plain(path)}: extends: {no_such('file', parent)}")
        yield from _layers(parent, (*children, real))
    yield path, tree


def _read(path: str) -> str:
    if os.path.isdir(path):
        resumed = "; a run goes on by --resume" if os.path.exists(os.path.join(path, "config.yaml")) else ""
        raise UserError(f"{plain(path)}: this is a folder; give a YAML file{resumed}")
    if not os.path.exists(path):
        raise UserError(no_such("file", path))
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError:
        raise UserError(f"{plain(path)}: not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"{plain(path)}: cannot be read: {error.strerror}") from None


def _override_layer(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """All overrides as one layer, so that their order matters only between two of the same key."""
    layer: dict[str, Any] = {}
    for key, text in overrides:
        parts = key.split(".")
        if not all(parts) or len(parts) > _DEEPEST:
            raise UserError(f"{COMMAND_LINE}: --{plain(key)}: expected a key such as --update.max_kl")
        if parts[0] == "reward":  # the usual run has one reward: `--reward.path` for `--rewards.0.path`
            parts[:1] = ["rewards", "0"]
        if parts[0] == "extends":
            raise UserError(f"{COMMAND_LINE}: extends: only a config file can extend another")
        try:
            value = read_yaml(text)
        except YamlTextError as problem:
            raise UserError(f"{COMMAND_LINE}: {dotted(parts)}: {shown(text)} is not valid YAML: {problem}") from None
        nested: Any = value
        for part in reversed(parts):
            nested = {part: nested}
        layer = _merge(layer, nested, COMMAND_LINE, {}, kinds=False)
    return layer


def _merge(
    base: dict[str, Any],
    layer: dict[str, Any],
    source: str,
    sources: dict[Key, str],
    at: Key = (),
    *,
    kinds: bool = True,
) -> dict[str, Any]:
    """`layer` over `base`, both unchanged; `sources` learns which layer each key was last set by."""
    merged = dict(base)
    for name, value in layer.items():
        old, key = merged.get(name), (*at, name)
        if isinstance(old, dict) and isinstance(value, dict):
            other_kind = kinds and isinstance(value.get("kind"), str) and value["kind"] != old.get("kind")
            merged[name] = _merge({} if other_kind else old, value, source, sources, key, kinds=kinds)
        elif isinstance(old, list) and isinstance(value, dict) and source == COMMAND_LINE:
            merged[name] = _merge_items(old, value, source, sources, key)
        elif isinstance(value, dict):
            if source == COMMAND_LINE and kinds and old is not None:
                raise UserError(f"{source}: {dotted(key)} is a single value, not a section with keys of its own")
            merged[name] = _merge({}, value, source, sources, key, kinds=kinds)
        else:
            merged[name] = value
        sources[key] = source
    return merged


def _merge_items(items: list[Any], layer: dict[str, Any], source: str, sources: dict[Key, str], at: Key) -> list[Any]:
    for index in layer:
        if not (index.isascii() and index.isdigit() and len(index) < 10 and int(index) < len(items)):
            items_are = f"a list with items 0 to {len(items) - 1}" if items else "an empty list"
            raise UserError(f"{source}: {dotted((*at, index))}: {dotted(at)} is {items_are}")
    numbered = {str(index): item for index, item in enumerate(items)}
    changes = {str(int(index)): value for index, value in layer.items()}
    merged = _merge(numbered, changes, source, sources, at)
    return [merged[str(index)] for index in range(len(items))]


def _sections(layers: Sequence[Layer]) -> set[str]:
    return {name for _, layer in layers for name in layer}


def _require_command(command: str, layers: Sequence[Layer], path: str) -> None:
    """See that the sections, where they tell which command a config is for, do not tell of another one."""
    names = _sections(layers)
    for sections, other in _COMMANDS.items():
        if names.issuperset(sections):
            if other != command:
                given = f"{sections[0]} is" if len(sections) == 1 else f"{' and '.join(sections)} are"
                raise UserError(f"{plain(path)}: {given} given, as for {other}; here one for {command} is needed")
            return


def _world(layers: Sequence[Layer], path: str) -> type[LanguageConfig] | type[ControlConfig]:
    """Which world a config is of: told by the section that only one of them has."""
    names = _sections(layers)
    if {"environment", "model"} <= names:
        raise UserError(
            f"{plain(path)}: both environment (a control run) and model (a language run) are given; keep one"
        )
    if not {"environment", "model"} & names:
        raise UserError(
            f"{plain(path)}: neither environment (a control run) nor model (a language run) is given; add one"
        )
    return ControlConfig if "environment" in names else LanguageConfig


def _default_kinds(root: type[Config | StageConfig], layers: Sequence[Layer]) -> dict[str, Any]:
    """The layer below all files: it lets a section leave out its kind where the default is meant."""
    if root in (SftConfig, RewardModelConfig):  # no section of theirs has kinds
        return {}
    advantage = "gae"
    for _, layer in layers:
        section = layer.get("advantage")
        advantage = section.get("kind", advantage) if isinstance(section, dict) else advantage
    critic = "mlp" if root is ControlConfig else "none" if advantage in GROUPED else "reference_head"
    return {"advantage": {"kind": "gae"}, "critic": {"kind": critic}, "update": {"kind": "trpo"}}


def _lines(found: list[tuple[Key, str]], sources: dict[Key, str], path: str) -> str:
    """One line a problem, each with the layer that last set the key or the section around it."""
    lines = []
    for key, message in found:
        known = (sources[key[:end]] for end in range(len(key), 0, -1) if key[:end] in sources)
        where = plain(next(known, path))
        lines.append(f"{where}: {dotted(key)}: {message}" if key else f"{where}: {message}")
    return "\n".join(lines)

"""Where a config's models and data are: local paths made absolute, names of ours and hub ids as they are.

What is wrong with a path is a line that says what was expected or what may be meant, before anything is loaded.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from typing import Any

from lm_trust.lm.smollm2 import SMOLLM2
from lm_trust.training.config import Config, ControlConfig, LanguageConfig
from lm_trust.training.config_errors import Key, plain, shown
from lm_trust.training.config_stages import StageConfig

_MODEL_FILES = ("config.json", "adapter_config.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_paths(config: Config | StageConfig, path: str) -> tuple[Config | StageConfig, list[tuple[Key, str]]]:
    """The config with its folder chosen and its local paths absolute, and what is wrong with those paths.

    Args:
        config: validated.
        path: of its file, which the folder is named after where the config names none.
    """
    stem = os.path.splitext(os.path.basename(path))[0]
    output = os.path.expanduser(config.output or os.path.join("runs", stem))
    config = config.model_copy(update={"output": output})
    if isinstance(config, ControlConfig):
        return config, []
    found: list[tuple[Key, str]] = []

    def resolved(section: Any, key: Key, **resolvers: Callable[[str], tuple[str, str | None]]) -> Any:
        changes = {}
        for name, resolve in resolvers.items():
            given = getattr(section, name, None)
            if given is not None:
                changes[name], problem = resolve(given)
                found.extend([((*key, name), problem)] if problem else [])
        return section.model_copy(update=changes)

    sections: dict[str, Any] = {"model": resolved(config.model, ("model",), path=_base_path, adapter=_adapter_path)}
    if isinstance(config, LanguageConfig):
        sections |= {
            "prompts": resolved(config.prompts, ("prompts",), path=_data_path, heldout=_data_path),
            "critic": resolved(config.critic, ("critic",), path=_model_path),
            "rewards": [
                resolved(reward, ("rewards", str(index)), path=_model_path, embedder=_model_path, ratings=_data_path)
                for index, reward in enumerate(config.rewards)
            ],
        }
    else:
        sections["data"] = resolved(config.data, ("data",), path=_data_path, heldout=_data_path)
    return config.model_copy(update=sections), found


def _model_path(path: str) -> tuple[str, str | None]:
    """A local folder as an absolute path, a name of ours or a hub id as it is; and what is wrong with it."""
    local = os.path.expanduser(path)
    if path == SMOLLM2:
        return path, None
    if os.path.isdir(local):
        return os.path.abspath(local), _model_inside(path)
    if os.path.exists(local):
        return path, f"expected a model's folder, got a file: {plain(path)}"
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return os.path.abspath(local), no_such("folder", path)
    if not _HUB_ID.fullmatch(path):
        return path, f"expected {SMOLLM2}, a folder or a hub id, got {shown(path)}"
    # A slip is told before the hub is asked, which takes most of a minute where there is none.
    if "/" not in path and difflib.get_close_matches(path.lower(), [SMOLLM2], cutoff=0.75):
        return path, f"no model {shown(path)} here; did you mean {SMOLLM2}? (a hub id is written owner/name)"
    return path, None


def _model_inside(path: str) -> str | None:
    """What is wrong with a folder that holds no model where a folder inside it does, as in that of a run."""
    if _holds(path, *_MODEL_FILES):
        return None
    inside = [os.path.join(path, name) for name in ("adapter", "model")]
    found = next((folder for folder in inside if _holds(folder, *_MODEL_FILES)), None)
    return found and f"no model in {plain(path)}; did you mean {plain(found)}?"


def _base_path(path: str) -> tuple[str, str | None]:
    """As `_model_path`, of a whole model."""
    found, problem = _model_path(path)
    for folder in (path, os.path.join(path, "adapter")):
        if _holds(folder, "adapter_config.json") and not _holds(path, "config.json"):
            problem = (
                f"{plain(folder)} is an adapter and no whole model; give its base, and it as model.adapter of a run"
            )
    return found, problem


def _holds(folder: str, *names: str) -> bool:
    return any(os.path.isfile(os.path.join(os.path.expanduser(folder), name)) for name in names)


def _adapter_path(path: str) -> tuple[str, str | None]:
    folder = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(folder):
        return folder, no_such("folder", path)
    if _holds(folder, "adapter_config.json"):
        return folder, None
    inside = os.path.join(path, "adapter")
    hint = f"; did you mean {plain(inside)}?" if _holds(inside, "adapter_config.json") else ""
    return folder, f"no adapter_config.json in {plain(path)}{hint}"


def _data_path(path: str) -> tuple[str, str | None]:
    """A local file or dataset folder as an absolute path, a hub id as it is; and what is wrong with it."""
    local = os.path.abspath(os.path.expanduser(path))
    if os.path.exists(local):
        return local, None
    problem = no_such("file", path)
    is_hub_id = _HUB_ID.fullmatch(path) and path[0] != "." and not os.path.splitext(path)[1][1:2].isalpha()
    if is_hub_id and "did you mean" not in problem:
        return path, None
    return local, problem


def no_such(what: str, path: str) -> str:
    """`no such file: X`, with the nearest name in the same folder where there is one."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        names = os.listdir(os.path.expanduser(folder) or ".")
    except (OSError, ValueError):
        names = []
    near = [other for other in names if name and os.path.splitext(other)[0] == name]
    near += difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    hint = f"; did you mean {plain(os.path.join(folder, near[0]))}?" if near else ""
    return f"no such {what}: {plain(path)}{hint}"

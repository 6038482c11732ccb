"""Environments by gymnasium id or by dotted path, made and refused by name before a run starts."""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable, Collection
from typing import Any

import gymnasium

from lm_trust.control.evaluation import Remembering
from lm_trust.control.pool import make_pool
from lm_trust.control.processes import EnvironmentProcesses
from lm_trust.control.vector import Environments
from lm_trust.control.vector_env import VectorEnvironments
from lm_trust.core.processes import RowRange
from lm_trust.errors import UserError, did_you_mean, first_line, in_line
from lm_trust.user_code import import_user_module, working_directory_importable


@working_directory_importable()
def make_environments(
    id: str,
    count: int,
    *,
    seed: int,
    arguments: dict[str, Any] | None = None,
    processes: int = 1,
    remember: int = 0,
    backend: str = "gymnasium",
    placed: RowRange | None = None,
) -> Environments | EnvironmentProcesses | VectorEnvironments:
    """`count` copies of an environment.

    Args:
        id: a gymnasium id, or "module:factory", a callable that returns a new `gymnasium.Env` (a class will
            do). Modules are looked for in the working directory too.
        count: how many copies.
        seed: of which every episode's seed is a function; evaluation takes another than training.
        arguments: keyword arguments of the environment or factory.
        processes: that play them, this one among them; the results are the same. Those of more than one play rollouts
            and do nothing else.
        remember: how many of them, from the first, are `Remembering`: their last episode can be shown.
        backend: "gymnasium", or "envpool" for training: see `lm_trust.control.pool`.
        placed: where they stand among the environments of a run that is spread over processes; None: they are all.

    Raises:
        UserError: no such environment (it names the nearest), a missing package, or unsupported spaces.
    """
    if backend == "envpool":
        return _pooled(id, count, seed, arguments or {}, placed)
    make = _maker(id)
    envs = []
    try:
        for number in range(count):
            env = _made(id, make, arguments or {})
            envs.append(Remembering(env) if number < remember else env)
        if processes == 1:
            return Environments(id, envs, seed=seed, placed=placed)
        return EnvironmentProcesses(id, envs, seed=seed, processes=processes, placed=placed)
    except BaseException:
        for env in envs:
            env.close()
        raise


@working_directory_importable()
def make_environment(id: str, *, arguments: dict[str, Any] | None = None, render_mode: str) -> gymnasium.Env:
    """One environment that can be looked at.

    Args:
        id: as of `make_environments`.
        arguments: likewise; the render mode is given as one more.
        render_mode: "rgb_array" or "human".

    Raises:
        UserError: as `make_environments`; or it does not know the mode.
    """
    try:
        env = _made(id, _maker(id), {**(arguments or {}), "render_mode": render_mode})
    except UserError as error:
        if not _is_of_arguments(error, ["render_mode"]):
            raise
        raise UserError(f"environment {id} does not take a render_mode") from error
    if env.render_mode != render_mode:
        env.close()
        raise UserError(f"environment {id} has no render mode {render_mode!r}")
    return env


def _pooled(id: str, count: int, seed: int, arguments: dict[str, Any], placed: RowRange | None) -> VectorEnvironments:
    if ":" in id:
        raise UserError(f"environment.backend: envpool has no environment 'module:factory' ({id}); use gymnasium")
    # Evaluation makes the same environment by gymnasium: what that would refuse is refused now.
    _made(id, _maker(id), arguments).close()
    return make_pool(id, count, seed=seed, arguments=arguments, placed=placed)


def _made(id: str, make: Callable[..., gymnasium.Env], arguments: dict[str, Any]) -> gymnasium.Env:
    try:
        env = make(**arguments)
    except TypeError as error:
        if not _is_of_arguments(error, arguments):  # but of the factory's own code
            raise
        raise UserError(f"environment.arguments: {id} does not take {arguments}: {error}") from error
    except (AttributeError, ImportError, RuntimeError) as error:
        if not _raised_in_mujoco(error):
            raise
        raise UserError(
            f"environment {id}: MuJoCo does not load with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} "
            f"({in_line(error)}); unset it, or set it to egl or osmesa and install that library "
            "(Debian: libegl1, libosmesa6)"
        ) from error
    if not isinstance(env, gymnasium.Env):
        raise UserError(f"environment.id: {id} returned {type(env).__name__}, not a gymnasium.Env")
    return env


def _is_of_arguments(error: Exception, names: Collection[str]) -> bool:
    """Whether a call with keyword arguments of these names failed because one is not taken, by its message."""
    text = str(error)
    return bool(names) and (
        text.endswith("() takes no arguments") or any(f"argument {name!r}" in text for name in names)
    )


def _raised_in_mujoco(error: BaseException) -> bool:
    """Importing it loads what MUJOCO_GL names, looked at or not, and fails in a way of each library's own."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("mujoco.") for frame, _ in frames)


def _maker(id: str) -> Callable[..., gymnasium.Env]:
    """The function that makes one copy."""
    module_name, colon, attribute = id.partition(":")
    if colon:
        module = _import(id, module_name)
        if callable(getattr(module, attribute, None)):
            return getattr(module, attribute)
        # Gymnasium has a "module:id" of its own: importing the module registers the id.
        if attribute not in gymnasium.registry:
            near = did_you_mean(attribute, [name for name, value in vars(module).items() if callable(value)])
            raise UserError(f"environment.id: {module_name} has no factory {attribute!r}{near}")
        id = attribute
    if id not in gymnasium.registry:
        hint = did_you_mean(id, gymnasium.registry) or " (your own is written 'module:factory')"
        raise UserError(f"environment.id: no environment {id!r}{hint}")
    return lambda **arguments: _make_registered(id, arguments)


def _make_registered(id: str, arguments: dict[str, Any]) -> gymnasium.Env:
    try:
        # The passive checker is for those who write environments, at a cost in every step.
        return gymnasium.make(id, disable_env_checker=True, **arguments)
    except (gymnasium.error.Error, ImportError) as error:
        text = first_line(error)
        if "mujoco" in text.lower() and importlib.util.find_spec("mujoco") is None:
            raise UserError(f"environment {id} needs MuJoCo: pip install 'lm-trust[mujoco]'") from error
        raise UserError(f"environment {id}: {text}") from error
    except TypeError as error:
        if not arguments:
            raise
        raise UserError(f"environment.arguments: {id} does not take {arguments}: {error}") from error
    except Exception as error:
        if not arguments.keys() - {"render_mode"} or _raised_in_mujoco(error):
            raise
        text = in_line(f"{type(error).__name__}: {error}")
        raise UserError(f"environment.arguments: {id} cannot be made with {arguments}: {text}") from error


def _import(id: str, module_name: str) -> Any:
    try:
        return import_user_module(module_name)
    except (Exception, SystemExit) as error:
        text = in_line(f"{type(error).__name__}: {error}")
        raise UserError(
            f"environment.id: importing {module_name!r} of {id!r} raised {text}; modules are looked for in "
            "the working directory and among the installed packages"
        ) from error

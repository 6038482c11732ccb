"""Evaluation episodes to look at: films in MP4, or a window.

What is shown is an episode that was evaluated, played again: reset with its seed, and given its actions, in an
environment made for looking at. So showing cannot change what is measured, and one film at a time is enough.
An environment that does not repeat itself is noticed, and a film of another episode is not kept.

Frames go to ffmpeg one by one. `gymnasium.wrappers.RecordVideo` keeps an episode's frames in memory
(0.7 GB for 1,000 steps of MuJoCo) and reads them back by time in seconds, which at 20 frames a second shows some
twice and others not at all.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np

from lm_trust.control.environments import make_environment
from lm_trust.control.evaluation import Episode
from lm_trust.errors import UserError, in_line
from lm_trust.user_code import working_directory_importable

_EXTRA = "pip install 'lm-trust[video]'"
_NO_DISPLAY = "--render: this machine has no display that opens (DISPLAY); use --videos N to film episodes instead"


class _StrayedError(Exception):
    """The episode went another way than when it was evaluated."""


@working_directory_importable()
def check_films(id: str, arguments: dict[str, Any]) -> None:
    """Find out, before a run, whether its environment can be filmed here: a frame is drawn and thrown away.

    Args:
        id, arguments: of the environment, as for `make_environments`.

    Raises:
        UserError: it cannot; names what is missing.
    """
    _ffmpeg()
    _open_camera(id, arguments)[0].close()


@working_directory_importable()
def film(id: str, arguments: dict[str, Any], episodes: Sequence[Episode], folder: Path, name: str) -> None:
    """Write folder/NAME-episode-K.mp4 of every episode, K from 0: a frame after the reset and one after each step.

    Films of that name from before are removed. An episode that goes another way when it is played again is
    warned about and has no film.

    Raises:
        UserError: a film cannot be made or written.
    """
    ffmpeg = _ffmpeg()
    env, size = _open_camera(id, arguments)
    fps = env.metadata.get("render_fps", 30)
    try:
        with closing(env):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(f"{name}-episode-*.mp4"):
                old.unlink()
            for number, episode in enumerate(episodes):
                path = folder / f"{name}-episode-{number}.mp4"
                unfinished = path.with_name(f".{path.name}")
                try:
                    # macro_block_size 2: the picture's own size, which H.264 wants even.
                    film = ffmpeg.write_frames(str(unfinished), size, fps=fps, codec="libx264", macro_block_size=2)
                    _encode(_frames(id, env, episode, size), film)
                    _require_whole(ffmpeg, unfinished, len(episode.actions) + 1)
                    os.replace(unfinished, path)
                except _StrayedError:
                    _warn(id, f"{path} is not made")
                finally:
                    unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"videos: {folder} could not be written ({in_line(error)})") from error


@working_directory_importable()
def open_window(id: str, arguments: dict[str, Any]) -> gymnasium.Env:
    """An environment that shows itself in a window, for `show`; the caller closes it.

    Raises:
        UserError: it has no window to show, or the machine has no display.
    """
    if not (_has_display() or os.environ.get("SDL_VIDEODRIVER")):
        raise UserError(_NO_DISPLAY)
    try:
        env = make_environment(id, arguments=arguments, render_mode="human")
    except UserError as error:
        raise UserError(f"--render: {error}; use --videos N to film episodes instead") from error
    try:
        if _is_mujoco(env) and not _glfw_starts():  # its window would abort the whole process
            raise UserError(_NO_DISPLAY)
        with _telling(f"--render: environment {id} cannot be shown in a window"):
            env.reset(seed=0)
        if _pygame_draws_nowhere():
            raise UserError(_NO_DISPLAY)
        return env
    except BaseException:
        env.close()
        raise


@working_directory_importable()
def show(id: str, env: gymnasium.Env, episode: Episode) -> None:
    """Play the episode in the window of `open_window`; warns where it goes another way than it had gone."""
    try:
        for _ in _again(env, episode):
            pass
    except _StrayedError:
        _warn(id, "the window shows another one")


def _again(env: gymnasium.Env, episode: Episode) -> Iterator[None]:
    """Play an episode again; pauses after the reset and after each step, for whoever wants a frame."""
    env.reset(seed=episode.seed)
    yield
    total = 0.0
    for step, action in enumerate(episode.actions, start=1):
        observation, reward, terminated, truncated, _ = env.step(copy(action))
        yield
        total += float(reward)
        if bool(terminated or truncated) != (step == len(episode.actions)):
            raise _StrayedError
    if total != episode.total or not np.array_equal(observation, episode.final):
        raise _StrayedError


def _frames(id: str, env: gymnasium.Env, episode: Episode, size: tuple[int, int]) -> Iterator[np.ndarray]:
    with _telling(f"environment {id} cannot be filmed"):
        for _ in _again(env, episode):
            frame = _frame(env)
            if frame.shape[1::-1] != size:
                raise UserError(f"its frames change in size, from {size} to {frame.shape[1::-1]}")
            yield frame


def _encode(frames: Iterator[np.ndarray], film: Generator[None, np.ndarray | None, None]) -> None:
    with closing(film):
        film.send(None)
        for frame in frames:
            film.send(np.ascontiguousarray(frame))


def _require_whole(ffmpeg: ModuleType, path: Path, frames: int) -> None:
    """ffmpeg may fail after it has taken the last frame, and nobody looks at its status."""
    try:
        written, _ = ffmpeg.count_frames_and_secs(str(path))
    except (AssertionError, RuntimeError) as error:
        raise OSError(f"ffmpeg left no film at {path.name}") from error
    if written != frames:
        raise OSError(f"ffmpeg left {written} of {frames} frames at {path.name}")


def _frame(env: gymnasium.Env) -> np.ndarray:
    """(H, W, 3) uint8."""
    frame = env.render()
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3):
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise UserError(f"render() must give uint8 (height, width, 3) in the mode rgb_array, not {got}")
    return frame


def _open_camera(id: str, arguments: dict[str, Any]) -> tuple[gymnasium.Env, tuple[int, int]]:
    """An environment that has drawn a frame, and the frame's width and height."""
    env = make_environment(id, arguments=arguments, render_mode="rgb_array")
    try:
        if _is_mujoco(env):
            _choose_mujoco_backend(id)
        with _telling(f"environment {id} cannot be filmed"), _pygame_off_screen():
            env.reset(seed=0)
            return env, _frame(env).shape[1::-1]
    except BaseException:
        env.close()
        raise


def _ffmpeg() -> ModuleType:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:  # RuntimeError: no ffmpeg
        raise UserError(f"videos: films need imageio-ffmpeg ({in_line(error)}): {_EXTRA}") from error
    return imageio_ffmpeg


def _choose_mujoco_backend(id: str) -> None:
    """Where nobody has chosen and there is no display, EGL: gymnasium would take glfw, and fail."""
    if os.environ.get("MUJOCO_GL") or _has_display():
        return
    try:
        import mujoco.egl  # noqa: F401
    except Exception as error:  # whatever the libraries below it raise
        raise UserError(
            f"environment {id} cannot be filmed: there is no display and EGL does not load ({in_line(error)}); install "
            "it (Debian: apt install libegl1 libgl1), or libosmesa6 and set MUJOCO_GL=osmesa"
        ) from error
    os.environ["MUJOCO_GL"] = "egl"


def _has_display() -> bool:
    """Other systems than Linux have no such variables, and a display."""
    variables = ("DISPLAY", "WAYLAND_DISPLAY")
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in variables)


def _is_mujoco(env: gymnasium.Env) -> bool:
    return hasattr(env.unwrapped, "mujoco_renderer")


def _glfw_starts() -> bool:
    import glfw

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(glfw.init())


@contextmanager
def _pygame_off_screen() -> Iterator[None]:
    """A film needs no display; without this SDL looks for one, and complains on stderr where there is none."""
    if _has_display() or os.environ.get("SDL_VIDEODRIVER"):
        yield
        return
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    try:
        yield
    finally:
        del os.environ["SDL_VIDEODRIVER"]


def _pygame_draws_nowhere() -> bool:
    """SDL falls back to a picture in memory where no display opens."""
    pygame = sys.modules.get("pygame")
    if pygame is None or not pygame.display.get_init() or os.environ.get("SDL_VIDEODRIVER"):
        return False
    return pygame.display.get_driver() in ("offscreen", "dummy")


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Whatever drawing raises, as one line; a missing package with the extra that brings it."""
    try:
        yield
    except _StrayedError:
        raise
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        missing = in_line(error).split(", run `pip")[0]  # gymnasium names its own extra
        # What else the environment's own code imports the extra does not bring.
        foreign = isinstance(error, ImportError) and error.name != "pygame"
        raise UserError(f"{what}: {missing}" if foreign else f"{what}: {missing}: {_EXTRA}") from error
    except Exception as error:
        given = os.environ.get("MUJOCO_GL")
        hint = f" (MUJOCO_GL is {given}; without a display, egl and osmesa draw)" if given else ""
        raise UserError(f"{what}: {type(error).__name__}: {in_line(error)}{hint}") from error


def _warn(environment: str, consequence: str) -> None:
    warnings.warn(
        f"{environment} is not deterministic given its seed: an evaluation episode went another way when it was "
        f"played again, so {consequence}",
        stacklevel=4,
    )

"""Films and windows: they show the very episodes that were evaluated, and change nothing by it."""

import json
import os
import sys
import warnings
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch

from lm_trust.cli import main
from lm_trust.control import ControlTask, make_environments, video
from lm_trust.control.evaluation import Episode
from lm_trust.core import Categorical
from lm_trust.errors import UserError
from lm_trust.training.config_yaml import write_yaml

# A walk whose picture is its position: the left half as bright as x, the right half as the steps so far. It draws
# into one canvas all its life, as game libraries do.
WORLDS = """
import gymnasium
import numpy as np

shown = []          # positions, by every copy that was made for a window
played = {}         # positions of each episode, by its seed, in copies that nobody looks at
clock = iter(range(10**9))


class Walk(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 20}
    observation_space = gymnasium.spaces.Box(-99, 99, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.canvas = np.zeros((32, 48, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.time, self.x = seed, 0, 2 * self.np_random.normal()
        return self._seen()

    def step(self, action):
        self.x = self.x + (2 * action - 1) + self.np_random.normal()
        self.time += 1
        return self._seen()[0], -abs(self.x), abs(self.x) > 9, self.time >= 61, {}

    def _seen(self):
        if self.render_mode is None:
            played.setdefault(self.seed, {})[self.time] = self.x
        if self.render_mode == "human":
            shown.append(self.x)
        return np.array([self.x], np.float32), {}

    def render(self):
        self.canvas[:, :24] = level(self.x)
        self.canvas[:, 24:] = 4 * self.time
        return self.canvas


def level(x):
    return int(np.clip(128 + 10 * x, 0, 255))


class Clumsy(Walk):
    "Its picture takes a number from the generator that moves it."
    def render(self):
        self.np_random.normal()
        return super().render()


class Forgetful(Walk):
    "Starts anywhere, whatever its seed."
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0.01 * next(clock)
        return self._seen()


class Unseen(Walk):
    def __init__(self):
        super().__init__()


class Filmed(Walk):
    metadata = {"render_modes": ["rgb_array"]}
    def __init__(self, render_mode=None):
        super().__init__("rgb_array" if render_mode else None)


class Grey(Walk):
    def render(self):
        return super().render()[:, :, 0]


class Growing(Walk):
    def render(self):
        return np.zeros((32 + 2 * self.time, 48, 3), np.uint8)
"""
CONFIG = {
    "total_steps": 4 * 2 * 32,
    "environment": {"id": "filmed_worlds:Walk", "count": 2},
    "policy": {"hidden": [8]},
    "rollout": {"steps": 32},
    "normalise": {"observations": True},
    "critic": {"kind": "mlp", "hidden": [8], "epochs": 1, "minibatches": 2},
    "evaluation": {"every": 2, "count": 3},
    "trackers": [],
}


class Homeward(torch.nn.Module):
    """Steps towards 0."""

    def distribution(self, observations):
        right = (observations[:, 0] < 0).float()
        return Categorical(torch.stack([-right, right], -1))


@pytest.fixture
def worlds(tmp_path, monkeypatch):
    """A working directory with the module of worlds, which it returns; nothing is chosen and there is no display."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "MUJOCO_GL"):
        monkeypatch.setenv(name, "")  # so that what the code under test sets is taken back
        monkeypatch.delenv(name)
    (tmp_path / "filmed_worlds.py").write_text(WORLDS)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("filmed_worlds")
    sys.modules.pop("filmed_worlds", None)


def evaluated(id, count=3, remember=3, seed=5):
    """The numbers of an evaluation and what was remembered of it."""
    task = ControlTask(
        make_environments(id, 1, seed=0),
        steps=1,
        gamma=0.9,
        seed=0,
        evaluation_environments=lambda count: make_environments(id, count, seed=seed, remember=remember),
    )
    numbers = task.evaluate(Homeward(), count)
    return numbers, task.remembered()


def pictures(path):
    """(N, H, W) brightness of every frame of a film."""
    frames = pytest.importorskip("imageio_ffmpeg").read_frames(str(path))
    width, height = next(frames)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3).mean(-1) for frame in frames])


def configure(folder, **sections):
    path = folder / "walk.yaml"
    path.write_text(write_yaml(CONFIG | sections))
    return str(path)


def untimed(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def names(folder, within="videos"):
    return sorted(path.name for path in (folder / within).iterdir())


def test_what_was_played_is_remembered_and_the_numbers_stay(worlds):
    numbers, episodes = evaluated("filmed_worlds:Walk", remember=2)
    plain, none = evaluated("filmed_worlds:Walk", remember=0)
    assert plain == numbers and none == [] and len(episodes) == 2
    rewards = [sum(-abs(x) for time, x in worlds.played[one.seed].items() if time) for one in episodes]
    assert [one.total for one in episodes] == pytest.approx(rewards)
    assert [len(one.actions) for one in episodes] == [max(worlds.played[one.seed]) for one in episodes]
    everyone = evaluated("filmed_worlds:Walk")
    assert np.mean([one.total for one in everyone[1]]) == pytest.approx(numbers["reward_mean"])


def test_a_film_shows_every_moment_of_the_evaluated_episode_once(worlds, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    _, episodes = evaluated("filmed_worlds:Walk")
    video.film("filmed_worlds:Walk", {}, episodes, tmp_path / "films", "night")
    assert names(tmp_path, "films") == [f"night-episode-{number}.mp4" for number in range(3)]
    for number, episode in enumerate(episodes):
        frames = pictures(tmp_path / "films" / f"night-episode-{number}.mp4")
        lived = worlds.played[episode.seed]
        assert frames.shape == (len(episode.actions) + 1, 32, 48)
        steps, places = frames[:, 8:24, 32:40].mean((1, 2)), frames[:, 8:24, 8:16].mean((1, 2))
        # The encoder loses a little; neighbours in time are four levels apart.
        np.testing.assert_allclose(steps, 4 * np.arange(len(frames)), atol=1.9)
        np.testing.assert_allclose(places, [worlds.level(lived[time]) for time in range(len(frames))], atol=3)
    assert (
        max(len(episode.actions) for episode in episodes) > 45
    )  # at 20 frames a second, some encoders' clips lose the 44th


def test_films_change_no_number_of_a_training(worlds, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    runs = {videos: tmp_path / f"with{videos}" for videos in (0, 2)}
    for videos, run in runs.items():
        options = ["--evaluation.videos", str(videos), "--output", str(run)]
        assert main(["train", configure(tmp_path), *options]) == 0
    plain, filmed = runs.values()
    assert untimed(plain) == untimed(filmed)
    for name in ("policy.safetensors", "evaluation.json", "evaluations.jsonl"):
        assert (plain / name).read_bytes() == (filmed / name).read_bytes()
    assert not (plain / "videos").exists()
    assert names(filmed) == [f"iteration-{at:08d}-episode-{k}.mp4" for at in (2, 4) for k in (0, 1)]
    frames = pictures(filmed / "videos" / "iteration-00000004-episode-1.mp4")
    assert np.abs(np.diff(frames, axis=0)).max() > 3

    # A second look, at fewer: the films of another evaluation stay, those of the same name go.
    for videos in (3, 1):
        assert main(["evaluate", str(filmed), "--videos", str(videos)]) == 0
        evaluations = [name for name in names(filmed) if name.startswith("evaluation")]
        assert evaluations == [f"evaluation-episode-{number}.mp4" for number in range(videos)]
    assert len(names(filmed)) == 5


@pytest.mark.parametrize("kind", ["Clumsy", "Forgetful"])
def test_a_film_of_another_episode_is_not_kept(worlds, tmp_path, kind):
    pytest.importorskip("imageio_ffmpeg")
    numbers, episodes = evaluated(f"filmed_worlds:{kind}")
    if kind == "Clumsy":  # its pictures disturb it, and that is no matter to the evaluation
        assert numbers == evaluated("filmed_worlds:Walk", remember=0)[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        video.film(f"filmed_worlds:{kind}", {}, episodes, tmp_path / "films", "night")
    told = [str(warning.message) for warning in said if "deterministic" in str(warning.message)]
    assert len(told) == 3 and told[2].startswith(f"filmed_worlds:{kind} is not deterministic given its seed")
    assert told[2].endswith("night-episode-2.mp4 is not made")
    assert names(tmp_path, "films") == []


def played(env, seed, actions):
    env.reset(seed=seed)
    steps = [env.step(action) for action in actions]
    return Episode(seed, actions, sum((float(reward) for _, reward, *_ in steps), 0.0), steps[-1][0])


def test_an_episode_that_ends_elsewhere_strays(worlds):
    _, [episode] = evaluated("filmed_worlds:Walk", count=1)
    env = worlds.Walk("rgb_array")
    list(video._again(env, episode))
    # As many rewards and the same place, but cut before the environment's end, or gone on after it.
    shorter = played(env, episode.seed, episode.actions[:-1])
    longer = played(env, episode.seed, [*episode.actions, 0])
    assert played(env, episode.seed, episode.actions).total == episode.total
    elsewhere = Episode(episode.seed, episode.actions, episode.total, episode.final + 1)
    dearer = Episode(episode.seed, episode.actions, episode.total + 1, episode.final)
    for other in (shorter, longer, elsewhere, dearer):
        with pytest.raises(video._StrayedError):
            list(video._again(env, other))


def test_a_window_plays_the_evaluated_episodes_in_turn(worlds, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert main(["train", configure(tmp_path, total_steps=64), "--output", str(run)]) == 0
    assert main(["evaluate", str(run), "--render"]) == 2
    assert "no display that opens (DISPLAY); use --videos N" in capsys.readouterr().err
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    worlds.played.clear()
    assert main(["evaluate", str(run), "--render", "--count", "2"]) == 0
    assert not (run / "videos").exists()
    text = capsys.readouterr().out
    # Once for the window to open before the evaluation, and once again to play; then the two episodes.
    seeds = [seed for seed, lived in worlds.played.items() if len(lived) > 1]
    episodes = [[lived[time] for time in sorted(lived)] for lived in (worlds.played[seed] for seed in seeds)]
    evaluation = episodes[-2:]
    assert worlds.shown[2:] == [x for lived in evaluation for x in lived]
    for number, lived in enumerate(evaluation):
        assert f"episode {number}: return {-sum(map(abs, lived[1:])):.6g}, {len(lived) - 1} steps" in text


def test_films_and_a_window_at_once(worlds, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    run = tmp_path / "run"
    assert main(["train", configure(tmp_path, total_steps=64), "--output", str(run)]) == 0
    assert main(["evaluate", str(run), "--render", "--videos", "1"]) == 0
    assert names(run) == ["evaluation-episode-0.mp4"] and len(worlds.shown) > 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Unseen", "environment filmed_worlds:Unseen does not take a render_mode"),
        ("Filmed", "environment filmed_worlds:Filmed has no render mode 'human'"),
    ],
)
def test_an_environment_without_a_window_is_refused(worlds, monkeypatch, kind, message):
    monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(UserError, match=f"--render: {message}; use --videos N"):
        video.open_window(f"filmed_worlds:{kind}", {})


def test_what_cannot_be_filmed_is_refused_before_training(worlds, tmp_path, capsys):
    pytest.importorskip("imageio_ffmpeg")
    for kind, message in (
        ("Unseen", "environment filmed_worlds:Unseen does not take a render_mode"),
        ("Grey", r"Grey cannot be filmed: render() must give uint8 (height, width, 3) in the mode rgb_array"),
    ):
        config = configure(tmp_path, environment={"id": f"filmed_worlds:{kind}", "count": 2})
        run = tmp_path / kind
        assert main(["train", config, "--evaluation.videos", "1", "--output", str(run)]) == 2
        assert message in capsys.readouterr().err
        assert not (run / "metrics.jsonl").exists()
        assert main(["train", config, "--output", str(run), "--total_steps", "64"]) == 0
        assert main(["evaluate", str(run), "--videos", "1"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["imageio_ffmpeg", "pygame"])
def test_a_missing_package_is_named_with_its_extra_before_training(worlds, tmp_path, monkeypatch, capsys, missing):
    if missing == "pygame":
        pytest.importorskip("imageio_ffmpeg")
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    run = tmp_path / "run"
    config = configure(tmp_path, environment={"id": "CartPole-v1", "count": 2})
    assert main(["train", config, "--evaluation.videos", "1", "--output", str(run)]) == 2
    error = capsys.readouterr().err
    assert missing.replace("_", "-") in error and error.rstrip().endswith(": pip install 'lm-trust[video]'")
    assert error.count("\n") == error.count("pip install") == 1
    assert not (run / "metrics.jsonl").exists()


def test_more_films_than_episodes_and_language_runs_are_refused(worlds, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", configure(tmp_path, total_steps=64), "--output", str(run)]) == 0
    assert main(["evaluate", str(run), "--videos", "4"]) == 2
    assert "--videos: 4 is more than the 3 episodes" in capsys.readouterr().err

    language = tmp_path / "language"
    language.mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    sections = {"model": {"path": "none"}, "prompts": {"path": "prompts.jsonl"}, "rewards": [{"name": "vader"}]}
    (language / "config.yaml").write_text(write_yaml({"iterations": 1, **sections}))
    for options in (["--render"], ["--videos", "1"]):
        assert main(["evaluate", str(language), *options]) == 2
        assert f"{options[0]}: {language} is a language run" in capsys.readouterr().err


def test_films_that_cannot_be_written_are_one_clear_error(worlds, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    _, episodes = evaluated("filmed_worlds:Growing")
    with pytest.raises(UserError, match=r"Growing cannot be filmed: its frames change in size, from \(48, 32\)"):
        video.film("filmed_worlds:Growing", {}, episodes, tmp_path / "films", "night")
    assert names(tmp_path, "films") == []

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"videos: .*file could not be written"):
        video.film("filmed_worlds:Walk", {}, episodes, tmp_path / "file", "night")

    # An encoder that takes every frame and fails at the end, as on a disk that is full.
    encode = video._encode

    def failing(left):
        def encoded(frames, film):
            encode(frames, film)
            for unfinished in (tmp_path / "films").glob(".*.mp4"):
                unfinished.write_bytes(unfinished.read_bytes()[:left])

        return encoded

    monkeypatch.setattr(video, "_encode", failing(100))
    _, episodes = evaluated("filmed_worlds:Walk")
    with pytest.raises(UserError, match=r"films could not be written .ffmpeg left "):
        video.film("filmed_worlds:Walk", {}, episodes, tmp_path / "films", "night")


def test_without_a_display_mujoco_draws_by_egl_unless_told_otherwise(worlds, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "mujoco", ModuleType("mujoco"))
    monkeypatch.setitem(sys.modules, "mujoco.egl", None)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    video._choose_mujoco_backend("Ant-v5")
    assert os.environ.pop("MUJOCO_GL") == "osmesa"
    with pytest.raises(UserError, match=r"Ant-v5 cannot be filmed: .* EGL does not load .* set MUJOCO_GL=osmesa"):
        video._choose_mujoco_backend("Ant-v5")
    monkeypatch.setenv("DISPLAY", ":0")
    video._choose_mujoco_backend("Ant-v5")
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setitem(sys.modules, "mujoco.egl", ModuleType("mujoco.egl"))
    video._choose_mujoco_backend("Ant-v5")
    assert os.environ["MUJOCO_GL"] == "egl"


def test_cartpole_is_filmed_without_a_display(worlds, tmp_path, capfd):
    pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("pygame")
    _, episodes = evaluated("CartPole-v1", count=2, remember=1)
    video.film("CartPole-v1", {}, episodes, tmp_path, "pole")
    frames = pictures(tmp_path / "pole-episode-0.mp4")
    assert frames.shape == (len(episodes[0].actions) + 1, 400, 600)
    assert np.abs(frames[-1] - frames[0]).max() > 100  # the pole has moved
    assert "SDL_VIDEODRIVER" not in os.environ and "XDG" not in capfd.readouterr().err


@pytest.mark.slow  # one thread of software rendering takes a tenth of a second a frame
def test_mujoco_is_filmed_without_a_display(worlds, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("mujoco")
    try:
        import mujoco.egl  # noqa: F401
    except Exception:
        pytest.skip("EGL does not load here")
    (tmp_path / "short_cheetah.py").write_text(
        "import gymnasium\n\n"
        "def make(render_mode=None):\n"
        "    return gymnasium.make('HalfCheetah-v5', max_episode_steps=12, render_mode=render_mode)\n"
    )
    task = ControlTask(
        make_environments("short_cheetah:make", 1, seed=0),
        steps=1,
        gamma=0.9,
        seed=0,
        evaluation_environments=lambda count: make_environments("short_cheetah:make", count, seed=1, remember=1),
    )
    task.evaluate(Backflip(), 2)
    video.film("short_cheetah:make", {}, task.remembered(), tmp_path, "cheetah")
    frames = pictures(tmp_path / "cheetah-episode-0.mp4")
    assert frames.shape == (13, 480, 480)
    assert all(np.abs(after - before).max() > 30 for before, after in pairwise(frames))
    sys.modules.pop("short_cheetah")


class Backflip(torch.nn.Module):
    def distribution(self, observations):
        from lm_trust.core import DiagonalGaussian

        return DiagonalGaussian(torch.sin(observations[:, :6] * 7), torch.zeros(6))

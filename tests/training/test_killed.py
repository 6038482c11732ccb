"""Runs that are killed at any moment, or whose disk fills up, tell the same story in the end as one that never was."""

import json
import random
import subprocess
import time

import pytest
from killed_runs import CONTROL, finish, iterations, start, story, write_config
from tiny_runs import LANGUAGE, prepare

from lm_trust.errors import UserError
from lm_trust.training.checkpoint import holds_checkpoint, load_checkpoint

KILLED = -9
NOTED = {
    "evaluation": {"every": 1, "count": 2},
    "checkpoint": {"every": 1, "keep_last": 1},
    "completions": {"every": 2, "show": 0},
}


class Place:
    """A folder with a config and the run of it that nobody disturbs."""

    def __init__(self, folder, base, **sections):
        self.folder, self.numbers = folder, random.Random(0)
        self.config = write_config(folder, "run", base, **sections)
        finish(start(folder, "config", "control"))  # the server of the forks has started
        begun = time.monotonic()
        assert finish(start(folder, "train", self.config, "--output", folder / "whole", below=folder / "whole")) == 0
        self.seconds = time.monotonic() - begun
        self.changes = int((folder / "changes").read_text())
        self.whole = story(folder / "whole")

    def go(self, run, *options, **moment):
        """The run begun, or gone on with where it can be."""
        given = ["--resume", run] if (run / "config.yaml").exists() else [self.config, "--output", run]
        return start(self.folder, "train", *given, *options, below=run, **moment)

    def kill_at_change(self, run):
        return finish(self.go(run, at=self.numbers.randint(1, self.changes // 3)))

    def kill_after_a_while(self, run):
        process = self.go(run)
        process.join(self.seconds * self.numbers.uniform(0.3, 0.9))
        process.kill()
        return finish(process)

    def check_left(self, run):
        """What lies there after a kill: no gap, no line twice, and a checkpoint of no less than all but the last."""
        done = iterations(run)
        assert done == list(range(1, len(done) + 1))
        if holds_checkpoint(run / "checkpoints"):
            assert load_checkpoint(run / "checkpoints")["iteration"] in (len(done) - 1, len(done))
        else:
            assert len(done) <= 1

    def check_whole(self, run):
        assert finish(self.go(run)) == 0, (self.folder / "printed").read_text()
        assert story(run) == self.whole


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("control"), CONTROL)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    prepare(folder)
    return Place(folder, LANGUAGE, **NOTED)


@pytest.fixture(params=["control", "language"])
def world(request):
    return request.getfixturevalue(request.param)


# ---- killed


def test_a_run_that_is_killed_again_and_again(control):
    kills = 0
    for number in range(8):
        run = control.folder / f"again-{number}"
        while kills < 6 and control.kill_at_change(run) == KILLED:  # else it came to its end before
            kills += 1
            control.check_left(run)
        control.check_whole(run)
    assert kills == 6


def test_a_run_that_is_killed_at_any_time(control):
    run, size = control.folder / "any-time", 32
    for _ in range(4):
        done = len(iterations(run))
        process = control.go(run, "--total_steps", 10**9)
        while len(iterations(run)) <= done:
            assert process.is_alive(), (control.folder / "printed").read_text()
            time.sleep(0.01)
        time.sleep(control.numbers.uniform(0, 0.1))
        process.kill()
        assert finish(process) == KILLED
        control.check_left(run)
    length = ("--total_steps", (len(iterations(run)) + 1) * size)
    whole = control.folder / "any-time-whole"
    for one in (run, whole):
        assert finish(control.go(one, *length)) == 0
    assert story(run) == story(whole)


def test_a_kill_between_the_two_renames_of_a_checkpoint_made_again(control):
    """The only checkpoint stands aside for a moment where one of the same iteration is put into its place."""
    run = control.folder / "aside"
    # At the end the last checkpoint is written again by a resumed run: find its renames by stopping before each change.
    assert finish(control.go(run)) == 0
    aside = 0
    for at in range(1, control.changes):
        status = finish(control.go(run, at=at))
        aside += not [path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
        assert holds_checkpoint(run / "checkpoints")
        if status == 0 or aside == 1:
            break
    assert aside == 1
    assert load_checkpoint(run / "checkpoints")["iteration"] == 4
    control.check_whole(run)


@pytest.mark.slow
def test_a_kill_before_every_change_of_the_disk(world):
    for at in range(1, world.changes + 1):
        run = world.folder / f"change-{at}"
        assert finish(world.go(run, at=at)) == KILLED
        world.check_left(run)
        world.check_whole(run)


@pytest.mark.slow
def test_kills_at_many_moments(world):
    for number in range(30):
        run = world.folder / f"moments-{number}"
        for _ in range(world.numbers.randint(1, 4)):
            world.numbers.choice([Place.kill_at_change, Place.kill_after_a_while])(world, run)
            world.check_left(run)
        world.check_whole(run)


# ---- the disk


def errors(place):
    """What was printed of errors: one plain line each."""
    printed = (place.folder / "printed").read_text()
    assert "Traceback" not in printed, printed
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def a_disk_that_is_full_from(place, at):
    run = place.folder / f"full-{at}"
    if finish(place.go(run, at=at, do="full")) == 0:
        assert story(run) == place.whole  # all that was left to do was to remove something
        return
    (line,) = errors(place)
    assert "No space left on device" in line and str(run) in line
    place.check_left(run)
    place.check_whole(run)


def test_a_disk_that_fills_up(control):
    for at in sorted(control.numbers.sample(range(1, control.changes + 1), 5)):
        a_disk_that_is_full_from(control, at)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_many_moments(world):
    for at in range(1, world.changes + 1, 1 + world.changes // 60):
        a_disk_that_is_full_from(world, at)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_real_disk_that_fills_up(control, small_disk):
    run, ballast = small_disk / "run", small_disk / "ballast"
    ballast.write_bytes(bytes(300_000))
    assert finish(control.go(run)) == 2
    (line,) = errors(control)
    assert "No space left on device" in line
    control.check_left(run)
    ballast.unlink()
    control.check_whole(run)


@pytest.mark.parametrize(
    "name", ["checkpoints", "best", "config.yaml", "monitor.csv", "evaluations.jsonl", "policy.safetensors"]
)
def test_a_file_where_a_folder_should_be_and_the_other_way_round(control, name, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    if name in ("checkpoints", "best"):
        (run / name).write_text("in the way")
    else:
        (run / name / "in the way").mkdir(parents=True)
    assert finish(start(control.folder, "train", control.config, "--output", run)) == 2
    (line,) = errors(control)
    assert name in line


def test_a_disk_that_may_only_be_read(control, small_disk):
    run = small_disk / "run"
    assert finish(control.go(run)) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for given in (["--resume", run], [control.config, "--output", small_disk / "other"]):
        assert finish(start(control.folder, "train", *given)) == 2
        (line,) = errors(control)
        assert "Read-only file system" in line and str(small_disk) in line
    assert story(run) == control.whole


def test_a_clock_that_jumps(control, tmp_path, monkeypatch):
    """Nothing that counts depends on the time of day; this process runs it, so that the clock can be set."""
    from lm_trust.cli import main

    now, jumps = time.time, iter([0, 86_400, -86_400] * 10_000)
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    run = tmp_path / "run"
    assert main(["train", str(control.config), "--output", str(run)]) == 0
    told = story(run)
    assert told == control.whole
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert all(value >= 0 for key, value in json.loads(line).items() if key.endswith("_seconds"))


def test_a_line_of_metrics_that_is_no_record_is_named(control, tmp_path):
    run = tmp_path / "run"
    assert finish(start(control.folder, "train", control.config, "--output", run)) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "\0\0\n", *lines[2:]]))
    assert finish(start(control.folder, "train", "--resume", run)) == 2
    (line,) = errors(control)
    assert "metrics.jsonl, line 2: not a line that a run wrote" in line


def test_a_checkpoint_that_is_not_what_was_written_drives_out_no_other(tmp_path, monkeypatch):
    from lm_trust.training import checkpoint

    build = checkpoint.build_verified

    def spoilt(path, make):
        build(path, make)
        with (path / "state.json").open("r+b") as file:
            file.write(b"?")

    checkpoint.save_checkpoint(tmp_path, {"iteration": 1}, iteration=1, keep_last=1)
    monkeypatch.setattr(checkpoint, "build_verified", spoilt)
    with pytest.raises(UserError, match=r"00000002: .* not what was written \(the checksum of state.json"):
        checkpoint.save_checkpoint(tmp_path, {"iteration": 2}, iteration=2, keep_last=1)
    assert load_checkpoint(tmp_path)["iteration"] == 1

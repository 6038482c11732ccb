"""docs/determinism.md, where no other test holds it already: whole runs, and every byte that they leave behind."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import killed_runs
import pytest
import tiny_runs

import lm_trust
from lm_trust.cli import main
from lm_trust.training.config_yaml import write_yaml

WORLDS = {
    "language": tiny_runs.LANGUAGE | {"completions": {"every": 2, "show": 1}},
    "control": killed_runs.CONTROL,
}
RUNS = """
import sys
from lm_trust.cli import main
sys.exit(any([main(["train", f"{world}.yaml"]) for world in ("language", "control")]))
"""


def write(folder, name, world, **sections):
    (folder / f"{name}.yaml").write_text(write_yaml(WORLDS[world] | sections | {"output": name}))


def metrics(run):
    """What its metrics.jsonl says but for the time that it took."""
    return tiny_runs.untimed(tiny_runs.metrics(run))


def episodes(run):
    """Return and length of each episode of monitor.csv, the seconds and the time of the start left out."""
    with (run / "monitor.csv").open() as file:
        next(file)
        return [(row["r"], row["l"], row["steps"]) for row in csv.DictReader(file)]


def files(run):
    """Every file's bytes by its name, but for where the run lies: the configuration and the cards tell that."""
    place = bytes(run.parent.resolve())
    paths = sorted(path for path in run.rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes().replace(place, b"") for path in paths}


def policy(run):
    """The files of the trained policy, without the card and the curve that lie beside an adapter."""
    kept = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "policy.safetensors")
    return {name: content for name, content in files(run).items() if name in kept}


# ---- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Two folders with the runs of both worlds, each made by a process of its own that hashes texts in its own way."""
    places = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"process-{number}")
        tiny_runs.prepare(folder)
        for world in WORLDS:
            write(folder, world, world)
        # With these seeds a set of the LoRA targets stands in two orders.
        given = {"PYTHONPATH": str(Path(lm_trust.__file__).parent.parent), "PYTHONHASHSEED": "13"[number]}
        command = [sys.executable, "-c", RUNS]
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        places.append((folder, process))
    for _, process in places:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed.decode()
    return [folder for folder, _ in places]


@pytest.mark.parametrize("world", WORLDS)
def test_two_processes_leave_the_same_bytes(two_processes, world):
    one, other = (folder / world for folder in two_processes)
    assert len(metrics(one)) == 4 and all(line["accepted"] for line in metrics(one))
    assert metrics(one) == metrics(other)
    if world == "control":
        assert len(episodes(one)) > 2 and episodes(one) == episodes(other)
    left, others = files(one), files(other)
    assert {"config.yaml", "evaluation.json", "checkpoints/00000004/tensors.safetensors"} <= left.keys()
    assert left.keys() == others.keys()
    timed = {"metrics.jsonl", "monitor.csv"}  # and nothing else may hold a time
    assert [name for name in left if left[name] != others[name] and name not in timed] == []


# ---- what does not change the bits

WATCHING = {
    "trackers": ["tensorboard"],
    "evaluation": {"every": 1, "count": 3},
    "checkpoint": {"every": 1, "keep_last": 1},
}
SAME = {
    "language-watched": ("language", WATCHING | {"completions": {"every": 1, "show": 0}}),
    "language-reward-in-a-process": (
        "language",
        {"rewards": [{"name": "tiny_run_rewards:vowels", "process": True, "parallel": 2, "timeout": 60}]},
    ),
    "control-watched": ("control", WATCHING),
    "control-steps-in-processes": ("control", {"environment": {"id": "CartPole-v1", "count": 2, "processes": 2}}),
}


@pytest.mark.parametrize("case", SAME)
def test_the_bits_do_not_depend_on(case, two_processes, tmp_path, monkeypatch):
    """Nor on the process that trains: this one has run other tests, and hashes texts in yet another way."""
    world, sections = SAME[case]
    monkeypatch.chdir(tmp_path)
    tiny_runs.prepare(tmp_path)
    write(tmp_path, world, world, **sections)
    assert main(["train", f"{world}.yaml"]) == 0
    whole = two_processes[0] / world
    assert metrics(tmp_path / world) == metrics(whole)
    assert policy(tmp_path / world) == policy(whole)


@pytest.mark.parametrize("world", WORLDS)
def test_another_seed_is_another_run(world, two_processes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_runs.prepare(tmp_path)
    write(tmp_path, world, world, seed=1)
    assert main(["train", f"{world}.yaml"]) == 0
    assert policy(tmp_path / world) != policy(two_processes[0] / world)

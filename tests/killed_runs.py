"""Runs of the command line in processes of their own that are killed, or whose disk fails, at a chosen moment.

A moment is the n-th time that a process is about to change something below a folder (open a file for writing, rename,
make or remove one), which Python's audit hooks tell; what Rust writes (the tensors) lies between two of them.
"""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file

from lm_trust.compare.forked import FORKS
from lm_trust.training.checkpoint import load_checkpoint
from lm_trust.training.config_yaml import write_yaml

# The shortest run that has everything: both normalisers, a critic with moments, evaluations, a best policy, videos not.
CONTROL = {
    "total_steps": 4 * 2 * 16,
    "environment": {"id": "CartPole-v1", "count": 2},
    "policy": {"hidden": [4]},
    "rollout": {"steps": 16},
    "normalise": {"observations": True, "rewards": True},
    "critic": {"kind": "mlp", "hidden": [4], "epochs": 1, "minibatches": 2},
    "update": {"kind": "trpo", "max_kl": 0.02, "cg_iterations": 3},
    "evaluation": {"every": 1, "count": 1},
    "checkpoint": {"every": 1, "keep_last": 1},
    "trackers": [],
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def start(folder, *arguments, below=None, at=None, do="kill"):
    """A process that is `lm-trust ARGUMENTS` in the folder; what it prints goes to `printed` there.

    below: what counts as a change of the disk is one below this folder. at: the change before which `do` happens,
    "kill" or "full" (from then on every change that writes fails); without it they are only counted, to `changes`.
    """
    process = FORKS.Process(target=_run, args=(str(folder), [*map(str, arguments)], str(below or folder), at, do))
    process.start()
    return process


def finish(process, timeout=600):
    """Its exit status, negative after a signal."""
    process.join(timeout)
    alive = process.is_alive()
    process.kill()
    assert not alive, "it still runs"
    return process.exitcode


def _run(folder, arguments, below, at, do):
    import torch

    from lm_trust.cli import main

    torch.set_num_threads(1)
    os.chdir(folder)
    with open("printed", "w", encoding="utf-8") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    count = _watch(below, at, do)
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    if at is None:
        Path("changes").write_text(str(count[0]))
    os._exit(status)


def _watch(below, at, do):
    count = [0]
    below = os.path.realpath(below)

    def hook(event, given):
        if event == "open" and isinstance(given[0], str) and isinstance(given[2], int) and given[2] & _WRITES:
            path, writes = given[0], True
        elif event in _CHANGES and isinstance(given[0], str):
            path, writes = given[0], event == "os.mkdir"
        else:
            return
        path = os.path.abspath(path)
        if not path.startswith(below + os.sep):
            return
        count[0] += 1
        if at is None or count[0] < at:
            return
        if do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    sys.addaudithook(hook)
    return count


def write_config(folder, name, base, **sections):
    """A config in the folder whose run goes to `name` there."""
    path = Path(folder) / f"{name}.yaml"
    path.write_text(write_yaml(base | sections | {"output": str(Path(folder) / name)}))
    return path


def iterations(run):
    """Those of its metrics, in order; a last line without an end is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["iteration"] for line in lines if line.endswith("\n")]


def story(run):
    """All that a finished run tells, but for the time it took."""
    timing = ("_seconds", "steps_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {
        "metrics": [{key: value for key, value in line.items() if not key.endswith(timing)} for line in lines],
        "evaluation": json.loads((run / "evaluation.json").read_text()),
        "best": json.loads((run / "best" / "evaluation.json").read_text()),
        "evaluations": (run / "evaluations.jsonl").read_text().splitlines(),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "state": _plain(load_checkpoint(run / "checkpoints")),
    }
    for place in (run, run / "best"):
        for weights in place.rglob("*.safetensors"):
            if "checkpoints" not in weights.parts:
                named = {name: tensor.tolist() for name, tensor in load_file(weights).items()}
                told[str(weights.relative_to(run))] = named
    if (run / "monitor.csv").exists():
        told["episodes"] = pd.read_csv(run / "monitor.csv", skiprows=1).drop(columns="t").to_dict()
    return told


def _plain(value):
    """A nested state whose tensors are lists, so that states can be compared."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return (str(value.dtype), value.tolist()) if hasattr(value, "tolist") else value

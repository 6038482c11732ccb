"""Critics and advantage estimators on the same work: one table of reward, reference KL, seconds and memory.

    python benchmarks/critics.py --iterations 16 --seeds 0 1 2
    python benchmarks/critics.py --table-only

Each row is `lm-trust train` of one config with another critic and estimator, in a process of its own and in
runs/critics/CRITIC-ESTIMATOR/seedK, with its output in seedK.log beside it; one after another, so that seconds compare.
Every row draws the same number of samples of a prompt, which the grouped estimators need. A run that is finished is
left alone and one that was stopped goes on, so the same command can be given again at any time; a run of other settings
is refused. What follows `--` is handed to lm-trust (`-- --rollout.batch_size 32`).

The table stands between two markers in critics.md; the text around them is written by hand and stays.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from training_runs import (  # beside this file
    begin_or_go_on,
    check_same_settings,
    own_and_passed,
    train_seconds,
    write_page,
)

from lm_trust.arguments import split_overrides
from lm_trust.control.evaluation import t_interval
from lm_trust.errors import UserError
from lm_trust.training.config import Config
from lm_trust.training.config_file import load_config
from lm_trust.training.progress import format_duration
from lm_trust.training.run_folder import RunFolder, is_finished

OUTPUT = Path("runs/critics")
PAGE = Path(__file__).with_name("critics.md")
PEAK = "peak_memory.json"


@dataclass(frozen=True)
class Row:
    """A critic and the estimator that uses it."""

    critic: str
    estimator: str

    @property
    def folder(self) -> Path:
        return OUTPUT / f"{self.critic}-{self.estimator}"

    def overrides(self, base: Config) -> list[str]:
        """Options for lm-trust; the estimator's settings are as in the config wherever it has them too."""
        options = ["--critic.kind", self.critic, "--advantage.kind", self.estimator]
        options += ["--advantage.whiten", str(base.advantage.whiten).lower()]
        if self.estimator in ("gae", "returns_to_go"):
            options += ["--advantage.gamma", str(getattr(base.advantage, "gamma", 1.0))]
        else:  # they look at whole completions: what single tokens are paid would change nothing
            dense = [index for index, reward in enumerate(base.rewards) if reward.dense]
            options += [part for index in dense for part in (f"--rewards.{index}.dense", "false")]
        return options


# The last two critics with returns to go tell what the critic is worth by itself, without the estimator's lambda.
ROWS = [
    *(Row(critic, "gae") for critic in ("reference_head", "adapter", "model")),
    *(Row("none", estimator) for estimator in ("leave_one_out", "group_relative", "returns_to_go")),
    Row("reference_head", "returns_to_go"),
]


class Runner:
    """Trains one run at a time.

    Args:
        config: what all rows have in common ...
        options: ... and what is changed in all of them.
    """

    def __init__(self, config: Path, options: Sequence[str]) -> None:
        self._config, self._options = config, list(options)
        self._base = load_config(config, split_overrides(self._options)[1])

    def check_same_settings(self, row: Row, seed: int) -> None:
        """See `training_runs`."""
        check_same_settings(row.folder / f"seed{seed}", self._config, self._row_options(row, seed))

    def train(self, row: Row, seed: int) -> bool:
        """One run to its end; False where it failed.

        Raises:
            KeyboardInterrupt: the run was told to stop, and has written its checkpoint.
        """
        folder = row.folder / f"seed{seed}"
        name = f"{row.critic}, {row.estimator}, seed {seed}"
        if is_finished(folder):
            print(f"{name}: finished before", flush=True)
            return True
        command = [sys.executable, "-m", "lm_trust", "train", str(self._config), *self._row_options(row, seed)]
        command += begin_or_go_on(folder, name)
        log = folder.with_name(f"{folder.name}.log")
        status = _run(command, log, folder)
        if status:
            print(f"{name}: failed with status {status}, see {log}", flush=True)
        else:
            after = RunFolder(folder).evaluation()["after"]
            print(f"{name}: {after['reward_mean']:.3f}, {format_duration(train_seconds(folder))}", flush=True)
        return status == 0

    def _row_options(self, row: Row, seed: int) -> list[str]:
        return ["--seed", str(seed), *self._options, *row.overrides(self._base)]


def _run(command: Sequence[str], log: Path, folder: Path) -> int:
    """The exit status of a command; its peak memory is noted in the folder."""
    with log.open("ab") as file:
        # A session of its own: a Ctrl-C reaches this process alone, which then stops the run once.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    interrupted = False
    while process.returncode is None:
        try:
            # Not RUSAGE_CHILDREN, which is the largest of all children so far.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except KeyboardInterrupt:
            interrupted = True
            process.terminate()
    if folder.is_dir():
        # KiB on Linux, bytes on macOS; the sessions of one run count as one.
        mib = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        (folder / PEAK).write_text(json.dumps({"mib": max(mib, _peak(folder) or 0)}), encoding="utf-8")
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode


def _peak(folder: Path) -> float | None:
    path = folder / PEAK
    return json.loads(path.read_text(encoding="utf-8"))["mib"] if path.exists() else None


def table() -> str:
    """The finished runs, a row for the seeds of each critic and estimator.

    Raises:
        UserError: there is none.
    """
    lines = [
        "| critic | estimator | seeds | held-out reward | 95 % interval | reference KL | seconds | peak memory, MiB "
        "| explained variance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    before: dict[str, Any] | None = None
    for row in ROWS:
        folders = [folder for folder in sorted(row.folder.glob("seed*/")) if is_finished(folder)]
        if folders:
            before = before or RunFolder(folders[0]).evaluation()["before"]
            lines.append(_table_row(row, folders))
    if before is None:
        raise UserError(f"{OUTPUT}: no finished runs")
    lines.insert(2, f"| before training | | | {before['reward_mean']:.3f} | | 0.00 | | | |")
    return "\n".join(lines)


def _table_row(row: Row, folders: Sequence[Path]) -> str:
    after = [RunFolder(folder).evaluation()["after"] for folder in folders]
    rewards = [evaluation["reward_mean"] for evaluation in after]
    # Of the mean over seeds; a single one leaves that over its prompts.
    interval = t_interval(np.array(rewards)) if len(rewards) > 1 else after[0]["reward_interval"]
    explained = [share for folder in folders if (share := _explained(folder)) is not None]
    peaks = [peak for folder in folders if (peak := _peak(folder)) is not None]
    cells = [
        row.critic,
        row.estimator,
        str(len(folders)),
        f"{statistics.mean(rewards):.3f}",
        "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
        f"{statistics.mean(evaluation['reference_kl'] for evaluation in after):.2f}",
        f"{statistics.mean(map(train_seconds, folders)):,.0f}",
        f"{statistics.mean(peaks):,.0f}" if peaks else "",
        f"{statistics.mean(explained):.2f}" if explained else "",
    ]
    return f"| {' | '.join(cells)} |"


def _explained(folder: Path) -> float | None:
    """Mean explained variance of the last quarter of a run's iterations."""
    lines = RunFolder(folder).metrics()
    found = [line["explained_variance"] for line in lines[-max(1, len(lines) // 4) :]]
    found = [share for share in found if share is not None]
    return statistics.mean(found) if found else None


def main() -> int:
    own, passed = own_and_passed(sys.argv[1:])
    names = [row.folder.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/lm/sentiment_trpo.yaml"))
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples-per-prompt", type=int, default=4)
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--table-only", action="store_true", help="only remake the table")
    given = parser.parse_args(own)
    done = True
    if not given.table_only:
        shared = ["--iterations", given.iterations, "--rollout.samples_per_prompt", given.samples_per_prompt]
        runner = Runner(given.config, [*map(str, shared), *passed])
        # Seed by seed, so that a table of all rows stands early.
        jobs = [(row, seed) for seed in given.seeds for row in ROWS if row.folder.name in given.rows]
        for job in jobs:
            runner.check_same_settings(*job)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            done = all([runner.train(*job) for job in jobs])
        except KeyboardInterrupt:
            print("stopped; the same command goes on", flush=True)
            return 130
    write_page(PAGE, "critics.py", table())
    print(f"{PAGE.name} is written")
    return 0 if done else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

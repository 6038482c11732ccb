"""Train the control configs for several seeds, and write the table and the learning curves of what came out.

    python benchmarks/control_results.py configs/control/cartpole_*.yaml --seeds 0 1 2 3 4 --jobs 2
    python benchmarks/control_results.py --table-only

Each run is `lm-trust train` on one core, in runs/control_results/CONFIG/seedK, with its output in seedK.log beside it.
A run that is finished is left alone and one that was stopped goes on, so the same command can be given again at any
time; a run of other settings is refused. What follows `--` is handed to lm-trust (`-- --total_steps 8000`).

The table stands between two markers in control_results.md; the text around them is written by hand and stays.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from control_table import remake  # beside this file, as the next
from training_runs import begin_or_go_on, check_same_settings, own_and_passed, train_seconds

from lm_trust.errors import UserError
from lm_trust.training.progress import format_duration
from lm_trust.training.run_folder import RunFolder, is_finished

OUTPUT = Path("runs/control_results")
# Where a run computes, which changes no result: several runs at once have a core each, and one alone has all.
ONE_CORE = ["--environment.processes", "1", "--critic.own_process", "false"]


class Runner:
    """Trains runs, each in a process of its own, until told to stop."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self._overrides = list(overrides)
        self._processes: dict[Path, subprocess.Popen] = {}
        self._stopped = False

    def train(self, config: Path, seed: int) -> bool:
        """One run to its end; False where it failed or was stopped."""
        folder = _folder(config, seed)
        name = f"{config.stem}, seed {seed}"
        command = [sys.executable, "-m", "lm_trust", "train", str(config), "--seed", str(seed), *self._overrides]
        if self._stopped:
            return False
        if is_finished(folder):
            print(f"{name}: finished before", flush=True)
            return True
        command += begin_or_go_on(folder, name)
        log = folder.with_name(f"{folder.name}.log")
        with log.open("ab") as file:
            # A session of its own: a Ctrl-C reaches this process alone, which then stops each run once.
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            self._processes[folder] = process
            if self._stopped:
                process.terminate()
            status = process.wait()
        del self._processes[folder]
        if self._stopped and status:
            print(f"{name}: stopped; the same command goes on with it", flush=True)
        elif status:
            print(f"{name}: failed with status {status}, see {log}", flush=True)
        else:
            after = RunFolder(folder).evaluation()["after"]
            print(f"{name}: {after['reward_mean']:,.1f}, {format_duration(train_seconds(folder))}", flush=True)
        return status == 0

    def stop(self) -> None:
        """Every run writes a checkpoint and ends."""
        self._stopped = True
        for process in list(self._processes.values()):
            process.terminate()


def _folder(config: Path, seed: int) -> Path:
    return OUTPUT / config.stem / f"seed{seed}"


def main() -> int:
    own, passed = own_and_passed(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, of one core each")
    parser.add_argument("--table-only", action="store_true", help="only remake table and pictures")
    given = parser.parse_args(own)
    if not given.table_only and not given.configs:
        parser.error("give CONFIG files, or --table-only")
    done = True
    if not given.table_only:
        jobs = [(config, seed) for config in given.configs for seed in given.seeds]
        for config, seed in jobs:
            check_same_settings(_folder(config, seed), config, ["--seed", str(seed), *passed])
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        runner = Runner([*(ONE_CORE if given.jobs > 1 else []), *passed])
        with ThreadPoolExecutor(given.jobs) as pool:
            running = [pool.submit(runner.train, *job) for job in jobs]
            try:
                done = all([future.result() for future in running])
            except KeyboardInterrupt:
                runner.stop()
                return 130
    remake(OUTPUT)
    return 0 if done else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

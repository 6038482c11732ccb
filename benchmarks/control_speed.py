"""Control speed side by side with stable-baselines3 (PPO) and sb3-contrib (TRPO), and where our own time goes.

    python benchmarks/control_speed.py [--peer-python PATH] [--backend envpool] [--steps N] [--repeats N]

The peers are not among the packages that lm-trust needs: `pip install stable-baselines3 sb3-contrib`, into this
environment or into one of its own, whose interpreter is then given as --peer-python. Without them ours is measured
alone. On Linux everything stays on the first two cores that this process may use.

Every measurement is a fresh process: imports and construction first, then one iteration to warm up, then the training
loop, timed; no evaluation. The programs take turns (ours, peer, ours, peer ...), and the median counts. Each program
gets whichever of one and two torch threads is faster for it, by a short trial with the larger minibatches. "Environment
alone" is the bare environments of the same backend under random actions, in a loop that does nothing else.

Ours runs as our configs have it: the critic is fitted in a process of its own, and HalfCheetah's environments are
stepped by two (in gymnasium; envpool has threads). The profile is of one process, so that parts add up.

Both train on the same settings, `Settings` in control_programs.py: eight environments and 256 steps of each an
iteration, separate tanh networks of 64 x 64 for policy and value, Adam with eps 1e-5, and, CartPole aside, observations
and rewards normalised. What differs is what the programs are: SB3's PPO sums both losses and steps both networks with
one optimizer (as many steps on each network as ours), clips the gradient of both together and normalises advantages by
minibatch, ours by batch; SB3's environments are a `DummyVecEnv` of monitored ones, from `make_vec_env`. sb3-contrib
averages the KL of a Gaussian over action dimensions, so its bound is divided by them to be the same bound.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from control_programs import Settings, rows  # beside this file

PROGRAMS = str(Path(__file__).with_name("control_programs.py"))
CORES = 2
TRIAL_ITERATIONS = 6


class Bench:
    """Starts the measurements, each in a process of its own."""

    def __init__(self, peer_python: str) -> None:
        self._peer_python = peer_python
        self._threads: dict[tuple, int] = {}

    def __call__(self, program: str, settings: Settings, *, threads: int = 1, **job: Any) -> dict[str, Any]:
        job = {"program": program, "settings": asdict(settings), **job}
        python = self._peer_python if program == "peer" else sys.executable
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [python, PROGRAMS, json.dumps(job)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{settings.environment}, {settings.rule}, {program}:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def best_threads(self, program: str, settings: Settings, **job: Any) -> int:
        """One or two torch threads, by a short trial of the rule in the environment with large minibatches."""
        trial = (program, settings.environment, settings.rule, *job.values())
        if trial not in self._threads:
            speeds = {
                threads: self(program, settings, threads=threads, iterations=TRIAL_ITERATIONS, **job)["speed"]
                for threads in range(1, CORES + 1)
            }
            self._threads[trial] = max(speeds, key=speeds.get)
        return self._threads[trial]

    def peer_versions(self) -> str | None:
        """None where the peers are not installed."""
        code = (
            "import gymnasium, sb3_contrib, stable_baselines3, torch; print(f'stable-baselines3 "
            "{stable_baselines3.__version__}, sb3-contrib {sb3_contrib.__version__}, gymnasium "
            "{gymnasium.__version__}, torch {torch.__version__}')"
        )
        done = subprocess.run([self._peer_python, "-c", code], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None


def compare(bench: Bench, environment: str, backends: list[str], peer: bool, steps: int, repeats: int) -> None:
    """All rows of one environment."""
    alone = {backend: bench("alone", rows(environment)[0], backend=backend)["speed"] for backend in backends}
    for backend, speed in alone.items():
        print(f"{environment:15} {'environment alone, ' + backend:38} {speed:>10,.0f}", flush=True)
    programs = {f"lm-trust, {backend}": ("ours", {"backend": backend}) for backend in backends}
    if peer:
        programs["SB3, gymnasium"] = ("peer", {})
    for settings in rows(environment):
        threads = {name: bench.best_threads(program, settings, **job) for name, (program, job) in programs.items()}
        iterations = max(1, round(steps / settings.batch))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
        for _ in range(repeats):
            for name, (program, job) in programs.items():
                found[name].append(bench(program, settings, threads=threads[name], iterations=iterations, **job))
        speeds = {name: [one["speed"] for one in several] for name, several in found.items()}
        for name, several in found.items():
            median, (_, job) = statistics.median(speeds[name]), programs[name]
            ratio = f"{median / statistics.median(speeds['SB3, gymnasium']):>5.2f}x" if peer else ""
            spread = f"{min(speeds[name]):,.0f} to {max(speeds[name]):,.0f}"
            print(
                f"{environment:15} {settings.rule.upper():4} {settings.minibatch:>5} {name:19} {threads[name]:>7} "
                f"{median:>10,.0f} {spread:>18} {statistics.median(one['seconds'] for one in several):>8.2f} "
                f"{median / alone[job.get('backend', 'gymnasium')]:>9.0%} {ratio}",
                flush=True,
            )


def print_profiles(bench: Bench, environments: list[str], backend: str) -> None:
    """Where our iterations' time goes, and what the TRPO update costs."""
    chosen = [row for environment in environments for row in rows(environment) if row.minibatch == 256]
    results = [bench("profile", row, backend=backend) for row in chosen]
    titles = [f"{row.environment.split('-')[0]} {row.rule.upper()}" for row in chosen]
    print(f"\nshare of an iteration, ours, {backend}, one process and thread, minibatches of 256")
    print(f"{'':28}" + "".join(f"{title:>17}" for title in titles))
    totals = [sum(result["shares"].values()) for result in results]
    for part in results[0]["shares"]:
        seconds = [result["shares"][part] for result in results]
        if any(seconds):
            cells = [
                f"{own / total:>17.1%}" if own else f"{'-':>17}" for own, total in zip(seconds, totals, strict=True)
            ]
            print(f"{part:28}" + "".join(cells))
    print(f"{'milliseconds an iteration':28}" + "".join(f"{1e3 * total:>17.1f}" for total in totals))
    print("\none update on the same rollout of 2,048 steps, one thread, PPO by 10 epochs of 8 minibatches")
    for row, result in zip(chosen, results, strict=True):
        if result["costs"]:
            gradient, trpo, ppo = (1e3 * result["costs"][name] for name in ("gradient", "trpo", "ppo"))
            print(
                f"{row.environment:15} a gradient {gradient:.2f} ms; TRPO {trpo:.1f} ms = {trpo / gradient:.1f} "
                f"gradients ({result['costs']['products']:.0f} Fisher products); PPO {ppo:.1f} ms; "
                f"TRPO takes {trpo / ppo:.2f} of PPO"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--environments", nargs="+", default=["CartPole-v1", "HalfCheetah-v5"], metavar="ID")
    parser.add_argument("--backend", choices=["gymnasium", "envpool"], default="gymnasium")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has the peers")
    parser.add_argument("--steps", type=int, default=8_192, help="timed environment steps of a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of a program, of which the median counts")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    bench = Bench(given.peer_python)
    peers = bench.peer_versions()
    print(f"{platform.machine()}, Python {platform.python_version()}, {CORES} cores")
    print(peers or f"No peers in {given.peer_python}: pip install stable-baselines3 sb3-contrib. Ours alone:")
    backends = ["gymnasium"]
    if given.backend == "envpool":
        if importlib.util.find_spec("envpool"):
            backends.append("envpool")
        else:
            print("No envpool rows: pip install envpool")
    print(
        f"\n{'environment':15} rule batch {'program':19} threads {'steps/s':>10} {'least to most':>18} "
        f"{'seconds':>8} {'of alone':>9} {'ratio' if peers else ''}"
    )
    for environment in given.environments:
        compare(bench, environment, backends, peers is not None, given.steps, given.repeats)
    print_profiles(bench, given.environments, backends[-1])


if __name__ == "__main__":
    main()

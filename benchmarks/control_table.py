"""For `control_results.py`: what is asked of each control task, and the table and pictures of its finished runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from training_runs import differing, train_seconds, write_page  # beside this file

from lm_trust.control.evaluation import t_interval
from lm_trust.errors import UserError
from lm_trust.training.compare_curves import plot_runs
from lm_trust.training.config import Config
from lm_trust.training.config_file import load_config
from lm_trust.training.run_folder import RunFolder, is_finished

PAGE = Path(__file__).with_name("control_results.md")
PICTURES = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Task:
    """What is asked of a task: the least return after so many steps, of the mean over the seeds or of every seed."""

    steps: int
    trpo: float
    ppo: float
    seeds: int = 3
    every_seed: bool = False

    def bar(self, kind: str) -> float | None:
        return {"trpo": self.trpo, "ppo": self.ppo}.get(kind.split("_")[0])


TASKS = {
    "CartPole-v1": Task(100_000, trpo=500, ppo=500, seeds=5, every_seed=True),
    "HalfCheetah-v5": Task(1_000_000, trpo=4500, ppo=5800),
    "Hopper-v5": Task(1_000_000, trpo=3400, ppo=2600),
    "Walker2d-v5": Task(1_000_000, trpo=4500, ppo=4000),
    "Ant-v5": Task(1_000_000, trpo=3600, ppo=3300),
    "Humanoid-v5": Task(10_000_000, trpo=5000, ppo=5000, seeds=1),
}


@dataclass(frozen=True)
class Result:
    """One finished run."""

    folder: Path
    config: Config
    steps: int
    minutes: float
    evaluation: dict[str, Any]

    @property
    def task(self) -> str:
        return self.config.environment.id

    @property
    def kind(self) -> str:
        return self.config.update.kind

    @property
    def reward(self) -> float:
        return self.evaluation["reward_mean"]


def read_results(output: Path) -> dict[str, list[Result]]:
    """The finished runs by config, tasks in their order, seeds in theirs."""
    found: dict[str, list[Result]] = {}
    for folder in output.glob("*/seed*/"):
        if not is_finished(folder):
            print(f"{folder}: not finished, left out")
            continue
        config, run = load_config(folder / "config.yaml", check_files=False), RunFolder(folder)
        result = Result(
            folder=folder,
            config=config,
            steps=run.metrics()[-1]["steps"],
            minutes=train_seconds(folder) / 60,
            evaluation=run.evaluation()["after"],
        )
        found.setdefault(folder.parent.name, []).append(result)
    tasks = list(TASKS)

    def place(name: str) -> tuple[int, str, bool, str]:
        first = found[name][0]
        return (tasks.index(first.task) if first.task in tasks else len(tasks), first.task, first.kind != "trpo", name)

    return {name: sorted(found[name], key=lambda result: result.config.seed) for name in sorted(found, key=place)}


def table(results: dict[str, list[Result]]) -> str:
    """A row a run, and after each config's runs one of their mean."""
    lines = [
        "| config | seed | steps | return, mean of 20 episodes | 95 % interval | minutes | asked | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        for run in runs:
            count = run.evaluation["count"]
            reward = f"{run.reward:,.1f}" + ("" if count == 20 else f" ({count} episodes)")
            interval = _interval(run.evaluation["reward_interval"])
            lines.append(
                f"| {name} | {run.config.seed} | {run.steps:,} | {reward} | {interval} | {run.minutes:.1f} | | |"
            )
        rewards = [run.reward for run in runs]
        asked, met = _verdict(runs)
        lines.append(
            f"| **{name}** | mean of {len(runs)} | {runs[0].steps:,} | **{statistics.mean(rewards):,.1f}** | "
            f"{_interval(t_interval(np.array(rewards)))} | {statistics.mean(run.minutes for run in runs):.1f} | "
            f"{asked} | {met} |"
        )
    return "\n".join(lines)


def _verdict(runs: Sequence[Result]) -> tuple[str, str]:
    """What is asked of these runs' task, and whether they meet it."""
    task = TASKS.get(runs[0].task)
    bar = task and task.bar(runs[0].kind)
    if bar is None:
        return "", ""
    asked = f"{bar:,.0f}" + (f" on each of {task.seeds} seeds" if task.every_seed else "")
    if mixed := {key for run in runs for key in differing(runs[0].config, run.config, "seed")}:
        return asked, f"its seeds differ in {', '.join(sorted(mixed))}"
    if runs[0].config.total_steps != task.steps:
        return asked, f"asked at {task.steps:,} steps"
    rewards = [run.reward for run in runs]
    met = "yes" if (min(rewards) if task.every_seed else statistics.mean(rewards)) >= bar else "no"
    return asked, met if len(runs) >= task.seeds else f"{met}, {len(runs)} of {task.seeds} seeds"


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:,.1f} to {ends[1]:,.1f}"


def draw_curves(results: dict[str, list[Result]]) -> list[Path]:
    """One picture a task, of all its runs."""
    by_task: dict[str, list[Path]] = {}
    for runs in results.values():
        by_task.setdefault(runs[0].task, []).extend(run.folder for run in runs)
    pictures = []
    for task, folders in by_task.items():
        picture = PICTURES / f"control_{task.rpartition('-')[0].lower()}.png"
        plot_runs(folders, picture, metric="reward_mean", x="steps", title=task)
        pictures.append(picture)
    return pictures


def remake(output: Path) -> None:
    """Pictures and table from the finished runs in output/CONFIG/seedK.

    Raises:
        UserError: there is none, or the page lacks its markers.
    """
    results = read_results(output)
    if not results:
        raise UserError(f"{output}: no finished runs")
    pictures = draw_curves(results)
    shown = [
        f'<img src="../docs/{picture.name}" width="640" alt="Learning curves: {picture.stem}">' for picture in pictures
    ]
    write_page(PAGE, "control_results.py", "\n\n".join([table(results), *shown]))
    print(f"{PAGE.name}: {sum(map(len, results.values()))} runs; pictures: {', '.join(map(str, pictures))}")

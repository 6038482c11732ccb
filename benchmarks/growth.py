"""What an update costs as completion tokens, the adapters' rank and the vocabulary grow, drawn.

    python benchmarks/growth.py                      (writes docs/growth.png)
    python benchmarks/growth.py --repeats 1 --plot growth.png

A tiny GPT-2 (4 layers, 256 wide, random weights) whose adapters are a few steps from their start. One of the three
grows, the others stay: 512 completion tokens (16 x (16 + 32)), rank 8, a vocabulary of 2,048. Microbatches are of four
sequences, which a quarter of the sixteen fills. The sizes take turns, and the median counts. The exponent is that of a
power law through the points, 1 for a cost that grows as the size does; MiB is what an update added at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lm_update import PRECONDITIONED, Cost, make_policy, take_turns, warmed_up  # beside this file
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from lm_trust.core.parameters import assign, flatten, trainable_parameters
from lm_trust.updates import TRPO, PPOClip

PROMPT, STEPS, MICROBATCH = 16, 32, 4
SIZES = {
    "completion tokens": (512, 1024, 2048, 4096, 8192),
    "rank": (4, 8, 16, 32, 64),
    "vocabulary": (2048, 8192, 32768, 131072),
}
AT_REST = {"completion tokens": 512, "rank": 8, "vocabulary": 2048}
RULES = {
    "TRPO": lambda: TRPO(**PRECONDITIONED, microbatch_size=MICROBATCH),
    "PPO, 4 epochs x 2": lambda: PPOClip(epochs=4, minibatches=2, microbatch_size=MICROBATCH),
}


def updates(sizes: Mapping[str, int]) -> dict[str, Callable[[], Any]]:
    """An update by each rule, all from the same policy and batch."""
    policy = make_policy("tiny", rank=sizes["rank"], vocabulary=sizes["vocabulary"])
    batch = warmed_up(policy, (sizes["completion tokens"] // STEPS, PROMPT, STEPS))
    parameters = trainable_parameters(policy)
    theta = flatten(parameters).detach()

    def from_the_start(step: Callable[..., Any]) -> None:
        assign(parameters, theta)
        step(policy, batch)

    return {name: lambda make=make: from_the_start(make().step) for name, make in RULES.items()}


def measured(what: str, repeats: int) -> dict[tuple[str, int], Cost]:
    """The cost of each rule's update at each size."""
    programs = {
        (name, size): update for size in SIZES[what] for name, update in updates(AT_REST | {what: size}).items()
    }
    return take_turns(programs, repeats, lambda: None)


def exponent(costs: Mapping[tuple[str, int], Cost], rule: str, sizes: tuple[int, ...]) -> float:
    logs = torch.tensor([[size, costs[rule, size].seconds] for size in sizes]).log()
    return stats.linregress(logs[:, 0], logs[:, 1]).slope


def print_costs(what: str, costs: Mapping[tuple[str, int], Cost]) -> None:
    sizes = SIZES[what]
    print(f"\n{what:24}" + "".join(f"{size:>12,}" for size in sizes) + f"{'exponent':>10}")
    for rule in RULES:
        row = [costs[rule, size] for size in sizes]
        power = exponent(costs, rule, sizes)
        print(f"  {rule + ', s':22}" + "".join(f"{cost.seconds:>12.3f}" for cost in row) + f"{power:>10.2f}")
        print(f"  {rule + ', MiB':22}" + "".join(f"{cost.mib:>12,.0f}" for cost in row), flush=True)


def draw(found: Mapping[str, Mapping[tuple[str, int], Cost]], path: Path) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (what, costs) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        sizes = SIZES[what]
        for rule, marker in zip(RULES, "os", strict=True):
            seconds = [costs[rule, size].seconds for size in sizes]
            axes.plot(sizes, seconds, marker=marker, label=f"{rule}: power {exponent(costs, rule, sizes):.2f}")
        first = costs["TRPO", sizes[0]].seconds
        axes.plot(sizes, [first * size / sizes[0] for size in sizes], color="0.6", ls="--", label="as the size does")
        axes.set(xscale="log", yscale="log", xlabel=what, ylabel="seconds an update")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the median counts")
    parser.add_argument("--plot", type=Path, default=Path("docs/growth.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for what in SIZES:
        found[what] = measured(what, given.repeats)
        print_costs(what, found[what])
    draw(found, given.plot)


if __name__ == "__main__":
    main()

"""An update spread over processes: seconds by their number, and what they move between each other.

    python benchmarks/scaling.py                                   (tiny, 1, 2 and 4 processes; minutes)
    python benchmarks/scaling.py --model gpt2 --rows 32 --processes 1 2

"strong": the same batch shared out among more processes; "weak": as many rows in each process. One thread a process,
gloo, this machine: with more processes than cores they take turns, so that beside the seconds there is the processor
time of the busiest process, which is what it would take on a core of its own, without waiting for the others. The rules
take turns on the same batch and the median counts. Moved are the bytes that each process gives into collective
operations in one update, and how many of these there are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from lm_update import make_policy, warmed_up  # beside this file

from lm_trust.core.parameters import assign, flatten, trainable_parameters
from lm_trust.core.processes import share_of
from lm_trust.updates import TRPO, PPOClip

PROMPT, STEPS = 16, 32
RULES = {
    "trpo": lambda size: TRPO(max_kl=0.02, damping=0.03, cg_iterations=4, fisher_fraction=0.25, microbatch_size=size),
    "ppo_clip": lambda size: PPOClip(epochs=4, minibatches=2, microbatch_size=size),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "gpt2", "smollm2-135m"), default="tiny")
    parser.add_argument("--rows", type=int, default=64, help="of the whole batch (strong); of one process: a quarter")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--microbatch", type=int, default=16)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{given.model}, {PROMPT}+{STEPS} tokens a row, {cores} cores, torch {torch.__version__}")
    columns = ("batch", "processes", "rows", "rule", "s", "of one process", "busiest, CPU s", "of one", "MB", "calls")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for kind in ("strong", "weak"):
        alone: dict[str, tuple[float, float]] = {}
        for count in given.processes:
            rows = given.rows if kind == "strong" else given.rows // 4 * count
            for rule, (seconds, busy, moved, calls) in measure(given, count, rows).items():
                first = alone.setdefault(rule, (seconds, busy))
                print(
                    f"| {kind} | {count} | {rows} | `{rule}` | {seconds:.2f} | {seconds / first[0]:.2f} | {busy:.2f} "
                    f"| {busy / first[1]:.2f} | {moved / 1e6:.2f} | {calls} |",
                    flush=True,
                )


def measure(given: argparse.Namespace, count: int, rows: int) -> dict[str, tuple[float, float, int, int]]:
    """By rule: seconds, processor seconds of the busiest process, bytes and calls of one update in one process."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(count) as pool:
        shared = [(given, rank, count, rows, str(Path(folder) / "store")) for rank in range(count)]
        results = pool.starmap(work, shared, chunksize=1)
    return {
        rule: (max(each[rule][0] for each in results), max(each[rule][1] for each in results), *results[0][rule][2:])
        for rule in RULES
    }


def work(given: argparse.Namespace, rank: int, count: int, rows: int, store: str) -> dict[str, tuple]:
    """One process's part."""
    torch.set_num_threads(1)
    policy = make_policy(given.model, "cpu", None)
    # The policy and its batch are made by every process alone, so that all have the same; each keeps its rows.
    batch = warmed_up(policy, (rows, PROMPT, STEPS))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    own = batch[share_of(rows).slice]
    parameters = trainable_parameters(policy)
    start = flatten(parameters).detach()
    found: dict[str, list[tuple]] = {rule: [] for rule in RULES}
    for _ in range(1 + given.repeats):  # the first one warms up
        for rule, make in RULES.items():
            assign(parameters, start)
            update = make(given.microbatch)
            if count > 1:
                dist.barrier()
            with counted() as traffic:
                began, busy = time.perf_counter(), time.process_time()
                report = update.step(policy, own)
                found[rule].append((time.perf_counter() - began, time.process_time() - busy, *traffic.values()))
            assert report.accepted, report
    dist.destroy_process_group()
    return {
        rule: (
            statistics.median(each[0] for each in values[1:]),
            statistics.median(each[1] for each in values[1:]),
            *values[-1][2:],
        )
        for rule, values in found.items()
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Within the context all that this process gives into collective operations is counted."""
    traffic = {"bytes": 0, "calls": 0}
    reduce, gather = dist.all_reduce, dist.all_gather_object

    def all_reduce(tensor: torch.Tensor, *given: object) -> object:
        traffic["bytes"] += tensor.numel() * tensor.element_size()
        traffic["calls"] += 1
        return reduce(tensor, *given)

    def all_gather_object(values: list, value: object) -> None:
        traffic["calls"] += 1  # a row count: tens of bytes
        gather(values, value)

    dist.all_reduce, dist.all_gather_object = all_reduce, all_gather_object
    try:
        yield traffic
    finally:
        dist.all_reduce, dist.all_gather_object = reduce, gather


if __name__ == "__main__":
    main()

"""Real processes in one group (gloo), kept for a whole test module: each runs a function on its share of the work."""

import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from lm_trust.compare.forked import FORKS

PATIENCE = 300  # seconds: processes that wait for each other do so for ever


class Workers:
    """`count` processes that wait for work; a context manager."""

    def __init__(self, count):
        self._pipes, self._processes = [], []
        for _ in range(count):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function, count, *given):
        """What function(*given) returns in each of the first `count` processes, which are one group meanwhile."""
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self._pipes[:count]):
                pipe.send((function, given, rank, count, str(Path(folder) / "store")))
            replies = [_received(pipe) for pipe in self._pipes[:count]]
        for _, error in replies:
            assert error is None, error
        return [result for result, _ in replies]

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _received(pipe):
    assert pipe.poll(PATIENCE), f"a process has not answered in {PATIENCE} seconds"
    return pipe.recv()


def _serve(pipe):
    sys.path.insert(0, str(Path(__file__).parents[1]))  # where the functions' modules are, as pytest calls them
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while (work := pipe.recv()) is not None:
        function, given, rank, count, store = work
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        dist.barrier()  # work that fails at once would leave the group while others are still joining it
        try:
            reply = (function(*given), None)
        except Exception:
            reply = (None, traceback.format_exc())
        if dist.is_initialized():  # a run leaves the group by itself
            dist.destroy_process_group()
        pipe.send(reply)

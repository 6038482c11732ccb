"""From one process to many: starting them, and finding oneself among them.

accelerate's launcher starts the processes and says in the environment of each which one it is; `lm-trust launch` calls
it with the arguments that fit. Importing this module loads nothing heavy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lm_trust.errors import UserError, in_line


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def wants_gpu() -> bool:
    """Whether the processes compute on GPUs: where there are any, if accelerate's settings do not say otherwise."""
    import torch

    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def join_processes() -> None:
    """Join the group of processes that a launcher describes in the environment; alone: nothing.

    Raises:
        UserError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    from accelerate import PartialState

    try:
        PartialState(cpu=not wants_gpu())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run cannot join each other: {in_line(error)}") from error


def leave_processes() -> None:
    """Part from the other processes, at the end of a run; alone: nothing."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def launch(command: Sequence[str], *, processes: int | None, config_file: str | None) -> int:
    """Run `lm-trust COMMAND` in several processes by accelerate's launcher; does not return where that works.

    Args:
        command: `train CONFIG ...`.
        processes: how many; None: as many as there are GPUs.
        config_file: of `accelerate config`, which then says how many there are and on which machines.

    Raises:
        UserError: neither says how many processes there are to be, or the file is none.
    """
    if config_file is not None and not os.path.isfile(config_file):
        raise UserError(f"--accelerate-config: no such file: {config_file}; `accelerate config` makes one")
    settings = ["--config_file", config_file] if config_file else []
    if config_file is None:
        processes = processes or _gpus()
        # With every setting given, no file of the user's home has a say. On processors too it is this launcher of
        # accelerate's that starts several processes on one machine.
        settings += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        settings += ["--main_process_port", "0"]
    if processes is not None:
        settings += ["--num_processes", str(processes)]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    sys.stdout.flush()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *settings, "-m", "lm_trust", *command]
    return os.execv(sys.executable, launcher)


def _gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise UserError("launch: there is no GPU to count; say how many processes, as in --processes 2")
    return count

"""What a program holds in memory, on the GPU where there is one and else in its process (Linux). torch only."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_of_memory() -> float:
    """MiB held now; the peak is counted from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if sys.platform != "linux":
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is allocated now
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    return _resident("VmRSS")


def peak_memory() -> float:
    """MiB at most since `start_of_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident("VmHWM") if sys.platform == "linux" else float("nan")


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 2**10

"""Named random streams: one seed a run, an own generator for each purpose, and no global generator ever reseeded."""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed that depends on the run's seed and on the name of the stream alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the named stream, so that one consumer's draws never shift another's."""
    return torch.Generator().manual_seed(stream_seed(seed, name))

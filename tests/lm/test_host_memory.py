"""Freed memory goes back to the operating system, where there is enough of it to be worth the trouble."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lm_trust.lm import host_memory

pytestmark = pytest.mark.skipif(host_memory._glibc() is None, reason="needs glibc 2.33 or newer")


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def scattered(mib: int) -> list[torch.Tensor]:
    """Small blocks that outlive as many between them, which are freed; together as much as was asked for."""
    blocks = [torch.ones(4096) for _ in range(mib * 64)]  # of 16 KiB
    return blocks[::32]


def test_it_is_given_back_even_from_between_what_is_kept(monkeypatch):
    monkeypatch.setattr(host_memory, "LEAST", 2**20)
    kept = scattered(256)
    before = resident_mib()
    host_memory.give_back_free_memory()
    assert resident_mib() < before - 128
    assert all((block == 1).all() for block in kept)


def test_a_little_is_left_where_it_is(monkeypatch):
    monkeypatch.setattr(host_memory, "LEAST", 2**60)
    kept = scattered(64)
    before = resident_mib()
    host_memory.give_back_free_memory()
    assert resident_mib() > before - 8 and len(kept)

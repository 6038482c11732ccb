"""A small share of benchmarks/fuzz.py on every run of the tests; and the script itself finds what it looks for."""

import importlib.util
import os
import pickle
import random
import sys
import time
from pathlib import Path

import pytest

from lm_trust.errors import UserError

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("benchmarks_fuzz", SCRIPT)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where dataclasses look for their own
    found.loader.exec_module(module)
    yield module
    del sys.modules[found.name]


@pytest.mark.parametrize(
    ("name", "count"),
    [("configurations", 60), ("rows", 300), ("checkpoints", 150), ("adapters", 40), ("control policies", 150)],
)
def test_whatever_is_read_is_read_or_refused(script, name, count, tmp_path):
    found = script.fuzz(name, count, 0, tmp_path / "work", tmp_path / "kept")
    assert not found.problems
    assert found.read and found.refused and found.read + found.refused == count


def unpickle(numbers):
    pickle.loads(b"cposix\ngetpid\n(tR.")


def start_a_process(numbers):
    os.system("true")


def write_elsewhere(numbers):
    Path.home().joinpath("x" * 300).write_text("")


def hang(numbers):
    time.sleep(5)


def raise_something(numbers):
    raise KeyError("what")


def refuse_with_a_traceback(numbers):
    raise UserError("Traceback (most recent call last)")


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (unpickle, "did pickle.find_class"),
        (start_a_process, "did os.system"),
        (write_elsewhere, "did writes "),
        (hang, "TimeoutError"),
        (raise_something, "KeyError"),
        (refuse_with_a_traceback, "not plain"),
    ],
)
def test_what_must_not_happen_is_found(script, monkeypatch, tmp_path, load, told):
    monkeypatch.setattr(script, "TOO_LONG", 1.0)
    monkeypatch.setitem(script.TARGETS, "bad", (lambda folder: load, 1.0))
    found = script.fuzz("bad", 2, 0, tmp_path / "work")
    (problem,) = found.problems
    assert told in problem and found.problems[problem] == 0


def test_an_input_is_told_by_its_number(script):
    data = b'{"a": [1, 2, {"b": null}]}' * 4
    once, again = ([script.spoilt_bytes(data, random.Random(f"0 x {number}")) for number in range(50)] for _ in "12")
    assert once == again and len(set(once)) > 40

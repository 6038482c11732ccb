"""The inputs of fuzz.py, chosen by how far into our code they reach: atheris (libFuzzer) keeps what finds new branches.

What spoils an input draws its numbers from the fuzzer's bytes in place of a generator's, so that the fuzzer changes
which file is spoilt, where, and by what. An input that fails ends the script, its bytes kept in `--keep`; to see it
again, give that file as `--again`.

    pip install 'atheris>=3,<4'
    python benchmarks/fuzz_guided.py configurations [--count 10000] [--keep fuzz-failures] [--again FILE]
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lm_trust"]):
    from fuzz import TARGETS, watched  # beside this file


class Choices(random.Random):
    """A generator whose numbers are the bytes that it was given, and zeros after them."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._bytes = io.BytesIO(data)

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        return int.from_bytes(self._bytes.read(size).ljust(size, b"\0"), "big") >> (8 * size - k)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where a failing input is written")
    parser.add_argument("--again", type=Path, help="one kept input, loaded once")
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    what = [str(given.again)] if given.again else [f"-runs={given.count}", "-seed=1"]
    settings = ["-max_len=256", "-len_control=0", f"-artifact_prefix={given.keep}/{given.target} "]
    with tempfile.TemporaryDirectory() as place, watched(given.target, Path(place) / "work") as problem_with:

        def take(data: bytes) -> None:
            problem = problem_with(Choices(data))
            if problem:
                raise RuntimeError(problem)

        atheris.Setup([sys.argv[0], *settings, *what], take)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

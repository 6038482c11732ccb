"""Files that nobody would write, read by everything that reads files: each is read, or refused as the user's error.

Configurations, rows of data, checkpoints, adapters and control policies are spoilt at random, byte by byte or value by
value, and loaded. An input fails if it raises anything but a UserError of plain lines, takes more than TOO_LONG
seconds, or does what data must not do, as Python's audit hooks see it: unpickle, start a process, connect to the
network, write outside the folder. Failing inputs are kept, and the script exits with 1.

    python benchmarks/fuzz.py [--count 100000] [--seed 0] [--only rows ...] [--keep fuzz-failures]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_trust.control.policies import MLPPolicy
from lm_trust.control.saving import load_policy as load_control_policy
from lm_trust.control.saving import save_policy as save_control_policy
from lm_trust.control.spaces import action_space
from lm_trust.errors import UserError
from lm_trust.lm.loading import load_adapter, load_base, load_policy
from lm_trust.lm.prompts import load_prompts
from lm_trust.lm.rows import BadRows, read_rows
from lm_trust.lm.saving import load_trained, save_adapter
from lm_trust.training.checkpoint import STATE, TENSORS, load_checkpoint, save_checkpoint
from lm_trust.training.config_file import dump, load_config
from lm_trust.verified_folder import MANIFEST, build_verified

CONFIGS = Path(__file__).parents[1] / "configs"
TOO_LONG = 60  # seconds
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
PICKLED = b"cposix\nmkdir\n(S'pwned'\ntR."
TOKENS = [
    *(
        b"\0",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"{",
        b"}",
        b"[",
        b'"',
        b":",
        b"\n",
        b"\r",
        b",",
        b"- ",
        b"null",
        b"NaN",
        b"-1",
    ),
    *(
        b"1e999",
        b"9" * 400,
        b"../../",
        b"/etc/passwd",
        b"!!python/object/apply:os.system ['true']",
        b"&a [*a]",
        PICKLED,
    ),
    *(b"__class__", b"\xe2\x80\xa8", b"'" * 3, b"true", b"{}" * 50, b"[" * 2000, b"<<: *x", b"%s%n", b"\xef\xbb\xbf"),
]
VALUES = [
    *(None, True, -1, 0, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "../../x", "/dev/stdin", "a\nb", "\0", "\ud800"),
    *([], {}, [[]], {"a": {}}, ["x"] * 3, {"kind": "x"}, float("inf"), float("nan"), "os:system", "1e-3", "(a+)+$"),
]


# ---- spoiling


def spoilt_bytes(data: bytes, numbers: random.Random) -> bytes:
    """The bytes with one to four changes."""
    for _ in range(numbers.choice((1, 1, 1, 2, 4))):
        start = numbers.randrange(len(data) + 1)
        end = min(len(data), start + numbers.choice((1, 1, 2, 8, 64, len(data))))
        how = numbers.randrange(6)
        if how == 0 and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << numbers.randrange(8)]) + data[start + 1 :]
        elif how == 1:
            data = data[:start] + data[end:]
        elif how == 2:
            data = data[:end] + data[start:end] + data[end:]
        elif how == 3:
            data = data[:start] + numbers.choice(TOKENS) + data[start:]
        elif how == 4:
            data = data[:start] + numbers.choice(TOKENS) + data[end:]
        else:
            data = data[:start]
    return data


def spoilt_tree(tree: Any, numbers: random.Random) -> Any:
    """The nested value with one to three values or keys changed."""
    tree = copy.deepcopy(tree)
    for _ in range(numbers.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return numbers.choice(VALUES)
        holder, key = numbers.choice(places)
        how = numbers.randrange(4)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[numbers.choice(["x", "", "kind", "items", "tensor", "\ud800", key + "_"])] = holder.pop(key)
        elif how == 2:
            holder[key] = copy.deepcopy(numbers.choice(places)[0])
        else:
            holder[key] = copy.deepcopy(numbers.choice(VALUES))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield tree, key
        yield from _places(value)


def spoilt_json(data: bytes, numbers: random.Random) -> bytes:
    """A JSON text spoilt in its values or in its bytes."""
    if numbers.random() < 0.5:
        return spoilt_bytes(data, numbers)
    return json.dumps(spoilt_tree(json.loads(data), numbers)).encode(errors="surrogatepass")


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- what is loaded: each makes its good files once, in a folder of its own, and gives a function of an input


Load = Callable[[random.Random], None]


def configurations(folder: Path) -> Load:
    names = ("lm/sentiment_trpo", "lm/token_and_step", "control/cartpole_ppo", "control/halfcheetah_trpo")
    good = [dump(load_config(CONFIGS / f"{name}.yaml", check_files=False)).encode() for name in names]

    def load(numbers: random.Random) -> None:
        path = put(folder / "config.yaml", spoilt_bytes(numbers.choice(good), numbers))
        overrides = [("update.max_kl", str(numbers.choice(VALUES)))] if numbers.random() < 0.2 else []
        dump(load_config(path, overrides, check_files=numbers.random() < 0.5))

    return load


def rows(folder: Path) -> Load:
    records = [{"prompt": f"The film {number}", "answer": number, "score": number / 2} for number in range(4)]
    chats = [{"prompt": [{"role": "user", "content": "Hello"}], "answer": None}] * 2
    table = folder / "good.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), table)
    good = {
        ".jsonl": "".join(json.dumps(record) + "\n" for record in [*records, *chats]).encode(),
        ".csv": b'prompt,answer\n"The film, 1",2\nThe film 2,"3 ""or"" 4"\n',
        ".parquet": table.read_bytes(),
    }

    def load(numbers: random.Random) -> None:
        suffix = numbers.choice(list(good))
        path = put(folder / f"rows{suffix}", spoilt_bytes(good[suffix], numbers))
        list(read_rows(path))
        load_prompts(path, bad=BadRows("skip"), chat=numbers.random() < 0.5)

    return load


def checkpoints(folder: Path) -> Load:
    optimizer = {
        "state": {0: {"step": torch.tensor(1.0), "mean": torch.ones(3)}},
        "groups": [{"lr": 0.1, "betas": [0.9, 1]}],
    }
    save_checkpoint(
        folder, {"iteration": 1, "policy": [torch.ones(2, 3)], "update": optimizer}, iteration=1, keep_last=9
    )
    place = folder / "00000001"
    good = {path.name: path.read_bytes() for path in place.iterdir()}

    def load(numbers: random.Random) -> None:
        name = numbers.choice(list(good))
        spoil = spoilt_bytes if name == TENSORS else spoilt_json
        data = {**good, name: spoil(good[name], numbers)}
        if name != MANIFEST and numbers.random() < 0.8:  # sealed anew: the checksums are right, and hide nothing
            build_verified(place, lambda target: [put(target / name, data[name]) for name in (STATE, TENSORS)])
        else:
            for each, content in data.items():
                put(place / each, content)
        if not isinstance(load_checkpoint(folder), dict):
            raise TypeError("a checkpoint's state is a dictionary")

    return load


def adapters(folder: Path) -> Load:
    base = str(_tiny_model(folder / "base"))
    policy, plain = load_policy(base, r=2), load_base(base)
    save_adapter(policy, folder / "good")
    good = {path.name: path.read_bytes() for path in (folder / "good").iterdir()}
    place = folder / "adapter"

    def load(numbers: random.Random) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        names, name = list(good), numbers.choice(list(good))
        if numbers.random() < 0.1:  # the weights as a pickle, in the place of the good ones or beside them
            put(place / "adapter_model.bin", PICKLED)
            names = [each for each in names if numbers.random() < 0.5]
        spoil = spoilt_json if name.endswith(".json") else spoilt_bytes
        for each in names:
            put(place / each, spoil(good[each], numbers) if each == name else good[each])
        if numbers.random() < 0.5:
            load_trained(policy, place)
        else:
            load_adapter(copy.deepcopy(plain), place)

    return load


def control_policies(folder: Path) -> Load:
    from gymnasium.spaces import Discrete

    policy = MLPPolicy(3, action_space(Discrete(2), "two"), hidden=[4])
    save_control_policy(policy, folder / "good.safetensors")
    good = (folder / "good.safetensors").read_bytes()

    def load(numbers: random.Random) -> None:
        load_control_policy(policy, put(folder / "policy.safetensors", spoilt_bytes(good, numbers)))

    return load


def _tiny_model(folder: Path) -> Path:
    vocabulary = {word: index for index, word in enumerate(("<eos>", "the", "film", "was", "good"))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# Shares of the inputs: an adapter takes a hundred times as long as a row.
TARGETS = {
    "configurations": (configurations, 0.1),
    "rows": (rows, 0.4),
    "checkpoints": (checkpoints, 0.3),
    "adapters": (adapters, 0.05),
    "control policies": (control_policies, 0.15),
}


# ---- watching


@dataclass
class Watch:
    """What Python's audit hooks say while an input is loaded. A hook cannot be taken out: it looks at `folder`."""

    folder: str | None = None
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, given: tuple) -> None:
        if self.folder is None:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {given!r:.200}")
        elif event == "open" and isinstance(given[0], str) and isinstance(given[2], int):
            writes = given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            path = os.path.abspath(given[0])
            if writes and not path.startswith((self.folder, "/dev/", tempfile.gettempdir())) and ".pyc" not in path:
                self.seen.append(f"writes {path}")
        elif event in ("os.mkdir", "os.rename", "os.remove") and "pwned" in str(given[0]):
            self.seen.append(f"{event} {given[0]}")


_WATCH = Watch()
_HOOKED: list[bool] = []


@contextmanager
def _quietly() -> Iterator[None]:
    """Warnings and what loaders print are not what is looked at."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _overdue(*_: Any) -> None:
    raise TimeoutError(f"it takes more than {TOO_LONG} s")


def problem_of(load: Load, numbers: random.Random, folder: Path) -> str | None:
    """What is wrong with how an input was taken, in a line; "" where it was rightly refused, None where it was read."""
    problem: str | None = None
    signal.setitimer(signal.ITIMER_REAL, TOO_LONG)
    _WATCH.folder, _WATCH.seen = str(folder), []
    try:
        load(numbers)
    except UserError as error:
        lines = str(error).splitlines() or [""]
        plain = all(line.strip() for line in lines) and "Traceback" not in str(error)
        problem = "" if plain else f"a UserError that is not plain: {error!r:.300}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = f"{type(error).__name__}: {error!s:.300}"
    finally:
        _WATCH.folder = None
        signal.setitimer(signal.ITIMER_REAL, 0)
    return f"did {_WATCH.seen[0]}" if _WATCH.seen else problem


@dataclass
class Found:
    """Of one target: how many inputs were read and refused, and what is wrong, by its words, with the first input."""

    read: int = 0
    refused: int = 0
    problems: dict[str, int] = field(default_factory=dict)


@contextmanager
def watched(name: str, folder: Path) -> Iterator[Callable[[random.Random], str | None]]:
    """`problem_of` for the inputs of a target, whose good files are made in `folder`."""
    if not _HOOKED:
        sys.addaudithook(_WATCH)
        _HOOKED.append(True)
    folder.mkdir(parents=True)
    before = signal.signal(signal.SIGALRM, _overdue)
    try:
        with _quietly():
            load = TARGETS[name][0](folder)
            yield lambda numbers: problem_of(load, numbers, folder)
    finally:
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, count: int, seed: int, folder: Path, keep: Path | None = None) -> Found:
    """Load `count` spoilt inputs of a target; `keep` is where the first one of each problem is copied to."""
    found = Found()
    with watched(name, folder) as problem_with:
        for number in range(count):
            problem = problem_with(random.Random(f"{seed} {name} {number}"))
            if problem is None:
                found.read += 1
            elif not problem:
                found.refused += 1
            elif problem not in found.problems:
                found.problems[problem] = number
                if keep is not None:
                    shutil.copytree(folder, keep / f"{name} {number}", symlinks=True, dirs_exist_ok=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="inputs of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where failing inputs are copied to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    total, failed = sum(TARGETS[name][1] for name in given.only), False
    print(f"{'':18}{'inputs':>8}{'read':>8}{'refused':>8}{'failed':>8}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as place:
        for name in given.only:
            count, begun = round(given.count * TARGETS[name][1] / total), time.perf_counter()
            found = fuzz(name, count, given.seed, Path(place) / name.replace(" ", "-"), given.keep)
            seconds, wrong = time.perf_counter() - begun, count - found.read - found.refused
            print(f"{name:18}{count:8}{found.read:8}{found.refused:8}{wrong:8}{seconds:9.1f}", flush=True)
            for problem, number in found.problems.items():
                print(f"    input {number}: {problem}")
            failed |= wrong > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

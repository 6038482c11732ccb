"""Does a long run grow? Memory and open files of a training process, sampled while it runs.

    python benchmarks/soak.py                    (30 minutes of a tiny language model, then 500 iterations of CartPole)
    python benchmarks/soak.py --minutes 2

Runs are those of the command line. The slope is that of a line through the samples (resident memory over iterations)
after the first fifth, in which caches fill, with its 95 % interval; what a process leaks, it leaks an iteration.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(2046)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of the language run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        watch("tiny language model", language(folder), folder / "language", seconds=60 * given.minutes)
        watch("CartPole, 500 iterations", cartpole(folder), folder / "cartpole")


def language(folder: Path) -> Path:
    """A config: 4 layers, 256 wide, a vocabulary of 2,048; as many iterations as there is time for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=2048, bos_token_id=0, eos_token_id=0)
        )
    model.save_pretrained(folder / "tiny")
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder / "tiny")
    prompts = [" ".join(WORDS[(7 * row + place) % 2046] for place in range(4 + row % 9)) for row in range(200)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return written(
        folder / "language.yaml",
        iterations=1_000_000,
        model={"path": str(folder / "tiny"), "lora": {"r": 8}},
        prompts={"path": str(folder / "prompts.jsonl")},
        rollout={"batch_size": 16, "max_new_tokens": 16},
        rewards=[{"name": "length", "weight": 0.01}],
        critic={"kind": "reference_head"},
        update={"kind": "trpo", "max_kl": 0.001, "cg_iterations": 2, "fisher_fraction": 0.25},
        reference={"loss": 0.5},
        evaluation={"every": 50, "count": 16},
        checkpoint={"every": 10},
        completions={"every": 10, "show": 0},
        stop={"rejections": None},
        trackers=["tensorboard"],
    )


def cartpole(folder: Path) -> Path:
    return written(
        folder / "cartpole.yaml",
        extends=str(Path("configs/control/cartpole_ppo.yaml").resolve()),
        total_steps=500 * 8 * 125,
        evaluation={"every": 50, "count": 5},
        checkpoint={"every": 10},
    )


def written(path: Path, **config: object) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def watch(title: str, config: Path, run: Path, seconds: float | None = None) -> None:
    """Train, sample the process twice a second, stop it after the seconds if any, and print what it grew by."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lm_trust", "train", str(config), "--output", str(run)],
        stdout=subprocess.DEVNULL,
    )
    began: float | None = None
    samples: list[tuple[int, float, int]] = []
    while process.poll() is None:
        time.sleep(0.5)
        done = iterations(run / "metrics.jsonl")
        if done and process.poll() is None:
            began = began or time.monotonic()
            samples.append((done, resident(process.pid), len(os.listdir(f"/proc/{process.pid}/fd"))))
        if seconds is not None and began is not None and time.monotonic() - began > seconds:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if began is None:
        raise SystemExit(f"{title}: no iteration was done, exit status {process.returncode}")
    kept = samples[len(samples) // 5 :]
    fit = stats.linregress([done for done, _, _ in kept], [mib for _, mib, _ in kept])
    half = stats.t.ppf(0.975, len(kept) - 2) * fit.stderr
    minutes = (time.monotonic() - began) / 60
    print(f"{title}: {samples[-1][0]:,} iterations in {minutes:.1f} minutes, exit status {process.returncode}")
    most = max(mib for _, mib, _ in samples)
    print(f"  resident memory {kept[0][1]:.0f} MiB -> {kept[-1][1]:.0f} MiB, most {most:.0f} MiB")
    print(f"  slope {1000 * fit.slope:.2f} MiB per 1,000 iterations (95 %: within {1000 * half:.2f})")
    print(f"  open files {kept[0][2]} -> {kept[-1][2]}, most {max(files for _, _, files in kept)}", flush=True)


def iterations(metrics: Path) -> int:
    """Lines so far, by the last one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 4096))
            lines = file.read().splitlines()
        return json.loads(lines[-1])["iteration"]
    except (OSError, IndexError, ValueError):
        return 0


def resident(pid: int) -> float:
    """MiB."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()

"""Language training side by side with trl: completion tokens per second of whole iterations, and peak memory.

    python benchmarks/lm_training.py --peer-python PATH [--models tiny gpt2 smollm2-135m] [--iterations N] [--threads N]

trl's PPO was last in 1.12, which needs an environment of its own, whose interpreter is given as --peer-python:

    python -m venv peer
    grep -v '^trl==' constraints.txt > peer-constraints.txt
    peer/bin/pip install --constraint peer-constraints.txt torch 'trl==1.12.*' peft

RLOO and GRPO are those of the trl that is installed here. Without the peer environment PPO is left out.

An iteration is rollout, reward, reference and update: 64 completions of 48 tokens after 16 prompt tokens, LoRA with
r=8 on the same modules, microbatches of 16, 4 epochs of one optimizer step (TRPO: one step; PPO-trust: one step of Adam
under the hard bound), a reference KL of coefficient 0.05, float32, no gradient checkpointing. No completion ends early.
GPT-2 124M and a tiny GPT-2 (4 layers, 256 wide, a vocabulary of 2,048) have random weights from their configurations,
SmolLM2-135M has its own. Tokens are single characters, so that texts and tokens are the same thing. There are two
groups:

- beside trl's PPO, with a reward model of the policy's size. trl's value model is a third model of that size, all of
  whose weights are trained. Our critic is a head on the reference's hidden states; "own critic" is a model of its own
  with an adapter.
- beside trl's RLOO and GRPO with num_iterations=4, with a plain function for the reward and 4 completions of a prompt.

Every competitor is one process that loads once and does one iteration to warm up. Then they take turns, one iteration
each, so that a ratio compares what ran in the same minute: tokens/s are medians, and a ratio is the median of the
rounds' ratios. MiB is the most that was held while training, less what was held after loading, weights read. Where
there is a GPU everything runs on it, and its memory is what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from lm_update import GPT2  # beside this file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lm_trust.lm.pretrained import quiet
from lm_trust.lm.smollm2 import SMOLLM2, smollm2_folder

PROGRAMS = Path(__file__).with_name("programs")
sys.path.append(str(PROGRAMS))
from language_turns import CLOCKS, Settings  # noqa: E402

TARGETS = {"tiny": ("c_attn",), "gpt2": ("c_attn",), SMOLLM2: ("q_proj", "v_proj")}  # the modules with an adapter
FIRST_CHARACTER = 0xF0000  # of Unicode's private use: 65,534 characters without a meaning
PROMPTS = 640
NEVER = 12.0  # the logit of a token that is not drawn is this much lower


@dataclass(frozen=True)
class Competitor:
    """label: in the table. program, rule: what is started. peer: whether it is what ours is compared with."""

    label: str
    program: str
    rule: str
    peer: bool = False


TRL_PPO = Competitor("trl PPO", "language_trl.py", "ppo", peer=True)
WITH_REWARD_MODEL = (
    Competitor("lm-trust TRPO", "language_ours.py", "trpo"),
    Competitor("lm-trust PPO-trust", "language_ours.py", "ppo_trust"),
    Competitor("lm-trust PPO", "language_ours.py", "ppo"),
    Competitor("lm-trust PPO, own critic", "language_ours.py", "ppo_own_critic"),
    TRL_PPO,
)
WITH_FUNCTION = (
    Competitor("lm-trust TRPO", "language_ours.py", "trpo_grouped"),
    Competitor("lm-trust PPO-trust", "language_ours.py", "ppo_trust_grouped"),
    Competitor("lm-trust PPO", "language_ours.py", "ppo_grouped"),
    Competitor("trl RLOO", "language_trl.py", "rloo", peer=True),
    Competitor("trl GRPO", "language_trl.py", "grpo", peer=True),
)
GROUPS = {"ppo": WITH_REWARD_MODEL, "rloo-grpo": WITH_FUNCTION}


# Models, prompts and tokenizer


def write_models(name: str, settings: Settings) -> None:
    """The policy, the reward model and the prompts, each model with its tokenizer."""
    torch.manual_seed(0)
    policy = smollm2() if name == SMOLLM2 else random_gpt2(GPT2[name])
    policy.save_pretrained(settings.policy)
    end = policy.config.eos_token_id
    policy.config.num_labels = 1
    AutoModelForSequenceClassification.from_config(policy.config).save_pretrained(settings.reward_model)
    tokenizer = character_tokenizer(policy.config.vocab_size)
    for folder in (settings.policy, settings.reward_model):
        tokenizer.save_pretrained(folder)
    tokens = torch.randint(end, (PROMPTS, settings.prompt))
    lines = [json.dumps({"prompt": tokenizer.decode(row)}) for row in tokens.tolist()]
    Path(settings.prompts).write_text("\n".join(lines) + "\n")


def random_gpt2(sizes: dict[str, int]) -> PreTrainedModel:
    """A GPT-2 of random weights; its last token, which ends a text, is not drawn."""
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    policy = GPT2LMHeadModel(config)
    end = make_last_token_end(policy)
    with torch.no_grad():  # the last bias speaks against the end of sequence
        direction = policy.lm_head.weight[end]
        policy.transformer.ln_f.bias -= NEVER * direction / direction.norm() ** 2
    return policy


def smollm2() -> PreTrainedModel:
    """SmolLM2-135M, but that its last token, which is not drawn, ends a text."""
    policy = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    end = make_last_token_end(policy)
    with torch.no_grad():  # what all hidden states have in common speaks against the end of sequence
        hidden = policy.model(torch.randint(end, (16, 64))).last_hidden_state
        common = hidden.mean((0, 1))
        policy.get_output_embeddings().weight[end] = -NEVER * common / common.norm() ** 2
    return policy


def make_last_token_end(policy: PreTrainedModel) -> int:
    """Texts end by the last token of the vocabulary, which begins and pads them, too."""
    end = policy.config.vocab_size - 1
    for config in (policy.config, policy.generation_config):
        config.bos_token_id = config.eos_token_id = config.pad_token_id = end
    return end


def character_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A token is a character, so that decoding and encoding are each other's inverse; the last one is the end."""
    characters = [chr(FIRST_CHARACTER + index) for index in range(size)]
    core = Tokenizer(models.WordLevel({text: index for index, text in enumerate(characters)}, unk_token=characters[-1]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=characters[-1], pad_token=characters[-1])


# Taking turns


@dataclass
class Player:
    """A competitor's process, loaded and waiting."""

    competitor: Competitor
    process: subprocess.Popen
    log: Path
    loaded_mib: float = 0.0
    peak_mib: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, competitor: Competitor, python: str, settings: Settings, threads: int) -> Player:
        log = Path(settings.folder, f"{competitor.label}.log")
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        variables |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        command = [python, str(PROGRAMS / competitor.program), competitor.rule, json.dumps(asdict(settings))]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        player = cls(competitor, process, log)
        player.loaded_mib = player._report()["mib"]
        return player

    def take_turn(self, clock: str) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        report = self._report()
        self.seconds.append(report[clock])
        self.peak_mib = report["mib"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _report(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.competitor.label} stopped:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)


def compare(group: Sequence[Competitor], settings: Settings, given: argparse.Namespace) -> list[Player]:
    """All competitors of a group, after their turns."""
    players: list[Player] = []
    try:
        for competitor in group:
            python = given.peer_python if competitor == TRL_PPO else sys.executable
            players.append(Player.start(competitor, python, settings, given.threads))
        for _ in range(1 + given.iterations):  # the first is to warm up
            for player in players:
                player.take_turn(given.clock)
    finally:
        for player in players:
            player.end()
    for player in players:
        del player.seconds[0]
    return players


def print_table(model: str, players: Sequence[Player], settings: Settings) -> None:
    """One line a competitor; the ratios are to each peer of its group."""
    tokens = settings.rows * settings.steps
    peers = [player for player in players if player.competitor.peer]
    heads = "".join(f"{'speed/' + name:>12}{'memory/' + name:>13}" for name in (p.competitor.rule for p in peers))
    print(f"\n{'':12} {'':24} {'tokens/s':>9} {'least to most':>18} {'seconds':>8} {'MiB':>7}{heads}")
    for player in players:
        speeds = [tokens / seconds for seconds in player.seconds]
        added = player.peak_mib - player.loaded_mib
        ratios = ""
        for peer in peers:
            rounds = [theirs / own for own, theirs in zip(player.seconds, peer.seconds, strict=True)]
            ratios += f"{statistics.median(rounds):>11.2f}x{added / (peer.peak_mib - peer.loaded_mib):>12.2f}x"
        print(
            f"{model:12} {player.competitor.label:24} {statistics.median(speeds):>9,.1f} "
            f"{f'{min(speeds):,.1f} to {max(speeds):,.1f}':>18} {statistics.median(player.seconds):>8.2f} "
            f"{added:>7,.0f}{ratios}",
            flush=True,
        )


def peer_version(python: str) -> str | None:
    """None where there is no trl with a PPO."""
    code = "import trl, transformers, trl.experimental.ppo; print(f'trl {trl.__version__}, transformers', end=' ');"
    code += "print(transformers.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.splitlines()[-1] if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--against", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of competitors")
    parser.add_argument("--iterations", type=int, default=5, help="of each competitor, of which the median counts")
    parser.add_argument("--threads", type=int, default=1, help="of each competitor")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="interpreter with trl 1.12")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor where the machine has other work")
    parser.add_argument("--rows", type=int, default=Settings.rows, help="completions an iteration")
    given = parser.parse_args()
    peer = peer_version(given.peer_python)
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {given.threads} thread(s)"
    )
    print(f"{where}, torch {torch.__version__}, RLOO and GRPO: trl {version('trl')}")
    print(f"PPO: {peer}" if peer else f"{given.peer_python} has no trl with PPO: see --help. Ours alone:")
    for model in given.models:
        for group in given.against:
            with tempfile.TemporaryDirectory() as folder:
                microbatch = min(given.rows, Settings.microbatch)
                settings = Settings(folder, TARGETS[model], rows=given.rows, microbatch=microbatch)
                with quiet(bars=False):
                    write_models(model, settings)
                present = [one for one in GROUPS[group] if peer or one != TRL_PPO]
                print_table(model, compare(present, settings, given), settings)


if __name__ == "__main__":
    main()

"""Tiny language runs by the command line, in this process: a model, prompts and a reward in a folder of their own."""

import json

from tiny_models import write_model

from lm_trust.cli import main
from lm_trust.training.config_yaml import write_yaml

REWARDS = """
def vowels(prompts, completions):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]

def length(prompts, completions):
    return [float(len(text)) for text in completions]

def one(prompts, completions):
    return [1.0] * len(completions)
"""
LANGUAGE = {
    "iterations": 4,
    "model": {"path": "llama", "lora": {"r": 2, "alpha": 8}},
    "prompts": {"path": "prompts.jsonl", "heldout_fraction": 0.3},
    "rollout": {"batch_size": 6, "max_new_tokens": 4},
    "rewards": [{"name": "tiny_run_rewards:vowels"}],
    "critic": {"kind": "reference_head", "hidden": [8], "epochs": 1, "minibatches": 2},
    "update": {"kind": "trpo", "max_kl": 0.05, "cg_iterations": 3},
    "evaluation": {"every": 0, "count": 2},
    "checkpoint": {"every": 0},
    "trackers": [],
}


def prepare(folder):
    """Write what the runs need."""
    write_model(folder / "llama", "llama")
    (folder / "tiny_run_rewards.py").write_text(REWARDS)
    write_prompts(folder)


def write_prompts(folder):
    """Twelve of them, prompts.jsonl."""
    prompts = [f"{start} film{' very' * number}" for start in ("the", "a", "I saw the") for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def write_config(name="run", **sections):
    """A config in the working directory; its run goes to a folder of that name."""
    with open(f"{name}.yaml", "w", encoding="utf-8") as file:
        file.write(write_yaml(LANGUAGE | sections | {"output": name}))
    return f"{name}.yaml"


def train(name="run", *options, **sections):
    """Run it from its start; returns the exit status."""
    return main(["train", write_config(name, **sections), *options])


def metrics(run):
    """The lines of its metrics.jsonl, which must be JSON as everyone reads it: no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} in metrics.jsonl")

    with open(f"{run}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line, parse_constant=refuse) for line in file]


def untimed(lines):
    """Lines of metrics but for the time that they took."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]

"""Runs of both worlds that take about a second: a tiny language model, and CartPole."""

import json
from pathlib import Path

import pytest
from tiny_models import write_model

from lm_trust.cli import main
from lm_trust.training.config_yaml import read_yaml, write_yaml

TIMES = {"rollout_seconds", "update_seconds", "iteration_seconds", "steps_per_second"}
PROMPTS = ["the film", "a", "I saw the plot and it was", "we never liked", "it is very very bright", "but the plot"]

CONTROL = """
total_steps: 320
environment: {id: CartPole-v1, count: 4}
policy: {hidden: [8]}
rollout: {steps: 20}
normalise: {observations: true, rewards: true}
critic: {kind: mlp, hidden: [8], epochs: 2, minibatches: 2}
update: UPDATE
evaluation: {every: 2, count: 3}
checkpoint: {every: 2, keep_last: 2}
"""

LANGUAGE = """
iterations: 4
model: {path: MODEL, lora: {r: 2, alpha: 4}}
prompts: {path: PROMPTS, heldout_fraction: 0.34}
rollout: {batch_size: 8, max_new_tokens: 5, microbatch_size: 4}
rewards: [{name: vader, dense: true}]
advantage: {kind: gae, gamma: 1.0, lam: 0.9}
critic: {kind: reference_head, hidden: [8], epochs: 2, minibatches: 2}
update: UPDATE
reference: {loss: 0.05, penalty: 0.02}
evaluation: {every: 2, count: 4}
checkpoint: {every: 2, keep_last: 2}
"""

UPDATES = {
    "trpo": "{kind: trpo, max_kl: 0.02, cg_iterations: 3, fisher_fraction: 0.5}",
    "ppo_clip": "{kind: ppo_clip, epochs: 2, minibatches: 2, learning_rate: 0.01, anneal: false}",
}


class Runs:
    """Writes configurations under a folder, runs the command line on them and reads what they leave."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.prompts = folder / "prompts.jsonl"
        self.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))

    def config(self, world: str, rule: str = "trpo", **changes) -> Path:
        """A configuration file; changes replace whole sections."""
        text = {"control": CONTROL, "language": LANGUAGE}[world].replace("UPDATE", UPDATES[rule])
        tree = read_yaml(text.replace("MODEL", str(self.model)).replace("PROMPTS", str(self.prompts)))
        path = self.folder / f"{world}_{rule}.yaml"
        path.write_text(write_yaml(tree | changes))
        return path

    def train(self, *arguments: object) -> int:
        return main(["train", *map(str, arguments)])

    def metrics(self, run: Path, *, timed: bool = False) -> list[dict]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return lines if timed else [{key: line[key] for key in line.keys() - TIMES} for line in lines]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture
def runs(tmp_path, tiny_model):
    return Runs(tmp_path, tiny_model)

"""Whole runs of a tiny language model under a budget: kept on fresh rollouts, used, needed, and resumed exactly."""

import copy
import statistics

import pytest
import torch
from tiny_models import write_model

from lm_trust.lm.loading import load_policy, load_tokenizer
from lm_trust.lm.prompts import Prompts
from lm_trust.lm.rewards import WeightedRewards
from lm_trust.lm.rollout import LanguageTask, PromptSet
from lm_trust.lm.saving import save_adapter
from lm_trust.training.config_language import AdaptivePenalty
from lm_trust.training.config_learning import ReturnsToGo
from lm_trust.training.critic import NoCritic
from lm_trust.training.trainer import Trainer
from lm_trust.updates import TRPO, PPOClip, PPOPenalty

TEXTS = ["the film", "a", "I saw the plot and it was", "we never liked", "it is very very bright", "but the plot"]
GOOD, BAD = ("good", "bright", "liked"), ("bad", "dull", "hated")
ADAM = {"epochs": 4, "minibatches": 2, "learning_rate": 5e-3}
RULES = {
    "trpo": lambda budget: TRPO(max_kl=0.04, damping=0.03, cg_iterations=4, reference_budget=budget),
    "ppo_clip": lambda budget: PPOClip(**ADAM, reference_budget=budget),
    "ppo_penalty": lambda budget: PPOPenalty(**ADAM, target_kl=0.02, reference_budget=budget),
}


def warmth(prompts, completions, **_):
    """Kind words less unkind ones."""
    words = [text.split() for text in completions]
    return [sum(word in GOOD for word in one) - sum(word in BAD for word in one) for one in words]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: str(write_model(root / name, name)) for name in ("gpt2", "llama")}


def trainer_of(folder, update, *, batch_size=64, adapter=None, iterations=16, **settings):
    tokenizer, policy = load_tokenizer(folder), load_policy(folder, r=4, alpha=8, adapter=adapter)
    prompts = Prompts(TEXTS, {}, "made.jsonl", "line", list(range(1, len(TEXTS) + 1)))
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    task = LanguageTask(
        tokenizer,
        WeightedRewards([(warmth, 1.0)]),
        training=PromptSet(prompts, ids),
        heldout=PromptSet(prompts, ids),
        batch_size=batch_size,
        max_new_tokens=10,
        with_features=False,
    )
    return Trainer(policy, task, NoCritic(), update, ReturnsToGo(gamma=1.0), iterations=iterations, **settings)


def fresh_reference_kl(trainer):
    """Of 384 completions that no update has seen, nats a sequence, from dense logits."""
    task, generator = trainer.task, torch.Generator().manual_seed(77)
    rows = torch.arange(384) % len(TEXTS)
    completions = task.sample(trainer.policy, task.heldout, rows, generator)
    with torch.no_grad():
        own = trainer.policy.distribution(completions.observations).dense().log_probs
        with trainer.policy.as_reference():
            other = trainer.policy.distribution(completions.observations).dense().log_probs
    kl = (own.exp() * (own - other)).sum(-1)
    return torch.where(completions.mask, kl, 0.0).sum(-1).mean().item()


@pytest.mark.parametrize("architecture,rule", [("gpt2", "trpo"), ("gpt2", "ppo_clip"), ("llama", "ppo_penalty")])
def test_the_budget_holds_on_fresh_rollouts_while_the_reward_rises(folders, architecture, rule):
    budget = 1.5
    trainer = trainer_of(folders[architecture], RULES[rule](budget))
    lines = [trainer.iterate() for _ in range(trainer.iterations)]
    # On the update's own batch it is a hard bound.
    for line in lines:
        assert line["reference_kl_after"] <= budget or line["reference_kl_after"] <= line["reference_kl"]
    late = lines[8:]
    measured = [line["reference_kl"] for line in late]
    assert 0.75 * budget < statistics.mean(measured) < 1.05 * budget
    assert 0.6 * budget < fresh_reference_kl(trainer) < 1.1 * budget
    first, last = (statistics.mean(line["reward_mean"] for line in part) for part in (lines[:3], lines[-5:]))
    assert last > first + 0.5
    # A run without it goes far beyond.
    free = trainer_of(folders[architecture], RULES[rule](None))
    for _ in range(12):
        free.iterate()
    assert fresh_reference_kl(free) > 2 * budget


ADAPTIVE = {"reference_penalty": 0.2, "adaptive_penalty": AdaptivePenalty(target=0.2, horizon=64)}
RESUMED = {
    "trpo": (lambda: TRPO(max_kl=0.04, reference_budget=0.2), {}),
    "ppo_clip": (lambda: PPOClip(**ADAM, reference_budget=0.2), {}),
    "adaptive penalty": (lambda: PPOClip(**ADAM), ADAPTIVE),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_run_that_was_never_stopped(folders, case):
    rule, settings = RESUMED[case]
    whole, other = (trainer_of(folders["gpt2"], rule(), batch_size=12, **settings) for _ in range(2))
    for _ in range(4):
        last = whole.iterate()
    state = copy.deepcopy(whole.state_dict())
    # There is something to be restored.
    assert case != "ppo_clip" or last["reference_multiplier"] > 0
    assert case != "adaptive penalty" or state["reference_penalty"] != 0.2
    other.load_state_dict(state)
    for _ in range(3):
        one, same = whole.iterate(), other.iterate()
        assert {key: one[key] for key in one if "second" not in key} == {
            key: same[key] for key in same if "second" not in key
        }
    for left, right in zip(whole.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_reference_is_the_start_of_a_run_that_starts_from_an_adapter(folders, tmp_path):
    """After updates too, and in a run that goes on from a state: the rollout's reference is the adapter's own model."""
    first = trainer_of(folders["gpt2"], RULES["ppo_clip"](None))
    for _ in range(3):
        first.iterate()
    save_adapter(first.policy, tmp_path / "sft")
    start = load_policy(folders["gpt2"], adapter=tmp_path / "sft")
    trainer = trainer_of(folders["gpt2"], RULES["ppo_clip"](2.0), adapter=tmp_path / "sft")
    assert trainer.iterate()["reference_kl"] == pytest.approx(0, abs=1e-6)
    for _ in range(3):
        trainer.iterate()
    resumed = trainer_of(folders["gpt2"], RULES["ppo_clip"](2.0), adapter=tmp_path / "sft")
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for one in (trainer, resumed):
        rollout = one.task.collect(one.policy)
        with torch.no_grad():
            true = start.distribution(rollout.observations).dense().log_probs
            own = one.policy.distribution(rollout.observations).dense().log_probs
            with start.as_base():
                base = start.distribution(rollout.observations).dense().log_probs
        found = rollout.reference.dense().log_probs
        torch.testing.assert_close(found[rollout.mask], true[rollout.mask], rtol=0, atol=1e-5)
        # It is neither the base nor the policy as it is now.
        assert (base - true)[rollout.mask].abs().max() > 0.05
        assert (own - true)[rollout.mask].abs().max() > 0.05

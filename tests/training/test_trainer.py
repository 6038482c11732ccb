"""The loop itself, on a world of a few numbers: its order, its batch, its penalty and its state."""

import copy
import time

import pytest
import torch
from torch import nn

from lm_trust.core import Categorical
from lm_trust.core.batch import Rollout
from lm_trust.errors import UserError
from lm_trust.training import trainer as module
from lm_trust.training.config_language import AdaptivePenalty
from lm_trust.training.config_learning import Gae, ReturnsToGo
from lm_trust.training.critic import NoCritic
from lm_trust.training.trainer import Trainer
from lm_trust.updates import TRPO, PPOClip

B, T, A = 6, 4, 3
LENGTHS = torch.tensor([4, 2, 1, 3, 4, 2])


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(2, A, generator=torch.Generator().manual_seed(0)).double())
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("made_anew", torch.zeros(1), persistent=False)

    def distribution(self, observations):
        return Categorical(observations @ self.weight)


class World:
    """Rewards an action for its number; observations and actions come from a generator that is its whole state."""

    def __init__(self, *, whole_sequences=True, fail_at=None):
        self.steps, self.calls, self.fail_at = 0, [], fail_at
        self.whole_sequences = whole_sequences
        self.generator = torch.Generator().manual_seed(1)

    def collect(self, policy):
        observations = torch.randn(B, T, 2, generator=self.generator, dtype=torch.float64)
        self.steps += int(LENGTHS.sum())
        if self.fail_at == len(self.calls):
            raise UserError("the world ended")
        self.calls.append("collect")
        actions = policy.distribution(observations).sample(self.generator)
        last = torch.arange(T) == (LENGTHS - 1).unsqueeze(-1)
        mask = torch.arange(T) < LENGTHS.unsqueeze(-1)
        return Rollout(
            observations=observations,
            actions=actions,
            rewards=torch.where(mask, actions.double(), 0.0),
            terminated=last,
            truncated=torch.zeros_like(last),
            mask=mask,
            reference=Categorical(observations @ torch.ones(2, A, dtype=torch.float64) * torch.arange(A)),
            whole_sequences=self.whole_sequences,
            metrics={"reward_mean": 1.5},
        )

    def after_update(self, policy, rollout):
        self.calls.append("after_update")

    def state_dict(self):
        return {"steps": self.steps, "generator": self.generator.get_state()}

    def joined(self, states):
        (state,) = states
        return state

    def load_state_dict(self, state):
        self.steps = state["steps"]
        self.generator.set_state(state["generator"])


def make(world=None, update=None, advantage=None, **settings):
    world = world or World()
    advantage = advantage or ReturnsToGo(gamma=1.0, whiten=False)
    return Trainer(Policy(), world, NoCritic(), update or TRPO(), advantage, iterations=10, **settings)


def test_an_iteration_runs_in_its_order(monkeypatch):
    calls = []
    trainer = make()
    for name, owner, method in (
        ("collect", trainer.task, "collect"),
        ("values", trainer.critic, "values"),
        ("step", trainer.update, "step"),
        ("start_fit", trainer.critic, "start_fit"),
        ("after_update", trainer.task, "after_update"),
    ):
        original = getattr(owner, method)

        def call(*arguments, name=name, original=original):
            calls.append(name)
            result = original(*arguments)
            return (lambda: [calls.append("fitted"), result()][1]) if name == "start_fit" else result

        monkeypatch.setattr(owner, method, call, raising=True)
    line = trainer.iterate()
    assert calls == ["collect", "values", "start_fit", "step", "fitted", "after_update"]
    assert line["iteration"] == trainer.iteration == 1
    assert line["steps"] == LENGTHS.sum()
    assert line["reward_mean"] == 1.5 and line["value_loss"] is None and line["accepted"]
    assert line["iteration_seconds"] >= line["update_seconds"] + line["rollout_seconds"] - 1e-6


def test_the_time_of_the_step_is_that_of_the_update_rule_alone(monkeypatch):
    trainer = make()
    step, after = trainer.update.step, trainer.task.after_update
    monkeypatch.setattr(trainer.update, "step", lambda *given: [time.sleep(0.05), step(*given)][1])
    monkeypatch.setattr(trainer.task, "after_update", lambda *given: [time.sleep(0.2), after(*given)][1])
    line = trainer.iterate()
    assert 0.05 <= line["step_seconds"] <= line["update_seconds"] - 0.2


@pytest.mark.parametrize("whole_sequences", [True, False])
def test_the_batch_is_of_sequences_or_of_single_steps(whole_sequences, monkeypatch):
    trainer = make(World(whole_sequences=whole_sequences))
    seen = []
    step = trainer.update.step
    monkeypatch.setattr(trainer.update, "step", lambda policy, batch: seen.append(batch) or step(policy, batch))
    trainer.iterate()
    trainer.iterate()
    (first, second), shape = seen, (B, T) if whole_sequences else (int(LENGTHS.sum()),)
    assert first.actions.shape == first.old_log_prob.shape == first.advantages.shape == shape
    assert first.mask.shape == shape if whole_sequences else first.mask is None
    assert (first.progress, second.progress) == (0.0, 0.1)
    assert not whole_sequences or first.mask.sum() == LENGTHS.sum()
    assert not first.old_log_prob.requires_grad and not any(item.requires_grad for item in first.old.parameters)


def test_the_penalty_is_the_log_ratio_of_each_real_token(monkeypatch):
    trainer = make(reference_penalty=0.3)
    seen = []
    estimate = module.estimate_advantages

    def spy(config, rollout, rewards, values, next_values):
        seen.append((rollout, rewards, trainer.policy.weight.detach().clone()))
        return estimate(config, rollout, rewards, values, next_values)

    monkeypatch.setattr(module, "estimate_advantages", spy)
    line = trainer.iterate()
    ((rollout, rewards, weight),) = seen
    kl = 0.0
    for row in range(B):
        for step in range(int(LENGTHS[row])):
            logits = rollout.observations[row, step] @ weight
            reference = rollout.observations[row, step].sum() * torch.arange(A)
            own, other = logits.log_softmax(-1), reference.log_softmax(-1)
            action = rollout.actions[row, step]
            expected = action.item() - 0.3 * (own[action] - other[action]).item()
            assert rewards[row, step].item() == pytest.approx(expected, abs=1e-12)
            kl += (own.exp() * (own - other)).sum().item() / B
    assert not rewards[~rollout.mask].any()
    assert line["reference_kl"] == pytest.approx(kl, abs=1e-12)


def test_without_a_penalty_the_rewards_are_untouched(monkeypatch):
    trainer, seen = make(World(whole_sequences=False)), []
    estimate = module.estimate_advantages
    monkeypatch.setattr(module, "estimate_advantages", lambda *given: seen.append(given) or estimate(*given))
    trainer.iterate()
    assert seen[0][2] is seen[0][1].rewards


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("broken", ["successor", "sum"])
def test_nothing_learns_from_returns_that_are_not_finite(broken, whiten, monkeypatch):
    """Rewards and values are finite; a successor's value or the sum of large rewards is not."""
    trainer = make(advantage=Gae(gamma=0.9, lam=0.95, whiten=whiten))
    collect = trainer.task.collect

    def spoilt(policy):
        rollout = collect(policy)
        rollout.truncated, rollout.terminated = rollout.terminated, rollout.truncated
        if broken == "sum":
            rollout.rewards[4] = 1.5e308
        return rollout

    successors = torch.zeros(B, T, dtype=torch.float64)
    if broken == "successor":
        successors[4, 3] = torch.nan
    monkeypatch.setattr(trainer.task, "collect", spoilt)
    monkeypatch.setattr(trainer.critic, "values", lambda rollout: (torch.zeros(B, T).double(), successors))
    monkeypatch.setattr(trainer.critic, "start_fit", None)
    monkeypatch.setattr(trainer.task, "describe", lambda *place: "row {1} step {2}".format(*place), raising=False)
    line = trainer.iterate()
    value = {"successor": "nan", "sum": "inf"}[broken]
    assert (line["accepted"], line["reason"]) == (False, "non_finite")
    assert line["offender"] == f"the return is {value} at row 4 step 0"


RULES = {"trpo": TRPO, "ppo_clip": lambda: PPOClip(learning_rate=0.01, minibatches=2)}


@pytest.mark.parametrize("rule", RULES)
def test_a_restored_trainer_goes_on_bit_for_bit(rule):
    whole = make(World(whole_sequences=False), RULES[rule]())
    for _ in range(2):
        whole.iterate()
    whole.policy.kept.fill_(7)
    whole.policy.made_anew.fill_(7)
    state = copy.deepcopy(whole.state_dict())  # as on disk: an optimizer's own state is not a copy
    other = make(World(whole_sequences=False), RULES[rule]())
    other.load_state_dict(state)
    assert other.iteration == 2
    assert other.policy.kept == 7 and other.policy.made_anew == 0
    assert "made_anew" not in state["buffers"] and len(state["policy"]) == 1  # what is frozen is not written
    for _ in range(2):
        one, same = whole.iterate(), other.iterate()
        assert {key: one[key] for key in one if "second" not in key} == {
            key: same[key] for key in same if "second" not in key
        }
    assert torch.equal(whole.policy.weight, other.policy.weight)
    assert torch.equal(whole.task.generator.get_state(), other.task.generator.get_state())


def test_the_policy_in_the_state_is_a_copy():
    trainer = make(World(whole_sequences=False))
    state = trainer.state_dict()
    before = state["policy"][0].clone()
    trainer.iterate()
    assert torch.equal(state["policy"][0], before) and not torch.equal(trainer.policy.weight, before)


def test_after_a_failed_collect_the_state_is_from_before_it():
    trainer = make(World(whole_sequences=False, fail_at=2))
    trainer.iterate()
    assert not trainer.collecting
    before = trainer.state_dict()
    with pytest.raises(UserError):
        trainer.iterate()
    assert trainer.collecting and trainer.task.steps != before["task"]["steps"]
    after = trainer.state_dict()
    assert after["task"]["steps"] == before["task"]["steps"] and after["iteration"] == 1
    assert torch.equal(after["task"]["generator"], before["task"]["generator"])
    assert torch.equal(after["policy"][0], before["policy"][0])


def test_a_state_of_another_policy_is_refused():
    trainer = make()
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="zip"):
        trainer.load_state_dict(state | {"policy": []})
    with pytest.raises(RuntimeError):
        trainer.load_state_dict(state | {"policy": [torch.zeros(5)]})


def test_an_adaptive_penalty_is_used_logged_and_then_adapted(monkeypatch):
    config = AdaptivePenalty(target=0.3, horizon=40)
    trainer = make(reference_penalty=0.5, adaptive_penalty=config)
    used, estimate = [], module.estimate_advantages

    def spy(advantage, rollout, rewards, *values):
        own = trainer.policy.distribution(rollout.observations).log_prob(rollout.actions)
        ratio = (own - rollout.reference.log_prob(rollout.actions)).detach()[rollout.mask]
        used.append(((rollout.rewards - rewards)[rollout.mask] / ratio).median().item())
        return estimate(advantage, rollout, rewards, *values)

    monkeypatch.setattr(module, "estimate_advantages", spy)
    lines = [trainer.iterate() for _ in range(4)]
    expected = 0.5
    for line, coefficient in zip(lines, used, strict=True):
        assert line["reference_penalty"] == pytest.approx(expected, rel=1e-12)
        assert coefficient == pytest.approx(expected, rel=1e-9)
        error = min(0.2, max(-0.2, line["reference_kl"] / 0.3 - 1))
        expected *= 1 + error * B / 40
    assert len({line["reference_penalty"] for line in lines}) == 4
    assert trainer.reference_penalty == pytest.approx(expected, rel=1e-12)


def test_a_restored_trainer_goes_on_with_the_adapted_penalty():
    config = AdaptivePenalty(target=0.3, horizon=40)
    whole, other = (make(World(), reference_penalty=0.5, adaptive_penalty=config) for _ in range(2))
    for _ in range(2):
        whole.iterate()
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert other.reference_penalty == whole.reference_penalty != 0.5
    assert whole.iterate()["reference_penalty"] == other.iterate()["reference_penalty"]
    assert torch.equal(whole.policy.weight, other.policy.weight)
    # A fixed one is the configuration's, also where the state is of a run that had another.
    fixed = make(World(), reference_penalty=0.1)
    fixed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert fixed.reference_penalty == 0.1

"""The critic of whole sequences: its losses by hand, whole rows as minibatches, and when its network is at work."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_model
from tiny_runs import metrics, untimed, write_prompts
from torch import nn
from transformers import AutoTokenizer

from lm_trust.cli import main
from lm_trust.core.batch import Rollout
from lm_trust.lm import loading
from lm_trust.training.build import build_world
from lm_trust.training.checkpoint import load_checkpoint, save_checkpoint
from lm_trust.training.config_file import load_config
from lm_trust.training.config_yaml import write_yaml
from lm_trust.training.critic import ValueCritic
from lm_trust.training.sequence_critic import SequenceCritic

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, False, False]])
# The state before each of three steps, and the last one.
STATES = torch.tensor([[1.0, 2, 3, 4], [4, 5, 6, 7], [0, 1, 0, 2], [3, 3, 3, 3]], dtype=torch.float64)
RETURNS = torch.tensor([[1.0, 0, 2], [3, 0, 0], [1, 2, 0], [1, 0, 0]], dtype=torch.float64)


class Line(nn.Module):
    """v = w x; trainable only while it is active."""

    def __init__(self, size=()):
        super().__init__()
        self.weight = nn.Parameter(torch.full(size, 0.5, dtype=torch.float64), requires_grad=False)
        self.frozen = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)
        self.seen = []

    def forward(self, states):
        assert self.weight.requires_grad or not torch.is_grad_enabled()
        self.seen.append(states)
        return self.weight * self.frozen * states

    @contextmanager
    def active(self):
        self.weight.requires_grad_(True)
        try:
            yield
        finally:
            self.weight.requires_grad_(False)


def rollout_of(states=STATES):
    ended = torch.zeros_like(MASK)
    return Rollout(states, MASK.long(), RETURNS, ended, ended, MASK, whole_sequences=True)


def fit(critic, returns=RETURNS, states=STATES, progress=0.0):
    rollout = rollout_of(states)
    values, _ = critic.values(rollout)
    return critic.start_fit(rollout, returns, values, progress)()


def test_the_numbers_by_hand():
    # Too small a step to matter: the loss is that of v = x / 2 at the seven valid steps.
    fitted = fit(SequenceCritic(Line(), learning_rate=1e-12, epochs=2, minibatches=2))
    x, returns = np.array([1, 2, 3, 4, 0, 1, 3]), np.array([1, 0, 2, 3, 1, 2, 1])
    errors = x / 2 - returns
    assert fitted["value_loss"] == pytest.approx(0.5 * np.mean(errors**2))
    assert fitted["explained_variance"] == pytest.approx(1 - np.var(errors) / np.var(returns))


def test_the_gradient_is_that_of_the_mean_over_valid_steps():
    critic = SequenceCritic(Line())
    with critic.network.active():
        total = critic._differentiate(STATES, RETURNS, torch.zeros_like(RETURNS), MASK)
    x, returns = np.array([1, 2, 3, 4, 0, 1, 3]), np.array([1, 0, 2, 3, 1, 2, 1])
    assert critic.network.weight.grad.item() == pytest.approx(np.mean((x / 2 - returns) * x))
    assert total == pytest.approx(0.5 * np.sum((x / 2 - returns) ** 2))


def test_values_of_states_and_successors():
    values, next_values = SequenceCritic(Line()).values(rollout_of())
    assert torch.equal(values, 0.5 * STATES[:, :-1])
    assert torch.equal(next_values, 0.5 * STATES[:, 1:])
    assert not values.requires_grad


def test_it_trains_what_its_network_trains_and_only_while_active():
    network = Line()
    critic = SequenceCritic(network, learning_rate=0.1)
    assert critic.state_dict()["network"].keys() == {"weight"}
    fit(critic)
    assert network.weight != 0.5
    assert network.frozen == 1
    assert not network.weight.requires_grad
    assert network.weight.grad is None


def test_a_minibatch_is_whole_rows_and_a_pass_is_all_of_them():
    network = Line()
    critic = SequenceCritic(network, epochs=3, minibatches=2)
    rollout = rollout_of()
    critic.fit(rollout, RETURNS, torch.zeros_like(RETURNS))
    assert [len(states) for states in network.seen] == [2] * 6
    passes = [torch.cat(network.seen[index : index + 2]) for index in (0, 2, 4)]
    for states in passes:
        assert sorted(states.tolist()) == sorted(STATES.tolist())
    assert not all(torch.equal(states, passes[0]) for states in passes)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_microbatches_change_nothing(size):
    """The rows hold different numbers of valid steps."""
    parts = SequenceCritic(Line(), learning_rate=0.1, microbatch_size=size, minibatches=1)
    whole = SequenceCritic(Line(), learning_rate=0.1, minibatches=1)
    assert fit(parts)["value_loss"] == pytest.approx(fit(whole)["value_loss"], abs=1e-12)
    torch.testing.assert_close(parts.network.weight, whole.network.weight, rtol=0, atol=1e-12)
    assert max(map(len, parts.network.seen[1:])) == size  # the first is the values' own pass


def test_masked_steps_may_hold_any_return():
    clean, dirty = SequenceCritic(Line(), learning_rate=0.1), SequenceCritic(Line(), learning_rate=0.1)
    assert fit(dirty, RETURNS.where(MASK, torch.nan)) == fit(clean)
    assert torch.equal(clean.network.weight, dirty.network.weight)


def test_a_clipped_value_stops_where_the_clip_ends():
    settings = {"learning_rate": 0.05, "epochs": 200, "minibatches": 1}
    free, held = SequenceCritic(Line(), **settings), SequenceCritic(Line(), clip=0.1, **settings)
    returns = 10 * STATES[:, :-1]
    fit(free, returns)
    fit(held, returns)
    assert free.network.weight > 5
    assert 0.5 < held.network.weight < 1.5


def test_the_learning_rate_falls_with_the_training():
    moves = []
    for progress in (0.0, 0.5, 1.0):
        critic = SequenceCritic(Line(), learning_rate=0.1, anneal=True, epochs=1, minibatches=1)
        fit(critic, progress=progress)
        moves.append(abs(critic.network.weight.item() - 0.5))
    assert moves == pytest.approx([0.1, 0.05, 0.0], rel=1e-3)


def test_weight_decay_pulls_towards_zero():
    plain, decayed = (SequenceCritic(Line(), learning_rate=0.01, weight_decay=decay) for decay in (0.0, 5.0))
    fit(plain)
    fit(decayed)
    assert decayed.network.weight < plain.network.weight


def test_it_agrees_with_the_critic_of_single_steps():
    """One minibatch of all rows is one minibatch of all steps."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, inputs):
            return self.weight * inputs

    settings = {"learning_rate": 0.1, "epochs": 3, "minibatches": 1, "clip": 0.2, "weight_decay": 0.1}
    sequences, steps = SequenceCritic(Line(), **settings), ValueCritic(Steps(), **settings)
    rollout = rollout_of()
    rollout.critic_inputs, rollout.next_critic_inputs = STATES[:, :-1], STATES[:, 1:]
    for _ in range(2):
        values, next_values = steps.values(rollout)
        for one, other in zip(sequences.values(rollout), (values, next_values), strict=True):
            torch.testing.assert_close(one, other)
        found, expected = (critic.fit(rollout, RETURNS, values) for critic in (sequences, steps))
        assert found == pytest.approx(expected)
    torch.testing.assert_close(sequences.network.weight, steps.network.weight)


def test_a_restored_critic_goes_on_bit_for_bit_and_another_seed_shuffles_otherwise(tmp_path):
    one, same, other = (SequenceCritic(Line(), learning_rate=0.1, seed=seed) for seed in (1, 2, 3))
    fit(one)
    save_checkpoint(tmp_path, one.state_dict(), iteration=1, keep_last=1)
    same.load_state_dict(load_checkpoint(tmp_path))
    assert fit(one) == fit(same)
    assert torch.equal(one.network.weight, same.network.weight)
    fit(other)
    fit(other)
    assert not torch.equal(one.network.weight, other.network.weight)


def test_a_state_is_a_copy():
    critic = SequenceCritic(Line(), learning_rate=0.1)
    state = critic.state_dict()
    fit(critic)
    assert state["network"]["weight"] == 0.5


def test_another_networks_state_is_refused():
    critic = SequenceCritic(Line())
    state = SequenceCritic(Line((1,))).state_dict()  # of a shape that could be broadcast
    with pytest.raises(ValueError, match="other names or shapes"):
        critic.load_state_dict(state)
    with pytest.raises(ValueError, match="other names or shapes"):
        critic.load_state_dict(critic.state_dict() | {"network": {}})


# In a run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, prompts, and a config that critics are put into."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "tiny", "llama")
    write_prompts(folder)
    return folder


def write_config(place, name, critic):
    config = {
        "output": str(place / name),
        "iterations": 3,
        "model": {"path": str(place / "tiny"), "lora": {"r": 2}},
        "prompts": {"path": str(place / "prompts.jsonl"), "heldout_fraction": 0.3},
        "rollout": {"batch_size": 8, "max_new_tokens": 4, "microbatch_size": 3},
        "rewards": [{"name": "vader"}],
        "critic": critic,
        "update": {"kind": "ppo_clip", "epochs": 1, "minibatches": 2},
        "evaluation": {"every": 0, "count": 4},
        "checkpoint": {"every": 1, "keep_last": 9},
        "trackers": [],
    }
    path = place / f"{name}.yaml"
    path.write_text(write_yaml(config))
    return path


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_run_with_it_goes_on_exactly_and_saves_the_policy_alone(place, kind):
    config = write_config(place, kind, {"kind": kind, "r": 3, "learning_rate": 0.01, "epochs": 3, "minibatches": 2})
    assert main(["train", str(config)]) == 0
    run = place / kind
    whole = untimed(metrics(run))
    assert [line["iteration"] for line in whole] == [1, 2, 3]
    assert all(line["value_loss"] > 0 and line["explained_variance"] is not None for line in whole)
    last = load_checkpoint(run / "checkpoints")
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(last["policy"])
    assert {min(weight.shape) for weight in saved.values()} == {2}
    lora = {name: weight for name, weight in last["critic"]["network"].items() if not name.startswith("head.")}
    assert {min(weight.shape) for weight in lora.values()} == {3}
    assert not (run / "adapter" / "critic").exists()
    optimizer = last["critic"]["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == 0.01
    assert optimizer["state"][0]["step"] == 3 * 3 * 2

    for iteration in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"{iteration:08d}")
    assert main(["train", "--resume", str(run)]) == 0
    assert untimed(metrics(run)) == whole
    again = load_checkpoint(run / "checkpoints")["critic"]["network"]
    assert all(torch.equal(again[name], weight) for name, weight in last["critic"]["network"].items())


@pytest.mark.parametrize("own", [True, False])
def test_a_critics_model_is_of_its_own_revision(place, monkeypatch, own):
    asked = []

    def listen(name):
        asked_for = getattr(loading, name)

        def heard(*given, **settings):
            path = next(each for each in given if isinstance(each, str))
            asked.append((name, Path(path).name, settings["revision"]))
            return asked_for(*given, **settings)

        monkeypatch.setattr(loading, name, heard)

    listen("source_of")  # of tokenizer and configuration
    listen("load_model")
    write_model(place / "another", "llama")
    critic = {"kind": "model", "path": str(place / "another"), "revision": "step7"} if own else {"kind": "model"}
    path = write_config(place, "revised", critic)
    world = build_world(load_config(path, [("model.revision", "step9")]))
    world.trainer.task.close()
    policys, critics = ("tiny", "step9"), ("another", "step7") if own else ("tiny", "step9")
    assert [each[1:] for each in asked if each[0] == "load_model"] == [policys, critics]
    assert {each[1:] for each in asked} == {policys, critics}


def test_a_critics_model_must_be_of_the_same_tokenizer(place, capsys):
    write_model(place / "other", "llama", own_pad=True)
    tokenizer = AutoTokenizer.from_pretrained(place / "other")
    tokenizer.add_tokens(["splendid"])
    tokenizer.save_pretrained(place / "other")
    config = write_config(place, "mixed", {"kind": "model", "path": str(place / "other")})
    assert main(["train", str(config)]) != 0
    message = capsys.readouterr().err
    assert "critic.path: the tokenizer of" in message
    assert "Traceback" not in message

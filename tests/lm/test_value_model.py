"""The critics that see tokens: what they read, what they learn, and that the policy does not notice them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lm_trust.core.parameters import trainable_parameters
from lm_trust.errors import UserError
from lm_trust.lm.loading import load_policy, load_tokenizer
from lm_trust.lm.policy import TokenObservations
from lm_trust.lm.saving import load_trained, save_adapter
from lm_trust.lm.value_model import CRITIC_ADAPTER, adapter_critic, common_context, model_critic
from lm_trust.training.checkpoint import load_checkpoint, save_checkpoint
from lm_trust.training.config_learning import Gae
from lm_trust.training.estimation import estimate_advantages
from lm_trust.training.sequence_critic import SequenceCritic
from lm_trust.training.trainer import Trainer
from lm_trust.updates import TRPO

KINDS = ["adapter", "model"]
one_architecture = pytest.mark.parametrize("architecture", ["gpt2"])


@pytest.fixture
def make_network(model_folder):
    """A critic's network of either kind, beside the policy, in its precision."""

    def make(kind, policy, *, r=4, **settings):
        if kind == "adapter":
            return adapter_critic(policy, r=r, **settings)
        return model_critic(str(model_folder), r=r, **settings).to(next(policy.parameters()).dtype)

    return make


@pytest.fixture
def policy_with_reference(make_policy, request, tmp_path):
    """A policy in float32, moved away from its reference: the base, or a frozen copy of an adapter."""
    if request.param == "base":
        return make_policy(dtype=torch.float32)
    save_adapter(make_policy(dtype=torch.float32), tmp_path / "start")
    return make_policy(dtype=torch.float32, adapter=tmp_path / "start")


both_references = pytest.mark.parametrize("policy_with_reference", ["base", "adapter"], indirect=True)


@torch.no_grad()
def logits(policy, observations):
    """Of the policy, its reference and the base."""
    found = [policy.distribution(observations).dense().logits]
    for context in (policy.as_reference, policy.as_base):
        with context():
            found.append(policy.distribution(observations).dense().logits)
    return found


def identical(one, other):
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def trained_names(policy):
    return [name for name, parameter in policy.named_parameters() if parameter.requires_grad]


def tokens_left(rollout):
    """(B, T) how many tokens are still to come at each step, the one drawn there included."""
    steps = torch.arange(rollout.mask.shape[1])
    return (rollout.mask.sum(-1, keepdim=True) - steps).to(torch.float64)


def fit(critic, rollout, returns):
    values, _ = critic.values(rollout)
    return critic.fit(rollout, returns.to(values), values)


# The policy


@both_references
@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_does_not_notice_its_critic(policy_with_reference, make_network, tokenizer, lm, kind):
    policy = policy_with_reference
    rollout = lm.task(tokenizer, batch_size=8, with_features=False).collect(policy)
    names, parameters = trained_names(policy), trainable_parameters(policy)
    weights, before = [each.detach().clone() for each in parameters], logits(policy, rollout.observations)
    assert not torch.equal(before[0], before[1])

    critic = SequenceCritic(make_network(kind, policy), learning_rate=0.01, minibatches=2)
    assert identical(logits(policy, rollout.observations), before)
    values, _ = critic.values(rollout)
    critic.fit(rollout, tokens_left(rollout).float(), values)
    assert not torch.equal(critic.values(rollout)[0], values)

    assert identical(logits(policy, rollout.observations), before)
    assert trained_names(policy) == names
    assert all(one is other for one, other in zip(trainable_parameters(policy), parameters, strict=True))
    assert identical(parameters, weights)
    assert all(parameter.grad is None for parameter in policy.parameters())


@both_references
def test_a_saved_policy_holds_nothing_of_its_critic(policy_with_reference, model_folder, tokenizer, lm, tmp_path):
    policy = policy_with_reference
    save_adapter(policy, tmp_path / "before")
    critic = SequenceCritic(adapter_critic(policy), learning_rate=0.01)
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)
    fit(critic, rollout, tokens_left(rollout))
    save_adapter(policy, tmp_path / "after")
    one, other = (
        {str(path.relative_to(tmp_path / side)) for path in (tmp_path / side).rglob("*")}
        for side in ("before", "after")
    )
    assert one == other
    saved = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("before", "after")]
    assert saved[0].keys() == saved[1].keys()
    assert identical(saved[0].values(), saved[1].values())


def test_an_error_within_leaves_the_policy_active(make_policy, tokenizer, lm):
    policy = make_policy()
    network, names = adapter_critic(policy), trained_names(policy)
    observations = lm.sample(policy, tokenizer).observations
    before = logits(policy, observations)
    with pytest.raises(ZeroDivisionError), network.active():
        assert all(".critic." in name for name in trained_names(policy))
        raise ZeroDivisionError
    assert trained_names(policy) == names
    assert identical(logits(policy, observations), before)


def test_a_critic_may_adapt_what_the_policy_does_not(make_policy, tokenizer, lm, architecture):
    policy = make_policy(dtype=torch.float32)
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)
    names, before = trained_names(policy), logits(policy, rollout.observations)
    network = adapter_critic(policy, targets=["c_fc"] if architecture == "gpt2" else ["up_proj", "k_proj"])
    critic = SequenceCritic(network, learning_rate=0.01)
    for _ in range(2):
        fit(critic, rollout, tokens_left(rollout))
    assert trained_names(policy) == names
    assert identical(logits(policy, rollout.observations), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_critics_model_stays_frozen_but_for_adapter_and_head(make_policy, make_network, tokenizer, lm, kind):
    policy = make_policy()
    network = make_network(kind, policy)
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)
    critic = SequenceCritic(network, learning_rate=0.01, epochs=4)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    fit(critic, rollout, tokens_left(rollout))
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    own = {"adapter": ".critic.", "model": ".default."}[kind]
    assert moved == {name for name in before if own in name or name.startswith("head.")}
    assert moved == critic.state_dict()["network"].keys()
    assert not any(module.training for module in network.modules())


# The values


@pytest.mark.parametrize("kind", KINDS)
def test_values_belong_to_the_states_before_each_token_and_to_the_last(make_policy, make_network, tokenizer, lm, kind):
    policy = make_policy()
    network = make_network(kind, policy)
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)
    critic = SequenceCritic(network, learning_rate=0.01)
    values, next_values = critic.values(rollout)
    assert values.shape == next_values.shape == rollout.rewards.shape
    assert not values.any()
    assert not next_values.any()
    for _ in range(3):
        fit(critic, rollout, tokens_left(rollout))
    values, next_values = critic.values(rollout)
    assert not values.requires_grad
    seen, width = rollout.observations, rollout.observations.prompt_width
    with torch.no_grad(), network.active():
        for row, length in enumerate(rollout.mask.sum(-1).tolist()):
            start = int(seen.attention_mask[row, :width].logical_not().sum())
            ids = seen.input_ids[row : row + 1, start : width + length]
            alone = network(TokenObservations(ids, torch.ones_like(ids, dtype=torch.bool), width - start))[0]
            torch.testing.assert_close(values[row, :length], alone[:-1], rtol=0, atol=1e-6)
            torch.testing.assert_close(next_values[row, :length], alone[1:], rtol=0, atol=1e-6)
    assert values[rollout.mask].std() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_padded_or_masked_changes_nothing(make_policy, make_network, tokenizer, lm, kind):
    found = []
    for dirty in (False, True):
        policy = make_policy()
        rollout = lm.task(tokenizer, batch_size=8).collect(policy)
        returns, seen = tokens_left(rollout), rollout.observations
        assert not rollout.mask.all()
        if dirty:
            ids = seen.input_ids.where(seen.attention_mask, 3)
            assert not torch.equal(ids, seen.input_ids)
            rollout = replace(rollout, observations=TokenObservations(ids, seen.attention_mask, seen.prompt_width))
            returns = returns.where(rollout.mask, torch.nan)
        critic = SequenceCritic(make_network(kind, policy), learning_rate=0.01)
        values, _ = critic.values(rollout)
        old = values.where(rollout.mask, torch.nan) if dirty else values
        fitted = [critic.fit(rollout, returns, old)["value_loss"] for _ in range(3)]
        found.append((fitted, critic.values(rollout)[0][rollout.mask], critic.state_dict()["network"]))
    (losses, values, weights), (dirty_losses, dirty_values, dirty_weights) = found
    assert dirty_losses == pytest.approx(losses, abs=1e-9)
    torch.testing.assert_close(dirty_values, values, rtol=0, atol=1e-9)
    torch.testing.assert_close(dirty_weights, weights, rtol=0, atol=1e-9)


@one_architecture
@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_give_the_whole_minibatchs_gradient(make_policy, make_network, tokenizer, lm, kind):
    gradients = []
    for size in (None, 3):
        policy = make_policy()
        rollout = lm.task(tokenizer, batch_size=8).collect(policy)
        critic = SequenceCritic(make_network(kind, policy), learning_rate=0.01, microbatch_size=size)
        fit(critic, rollout, tokens_left(rollout))  # from then on the head lets a gradient through
        with critic.network.active():
            critic._differentiate(
                rollout.observations, tokens_left(rollout), torch.zeros_like(tokens_left(rollout)), rollout.mask
            )
        gradients.append({name: parameter.grad.clone() for name, parameter in critic._trained.items()})
    assert all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


@one_architecture
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_how_many_tokens_are_left(make_policy, make_network, tokenizer, lm, kind):
    policy = make_policy()
    rollout = lm.task(tokenizer, batch_size=16, max_new_tokens=8).collect(policy)
    returns = tokens_left(rollout)
    critic = SequenceCritic(make_network(kind, policy, r=8), learning_rate=0.01, epochs=8)
    assert fit(critic, rollout, returns)["explained_variance"] == pytest.approx(0, abs=1e-9)
    for _ in range(3):
        last = fit(critic, rollout, returns)
    # The best function of the step alone, which is what a blind critic could know.
    by_step = torch.stack([returns[:, t][rollout.mask[:, t]].mean() for t in range(returns.shape[1])])
    real = returns[rollout.mask]
    blind = 1 - (real - by_step.expand_as(returns)[rollout.mask]).var() / real.var()
    assert last["explained_variance"] > max(0.8, blind.item())
    assert last["value_loss"] < 0.5 * real.var().item() * 0.2


def test_beside_the_policys_adapter_it_learns_what_it_learns_alone(make_policy, make_network, tokenizer, lm):
    """Nothing of the policy's adapter is in the values of a critic on the same model."""
    found = []
    for kind in KINDS:
        policy = make_policy()
        rollout = lm.task(tokenizer, batch_size=8).collect(policy)
        critic = SequenceCritic(make_network(kind, policy), learning_rate=0.01, epochs=4)
        fit(critic, rollout, tokens_left(rollout))
        found.append(critic.values(rollout)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert found[0].std() > 0.05


@one_architecture
def test_a_critic_of_its_own_may_be_another_model(make_policy, tokenizer, lm, tmp_path):
    policy = make_policy()
    network = model_critic(str(lm.write_model(tmp_path / "other", "gpt2", seed=7))).double()
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)
    own = {parameter.data_ptr() for parameter in policy.parameters()}
    assert not own & {parameter.data_ptr() for parameter in network.parameters()}
    critic = SequenceCritic(network, learning_rate=0.01)
    assert fit(critic, rollout, tokens_left(rollout))["value_loss"] > 0


# A training


@one_architecture
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_bit_for_bit(make_policy, make_network, tokenizer, lm, tmp_path, kind):
    def make_trainer():
        policy = make_policy(dtype=torch.float32, moved=False)
        task = lm.task(tokenizer, batch_size=24, with_features=False, at_limit="bootstrap")
        critic = SequenceCritic(make_network(kind, policy), minibatches=2, anneal=True, weight_decay=0.1)
        return Trainer(policy, task, critic, TRPO(max_kl=0.01, cg_iterations=3), Gae(gamma=1.0), iterations=4)

    def untimed(metrics):
        return {key: value for key, value in metrics.items() if "seconds" not in key and "per_second" not in key}

    trainer = make_trainer()
    for _ in range(2):
        assert trainer.iterate()["accepted"]
    save_checkpoint(tmp_path, trainer.state_dict(), iteration=2, keep_last=1)
    other = make_trainer()
    other.load_state_dict(load_checkpoint(tmp_path))
    for _ in range(2):
        assert untimed(trainer.iterate()) == untimed(other.iterate())
    states = [each.critic.state_dict()["network"] for each in (trainer, other)]
    assert identical(states[0].values(), states[1].values())


def test_the_last_states_value_is_what_a_cut_text_is_bootstrapped_with(make_policy, tokenizer, lm):
    policy = make_policy()
    rollout = lm.task(tokenizer, batch_size=12, at_limit="bootstrap").collect(policy)
    critic = SequenceCritic(adapter_critic(policy), learning_rate=0.05)
    fit(critic, rollout, tokens_left(rollout))
    values, next_values = critic.values(rollout)
    assert torch.equal(next_values[:, :-1], values[:, 1:])
    cut = rollout.truncated[:, -1]
    assert cut.any()
    advantages, _ = estimate_advantages(Gae(gamma=1.0, whiten=False), rollout, rollout.rewards, values, next_values)
    expected = rollout.rewards[:, -1] + next_values[:, -1] - values[:, -1]
    torch.testing.assert_close(advantages[cut, -1], expected[cut])
    assert next_values[cut, -1].abs().min() > 1e-3


@pytest.mark.usefixtures("global_streams")
def test_the_seed_decides_and_nobody_is_reseeded(make_policy, make_network):
    for kind in KINDS:
        weights = []
        for seed in (0, 0, 1):
            network = make_network(kind, make_policy(), seed=seed)
            weights.append(SequenceCritic(network).state_dict()["network"])
        first, again, other = weights
        assert identical(first.values(), again.values())
        assert not identical(first.values(), other.values())
    policy = make_policy(moved=False)
    network = adapter_critic(policy, r=2)
    with network.active():
        critics = [each.detach().clone() for each in trainable_parameters(policy)]
    assert not identical(critics, trainable_parameters(policy))  # it does not start as the policy's double


# What the user may get wrong


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings")
@one_architecture
@pytest.mark.parametrize("kind", KINDS)
def test_bad_targets_are_named_by_the_critics_key(make_policy, make_network, kind):
    for targets in (["nothing"], ["lm_head"]):
        with pytest.raises(UserError, match=r"^critic\.targets: .*(nothing|lm_head)"):
            make_network(kind, make_policy(), targets=targets)


@one_architecture
def test_all_linear_layers_are_the_models_and_not_those_of_the_policys_adapter(make_policy):
    policy = make_policy(moved=False)
    adapter_critic(policy, r=2, targets=["all-linear"])
    adapted = policy.model.peft_config[CRITIC_ADAPTER].target_modules
    assert any("c_fc" in name for name in adapted) and any("c_attn" in name for name in adapted)
    assert not any("lora" in name or "lm_head" in name for name in adapted)


def test_a_missing_model_is_named_by_the_critics_key(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^critic\.path: no model could be"):
        model_critic(str(tmp_path / "empty"))


def test_the_tokenizers_must_be_one_and_the_shorter_context_counts(model_folders, tmp_path):
    tokenizer = load_tokenizer(str(model_folders("gpt2")))
    for own, expected in [(None, 64), (100, 64), (32, 32)]:
        assert common_context(str(model_folders("llama")), tokenizer, own) == expected
    other = load_tokenizer(str(model_folders("gpt2")))
    other.add_tokens(["splendid"])
    with pytest.raises(UserError, match=r"^critic\.path: the tokenizer of .* is not that of model\.path"):
        common_context(str(model_folders("llama")), other, None)
    with pytest.raises(UserError, match=r"^critic\.path: no tokenizer"):
        common_context(str(tmp_path), tokenizer, None)


def test_a_policy_can_be_loaded_anew_beside_its_critic(make_policy, model_folder, tmp_path, lm, tokenizer):
    """`load_trained` puts a saved adapter into the policy's own, not into the critic's."""
    policy = make_policy()
    save_adapter(policy, tmp_path / "adapter")
    fresh = load_policy(str(model_folder), r=2, alpha=4).double()
    network = adapter_critic(fresh)
    weights = SequenceCritic(network).state_dict()["network"]
    load_trained(fresh, tmp_path / "adapter")
    observations = lm.sample(policy, tokenizer).observations
    torch.testing.assert_close(logits(fresh, observations), logits(policy, observations), rtol=0, atol=1e-4)
    assert identical(SequenceCritic(network).state_dict()["network"].values(), weights.values())

"""The language task: what a rollout holds, exact resumption, an evaluation that disturbs nothing, the critic's wall."""

import pytest
import torch

from lm_trust.core.batch import Batch, Rollout
from lm_trust.lm.evaluation import reward_interval
from lm_trust.lm.generation import eos_ids
from lm_trust.lm.reward_scaling import RewardScaler
from lm_trust.lm.rewards import RewardError, RewardPart
from lm_trust.lm.rollout import PromptSet
from lm_trust.lm.value_head import ValueHead
from lm_trust.training.config_learning import Gae
from lm_trust.training.critic import NoCritic, ValueCritic
from lm_trust.training.estimation import estimate_advantages
from lm_trust.training.trainer import Trainer
from lm_trust.updates import TRPO, PPOClip


def prompts_of(rollout):
    width = rollout.observations.prompt_width
    both = zip(rollout.observations.input_ids[:, :width], rollout.observations.attention_mask[:, :width], strict=True)
    return [ids[real].tolist() for ids, real in both]


def completions_of(rollout):
    return [ids[real].tolist() for ids, real in zip(rollout.actions, rollout.mask, strict=True)]


def test_a_rollout_holds_what_was_sampled_and_paid(make_policy, tokenizer, lm):
    policy, task = make_policy(), lm.task(tokenizer, batch_size=8)
    rollout = task.collect(policy)
    ids = task.training.ids
    assert rollout.whole_sequences
    assert rollout.group_size == 1
    assert rollout.mask.dtype == rollout.terminated.dtype == rollout.truncated.dtype == torch.bool
    assert rollout.rewards.shape == rollout.actions.shape == rollout.mask.shape
    assert sorted(prompts_of(rollout)) == sorted(ids * 2)  # two epochs of four prompts
    completions = completions_of(rollout)
    texts = [lm.TEXTS[ids.index(prompt)] for prompt in prompts_of(rollout)]
    written = [
        lm.completion_text(tokenizer, prompt, ids) for prompt, ids in zip(prompts_of(rollout), completions, strict=True)
    ]
    expected = lm.letters(texts, written, [0.5 * lm.TEXTS.index(text) for text in texts])
    assert rollout.rewards.sum(-1).tolist() == pytest.approx(expected)
    for row, completion in enumerate(completions):
        assert rollout.rewards[row].nonzero().flatten().tolist() == [len(completion) - 1]
        assert rollout.terminated[row].nonzero().flatten().tolist() == [len(completion) - 1]
        # The end of sequence is trained, and nothing behind it.
        ended = completion[-1] == lm.EOS
        assert ended or len(completion) == 5
        assert lm.EOS not in completion[:-1]
    ended = [completion[-1] == lm.EOS for completion in completions]
    assert 0 < sum(ended) < len(ended)
    assert rollout.metrics == {
        "reward_mean": pytest.approx(sum(expected) / 8),
        "reward/letters": pytest.approx(sum(expected) / 8),
        "completion_length": sum(map(len, completions)) / 8,
        "truncated_fraction": 1 - sum(ended) / 8,
    }
    assert task.steps == sum(map(len, completions))


def test_the_parts_of_several_rewards_are_reported(make_policy, tokenizer, lm):
    def ones(prompts, completions):
        return [1.0] * len(prompts)

    task = lm.task(tokenizer, rewards=[(lm.letters, 2.0), (ones, -0.5)])
    metrics = task.collect(make_policy()).metrics
    assert metrics["reward/ones"] == 1.0
    assert metrics["reward_mean"] == pytest.approx(2 * metrics["reward/letters"] - 0.5)


def test_samples_of_one_prompt_stand_together(make_policy, tokenizer, lm):
    rollout = lm.task(tokenizer, batch_size=8, samples_per_prompt=2).collect(make_policy())
    assert rollout.group_size == 2
    prompts = prompts_of(rollout)
    assert prompts[0::2] == prompts[1::2]
    assert len({tuple(prompt) for prompt in prompts}) == 4
    assert len({tuple(completion) for completion in completions_of(rollout)}) > 4


def test_the_reference_and_its_states(make_policy, tokenizer, lm):
    """The critic reads the frozen reference: at each step its state, and next to it the state that the token led to.

    With each state it is told what was earned so far and what share of the five tokens is left.
    """
    policy = make_policy(temperature=0.8)
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)
    with torch.no_grad(), policy.as_reference():
        states = policy.hidden_states(rollout.observations)
        log_probs = lm.plain_log_probs(policy, rollout.observations, 0.8)
    mask, width = rollout.mask, rollout.observations.prompt_width
    torch.testing.assert_close(rollout.reference.dense().log_probs[mask], log_probs[mask], rtol=0, atol=1e-9)
    for row, length in enumerate(mask.sum(-1).tolist()):
        for step in range(length):
            seen, next_seen = rollout.critic_inputs[row, step], rollout.next_critic_inputs[row, step]
            torch.testing.assert_close(seen[:32], states[row, width - 1 + step])
            torch.testing.assert_close(next_seen[:32], states[row, width + step])
            earned = sum(rollout.rewards[row, :step].tolist())
            assert seen[32:].tolist() == pytest.approx([earned, 1 - step / 5])
            assert next_seen[32:].tolist() == pytest.approx(
                [earned + rollout.rewards[row, step].item(), 1 - (step + 1) / 5]
            )
    assert not rollout.critic_inputs.requires_grad
    assert not rollout.next_critic_inputs.requires_grad


def test_the_old_policy_is_the_one_that_drew_and_takes_no_pass(make_policy, tokenizer, lm):
    policy, passes = make_policy(), []
    hidden_states = policy.hidden_states
    policy.hidden_states = lambda observations: passes.append(len(observations)) or hidden_states(observations)
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)
    assert passes == [8]  # the reference's
    with torch.no_grad():
        expected = policy.distribution(rollout.observations)
    torch.testing.assert_close(rollout.old.hidden[rollout.mask], expected.hidden[rollout.mask], rtol=0, atol=1e-9)
    assert not rollout.old.hidden.requires_grad


def test_an_old_policy_whose_states_are_not_kept_is_scored(make_policy, tokenizer, lm):
    policy, task = make_policy(dtype=torch.float32, autocast="bfloat16"), lm.task(tokenizer, batch_size=8)
    trainer = Trainer(policy, task, NoCritic(), TRPO(max_kl=0.01), Gae(whiten=False), iterations=1)
    experience = trainer.experience()
    assert experience.rollout.old is None
    with torch.no_grad():
        scored = policy.distribution(experience.rollout.observations)
    assert torch.equal(experience.batch.old.hidden, scored.hidden)


def test_without_a_critic_no_states_are_kept(make_policy, tokenizer, lm):
    rollout = lm.task(tokenizer, with_features=False).collect(make_policy())
    assert rollout.critic_inputs is None
    assert rollout.next_critic_inputs is None


@pytest.mark.parametrize("at_limit", ["terminate", "bootstrap"])
def test_the_value_of_a_cut_texts_last_state_counts_where_it_is_bootstrapped(make_policy, tokenizer, lm, at_limit):
    rollout = lm.task(tokenizer, batch_size=12, at_limit=at_limit).collect(make_policy())
    cut = (rollout.mask.sum(-1) == 5) & (rollout.actions[:, -1] != lm.EOS)
    assert cut.any()
    values = rollout.rewards.new_zeros(rollout.rewards.shape)
    advantages, _ = estimate_advantages(Gae(gamma=1.0, whiten=False), rollout, rollout.rewards, values, values + 7)
    assert torch.equal(advantages[cut, -1], rollout.rewards[cut, -1] + (7 if at_limit == "bootstrap" else 0))
    assert ((rollout.rewards[cut, -1] == 0) == (at_limit == "bootstrap")).all()


def test_a_failing_reward_is_named(make_policy, tokenizer, lm):
    def moody(prompts, completions):
        return [float("nan")] * len(prompts)

    with pytest.raises(RewardError, match="moody"):
        lm.task(tokenizer, rewards=[(moody, 1.0)]).collect(make_policy())


# Streams


def same_rollouts(one, two):
    assert torch.equal(one.observations.input_ids, two.observations.input_ids)
    assert torch.equal(one.observations.attention_mask, two.observations.attention_mask)
    assert torch.equal(one.rewards, two.rewards)


@pytest.mark.usefixtures("global_streams")
def test_a_restored_task_continues_exactly(make_policy, tokenizer, lm):
    policy, task = make_policy(), lm.task(tokenizer, batch_size=3)
    task.collect(policy)
    state = task.state_dict()
    expected = [task.collect(policy) for _ in range(2)]
    other = lm.task(tokenizer, batch_size=3)
    other.load_state_dict(state)
    for rollout in expected:
        same_rollouts(other.collect(policy), rollout)
    assert other.steps == task.steps


def test_the_seed_decides(make_policy, tokenizer, lm):
    policy = make_policy()
    first, again, other = (lm.task(tokenizer, seed=seed).collect(policy) for seed in (0, 0, 1))
    same_rollouts(first, again)
    assert completions_of(other) != completions_of(first)


@pytest.mark.usefixtures("global_streams")
def test_evaluation_repeats_itself_and_disturbs_nothing(make_policy, tokenizer, lm):
    policy = make_policy()
    task, undisturbed = lm.task(tokenizer), lm.task(tokenizer)
    before = task.evaluate(policy, 5)
    rollout = task.collect(policy)
    after = task.evaluate(policy, 5)
    assert before == after
    assert before["count"] == len(before["samples"]) == 5
    assert [sample["prompt"] for sample in before["samples"]] == [*lm.TEXTS[4:], *lm.TEXTS[4:], lm.TEXTS[4]]
    for sample in before["samples"]:
        bonus = 0.5 * lm.TEXTS.index(sample["prompt"])
        assert sample["reward"] == pytest.approx(lm.letters([sample["prompt"]], [sample["completion"]], [bonus])[0])
    same_rollouts(rollout, undisturbed.collect(policy))
    assert task.steps == undisturbed.steps
    lm.move(policy, seed=5)
    assert task.evaluate(policy, 5)["samples"] != before["samples"]


def test_equal_prompts_are_one_observation_of_an_evaluation(make_policy, tokenizer, lm):
    task = lm.task(tokenizer)
    rows = [0, 1, 0]
    task.heldout = PromptSet(task.heldout.prompts.select(rows), [task.heldout.ids[row] for row in rows])
    record = task.evaluate(make_policy(), 6)
    scores = torch.tensor([sample["reward"] for sample in record["samples"]], dtype=torch.float64)
    assert record["reward_interval"] == reward_interval(scores, torch.tensor(rows * 2))


def test_every_end_of_the_model_and_the_tokenizer_counts(make_policy, tokenizer, lm):
    policy = make_policy()
    assert eos_ids(tokenizer, policy) == [lm.EOS]
    for configured, expected in [(None, [0]), (7, [0, 7]), ([3, 0], [0, 3])]:
        policy.causal_lm.generation_config.eos_token_id = configured
        assert eos_ids(tokenizer, policy) == expected
    policy.causal_lm.generation_config.eos_token_id = list(range(lm.V))
    assert lm.task(tokenizer).collect(policy).actions.shape == (6, 1)


# Updates and critic


def test_fitting_the_critic_leaves_the_policy_bit_identical(make_policy, tokenizer, lm):
    policy = make_policy(dtype=torch.float32)
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)
    critic = ValueCritic(ValueHead(32, (8,), progress=2), epochs=3)
    with torch.no_grad():
        before = policy.distribution(rollout.observations).dense().logits
    checksums = [lm.checksum(policy, trainable=trainable) for trainable in (True, False)]
    values, next_values = critic.values(rollout)
    assert values.shape == next_values.shape == rollout.rewards.shape
    _, returns = estimate_advantages(Gae(), rollout, rollout.rewards, values, next_values)
    inputs = rollout.critic_inputs.clone()
    critic.fit(rollout, returns, values)
    assert not torch.equal(critic.values(rollout)[0], values)
    with torch.no_grad():
        assert torch.equal(policy.distribution(rollout.observations).dense().logits, before)
    assert [lm.checksum(policy, trainable=trainable) for trainable in (True, False)] == checksums
    assert torch.equal(rollout.critic_inputs, inputs)
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.usefixtures("global_streams")
def test_a_value_head_starts_at_zero_and_reseeds_nobody():
    states = torch.linspace(-30, 50, 24).view(2, 3, 4)
    head, same, other = ValueHead(4, (5,), seed=1), ValueHead(4, (5,), seed=1), ValueHead(4, (5,), seed=2)
    assert head(states).tolist() == torch.zeros(2, 3).tolist()
    for hidden in ((), (5,)):
        assert ValueHead(2, hidden, progress=2)(states).tolist() == torch.zeros(2, 3).tolist()
    weights = [each.state_dict()["layers.1.weight"] for each in (head, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_value_head_learns_from_the_progress_what_the_states_do_not_show():
    generator = torch.Generator().manual_seed(0)
    head = ValueHead(32, (16,), progress=2)
    critic = ValueCritic(head, epochs=20, learning_rate=1e-2)

    def drawn():
        features = torch.randn(128, 5, 34, generator=generator)
        nothing = torch.zeros(128, 5, dtype=torch.bool)
        earned, left = features[..., 32:].unbind(-1)
        returns = left - 0.5 * earned
        return Rollout(None, returns, returns, nothing, nothing, ~nothing, features, features), returns

    rollout, returns = drawn()
    critic.fit(rollout, returns, torch.zeros_like(returns))
    fresh, returns = drawn()
    values, _ = critic.values(fresh)
    assert (values - returns).var() < 0.1 * returns.var()


RULES = {
    "trpo": lambda: TRPO(max_kl=0.01, damping=0.1, cg_iterations=4),
    "ppo_clip": lambda: PPOClip(clip=0.2, epochs=2, minibatches=2, learning_rate=1e-2, seed=0),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_an_iteration_moves_the_adapter_and_nothing_else(make_policy, tokenizer, lm, rule):
    policy = make_policy(dtype=torch.float32, moved=False)
    task = lm.task(tokenizer, batch_size=8)
    critic = ValueCritic(ValueHead(32, (8,), progress=2), epochs=2)
    trainer = Trainer(policy, task, critic, rule(), Gae(), iterations=2, reference_penalty=0.1)
    frozen, moving = (lm.checksum(policy, trainable=trainable) for trainable in (False, True))
    first, second = trainer.iterate(), trainer.iterate()
    assert first["accepted"]
    assert first["reference_kl"] == pytest.approx(0, abs=1e-6)  # the policy starts as its reference
    assert second["reference_kl"] > 1e-5
    assert second["steps"] == task.steps
    assert lm.checksum(policy, trainable=False) == frozen
    assert lm.checksum(policy, trainable=True) != moving
    assert not any(module.training for module in policy.modules())


def test_the_reference_loss_sees_the_rollouts_reference(make_policy, tokenizer, lm):
    """With no advantage at all the exact KL to the reference is the whole objective, and a step lowers it."""
    policy = make_policy()
    rollout = lm.task(tokenizer, batch_size=8).collect(policy)

    def divergence():
        with torch.no_grad():
            old = policy.distribution(rollout.observations)
            return old.detach(), old.kl(rollout.reference)[rollout.mask].mean().item()

    old, before = divergence()
    zeros = torch.zeros_like(rollout.rewards, dtype=torch.float64)
    batch = Batch(
        rollout.observations,
        rollout.actions,
        old,
        old.log_prob(rollout.actions),
        zeros,
        rollout.mask,
        reference=rollout.reference,
    )
    report = TRPO(max_kl=0.01, reference_loss=1.0).step(policy, batch)
    assert report.accepted
    assert divergence()[1] == pytest.approx(before - report.surrogate_gain, rel=1e-6)


def test_no_critic_is_no_value(make_policy, tokenizer, lm):
    rollout = lm.task(tokenizer, with_features=False).collect(make_policy())
    values, next_values = NoCritic().values(rollout)
    assert not values.any()
    assert values.shape == next_values.shape == rollout.rewards.shape


# Scaling


def scaled_task(tokenizer, lm, by, clip=None, **settings):
    parts = [(lm.letters, 1.0), RewardPart("length", 0.2, dense=True)]
    return lm.task(tokenizer, rewards=parts, batch_size=8, scaling=RewardScaler(by, clip), **settings)


@pytest.mark.parametrize("by", ["none", "running", "reference", "whiten"])
def test_the_learner_sees_scaled_rewards_and_the_metrics_do_not(make_policy, tokenizer, lm, by):
    policy = make_policy()
    plain, scaled = (scaled_task(tokenizer, lm, rule) for rule in ("none", by))
    totals = []
    for _ in range(3):
        expected, found = plain.collect(policy), scaled.collect(policy)
        assert torch.equal(found.actions, expected.actions)  # the same streams, whatever the scaling draws
        assert {key: found.metrics[key] for key in expected.metrics} == expected.metrics
        assert found.samples == expected.samples
        assert scaled.steps == plain.steps
        seen = expected.rewards.double().sum(-1)
        totals.append(seen)
        past = torch.cat(totals)
        if by == "reference":
            mean, sd = found.metrics["reward_scaling/mean"], found.metrics["reward_scaling/sd"]
        else:
            mean, sd = {"none": (0, 1), "running": (past.mean(), past.std()), "whiten": (seen.mean(), seen.std())}[by]
        kept = seen.mean() if by == "whiten" else 0
        torch.testing.assert_close(found.rewards.double().sum(-1), (seen - mean) / sd + kept, rtol=1e-4, atol=1e-4)
        # All but the last token's: the factor alone.
        inner = found.mask & ~(found.terminated | found.truncated)
        torch.testing.assert_close(found.rewards[inner], expected.rewards[inner] / float(sd), rtol=1e-4, atol=1e-5)


def test_the_reference_moments_are_the_starting_policys(make_policy, tokenizer, lm):
    """Of its first batch, whatever the policy has become when it is measured; and measured once."""
    moments = set()
    for moved in (False, True):
        policy, task = make_policy(moved=moved), scaled_task(tokenizer, lm, "reference")
        for _ in range(2):
            metrics = task.collect(policy).metrics
            moments.add((metrics["reward_scaling/mean"], metrics["reward_scaling/sd"]))
            lm.move(policy, seed=9)
    assert len(moments) == 1


def test_the_reference_moments_are_of_a_batch_of_training_prompts(make_policy, tokenizer, lm):
    batches = []

    def noted(bonus):
        batches.append(bonus)
        return bonus

    task = lm.task(tokenizer, rewards=[(noted, 1.0)], batch_size=6, scaling=RewardScaler("reference"))
    metrics = task.collect(make_policy()).metrics
    assert [len(batch) for batch in batches] == [6, 6]
    assert sorted(set(batches[0])) == [0.0, 0.5, 1.0, 1.5]  # each of the four before any comes again
    moments = torch.tensor(batches[0], dtype=torch.float64)
    assert metrics["reward_scaling/mean"] == pytest.approx(moments.mean().item())
    assert metrics["reward_scaling/sd"] == pytest.approx(moments.std().item())


@pytest.mark.parametrize("by", ["running", "reference", "whiten"])
def test_scaling_is_restored_with_the_task(make_policy, tokenizer, lm, by):
    policy, task = make_policy(), scaled_task(tokenizer, lm, by, clip=1.0)
    task.collect(policy)
    state = task.state_dict()
    lm.move(policy, seed=3)
    expected = [task.collect(policy) for _ in range(2)]
    other = scaled_task(tokenizer, lm, by, clip=1.0)
    other.load_state_dict(state)
    for rollout in expected:
        again = other.collect(policy)
        same_rollouts(again, rollout)
        assert again.metrics == rollout.metrics


def test_the_limit_penalty_is_not_scaled(make_policy, tokenizer, lm):
    policy = make_policy()
    plain, penalised = (
        scaled_task(tokenizer, lm, "running", 0.5, at_limit=rule, limit_penalty=penalty)
        for rule, penalty in (("terminate", 0.0), ("penalise", 7.0))
    )
    expected, found = plain.collect(policy), penalised.collect(policy)
    cut = torch.tensor(expected.samples["ended"]).logical_not()
    assert cut.any() and not cut.all()
    assert expected.rewards.sum(-1).abs().max() <= 0.5 + 1e-5
    torch.testing.assert_close(found.rewards.sum(-1), expected.rewards.sum(-1) - 7.0 * cut)


def test_a_cut_text_that_waits_for_its_value_is_not_shifted(make_policy, tokenizer, lm):
    rollout = scaled_task(tokenizer, lm, "running", at_limit="bootstrap").collect(make_policy())
    cut = rollout.truncated.any(-1)
    assert cut.any()
    paid = rollout.rewards[cut]
    torch.testing.assert_close(paid, torch.full_like(paid, 0.2 / rollout.metrics["reward_scaling/sd"]))

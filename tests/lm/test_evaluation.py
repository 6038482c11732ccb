"""Evaluation numbers against hand computations and against the transformers model's own logits."""

import math

import pytest
import torch
from scipy import stats

from lm_trust.lm.evaluation import distinct_2, divergence_and_perplexity, evaluation_record, reward_interval
from lm_trust.lm.loading import load_policy
from lm_trust.lm.rewards import RewardScores
from lm_trust.lm.saving import save_adapter


def test_distinct_2_counts_bigrams_over_all_completions():
    # (1 2) (2 1) (1 2) and (1 2) (2 3): three different ones of five.
    assert distinct_2([[1, 2, 1, 2], [1, 2, 3]]) == 3 / 5
    assert distinct_2([[1, 2], [3], []]) == 1.0  # no bigram spans two completions
    assert distinct_2([[4, 4, 4, 4]]) == 1 / 3
    assert distinct_2([[1], [2]]) is None
    assert distinct_2([]) is None


def test_the_interval_is_students_over_distinct_prompts():
    scores = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    # t(0.975; 3) = 3.182446, standard deviation sqrt(10 / 3), four observations.
    half = 3.18244631 * math.sqrt(10 / 3) / 2
    found = reward_interval(scores, torch.arange(4))
    assert found == pytest.approx([3 - half, 3 + half], rel=1e-6)
    assert {type(bound) for bound in found} == {float}
    expected = stats.ttest_1samp(scores.numpy(), 0).confidence_interval(0.95)
    assert reward_interval(scores, torch.arange(4)) == pytest.approx(list(expected))


def test_samples_of_one_prompt_are_one_observation():
    scores = torch.tensor([1.0, 4.0, 2.0, 5.0], dtype=torch.float64)
    # The prompts' means are 1.5 and 4.5: t(0.975; 1) = 12.7062, standard deviation 3 / sqrt(2), two observations.
    half = 12.7062 * 1.5
    assert reward_interval(scores, torch.tensor([7, 3, 7, 3])) == pytest.approx([3 - half, 3 + half], rel=1e-5)
    assert reward_interval(scores, torch.tensor([2, 2, 2, 2])) is None
    assert reward_interval(torch.ones(3), torch.arange(3)) == [1.0, 1.0]


@pytest.fixture(params=["from the base", "from an adapter"])
def policy(request, make_policy, model_folder, tmp_path, lm):
    if request.param == "from the base":
        return make_policy(temperature=0.8)
    save_adapter(make_policy(dtype=torch.float32), tmp_path / "start")
    return lm.move(load_policy(str(model_folder), adapter=tmp_path / "start", temperature=0.8).double(), seed=4)


@torch.no_grad()
def test_divergence_and_perplexity_by_hand(policy, tokenizer, lm):
    completions = lm.sample(policy, tokenizer, lm.TEXTS * 4)
    mask, tokens = completions.mask, completions.tokens
    assert not mask.all()
    own = lm.plain_log_probs(policy, completions.observations, 0.8)
    with policy.as_reference():
        reference = lm.plain_log_probs(policy, completions.observations, 0.8)
    with policy.as_base():
        base = lm.plain_log_probs(policy, completions.observations, 0.8)
    divergences, likelihoods = [], []
    for row, length in enumerate(completions.lengths.tolist()):
        p, q = own[row, :length], reference[row, :length]
        divergences.append((p.exp() * (p - q)).sum().item())
        likelihoods += [base[row, step, tokens[row, step]].item() for step in range(length)]
    found = divergence_and_perplexity(policy, completions)
    assert found["reference_kl"] == pytest.approx(sum(divergences) / 24, rel=1e-5)
    assert found["reference_kl"] > 0.05
    assert found["perplexity"] == pytest.approx(math.exp(-sum(likelihoods) / len(likelihoods)), rel=1e-5)
    # The other direction and the reference's perplexity, where it is not the base's, are other numbers.
    backwards = (reference.exp() * (reference - own)).sum(-1).where(mask, 0).sum(-1).mean().item()
    assert found["reference_kl"] != pytest.approx(backwards, rel=1e-2)
    written = reference.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)[mask].mean().item()
    assert (found["perplexity"] == pytest.approx(math.exp(-written), rel=1e-3)) == policy.reference_is_base


def test_a_policy_at_its_start_is_no_nat_away(make_policy, tokenizer, lm):
    policy = make_policy(moved=False)
    found = divergence_and_perplexity(policy, lm.sample(policy, tokenizer))
    assert found["reference_kl"] == pytest.approx(0, abs=1e-10)


@torch.no_grad()
def test_no_kl_is_below_zero_whatever_rounding_leaves(make_policy, tokenizer, lm):
    policy, sums = make_policy(moved=False, dtype=torch.float32), []
    for seed in range(8):
        completions = lm.sample(lm.move(policy, seed, scale=1e-6), tokenizer, seed=seed)
        own = policy.distribution(completions.observations)
        with policy.as_reference():
            kl = own.kl(policy.distribution(completions.observations))
        sums.append(kl[completions.mask].sum().item())
        assert 0 <= divergence_and_perplexity(policy, completions)["reference_kl"] < 1e-5
    assert min(sums) < 0  # as it was


def test_a_perplexity_beyond_all_floats_ends_nothing(policy, tokenizer, lm):
    policy.temperature = 1e-4
    assert divergence_and_perplexity(policy, lm.sample(policy, tokenizer))["perplexity"] == math.inf


def test_a_record_holds_every_sample(make_policy, tokenizer, lm):
    policy = make_policy()
    completions = lm.sample(policy, tokenizer)
    scores = torch.linspace(-1, 2, 6, dtype=torch.float64)
    texts = [f"written {row}" for row in range(6)]
    parts = {"one": scores - 1, "other": torch.ones(6, dtype=torch.float64)}
    record = evaluation_record(policy, completions, RewardScores(scores, parts), torch.arange(6) % 3, lm.TEXTS, texts)
    assert record["reward_mean"] == pytest.approx(0.5)
    assert record["count"] == 6
    low, high = record["reward_interval"]
    assert low < 0.5 < high
    assert record["reward/one"] == pytest.approx(-0.5) and record["reward/other"] == 1.0
    assert record["reward_interval/one"] == pytest.approx([low - 1, high - 1])
    assert record["reward_interval/other"] == [1.0, 1.0]
    assert record["completion_length"] == completions.lengths.double().mean()
    ids = [row[:length].tolist() for row, length in zip(completions.tokens, completions.lengths, strict=True)]
    assert record["distinct_2"] == distinct_2(ids)
    expected = zip(lm.TEXTS, texts, scores.tolist(), strict=True)
    assert record["samples"] == [{"prompt": p, "completion": c, "reward": r} for p, c, r in expected]
    assert record.keys() == {
        "reward_mean",
        "reward_interval",
        "reward/one",
        "reward/other",
        "reward_interval/one",
        "reward_interval/other",
        "count",
        "reference_kl",
        "perplexity",
        "distinct_2",
        "completion_length",
        "samples",
    }

"""The limit of reward per nat: against enumeration of a known reference, a general solver, and simulated drawing."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import factorial, rel_entr
from tiny_models import write_model

from lm_trust.compare import limit
from lm_trust.compare.limit import limit_curves, reference_rewards
from lm_trust.errors import UserError
from lm_trust.lm.loading import load_policy, load_tokenizer
from lm_trust.lm.prompts import Prompts
from lm_trust.lm.rewards import WeightedRewards
from lm_trust.lm.rollout import LanguageTask, PromptSet

# A reference over six texts, two of which are worth the same.
P_REF = np.array([0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
REWARD = np.array([0.0, 0.4, 0.1, 0.4, 0.9, 1.0])


def toy(samples, prompts=1, seed=0):
    """(P, N) rewards of samples of the reference."""
    return np.random.default_rng(seed).choice(REWARD, p=P_REF, size=(prompts, samples))


@pytest.fixture(scope="module")
def curves():
    """Of so many samples that they are the reference itself, nearly."""
    return limit_curves(toy(200_000))


def tilted_toy(beta):
    p = P_REF * np.exp(REWARD / beta)
    p /= p.sum()
    return float(rel_entr(p, P_REF).sum()), float(p @ REWARD)


def limit_at(kl):
    """The highest reward of any distribution over the six texts at no more than this KL, by a general solver."""
    found = minimize(
        lambda p: -(p @ REWARD),
        P_REF,
        method="SLSQP",
        bounds=[(1e-12, 1)] * len(P_REF),
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "ineq", "fun": lambda p: kl - rel_entr(p, P_REF).sum()},
        ],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    return -found.fun


def column(points, key):
    return np.array([point[key] for point in points])


def along(points, kl):
    return np.interp(kl, column(points, "kl"), column(points, "reward"))


def test_with_many_samples_the_tilted_reference_is_the_enumerated_one(curves):
    points = curves["tilted"]
    assert len(points) > 40
    for point in points:
        kl, reward = tilted_toy(point["beta"])
        assert point["kl"] == pytest.approx(kl, rel=0.03, abs=1e-4)
        assert point["reward"] == pytest.approx(reward, abs=0.005)


def test_no_distribution_does_better_at_the_same_kl(curves):
    points = curves["tilted"]
    for kl in (0.1, 0.5, 1.0, 1.5):
        assert along(points, kl) == pytest.approx(limit_at(kl), abs=0.01)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_with_many_samples_best_of_n_is_the_enumerated_one(curves, n):
    """Every multiset of n texts, with its chance and its best text."""
    best = np.zeros(len(REWARD))
    for drawn in itertools.combinations_with_replacement(range(len(REWARD)), n):
        counts = np.bincount(drawn, minlength=len(REWARD))
        chance = math.factorial(n) * np.prod(P_REF**counts / factorial(counts))
        winners = counts * (REWARD[list(drawn)].max() == REWARD)  # of equals the one that is drawn first
        best += chance * winners / winners.sum()
    point = next(point for point in curves["best_of_n"] if point["n"] == n)
    assert point["kl"] == pytest.approx(rel_entr(best, P_REF).sum(), rel=0.03, abs=1e-9)
    assert point["reward"] == pytest.approx(best @ REWARD, abs=0.005)


def test_best_of_n_is_what_drawing_from_the_samples_gives():
    """A few samples with equal ones among them, drawn from again and again with ties broken at random."""
    rewards = np.array([[0.1, 0.5, 0.5, 0.2, 0.9, 0.9, 0.9, 0.0, 0.3, 0.3, 0.4, 0.6]])
    random = np.random.default_rng(0)
    drawn = random.integers(0, 12, size=(400_000, 4))
    chosen = drawn[np.arange(len(drawn)), (rewards[0][drawn] + 1e-6 * random.random(drawn.shape)).argmax(1)]
    shares = np.bincount(chosen, minlength=12) / len(drawn)
    point = limit_curves(rewards)["best_of_n"][2]
    assert point["n"] == 4
    assert point["reward"] == pytest.approx(shares @ rewards[0], abs=0.002)
    assert point["kl"] == pytest.approx(rel_entr(shares, 1 / 12).sum(), abs=0.002)


def test_the_best_of_one_is_the_reference():
    rewards = toy(50, prompts=5)
    point = limit_curves(rewards)["best_of_n"][0]
    assert point["n"] == 1
    assert point["kl"] == pytest.approx(0, abs=1e-12)
    assert point["kl"] >= 0
    assert point["reward"] == pytest.approx(rewards.mean())


def test_without_ties_the_kl_of_best_of_n_is_the_familiar_formula_and_with_them_less():
    smooth = limit_curves(np.random.default_rng(0).normal(size=(1, 20_000)))["best_of_n"]
    for point in smooth[:7]:
        n = point["n"]
        assert point["kl"] == pytest.approx(math.log(n) - (n - 1) / n, abs=0.01)
    for point in limit_curves(toy(20_000))["best_of_n"][1:]:
        assert point["kl"] < math.log(point["n"]) - (point["n"] - 1) / point["n"] - 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_tilted_reference_is_never_below_best_of_n(seed):
    random = np.random.default_rng(seed)
    for rewards in (random.normal(size=(4, 64)), toy(64, 4, seed), random.exponential(size=(1, 200))):
        curves = limit_curves(rewards)
        inside = [point for point in curves["best_of_n"] if point["kl"] <= curves["tilted"][-1]["kl"]]
        assert len(inside) > 2
        for point in inside:
            assert point["reward"] <= along(curves["tilted"], point["kl"]) + 2e-3  # the chord between two betas


@pytest.mark.parametrize("prompts", [1, 7])
def test_kl_and_reward_rise_as_beta_falls(prompts):
    rewards = np.random.default_rng(0).normal(size=(prompts, 128)) * np.linspace(0.2, 3, prompts)[:, None]
    points = limit_curves(rewards)["tilted"]
    assert (np.diff(column(points, "beta")) < 0).all()
    assert (np.diff(column(points, "kl")) > 0).all()
    assert (np.diff(column(points, "reward")) > 0).all()
    assert points[0]["kl"] < 1e-3
    assert points[0]["reward"] == pytest.approx(rewards.mean(), abs=0.1)


def test_over_prompts_it_is_the_mean_of_each_prompts_own_at_the_same_beta():
    rewards = np.stack([toy(100_000, seed=1)[0], 3 * toy(100_000, seed=2)[0] - 1])
    for point in limit_curves(rewards)["tilted"][::10]:
        first, second = tilted_toy(point["beta"]), tilted_toy(point["beta"] / 3)
        assert point["kl"] == pytest.approx((first[0] + second[0]) / 2, rel=0.05, abs=1e-4)
        assert point["reward"] == pytest.approx((first[1] + 3 * second[1] - 1) / 2, abs=0.01)


def test_with_few_samples_the_curve_lies_low():
    """As the module says, on average over data sets: the gain over the samples' own mean, at 16 samples a prompt."""
    grid, gains = np.array([0.2, 0.4, 0.6]), []
    for seed in range(6):
        rewards = toy(16, 40, seed)
        gains.append(along(limit_curves(rewards)["tilted"], grid) - rewards.mean())
    exact = np.array([limit_at(kl) for kl in grid]) - P_REF @ REWARD
    error = np.std(gains, 0, ddof=1) / math.sqrt(len(gains))
    assert (np.mean(gains, 0) < exact - 2 * error).all()
    assert (np.mean(gains, 0) > exact - 0.05).all()


def test_points_that_hang_on_few_samples_are_left_out():
    """Smooth rewards: best-of-n has about 2 N / n effective samples, and of 128 so the best of 64 is the last."""
    rewards = np.random.default_rng(0).normal(size=(20, 128))
    curves = limit_curves(rewards)
    assert column(curves["best_of_n"], "n").tolist() == [1, 2, 4, 8, 16, 32, 64]
    last = curves["tilted"][-1]
    weights = np.exp((rewards - rewards.max(1, keepdims=True)) / last["beta"])
    effective = weights.sum(1) ** 2 / (weights**2).sum(1)
    assert 4 <= 1 / (1 / effective).mean() < 6


def test_the_intervals_are_over_prompts():
    """Prompts of different worth and the same spread: the reward is uncertain, the KL is not."""
    shared = toy(64, seed=4)
    curves = limit_curves(np.concatenate([shared - 1, shared, shared + 1, shared + 5]))
    for point in (*curves["tilted"], *curves["best_of_n"]):
        assert point["kl_low"] == pytest.approx(point["kl"]) == pytest.approx(point["kl_high"])
        assert point["low"] < point["reward"] - 0.5
        assert point["high"] > point["reward"] + 0.5
    assert (curves["prompts"], curves["samples"]) == (4, 64)


def test_the_limits_interval_at_a_kl_is_of_the_limit_at_that_kl():
    """Prompts near the reward's ceiling have more of it for less KL, so that at one beta both change together."""

    def rewards(random):
        return np.tanh(random.normal(0, 0.6, (24, 1)) + random.normal(0, 0.8, (24, 128)))

    found = [limit_curves(rewards(np.random.default_rng(seed)))["tilted"] for seed in range(40)]
    spread = np.std([along(points, 1.0) for points in found], ddof=1)
    ends = [[np.interp(1.0, column(points, "kl"), column(points, end)) for points in found] for end in ("low", "high")]
    half = np.subtract(*reversed(ends)).mean() / 2
    assert half == pytest.approx(1.96 * spread, rel=0.25)


def test_a_single_prompt_has_no_interval_and_all_goes_into_a_file():
    curves = limit_curves(toy(64))
    json.dumps(curves, allow_nan=False)
    for point in (*curves["tilted"], *curves["best_of_n"]):
        assert [point[key] for key in ("kl_low", "kl_high", "low", "high")] == [None] * 4


@pytest.mark.parametrize("samples", [1, 2, 3, 8])
def test_few_samples_and_equal_rewards_are_no_trouble(samples):
    for rewards in (np.full((3, samples), 0.7), np.arange(3.0 * samples).reshape(3, samples), 1e100 * toy(samples, 3)):
        curves = limit_curves(rewards)
        assert curves["tilted"]
        assert curves["best_of_n"][0]["n"] == 1
        for point in (*curves["tilted"], *curves["best_of_n"]):
            assert all(math.isfinite(number) for number in point.values())
    equal = limit_curves(np.full((3, samples), 0.7))
    assert column(equal["tilted"], "kl") == pytest.approx(0, abs=1e-9)
    assert column(equal["tilted"], "reward") == pytest.approx(0.7)


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros((0, 4)), np.array([[0.1, np.nan]])])
def test_rewards_of_another_shape_are_refused(wrong):
    with pytest.raises(ValueError, match="prompts, samples"):
        limit_curves(wrong)


TEXTS = ["the film", "a", "I saw the plot and it was"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), "gpt2")


@pytest.fixture
def task(folder):
    tokenizer = load_tokenizer(str(folder))
    prompts = PromptSet(
        Prompts(TEXTS, {"bonus": [0.0, 10.0, 20.0]}, "made.jsonl", "line", [1, 2, 3]),
        [tokenizer(text)["input_ids"] for text in TEXTS],
    )

    def words(prompts, completions, bonus):
        return [len(text.split()) + extra for text, extra in zip(completions, bonus, strict=True)]

    settings = {"batch_size": 3, "max_new_tokens": 4}
    return LanguageTask(tokenizer, WeightedRewards([(words, 0.5)]), training=prompts, heldout=prompts, **settings)


def moved(policy):
    """A policy that has been trained away from its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return policy


def test_rewards_are_those_of_the_reference_prompt_by_prompt(folder, task, monkeypatch):
    policy = load_policy(str(folder), r=2, alpha=4)
    rewards = reference_rewards(task, policy, 3, 40)
    assert rewards.shape == (3, 40)
    assert rewards.dtype == np.float64
    # Half a word's worth each, and each prompt's own bonus: a row is a prompt.
    for row, bonus in zip(rewards, (0, 5, 10), strict=True):
        assert bonus <= row.min() < row.max() <= bonus + 2
    # Training has moved the policy, and its reference has stayed.
    assert np.array_equal(reference_rewards(task, moved(policy), 3, 40), rewards)
    monkeypatch.setattr(limit, "BATCH_SIZE", 7)
    assert reference_rewards(task, policy, 2, 40).mean() == pytest.approx(rewards[:2].mean(), abs=0.3)


def test_sampling_for_the_limit_leaves_the_task_as_it_was(folder, task):
    policy = load_policy(str(folder), r=2, alpha=4)
    before, state = str(task.state_dict()), torch.get_rng_state()
    reference_rewards(task, policy, 1, 4)
    assert str(task.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_more_prompts_than_are_held_out(folder, task):
    with pytest.raises(UserError, match=r"limit\.prompts: 4 are more than the 3 held-out"):
        reference_rewards(task, load_policy(str(folder), r=2, alpha=4), 4, 2)

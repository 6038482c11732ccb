"""A third engine: any function like `sample_completions`; here one that is too hot, and says so."""

from dataclasses import replace

import pytest
import torch

from lm_trust.core.advantages import masked_mean
from lm_trust.errors import UserError
from lm_trust.lm.engines import load_engine
from lm_trust.lm.generation import sample_completions
from lm_trust.training.config_language import Mismatch
from lm_trust.training.config_learning import ReturnsToGo
from lm_trust.training.critic import NoCritic
from lm_trust.training.trainer import Trainer
from lm_trust.updates import TRPO

HEAT = 1.5


@pytest.fixture
def architecture():
    return "llama"


@torch.no_grad()
def too_hot(policy, prompt_ids, **settings):
    """Sample at a higher temperature than the policy scores at, and return the log-probabilities of that."""
    policy.temperature *= HEAT
    try:
        found = sample_completions(policy, prompt_ids, **settings)
        return replace(found, engine_log_prob=policy.distribution(found.observations).log_prob(found.tokens))
    finally:
        policy.temperature /= HEAT


@pytest.fixture
def make(make_policy, tokenizer, lm):
    def trainer(engine=too_hot, *, batch_size=6, **mismatch):
        task = lm.task(tokenizer, engine=engine, batch_size=batch_size, with_features=False)
        advantage = ReturnsToGo(gamma=1.0, whiten=False)
        mismatch = Mismatch(**mismatch)
        return Trainer(make_policy(), task, NoCritic(), TRPO(), advantage, iterations=10, mismatch=mismatch)

    return trainer


def test_its_mismatch_is_measured(make):
    trainer = make(batch_size=600)
    experience = trainer.experience()
    rollout, policy = experience.rollout, trainer.policy
    with torch.no_grad():
        scored = policy.distribution(rollout.observations)
        policy.temperature *= HEAT
        hot = policy.distribution(rollout.observations)
    exact = masked_mean(hot.kl(scored), rollout.mask).item()
    assert experience.metrics["engine_kl"] == pytest.approx(exact, rel=0.15)
    ratio = (scored.log_prob(rollout.actions) - hot.log_prob(rollout.actions)).exp()[rollout.mask]
    assert experience.metrics["engine_ratio_max"] == pytest.approx(ratio.max().item())
    assert experience.metrics["engine_clipped_fraction"] == pytest.approx((ratio > 2).double().mean().item())


def test_its_samples_are_weighted_where_that_is_asked_for(make):
    settings = ({"correct": False}, {"cap": 1.2}, {"cap": 1.0})
    plain, weighted, capped = (make(**mismatch).experience() for mismatch in settings)
    assert plain.rollout.actions.equal(weighted.rollout.actions)
    mask = plain.rollout.mask
    assert plain.batch.advantages.equal(plain.advantages)
    ratio = (plain.batch.old_log_prob - plain.rollout.engine_log_prob).exp()
    for found, cap in ((weighted, 1.2), (capped, 1.0)):
        expected = plain.advantages * ratio.clamp(max=cap)
        torch.testing.assert_close(found.advantages[mask], expected[mask].to(found.advantages.dtype))
        torch.testing.assert_close(found.batch.advantages[mask], expected[mask].float())
    assert (ratio[mask] > 1.2).any() and (ratio[mask] < 1).any()
    assert "engine_kl" in make().iterate()


def test_beyond_the_limit_nothing_is_learned_and_the_rollout_is_to_come(make):
    trainer = make(limit=1e-3)
    before = trainer.state_dict()
    with pytest.raises(UserError, match=r"rollout\.mismatch\.limit"):
        trainer.iterate()
    assert trainer.collecting
    after = trainer.state_dict()
    assert after["task"]["steps"] == before["task"]["steps"] == 0 and trainer.task.steps > 0
    assert after["task"]["generator"].equal(before["task"]["generator"])
    assert all(new.equal(old) for new, old in zip(after["policy"], before["policy"], strict=True))
    again = make()
    again.load_state_dict(after)
    again.iterate()
    assert not again.collecting


def test_a_log_probability_that_is_no_number_is_named(make):
    def silent(policy, prompt_ids, **settings):
        found = too_hot(policy, prompt_ids, **settings)
        found.engine_log_prob[2, 0] = float("nan")
        return found

    experience = make(silent, limit=10.0).experience()
    assert experience.batch is None
    assert experience.offender.startswith("the engine log-probability is nan at token 0 of sample 2")


def test_everything_but_the_rollout_is_sampled_from_what_is_scored(make):
    trainer = make()
    task, policy = trainer.task, trainer.policy
    plain = make(sample_completions).task
    assert task.evaluate(policy, 4) == plain.evaluate(policy, 4)
    assert not task.collect(policy).actions.equal(plain.collect(policy).actions)
    assert plain.collect(policy).engine_log_prob is None
    assert load_engine("generate") is sample_completions


def test_an_engine_that_needs_a_newer_transformers_says_so(monkeypatch):
    monkeypatch.setattr("transformers.utils.versions.importlib.metadata.version", lambda name: "5.0.0")
    with pytest.raises(UserError, match=r"rollout\.engine: continuous_batching needs a newer transformers \(.*5\.23"):
        load_engine("continuous_batching")

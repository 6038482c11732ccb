"""One matrix: every architecture, with an adapter and with all of its weights trained, through the same code."""

import math

import pytest
import torch
from peft import PeftModel
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM

from lm_trust.core.batch import Batch
from lm_trust.core.parameters import flatten, trainable_parameters
from lm_trust.lm.loading import load_policy, load_tokenizer
from lm_trust.lm.saving import load_trained, save_trained
from lm_trust.updates import TRPO, PPOClip

TARGETS = {
    "gpt2": {"c_attn"},
    "gpt_neox": {"query_key_value"},
    **{name: {"q_proj", "v_proj"} for name in ("opt", "opt_projected", "llama", "qwen2", "qwen3")},
}
RULES = {
    "trpo": lambda: TRPO(max_kl=0.01, cg_iterations=5, microbatch_size=5),
    "ppo_clip": lambda: PPOClip(epochs=2, minibatches=2, learning_rate=1e-2, microbatch_size=2),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def tokenizer(model_folders):
    """The words are the same everywhere; transformers gives Qwen2 a tokenizer class of its own, whatever is saved."""
    return load_tokenizer(str(model_folders("gpt2")))


@pytest.fixture(params=["adapter", "all weights"])
def make_start(request, model_folder):
    """A policy in single precision as training starts from it."""
    return lambda **settings: load_policy(str(model_folder), r=2 if request.param == "adapter" else None, **settings)


def batch_of(policy, completions):
    with torch.no_grad():
        old = policy.distribution(completions.observations).detach()
        with policy.as_reference():
            reference = policy.distribution(completions.observations)
    advantages = torch.randn(completions.tokens.shape, generator=torch.Generator().manual_seed(0))
    return Batch(
        observations=completions.observations,
        actions=completions.tokens,
        old=old,
        old_log_prob=old.log_prob(completions.tokens),
        advantages=torch.where(completions.mask, advantages, torch.nan),
        mask=completions.mask,
        reference=reference,
    )


def sampled_log_probs(policy, tokenizer, lm):
    """Completions of prompts of mixed lengths, and the log-probabilities by which `generate` drew each token."""
    drawn_from = lm.record_scores(policy)
    completions = lm.sample(policy, tokenizer, lm.TEXTS * 12)
    del policy.causal_lm.generate
    sampled = torch.stack(drawn_from, 1).float().log_softmax(-1)
    return completions, sampled.gather(-1, completions.tokens.unsqueeze(-1)).squeeze(-1)


def test_the_adapter_sits_where_the_architecture_wants_it(model_folder, architecture):
    config = load_policy(str(model_folder)).model.peft_config["default"]
    assert set(config.target_modules) == TARGETS[architecture]
    assert config.fan_in_fan_out == (architecture == "gpt2")


def test_the_ratio_is_one_before_the_first_step(make_start, tokenizer, lm):
    policy = make_start(temperature=0.8)
    completions, sampled = sampled_log_probs(policy, tokenizer, lm)
    mask, seen = completions.mask, completions.observations
    assert mask.sum(-1).unique().numel() > 1
    assert not seen.attention_mask[:, : seen.prompt_width].all()  # padded on the left
    with torch.no_grad():
        scored = policy.distribution(seen)
        expected = lm.plain_log_probs(policy, seen, 0.8)
    ratio = (scored.log_prob(completions.tokens) - sampled).exp()[mask]
    assert (ratio - 1).abs().max() < 1e-4
    torch.testing.assert_close(scored.dense().log_probs[mask], expected[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_improves_within_its_bound_and_leaves_the_start_as_it_was(make_start, tokenizer, lm, rule):
    policy = make_start()
    completions = lm.sample(policy, tokenizer)
    batch, untouched = batch_of(policy, completions), lm.checksum(policy, trainable=False)
    seen, mask = completions.observations, completions.mask
    with torch.no_grad():
        start = policy.distribution(seen).dense()
        start = type(start)(start.logits.clone())
    before = flatten(trainable_parameters(policy)).detach().clone()
    report = RULES[rule]().step(policy, batch)
    assert report.accepted
    assert not torch.equal(flatten(trainable_parameters(policy)), before)
    # The certificate, measured anew over all logits.
    with torch.no_grad():
        new = policy.distribution(seen).dense()
        kl = start.kl(new)[mask]
        gain = ((new.log_prob(completions.tokens) - start.log_prob(completions.tokens)).exp() * batch.advantages)[mask]
        with policy.as_reference():
            reference = policy.distribution(seen).dense().log_probs
    assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert report.surrogate_gain > 0
    assert report.surrogate_gain == pytest.approx((gain - batch.advantages[mask]).mean().item(), rel=1e-2, abs=1e-5)
    if rule == "trpo":
        assert 0.001 < report.step_kl <= 0.01
    torch.testing.assert_close(reference[mask], start.log_probs[mask], rtol=0, atol=1e-6)
    assert lm.checksum(policy, trainable=False) == untouched


def test_a_rollouts_reference_is_the_start(make_start, tokenizer, lm):
    policy = lm.move(make_start(), scale=0.05)
    rollout = lm.task(tokenizer).collect(policy)
    with torch.no_grad():
        own = policy.distribution(rollout.observations).log_prob(rollout.actions)[rollout.mask]
        with policy.as_reference():
            expected = policy.distribution(rollout.observations).log_prob(rollout.actions)[rollout.mask]
    found = rollout.reference.log_prob(rollout.actions)[rollout.mask]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (own - expected).abs().max() > 0.01


def test_a_rejected_step_restores_every_bit(make_start, tokenizer, lm):
    policy = make_start()
    batch = batch_of(policy, lm.sample(policy, tokenizer))
    before = lm.checksum(policy, trainable=True)
    report = TRPO(max_kl=0.01, max_backtracks=0, accept_ratio=math.inf).step(policy, batch)
    assert not report.accepted
    assert lm.checksum(policy, trainable=True) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_what_is_saved_loads_without_this_library(make_start, model_folder, tokenizer, lm, tmp_path):
    policy = lm.move(make_start(), scale=0.05)
    completions = lm.sample(policy, tokenizer)
    seen, mask = completions.observations, completions.mask
    save_trained(policy, tokenizer, tmp_path)
    if (tmp_path / "adapter").exists():
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
    else:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits = plain.eval()(
            input_ids=seen.input_ids, attention_mask=seen.attention_mask.long(), position_ids=seen.position_ids
        ).logits[:, seen.prompt_width - 1 : -1]
        found = policy.distribution(seen).dense().log_probs
        torch.testing.assert_close(logits.log_softmax(-1)[mask], found[mask], rtol=0, atol=1e-4)
        again = make_start()
        assert (again.distribution(seen).dense().log_probs - found)[mask].abs().max() > 0.01
        (saved,) = tmp_path.iterdir()
        load_trained(again, saved)
        torch.testing.assert_close(again.distribution(seen).dense().log_probs[mask], found[mask], rtol=0, atol=1e-5)

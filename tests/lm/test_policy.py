"""The causal policy: scores against the model's own logits, padding, temperature, reference, and its steps."""

import math

import pytest
import torch
from torch import nn

from lm_trust.core import Categorical, FisherOperator, trust_region_step
from lm_trust.core.objective import SurrogateObjective
from lm_trust.core.parameters import flatten, trainable_parameters
from lm_trust.lm import vocabulary_head
from lm_trust.lm.loading import load_policy, load_tokenizer
from lm_trust.lm.policy import TokenObservations
from lm_trust.lm.saving import save_adapter


@pytest.fixture
def rolled(make_policy, tokenizer, lm):
    """(policy, completions) in float64: mixed prompt lengths, some ended, some cut."""
    policy = make_policy()
    completions = lm.sample(policy, tokenizer)
    assert completions.mask.sum(-1).unique().numel() > 1
    return policy, completions


def advantages_of(completions, seed=0):
    """Advantages with rubbish where no token is."""
    noise = torch.randn(completions.tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(completions.mask, noise, torch.nan)


def step(policy, completions, **settings):
    settings = {"max_kl": 0.01, "cg_iterations": 10} | settings
    given = (completions.observations, completions.tokens, advantages_of(completions))
    return trust_region_step(policy, *given, mask=completions.mask, **settings)


# Scores


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_the_models_own_logits_shifted_by_one(make_policy, tokenizer, lm, temperature):
    policy = make_policy(temperature=temperature)
    completions = lm.sample(policy, tokenizer)
    expected = lm.plain_log_probs(policy, completions.observations, temperature)
    distribution, mask = policy.distribution(completions.observations), completions.mask
    torch.testing.assert_close(distribution.dense().log_probs[mask], expected[mask], rtol=0, atol=1e-10)
    chosen = expected.gather(-1, completions.tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(distribution.log_prob(completions.tokens)[mask], chosen[mask], rtol=0, atol=1e-10)
    entropy = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(distribution.entropy()[mask], entropy[mask], rtol=0, atol=1e-10)


def test_padded_logits_before_the_last_score_the_completion(rolled):
    policy, completions = rolled
    seen, width = completions.observations, completions.observations.prompt_width
    logits = policy.causal_lm(
        input_ids=seen.input_ids, attention_mask=seen.attention_mask.long(), position_ids=seen.position_ids
    ).logits
    log_probs = torch.log_softmax(logits[:, width - 1 : -1], -1)
    expected = log_probs.gather(-1, seen.input_ids[:, width:].unsqueeze(-1)).squeeze(-1)
    found = policy.distribution(seen).log_prob(completions.tokens)
    torch.testing.assert_close(found[completions.mask], expected[completions.mask], rtol=0, atol=1e-10)


def test_the_reference_is_scored_at_the_same_temperature(make_policy, tokenizer, lm):
    policy = make_policy(temperature=0.6)
    completions = lm.sample(policy, tokenizer)
    with policy.as_reference():
        found = policy.distribution(completions.observations).dense().log_probs
        expected = lm.plain_log_probs(policy, completions.observations, 0.6)
    torch.testing.assert_close(found[completions.mask], expected[completions.mask], rtol=0, atol=1e-10)
    own = policy.distribution(completions.observations).dense().log_probs
    assert (own - found)[completions.mask].abs().max() > 0.01


def test_left_padding_changes_nothing(rolled, lm):
    policy, completions = rolled
    seen, width = completions.observations, completions.observations.prompt_width
    batched, states = policy.distribution(seen).log_prob(completions.tokens), policy.hidden_states(seen)
    padding = seen.attention_mask[:, :width].logical_not().sum(-1)
    assert padding.unique().numel() > 2
    for row, (pad, length) in enumerate(zip(padding.tolist(), completions.lengths.tolist(), strict=True)):
        ids = seen.input_ids[row : row + 1, pad : width + length]
        alone = TokenObservations(ids, torch.ones_like(ids, dtype=torch.bool), width - pad)
        torch.testing.assert_close(
            policy.hidden_states(alone)[0], states[row, pad : width + length], rtol=0, atol=1e-10
        )
        log_prob = policy.distribution(alone).log_prob(completions.tokens[row : row + 1, :length])
        torch.testing.assert_close(log_prob[0], batched[row, :length], rtol=0, atol=1e-10)


def test_what_stands_in_the_padding_changes_nothing(rolled):
    policy, completions = rolled
    seen = completions.observations
    other = TokenObservations(seen.input_ids.where(seen.attention_mask, 3), seen.attention_mask, seen.prompt_width)
    assert not torch.equal(other.input_ids, seen.input_ids)
    states = [policy.step_states(given)[completions.mask] for given in (seen, other)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-12)


def test_positions_count_real_tokens_and_gpt2_needs_them(rolled, architecture):
    policy, completions = rolled
    seen, width = completions.observations, completions.observations.prompt_width
    for row, real in zip(seen.position_ids, seen.attention_mask, strict=True):
        assert row[real].tolist() == list(range(int(real.sum())))
    if architecture == "gpt2":  # rotary positions are relative
        without = policy.causal_lm(input_ids=seen.input_ids, attention_mask=seen.attention_mask.long()).logits
        wrong = torch.log_softmax(without[:, width - 1 : -1], -1)
        right = policy.distribution(seen).dense().log_probs
        assert (wrong - right)[completions.mask].abs().max() > 0.1


def test_dropout_is_off_in_every_pass(rolled, tokenizer, lm, architecture, monkeypatch):
    policy, completions = rolled
    config = policy.causal_lm.config
    assert (config.resid_pdrop if architecture == "gpt2" else config.attention_dropout) == 0.1
    dropout, active = nn.functional.dropout, []

    def watch(given, p=0.5, training=True, inplace=False):
        active.append(training and p > 0)
        return dropout(given, p, training, inplace)

    attention = nn.functional.scaled_dot_product_attention

    def watch_attention(*given, dropout_p=0.0, **settings):
        active.append(dropout_p > 0)
        return attention(*given, dropout_p=dropout_p, **settings)

    monkeypatch.setattr(nn.functional, "dropout", watch)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watch_attention)
    assert policy.train() is policy
    lm.sample(policy, tokenizer)
    with policy.as_reference():
        policy.distribution(completions.observations)
    assert step(policy, completions).accepted
    assert active
    assert not any(active)
    assert not any(module.training for module in policy.modules())
    assert torch.equal(policy.step_states(completions.observations), policy.step_states(completions.observations))


def test_an_adapters_own_dropout_is_off(rolled, model_folder, tmp_path):
    policy, completions = rolled
    policy.model.peft_config["default"].lora_dropout = 0.5
    save_adapter(policy, tmp_path / "adapter")
    again = load_policy(str(model_folder), adapter=tmp_path / "adapter").double()
    assert any(isinstance(module, nn.Dropout) and module.p == 0.5 for module in again.modules())
    again.train()
    states = [each.step_states(completions.observations) for each in (policy, again)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("final", [False, True])
def test_microbatches_change_nothing(rolled, final):
    policy, completions = rolled
    seen, (rows, steps) = completions.observations, completions.tokens.shape
    whole = policy.step_states(seen, final=final)
    assert whole.shape[:2] == (rows, steps + final)
    policy.microbatch_size = 4
    sizes, pass_ = [], policy.hidden_states
    policy.hidden_states = lambda given: (sizes.append(len(given)), pass_(given))[1]
    with torch.no_grad():
        torch.testing.assert_close(policy.step_states(seen, final=final), whole, rtol=0, atol=1e-12)
    assert sizes == [4, rows - 4]


def test_attention_kernels_agree(make_policy, tokenizer, lm):
    # In single precision: transformers' eager Llama attention overflows to nan in double, it works in float32 inside.
    policy = make_policy(dtype=torch.float32)
    completions = lm.sample(policy, tokenizer)
    seen, mask = completions.observations, completions.mask
    vector = random_like_parameters(policy)
    found = {}
    for kernel in ("sdpa", "eager"):
        policy.causal_lm.set_attn_implementation(kernel)
        assert policy.causal_lm.config._attn_implementation == kernel
        product = FisherOperator(policy, seen, mask=mask).undamped(vector)
        found[kernel] = policy.distribution(seen).log_prob(completions.tokens)[mask], product
    for one, two in zip(found["sdpa"], found["eager"], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4 * two.norm().item())


# Reference and base


def requirements(policy):
    return [(name, parameter.requires_grad) for name, parameter in policy.named_parameters()]


@pytest.fixture(params=["fresh", "from an adapter", "all weights"])
def started(request, make_policy, tmp_path, model_folder):
    """A policy at its start, where the reference is the base, or a saved adapter with weights of its own."""
    if request.param != "from an adapter":
        return make_policy(moved=False, r=2 if request.param == "fresh" else None)
    save_adapter(make_policy(dtype=torch.float32), tmp_path / "start")
    return load_policy(str(model_folder), adapter=tmp_path / "start").double()


def test_the_reference_is_the_start_however_far_the_policy_moves(started, tokenizer, lm):
    completions = lm.sample(started, tokenizer)
    seen, mask = completions.observations, completions.mask
    with torch.no_grad():
        start = started.distribution(seen).dense().log_probs
        with started.as_base():
            base = started.distribution(seen).dense().log_probs
    assert ((start - base)[mask].abs().max() > 0.01) == (not started.reference_is_base)
    flags, untouched = requirements(started), lm.checksum(started, trainable=False)
    assert sum(required for _, required in flags) > 0
    assert step(started, completions).accepted
    lm.move(started)
    with torch.no_grad(), started.as_reference():
        assert not any(".reference." in name for name, required in requirements(started) if required)
        reference = started.distribution(seen).dense().log_probs
    torch.testing.assert_close(reference[mask], start[mask], rtol=0, atol=1e-5)
    with torch.no_grad(), started.as_base():
        torch.testing.assert_close(started.distribution(seen).dense().log_probs[mask], base[mask], rtol=0, atol=1e-12)
    assert (started.distribution(seen).dense().log_probs - start)[mask].abs().max() > 0.05
    assert requirements(started) == flags
    assert lm.checksum(started, trainable=False) == untouched


def test_only_the_trained_adapter_or_all_of_the_model_requires_gradients(started):
    names = [name for name, required in requirements(started) if required]
    assert names
    if started.start is None:
        assert all(".lora_" in name and ".default." in name for name in names)
    else:
        assert names == [name for name, _ in started.named_parameters() if name.startswith("model.")]
        assert not {id(value) for value in started.start.parameters()} & set(map(id, started.model.parameters()))


@pytest.mark.parametrize("context", ["as_reference", "as_base"])
def test_a_failing_pass_leaves_the_policy_itself(started, tokenizer, lm, context):
    lm.move(started)
    completions = lm.sample(started, tokenizer)
    flags, before = requirements(started), started.step_states(completions.observations)
    with pytest.raises(KeyError), getattr(started, context)():
        assert not torch.equal(started.step_states(completions.observations), before)
        raise KeyError
    assert torch.equal(started.step_states(completions.observations), before)
    assert requirements(started) == flags


# Fisher products and steps


class Dense(nn.Module):
    """The same policy with a plain categorical over all logits."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def distribution(self, observations):
        return self.policy.distribution(observations).dense()


def random_like_parameters(policy):
    size = flatten(trainable_parameters(policy))
    return torch.randn(size.shape, generator=torch.Generator().manual_seed(0), dtype=size.dtype)


def fisher_product(policy, completions, vector, method, microbatch_size=None):
    settings = {"mask": completions.mask, "method": method, "microbatch_size": microbatch_size}
    operator = FisherOperator(policy, completions.observations, **settings)
    product = operator.undamped(vector)
    assert operator.method == ("gauss_newton" if method == "auto" else method)
    return product


@pytest.fixture
def tiny_chunks(monkeypatch, lm):
    monkeypatch.setattr(vocabulary_head, "CHUNK_ELEMENTS", 4 * lm.V)


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.usefixtures("tiny_chunks")
def test_fisher_products_agree_through_chunks_and_dense_logits(rolled, architecture, microbatch_size):
    policy, completions = rolled
    vector = random_like_parameters(policy)
    expected = fisher_product(Dense(policy), completions, vector, "kl_hessian", microbatch_size)
    assert expected.norm() > 0.1
    # Llama's normalisation computes in single precision whatever the model's.
    tolerance = (1e-9 if architecture == "gpt2" else 1e-5) * expected.norm().item()
    for of, method in [(Dense(policy), "gauss_newton"), (policy, "gauss_newton"), (policy, "auto")]:
        found = fisher_product(of, completions, vector, method, microbatch_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.usefixtures("tiny_chunks")
def test_a_finite_difference_agrees_in_single_precision(make_policy, tokenizer, lm, microbatch_size):
    policy = make_policy(dtype=torch.float32)
    completions, vector = lm.sample(policy, tokenizer), random_like_parameters(policy)
    expected = fisher_product(policy, completions, vector, "gauss_newton")
    for of in (policy, Dense(policy)):
        found = fisher_product(of, completions, vector, "finite_difference", microbatch_size)
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_second_derivative_through_the_chunks_is_refused(rolled):
    policy, completions = rolled
    with pytest.raises(RuntimeError, match="differentiable once"):
        fisher_product(policy, completions, random_like_parameters(policy), "kl_hessian")


class OwnLogits(nn.Module):
    """The same policy with a plain categorical over the logits that the transformers model itself gives."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def distribution(self, observations):
        logits = self.policy.causal_lm(
            input_ids=observations.input_ids,
            attention_mask=observations.attention_mask.long(),
            position_ids=observations.position_ids,
        ).logits
        return Categorical(logits[:, observations.prompt_width - 1 : -1] / self.policy.temperature)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_all_weights_have_the_gradients_and_products_of_plain_logits(
    make_policy, tokenizer, lm, architecture, microbatch_size
):
    """The head among them, which in GPT-2 is the input embedding too."""
    policy = make_policy(r=None, moved=False, temperature=0.8)
    tied = policy.causal_lm.get_output_embeddings().weight is policy.causal_lm.get_input_embeddings().weight
    assert tied == (architecture == "gpt2")
    completions = lm.sample(policy, tokenizer)
    given = (completions.observations, completions.tokens, advantages_of(completions))
    settings = {"mask": completions.mask, "microbatch_size": microbatch_size}
    parameters = trainable_parameters(policy)
    with torch.no_grad(), policy.as_reference():
        fixed = policy.distribution(completions.observations)
    lm.move(policy, scale=0.02)
    # Llama's normalisation computes in single precision whatever the model's.
    tolerance = 1e-9 if architecture == "gpt2" else 1e-5
    found, expected = (
        SurrogateObjective(of, *given, **settings, reference=reference, reference_loss=0.3).gradient(parameters)
        for of, reference in [(policy, fixed), (OwnLogits(policy), fixed.dense())]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.norm().item())
    vector = random_like_parameters(policy)
    expected = fisher_product(OwnLogits(policy), completions, vector, "kl_hessian", microbatch_size)
    assert expected.norm() > 0.1
    for method in ("gauss_newton", "kl_hessian", "auto"):
        found = fisher_product(policy, completions, vector, method, microbatch_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.norm().item())


@pytest.mark.usefixtures("tiny_chunks")
def test_a_finite_difference_over_all_weights_agrees_in_single_precision(make_policy, tokenizer, lm):
    policy = make_policy(r=None, moved=False, dtype=torch.float32)
    completions, vector = lm.sample(policy, tokenizer), random_like_parameters(policy)
    expected = fisher_product(policy, completions, vector, "gauss_newton")
    found = fisher_product(policy, completions, vector, "finite_difference", 4)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_step_from_a_fresh_adapter_is_finite_and_within_its_bound(make_policy, tokenizer, lm, dtype):
    policy = make_policy(moved=False, dtype=dtype)
    completions = lm.sample(policy, tokenizer)
    with torch.no_grad():
        old = policy.distribution(completions.observations).dense()
    report = step(policy, completions, max_kl=0.02)
    assert report.accepted
    assert math.isfinite(report.cg_residual)
    assert 0 < report.step_kl <= 0.02
    assert report.surrogate_gain > 0
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    # The certificate, measured again over all logits.
    kl = old.kl(policy.distribution(completions.observations).dense())[completions.mask]
    assert report.step_kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert report.step_kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    named = dict(policy.named_parameters())
    assert all(named[name].abs().max() > 0 for name in named if "lora_B" in name)


@pytest.mark.parametrize("microbatch_size", [1, 4])
def test_microbatched_steps_equal_the_full_one_under_unequal_masks(make_policy, tokenizer, lm, microbatch_size):
    reports, ends = [], []
    for size in (None, microbatch_size):
        policy = make_policy()
        completions = lm.sample(policy, tokenizer)
        rows = completions.mask.sum(-1)
        assert rows[:4].sum() != rows[4:].sum() * 2  # a mean of the parts' means would be another number
        reports.append(step(policy, completions, microbatch_size=size, cg_iterations=4).as_metrics())
        ends.append(flatten(trainable_parameters(policy)).detach())
    assert reports[0]["accepted"]
    for name, value in reports[0].items():
        assert reports[1][name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    torch.testing.assert_close(*ends, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_the_real_model_scores_the_same_alone_and_padded(lm):
    policy = load_policy("smollm2-135m")
    tokenizer = load_tokenizer("smollm2-135m")
    assert policy.model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    completions = lm.sample(policy, tokenizer, ["The film was", "I have never seen a plot that"], steps=8)
    expected = lm.plain_log_probs(policy, completions.observations, 1.0)
    found = policy.distribution(completions.observations).dense().log_probs
    torch.testing.assert_close(found[completions.mask], expected[completions.mask], rtol=0, atol=2e-3)
    report = step(policy, completions, cg_iterations=3)
    assert report.accepted
    assert report.step_kl <= 0.01

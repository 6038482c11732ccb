"""Half precision up to the last hidden states: sampling is what is scored, and gradients and products are sound."""

import copy

import pytest
import torch
from torch import nn

from lm_trust.core import FisherOperator, trust_region_step
from lm_trust.core.objective import SurrogateObjective
from lm_trust.core.parameters import trainable_parameters
from lm_trust.errors import UserError
from lm_trust.lm.loading import load_policy, load_tokenizer
from lm_trust.training.build_update import build_update
from lm_trust.training.config_file import load_config

# The largest errors of these models, twice over: of a log-probability, relative ones of a gradient and of a product.
TOLERANCES = {"bfloat16": (0.2, 0.2, 0.2), "float16": (0.02, 0.05, 0.05)}


@pytest.fixture(params=["gpt2", "opt", "qwen3"])
def architecture(request):
    return request.param


@pytest.fixture
def tokenizer(model_folders):
    return load_tokenizer(str(model_folders("gpt2")))


@pytest.fixture(params=["adapter", "all weights"])  # GPT-2's include the head, which is outside of autocast
def both(request, model_folder, tokenizer, lm):
    """(dtype) -> a policy in single precision, the same under autocast, and completions of the first."""

    def make(dtype):
        r = 4 if request.param == "adapter" else None
        plain = lm.move(load_policy(str(model_folder), r=r), scale=0.05)
        half = load_policy(str(model_folder), r=r, autocast=dtype)
        half.load_state_dict(plain.state_dict())
        return plain, half, lm.sample(plain, tokenizer)

    return make


def gradient(policy, completions, scale=1.0):
    advantages = torch.randn(completions.tokens.shape, generator=torch.Generator().manual_seed(0)) * scale
    given = (completions.observations, completions.tokens, advantages)
    objective = SurrogateObjective(policy, *given, mask=completions.mask, microbatch_size=4)
    return objective.gradient(trainable_parameters(policy)) / scale


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_scores_gradients_and_products_are_the_single_precision_ones_nearly(both, dtype):
    plain, half, completions = both(dtype)
    seen, mask = completions.observations, completions.mask
    with torch.no_grad():
        scores = [policy.distribution(seen).log_prob(completions.tokens)[mask] for policy in (plain, half)]
    assert {half.distribution(seen).hidden.dtype, scores[1].dtype} == {torch.float32}
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    of_score, of_gradient, of_product = TOLERANCES[dtype]
    assert 1e-5 < (scores[1] - scores[0]).abs().max() < of_score
    expected = gradient(plain, completions)
    assert (gradient(half, completions) - expected).norm() < of_gradient * expected.norm()
    vector = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected, found = (
        FisherOperator(policy, seen, mask=mask, method="gauss_newton").undamped(vector) for policy in (plain, half)
    )
    assert found.dtype == torch.float32
    assert (found - expected).norm() < of_product * expected.norm()


def test_the_gradient_of_many_tokens_does_not_vanish_in_float16(both):
    _, half, completions = both("float16")
    expected = gradient(half, completions)
    # As if the mean were over a hundred thousand times as many.
    assert (gradient(half, completions, scale=1e-5) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_step_keeps_its_bound_and_the_start_stays(both, dtype):
    _, half, completions = both(dtype)
    seen, mask = completions.observations, completions.mask
    with torch.no_grad():
        old = half.distribution(seen).detach()
        with half.as_reference():
            start = half.distribution(seen).dense().log_probs
    advantages = torch.randn(completions.tokens.shape, generator=torch.Generator().manual_seed(0))
    report = trust_region_step(
        half, seen, completions.tokens, advantages, mask=mask, max_kl=0.01, fisher_method="gauss_newton"
    )
    assert report.accepted
    assert report.surrogate_gain > 0
    with torch.no_grad():
        kl = old.kl(half.distribution(seen))[mask].mean().item()
        with half.as_reference():
            assert torch.equal(half.distribution(seen).dense().log_probs, start)
    assert 0.001 < kl <= 0.01
    assert report.step_kl == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tokens_are_drawn_from_what_is_scored_to_half_precision(both, tokenizer, lm, dtype):
    plain, half, _ = both(dtype)
    drawn_from = lm.record_scores(half)
    completions = lm.sample(half, tokenizer, lm.TEXTS * 4)
    sampled, mask = torch.stack(drawn_from, 1), completions.mask
    assert sampled.dtype == torch.float32
    sampled = sampled.log_softmax(-1).gather(-1, completions.tokens.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        scored, exact = (
            policy.distribution(completions.observations).log_prob(completions.tokens) for policy in (half, plain)
        )
    ratio = (scored - sampled).exp()[mask]
    assert (ratio - 1).abs().max() < TOLERANCES[dtype][0]
    # Both in half precision agree better than one of them with full precision, which is what sampling without autocast
    # would be (a factor of 1). By how much is the processor's doing: up to 0.4 where it has no such instructions.
    assert (ratio - 1).abs().mean() < 0.7 * (scored - exact)[mask].abs().mean()


def test_the_head_computes_outside_of_autocast(model_folders):
    policy = load_policy(str(model_folders("llama")), r=None, autocast="bfloat16")
    head = policy.causal_lm.get_output_embeddings()
    hidden = torch.randn(3, 32)
    expected = nn.functional.linear(hidden, head.weight)
    with policy.generating():
        assert torch.equal(head(hidden), expected)
        assert nn.Linear(32, 4)(hidden).dtype == torch.bfloat16
    # A copy of the model has its own head.
    other = copy.deepcopy(policy.causal_lm)
    nn.init.zeros_(other.get_output_embeddings().weight)
    assert not other.get_output_embeddings()(hidden).any()
    assert head(hidden).any()


CONFIG = """
iterations: 1
model: {{path: {model}, lora: {lora}, autocast: {autocast}}}
prompts: {{path: {prompts}}}
rewards: [{{name: length}}]
update: {{kind: trpo, fisher_method: {method}}}
"""


@pytest.fixture
def config(tmp_path, model_folders):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the film"}\n')

    def load(*, lora="{r: 2}", autocast="null", method="auto"):
        path = tmp_path / "run.yaml"
        model = model_folders("gpt2")
        path.write_text(CONFIG.format(model=model, prompts=prompts, lora=lora, autocast=autocast, method=method))
        return load_config(path)

    return load


def test_methods_that_half_precision_drowns_are_refused_by_name(config):
    for method in ("finite_difference", "kl_hessian"):
        with pytest.raises(UserError, match=rf"update\.fisher_method: {method} needs float32, and model\.autocast is"):
            config(lora="null", autocast="bfloat16", method=method)
    with pytest.raises(UserError, match=r"update\.fisher_method: kl_hessian needs model\.lora null"):
        config(method="kl_hessian")
    assert build_update(config(lora="null", method="kl_hessian")).fisher_method == "kl_hessian"
    assert build_update(config(method="finite_difference")).fisher_method == "finite_difference"
    assert build_update(config()).fisher_method == "auto"
    assert build_update(config(autocast="float16")).fisher_method == "gauss_newton"

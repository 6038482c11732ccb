"""Layers computed again in the backward pass: the same gradients and Fisher products, from less memory."""

import pytest
import torch
from tiny_models import write_model
from torch import nn

from lm_trust.core.fisher import FisherOperator
from lm_trust.core.parameters import flatten, trainable_parameters
from lm_trust.errors import UserError
from lm_trust.lm.checkpointing import checkpoint_layers
from lm_trust.lm.loading import load_policy
from lm_trust.lm.policy import TokenObservations


def observations():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, :2] = False
    return TokenObservations(torch.randint(1, 20, (3, 8), generator=generator), mask, 4)


def make(folder, *, r=2, **settings):
    policy = load_policy(str(folder), r=r, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(policy) if r else ():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy.double() if settings.get("autocast") is None else policy


def gradient(policy):
    entropy = policy.distribution(observations()).entropy().sum()
    return flatten(torch.autograd.grad(entropy, trainable_parameters(policy)))


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "opt", "qwen3"])
def test_gradients_are_the_same(tmp_path, architecture):
    write_model(tmp_path, architecture)
    plain, checkpointed = make(tmp_path), make(tmp_path, gradient_checkpointing=True)
    torch.testing.assert_close(gradient(checkpointed), gradient(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_gradients_are_the_same_in_half_precision(tmp_path, autocast):
    write_model(tmp_path, "llama")
    plain = make(tmp_path, autocast=autocast)
    checkpointed = make(tmp_path, autocast=autocast, gradient_checkpointing=True)
    assert torch.equal(gradient(checkpointed), gradient(plain))


@pytest.mark.parametrize("method", ["gauss_newton", "kl_hessian", "finite_difference"])
def test_fisher_products_are_the_same(tmp_path, method):
    write_model(tmp_path, "llama")
    r = None if method == "kl_hessian" else 2
    products = []
    for gradient_checkpointing in (False, True):
        policy = make(tmp_path, r=r, gradient_checkpointing=gradient_checkpointing)
        fisher = FisherOperator(policy, observations(), method=method)
        vector = torch.linspace(-1, 1, flatten(trainable_parameters(policy)).numel(), dtype=torch.float64)
        fisher.undamped(vector.flip(0))
        products.append(fisher.undamped(vector))  # by the graph that the first product kept
    tolerance = 1e-6 if method == "finite_difference" else 1e-12
    torch.testing.assert_close(*products, rtol=0, atol=tolerance * products[0].abs().max().item())


def test_a_layers_inside_is_dropped_and_computed_again(tmp_path):
    write_model(tmp_path, "llama")
    kept = []
    for gradient_checkpointing in (False, True):
        policy, sizes, calls = make(tmp_path, gradient_checkpointing=gradient_checkpointing), [], []
        policy.causal_lm.base_model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            entropy = policy.distribution(observations()).entropy().sum()
        entropy.backward()
        kept.append(sum(sizes))
        assert len(calls) == 1 + gradient_checkpointing
    assert kept[1] < kept[0] / 3


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing: Linear has no layers"):
        checkpoint_layers(nn.Linear(2, 2))

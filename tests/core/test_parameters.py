"""The flat vector of trainable parameters: order, round trip, and what it must not touch."""

import pytest
import torch
from torch import nn

from lm_trust.core.parameters import assign, flatten, trainable_parameters, unflatten


def network():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4, bias=False), nn.LayerNorm(4)).double()
    net[0].bias.requires_grad_(False)
    return net


def test_only_parameters_with_requires_grad_in_module_order():
    net = network()
    chosen = trainable_parameters(net)
    expected = [net[0].weight, net[1].weight, net[2].weight, net[2].bias]
    assert len(chosen) == len(expected)
    assert all(one is other for one, other in zip(chosen, expected, strict=True))


def test_a_policy_with_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="requires_grad"):
        trainable_parameters(network().requires_grad_(False))


def test_a_shared_parameter_is_counted_once():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    assert len(trainable_parameters(net)) == 1


def test_flatten_lists_the_values_one_after_another():
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(9.0), torch.arange(4.0).view(2, 2).T]
    assert flatten(tensors).tolist() == [0, 1, 2, 3, 4, 5, 9, 0, 2, 1, 3]


def test_flatten_makes_a_copy():
    tensor = torch.zeros(3)
    vector = flatten([tensor])
    tensor += 1.0
    assert vector.tolist() == [0, 0, 0]


def test_unflatten_is_the_inverse_of_flatten():
    parameters = trainable_parameters(network())
    vector = flatten(parameters).detach()
    for piece, parameter in zip(unflatten(vector, parameters), parameters, strict=True):
        assert torch.equal(piece, parameter)
        assert piece.dtype == parameter.dtype


def test_a_vector_of_the_wrong_length_is_an_error():
    parameters = trainable_parameters(network())
    length = flatten(parameters).numel()
    for wrong in (length - 1, length + 1):
        with pytest.raises((RuntimeError, ValueError)):
            unflatten(torch.zeros(wrong, dtype=torch.float64), parameters)


def test_assign_writes_in_place_and_reads_back_bit_for_bit():
    net = network()
    parameters = trainable_parameters(net)
    addresses = [parameter.data_ptr() for parameter in parameters]
    frozen = net[0].bias.clone()
    vector = torch.randn(flatten(parameters).numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assign(parameters, vector)
    assert torch.equal(flatten(parameters), vector)
    assert addresses == [parameter.data_ptr() for parameter in trainable_parameters(net)]
    assert all(parameter.requires_grad for parameter in parameters)
    assert torch.equal(net[0].bias, frozen)


def test_parameters_do_not_follow_the_vector_afterwards():
    parameters = trainable_parameters(network())
    vector = flatten(parameters).detach()
    assign(parameters, vector)
    vector += 1.0
    assert not torch.equal(flatten(parameters), vector)

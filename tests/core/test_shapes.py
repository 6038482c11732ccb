"""Tensors of shapes that do not belong together are refused by name, where broadcasting would make other numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from lm_trust.core import (
    Categorical,
    DiagonalGaussian,
    FisherOperator,
    clipped_surrogate,
    clipped_value_loss,
    gae,
    group_relative,
    kl_estimators,
    leave_one_out,
    masked_mean,
    masked_whiten,
    returns_to_go,
    trust_region_step,
)
from lm_trust.core.batch import Batch
from lm_trust.core.shapes import require_same_shape
from lm_trust.core.surrogate import clipped_surrogate_slope, clipped_value_slope

B, T, V = 4, 6, 3
FUNCTIONS = {
    "gae": (
        lambda *given: gae(*given, gamma=0.9, lam=0.9),
        ("rewards", "values", "next_values", "terminated", "truncated"),
    ),
    "returns_to_go": (lambda *given: returns_to_go(*given, gamma=0.9), ("rewards", "ended")),
    "masked_mean": (masked_mean, ("x", "mask")),
    "masked_whiten": (masked_whiten, ("x", "mask")),
    "clipped_surrogate": (clipped_surrogate, ("old_log_prob", "new_log_prob", "advantages")),
    "clipped_surrogate_slope": (clipped_surrogate_slope, ("old_log_prob", "new_log_prob", "advantages")),
    "clipped_value_loss": (lambda *given: clipped_value_loss(*given, clip=0.2), ("values", "old_values", "returns")),
    "clipped_value_slope": (lambda *given: clipped_value_slope(*given, clip=0.2), ("values", "old_values", "returns")),
    "kl_estimators": (kl_estimators, ("old_log_prob", "new_log_prob")),
}


def tensors(names, shapes=None):
    """Ones, of booleans where the name is of a flag."""
    made = [torch.ones(*shape) for shape in shapes or [(B, T)] * len(names)]
    flags = ("mask", "terminated", "truncated", "ended")
    return [each.bool() if name in flags else each for name, each in zip(names, made, strict=True)]


@pytest.mark.parametrize("wrong", [(B, 1), (T,), (1, T), (B, T, 1)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_argument_is_of_the_others_shape(name, wrong):
    function, names = FUNCTIONS[name]
    function(*tensors(names))
    for place in range(len(names)):
        shapes = [(B, T)] * len(names)
        shapes[place] = wrong
        if (name, names[place], wrong) == ("clipped_surrogate", "advantages", (B, 1)):
            continue  # a row's, see below
        with pytest.raises(ValueError) as caught:
            function(*tensors(names, shapes))
        assert all(word in str(caught.value) for word in (*names, str(wrong), str((B, T)), "one of each a step"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_argument_is_a_tensor(name):
    """Arrays of numpy's have shapes too, and failed later on for want of some method."""
    function, names = FUNCTIONS[name]
    for place, argument in enumerate(names):
        given = tensors(names)
        given[place] = given[place].numpy()
        with pytest.raises(TypeError, match=f"^{argument}: expected a torch.Tensor, got a numpy.ndarray$"):
            function(*given)


@pytest.mark.parametrize("scores", [[1.0, 2.0], np.ones(2)])
@pytest.mark.parametrize("function", [leave_one_out, group_relative])
def test_scores_are_a_tensor(function, scores):
    with pytest.raises(TypeError, match=r"^scores: expected a torch\.Tensor, got a "):
        function(scores, 2)


@pytest.mark.parametrize("argument", ["actions", "advantages", "mask"])
def test_what_a_step_is_made_from_are_tensors(argument):
    given = {
        "actions": torch.zeros(B, T, dtype=torch.long),
        "advantages": torch.ones(B, T),
        "mask": torch.ones(B, T, dtype=torch.bool),
    }
    given[argument] = given[argument].numpy()
    with pytest.raises(TypeError, match=f"^{argument}: expected a torch.Tensor, got a numpy.ndarray$"):
        trust_region_step(Linear(), torch.ones(B, T, 2), **given)


def test_the_fishers_mask_is_a_tensor():
    with pytest.raises(TypeError, match=r"^mask: expected a torch\.Tensor, got a numpy\.ndarray$"):
        FisherOperator(Linear(), torch.ones(B, T, 2), mask=np.ones((B, T), dtype=bool))


@pytest.mark.parametrize("shape", [(B, 1), ()])
def test_an_advantage_may_be_that_of_a_whole_row_or_of_all(shape):
    old, new = torch.randn(2, B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    each = torch.stack([clipped_surrogate(old[:, t], new[:, t], advantages.expand(B, T)[:, t]) for t in range(T)], 1)
    assert torch.equal(clipped_surrogate(old, new, advantages), each)


def test_the_message_reads_like_a_sentence():
    with pytest.raises(ValueError, match=r"^a, b and c of shapes \(1,\), \(2,\) and \(1,\): one of each a step$"):
        require_same_shape(a=torch.ones(1), b=torch.ones(2), c=torch.ones(1))


@pytest.mark.parametrize("wrong", [(B, 2), (2, T), (B, 1), (B,), (1, B, T)])
def test_a_categorical_has_one_action_a_step(wrong):
    distribution, actions = Categorical(torch.zeros(B, T, V)), torch.zeros(wrong, dtype=torch.long)
    for ask in (distribution.log_prob, distribution.score):
        with pytest.raises(ValueError, match=r"actions of shape .* for logits of shape \(4, 6, 3\): one a step"):
            ask(actions)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, V)

    def distribution(self, observations):
        return Categorical(self.net(observations))


@pytest.mark.parametrize("method", ["gauss_newton", "kl_hessian", "finite_difference", "auto"])
@pytest.mark.parametrize("shape", [(B, 1), (B,), (B, T, 1)])
def test_the_fishers_mask_is_of_the_steps_shape(method, shape):
    operator = FisherOperator(Linear(), torch.ones(B, T, 2), mask=torch.ones(shape, dtype=torch.bool), method=method)
    with pytest.raises(ValueError, match="mask and steps of shapes"):
        operator(torch.ones(9))


def test_a_steps_mask_is_of_its_advantages_shape():
    with pytest.raises(ValueError, match=r"advantages and mask of shapes \(4, 6\) and \(4, 1\): one of each a step"):
        trust_region_step(
            Linear(),
            torch.ones(B, T, 2),
            torch.zeros(B, T, dtype=torch.long),
            torch.ones(B, T),
            mask=torch.ones(B, 1, dtype=torch.bool),
        )


STEPPING = [{}, {"microbatch_size": 2}, {"fisher_fraction": 0.5}]


@pytest.mark.parametrize("settings", STEPPING)
@pytest.mark.parametrize("few", ["actions", "advantages", "observations"])
def test_a_step_needs_as_many_rows_of_each_whatever_the_passes(few, settings):
    given = {
        "observations": torch.ones(B, T, 2),
        "actions": torch.zeros(B, T, dtype=torch.long),
        "advantages": torch.ones(B, T),
    }
    given[few] = given[few][:2]
    with pytest.raises(ValueError, match=rf"{few}.* of .*\b2\b"):
        trust_region_step(Linear(), *given.values(), **settings)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_the_fishers_mask_has_the_rows_of_the_observations(microbatch_size):
    with pytest.raises(ValueError, match="observations and mask of 4 and 3 rows"):
        FisherOperator(
            Linear(), torch.ones(B, T, 2), mask=torch.ones(3, T, dtype=torch.bool), microbatch_size=microbatch_size
        )


@pytest.mark.parametrize("wrong", [(B, 1, 2), (1, T, 2), (2,), (B, T, 1)])
def test_a_gaussian_has_one_action_a_step(wrong):
    distribution = DiagonalGaussian(torch.zeros(B, T, 2), torch.zeros(2))
    for ask in (distribution.log_prob, distribution.score):
        with pytest.raises(ValueError, match=r"actions of shape .* for means of shape \(4, 6, 2\)"):
            ask(torch.zeros(wrong))
    assert distribution.log_prob(torch.zeros(5, B, T, 2)).shape == (5, B, T)  # five draws of each


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("old_log_prob", (B, 1)), ("advantages", (B,)), ("mask", (B, 1)), ("actions", (2, T)), ("actions", (B,))],
)
def test_a_batch_is_of_one_shape(name, wrong):
    distribution = Categorical(torch.zeros(B, T, V))
    given = {
        "actions": torch.zeros(B, T, dtype=torch.long),
        "old_log_prob": torch.zeros(B, T),
        "advantages": torch.zeros(B, T),
        "mask": torch.ones(B, T, dtype=torch.bool),
    }
    Batch(observations=None, old=distribution, **given)
    given[name] = given[name].new_zeros(wrong)
    with pytest.raises(ValueError, match=r"of shapes .*: one of each a step"):
        Batch(observations=None, old=distribution, **given)

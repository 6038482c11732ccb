"""Every Fisher product against the dense Hessian of the KL, built with torch.distributions alone."""

import gc
import math
import weakref

import pytest
import torch
from tiny_policies import LowRank, Records, fill, torch_distribution
from torch import nn
from torch.func import functional_call

from lm_trust.core import Categorical, DiagonalGaussian, FisherOperator, MultiCategorical

METHODS = ["gauss_newton", "kl_hessian", "finite_difference", "auto"]
B, T, D, V, A = 4, 3, 2, 3, 2


class Discrete(nn.Module):
    """Observations (..., D) to a categorical over V actions."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 3), nn.Linear(3, V)
        fill(self, seed, 0.7)

    def forward(self, observations):
        return self.outer(torch.tanh(self.inner(observations)))

    def distribution(self, observations):
        return Categorical(self(observations))


class MultiDiscrete(nn.Module):
    """Observations (..., D) to independent categoricals over 2 and 3 actions; called, to the 6 pairs' logits."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 3), nn.Linear(3, 5)
        fill(self, seed, 0.7)

    def forward(self, observations):
        logits = self.outer(torch.tanh(self.inner(observations)))
        return (logits[..., :2, None] + logits[..., None, 2:]).flatten(-2)

    def distribution(self, observations):
        return MultiCategorical(self.outer(torch.tanh(self.inner(observations))), (2, 3))


class Continuous(nn.Module):
    """Observations (..., D) to a Gaussian over A dimensions, its deviation shared by all states or not."""

    def __init__(self, seed=0, shared=True):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 3), nn.Linear(3, A if shared else 2 * A)
        self.log_std = nn.Parameter(torch.zeros(A)) if shared else None
        fill(self, seed, 0.7)

    def forward(self, observations):
        out = self.outer(torch.tanh(self.inner(observations)))
        return (out, self.log_std) if self.log_std is not None else (out[..., :A], 0.5 * out[..., A:])

    def distribution(self, observations):
        return DiagonalGaussian(*self(observations))


def discrete():
    return Discrete()


def multi_discrete():
    return MultiDiscrete()


def continuous():
    return Continuous()


def state_dependent():
    return Continuous(shared=False)


POLICIES = [discrete, multi_discrete, continuous, state_dependent]


def dense_fisher(policy, observations, mask=None):
    """Hessian, at the policy's parameters, of the mean over valid steps of KL(old || new)."""
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    shapes = [dict(policy.named_parameters())[name].shape for name in names]
    start = torch.cat([dict(policy.named_parameters())[name].detach().flatten() for name in names])
    with torch.no_grad():
        old = torch_distribution(policy(observations))

    def mean_kl(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        weights = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        per_step = torch.distributions.kl_divergence(
            old, torch_distribution(functional_call(policy, weights, (observations,)))
        )
        return per_step.mean() if mask is None else per_step[mask].mean()

    return torch.autograd.functional.hessian(mean_kl, start)


def observed(*lead, seed=1):
    return torch.randn(*lead, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven_mask():
    """Rows with 3, 1, 2 and 0 valid steps."""
    return torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)


def matrix_of(operator, size):
    return torch.stack([operator(row) for row in torch.eye(size, dtype=torch.float64)], dim=1)


def size_of(policy):
    return sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)


def close(matrix, expected, method):
    tolerance = 1e-4 if method == "finite_difference" else 1e-9
    scale = expected.abs().max().item()
    assert (matrix - expected).abs().max().item() < tolerance * scale


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", POLICIES)
def test_is_the_hessian_of_the_mean_kl(make, method):
    policy, observations = make(), observed(B, T)
    operator = FisherOperator(policy, observations, damping=0.0, method=method)
    close(matrix_of(operator, size_of(policy)), dense_fisher(policy, observations), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", POLICIES)
def test_masked_steps_do_not_count(make, method):
    policy, observations, mask = make(), observed(B, T), uneven_mask()
    operator = FisherOperator(policy, observations, mask=mask, damping=0.0, method=method)
    matrix = matrix_of(operator, size_of(policy))
    close(matrix, dense_fisher(policy, observations, mask), method)
    noisy = torch.where(mask[..., None], observations, torch.full_like(observations, 40.0))
    noisy_operator = FisherOperator(policy, noisy, mask=mask, damping=0.0, method=method)
    close(matrix_of(noisy_operator, size_of(policy)), matrix, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_flat_batch_is_the_same_batch(method):
    policy, observations, mask = discrete(), observed(B, T), uneven_mask()
    flat = FisherOperator(policy, observations.view(-1, D), mask=mask.view(-1), damping=0.0, method=method)
    close(matrix_of(flat, size_of(policy)), dense_fisher(policy, observations, mask), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", POLICIES)
def test_is_symmetric_and_positive_semidefinite(make, method):
    policy = make()
    matrix = matrix_of(FisherOperator(policy, observed(B, T), damping=0.0, method=method), size_of(policy))
    close(matrix, matrix.T, method)
    smallest = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min().item()
    assert smallest > -(1e-4 if method == "finite_difference" else 1e-12) * matrix.abs().max().item()


@pytest.mark.parametrize("make", POLICIES)
def test_exact_methods_agree_to_rounding_and_the_finite_difference_nearly(make):
    policy, observations, mask = make(), observed(B, T), uneven_mask()
    vector = torch.randn(size_of(policy), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    products = {m: FisherOperator(policy, observations, mask=mask, damping=0.1, method=m)(vector) for m in METHODS}
    torch.testing.assert_close(products["kl_hessian"], products["gauss_newton"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(products["auto"], products["gauss_newton"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(products["finite_difference"], products["gauss_newton"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_is_linear(method):
    policy = discrete()
    operator = FisherOperator(policy, observed(B, T), damping=0.1, method=method)
    generator = torch.Generator().manual_seed(5)
    one, two = (torch.randn(size_of(policy), generator=generator, dtype=torch.float64) for _ in range(2))
    together = operator(2.0 * one - 3.0 * two)
    tolerance = 1e-4 if method == "finite_difference" else 1e-10
    torch.testing.assert_close(together, 2.0 * operator(one) - 3.0 * operator(two), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_the_length_of_the_vector_does_not_matter(method, scale):
    policy = discrete()
    operator = FisherOperator(policy, observed(B, T), damping=0.0, method=method)
    vector = torch.randn(size_of(policy), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    torch.testing.assert_close(operator(scale * vector) / scale, operator(vector), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_vector_gives_zero(method):
    policy = discrete()
    product = FisherOperator(policy, observed(B, T), method=method)(torch.zeros(size_of(policy), dtype=torch.float64))
    assert torch.equal(product, torch.zeros(size_of(policy), dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_a_distribution_of_another_kind_is_told_what_it_lacks(method, monkeypatch):
    policy = discrete()
    monkeypatch.setattr(policy, "distribution", lambda x: torch.distributions.Categorical(logits=policy(x)))
    vector = torch.ones(size_of(policy), dtype=torch.float64)
    with pytest.raises(TypeError, match=r"Categorical, lacks .*kl.*detach; see lm_trust\.core\.Distribution"):
        FisherOperator(policy, observed(B, T), method=method)(vector)


@pytest.mark.parametrize("method", METHODS)
def test_damping_is_added_once_however_the_batch_is_cut(method):
    policy, observations, mask = discrete(), observed(B, T), uneven_mask()
    plain = dense_fisher(policy, observations, mask)
    for rows in (None, 1):
        operator = FisherOperator(policy, observations, mask=mask, damping=0.7, method=method, microbatch_size=rows)
        damped = matrix_of(operator, size_of(policy))
        close(damped, plain + 0.7 * torch.eye(size_of(policy), dtype=torch.float64), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("make", [discrete, continuous])
def test_microbatches_equal_the_full_batch_under_unequal_masks(make, rows, method):
    policy, observations, mask = make(), observed(B, T), uneven_mask()
    operator = FisherOperator(policy, observations, mask=mask, damping=0.0, method=method, microbatch_size=rows)
    close(matrix_of(operator, size_of(policy)), dense_fisher(policy, observations, mask), method)


@pytest.mark.parametrize("method", METHODS)
def test_only_trainable_parameters_are_seen(method):
    policy, observations = discrete(), observed(B, T)
    policy.inner.weight.requires_grad_(False)
    policy.outer.bias.requires_grad_(False)
    operator = FisherOperator(policy, observations, damping=0.0, method=method)
    close(matrix_of(operator, size_of(policy)), dense_fisher(policy, observations), method)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_gradients_and_generators_are_left_as_they_were(method):
    policy = discrete()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.outer.bias.grad = torch.full((V,), 3.0, dtype=torch.float64)
    state = torch.get_rng_state()
    operator = FisherOperator(policy, observed(B, T), method=method)
    product = operator(torch.ones(size_of(policy), dtype=torch.float64))
    assert not product.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert torch.equal(policy.outer.bias.grad, torch.full((V,), 3.0, dtype=torch.float64))
    assert policy.inner.weight.grad is None
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_works_where_gradients_are_switched_off(method):
    policy, observations = discrete(), observed(B, T)
    with torch.no_grad():
        matrix = matrix_of(FisherOperator(policy, observations, damping=0.0, method=method), size_of(policy))
    close(matrix, dense_fisher(policy, observations), method)


class Bandit(nn.Module):
    """Its logits are its parameters, one row for all states."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def distribution(self, observations):
        return Categorical(self.logits.expand(*observations.shape[:-1], -1))


@pytest.mark.parametrize("method", METHODS)
def test_worked_bandit(method):
    """For softmax logits the Fisher matrix is diag(p) - p p'."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    operator = FisherOperator(Bandit(p.log()), torch.zeros(2, 3, 1, dtype=torch.float64), damping=0.0, method=method)
    close(matrix_of(operator, 3), p.diag() - p.outer(p), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_low_rank_layer_at_its_start_stays_finite(method):
    policy, observations = LowRank(D, V), observed(B, T)
    matrix = matrix_of(FisherOperator(policy, observations, damping=0.0, method=method), size_of(policy))
    assert matrix.isfinite().all()
    close(matrix, dense_fisher(policy, observations), method)
    rows_of_a = policy.a.weight.numel()
    rounding = 1e-6 if method == "finite_difference" else 1e-15
    assert matrix[:rows_of_a].abs().max().item() <= rounding  # its Fisher rows are zero while B is
    damped = FisherOperator(policy, observations, damping=0.1, method=method)
    vector = torch.ones(size_of(policy), dtype=torch.float64)
    torch.testing.assert_close(damped(vector)[:rows_of_a], 0.1 * vector[:rows_of_a], rtol=1e-3, atol=1e-6)


class Partial(nn.Module):
    """A policy with a trainable parameter that its distribution does not use (a value head, for instance)."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.used = discrete()

    def distribution(self, observations):
        return self.used.distribution(observations)


@pytest.mark.parametrize("method", METHODS)
def test_an_unused_trainable_parameter_has_a_zero_row(method):
    policy, observations = Partial(), observed(B, T)
    matrix = matrix_of(FisherOperator(policy, observations, damping=0.0, method=method), size_of(policy))
    close(matrix[4:, 4:], dense_fisher(policy.used, observations), method)
    assert matrix[:4].abs().max().item() == 0.0
    assert matrix[:, :4].abs().max().item() <= (1e-8 if method == "finite_difference" else 0.0)


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = discrete()

    def distribution(self, observations):
        return self.net.distribution(observations.rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [None, 3])
def test_observations_may_be_any_object_with_rows(method, rows):
    policy, observations, mask = Reading(), observed(B, T), uneven_mask()
    operator = FisherOperator(
        policy, Records(observations), mask=mask, damping=0.0, method=method, microbatch_size=rows
    )
    close(matrix_of(operator, size_of(policy)), dense_fisher(policy.net, observations, mask), method)


class Selecting(nn.Module):
    """Reads its tensor out of the observations as `select` says."""

    def __init__(self, select):
        super().__init__()
        self.net, self.select = discrete(), select

    def distribution(self, observations):
        return self.net.distribution(self.select(observations))


OBSERVATIONS = {
    "one key": (lambda x: {"x": x}, lambda given: given["x"]),
    "two keys": (lambda x: {"x": x, "y": x}, lambda given: given["x"]),
    "tuple": (lambda x: (x, x), lambda given: given[0]),
    "no length": (iter, lambda given: observed(B, T)),
    "none": (lambda x: None, lambda given: observed(B, T)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_rows_are_those_of_the_mask_whatever_the_observations_are(kind, method):
    make, select = OBSERVATIONS[kind]
    policy, observations, mask = Selecting(select), observed(B, T), uneven_mask()
    operator = FisherOperator(policy, make(observations), mask=mask, damping=0.0, method=method)
    close(matrix_of(operator, size_of(policy)), dense_fisher(policy.net, observations, mask), method)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_a_mask_may_be_zeros_and_ones(dtype):
    policy, observations, mask = Discrete(), observed(B, T), uneven_mask()
    vector = torch.linspace(-1, 1, size_of(policy), dtype=torch.float64)
    expected = FisherOperator(policy, observations, mask=mask)(vector)
    assert FisherOperator(policy, observations, mask=mask.to(dtype))(vector).equal(expected)


class Forbidding(nn.Module):
    """Some actions are impossible in every state."""

    def __init__(self):
        super().__init__()
        self.net = discrete()

    def distribution(self, observations):
        logits = self.net(observations).clone()
        logits[..., 1] = -math.inf
        return Categorical(logits)


@pytest.mark.parametrize("method", METHODS)
def test_forbidden_actions_leave_the_product_finite(method):
    policy, observations = Forbidding(), observed(B, T)
    matrix = matrix_of(FisherOperator(policy, observations, damping=0.0, method=method), size_of(policy))
    assert matrix.isfinite().all()

    class Two(nn.Module):
        """The same policy over the two actions that are left."""

        def __init__(self):
            super().__init__()
            self.net = policy.net

        def forward(self, x):
            return self.net(x)[..., [0, 2]]

    close(matrix, dense_fisher(Two(), observations), method)


class Attending(nn.Module):
    """Attention through the fused kernel, which cannot be differentiated twice."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(D, 6), nn.Linear(2, V)
        fill(self, scale=0.7)

    def forward(self, observations):
        query, key, value = self.inward(observations).unsqueeze(-3).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.outward(mixed.squeeze(-3))

    def distribution(self, observations):
        return Categorical(self(observations))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [None, 3])
def test_fused_attention_is_no_obstacle(method, rows):
    policy, observations, mask = Attending(), observed(B, T), uneven_mask()
    operator = FisherOperator(policy, observations, mask=mask, damping=0.0, method=method, microbatch_size=rows)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = dense_fisher(policy, observations, mask)
    close(matrix_of(operator, size_of(policy)), expected, method)


class Once(torch.autograd.Function):
    """tanh with a derivative and no second one, as a fused kernel or a compiled wrapper may be."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class Kernel(torch.autograd.Function):
    """The backward pass of `Fused`, with no derivative of its own."""

    @staticmethod
    def forward(ctx, gradient, y):
        return gradient * (1 - y * y)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("the derivative for 'kernel_backward' is not implemented.")


class Fused(torch.autograd.Function):
    """tanh by a kernel that raises when it is differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return Kernel.apply(gradient, *ctx.saved_tensors)


class Opaque(Discrete):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def distribution(self, observations):
        return Categorical(self.outer(self.function.apply(self.inner(observations))))


@pytest.mark.parametrize("function", [Fused, Once])
def test_auto_falls_back_where_there_is_no_second_derivative(function):
    """`Once` is the treacherous one: autograd leaves out a part of the second derivative and says nothing."""
    policy, observations, mask = Opaque(function), observed(B, T), uneven_mask()
    expected = dense_fisher(policy, observations, mask)  # by its forward, which has all derivatives
    operator = FisherOperator(policy, observations, mask=mask, damping=0.0, method="auto")
    close(matrix_of(operator, size_of(policy)), expected, "finite_difference")
    assert operator.method == "finite_difference"
    asked = FisherOperator(policy, observations, mask=mask, method="gauss_newton")
    with pytest.raises(RuntimeError):
        asked(torch.ones(size_of(policy), dtype=torch.float64))


def test_an_error_of_the_policys_own_is_not_hidden_by_auto():
    class Broken(Discrete):
        def distribution(self, observations):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        FisherOperator(Broken(), observed(B, T))(torch.ones(21, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(20,), (22,), (21, 1), (1, 21)])
def test_a_vector_that_is_not_of_the_parameters_is_an_error(shape):
    """A column times the damping was added to the product as a matrix."""
    with pytest.raises(ValueError, match="for 21 trainable parameters"):
        FisherOperator(discrete(), observed(B, T))(torch.ones(shape, dtype=torch.float64))


def test_an_unknown_method_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="gaus_newton"):
        FisherOperator(discrete(), observed(B, T), method="gaus_newton")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_graph_goes_with_the_operator_and_does_not_wait_for_the_collector(method, masked):
    policy, observations = discrete(), observed(4, 3)
    operator = FisherOperator(policy, observations, mask=uneven_mask() if masked else None, method=method)
    gc.collect()
    gc.disable()
    try:
        operator(torch.ones(size_of(policy), dtype=torch.float64))
        seen = weakref.ref(operator)
        del operator
        assert seen() is None
    finally:
        gc.enable()


def test_a_policy_that_has_moved_on_stays_where_it_is():
    policy, observations = discrete(), observed(4)
    operator = FisherOperator(policy, observations, method="finite_difference")
    vector = torch.randn(size_of(policy), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = operator(vector)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    moved = [parameter.detach().clone() for parameter in policy.parameters()]
    torch.testing.assert_close(operator(vector), first)  # still of theta_old
    assert all(torch.equal(parameter, value) for parameter, value in zip(policy.parameters(), moved, strict=True))

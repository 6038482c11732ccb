"""The chunked vocabulary distribution against the plain one over all logits, values and gradients."""

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from lm_trust.core import Categorical
from lm_trust.lm import vocabulary_head
from lm_trust.lm.vocabulary_head import VocabularyCategorical

B, T, H, V = 3, 5, 4, 11
TEMPERATURE = 0.7
CHUNKS = {"one token": 1, "four tokens": 4 * V + 1, "all": 2**24}


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS.keys())
def chunk(request, monkeypatch):
    monkeypatch.setattr(vocabulary_head, "CHUNK_ELEMENTS", request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def head(request):
    weight = normal(0, V, H)
    return weight, normal(1, V) if request.param else None


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(hidden, head):
    """The same distribution twice: chunked, and plain over logits computed here."""
    weight, bias = head
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return VocabularyCategorical(hidden, weight, bias, TEMPERATURE), Categorical(logits / TEMPERATURE)


def states(seed):
    return normal(seed, B, T, H).requires_grad_()


def tokens(seed=9):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


SCALARS = {"log_prob": lambda own: own.log_prob(tokens()), "entropy": lambda own: own.entropy()}


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS.keys())
def test_values_and_gradients_equal_the_plain_ones(chunk, head, scalar):
    hidden, upstream = states(2), normal(3, B, T)
    chunked, plain = (scalar(own) for own in both(hidden, head))
    torch.testing.assert_close(chunked, plain, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad((value * upstream).sum(), hidden)[0] for value in (chunked, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("fixed", ["neither", "self", "other"])
def test_kl_is_differentiable_in_both_arguments(chunk, head, fixed):
    hidden, moved, upstream = states(2), states(4), normal(3, B, T)
    hidden.requires_grad_(fixed != "self")
    moved.requires_grad_(fixed != "other")
    inputs = [state for state in (hidden, moved) if state.requires_grad]
    (own, plain_own), (other, plain_other) = both(hidden, head), both(moved, head)
    chunked, plain = own.kl(other), plain_own.kl(plain_other)
    torch.testing.assert_close(chunked, plain, rtol=0, atol=1e-12)
    found = torch.autograd.grad((chunked * upstream).sum(), inputs)
    expected = torch.autograd.grad((plain * upstream).sum(), inputs)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert plain.mean() > 0.1


def test_kl_of_a_distribution_and_itself_is_zero_and_flat(chunk, head):
    hidden = states(2)
    own, _ = both(hidden, head)
    kl = own.kl(both(hidden, head)[0])
    assert kl.abs().max() < 1e-14
    assert torch.autograd.grad(kl.sum(), hidden)[0].abs().max() < 1e-14


def test_fisher_product_is_the_metric_pulled_back_through_the_head(chunk, head):
    hidden, tangent = states(2), normal(5, B, T, H)
    chunked, plain = both(hidden, head)
    moved = tangent @ head[0].T / TEMPERATURE
    expected = plain.fisher_product(moved) @ head[0] / TEMPERATURE
    torch.testing.assert_close(chunked.fisher_product(tangent), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [0, 2**26])
def test_later_fisher_products_are_the_same_whether_probabilities_are_kept_or_not(chunk, head, limit, monkeypatch):
    monkeypatch.setattr(vocabulary_head, "KEPT_ELEMENTS", limit)
    chunked, plain = both(states(2), head)
    for seed in (5, 6):
        tangent = normal(seed, B, T, H)
        expected = plain.fisher_product(tangent @ head[0].T / TEMPERATURE) @ head[0] / TEMPERATURE
        torch.testing.assert_close(chunked.fisher_product(tangent), expected, rtol=0, atol=1e-12)


def test_fisher_product_is_the_hessian_of_the_kl(head, chunk):
    hidden = normal(2, 1, 1, H)
    chunked, plain = both(hidden, head)
    hessian = torch.autograd.functional.hessian(lambda moved: plain.kl(both(moved, head)[1]).sum(), hidden)
    expected = hessian.reshape(H, H)
    found = torch.stack([chunked.fisher_product(unit.view(1, 1, H)).flatten() for unit in torch.eye(H).double()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_mode_and_the_dense_distribution(chunk, head):
    chunked, plain = both(states(2).detach(), head)
    assert torch.equal(chunked.mode(), plain.mode())
    torch.testing.assert_close(chunked.dense().log_probs, plain.log_probs)


@pytest.mark.usefixtures("global_streams")
def test_samples_follow_the_distribution(monkeypatch, head):
    monkeypatch.setattr(vocabulary_head, "CHUNK_ELEMENTS", 7 * V)
    count = 6000
    hidden = normal(2, 1, 1, H).expand(2, count // 2, H)
    chunked, plain = both(hidden, head)
    drawn = chunked.sample(torch.Generator().manual_seed(0))
    assert drawn.shape == (2, count // 2)
    expected = plain.log_probs[0, 0].exp() * count
    likely = expected >= 5
    observed = torch.bincount(drawn.flatten(), minlength=V)
    fold = [[*side[likely].tolist(), side[~likely].sum().item()] for side in (observed, expected)]
    observed, expected = zip(*[pair for pair in zip(*fold, strict=True) if pair[1] > 0], strict=True)
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3
    assert torch.equal(drawn, chunked.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, chunked.sample(torch.Generator().manual_seed(1)))


def test_no_pass_holds_more_logits_than_a_chunk(monkeypatch):
    vocabulary, count = 512, 64
    weight, hidden = normal(0, vocabulary, H), normal(1, 1, count, H).requires_grad_()
    monkeypatch.setattr(vocabulary_head, "CHUNK_ELEMENTS", 4 * vocabulary)
    most, linear = [], F.linear

    def count_logits(*given):
        most.append(linear(*given).numel())
        return linear(*given)

    monkeypatch.setattr(F, "linear", count_logits)
    own = VocabularyCategorical(hidden, weight)
    other = VocabularyCategorical(normal(2, 1, count, H), weight)
    results = [own.log_prob(torch.zeros(1, count, dtype=torch.long)), own.entropy(), own.kl(other)]
    own.fisher_product(normal(3, 1, count, H))
    own.sample()
    own.mode()
    assert max(most) == 4 * vocabulary
    # The divergence has two sides; the Fisher product takes the logits and a tangent of them.
    assert len(most) == (1 + 1 + 2 + 2 + 1 + 1) * count // 4
    for result in results:
        kept = [saved.numel() for saved in result.grad_fn.saved_tensors]
        assert max(kept) == count * H


def test_the_graph_cannot_be_differentiated_twice_by_mistake(head):
    hidden = states(2)
    own, _ = both(hidden, head)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(own.entropy().sum(), hidden, create_graph=True)


# Where the head is trained as well.


@pytest.fixture
def trained_head():
    return nn.Parameter(normal(0, V, H)), nn.Parameter(normal(1, V))


OTHERS = {
    "trained": lambda head: both(states(4), head),
    "a frozen reference": lambda head: both(normal(4, B, T, H), (normal(7, V, H), None)),
    "a snapshot": lambda head: [own.detach() for own in both(normal(4, B, T, H), head)],
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("order", ["to the other", "from the other"])
@pytest.mark.parametrize("trained", ["both", "weight", "bias"])
def test_a_trained_head_has_the_plain_gradients(chunk, trained_head, other, order, trained):
    weight, bias = trained_head
    weight.requires_grad_(trained != "bias")
    bias.requires_grad_(trained != "weight")
    hidden, upstream = states(2), normal(3, B, T)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor.requires_grad]
    (own, plain), (fixed, plain_fixed) = both(hidden, trained_head), other(trained_head)

    def objective(one, two):
        divergence = one.kl(two) if order == "to the other" else two.kl(one)
        return ((divergence + one.entropy() + one.log_prob(tokens())) * upstream).sum()

    found, expected = (torch.autograd.grad(objective(*pair), inputs) for pair in ((own, fixed), (plain, plain_fixed)))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)
        assert two.abs().max() > 0.1


def test_a_trained_heads_second_derivative_is_exact(chunk, trained_head):
    hidden = states(2)
    found, expected = [], []
    for own, rows in zip(both(hidden, trained_head), (found, expected), strict=True):
        gradient = torch.autograd.grad(own.entropy().square().sum(), [hidden, *trained_head], create_graph=True)
        rows += torch.autograd.grad(sum(part.square().sum() for part in gradient), [hidden, *trained_head])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_a_trained_heads_metric_is_that_of_the_logits(chunk, trained_head):
    chunked, plain = both(states(2), trained_head)
    (logits,) = chunked.parameters
    torch.testing.assert_close(logits, plain.logits, rtol=0, atol=1e-12)
    assert [each.requires_grad for each in (logits, *chunked.detach().parameters)] == [True, False]
    tangent = normal(5, B, T, V)
    for own in (chunked, chunked.detach(), chunked[:], chunked.detach()[:]):
        torch.testing.assert_close(own.fisher_product(tangent), plain.fisher_product(tangent), rtol=0, atol=1e-12)


def test_a_snapshot_does_not_move_with_a_trained_head(trained_head):
    weight, bias = trained_head
    own, _ = both(states(2), trained_head)
    optimizer = torch.optim.Adam(trained_head, lr=0.1, fused=True)  # moves parameters without counting a version
    snapshots, values = [], []
    for _ in range(3):
        snapshots.append(own.detach())
        values.append(snapshots[-1].entropy())
        weight.grad, bias.grad = torch.ones_like(weight), -bias.detach()
        optimizer.step()
    for snapshot, value in zip(snapshots, values, strict=True):
        assert torch.equal(snapshot.entropy(), value)
        assert not snapshot.entropy().requires_grad
    assert not torch.allclose(values[0], values[1])


def test_snapshots_of_one_batch_share_one_copy_of_the_head(trained_head):
    own, _ = both(states(2), trained_head)
    first, second = own[:1].detach(), own[1:].detach()
    assert first._weight.data_ptr() == second._weight.data_ptr() != trained_head[0].data_ptr()


def test_a_trained_head_holds_no_more_logits_than_a_chunk(monkeypatch):
    vocabulary, count = 512, 64
    weight, hidden = nn.Parameter(normal(0, vocabulary, H)), normal(1, 1, count, H).requires_grad_()
    monkeypatch.setattr(vocabulary_head, "CHUNK_ELEMENTS", 4 * vocabulary)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        entropy = VocabularyCategorical(hidden, weight).entropy()
    assert max(kept, default=0) <= vocabulary * H
    entropy.sum().backward()
    assert weight.grad.abs().max() > 0


ROWS = {
    "slice": slice(1, 3),
    "indices": torch.tensor([2, 0]),
    "steps": torch.arange(B * T).view(B, T) % 2 == 0,
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_rows_are_selected_like_a_tensors(rows, chunk, head):
    chunked, plain = both(states(2).detach(), head)
    torch.testing.assert_close(chunked[rows].log_prob(tokens()[rows]), plain.log_prob(tokens())[rows])


def test_detach_is_a_snapshot(head):
    hidden = states(2)
    own, _ = both(hidden, head)
    snapshot, before = own.detach(), own.entropy().detach().clone()
    with torch.no_grad():
        hidden.mul_(2)
    assert torch.equal(snapshot.entropy(), before)
    assert not snapshot.entropy().requires_grad
    assert not torch.allclose(own.entropy(), before)


def test_single_precision_stays_single(chunk):
    own = VocabularyCategorical(normal(0, B, T, H).float().requires_grad_(), normal(1, V, H).float())
    assert own.entropy().dtype == torch.float32
    assert own.fisher_product(normal(2, B, T, H).float()).dtype == torch.float32


def surrogate(own, other, actions, advantages):
    """A step value, a thing beside it that is not differentiated, and another that is."""
    log_prob, kl = own.log_prob(actions), own.kl(other)
    return log_prob * advantages - 0.3 * kl, log_prob.detach(), kl


def test_a_tuple_of_one_value_stays_a_tuple(chunk, head):
    own, plain = both(states(2), head)
    (found,) = own.per_step(lambda d, actions: (d.log_prob(actions),), (), tokens())
    torch.testing.assert_close(found, plain.log_prob(tokens()), rtol=0, atol=1e-12)


def test_several_values_of_a_step_come_from_one_pass_over_its_logits(chunk, head, monkeypatch):
    hidden, upstream, advantages = states(2), normal(3, B, T), normal(6, B, T)
    (own, plain), (other, plain_other) = both(hidden, head), both(states(4).detach(), head)
    computed, logits = [], VocabularyCategorical._logits
    monkeypatch.setattr(
        VocabularyCategorical, "_logits", lambda self, part: computed.append(part.shape[0]) or logits(self, part)
    )
    found = own.per_step(surrogate, (other,), tokens(), advantages)
    assert sum(computed) == 2 * B * T
    expected = surrogate(plain, plain_other, tokens(), advantages)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert [value.requires_grad for value in found] == [True, False, True]
    # Each alone, as a second gradient from the same graph, and both at once.
    for wanted in (lambda v: v[0] * upstream, lambda v: v[2] * upstream, lambda v: v[0] * upstream + v[2].square()):
        gradients = [
            torch.autograd.grad(wanted(values).sum(), hidden, retain_graph=True)[0] for values in (found, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)

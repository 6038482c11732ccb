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


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trainable_head_is_refused(trained):
    weight, bias = nn.Parameter(normal(0, V, H)), nn.Parameter(normal(1, V))
    weight.requires_grad_(trained == "weight")
    bias.requires_grad_(trained == "bias")
    with pytest.raises(ValueError, match="the vocabulary head is trainable"):
        VocabularyCategorical(normal(2, B, T, H), weight, bias)


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

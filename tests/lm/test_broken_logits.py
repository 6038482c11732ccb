"""Sampling from a model whose logits are not finite in some states: it ends those completions and no others."""

import math

import pytest
import torch
from tiny_models import EOS, WORDS

from lm_trust.lm.generation import EndWhereBroken

NEVER = 1 + WORDS.index("never")


@pytest.fixture
def architecture():
    return "llama"  # its embeddings are not tied, so that one can be broken without the head


def test_a_completion_ends_in_a_state_without_a_distribution(make_policy, tokenizer, lm):
    policy = make_policy(dtype=torch.float32)
    texts = [text for text in lm.TEXTS for _ in range(8)]
    before = lm.sample(policy, tokenizer, texts, seed=1)
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[NEVER] = math.nan
    after = lm.sample(policy, tokenizer, texts, seed=1)
    ends = 0
    for row, text in enumerate(texts):
        whole = before.tokens[row, : before.lengths[row]].tolist()
        # With that word in the prompt nothing can be drawn; after it in the completion nothing more.
        until = 0 if "never" in text else whole.index(NEVER) + 1 if NEVER in whole[:-1] else None
        expected = whole if until is None else [*whole[:until], EOS]
        assert after.tokens[row, : after.lengths[row]].tolist() == expected, row
        ends += until is not None
    assert 8 < ends < len(texts) - 8
    with torch.no_grad():
        scores = policy.distribution(after.observations).log_prob(after.tokens)
    broken = after.mask & ~scores.isfinite()
    assert broken.any(-1).sum() == ends
    last = after.lengths.unsqueeze(-1) - 1
    assert broken.gather(-1, last).sum() == ends, "scoring finds the token that ended each of them"


@pytest.mark.parametrize("temperature", [1.0, 1e-5])
def test_what_can_be_drawn_from_is_left_alone(temperature):
    good = [[1.0, 2.0, 3.0], [-math.inf, 1.0, -math.inf], [0.0, -1e30, 0.0]]
    broken = [[1.0, math.nan, 3.0], [math.inf, 1.0, 2.0], [-math.inf] * 3, [1.0, -math.inf, math.nan]]
    scores = torch.tensor([*good, *broken])
    found = EndWhereBroken(1, temperature)(None, scores)
    assert found[:3].equal(scores[:3])
    assert found[3:].softmax(-1).equal(torch.tensor([[0.0, 1.0, 0.0]] * 4))


def test_logits_that_the_temperature_breaks_are_broken():
    scores = torch.tensor([[1e30, 0.0, 0.0], [-1e30, -2e30, 0.0]])
    assert EndWhereBroken(1, 1e-10)(None, scores)[0].softmax(-1).tolist() == [0.0, 1.0, 0.0]

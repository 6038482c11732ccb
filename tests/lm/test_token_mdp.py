"""Where rewards land and how episodes end, what advantages follow, and the one core under both worlds."""

import copy

import pytest
import torch
from torch import nn

from lm_trust.core import Categorical, gae, trust_region_step
from lm_trust.core.parameters import flatten, trainable_parameters
from lm_trust.lm.policy import TokenObservations
from lm_trust.lm.token_mdp import token_rewards
from lm_trust.lm.vocabulary_head import VocabularyCategorical

# Four completions of at most 3 tokens: cut, ended in the middle, ended at once, ended at the last permitted token.
LENGTHS, ENDED = torch.tensor([3, 2, 1, 3]), torch.tensor([False, True, True, True])
SCORES = torch.tensor([1.0, -2.0, 3.0, 4.0])
LAST = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]


def place(at_limit, **settings):
    return token_rewards(SCORES, LENGTHS, ENDED, steps=3, at_limit=at_limit, **settings)


def test_a_score_lands_on_the_last_generated_token():
    found = place("terminate", limit_penalty=9.0)  # the penalty belongs to another setting
    assert found.rewards.tolist() == [[0, 0, 1], [0, -2, 0], [3, 0, 0], [0, 0, 4]]
    assert found.terminated.int().tolist() == LAST
    assert not found.truncated.any()


def test_a_cut_text_can_be_penalised():
    found = place("penalise", limit_penalty=0.5)
    assert found.rewards.tolist() == [[0, 0, 0.5], [0, -2, 0], [3, 0, 0], [0, 0, 4]]
    assert found.terminated.int().tolist() == LAST
    assert not found.truncated.any()


def test_a_cut_text_can_wait_for_its_value():
    found = place("bootstrap", limit_penalty=9.0)
    assert found.rewards.tolist() == [[0, 0, 0], [0, -2, 0], [3, 0, 0], [0, 0, 4]]
    assert found.terminated.int().tolist() == [[0, 0, 0], *LAST[1:]]
    assert found.truncated.int().tolist() == [LAST[0], [0] * 3, [0] * 3, [0] * 3]


# The dense part of each score after 0, 1, 2, 3 tokens; 99 stands after the end and counts nowhere.
DENSE = torch.tensor([[0.0, 1, -1, 5], [2, 2, 3, 99], [1, 0, 99, 99], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("at_limit", "cut_row"),
    # The score less its dense part, 1 - 5, is paid at the end, unless the text is unfinished.
    [("terminate", [1, -2, 6 - 4]), ("penalise", [1, -2, 6 - 4 - 0.5]), ("bootstrap", [1, -2, 6])],
)
def test_a_dense_score_is_paid_token_by_token(at_limit, cut_row):
    found = place(at_limit, limit_penalty=0.5, dense_scores=DENSE)
    assert found.rewards.tolist() == [cut_row, [0, 1 - 5, 0], [-1 + 3, 0, 0], [0, 0, 1 + 3]]
    # What an ended completion is paid in all is its score less the bare prompt's.
    assert found.rewards.sum(-1)[1:].tolist() == (SCORES - DENSE[:, 0])[1:].tolist()


@pytest.mark.parametrize("at_limit", ["terminate", "penalise", "bootstrap"])
def test_what_each_setting_means_for_advantages(at_limit):
    """By hand: gamma 0.5, lambda 1, every value 10, every next value 100."""
    found = place(at_limit, limit_penalty=0.5)
    values = torch.full((4, 3), 10.0)
    advantages, _ = gae(found.rewards, values, 10 * values, found.terminated, found.truncated, gamma=0.5, lam=1.0)
    # A step that does not end: 0 + 0.5 * 100 - 10 = 40, and half of what follows. Ended steps have no next value.
    last = {"terminate": 1 - 10, "penalise": 0.5 - 10, "bootstrap": 0 + 50 - 10}[at_limit]
    assert advantages[0].tolist() == [40 + 0.5 * (40 + 0.5 * last), 40 + 0.5 * last, last]
    assert advantages[1, :2].tolist() == [40 + 0.5 * -12, -12]
    assert advantages[2, 0] == 3 - 10
    assert advantages[3, 2] == 4 - 10


def test_nothing_behind_the_end_reaches_before_it():
    found = place("bootstrap")
    mask = torch.arange(3) < LENGTHS.unsqueeze(-1)
    values, next_values = torch.ones(4, 3), torch.ones(4, 3)
    settings = {"terminated": found.terminated, "truncated": found.truncated, "gamma": 0.9, "lam": 0.8}
    expected, _ = gae(found.rewards, values, next_values, **settings)
    rubbish = torch.where(mask, 1.0, 1e6)
    advantages, _ = gae(found.rewards, rubbish, rubbish, **settings)
    assert torch.equal(advantages[mask], expected[mask])


# One core


class LanguageBandit(nn.Module):
    """A language policy of one token whose hidden states are its logits: (B, 1) steps through the chunked head."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def distribution(self, observations):
        head = torch.eye(self.logits.shape[-1], dtype=self.logits.dtype)
        return VocabularyCategorical(self.logits[observations.input_ids[:, 0]].unsqueeze(1), head)


class ControlBandit(nn.Module):
    """A discrete bandit with the same logits: (N,) steps, plain categorical."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def distribution(self, observations):
        return Categorical(self.logits[observations])


def same_step(language, control, observations, contexts, tokens, advantages, tolerance):
    settings = {"max_kl": 0.02, "damping": 0.05, "cg_iterations": 8}
    mask = torch.ones_like(advantages, dtype=torch.bool)
    one = trust_region_step(language, observations, tokens, advantages, mask=mask, **settings).as_metrics()
    two = trust_region_step(control, contexts, tokens[:, 0], advantages[:, 0], **settings).as_metrics()
    assert one["accepted"]
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == (pytest.approx(value, rel=tolerance, abs=tolerance) if isinstance(value, float) else value)
    ends = [flatten(trainable_parameters(policy)) for policy in (language, control)]
    torch.testing.assert_close(*ends, rtol=0, atol=tolerance)


def draws(rows, vocabulary):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (rows, 1), generator=generator)
    return tokens, torch.randn(rows, 1, generator=generator, dtype=torch.float64)


def test_a_language_bandit_and_a_control_bandit_take_the_identical_step():
    contexts, vocabulary, rows = 3, 5, 40
    logits = torch.randn(contexts, vocabulary, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, advantages = draws(rows, vocabulary)
    prompts = torch.arange(rows) % contexts
    ids = torch.cat([prompts.unsqueeze(-1), tokens], -1)
    observations = TokenObservations(ids, torch.ones_like(ids, dtype=torch.bool), 1)
    policies = LanguageBandit(logits), ControlBandit(logits)
    same_step(*policies, observations, prompts, tokens, advantages, tolerance=1e-12)


class ModelBandit(nn.Module):
    """A control policy that happens to have a transformer for its network: prompts in, dense logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def distribution(self, observations):
        return Categorical(self.model(input_ids=observations).logits[:, -1])


def test_a_one_token_language_mdp_is_a_bandit(make_policy, lm, architecture):
    policy = make_policy()
    control = ModelBandit(copy.deepcopy(policy.causal_lm))
    prompts = torch.randint(1, lm.V, (12, 3), generator=torch.Generator().manual_seed(2))
    tokens, advantages = draws(12, lm.V)
    ids = torch.cat([prompts, tokens], -1)
    observations = TokenObservations(ids, torch.ones_like(ids, dtype=torch.bool), 3)
    # Llama's normalisation computes in single precision whatever the model's.
    tolerance = 1e-9 if architecture == "gpt2" else 1e-4
    same_step(policy, control, observations, prompts, tokens, advantages, tolerance)

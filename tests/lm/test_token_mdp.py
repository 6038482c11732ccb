"""Where rewards land and how episodes end, what advantages follow, and the one core under both worlds."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lm_trust.core import Categorical, gae, trust_region_step
from lm_trust.core.parameters import flatten, trainable_parameters
from lm_trust.lm.completion_texts import CompletionTexts
from lm_trust.lm.generation import Completions
from lm_trust.lm.policy import TokenObservations
from lm_trust.lm.prompts import Prompts
from lm_trust.lm.rewards import RewardPart, WeightedRewards
from lm_trust.lm.token_mdp import payments, progress, token_rewards
from lm_trust.lm.vocabulary_head import VocabularyCategorical

# Four completions of at most 3 tokens: cut, ended in the middle, ended at once, ended at the last permitted token.
LENGTHS, ENDED = torch.tensor([3, 2, 1, 3]), torch.tensor([False, True, True, True])
SCORES = torch.tensor([1.0, -2.0, 3.0, 4.0])
LAST = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]


def place(at_limit, per_token=None, **settings):
    per_token = torch.zeros(4, 3) if per_token is None else per_token
    return token_rewards(SCORES, LENGTHS, ENDED, per_token=per_token, at_limit=at_limit, **settings)


def test_a_score_lands_on_the_last_generated_token():
    found = place("terminate", limit_penalty=9.0)  # the penalty belongs to another setting
    assert found.rewards.tolist() == [[0, 0, 1], [0, -2, 0], [3, 0, 0], [0, 0, 4]]
    assert found.terminated.int().tolist() == LAST
    assert not found.truncated.any()


@pytest.mark.parametrize("at_limit", ["terminate", "penalise", "bootstrap"])
def test_a_state_is_what_was_earned_and_what_is_left_of_a_limit_that_ends_it(at_limit):
    found = progress(torch.tensor([[1.0, -3.0], [0.5, 0.0]]), 4, at_limit)
    left = [0, 0, 0] if at_limit == "bootstrap" else [1, 0.75, 0.5]
    assert found.tolist() == [
        [list(pair) for pair in zip(earned, left, strict=True)] for earned in ([0, 1, -2], [0, 0.5, 0.5])
    ]


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


# Paid while the texts are written, 0 behind their ends.
PER_TOKEN = torch.tensor([[1.0, -2, 6], [0, 1, 0], [-1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("at_limit", "cut_row"),
    # What the finished text is paid comes on top at the end, unless the text is unfinished.
    [("terminate", [1, -2, 6 + 1]), ("penalise", [1, -2, 6 + 1 - 0.5]), ("bootstrap", [1, -2, 6])],
)
def test_what_is_paid_token_by_token_stays_where_it_is(at_limit, cut_row):
    found = place(at_limit, PER_TOKEN, limit_penalty=0.5)
    assert found.rewards.tolist() == [cut_row, [0, 1 - 2, 0], [-1 + 3, 0, 0], [0, 0, 1 + 4]]


# What parts of rewards are paid for a text, and when


class Decoder:
    """A tokenizer whose tokens are single letters, 1 for a; 0 is special and 27 a new line."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(" abcdefghijklmnopqrstuvwxyz\n"[token] for token in row if token) for row in rows]


def written(*rows, ended):
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    prompts = Prompts([f"p{row}" for row in range(len(rows))], {"worth": [1.0, 2.0, 4.0]}, "here", "line", [1, 2, 3])
    ids = torch.nn.functional.pad(tokens, (1, 0), value=24)  # behind prompts of one token
    observations = TokenObservations(ids, torch.ones_like(ids, dtype=torch.bool), 1)
    return CompletionTexts(Decoder(), prompts, Completions(observations, tokens, lengths, torch.tensor(ended)))


def paid(texts, *parts):
    rewards = WeightedRewards(parts)
    known = {"lengths": texts.lengths, "ended": texts.ended, "tokens": texts.tokens}
    scores = rewards.score(texts.prompts.texts, texts.texts, texts.prompts.fields, **known)
    found = payments(rewards, scores, texts)
    return found.final.tolist(), found.per_token.tolist(), found.totals.tolist(), scores.total.tolist()


# "ab\nc" and an end, "\n" and an end, and "a\nb\n\n" cut by the limit
TEXTS = ([1, 2, 27, 3, 0], [27, 0], [1, 27, 2, 27, 27])
ENDS = [True, True, False]


def test_texts_by_their_tokens():
    texts = written(*TEXTS, ended=ENDS)
    assert texts.texts == ["ab\nc", "\n", "a\nb\n\n"]
    assert texts.beginnings[0] == ["", "a", "ab", "ab\n", "ab\nc", "ab\nc"]
    assert texts.tokens == [["a", "b", "\n", "c", ""], ["\n", ""], ["a", "\n", "b", "\n", "\n"]]


def test_a_score_of_the_text_is_paid_at_its_end():
    final, per_token, totals, scores = paid(written(*TEXTS, ended=ENDS), RewardPart("length", 0.5))
    assert final == totals == scores == [2.5, 1.0, 2.5]
    assert not any(map(any, per_token))


def test_a_dense_score_is_paid_by_its_changes():
    def worthy(completions, worth, completion_lengths, completion_ended):
        columns = zip(completions, worth, completion_lengths, completion_ended, strict=True)
        return [7 + worth * text.count("\n") + 10 * length + 100 * ended for text, worth, length, ended in columns]

    final, per_token, totals, scores = paid(written(*TEXTS, ended=ENDS), RewardPart(worthy, 2.0, dense=True))
    assert final == [0, 0, 0]
    assert per_token == [[20, 20, 22, 20, 220], [24, 220, 0, 0, 0], [20, 28, 20, 28, 28]]
    # In all the score less the bare prompt's.
    assert totals == [score - 2.0 * 7 for score in scores]


def test_a_token_level_reward_is_paid_at_each_token():
    def ranks(completion_tokens):
        return [range_of(len(tokens)) for tokens in completion_tokens]

    def range_of(count):
        return [float(place + 1) for place in range(count)]

    final, per_token, totals, scores = paid(written(*TEXTS, ended=ENDS), RewardPart(ranks, -1.0, level="token"))
    assert final == [0, 0, 0]
    assert per_token == [[-1, -2, -3, -4, -5], [-1, -2, 0, 0, 0], [-1, -2, -3, -4, -5]]
    assert totals == scores == [-15, -3, -15]


def test_a_step_level_reward_is_paid_where_the_step_is_complete():
    def sizes(steps):
        return [[10.0 * len(step) + place for place, step in enumerate(each)] for each in steps]

    final, per_token, totals, scores = paid(written(*TEXTS, ended=ENDS), RewardPart(sizes, 2.0, level="step"))
    # "ab\n" is complete at its delimiter, "c" when the text is; "\n" alone is no step.
    assert final == [2 * 11, 0, 0]
    assert per_token == [[0, 0, 2 * 30, 0, 0], [0] * 5, [0, 2 * 20, 0, 2 * 21, 0]]
    assert totals == scores == [82, 0, 82]


def test_parts_are_paid_side_by_side():
    parts = [RewardPart("length"), RewardPart("length", 3.0, dense=True)]
    parts.append(RewardPart(lambda steps: [[5.0] * len(each) for each in steps], level="step"))
    final, per_token, totals, scores = paid(written(*TEXTS, ended=ENDS), *parts)
    assert final == [5 + 5, 2, 5]
    assert per_token == [[3, 3, 8, 3, 3], [3, 3, 0, 0, 0], [3, 8, 3, 8, 3]]
    assert totals == scores


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

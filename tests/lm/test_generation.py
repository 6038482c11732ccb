"""Sampling: it draws from the scored distribution and no other, and completions end where they end."""

import json
import math

import pytest
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lm_trust.lm.generation import ExponentialRace, complete, left_pad, sample_completions
from lm_trust.lm.loading import attach_adapter, load_policy, load_tokenizer, prepare_base
from lm_trust.lm.policy import CausalPolicy

# Completions by hand: 0 ends, and is also what pads.
TOKENS = [
    [5, 6, 7, 8],  # cut by the limit
    [5, 0, 0, 0],  # ends, then padding
    [0, 0, 0, 0],  # ends at once
    [5, 6, 7, 0],  # ends at the last permitted token
    [5, 0, 6, 0],  # what follows the first end is no part of it
]
LENGTHS, ENDED = [4, 2, 1, 4, 2], [False, True, True, True, True]


def completed(tokens=TOKENS, ends=(0,), prompts=((1, 2), (3,), (1, 2), (3,), (1,))):
    padded, mask = left_pad(prompts, 0)
    return complete(mask, padded, torch.tensor(tokens), eos_ids=list(ends))


def test_prompts_are_padded_on_the_left_and_masked_by_length():
    ids, mask = left_pad([[4, 0, 5], [0], [6, 7]], 0)
    assert ids.tolist() == [[4, 0, 5], [0, 0, 0], [0, 6, 7]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]


def test_a_completion_ends_with_its_first_end_of_sequence_even_where_that_pads():
    found = completed()
    assert found.lengths.tolist() == LENGTHS
    assert found.ended.tolist() == ENDED
    assert found.mask.tolist() == [[step < length for step in range(4)] for length in LENGTHS]
    seen = found.observations
    assert seen.prompt_width == 2
    assert seen.input_ids[:, 2:].tolist() == TOKENS
    assert seen.attention_mask[:, 2:].equal(found.mask)
    assert seen.attention_mask[:, :2].tolist() == [[True, True], [False, True]] * 2 + [[False, True]]


def test_any_of_several_tokens_can_end():
    found = completed([[5, 6, 0, 0], [7, 5, 0, 0]], ends=(5, 7), prompts=[(1,), (2,)])
    assert found.lengths.tolist() == [1, 1]
    found = completed([[5, 6, 7, 0], [1, 5, 0, 0]], ends=(6, 7), prompts=[(1,), (2,)])
    assert found.lengths.tolist() == [2, 4]
    assert found.ended.tolist() == [True, False]


# Sampled completions


@pytest.mark.parametrize("own_pad", [False, True], ids=["pad is EOS", "own pad"])
def test_completions_of_mixed_prompts(make_policy, model_folders, architecture, lm, own_pad):
    folder = model_folders(architecture, own_pad)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == (lm.PAD if own_pad else lm.EOS)
    policy = make_policy(path=folder)
    found = lm.sample(policy, tokenizer, lm.TEXTS * 8, steps=5)
    steps = found.tokens.shape[1]
    assert steps == found.lengths.max() <= 5
    # All the ways to end are there: at the first token, later, by the limit.
    assert 1 in found.lengths[found.ended]
    assert (found.lengths[found.ended] > 1).any()
    assert (~found.ended).any()
    assert (found.lengths[~found.ended] == 5).all()
    for row, (text, length) in enumerate(zip(lm.TEXTS * 8, found.lengths.tolist(), strict=True)):
        ids = tokenizer(text)["input_ids"]
        real = found.observations.attention_mask[row]
        assert found.observations.input_ids[row][real].tolist() == ids + found.tokens[row, :length].tolist()
        assert (found.tokens[row, : length - 1] != lm.EOS).all()
        assert (found.tokens[row, length - 1] == lm.EOS) == found.ended[row]
        assert (found.tokens[row, length:] == tokenizer.pad_token_id).all()
        assert found.mask[row].tolist() == [step < length for step in range(steps)]


def test_generation_stops_when_all_have_ended(make_policy, tokenizer, lm):
    found = lm.sample(make_policy(), tokenizer, steps=5, ends=range(lm.V))
    assert found.tokens.shape == (len(lm.TEXTS), 1)
    assert found.ended.all()
    assert found.mask.all()


def test_one_permitted_token_and_no_end_in_reach(make_policy, tokenizer, lm):
    found = lm.sample(make_policy(), tokenizer, steps=1, ends=[lm.PAD])
    assert found.tokens.shape == (len(lm.TEXTS), 1)
    assert found.lengths.tolist() == [1] * len(lm.TEXTS)


@pytest.mark.usefixtures("global_streams")
def test_with_no_end_every_completion_goes_to_the_limit(make_policy, lm):
    generator = torch.Generator().manual_seed(0)
    settings = {"max_new_tokens": 7, "eos_ids": [], "pad_id": lm.PAD, "generator": generator}
    completions = sample_completions(make_policy(), [[1, 2, 3]] * 40, **settings)
    assert completions.mask.all() and completions.tokens.shape == (40, 7) and not completions.ended.any()
    assert (completions.tokens == lm.EOS).any()
    behind = (completions.tokens == lm.EOS).cumsum(-1)[:, :-1].bool()
    assert (completions.tokens[:, 1:][behind] != lm.PAD).any()  # text goes on behind what is no end


def test_the_generator_decides_and_moves_on(make_policy, tokenizer, lm):
    policy, state = make_policy(), torch.Generator().manual_seed(7)

    def draw(generator):
        ids = [tokenizer(text)["input_ids"] for text in lm.TEXTS]
        settings = {"max_new_tokens": 6, "eos_ids": [lm.EOS], "pad_id": lm.EOS}
        return sample_completions(policy, ids, generator=generator, **settings).tokens

    first, second = draw(state), draw(state)
    assert first.shape != second.shape or not torch.equal(first, second)
    assert torch.equal(draw(torch.Generator().manual_seed(7)), first)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_token_is_drawn_from_the_distribution_that_is_scored(make_policy, tokenizer, lm, temperature):
    """The cached pass of `generate`, padded and in single precision, against the scoring pass: the ratio is 1."""
    policy = make_policy(dtype=torch.float32, temperature=temperature)
    drawn_from = lm.record_scores(policy)
    completions = lm.sample(policy, tokenizer, lm.TEXTS * 2)
    sampled = torch.stack(drawn_from, 1).log_softmax(-1)
    with torch.no_grad():
        scored = policy.distribution(completions.observations)
    mask = completions.mask
    torch.testing.assert_close(scored.dense().log_probs[mask], sampled[mask], rtol=0, atol=1e-4)
    chosen = sampled.gather(-1, completions.tokens.unsqueeze(-1)).squeeze(-1)
    ratio = (scored.log_prob(completions.tokens) - chosen).exp()[mask]
    assert (ratio - 1).abs().max() < 1e-4
    assert mask.sum(-1).unique().numel() > 1


@pytest.mark.parametrize("trained", ["adapter", "all weights"])
def test_the_states_that_are_kept_are_those_that_scoring_computes(make_policy, tokenizer, lm, trained):
    r = 2 if trained == "adapter" else None
    policy = lm.move(make_policy(moved=False, dtype=torch.float32, temperature=0.7, r=r), scale=0.05)
    found = lm.sample(policy, tokenizer, lm.TEXTS * 12)
    mask = found.mask
    assert mask.sum(-1).unique().numel() > 1 and not found.observations.attention_mask[:, 0].all()
    with torch.no_grad():
        scored = policy.distribution(found.observations)
        kept = policy.head(found.step_states)
    assert found.step_states.shape == scored.hidden.shape and not found.step_states.requires_grad
    torch.testing.assert_close(found.step_states[mask], scored.hidden[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        kept.log_prob(found.tokens)[mask], scored.log_prob(found.tokens)[mask], rtol=0, atol=1e-5
    )
    assert not policy.causal_lm.get_output_embeddings()._forward_pre_hooks


def test_in_half_precision_scoring_computes_the_states_itself(make_policy, tokenizer, lm):
    found = lm.sample(make_policy(dtype=torch.float32, autocast="bfloat16"), tokenizer)
    assert found.step_states is None


def test_transformers_own_top_k_of_50_is_off(model_folder, tokenizer, lm):
    config = AutoConfig.from_pretrained(model_folder, vocab_size=80)
    policy = CausalPolicy(attach_adapter(prepare_base(AutoModelForCausalLM.from_config(config)), r=2))
    drawn_from = lm.record_scores(policy)
    lm.sample(policy, tokenizer, steps=2)
    assert all(scores.shape[-1] == 80 and scores.isfinite().all() for scores in drawn_from)


BENT = {
    "do_sample": True,
    "temperature": 0.2,
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.3,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 3,
    "suppress_tokens": [1, 2, 3, 4],
}


@pytest.mark.usefixtures("global_streams")
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_frequencies_follow_the_scores_whatever_the_hub_model_would_have(
    architecture, tokenizer, lm, tmp_path, temperature
):
    lm.write_model(tmp_path, architecture, seed=3)
    written = tmp_path / "generation_config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), **BENT}))
    assert GenerationConfig.from_pretrained(tmp_path).top_k == 2
    policy = lm.move(load_policy(str(tmp_path), r=2, temperature=temperature))
    count, texts = 3000, ["we never liked", "a"]
    found = lm.sample(policy, tokenizer, [text for text in texts for _ in range(count)], steps=1, seed=11)
    with torch.no_grad():
        probabilities = policy.distribution(found.observations[::count]).dense().log_probs.exp()[:, 0]
    observed = [torch.bincount(row, minlength=lm.V) for row in found.tokens.view(2, count)]
    for counts, p in zip(observed, probabilities, strict=True):
        # Rare tokens share a cell with the rarest that is not.
        expected = p.double() * count
        order = expected.argsort(descending=True)
        cells = int((expected >= 5).sum())
        fold = [[*side[order][: cells - 1].tolist(), side[order][cells - 1 :].sum()] for side in (counts, expected)]
        assert cells > 4
        assert stats.chisquare(*fold, sum_check=False).pvalue > 1e-3
    # The test can fail: the other prompt's distribution is another.
    assert (probabilities[0] - probabilities[1]).abs().max() > 0.05


def test_rare_words_get_their_share_and_impossible_ones_nothing():
    """One word of 0.99, and 0.01 shared by 49,000 of 2e-7 each; 1,000 cannot be."""
    scores = torch.zeros(500, 50_001)
    scores[:, 0] = math.log(99 * 49_000)
    scores[:, -1000:] = -torch.inf
    race = ExponentialRace(2.0, seed=5)
    drawn = torch.cat([race(None, 2.0 * scores).argmax(-1) for _ in range(8)])
    rare = (drawn > 0).sum().item()
    assert stats.binomtest(rare, len(drawn), 0.01).pvalue > 1e-2
    assert rare > 1 and drawn.max() <= 49_000

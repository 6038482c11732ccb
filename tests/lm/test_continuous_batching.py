"""Continuous batching draws from the scored distribution, ends where `generate` ends, and leaves nothing behind."""

import gc
import json
import math
import threading

import pytest
import torch
from scipy import stats
from tiny_models import EOS, WORDS
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from lm_trust.errors import UserError
from lm_trust.lm.engines import check_engine, load_engine
from lm_trust.lm.loading import load_policy, load_tokenizer
from lm_trust.lm.policy import CausalPolicy

try:
    engine = load_engine("continuous_batching")
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)
from lm_trust.lm import continuous_batching


@pytest.fixture
def architecture():
    return "llama"


@pytest.fixture
def few_under_way(monkeypatch):
    """So that prompts wait for a place."""
    monkeypatch.setattr(continuous_batching, "UNDER_WAY", 4)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No thread goes on, and the global generator is as it was."""
    torch.manual_seed(123)
    before, frozen = torch.get_rng_state(), gc.get_freeze_count()
    yield
    assert torch.equal(torch.get_rng_state(), before)
    assert [thread for thread in threading.enumerate() if not thread.daemon] == [threading.main_thread()]
    assert gc.get_freeze_count() <= frozen


def draw(policy, tokenizer, texts, *, steps=6, seed=0, ends=(EOS,), generator=None):
    return engine(
        policy,
        [tokenizer(text)["input_ids"] for text in texts],
        max_new_tokens=steps,
        eos_ids=list(ends),
        pad_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(seed) if generator is None else generator,
    )


@torch.no_grad()
def scored(policy, found, lm):
    """The tokens' log-probabilities by the transformers model's own logits, row by row and without padding."""
    every = lm.plain_log_probs(policy, found.observations, policy.temperature)
    return every.gather(-1, found.tokens.unsqueeze(-1)).squeeze(-1)


@pytest.mark.usefixtures("few_under_way")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engines_log_probabilities_are_the_policys(make_policy, tokenizer, lm, temperature):
    policy = make_policy(dtype=torch.float32, temperature=temperature)
    found = draw(policy, tokenizer, lm.TEXTS * 3)
    assert found.engine_log_prob.shape == found.tokens.shape
    mask = found.mask
    assert mask.sum(-1).unique().numel() > 1
    torch.testing.assert_close(found.engine_log_prob[mask], scored(policy, found, lm)[mask], rtol=0, atol=1e-4)
    # The test can fail: at another temperature they are others.
    policy.temperature = 1.3
    assert (found.engine_log_prob - scored(policy, found, lm))[mask].abs().max() > 0.1


BENT = {"temperature": 0.2, "top_k": 2, "top_p": 0.5, "repetition_penalty": 5.0, "suppress_tokens": [1, 2, 3, 4]}


def test_frequencies_follow_the_scores_whatever_the_hub_model_would_have(tokenizer, lm, tmp_path):
    lm.write_model(tmp_path, "llama", seed=3)
    written = tmp_path / "generation_config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), **BENT, "do_sample": True}))
    policy = lm.move(load_policy(str(tmp_path), r=2, temperature=1.5))
    count, texts = 1500, ["we never liked", "a"]
    found = draw(policy, tokenizer, [text for text in texts for _ in range(count)], steps=1, seed=11)
    with torch.no_grad():
        probabilities = policy.distribution(found.observations[::count]).dense().log_probs.exp()[:, 0]
    for row, p in zip(found.tokens.view(2, count), probabilities, strict=True):
        expected, counts = p.double() * count, torch.bincount(row, minlength=lm.V)
        order = expected.argsort(descending=True)
        cells = int((expected >= 5).sum())  # rare tokens share a cell with the rarest that is not
        fold = [[*side[order][: cells - 1].tolist(), side[order][cells - 1 :].sum()] for side in (counts, expected)]
        assert cells > 4
        assert stats.chisquare(*fold, sum_check=False).pvalue > 1e-3
    assert (probabilities[0] - probabilities[1]).abs().max() > 0.05


@pytest.mark.usefixtures("few_under_way")
@pytest.mark.parametrize("own_pad", [False, True], ids=["pad is EOS", "own pad"])
def test_completions_of_mixed_prompts(make_policy, model_folders, lm, own_pad):
    folder = model_folders("llama", own_pad)
    tokenizer = load_tokenizer(str(folder))
    policy = make_policy(path=folder, dtype=torch.float32)
    found = draw(policy, tokenizer, lm.TEXTS * 8, steps=5)
    steps = found.tokens.shape[1]
    assert steps == found.lengths.max() <= 5
    assert 1 in found.lengths[found.ended]
    assert (found.lengths[found.ended] > 1).any()
    assert (~found.ended).any()
    assert (found.lengths[~found.ended] == 5).all()
    for row, (text, length) in enumerate(zip(lm.TEXTS * 8, found.lengths.tolist(), strict=True)):
        real = found.observations.attention_mask[row]
        whole = tokenizer(text)["input_ids"] + found.tokens[row, :length].tolist()
        assert found.observations.input_ids[row][real].tolist() == whole
        assert (found.tokens[row, : length - 1] != EOS).all()
        assert (found.tokens[row, length - 1] == EOS) == found.ended[row]
        assert (found.tokens[row, length:] == tokenizer.pad_token_id).all()


def test_several_ends_one_token_and_no_end(make_policy, tokenizer, lm):
    policy = make_policy(dtype=torch.float32)
    found = draw(policy, tokenizer, lm.TEXTS, steps=5, ends=range(lm.V))
    assert found.tokens.shape == (len(lm.TEXTS), 1) and found.ended.all()
    found = draw(policy, tokenizer, lm.TEXTS, steps=1, ends=[lm.PAD])
    assert found.tokens.shape == (len(lm.TEXTS), 1) and found.mask.all()
    found = draw(policy, tokenizer, lm.TEXTS * 4, steps=7, ends=[])
    assert found.tokens.shape == (4 * len(lm.TEXTS), 7) and found.mask.all() and not found.ended.any()
    assert (found.tokens == EOS).any()


@pytest.mark.usefixtures("few_under_way")
def test_the_generator_decides_and_moves_on(make_policy, tokenizer, lm):
    policy, state = make_policy(dtype=torch.float32), torch.Generator().manual_seed(7)
    first = draw(policy, tokenizer, lm.TEXTS, generator=state)
    second = draw(policy, tokenizer, lm.TEXTS, generator=state)
    assert first.tokens.shape != second.tokens.shape or not torch.equal(first.tokens, second.tokens)
    for _ in range(4):  # the engine's thread has no say in it
        again = draw(policy, tokenizer, lm.TEXTS, seed=7)
        assert torch.equal(again.tokens, first.tokens)
        assert torch.equal(again.engine_log_prob, first.engine_log_prob)


def test_the_adapter_of_now_samples(make_policy, tokenizer, lm):
    policy = make_policy(dtype=torch.float32)
    before = draw(policy, tokenizer, lm.TEXTS * 3)
    assert (before.engine_log_prob - scored(policy, before, lm))[before.mask].abs().max() < 1e-4
    lm.move(policy, seed=5)
    after = draw(policy, tokenizer, lm.TEXTS * 3)
    assert (after.engine_log_prob - scored(policy, after, lm))[after.mask].abs().max() < 1e-4
    assert (before.engine_log_prob - scored(policy, before, lm))[before.mask].abs().max() > 0.1


def test_all_weights_may_be_trained(make_policy, tokenizer, lm):
    policy = make_policy(dtype=torch.float32, r=None, moved=False)
    lm.move(policy, scale=0.1)
    found = draw(policy, tokenizer, lm.TEXTS)
    assert (found.engine_log_prob - scored(policy, found, lm))[found.mask].abs().max() < 1e-4


def test_the_attention_is_put_back(make_policy, tokenizer, lm):
    policy = make_policy(dtype=torch.float32)
    model = policy.causal_lm
    model.set_attn_implementation("eager")
    found = draw(policy, tokenizer, lm.TEXTS)
    assert model.config._attn_implementation == "eager"
    assert (found.engine_log_prob - scored(policy, found, lm))[found.mask].abs().max() < 1e-4
    model.config.layer_types = ["chunked_attention"] * 2
    with pytest.raises(UserError, match=r"rollout\.engine: continuous_batching cannot run this model \(.*use generate"):
        draw(policy, tokenizer, lm.TEXTS)
    assert model.config._attn_implementation == "eager"


def test_a_model_with_attention_of_its_own_is_refused(tokenizer, lm):
    """GPT-Neo's cannot be replaced: the engine would draw from another distribution."""
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    config = GPTNeoConfig(vocab_size=lm.V, bos_token_id=None, eos_token_id=EOS, **shape)
    with torch.random.fork_rng(devices=[]):
        policy = CausalPolicy(GPTNeoForCausalLM(config))
    with pytest.raises(UserError, match=r"rollout\.engine: continuous_batching cannot run GPTNeoForCausalLM; use gen"):
        draw(policy, tokenizer, lm.TEXTS)
    with pytest.raises(UserError, match="cannot run GPTNeoForCausalLM"):
        check_engine("continuous_batching", policy)
    check_engine("generate", policy)


def test_in_half_precision_the_engine_is_another_distribution(make_policy, tokenizer, lm):
    """It computes in float32 where the policy does not: the mismatch that is there is the one that it reports."""
    policy = make_policy(dtype=torch.float32, autocast="bfloat16")
    found = draw(policy, tokenizer, lm.TEXTS * 2)
    with torch.no_grad():
        by_policy = policy.distribution(found.observations).log_prob(found.tokens)
    assert 1e-3 < (found.engine_log_prob - by_policy)[found.mask].abs().max() < 0.5
    policy.autocast = None
    assert (found.engine_log_prob - scored(policy, found, lm))[found.mask].abs().max() < 1e-4


def test_completions_end_where_there_is_no_distribution_and_scoring_finds_the_place(make_policy, tokenizer, lm):
    policy = make_policy(dtype=torch.float32)
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[1 + WORDS.index("never")] = math.nan
    found = draw(policy, tokenizer, lm.TEXTS)
    row = [index for index, text in enumerate(lm.TEXTS) if "never" in text]
    assert found.lengths[row].tolist() == [1] and found.ended[row].all()
    with torch.no_grad():
        broken = ~policy.distribution(found.observations).log_prob(found.tokens).isfinite() & found.mask
    assert broken[row, 0].all() and found.engine_log_prob[found.mask].isfinite().all()


def test_a_pass_that_fails_is_an_error_with_a_way_out(make_policy, tokenizer, lm, monkeypatch):
    policy = make_policy(dtype=torch.float32)

    def forward(*_, **__):
        raise RuntimeError("the pass broke")

    monkeypatch.setattr(policy.causal_lm, "forward", forward)
    with pytest.raises(UserError, match=r"continuous_batching failed \(the pass broke\); use generate"):
        draw(policy, tokenizer, lm.TEXTS)

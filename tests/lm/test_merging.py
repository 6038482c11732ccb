"""Merged weights: transformers alone loads them, and their logits are the policy's."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lm_trust.errors import UserError
from lm_trust.lm import merging
from lm_trust.lm.loading import load_base, load_policy, load_tokenizer
from lm_trust.lm.merging import merge_adapter
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.saving import save_adapter


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def tokenizer(model_folders):
    return load_tokenizer(str(model_folders("gpt2")))


@torch.no_grad()
def log_probs(causal_lm, completions):
    seen = completions.observations
    logits = causal_lm(
        input_ids=seen.input_ids, attention_mask=seen.attention_mask.long(), position_ids=seen.position_ids
    ).logits
    return logits[:, seen.prompt_width - 1 : -1].log_softmax(-1)[completions.mask]


def test_the_merged_model_is_the_policy_and_needs_nothing_else(model_folder, tokenizer, lm, tmp_path):
    policy = lm.move(load_policy(str(model_folder), r=2))
    completions = lm.sample(policy, tokenizer)
    save_adapter(policy, tmp_path / "adapter")
    merge_adapter(str(model_folder), tmp_path / "adapter", tmp_path / "deep" / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "merged").eval()
    assert type(merged) is type(policy.causal_lm)
    found = log_probs(merged, completions)
    torch.testing.assert_close(found, log_probs(policy.causal_lm, completions), rtol=0, atol=1e-4)
    with policy.as_base():
        assert (log_probs(policy.causal_lm, completions) - found).abs().max() > 0.01
    names = {path.name for path in (tmp_path / "deep" / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["merged"]


def test_generate_samples_as_training_did(model_folders, tokenizer, lm, tmp_path):
    folder = model_folders("gpt2")
    save_adapter(load_policy(str(folder), r=2), tmp_path / "adapter")
    merge_adapter(str(folder), tmp_path / "adapter", tmp_path / "merged", temperature=0.7)
    settings = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.7, 0, 1.0)
    assert (settings.eos_token_id, settings.pad_token_id) == ([lm.EOS], lm.EOS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "merged")("the film", return_tensors="pt")
    ids = merged.generate(**inputs, max_new_tokens=3)
    assert ids.shape[0] == 1
    assert 2 < ids.shape[1] <= 5


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_run_that_started_from_an_adapter_merges_what_it_ended_with(model_folder, tokenizer, lm, tmp_path):
    save_adapter(lm.move(load_policy(str(model_folder), r=2)), tmp_path / "sft")
    policy = lm.move(load_policy(str(model_folder), adapter=tmp_path / "sft"), seed=5)
    completions = lm.sample(policy, tokenizer)
    save_adapter(policy, tmp_path / "adapter")
    merge_adapter(str(model_folder), tmp_path / "adapter", tmp_path / "merged")
    found = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), completions)
    torch.testing.assert_close(found, log_probs(policy.causal_lm, completions), rtol=0, atol=1e-4)
    with policy.as_reference():
        assert (log_probs(policy.causal_lm, completions) - found).abs().max() > 0.01


EMBEDDINGS = {"gpt2": "wte", "opt": "embed_tokens", "llama": "embed_tokens", "qwen2": "embed_tokens"}


@pytest.mark.parametrize("how", ["lora", "saved copy"])
@pytest.mark.parametrize("architecture", EMBEDDINGS)
def test_an_adapted_input_embedding_leaves_the_head_that_it_is_tied_to(
    model_folder, tokenizer, lm, tmp_path, architecture, how
):
    policy = load_policy(str(model_folder), r=2, targets=[EMBEDDINGS[architecture]])
    if how == "saved copy":
        settings = LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=[EMBEDDINGS[architecture]])
        policy = CausalPolicy(get_peft_model(load_base(str(model_folder)), settings))
    lm.move(policy)
    completions = lm.sample(policy, tokenizer)
    save_adapter(policy, tmp_path / "adapter")
    merge_adapter(str(model_folder), tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not merged.config.tie_word_embeddings
    found = log_probs(merged, completions)
    torch.testing.assert_close(found, log_probs(policy.causal_lm, completions), rtol=0, atol=1e-4)
    with policy.as_base():
        assert (log_probs(policy.causal_lm, completions) - found).abs().max() > 0.01


@pytest.fixture
def saved(model_folders, tmp_path):
    folder = str(model_folders("gpt2"))
    save_adapter(load_policy(folder, r=2), tmp_path / "adapter")
    return folder, tmp_path / "adapter"


def test_what_stands_at_the_output_is_never_written_over(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--output: .*full is not empty"):
        merge_adapter(*saved, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"--output: .*notes\.txt is a file"):
        merge_adapter(*saved, tmp_path / "full" / "notes.txt")
    with pytest.raises(UserError, match=r"--output: .* could not be written"):
        merge_adapter(*saved, tmp_path / "full" / "notes.txt" / "below")
    (tmp_path / "empty").mkdir()
    merge_adapter(*saved, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["model_type"] == "gpt2"


def test_a_failure_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    def fail(model, tokenizer, generation, target):
        (target / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "write_model", fail)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        merge_adapter(*saved, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_run_without_an_adapter_is_one_clear_line(saved, tmp_path):
    with pytest.raises(UserError, match=r"no adapter yet \(there is no adapter_config\.json in it\)") as error:
        merge_adapter(saved[0], tmp_path / "nothing", tmp_path / "merged")
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_not_finite_is_one_clear_line(model_folders, tmp_path):
    policy = load_policy(str(model_folders("gpt2")), r=2)
    with torch.no_grad():
        next(each for each in policy.parameters() if each.requires_grad).fill_(torch.nan)
    save_adapter(policy, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter: the adapter could not be merged: NaNs detected") as error:
        merge_adapter(str(model_folders("gpt2")), tmp_path / "adapter", tmp_path / "merged")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

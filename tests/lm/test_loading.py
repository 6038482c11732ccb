"""Models, tokenizers and adapters: what loads, what is refused and by which words, and what is written."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    MptConfig,
    Phi3Config,
    XLNetConfig,
)
from transformers.pytorch_utils import Conv1D

from lm_trust.errors import UserError
from lm_trust.lm.loading import (
    load_adapter,
    load_base,
    load_policy,
    load_text_config,
    load_tokenizer,
    prepare_base,
    sampling_length,
)
from lm_trust.lm.policy import TokenObservations
from lm_trust.lm.saving import load_trained, save_adapter, save_trained
from lm_trust.lm.text_models import positions_of


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# Tokenizers and bases; the `network_attempts` fixture sees to it that none of this touches the network.


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(model_folders, architecture, lm):
    tokenizer = load_tokenizer(str(model_folders(architecture)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == lm.EOS
    assert tokenizer.padding_side == "left"
    own = load_tokenizer(str(model_folders(architecture, True)))
    assert (own.pad_token_id, own.eos_token_id) == (lm.PAD, lm.EOS)


def test_a_tokenizer_without_an_end_is_refused(model_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(model_folder / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"model\.path: .* no end-of-sequence token") as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in one_line(error)


def test_a_folder_without_a_tokenizer_is_refused(model_folders, architecture, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_folders(architecture)).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"^model\.path: .* holds no tokenizer|no tokenizer could be loaded") as error:
        load_tokenizer(str(tmp_path / "bare"))
    assert str(tmp_path / "bare") in one_line(error)


def add_token(folder, target, **special):
    """The folder with a special token more in its tokenizer, and a model that has not grown with it."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.add_special_tokens(special) == 1
    tokenizer.save_pretrained(target)
    assert len(tokenizer) > AutoConfig.from_pretrained(target).vocab_size
    return str(target)


def test_a_pad_token_that_the_model_has_no_embedding_of_never_pads(model_folders, architecture, lm, tmp_path):
    folder = add_token(model_folders(architecture, True), tmp_path / "padded", pad_token="[PAD]")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == lm.EOS
    policy = load_policy(folder, r=2)
    with torch.no_grad():
        assert policy.distribution(lm.sample(policy, tokenizer).observations).dense().log_probs.isfinite().all()


def test_an_end_that_the_model_has_no_embedding_of_is_refused(model_folders, architecture, tmp_path, lm):
    folder = add_token(model_folders(architecture, True), tmp_path / "ended", eos_token="[END]")
    with pytest.raises(UserError, match=rf"model\.path: .* ends a sequence by token {lm.V}, .* has {lm.V} embeddings"):
        load_tokenizer(folder)


def test_a_base_is_frozen_at_rest_and_in_single_precision(model_folder, tmp_path, lm):
    base = load_base(str(model_folder))
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(module.training for module in base.modules())
    shutil.copytree(model_folder, tmp_path / "half", dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(model_folder).half().save_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in load_base(str(tmp_path / "half")).parameters()} == {torch.float32}
    settings = base.generation_config
    assert (settings.eos_token_id, settings.top_k, settings.temperature) == (lm.EOS, None, None)


def test_a_base_that_lacks_weights_is_refused(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name or "h.1" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"model\.path: .* lacks weights of the model, .*; they would be random"
    ) as error:
        load_base(str(tmp_path))
    assert name in one_line(error)


def test_the_context_is_read_without_the_model(model_folder, tmp_path):
    shutil.copy(model_folder / "config.json", tmp_path)
    assert positions_of(load_text_config(str(tmp_path))) == 64


def test_a_negative_number_of_positions_is_no_limit(tmp_path):
    XLNetConfig().save_pretrained(tmp_path)
    config = load_text_config(str(tmp_path))
    assert positions_of(config) is sampling_length(config) is None


def test_mpts_name_for_its_positions_is_known(tmp_path):
    MptConfig(max_seq_len=16).save_pretrained(tmp_path)
    assert positions_of(load_text_config(str(tmp_path))) == 16


def longrope(folder, original):
    """A tiny model as Phi-3's long ones are: other frequencies for a whole pass that goes beyond `original`."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = Phi3Config(
        max_position_embeddings=64,
        original_max_position_embeddings=original,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
        initializer_range=0.25,
        **SMALL,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_positions_that_longrope_turns_otherwise_are_not_sampled_in(tmp_path, model_folder):
    folder = longrope(tmp_path, original=16)
    config = load_text_config(folder)
    assert (positions_of(config), sampling_length(config)) == (64, 16)
    assert sampling_length(load_text_config(str(model_folder))) == 64
    policy = load_policy(folder, r=2, targets=["qkv_proj"])
    ids = torch.arange(3, 20).unsqueeze(0)
    within, beyond = (
        policy.hidden_states(TokenObservations(ids[:, :length], torch.ones(1, length, dtype=torch.bool), 1))[:, :10]
        for length in (16, 17)
    )
    assert (within - beyond).abs().max() > 0.1  # what the first tokens are scored by depends on how many follow


def test_the_language_model_of_a_multimodal_one(tmp_path):
    """Its configuration has neither positions nor a vocabulary; the language model's inside has."""
    text = {"head_dim": 8, "max_position_embeddings": 32, **SMALL}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={"image_size": 28, **vision}, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert positions_of(load_text_config(str(tmp_path))) == 32
    policy = load_policy(str(tmp_path), r=2, targets=["q_proj"])
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=ids).logits[:, 1:-1]
        found = policy.distribution(TokenObservations(ids, torch.ones_like(ids, dtype=torch.bool), 2)).dense()
    torch.testing.assert_close(found.log_probs, logits.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("load", [load_tokenizer, load_base, load_text_config])
def test_an_empty_folder_is_one_clear_line(load, tmp_path):
    with pytest.raises(UserError, match=r"^model\.path: ") as error:
        load(str(tmp_path))
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize("load", [load_tokenizer, load_base, load_text_config])
def test_a_hub_id_out_of_reach_is_one_clear_line(load, network_attempts, monkeypatch, tmp_path):
    import huggingface_hub.constants

    # As where the hub is switched off: no minute of retries in a test.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.path: .*nobody/nothing-of-this-name") as error:
        load("nobody/nothing-of-this-name")
    one_line(error)
    network_attempts.clear()


def test_a_name_that_is_no_folder_is_said_to_be_taken_for_a_hub_id(network_attempts, monkeypatch, tmp_path):
    """A folder's name that was mistyped looks like a hub id, and the error spoke of a connection alone."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^model\.path: .* from 'my-gpt' \(no folder here: a hub id\): ") as error:
        load_tokenizer("my-gpt")
    one_line(error)
    network_attempts.clear()


SMALL = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma2(cap):
    return Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=cap, **SMALL))


REFUSED = {
    "Gemma2ForCausalLM": lambda: gemma2(30.0),
    "CohereForCausalLM": lambda: CohereForCausalLM(CohereConfig(**SMALL)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_transforms_its_logits_is_refused_by_name(name):
    with pytest.raises(UserError, match=rf"{name} transforms its logits") as error:
        prepare_base(REFUSED[name]())
    one_line(error)


def test_the_same_model_with_a_plain_head_is_not():
    model = gemma2(None)
    assert prepare_base(model) is model
    assert not model.get_output_embeddings()._forward_hooks


BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 24}
ATTENDED_OTHERWISE = {
    "BartForCausalLM": ("bart", BART | {"encoder_layers": 2}),  # takes no position ids
    "RwkvForCausalLM": ("rwkv", {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2}),  # takes no mask
    "XLNetLMHeadModel": ("xlnet", {"vocab_size": 24, "d_model": 32, "n_layer": 2, "n_head": 4}),  # sees what follows
}


@pytest.mark.parametrize("name", ATTENDED_OTHERWISE)
def test_a_model_whose_states_depend_on_padding_or_later_tokens_is_refused_by_name(name):
    model_type, settings = ATTENDED_OTHERWISE[name]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    with pytest.raises(UserError, match=rf"^model\.path: {name} computes another state .* padding") as error:
        prepare_base(model)
    one_line(error)


def test_a_model_whose_cache_leads_to_another_state_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMALL))
    assert prepare_base(model) is model
    forward = model.model.forward
    model.model.forward = lambda past_key_values=None, **given: forward(**given)
    with pytest.raises(UserError, match=r"^model\.path: LlamaForCausalLM computes another state .* cache") as error:
        prepare_base(model)
    one_line(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_refuses_no_model(dtype, model_folder):
    prepare_base(AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype))


def test_a_model_that_cannot_be_run_as_a_policy_is_one_line():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bart"](**BART, encoder_layers=1))
    with pytest.raises(UserError, match=r"^model\.path: BartForCausalLM cannot be run as a policy: .*index") as error:
        prepare_base(model)
    one_line(error)


# Adapters


@pytest.mark.usefixtures("global_streams")
def test_a_fresh_adapter_is_the_base_and_its_seed_decides(model_folder, tokenizer, lm):
    policies = [load_policy(str(model_folder), r=2, seed=seed) for seed in (0, 0, 1)]
    first, same, other = (lm.checksum(policy, trainable=True) for policy in policies)
    assert first == same != other
    weights = {name: value for name, value in policies[0].named_parameters() if value.requires_grad}
    assert all((value == 0).all() == ("lora_B" in name) for name, value in weights.items())
    completions = lm.sample(policies[0], tokenizer)
    own = policies[0].distribution(completions.observations).dense().logits
    with policies[0].as_base():
        assert torch.equal(policies[0].distribution(completions.observations).dense().logits, own)


def test_targets_are_the_architectures_or_the_users(model_folder, architecture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft corrects a wrong fan_in_fan_out, and says so
        default = load_policy(str(model_folder)).model.peft_config["default"]
    assert set(default.target_modules) == ({"c_attn"} if architecture == "gpt2" else {"q_proj", "v_proj"})
    assert default.fan_in_fan_out == (architecture == "gpt2")
    mlp = "c_fc" if architecture == "gpt2" else "up_proj"
    policy = load_policy(str(model_folder), r=3, alpha=7, targets=[mlp])
    assert all(mlp in name for name, value in policy.named_parameters() if value.requires_grad)
    assert (policy.model.peft_config["default"].r, policy.model.peft_config["default"].lora_alpha) == (3, 7)


@pytest.mark.filterwarnings("error")
def test_all_linear_adapts_every_linear_layer_but_the_output_head(model_folder):
    policy = load_policy(str(model_folder), r=2, targets=["all-linear"])
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)} - {"lm_head"}
    adapted = {name.split(".lora_")[0] for name, value in policy.named_parameters() if value.requires_grad}
    assert {name.removeprefix("model.base_model.model.") for name in adapted} == linear


def test_an_adapter_records_the_revision_of_its_base(model_folder, tmp_path):
    save_adapter(load_policy(str(model_folder), r=2, revision="v1"), tmp_path)
    recorded = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (recorded["base_model_name_or_path"], recorded["revision"]) == (str(model_folder), "v1")


@pytest.mark.filterwarnings("ignore")
def test_wrong_targets_are_refused_by_key(model_folder, lm, architecture):
    for targets in (["nonsense"], [lm.TARGETS[architecture], "nonsense"]):
        with pytest.raises(UserError, match=r"^model\.lora\.targets: .*no module 'nonsense' \(its linear") as error:
            load_policy(str(model_folder), targets=targets)
        one_line(error)
    # The head's adapter would take part in sampling and not in scores.
    for targets in (["lm_head"], [lm.TARGETS[architecture], "lm_head"]):
        with pytest.raises(UserError, match=r"^model\.lora\.targets: .*output head"):
            load_policy(str(model_folder), targets=targets)


@pytest.fixture
def trained(make_policy, tokenizer, lm):
    policy = make_policy(dtype=torch.float32)
    return policy, lm.sample(policy, tokenizer)


@torch.no_grad()
def log_probs(policy, completions):
    return policy.distribution(completions.observations).log_prob(completions.tokens)[completions.mask]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_a_saved_adapter_is_a_plain_one(trained, model_folder, tmp_path, lm):
    policy, completions = trained
    save_adapter(policy, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter").eval()
    seen, width = completions.observations, completions.observations.prompt_width
    with torch.no_grad():
        logits = plain(
            input_ids=seen.input_ids, attention_mask=seen.attention_mask.long(), position_ids=seen.position_ids
        ).logits[:, width - 1 : -1]
    found = logits.log_softmax(-1).gather(-1, completions.tokens.unsqueeze(-1)).squeeze(-1)[completions.mask]
    torch.testing.assert_close(found, log_probs(policy, completions), rtol=0, atol=1e-5)
    with policy.as_base():
        assert (log_probs(policy, completions) - found).abs().max() > 0.01
    # Training that started from an adapter saves the trained one, without the reference.
    again = lm.move(load_policy(str(model_folder), adapter=tmp_path / "adapter"), seed=8)
    save_adapter(again, tmp_path / "second")
    assert not [path for path in (tmp_path / "second").rglob("*") if "reference" in path.name]
    third = load_policy(str(model_folder), adapter=tmp_path / "second")
    torch.testing.assert_close(log_probs(third, completions), log_probs(again, completions), rtol=0, atol=1e-5)
    assert (log_probs(third, completions) - found).abs().max() > 0.01


@pytest.mark.usefixtures("global_streams")
@pytest.mark.parametrize("keep_reference", [True, False])
def test_an_adapter_to_start_from(trained, model_folder, tmp_path, keep_reference):
    policy, _ = trained
    save_adapter(policy, tmp_path / "adapter")
    model = load_adapter(load_base(str(model_folder)), tmp_path / "adapter", keep_reference=keep_reference)
    assert set(model.peft_config) == ({"default", "reference"} if keep_reference else {"default"})
    assert model.active_adapters == ["default"]
    wanted = {name for name, value in policy.model.named_parameters() if value.requires_grad}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == wanted


def test_trained_weights_go_back_into_a_policy(trained, model_folder, tmp_path, lm):
    policy, completions = trained
    save_adapter(policy, tmp_path / "adapter")
    other = load_policy(str(model_folder), r=2, alpha=4)
    frozen = lm.checksum(other, trainable=False)
    load_trained(other, tmp_path / "adapter")
    torch.testing.assert_close(log_probs(other, completions), log_probs(policy, completions), rtol=0, atol=1e-6)
    assert lm.checksum(other, trainable=True) == lm.checksum(policy, trainable=True)
    assert lm.checksum(other, trainable=False) == frozen


def test_trained_weights_leave_the_reference_where_it_was(trained, model_folder, tmp_path, lm):
    policy, completions = trained
    save_adapter(policy, tmp_path / "start")
    start = log_probs(policy, completions)
    save_adapter(lm.move(policy, seed=9), tmp_path / "end")
    other = load_policy(str(model_folder), adapter=tmp_path / "start")
    load_trained(other, tmp_path / "end")
    torch.testing.assert_close(log_probs(other, completions), log_probs(policy, completions), rtol=0, atol=1e-6)
    with other.as_reference():
        torch.testing.assert_close(log_probs(other, completions), start, rtol=0, atol=1e-6)
    assert (log_probs(other, completions) - start).abs().max() > 0.01


MISFITS = {
    "another rank": {"r": 3},
    "other targets": {"targets": {"gpt2": ["c_fc"], "llama": ["up_proj"]}},
    "more targets": {"targets": {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "up_proj"]}},
    "fewer targets": {"targets": {"gpt2": ["attn.c_proj"], "llama": ["q_proj"]}},
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS.keys())
def test_an_adapter_that_does_not_fit_the_policy_is_refused(trained, model_folder, architecture, tmp_path, misfit):
    save_adapter(trained[0], tmp_path / "adapter")
    settings = {"r": 2, "alpha": 4} | misfit
    if "targets" in misfit:
        settings["targets"] = misfit["targets"][architecture]
    other = load_policy(str(model_folder), **settings)
    with pytest.raises(UserError, match="adapter") as error:
        load_trained(other, tmp_path / "adapter")
    assert str(tmp_path / "adapter") in one_line(error)


def test_an_adapter_of_another_model_is_refused(trained, model_folders, architecture, tmp_path):
    save_adapter(trained[0], tmp_path / "adapter")
    other = {"gpt2": "llama", "llama": "gpt2"}[architecture]
    with pytest.raises(UserError, match=r"adapter .* could not be loaded: ") as error:
        load_policy(str(model_folders(other)), adapter=tmp_path / "adapter")
    assert str(tmp_path / "adapter") in one_line(error)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_the_output_head_is_refused(model_folder, architecture, lm, tmp_path):
    targets = [lm.TARGETS[architecture]]
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    with pytest.raises(UserError, match="changes the output head"):
        load_policy(str(model_folder), adapter=tmp_path / "adapter")


ELSEWHERE = {
    "aLoRA": LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    "layer_replication": LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]),
    "adaption prompt": AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_adapter_that_acts_elsewhere_than_in_the_layers_is_refused(name, model_folders, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folders("llama"))
    get_peft_model(base, copy.deepcopy(ELSEWHERE[name])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"^adapter .* acts elsewhere than in .* layers") as error:
        load_policy(str(model_folders("llama")), adapter=tmp_path / "adapter")
    assert str(tmp_path / "adapter") in one_line(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("initialised", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_changes_the_base_is_refused(initialised, model_folders, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=initialised, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_folders("llama"))
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"^adapter .* changes the base's own weights") as error:
        load_policy(str(model_folders("llama")), adapter=tmp_path / "adapter")
    assert str(tmp_path / "adapter") in one_line(error)


@pytest.mark.parametrize("there", [True, False], ids=["empty", "absent"])
def test_a_folder_without_an_adapter_is_one_clear_line(trained, model_folder, tmp_path, there):
    folder = tmp_path / "run" / "adapter"
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(UserError, match="could not be loaded") as error:
        load_policy(str(model_folder), adapter=folder)
    assert str(folder) in one_line(error)
    with pytest.raises(UserError, match="could not be loaded") as error:
        load_trained(trained[0], folder)
    assert str(folder) in one_line(error)


def test_a_relative_folder_is_no_hub_id(trained, model_folder, tmp_path, monkeypatch):
    """`run/adapter` looks like one, and peft would ask the hub for it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_trained(trained[0], Path("run/adapter"))
    Path("run/adapter").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_policy(str(model_folder), adapter="run/adapter")


def test_a_damaged_adapter_is_one_clear_line(trained, model_folder, tmp_path):
    save_adapter(trained[0], tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for load in (
        lambda: load_policy(str(model_folder), adapter=tmp_path / "adapter"),
        lambda: load_trained(trained[0], tmp_path / "adapter"),
    ):
        with pytest.raises(UserError, match="could not be loaded") as error:
            load()
        assert str(tmp_path / "adapter") in one_line(error)


def test_a_saved_adapter_replaces_the_one_before(trained, tmp_path, lm):
    policy, _ = trained
    save_adapter(policy, tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    save_adapter(lm.move(policy, seed=2), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# All weights


@pytest.fixture
def whole(model_folder, tokenizer, lm):
    policy = lm.move(load_policy(str(model_folder), r=None), scale=0.05)
    return policy, lm.sample(policy, tokenizer)


def test_a_saved_model_goes_back_into_a_policy_and_leaves_the_reference(whole, model_folder, tokenizer, tmp_path, lm):
    policy, completions = whole
    save_trained(policy, tokenizer, tmp_path)
    other = load_policy(str(model_folder), r=None)
    start = lm.checksum(other, trainable=False)
    load_trained(other, tmp_path / "model")
    assert lm.checksum(other, trainable=True) == lm.checksum(policy, trainable=True)
    assert lm.checksum(other, trainable=False) == start
    assert all(value.requires_grad for name, value in other.named_parameters() if name.startswith("model."))
    torch.testing.assert_close(log_probs(other, completions), log_probs(policy, completions), rtol=0, atol=1e-6)
    # Saving changes nothing of the policy itself.
    assert policy.causal_lm.generation_config.temperature is None
    save_trained(lm.move(policy, scale=0.05), tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_saved_model_and_adapter_may_be_read_like_any_other_file(whole, model_folder, tokenizer, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    for policy in (whole[0], load_policy(str(model_folder), r=2)):
        save_trained(policy, tokenizer, tmp_path)
    weights = list(tmp_path.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == {"model", "adapter"}
    assert {path.stat().st_mode for path in weights} == {plain.stat().st_mode}


def test_a_model_that_does_not_fit_the_policy_is_refused(whole, model_folders, architecture, tokenizer, tmp_path):
    policy, _ = whole
    other = {"gpt2": "llama", "llama": "gpt2"}[architecture]
    with pytest.raises(UserError, match="the model ") as error:
        load_trained(policy, model_folders(other))
    assert str(model_folders(other)) in one_line(error)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"the model could not be loaded: there is no config\.json") as error:
            load_trained(policy, folder)
        assert str(folder) in one_line(error)


def test_a_model_that_lacks_a_weight_leaves_the_policy_as_it_was(whole, tokenizer, tmp_path, lm):
    policy, _ = whole
    save_trained(policy, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights[next(name for name in weights if "layers.1" in name or "h.1" in name)]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    before = lm.checksum(lm.move(policy, scale=0.05), trainable=True)
    with pytest.raises(UserError, match="the model was made for another model") as error:
        load_trained(policy, tmp_path / "model")
    one_line(error)
    assert lm.checksum(policy, trainable=True) == before

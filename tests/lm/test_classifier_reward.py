"""Classifiers as rewards: each text's score is transformers' own for it alone, and nothing untrained passes for one."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)
from transformers.utils import logging as transformers_logging

from lm_trust.errors import UserError
from lm_trust.lm import classifier_reward, pretrained, smollm2
from lm_trust.lm.classifier_reward import load_classifier
from lm_trust.lm.rewards import WeightedRewards
from lm_trust.stages.training import quiet_libraries
from lm_trust.training.config_rewards import ClassifierReward

PROMPTS = ["the film", "a plot", "", "we saw the zebra and it", "I", ""]
COMPLETIONS = [" was very very good", "", " bad", " was dull but bright and very very very good", " hated it", ""]
# "zebra" is not in the vocabularies: it becomes the unknown token, with which the decoders without a pad token pad.
TEXTS = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]


def encoder(folder, make=BertConfig, *, labels=3, seed=0, **settings):
    """A tiny encoder with [CLS] text [SEP], as BERT's tokenizer has it, and strong random weights."""
    names = ["<pad>", "<cls>", "<sep>", "<unk>", *WORDS]
    ids = {name: index for index, name in enumerate(names)}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = make(
        vocab_size=len(names),
        max_position_embeddings=24,
        initializer_range=0.25,
        pad_token_id=0,
        num_labels=labels,
        **sizes | settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 1), ("<sep>", 2)]
    )
    special = {"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder


def decoder(folder, base, *, labels=2, **settings):
    """A tiny decoder with a random classification head."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, **settings)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def load(path, **settings):
    return load_classifier(ClassifierReward(path=str(path), **settings), key="rewards[1]", device="cpu")


@torch.no_grad()
def logits_alone(folder, texts=TEXTS, ending=""):
    """(B, L) logits of each text by itself, without padding, as transformers gives them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = None  # at one row a decoder then takes the very last token
    rows = [model(**tokenizer(text + ending, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).double()


def close(scores, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("bert"))


# Scores


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_an_encoders_scores_are_those_of_each_text_alone(bert, batch_size):
    scores = load(bert, batch_size=batch_size)(PROMPTS, COMPLETIONS)
    close(scores, logits_alone(bert)[:, 2])
    assert torch.tensor(scores).std() > 0.1


def test_a_pad_token_that_the_model_has_no_embedding_of_never_pads(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "padded")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "padded")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    close(load(tmp_path / "padded")(PROMPTS, COMPLETIONS), logits_alone(bert)[:, 2])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("own_pad", [False, True])
def test_a_decoders_scores_are_those_of_each_text_alone(
    architecture, model_folders, tmp_path, network_attempts, batch_size, own_pad
):
    """It takes its score at the last token, which padding must not become, whether or not there is a pad token."""
    folder = decoder(tmp_path, model_folders(architecture, own_pad))
    filled = [index for index, text in enumerate(TEXTS) if text]
    scores = load(folder, batch_size=batch_size)(PROMPTS, COMPLETIONS)
    expected = logits_alone(folder, [TEXTS[index] for index in filled])[:, 1]
    close([scores[index] for index in filled], expected)
    assert scores[-1] == pytest.approx(load(folder)([""], [""])[0], abs=1e-5)  # the empty text has a score as well
    assert not network_attempts


def test_the_completion_alone_can_be_read(bert):
    scores = load(bert, reads="completion")(PROMPTS, COMPLETIONS)
    close(scores, logits_alone(bert, COMPLETIONS)[:, 2])


TEMPLATE = "{% for message in messages %}<eos> {{ message.role }} it {{ message.content }} and {% endfor %}"


def test_both_can_be_read_as_a_chat(model_folders, tmp_path):
    """Of its own template, which sets what special tokens there are."""
    folder = decoder(tmp_path, model_folders("llama", False), labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match=r"^rewards\[1\]\.reads: .* no chat template"):
        load(folder, reads="chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    written = [f"<eos> user it {a} and <eos> assistant it {b} and " for a, b in zip(PROMPTS, COMPLETIONS, strict=True)]
    close(load(folder, reads="chat")(PROMPTS, COMPLETIONS), logits_alone(folder, written)[:, 0])
    # A prompt that is a chat is read with all that was said before.
    chats = [
        None,
        [{"role": "system", "content": "kind"}, {"role": "user", "content": "so"}],
        *[None] * len(PROMPTS[2:]),
    ]
    written[1] = f"<eos> system it kind and <eos> user it so and <eos> assistant it {COMPLETIONS[1]} and "
    close(load(folder, reads="chat")(PROMPTS, COMPLETIONS, chats), logits_alone(folder, written)[:, 0])


def test_one_trained_on_chats_does_not_read_completions_alone(model_folders, tmp_path):
    folder = decoder(tmp_path, model_folders("llama", False), labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.init_kwargs[classifier_reward.TRAINED_ON_CHATS] = TEMPLATE, True
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"^rewards\[1\]\.reads: .* trained on whole chats"):
        load(folder, reads="completion")
    as_it_is, said = (load(folder, **keys)(PROMPTS, COMPLETIONS) for keys in ({}, {"reads": "chat"}))
    assert as_it_is == said


def test_outputs_of_exclusive_labels_are_the_softmaxs(bert):
    logits = logits_alone(bert)
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert probabilities.std() > 0.05
    close(load(bert, output="probability", label="0")(PROMPTS, COMPLETIONS), probabilities[:, 0])
    close(load(bert, output="log_probability")(PROMPTS, COMPLETIONS), probabilities[:, 2].log())


@pytest.mark.parametrize("settings", [{"labels": 1}, {"labels": 3, "problem_type": "multi_label_classification"}])
def test_outputs_of_one_label_or_of_labels_that_do_not_exclude_each_other_are_the_sigmoids(tmp_path, settings):
    encoder(tmp_path, **settings)
    logits = logits_alone(tmp_path)[:, -1]
    close(load(tmp_path)(PROMPTS, COMPLETIONS), logits)
    close(load(tmp_path, output="probability")(PROMPTS, COMPLETIONS), 1 / (1 + (-logits).exp()))
    close(load(tmp_path, output="log_probability")(PROMPTS, COMPLETIONS), -(1 + (-logits).exp()).log())


def test_a_label_goes_by_name_or_number(tmp_path):
    names = {0: "negative", 1: "neutral", 2: "positive"}
    encoder(tmp_path, id2label=names, label2id={name: index for index, name in names.items()})
    logits = logits_alone(tmp_path)
    for label, index in [("negative", 0), ("1", 1), ("positive", 2), (None, 2)]:
        close(load(tmp_path, label=label)(PROMPTS, COMPLETIONS), logits[:, index])
    for label in ("happy", "3", "-1"):
        with pytest.raises(UserError, match=r"rewards\[1\]\.label: .*0 \(negative\), 1 \(neutral\), 2 \(positive\)"):
            load(tmp_path, label=label)


def test_of_a_text_beyond_the_context_the_end_is_read(bert):
    long = " ".join(WORDS * 3)
    kept = " ".join((WORDS * 3)[-22:])  # and the first and last special token make 24
    score = load(bert)([long[:50]], [long[50:]])
    close(score, logits_alone(bert, [kept])[:, 2])
    assert abs(load(bert)([long], [" bad"])[0] - load(bert)([long], [" good"])[0]) > 1e-3


def test_robertas_context_is_what_is_left_of_its_positions(tmp_path):
    """Its positions count from the pad token's number + 1, and many of its tokenizers set no limit."""
    encoder(tmp_path, RobertaConfig)
    classifier = load(tmp_path)
    assert classifier.text_model.context == 23
    scores = classifier(["the film " * 40, "a"], [" good", ""])
    assert all(math.isfinite(score) for score in scores)


def test_a_score_that_changes_with_padding_is_refused(tmp_path):
    """XLNet's is taken from the last column; and its configuration says that it has -1 positions."""
    encoder(tmp_path)
    config = XLNetConfig(vocab_size=len(WORDS) + 4, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.25)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^rewards\[1\]\.path: XLNet.* scores a text otherwise where padding follows"):
        load(tmp_path)


def test_no_texts_have_no_scores_and_the_name_is_the_metrics(bert):
    assert load(bert)([], []) == []
    assert load(bert).__name__ == bert.name and load(f"{bert}/").__name__ == bert.name
    classifier = load(bert, name="taste")
    assert classifier.__name__ == "taste"
    result = WeightedRewards([(classifier, 2.0)]).score(PROMPTS, COMPLETIONS, {"other": list(range(6))})
    assert list(result.parts) == ["taste"]
    close((result.total / 2).tolist(), logits_alone(bert)[:, 2])


@pytest.mark.usefixtures("global_streams")
def test_it_is_at_rest_in_single_precision_and_under_autocast_too(bert, tmp_path):
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    AutoModelForSequenceClassification.from_pretrained(bert).half().save_pretrained(tmp_path)
    classifier = load(tmp_path)
    parameters = list(classifier.text_model.model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in parameters) and not classifier.text_model.model.training
    plain = classifier(PROMPTS, COMPLETIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(PROMPTS, COMPLETIONS) == plain


# Reward models


ROWS = {"prompt": PROMPTS[:4], "chosen": COMPLETIONS[:4], "rejected": [" was bad", " dull", " it", " never"]}


@pytest.fixture
def reward_trainer(tmp_path):
    """A tiny reward model trained by trl for two steps: (base, LoRA or not, pad token or not) to (trainer, folder)."""
    from trl import RewardConfig, RewardTrainer

    def train(base, lora):
        folder = tmp_path / "reward_model"
        arguments = RewardConfig(
            output_dir=str(folder),
            max_steps=2,
            learning_rate=0.1,
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            bf16=False,
        )
        adapter = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"], modules_to_save=["score"], lora_dropout=0.0
        )
        trainer = RewardTrainer(
            str(base), args=arguments, train_dataset=Dataset.from_dict(ROWS), peft_config=adapter if lora else None
        )
        trainer.train()
        trainer.save_model()
        return trainer, folder

    bars = transformers_logging.is_progress_bar_enabled()
    with quiet_libraries():  # trl tells the hub of its use, in a thread that may outlive the test
        yield train
    if bars:
        transformers_logging.enable_progress_bar()


@pytest.mark.parametrize(("lora", "own_pad"), [(False, True), (True, True), (True, False)])
def test_a_reward_model_of_trls_trainer_scores_as_it_was_trained(reward_trainer, model_folders, lora, own_pad):
    """The scores of the texts are the trained model's of the tokens that its trainer made of them."""
    trainer, folder = reward_trainer(model_folders("llama", own_pad), lora)
    assert (folder / "adapter_config.json").is_file() == lora
    model = trainer.model.eval()
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits.item()
            for ids in trainer.train_dataset["chosen_ids"]
        ]
    reward = load(folder)
    assert reward.text_model.end == (0,)
    close(reward(PROMPTS[:4], COMPLETIONS[:4]), torch.tensor(expected, dtype=torch.float64))
    assert torch.tensor(expected).std() > 1e-3


def adapter_of(base, folder, *, labels=2, seed=1, head=True, **settings):
    """An untrained adapter with a random head of its own, as peft saves it beside nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        sizes = {"num_labels": labels, "ignore_mismatched_sizes": True}
        model = AutoModelForSequenceClassification.from_pretrained(base, **sizes)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, init_lora_weights=False, **settings)
        model = get_peft_model(model, config)
    model.save_pretrained(folder)
    if not head:
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(
            {name: value for name, value in weights.items() if "score" not in name},
            folder / "adapter_model.safetensors",
        )
    return model.eval()


@pytest.mark.usefixtures("global_streams")
@pytest.mark.parametrize(("base", "labels"), [("llama", 4), ("gpt2", 2), ("bert", 2), ("bert", 3)])
def test_an_adapter_brings_its_head_and_its_base_the_tokenizer(base, labels, model_folders, bert, tmp_path):
    folder = bert if base == "bert" else model_folders(base)
    settings = {"fan_in_fan_out": True} if base == "gpt2" else {}
    trained = adapter_of(folder, tmp_path / "adapter", labels=labels, **settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained.config.pad_token_id = None
    with torch.no_grad():
        texts = [text for text in TEXTS if text]
        expected = torch.stack([trained(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts])
    classifier = load(tmp_path / "adapter")
    assert classifier.text_model.model.config.num_labels == labels
    close(classifier([""] * len(texts), texts), expected.double())


def test_the_tokenizer_beside_an_adapter_goes_before_its_bases(model_folders, tmp_path, lm):
    adapter_of(model_folders("llama"), tmp_path)
    assert load(tmp_path).text_model.pad_id == lm.EOS
    AutoTokenizer.from_pretrained(model_folders("llama", True)).save_pretrained(tmp_path)
    assert load(tmp_path).text_model.pad_id == lm.PAD


def test_an_adapter_of_the_cached_smollm2_finds_it_on_any_machine(model_folders, tmp_path, monkeypatch):
    trained = adapter_of(model_folders("llama"), tmp_path / "adapter", labels=1)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    monkeypatch.setattr(pretrained, "smollm2_folder", lambda: model_folders("llama"))
    for base in (f"/home/another/.cache/lm_trust/{smollm2.FOLDER}", "smollm2-135m"):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        classifier = load(tmp_path / "adapter")
        ours, theirs = classifier.text_model.model.state_dict(), trained.state_dict()
        # The base's own head, which the adapter's replaces, is random.
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "original_module" not in name)


@pytest.mark.parametrize(("recorded", "asked"), [("v1", "v1"), (None, "v2")])
def test_an_adapters_base_is_of_the_revision_that_it_records(model_folders, tmp_path, monkeypatch, recorded, asked):
    adapter_of(model_folders("llama"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": recorded}))
    revisions, load_model = [], classifier_reward.load_model

    def noted(*given, **settings):
        revisions.append(settings["revision"])
        return load_model(*given, **settings)

    monkeypatch.setattr(classifier_reward, "load_model", noted)
    load(tmp_path, revision="v2")
    assert revisions == [asked]


# Refusals


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_language_model_is_no_classifier(model_folders, capfd):
    """transformers would give it a random head and a warning."""
    with pytest.raises(UserError, match=r"rewards\[1\]\.path: .*no fitting weights for score\.weight") as error:
        load(model_folders("llama"))
    assert "lm-trust reward-model" in message(error)
    assert "MISSING" not in "".join(capfd.readouterr())


def test_an_adapter_without_a_head_is_refused(model_folders, tmp_path):
    adapter_of(model_folders("llama"), tmp_path, head=False)
    with pytest.raises(UserError, match=r"rewards\[1\]\.path: .*holds no classification head"):
        load(tmp_path)


def test_an_adapter_whose_base_is_gone_is_refused_by_its_name(model_folders, tmp_path, network_attempts, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter_of(model_folders("llama"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/model"}))
    with pytest.raises(UserError, match=r"rewards\[1\]\.path: .*'/gone/model'") as error:
        load(tmp_path)
    message(error)
    network_attempts.clear()


def test_an_adapter_that_does_not_fit_its_base_is_refused(model_folders, bert, tmp_path):
    adapter_of(model_folders("llama"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(bert)}))
    with pytest.raises(UserError, match=r"rewards\[1\]\.path: .*does not fit"):
        load(tmp_path)


def test_a_damaged_adapter_is_one_clear_line(model_folders, tmp_path):
    adapter_of(model_folders("llama"), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"rewards\[1\]\.path: the adapter .* cannot be read") as error:
        load(tmp_path)
    message(error)


def test_an_empty_folder_and_a_missing_tokenizer_are_one_clear_line(bert, tmp_path):
    with pytest.raises(UserError, match=r"rewards\[1\]\.path: no model could be loaded") as error:
        load(tmp_path)
    assert str(tmp_path) in message(error)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert / name, tmp_path)
    with pytest.raises(UserError, match=r"rewards\[1\]\.path: '.*' holds no tokenizer") as error:
        load(tmp_path)
    assert str(tmp_path) in message(error)

"""A sequence classifier or reward model of transformers as a reward.

    rewards: [{kind: classifier, path: runs/reward_model/adapter, weight: 1.0}]

The path is a folder that `save_pretrained` or trl's RewardTrainer wrote (a whole model, or a PEFT adapter with its
classification head), or a hub id. Its own tokenizer reads the text. Of a text longer than its context it reads the
end, where the completion is.

A reward model (one label) on a decoder takes its score at the last token, and RewardTrainer ends each text that it
learns from with the end of sequence. So it does here: a text is scored as if it ended where it ends.

One that was trained on chats reads a chat, as its own template writes it: the prompt's messages, a plain text as one of
a user, and the completion as the assistant's answer. That it was trained on chats lm-trust reward-model notes in the
tokenizer's configuration; of others `reads: chat` says it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lm_trust.errors import UserError, first_line
from lm_trust.lm.loading import check_holds_adapter
from lm_trust.lm.pretrained import quiet
from lm_trust.lm.prompts import Chat, user_chat
from lm_trust.lm.smollm2 import FOLDER, SMOLLM2
from lm_trust.lm.text_models import TextModel, load_model, with_tokenizer

TRAINED_ON_CHATS = "trained_on_chats"  # in the tokenizer's configuration, which stays beside the weights everywhere


class Classifier:
    """A reward function: (prompts, completions, chats), B texts each and B chats or Nones, to B floats.

    Args:
        text_model: with a sequence classifier of L labels.
        label: index of the label whose score counts.
        output: "logit", "log_probability" or "probability" of it. The probability is the softmax's over the labels;
            the sigmoid's where there is one label, or where labels do not exclude each other.
        reads: "text" for prompt + completion, "completion", or "chat" for both as messages in its chat template.
        batch_size: texts in one pass.
        name: what metrics call it.
    """

    def __init__(
        self, text_model: TextModel, *, label: int, output: str, reads: str, batch_size: int, name: str
    ) -> None:
        config = text_model.model.config
        self.text_model = text_model
        self.label = label
        self.__name__ = name
        self._output = output
        self._reads = reads
        self._batch_size = batch_size
        self._independent = config.num_labels == 1 or config.problem_type == "multi_label_classification"

    def __call__(
        self, prompts: list[str], completions: list[str], chats: list[Chat | None] | None = None
    ) -> list[float]:
        if not completions:
            return []
        texts = self._texts(prompts, completions, chats or [None] * len(prompts))
        logits = self.text_model.run(texts, self._batch_size, lambda output, _: output.logits)
        return self._score(logits.double()).tolist()

    def _texts(self, prompts: list[str], completions: list[str], chats: list[Chat | None]) -> list[str]:
        if self._reads == "completion":
            return completions
        if self._reads == "text":
            return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        answered = [
            [*(chat or user_chat(prompt)), {"role": "assistant", "content": completion}]
            for prompt, completion, chat in zip(prompts, completions, chats, strict=True)
        ]
        return self.text_model.tokenizer.apply_chat_template(answered, tokenize=False)

    def _score(self, logits: Tensor) -> Tensor:
        """(B, L) logits to (B,) scores."""
        if self._output == "logit":
            return logits[:, self.label]
        if self._independent:
            log_probability = nn.functional.logsigmoid(logits[:, self.label])
        else:
            log_probability = logits.log_softmax(-1)[:, self.label]
        return log_probability if self._output == "log_probability" else log_probability.exp()


def load_classifier(section: Any, *, key: str, device: torch.device | str) -> Classifier:
    """The reward function of a `kind: classifier` section.

    Args:
        key: the section's place in the configuration, such as `rewards[0]`, which errors name.

    Raises:
        UserError: there is no classifier at the path, its head was never trained, it has no such label, its scores
            change with padding, or it cannot read what it is to.
    """
    folder = Path(section.path).expanduser()
    place = {"key": f"{key}.path", "revision": section.revision, "trust_remote_code": section.trust_remote_code}
    if (folder / CONFIG_NAME).is_file():
        text_model = _load_adapter(folder, section, key=f"{key}.path", device=device)
    else:
        model, missing = load_model(AutoModelForSequenceClassification, section.path, device=device, **place)
        if missing:
            raise UserError(
                f"{key}.path: {section.path!r} holds no fitting weights for {missing[0]} of {type(model).__name__}, "
                "which would be random; give a model that was trained to classify (lm-trust reward-model makes one)"
            )
        text_model = with_tokenizer(model, section.path, **place)
    _check_padding(text_model, key)
    reads = _reads(text_model, section.reads, key)
    return Classifier(
        _as_trained(text_model, reads),
        label=_label_index(text_model.model, section.label, key),
        output=section.output,
        reads=reads,
        batch_size=section.batch_size,
        name=section.name or folder.name or section.path,
    )


def _load_adapter(folder: Path, section: Any, *, key: str, device: torch.device | str) -> TextModel:
    """A classifier that is a PEFT adapter: its base with a head of as many labels as the adapter has, and the adapter.

    The base is of the revision that the adapter records, the only one that it fits; of the section's where it records
    none.

    Raises:
        UserError: it holds no head, or its base cannot be loaded.
    """
    try:
        check_holds_adapter(folder)
        config = PeftConfig.from_pretrained(str(folder))
        labels = _saved_labels(load_peft_weights(str(folder), device="cpu"))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    except Exception as error:
        raise UserError(f"{key}: the adapter {str(folder)!r} cannot be read: {first_line(error)}") from error
    if labels is None:
        raise UserError(
            f"{key}: the adapter {str(folder)!r} (task {config.task_type}) holds no classification head; "
            "give one that lm-trust reward-model or trl's RewardTrainer made, with modules_to_save [score]"
        )
    base = _base_of(config)
    remote = {"revision": config.revision or section.revision, "trust_remote_code": section.trust_remote_code}
    model, missing = load_model(
        AutoModelForSequenceClassification, base, key=key, device=device, num_labels=labels, **remote
    )
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model = PeftModel.from_pretrained(model, str(folder)).requires_grad_(False).eval().to(device)
    except Exception as error:
        raise UserError(f"{key}: the adapter {str(folder)!r} does not fit {base!r}: {first_line(error)}") from error
    replaced = _replaced(model)
    for name in missing:
        if not name.startswith(replaced):
            raise UserError(f"{key}: neither the adapter {str(folder)!r} nor its base {base!r} holds {name}")
    # trl and lm-trust write the tokenizer beside the adapter, where it may have got a pad token.
    own = (folder / "tokenizer_config.json").is_file()
    return with_tokenizer(model, str(folder) if own else base, key=key, **({} if own else remote))


def _base_of(config: PeftConfig) -> str:
    """The base that the adapter names; SmolLM2's cached folder by name, so that an adapter can change machines."""
    base = config.base_model_name_or_path or ""
    return SMOLLM2 if Path(base).name == FOLDER else base


def _saved_labels(weights: dict[str, Tensor]) -> int | None:
    """The number of labels of the head that an adapter's file holds; None where it holds none."""
    names = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    return next((len(tensor) for name, tensor in weights.items() if name.endswith(names)), None)


def _replaced(model: PeftModel) -> tuple[str, ...]:
    """Names of the modules whose trained copies the adapter holds, as the base names them."""
    base = model.get_base_model()
    return tuple(f"{name}." for name, module in base.named_modules() if hasattr(module, "modules_to_save"))


def _check_padding(text_model: TextModel, key: str) -> None:
    """See on short texts that a score is a text's own, whatever stands beside it in a batch.

    Raises:
        UserError: it is not, as where the score is taken from a padded column (XLNet).
    """
    alone, among = (
        text_model.run(texts, len(texts), lambda output, _: output.logits)[0] for texts in (["a"], ["a", "a a a a"])
    )
    if not torch.allclose(alone, among, rtol=1e-3, atol=1e-3):
        name = type(text_model.model).__name__
        raise UserError(f"{key}.path: {name} scores a text otherwise where padding follows it; give another classifier")


def _reads(text_model: TextModel, reads: str, key: str) -> str:
    """What the model is to read: a chat, where it was trained on chats.

    Raises:
        UserError: it was, and is to read the completion alone; or it is to read a chat and has no chat template.
    """
    if text_model.tokenizer.init_kwargs.get(TRAINED_ON_CHATS):
        if reads == "completion":
            raise UserError(f"{key}.reads: the reward model was trained on whole chats; give chat, or leave it out")
        reads = "chat"
    if reads == "chat" and text_model.tokenizer.chat_template is None:
        raise UserError(f"{key}.reads: the classifier's tokenizer has no chat template; give text or completion")
    return reads


def _as_trained(text_model: TextModel, reads: str) -> TextModel:
    """With the end of sequence behind every text, for a reward model on a decoder (its head is called score).

    A chat ends, and begins, as its template has it.
    """
    if reads == "chat":
        return dataclasses.replace(text_model, special_tokens=False)
    base = text_model.model.get_base_model() if isinstance(text_model.model, PeftModel) else text_model.model
    eos = text_model.tokenizer.eos_token_id
    if base.config.num_labels != 1 or not hasattr(base, "score") or eos is None:
        return text_model
    return dataclasses.replace(text_model, end=(eos,))


def _label_index(model: nn.Module, label: str | None, key: str) -> int:
    """The label's index, by its name or its number as text; the last one where none is named.

    Raises:
        UserError: there is no such label; lists those that there are.
    """
    names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    if label is None:
        return len(names) - 1
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    listed = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
    raise UserError(f"{key}.label: the classifier has no label {label!r}; its labels are {listed}")

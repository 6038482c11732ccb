"""The model card of a trained policy: what it is, what it is worth held out, how it got there and how to load it.

A README.md with front matter as the hub reads it. Names and settings come from people and may hold anything: they stand
in code, where markdown means nothing, or in front matter that a YAML library writes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lm_trust.lm.smollm2 import SMOLLM2
from lm_trust.training.best import EVALUATION, NAME
from lm_trust.training.config import LanguageConfig
from lm_trust.training.config_file import dump
from lm_trust.training.run_folder import RunFolder, read_json
from lm_trust.training.summary import language_rows, visible

CARD = "README.md"
_BUNDLED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
base = {base}
tokenizer = AutoTokenizer.from_pretrained(base{options})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{options}), "path/to/this/folder")
"""
_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{options})
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{options})
"""


def write_cards(config: LanguageConfig, policy_name: str, run: RunFolder) -> None:
    """Put a card and the learning curve beside the policy of a finished run, and beside that of its best evaluation.

    Raises:
        UserError: one of them cannot be written.
    """
    evaluation = run.evaluation()
    best = run.path / NAME / EVALUATION
    after = {run.path: evaluation.get("after")}
    if best.is_file():
        after[best.parent] = read_json(best)
    for folder, record in after.items():
        target = folder / policy_name
        with run.writing(str(target.relative_to(run.path))):
            shutil.copyfile(run.learning_curve, target / run.learning_curve.name)
            sides = {"before": evaluation.get("before"), "after": record}
            RunFolder(target).replace(CARD, model_card(config, sides, picture=run.learning_curve.name))


def model_card(config: LanguageConfig, evaluation: Mapping[str, Mapping[str, Any] | None], *, picture: str) -> str:
    """The card's text.

    Args:
        config: the run's, resolved.
        evaluation: the held-out evaluation before and after training; either may be None.
        picture: the learning curve's file beside the card.
    """
    adapter = config.model.lora is not None
    what = "A LoRA adapter for" if adapter else "All weights of"
    rewards = ", ".join(_code(reward.name or reward.kind) for reward in config.rewards)
    return f"""\
---
{_front_matter(config)}
---

# {"Adapter" if adapter else "Model"} trained with lm_trust

{what} {_code(config.model.path)}, trained by {_code(config.update.kind)} to earn the reward {rewards}.

## Held-out evaluation

{_table(evaluation)}

The reference is the policy that training started from; the KL to it is exact, over the whole vocabulary.

## Learning curve

![Learning curve]({picture})

## How to load it

{_fenced(_loading(config), "python")}

Training sampled at temperature {config.rollout.temperature:g}, without top-k or top-p.

## Configuration

<details>
<summary>The run's resolved config</summary>

{_fenced(dump(config), "yaml")}

</details>
"""


def _front_matter(config: LanguageConfig) -> str:
    adapter = config.model.lora is not None
    base = _BUNDLED_ON_HUB if config.model.path == SMOLLM2 else config.model.path
    on_hub = not Path(base).is_absolute()  # a resolved config has local folders absolute; the hub takes ids only
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lm_trust", "reinforcement-learning", config.update.kind, *(["lora"] if adapter else [])],
    )
    return data.to_yaml().strip()


def _table(evaluation: Mapping[str, Mapping[str, Any] | None]) -> str:
    columns = {name: values for name, values in evaluation.items() if values}
    counts = sorted({values["count"] for values in columns.values()})
    rows = [
        f"| {label} | {' | '.join(number(values) for values in columns.values())} |"
        for label, number in language_rows(list(columns.values())[-1])
    ]
    head = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    return "\n".join([*head, *rows, "", f"Over {' and '.join(map(str, counts))} completions of held-out prompts."])


def _loading(config: LanguageConfig) -> str:
    model = config.model
    trusted = ", trust_remote_code=True" if model.trust_remote_code else ""
    if model.lora is None:
        return _MODEL.format(options=trusted)
    if model.path == SMOLLM2:
        imports = "\nfrom lm_trust.lm.smollm2 import smollm2_folder\n"
        return _ADAPTER.format(imports=imports, base="smollm2_folder()", options="")
    revision = f", revision={model.revision!r}" if model.revision else ""
    return _ADAPTER.format(imports="", base=repr(model.path), options=revision + trusted)


def _code(text: str) -> str:
    """Text as a code span, on one line whatever it holds."""
    text = visible(text)
    ticks = "`" * (_longest_run(text) + 1)
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)

"""The peers in `lm_training.py`: python language_trl.py RULE SETTINGS, in turns with ours. RULE: ppo, rloo or grpo.

PPO needs a trl that has it (1.12 is the last one), RLOO and GRPO are measured with the newest. All in float32 and
without gradient checkpointing, which costs time, and which trl turns on if nothing is said.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from language_turns import Settings, Turns, variety  # beside this file
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)

ITERATIONS = 10**6  # more than there will be


class InTurns(TrainerCallback):
    """Reports after the optimizer step that ends an iteration, and waits for the next turn.

    Args:
        optimizer_steps: of an iteration.
        completion_length: tokens that every completion has.
    """

    def __init__(self, turns: Turns, *, optimizer_steps: int, completion_length: int) -> None:
        self._turns = turns
        self._steps = optimizer_steps
        self._completion_length = completion_length

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._turns.ready()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step % self._steps == 0:
            self._turns.done()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        length = logs.get("completions/mean_length", self._completion_length)
        if length != self._completion_length or logs.get("val/num_eos_tokens"):
            raise SystemExit(f"completions of {length} tokens instead of {self._completion_length}, or one that ended")


def common(settings: Settings, output: str) -> dict[str, Any]:
    """Arguments of all of trl's configurations."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": settings.microbatch,
        "gradient_accumulation_steps": settings.rows // settings.microbatch,
        "learning_rate": settings.learning_rate,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def lora(settings: Settings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets),
        fan_in_fan_out="c_attn" in settings.targets,  # GPT-2's linear layers are transposed
        task_type="CAUSAL_LM",
    )


def ppo(settings: Settings, turns: Turns, prompts: list[str], output: str) -> Any:
    """trl's PPO; value model and reward model are of the policy's size, and the value model is trained whole."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(settings.policy, padding_side="left")
    models = [
        AutoModelForSequenceClassification.from_pretrained(settings.reward_model, num_labels=1, dtype=torch.float32)
        for _ in range(2)
    ]
    dataset = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in prompts]})
    config = PPOConfig(
        **common(settings, output),
        num_ppo_epochs=settings.epochs,
        num_mini_batches=1,
        total_episodes=settings.rows * ITERATIONS,
        local_rollout_forward_batch_size=settings.rows,
        num_sample_generations=0,
        response_length=settings.steps,
        kl_coef=settings.penalty,
        cliprange=settings.clip,
        lam=settings.lam,
    )
    return PPOTrainer(
        config,
        tokenizer,
        model=AutoModelForCausalLM.from_pretrained(settings.policy, dtype=torch.float32),
        ref_model=None,  # the policy without its adapter
        reward_model=models[0],
        value_model=models[1],
        train_dataset=dataset,
        eval_dataset=dataset,  # unused, but it is asked for
        callbacks=[InTurns(turns, optimizer_steps=1, completion_length=settings.steps)],
        peft_config=lora(settings),
    )


def grouped(rule: str, settings: Settings, turns: Turns, prompts: list[str], output: str) -> Any:
    """trl's RLOO or GRPO with a plain function for the reward."""
    import trl

    name = rule.upper()
    config = getattr(trl, f"{name}Config")(
        **common(settings, output),
        num_generations=settings.group,
        num_iterations=settings.epochs,
        max_completion_length=settings.steps,
        beta=settings.penalty,
        epsilon=settings.clip,
        max_steps=settings.epochs * ITERATIONS,
        logging_steps=settings.epochs,
    )
    return getattr(trl, f"{name}Trainer")(
        AutoModelForCausalLM.from_pretrained(settings.policy, dtype=torch.float32),
        variety,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(settings.policy, padding_side="left"),
        callbacks=[InTurns(turns, optimizer_steps=settings.epochs, completion_length=settings.steps)],
        peft_config=lora(settings),
    )


def main() -> None:
    turns = Turns()
    rule, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    with open(settings.prompts, encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    with tempfile.TemporaryDirectory() as output:
        if rule == "ppo":
            trainer = ppo(settings, turns, prompts, output)
        else:
            trainer = grouped(rule, settings, turns, prompts, output)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()

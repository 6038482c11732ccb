"""What both stages share: trl's trainer as this house runs it, a line of metrics an update, and the end of a run."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from lm_trust.errors import UserError
from lm_trust.lm.loading import load_text_config, load_tokenizer
from lm_trust.lm.pretrained import quiet
from lm_trust.lm.saving import write_adapter
from lm_trust.lm.text_models import positions_of
from lm_trust.stages.curve import Panel, stage_curve
from lm_trust.stages.data import Examples
from lm_trust.stages.progress import StageProgress
from lm_trust.stages.summary import TableRows, print_stage
from lm_trust.terminal import say
from lm_trust.training.config_file import dump
from lm_trust.training.config_stages import StageConfig
from lm_trust.training.interruption import Interruption
from lm_trust.training.run_folder import RunFolder
from lm_trust.verified_folder import replace_folder

Evaluate = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """What a stage has before its model is loaded. length: most tokens of a row; source: how the model is loaded."""

    console: Console
    tokenizer: PreTrainedTokenizerBase
    training: Examples
    heldout: Examples
    length: int
    source: dict[str, Any]

    def check_kept(self, trainer: Trainer, why: str) -> None:
        """Say how many rows the trainer left out of those that it was given.

        Raises:
            UserError: all of one side.
        """
        sides = (self.training, trainer.train_dataset), (self.heldout, trainer.eval_dataset)
        for given, kept in sides:
            if not len(kept):
                raise UserError(f"{given.source}: no row can be used: {why}; raise training.max_length")
        dropped = sum(len(given) - len(kept) for given, kept in sides)
        if dropped:
            rows = "1 row was" if dropped == 1 else f"{dropped} rows were"
            say(f"{rows} left out: {why}", self.console)

    def tell_cut(self, trainer: Trainer) -> None:
        """Say how many rows are as long as a row may be, of which what is beyond is not learnt."""
        sides = trainer.train_dataset, trainer.eval_dataset
        full = sum(len(ids) >= self.length for kept in sides for ids in kept["input_ids"])
        if full:
            rows = "row reaches" if full == 1 else "rows reach"
            say(
                f"{full} of {sum(map(len, sides))} {rows} {self.length} tokens (training.max_length, or what the model "
                "takes): nothing beyond is learnt",
                self.console,
            )


def prepare(config: StageConfig, load: Callable[..., tuple[Examples, Examples]]) -> Prepared:
    """Read the tokenizer and the rows; `load` is `load_texts` or `load_pairs`.

    Raises:
        UserError: what is wrong with them.
    """
    console = Console()
    # Determinism is worth more than the speed of kernels that may change from run to run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    source = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    tokenizer = load_tokenizer(config.model.path, **source)
    _leave_texts_open(tokenizer, config.model.path)
    training, heldout = load(config.data, tokenizer, config.seed)
    # Rows of like length together, for less padding; their order changes nothing.
    counted = range(min(len(heldout), config.evaluation.count))
    heldout = heldout.select(sorted(counted, key=lambda index: len(str(heldout.rows[index]))))
    context = positions_of(load_text_config(config.model.path, **source))
    length = config.training.max_length if context is None else min(config.training.max_length, context)
    return Prepared(console, tokenizer, training, heldout, length, source)


def _leave_texts_open(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Have the tokenizer end no text by itself: trl does, and a prompt that ends is no beginning of its completion.

    Raises:
        UserError: it cannot be told to.
    """
    row = tokenizer("a", return_special_tokens_mask=True)
    ids, added = row["input_ids"], row["special_tokens_mask"]
    if added[-1:] != [1]:  # or it knows no "a" and adds nothing
        return
    # Both: to set one makes transformers forget what else the tokenizer adds.
    tokenizer.add_bos_token, tokenizer.add_eos_token = ids[0] == tokenizer.bos_token_id, False
    if tokenizer("a")["input_ids"] != ids[:-1]:
        raise UserError(
            f"model.path: the tokenizer of {path!r} puts tokens behind every text ({tokenizer.decode(ids[-1:])}); "
            "a stage ends texts itself: give a tokenizer that leaves them open"
        )


def trainer_settings(config: StageConfig, output: Path) -> dict[str, Any]:
    """What every trainer of trl is told: the config's settings, one device, and none of its own files and reports.

    Raises:
        UserError: several GPUs are visible, over which trl would have to be launched.
    """
    if torch.cuda.device_count() > 1:
        raise UserError("several GPUs are visible and a stage uses one; choose it, as by CUDA_VISIBLE_DEVICES=0")
    training = config.training
    microbatch = training.microbatch_size or training.batch_size
    return {
        "output_dir": str(output),
        "seed": config.seed,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": microbatch,
        "per_device_eval_batch_size": microbatch,
        "gradient_accumulation_steps": training.batch_size // microbatch,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if training.scheduler == "constant" else training.scheduler,
        "warmup_steps": training.warmup_ratio,  # below 1 it is a share
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": config.model.autocast == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would put an older loss in the place of one that is not finite
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own bars and warnings off the terminal, and trl from reporting its use to the hub."""
    hidden, telemetry = datasets.are_progress_bars_disabled(), huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
    datasets.disable_progress_bars()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        with quiet(bars=False, reports=False), warnings.catch_warnings():
            # trl turns it on unless told otherwise, and transformers would have it told by a new name.
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = telemetry
        if not hidden:
            datasets.enable_progress_bars()


def heldout_outputs(trainer: Trainer, **settings: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The model's outputs for the held-out rows, with their batches; dropout rests, the precision is training's."""
    was_training = trainer.model.training
    trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        with trainer.accelerator.autocast():  # before training the model has none of its own
            output = trainer.model(**batch, use_cache=False, **settings)
        yield output, batch
    trainer.model.train(was_training)


def run_stage(
    config: StageConfig,
    prepared: Prepared,
    folder: RunFolder,
    trainer: Trainer,
    *,
    evaluate: Evaluate,
    keys: dict[str, str],
    panels: list[Panel],
    rows: TableRows,
) -> int:
    """Evaluate, train, save, evaluate again, draw and print.

    Args:
        trainer: trl's, ready to train.
        evaluate: the held-out evaluation of the trainer's model as it is.
        keys: what metrics.jsonl calls the trainer's own numbers; `loss`, `learning_rate` and the like aside.
        panels: of the learning curve.
        rows: of the table at the end.

    Returns:
        The exit status: 0, or 130 / 143 after a signal.

    Raises:
        UserError: the training diverged, or the folder cannot be written.
    """
    console = prepared.console
    folder.write_config(dump(config))
    say("Evaluating the model before training ...", console)
    before = evaluate()
    folder.write_evaluation({"before": before})
    evaluations = [{"step": 0, **before}]
    with Interruption() as interruption, StageProgress(list(keys.values()), console) as progress:
        recorder = _Recorder(folder, keys, progress, interruption, config.evaluation.every, evaluate, evaluations)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        step, total = trainer.state.global_step, trainer.state.max_steps
    saved = _save(config, folder, trainer, prepared.tokenizer)
    if interruption.signal is not None and step < total:
        say(
            f"{interruption.signal.name}: stopped after update {step} of {total}; {saved} holds the model as it is. "
            "A stage cannot go on: start it again with another --output",
            console,
        )
        return interruption.exit_status
    after = evaluate()
    folder.write_evaluation({"before": before, "after": after})
    evaluations.append({"step": step, **after})
    with folder.writing(folder.learning_curve.name):
        stage_curve(folder.metrics(), evaluations, folder.learning_curve, panels, title=folder.path.name)
    print_stage({"before": before, "after": after}, console, rows)
    say(f"Run folder: {config.output}", console)
    return 0


class _Recorder(TrainerCallback):
    """Notes and shows each update, evaluates when it is due, and asks the trainer to stop after a signal."""

    def __init__(
        self,
        folder: RunFolder,
        keys: dict[str, str],
        progress: StageProgress,
        interruption: Interruption,
        every: int,
        evaluate: Evaluate,
        evaluations: list[dict[str, Any]],
    ) -> None:
        self._folder, self._keys, self._progress, self._interruption = folder, keys, progress, interruption
        self._every, self._evaluate, self._evaluations = every, evaluate, evaluations
        self._tokens, self._clock = 0, time.monotonic()

    def on_train_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress.start(state.max_steps)
        self._clock = time.monotonic()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        if self._interruption.signal is not None:
            control.should_training_stop = True

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:  # the trainer's own farewell
            return
        metrics = self._line(state.global_step, logs)
        self._folder.append_metrics(metrics)
        self._progress.update(metrics)
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                f"training: the loss of update {state.global_step} is {metrics['loss']}; nothing was saved, "
                f"lower training.learning_rate ({arguments.learning_rate:g})"
            )
        if self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            record = {"step": state.global_step, **self._evaluate()}
            self._folder.append_evaluation(record)
            self._evaluations.append(record)
        self._clock = time.monotonic()

    def _line(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        seconds, tokens = time.monotonic() - self._clock, int(logs["num_tokens"])
        line = {
            "step": step,
            "epoch": logs["epoch"],
            "loss": logs["loss"],
            **{name: logs[key] for key, name in self._keys.items()},
            "learning_rate": logs["learning_rate"],
            "gradient_norm": logs["grad_norm"],
            "tokens": tokens,
            "tokens_per_second": (tokens - self._tokens) / max(seconds, 1e-9),
            "step_seconds": seconds,
        }
        self._tokens = tokens
        return line


def _save(config: StageConfig, folder: RunFolder, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the adapter, or the whole model, with its tokenizer; whole or not at all."""
    whole = config.model.lora is None
    target = folder.path / ("model" if whole else "adapter")

    def build(place: Path) -> None:
        if whole:
            trainer.model.save_pretrained(place)
        else:
            write_adapter(trainer.model, place)
        tokenizer.save_pretrained(place)

    with folder.writing(target.name):
        replace_folder(target, build)
    return target

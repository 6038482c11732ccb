"""What is done with a run that has been trained: evaluate its policy, generate from it, merge its adapter."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from lm_trust.errors import UserError
from lm_trust.terminal import encodable, say
from lm_trust.training.best import best_folder
from lm_trust.training.build import build_language_policy, build_tokenizer, build_world
from lm_trust.training.config import LanguageConfig
from lm_trust.training.config_file import load_config
from lm_trust.training.run_folder import RunFolder
from lm_trust.training.summary import print_summary
from lm_trust.training.watching import to_watch, watch


def evaluate(run: Path, count: int | None = None, best: bool = False, *, videos: int = 0, render: bool = False) -> int:
    """Evaluate a run's policy anew and print the table; language: beside what the run noted from before training.

    Args:
        run: its folder.
        count: episodes or completions; as in the run's configuration where None.
        best: the policy of the best evaluation instead of the last one.
        videos: control: how many of the episodes, from the first, are filmed to `videos/` in the folder.
        render: control: play the episodes in a window, one after another.

    Raises:
        UserError: the folder is not that of a run, has no best policy, or cannot be shown.
    """
    config, console = load_config(run / "config.yaml", saved=True), Console()
    policy = best_folder(run) if best else run
    count = count or config.evaluation.count
    config = to_watch(config, run, count=count, videos=videos, render=render)
    world = build_world(config)
    world.load_policy(policy)
    trainer = world.trainer
    record = RunFolder(run).evaluation()
    sides = {"before": record["before"]} if "before" in record else {}
    sides["after"] = trainer.task.evaluate(trainer.policy, count)
    print_summary(sides, console, world=world.kind)
    watch(config, trainer.task, run, videos=videos, render=render, console=console)
    trainer.task.close()
    return 0


def generate(
    run: Path,
    prompt: str,
    count: int = 1,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    reference: bool = False,
    best: bool = False,
) -> int:
    """Print completions of a prompt by a run's last policy, by its best one, or by its frozen reference.

    The prompt is put as training put a row's text: into its template and the model's chat template where it used them,
    as a user's only message where its rows were chats.

    Raises:
        UserError: the prompt is no text, or does not fit the model.
    """
    from lm_trust.core.seeding import make_generator
    from lm_trust.lm.encoding import encode
    from lm_trust.lm.generation import decode, eos_ids, sample_completions
    from lm_trust.lm.prompts import typed_prompt
    from lm_trust.lm.reasoning import fill
    from lm_trust.lm.saving import ADAPTER, load_trained, trained_name

    # Only the model is needed: the prompts and the reward may have moved since.
    config = load_config(run / "config.yaml", check_files=False, saved=True)
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no text
        raise UserError("prompt: it is not text in UTF-8") from None
    limit = max_new_tokens or config.rollout.max_new_tokens
    tokenizer, context, vocabulary = build_tokenizer(config)
    template = getattr(config.prompts, "template", None)  # what training made of a problem, or of a row's text
    chat = config.prompts.chat or RunFolder(run).noted_chats
    typed = typed_prompt(prompt if template is None else fill(template, prompt), chat=chat)
    _, ids = encode(tokenizer, typed, context=context, vocabulary=vocabulary, max_new_tokens=limit)
    trained = best_folder(run) if best else run
    if config.model.adapter is not None and not reference and (trained / ADAPTER).is_dir():
        # It holds all of the one that training started from, which may be gone.
        start = config.model.model_copy(update={"adapter": str(trained / ADAPTER)})
        config = config.model_copy(update={"model": start})
    policy = build_language_policy(config)
    load_trained(policy, trained / trained_name(policy))
    with policy.as_reference() if reference else nullcontext():
        completions = sample_completions(
            policy,
            ids * count,
            max_new_tokens=limit,
            eos_ids=eos_ids(tokenizer, policy),
            pad_id=tokenizer.pad_token_id,
            generator=make_generator(config.seed if seed is None else seed, "generate"),
        )
    encoding = sys.stdout.encoding or "utf-8"  # None where a caller has put another stream there
    for text in decode(tokenizer, completions):
        whole = text if chat else prompt + text  # an answer, or the text gone on with
        print(encodable(whole, encoding))
    return 0


def merge(run: Path, output: Path | None = None, best: bool = False) -> int:
    """Write a run's last policy, or its best one, as a plain model, in `merged/` in the run's folder if nowhere else.

    Raises:
        UserError: the folder is not that of a language run with an adapter, or the output is not free.
    """
    from lm_trust.lm.merging import merge_adapter
    from lm_trust.lm.saving import ADAPTER, MODEL

    config = load_config(run / "config.yaml", check_files=False, saved=True)
    if not isinstance(config, LanguageConfig):
        raise UserError(f"{run}: this is a control run; `merge` is for language runs")
    policy = best_folder(run) if best else run
    if config.model.lora is None:
        raise UserError(f"{run}: all weights were trained, so {policy / MODEL} is a plain model already; use that one")
    output = run / "merged" if output is None else output
    model = config.model
    merge_adapter(
        model.path,
        policy / ADAPTER,
        output,
        temperature=config.rollout.temperature,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    say(f"Merged model: {output}")
    return 0

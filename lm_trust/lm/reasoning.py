"""Problems with answers that can be checked, made by the package reasoning-gym.

`load_reasoning` makes distinct problems of one task and holds some of them out. Beside the prompt every problem
carries `question`, `answer` and `metadata`, the columns that a reward receives: `exact_match` needs the answer alone,
and with all three any of the package's own scorers can be called.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import count as count_from
from typing import Any

import torch

from lm_trust.core.seeding import make_generator, stream_seed
from lm_trust.errors import UserError, in_line
from lm_trust.lm.prompts import Prompts, user_chat

INSTALL = "pip install 'lm-trust[reasoning]'"
PLACE = "{question}"  # of the problem, in a template


def load_reasoning(
    task: str,
    *,
    arguments: Mapping[str, Any],
    count: int,
    heldout_count: int,
    template: str,
    chat: bool,
    seed: int,
) -> tuple[Prompts, Prompts]:
    """(training, held out): `count` and `heldout_count` problems, no two with the same question.

    Args:
        task: the package's name of it.
        arguments: its settings.
        template: the prompt, {question} standing for the problem.
        chat: make the prompt a user's message.
        seed: decides the problems and the split, and nothing else does.

    Raises:
        UserError: a missing package, an unknown task, arguments that it does not take, a template without its
            {question}, or a task that has too few distinct problems.
    """
    check_template(template)
    problems = _distinct(task, dict(arguments), count, heldout_count, stream_seed(seed, "lm.reasoning") % 2**31)
    texts = [fill(template, problem["question"]) for problem in problems]
    prompts = Prompts(
        texts,
        {name: [problem.get(name) for problem in problems] for name in ("question", "answer", "metadata")},
        f"reasoning-gym's {task}",
        "problem",
        list(range(1, len(problems) + 1)),
        [user_chat(text) for text in texts] if chat else None,
    )
    # Not the first ones: common problems come early, and both sides are to be alike.
    order = torch.randperm(len(problems), generator=make_generator(seed, "lm.heldout"))
    return prompts.select(order[:count]), prompts.select(order[count:])


def check_template(template: str) -> None:
    if PLACE not in template:
        raise UserError(f"prompts.template: {template!r} has no {PLACE}, where the problem goes")


def fill(template: str, question: str) -> str:
    """The prompt of a question. Not str.format: problems and templates may hold other braces."""
    return template.replace(PLACE, question)


def _distinct(task: str, arguments: dict[str, Any], count: int, heldout_count: int, seed: int) -> list[dict]:
    """Problems in the order in which they first came up, drawn until there are enough or nothing new comes."""
    wanted = count + heldout_count
    patience = max(2 * wanted, 2000)  # a task of `wanted` problems in all then shows the last of them, nearly always
    found: dict[str, dict] = {}
    since_new = 0
    for part in count_from():
        for problem in _draw(task, arguments, wanted, (seed + part * wanted) % 2**31):
            since_new = 0 if problem["question"] not in found else since_new + 1
            found.setdefault(problem["question"], problem)
            if len(found) == wanted:
                return list(found.values())
            if since_new == patience:
                raise UserError(
                    f"prompts.count: {count} and prompts.heldout_count {heldout_count} make {wanted} problems, and "
                    f"{task} has only {len(found)} distinct ones with these prompts.arguments; lower the counts or "
                    "choose arguments with more problems"
                )
    raise AssertionError("unreachable")


def _draw(task: str, arguments: dict[str, Any], size: int, seed: int) -> list[dict]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"prompts.kind: reasoning_gym needs the package reasoning-gym: {INSTALL} ({error})") from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(sorted(DATASETS)[:5])}, ..."
        raise UserError(f"prompts.task: reasoning-gym has no task {task!r}{hint}")
    taken = {"size", "seed"} & arguments.keys()
    if taken:
        name = taken.pop()
        where = {"size": "prompts.count and prompts.heldout_count", "seed": "the run's seed"}[name]
        raise UserError(f"prompts.arguments.{name}: it follows from {where}; leave it out")
    try:
        return list(reasoning_gym.create_dataset(task, size=size, seed=seed, **arguments))
    except Exception as error:  # each task checks its settings in its own way, some only when they make a problem
        reason = in_line(error)[:200] or type(error).__name__
        raise UserError(f"prompts.arguments: {task} does not take {arguments or 'no arguments'}: {reason}") from error

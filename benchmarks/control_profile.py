"""Timers around our own functions, for `control_speed.py`: the library has no hooks for it and needs none.

A part's seconds are its own: what a timed function spends inside another timed one counts for the inner one only.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import nn

from lm_trust.control import rollout as rollout_module
from lm_trust.core import trust_region
from lm_trust.core.batch import Batch
from lm_trust.core.fisher import FisherOperator
from lm_trust.core.objective import SurrogateObjective
from lm_trust.core.parameters import trainable_parameters
from lm_trust.training import trainer as trainer_module
from lm_trust.training.trainer import Trainer

ENVIRONMENT, POLICY, SAMPLING = "environment stepping", "policy while sampling", "rollout, rest"
OLD, VALUES, ADVANTAGES = "old-policy pass", "values", "advantages"
GRADIENT, FISHER, SEARCH = "update: gradient", "update: Fisher products", "update: line search"
EPOCHS, EXACT, SOLVE = "update: epochs", "update: exact step KL", "update: rest"
CRITIC, NORMALISER, REST = "critic fit", "observation statistics", "rest"
ORDER = [ENVIRONMENT, POLICY, SAMPLING, OLD, VALUES, ADVANTAGES, GRADIENT, FISHER, SEARCH, EPOCHS, EXACT, SOLVE]
ORDER += [CRITIC, NORMALISER, REST]
ROUNDS = 7


class Stopwatch:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def timed(self, function: Callable, part: str, within: str | None = None) -> Callable:
        """`function`, its time counted for `part`; only where it is called by the part `within`, if one is given."""

        @functools.wraps(function)
        def wrapper(*arguments: Any, **settings: Any) -> Any:
            if within is not None and self._running[-1:] != [within]:
                return function(*arguments, **settings)
            self._turn()
            self._running.append(part)
            try:
                return function(*arguments, **settings)
            finally:
                self._turn()
                self._running.pop()

        return wrapper

    def _turn(self) -> None:
        """Book the time since the last turn for whatever is running."""
        now = time.perf_counter()
        if self._running:
            part = self._running[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


@contextmanager
def timers(trainer: Trainer) -> Iterator[Stopwatch]:
    """The functions of one trainer's iteration timed while the context lasts."""
    watch, task = Stopwatch(), trainer.task
    trust = hasattr(trainer.update, "cg_iterations")
    step = SOLVE if trust else EPOCHS
    points = [
        (trainer, "iterate", REST, None),
        (task, "collect", SAMPLING, None),
        (task.environments, "step", ENVIRONMENT, None),
        (trainer.policy, "distribution", OLD, REST),
        (trainer, "_score", OLD, REST),
        (trainer.critic, "values", VALUES, None),
        (trainer_module, "estimate_advantages", ADVANTAGES, None),
        (trainer.update, "step", step, None),
        (SurrogateObjective, "gradient", GRADIENT, None),
        (FisherOperator, "undamped", FISHER, None),
        (trust_region, "line_search", SEARCH, None),
        (SurrogateObjective, "start_from", EXACT, EPOCHS),
        (SurrogateObjective, "measure", EXACT, EPOCHS),
        (trainer.critic, "fit", CRITIC, None),
        (task, "after_update", NORMALISER, None),
    ]
    with ExitStack() as stack:
        for owner, name, part, within in points:
            wrapper = watch.timed(getattr(owner, name), part, within)
            stack.enter_context(mock.patch.object(owner, name, wrapper))
        sampler = rollout_module.sampler
        timed_sampler = mock.patch.object(
            rollout_module, "sampler", lambda *given: watch.timed(sampler(*given), POLICY)
        )
        stack.enter_context(timed_sampler)
        yield watch


def profile(trainer: Trainer, iterations: int) -> dict[str, float]:
    """Seconds an iteration by part, in the order of an iteration; 0 where a rule has no such part.

    The first iteration is not counted.
    """
    trainer.iterate()
    with timers(trainer) as watch:
        for _ in range(iterations):
            trainer.iterate()
    return {part: watch.seconds.get(part, 0.0) / iterations for part in ORDER}


def update_costs(trpo: Trainer, ppo: Trainer) -> dict[str, float]:
    """Median seconds of one surrogate gradient, one TRPO update and one PPO update, taken in turn on one rollout.

    Args:
        trpo: collects the rollout; its policy and its update rule are used.
        ppo: of the same environment; its update rule is used.

    Returns:
        gradient, trpo, ppo in seconds; products: Fisher products of the TRPO update.
    """
    policy, batch = _before_update(trpo)
    start = copy.deepcopy(policy.state_dict())

    def gradient() -> None:
        objective = SurrogateObjective(policy, batch.observations, batch.actions, batch.advantages, mask=batch.mask)
        objective.gradient(trainable_parameters(policy))

    work = {
        "gradient": gradient,
        "trpo": lambda: trpo.update.step(policy, batch),
        "ppo": lambda: ppo.update.step(policy, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    products = 0
    for _ in range(ROUNDS + 1):  # the first round warms up
        for name, function in work.items():
            policy.load_state_dict(start)
            started = time.perf_counter()
            report = function()
            seconds[name].append(time.perf_counter() - started)
            if name == "trpo":
                products = report.cg_iterations
    return {name: statistics.median(found[1:]) for name, found in seconds.items()} | {"products": products}


def _before_update(trainer: Trainer) -> tuple[nn.Module, Batch]:
    """A copy of the policy as the next update finds it, and that update's batch."""
    seen: list[tuple[nn.Module, Batch]] = []
    step = trainer.update.step

    def recording(policy: nn.Module, batch: Batch) -> Any:
        seen.append((copy.deepcopy(policy), batch))
        return step(policy, batch)

    with mock.patch.object(trainer.update, "step", recording):
        trainer.iterate()
    return seen[0]

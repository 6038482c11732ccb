"""The one-update study: every rule, over a grid of its knob, steps from the same checkpoint on the same rollout.

What a rule makes of a batch is then compared step for step, without what a whole run adds: the gain that it sees on the
batch, the gain on samples that it has not seen, how far it went, and whether held-out rewards rose.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_trust.compare.config import Candidate, require_comparable
from lm_trust.compare.fresh_samples import fresh_gain, paired_improvement
from lm_trust.errors import UserError, error_text
from lm_trust.training.build import build_world
from lm_trust.training.build_update import build_update
from lm_trust.training.config import Config, LanguageConfig
from lm_trust.training.trainer import Experience, Trainer

_MEASURED = (
    *("batch_gain", "fresh_gain", "fresh_low", "fresh_high", "improvement", "improvement_low", "improvement_high"),
    *("step_kl", "step_kl_max", "reference_kl", "within", "predicted_gain", "seconds", "error"),
)


def one_update_study(candidates: Sequence[Candidate], *, iterations_before: int, evaluations: int) -> dict[str, Any]:
    """One update by each candidate, from one policy and on one batch.

    The policy is that of the first candidate's run after some iterations: at its start LoRA's B is zero, and half of
    its gradient with it. Each rule comes fresh: Adam has no moments, and an adaptive coefficient is at its first value.

    Args:
        candidates: their configs differ in nothing but the update section (and the output folder).
        iterations_before: ordinary iterations by the first candidate's rule, fewer than those of its run.
        evaluations: held-out completions or episodes, of the old policy and of each new one, with the same noise.

    Returns:
        iterations_before. rows: for each candidate, in their order,
        rule, knob, value: the candidate's.
        batch_gain, predicted_gain, step_kl, step_kl_max, accepted: see `StepReport`; reference_kl: its
            reference_kl_after, nats per row, where the rule looks at it.
        fresh_gain, fresh_low, fresh_high: the same objective's gain on a second rollout of the old policy, with its
            95 % interval; see `fresh_gain`.
        improvement, improvement_low, improvement_high: held-out mean reward less the old policy's, with the 95 %
            interval of that difference; see `paired_improvement`.
        bound: the rule's max_kl in force, nats per step; None where it has none. within: step_kl <= bound.
        seconds: of the update alone.
        error: in one line, where the candidate failed; what was not measured by then is None.

    Raises:
        ValueError: there is no candidate, or their configs differ in more.
        UserError: the first config cannot be built; or a number of the rollouts, which the message names, is not
            finite.
    """
    require_comparable(candidates)
    trainer = build_world(candidates[0].config).trainer
    try:
        for _ in range(iterations_before):
            trainer.iterate()
        start = _Start(
            trainer,
            trainer.state_dict(),
            _experience(trainer),
            _experience(trainer),
            trainer.task.evaluate(trainer.policy, evaluations),
            evaluations,
        )
        rows = [_row(candidate, start) for candidate in candidates]
    finally:
        trainer.task.close()
    return {"iterations_before": iterations_before, "rows": rows}


@dataclass(frozen=True)
class _Start:
    """What all candidates have in common.

    Attributes:
        trainer: whose policy is moved; nothing else of it changes any more.
        state: of the trainer, with the old policy.
        seen: what the rules step on.
        fresh: a second rollout of the old policy: other prompts or states, and other noise.
        before: the old policy's held-out evaluation, of `evaluations` samples.
    """

    trainer: Trainer
    state: dict[str, Any]
    seen: Experience
    fresh: Experience
    before: dict[str, Any]
    evaluations: int


def _experience(trainer: Trainer) -> Experience:
    experience = trainer.experience()
    if experience.batch is None:
        raise UserError(f"one_update: no rule can step where {experience.offender}; change its iterations_before")
    return experience


def _row(candidate: Candidate, start: _Start) -> dict[str, Any]:
    bound = getattr(candidate.config.update, "max_kl", None)
    row = {"rule": candidate.rule, "knob": candidate.knob, "value": candidate.value, "bound": bound, "accepted": False}
    row |= dict.fromkeys(_MEASURED)
    try:
        _measure(candidate.config, start, row)
    except Exception as error:  # whatever it is, the other candidates are still worth their rows
        row["error"] = error_text(error)
    return row


def _measure(config: Config, start: _Start, row: dict[str, Any]) -> None:
    """Step from the old policy, and fill in the row."""
    policy, task = start.trainer.policy, start.trainer.task
    start.trainer.restore_policy(start.state)
    policy.zero_grad(set_to_none=True)
    rule = build_update(config)
    began = time.perf_counter()
    report = rule.step(policy, start.seen.batch)
    row["seconds"] = time.perf_counter() - began
    row["batch_gain"], row["predicted_gain"] = report.surrogate_gain, report.predicted_gain
    row["step_kl"], row["step_kl_max"], row["accepted"] = report.step_kl, report.step_kl_max, report.accepted
    row["reference_kl"] = report.metrics.get("reference_kl_after")
    row["bound"] = report.metrics.get("max_kl", row["bound"])  # an annealed one is less than the config's
    row["within"] = None if row["bound"] is None else report.step_kl <= row["bound"]
    loss = config.reference.loss if isinstance(config, LanguageConfig) else 0.0
    row["fresh_gain"], row["fresh_low"], row["fresh_high"] = fresh_gain(policy, start.fresh, reference_loss=loss)
    gained = paired_improvement(start.before, task.evaluate(policy, start.evaluations))
    row["improvement"], row["improvement_low"], row["improvement_high"] = gained

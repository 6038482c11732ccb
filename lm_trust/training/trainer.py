"""The one training loop of both worlds.

An iteration is: collect, score, value, estimate, update, fit. Which world it is shows nowhere here: a task collects
rollouts, a policy has distributions, and the update rule moves it. Where the run is spread over processes, each of them
runs this loop on its own rows, and what is a mean or a sum is that of all (`lm_trust.core.processes`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lm_trust.core.batch import Batch, Rollout
from lm_trust.core.distributions import Distribution, per_step
from lm_trust.core.parameters import trainable_parameters
from lm_trust.core.processes import gathered, mean, mean_kl, placed_rows, require_alike
from lm_trust.core.report import StepReport
from lm_trust.training.config_language import AdaptivePenalty, Mismatch
from lm_trust.training.critic import Critic
from lm_trust.training.estimation import AdvantageConfig, estimate_advantages
from lm_trust.training.finiteness import first_non_finite
from lm_trust.training.mismatch import corrected, mismatch_metrics
from lm_trust.training.penalty import adapted_penalty


class Task(Protocol):
    """A world as the Trainer sees it. All processes of a run call each of these together.

    Attributes:
        steps: environment steps, or completion tokens, collected so far by all processes.
    """

    steps: int

    def collect(self, policy: nn.Module) -> Rollout:
        """The next rollout of the policy; a UserError is the user's to mend, and the run ends with a checkpoint."""

    def after_update(self, policy: nn.Module, rollout: Rollout) -> None:
        """What follows once no update will look at the rollout again."""

    def describe(self, rollout: Rollout, row: int, step: int) -> str:
        """Where a number of the rollout stands, in words for people."""

    def evaluate(self, policy: nn.Module, count: int) -> dict[str, Any]:
        """A held-out evaluation on `count` episodes or completions, as evaluation.json holds it."""

    def state_dict(self) -> dict[str, Any]:
        """All that a later `collect` depends on besides the policy, of this process."""

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of the run from those of all processes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state of a run, as `joined` gives it, was taken."""

    def close(self) -> None:
        """Free what it holds."""


class UpdateRule(Protocol):
    """A way to move the policy."""

    def step(self, policy: nn.Module, batch: Batch) -> StepReport:
        """Move the policy in place, or leave it bit for bit as it was, and say which."""

    def state_dict(self) -> dict[str, Any]:
        """What a later step depends on besides policy and batch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


@dataclass(frozen=True)
class Experience:
    """A rollout, and what the learner makes of it before it learns.

    Attributes:
        rollout: as collected.
        scores: (B, T) of each step, by the names that messages call them; see `Trainer._score`.
        values, advantages, returns: (B, T).
        batch: what the update sees; None where a number is not finite, and nothing may learn from it: what is not
            finite stays so in whatever it once got into.
        offender: that number and where it stands, in words; None where there is a batch.
        metrics: to log.
        rollout_seconds: that collecting and scoring took.
    """

    rollout: Rollout
    scores: dict[str, Tensor]
    values: Tensor
    advantages: Tensor
    returns: Tensor
    batch: Batch | None
    offender: str | None
    metrics: dict[str, float]
    rollout_seconds: float


@dataclass
class Trainer:
    """Everything that one iteration needs, and its state.

    Args:
        policy: a module with `distribution(observations)`.
        task: collects and evaluates.
        critic: values and fits.
        update: moves the policy.
        advantage: the estimator's configuration.
        iterations: how many there will be, for schedules.
        reference_penalty: coefficient of log(policy / reference), a token's k1, taken off its reward.
        adaptive_penalty: how that coefficient changes after each iteration; None: not at all.
        mismatch: what is done where a generation engine's log-probabilities differ from the policy's.

    Attributes:
        samples: of the last iteration, what people may read of each row here (B values a column): the rollout's
            `samples`, the mean advantage of the row's steps and, where there is a reference, its KL to it in nats.
    """

    policy: nn.Module
    task: Task
    critic: Critic
    update: UpdateRule
    advantage: AdvantageConfig
    iterations: int
    reference_penalty: float = 0.0
    adaptive_penalty: AdaptivePenalty | None = None
    mismatch: Mismatch = field(default_factory=Mismatch)
    iteration: int = 0
    samples: dict[str, list] = field(default_factory=dict, init=False, repr=False)
    _task_before_collect: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def iterate(self) -> dict[str, Any]:
        """One iteration; returns its line of metrics.

        Of its times `rollout_seconds` is what collecting and scoring took, `update_seconds` all the rest, with the
        critic's values and its fit, and `step_seconds` the update rule's own step alone: 0 where there was none.
        """
        started = time.perf_counter()
        steps_before = self.task.steps
        experience = self.experience()
        rollout, batch, metrics = experience.rollout, experience.batch, experience.metrics
        if batch is not None:
            finish_fit = self.critic.start_fit(rollout, experience.returns, experience.values, batch.progress)
            step_started = time.perf_counter()
            report = self.update.step(self.policy, batch)
            step_seconds = time.perf_counter() - step_started
            fitted = finish_fit()
            require_alike([*trainable_parameters(self.policy), *self.critic.parameters()], "policies or critics")
            if self.adaptive_penalty is not None:
                self.reference_penalty = adapted_penalty(
                    self.adaptive_penalty,
                    self.reference_penalty,
                    metrics["reference_kl"],
                    placed_rows(len(rollout.actions)).total,
                )
        else:
            report, step_seconds = StepReport(False, "non_finite", metrics={"offender": experience.offender}), 0.0
            fitted = {"value_loss": None, "explained_variance": None}
        self.task.after_update(self.policy, rollout)
        self.samples = _samples(rollout, experience.scores, experience.advantages)
        self.iteration += 1
        seconds = time.perf_counter() - started
        return {
            "iteration": self.iteration,
            "steps": self.task.steps,
            **rollout.metrics,
            **metrics,
            **report.as_metrics(),
            **fitted,
            "rollout_seconds": experience.rollout_seconds,
            "update_seconds": seconds - experience.rollout_seconds,
            "step_seconds": step_seconds,
            "iteration_seconds": seconds,
            "steps_per_second": (self.task.steps - steps_before) / seconds,
        }

    def experience(self) -> Experience:
        """The next rollout of the policy as it is, scored, valued and made a batch; policy and critic learn nothing."""
        started = time.perf_counter()
        rollout = self._collect()
        with torch.no_grad():
            old = self.policy.distribution(rollout.observations).detach() if rollout.old is None else rollout.old
            scores, metrics = self._score(rollout, old)
            metrics |= mismatch_metrics(self.mismatch, rollout, scores["log-probability"])
        self._task_before_collect = None
        rollout_seconds = time.perf_counter() - started

        values, next_values = self.critic.values(rollout)
        advantages, returns = estimate_advantages(self.advantage, rollout, scores["reward"], values, next_values)
        advantages = corrected(self.mismatch, rollout, scores["log-probability"], advantages)
        if self.adaptive_penalty is not None:
            metrics["reference_penalty"] = self.reference_penalty
        offender = self._offender(rollout, scores | {"value": values, "return": returns, "advantage": advantages})
        batch = None
        if offender is None:
            progress = self.iteration / self.iterations
            batch = _batch(rollout, old, scores["log-probability"], advantages, progress=progress)
        return Experience(rollout, scores, values, advantages, returns, batch, offender, metrics, rollout_seconds)

    def _offender(self, rollout: Rollout, quantities: dict[str, Tensor]) -> str | None:
        """The first number of any process that is not finite, in words."""
        found = first_non_finite(quantities, rollout.mask)
        words = None
        if found is not None:
            place = self.task.describe(rollout, found.row, found.step)
            words = f"the {found.quantity} is {found.value} at {place}"
        return next((each for each in gathered(words) if each is not None), None)

    def samples_of_all(self) -> dict[str, list]:
        """`samples` of the rows of all processes, each of which must ask for them."""
        everyone = gathered(self.samples)
        return {name: [value for samples in everyone for value in samples[name]] for name in self.samples}

    @property
    def collecting(self) -> bool:
        """True after a rollout that failed: policy and critic are untouched, and `state_dict` is from before it."""
        return self._task_before_collect is not None

    def _collect(self) -> Rollout:
        self._task_before_collect = self.task.state_dict()
        return self.task.collect(self.policy)

    def _score(self, rollout: Rollout, old: Distribution) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Each step's log-probabilities, entropy, reference KL and reward less the penalty, (B, T); means to log."""
        reference = [] if rollout.reference is None else [rollout.reference]
        log_prob, entropy, *rest = per_step(_scores, [old, *reference], rollout.actions)
        scores = {"log-probability": log_prob, "entropy": entropy}
        if rollout.engine_log_prob is not None:
            scores["engine log-probability"] = rollout.engine_log_prob
        metrics = {"entropy": mean(entropy, rollout.mask)}
        rewards = rollout.rewards
        if rest:
            reference_log_prob, kl = rest
            scores |= {"reference log-probability": reference_log_prob, "reference KL": kl}
            metrics["reference_kl"] = mean_kl(kl, rollout.mask)
            if self.reference_penalty:
                log_ratio = torch.where(rollout.mask, log_prob - reference_log_prob, 0.0)
                rewards = rewards - self.reference_penalty * log_ratio
        return scores | {"reward": rewards}, metrics

    def state_dict(self) -> dict[str, Any]:
        """All that the next iterations depend on, of all processes, each of which must ask for it.

        Of the policy, its trainable parameters and its buffers.
        """
        parameters = trainable_parameters(self.policy)
        task = self.task.state_dict() if self._task_before_collect is None else self._task_before_collect
        return {
            "iteration": self.iteration,
            "policy": [parameter.detach().clone() for parameter in parameters],
            "buffers": _buffers(self.policy),
            "task": self.task.joined(gathered(task)),
            "critic": self.critic.state_dict(),
            "update": self.update.state_dict(),
            "reference_penalty": self.reference_penalty,
        }

    @torch.no_grad()
    def restore_policy(self, state: dict[str, Any]) -> None:
        """Make the policy, and it alone, what it was when `state_dict` was taken, bit for bit."""
        for parameter, saved in zip(trainable_parameters(self.policy), state["policy"], strict=True):
            parameter.copy_(saved)
        for name, buffer in self.policy.named_buffers():
            if name in state["buffers"]:
                buffer.copy_(state["buffers"][name])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.iteration = state["iteration"]
        self.restore_policy(state)
        self.critic.load_state_dict(state["critic"])
        self.update.load_state_dict(state["update"])
        self.task.load_state_dict(state["task"])
        if self.adaptive_penalty is not None:  # a fixed one is what the configuration says now
            self.reference_penalty = state["reference_penalty"]


def _scores(old: Distribution, *given: Any) -> tuple[Tensor, ...]:
    *reference, actions = given
    scores = (old.log_prob(actions), old.entropy())
    for other in reference:
        scores += (other.log_prob(actions), old.kl(other))
    return scores


def _batch(rollout: Rollout, old: Distribution, old_log_prob: Tensor, advantages: Tensor, *, progress: float) -> Batch:
    """What the update sees: whole sequences as rows, or single steps where rows need not stay together."""
    batch = Batch(
        observations=rollout.observations,
        actions=rollout.actions,
        old=old,
        old_log_prob=old_log_prob,
        advantages=advantages,
        mask=rollout.mask,
        reference=rollout.reference,
        progress=progress,
    )
    return batch if rollout.whole_sequences else batch.flattened()


def _samples(rollout: Rollout, scores: dict[str, Tensor], advantages: Tensor) -> dict[str, list]:
    if not rollout.samples:
        return {}
    summed = {"advantage": torch.where(rollout.mask, advantages, 0.0).sum(-1) / rollout.mask.sum(-1)}
    if "reference KL" in scores:
        summed["reference_kl"] = torch.where(rollout.mask, scores["reference KL"], 0.0).sum(-1)
    return rollout.samples | {name: values.tolist() for name, values in summed.items()}


def _buffers(policy: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers only: a transformer's rotary tables are made anew with the model."""
    persistent = policy.state_dict(keep_vars=True)
    return {name: buffer.clone() for name, buffer in policy.named_buffers() if name in persistent}

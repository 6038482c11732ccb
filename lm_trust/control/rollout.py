"""The control world as the Trainer sees it: collect a rollout, learn statistics, evaluate, stop and go on.

Networks of this size run on the CPU: a step of a handful of environments costs less than a transfer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_trust.control.acting import sampler
from lm_trust.control.evaluation import Episode, Remembering, evaluate_policy
from lm_trust.control.normaliser import RewardNormaliser
from lm_trust.control.playing import play
from lm_trust.control.processes import EnvironmentProcesses
from lm_trust.control.vector import Environments
from lm_trust.control.vector_env import VectorEnvironments
from lm_trust.core.batch import Rollout
from lm_trust.core.processes import all_rows, gathered, in_the_first, own_stream, placed_rows, together
from lm_trust.core.seeding import make_generator
from lm_trust.errors import UserError

WINDOW = 100  # finished episodes that the reported return is a mean of


class ControlTask:
    """B environments, T steps of each an iteration; episodes run on from one iteration into the next.

    Where the run is spread over processes, each has some of the environments.

    Args:
        environments: the training environments.
        steps: T.
        gamma: discount, for the scale of the rewards.
        seed: the run's seed, for the sampling of actions.
        normalise_observations: learn the statistics of the policy's own `normaliser` from each rollout.
        normalise_rewards: scale the rewards that the learner sees; what is reported stays unscaled.
        evaluation_environments: makes `count` environments for `evaluate`, called once a count.

    Attributes:
        steps: environment steps taken so far, over all environments.
        finished_episodes: of the last `collect`: (unscaled return, length, `steps` at its end) each.
    """

    def __init__(
        self,
        environments: Environments | EnvironmentProcesses | VectorEnvironments,
        *,
        steps: int,
        gamma: float,
        seed: int,
        normalise_observations: bool = False,
        normalise_rewards: bool = False,
        evaluation_environments: Callable[[int], Environments] | None = None,
    ) -> None:
        self.environments = environments
        self.rollout_steps = steps
        self.steps = 0
        self.normalise_observations = normalise_observations
        self._reward_normaliser = RewardNormaliser(environments.count, gamma) if normalise_rewards else None
        self._generator = make_generator(seed, "control.sampling")
        self._make_evaluation = evaluation_environments
        self._evaluation: Environments | None = None
        self._returns = np.zeros(environments.count)
        self._lengths = np.zeros(environments.count, np.int64)
        self._finished: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._episodes = 0
        self.finished_episodes: list[tuple[float, int, int]] = []

    def _play(self, policy: nn.Module, generator: torch.Generator) -> dict[str, np.ndarray]:
        """T steps of every environment; see `playing.play`."""
        draw = sampler(policy, generator, self.rollout_steps, self.environments.count)
        if isinstance(self.environments, EnvironmentProcesses):
            return self.environments.play(draw, self.rollout_steps)
        return play(self.environments, draw, self.rollout_steps)

    def _ended(self, played: dict[str, np.ndarray]) -> list[tuple[int, float, int]]:
        """Step, unscaled return and length of each episode that ended here."""
        found: list[tuple[int, float, int]] = []
        ended = played["terminated"] | played["truncated"]
        for step, (reward, valid) in enumerate(zip(played["rewards"], played["valid"], strict=True)):
            self._returns += reward
            self._lengths += valid
            for row in ended[step].nonzero()[0]:
                found.append((step, float(self._returns[row]), int(self._lengths[row])))
                self._returns[row], self._lengths[row] = 0.0, 0
        return found

    def _count(self, played: dict[str, np.ndarray]) -> None:
        """Note the steps and the finished episodes of all processes, in the order of their steps."""
        everyone = gathered((self._ended(played), played["valid"].sum(1)))
        at_end = self.steps + np.cumsum(sum(steps for _, steps in everyone))
        episodes = sorted((episode for ended, _ in everyone for episode in ended), key=itemgetter(0))
        self.finished_episodes = [(total, length, int(at_end[step])) for step, total, length in episodes]
        self._finished.extend((total, length) for _, total, length in episodes)
        self.steps = int(at_end[-1])
        self._episodes += len(episodes)

    def collect(self, policy: nn.Module) -> Rollout:
        """T steps of the policy in every environment.

        Actions are stored as sampled. `next_critic_inputs` is what each action led to: the final observation
        where an episode ended, never the first one of the next episode.

        Raises:
            UserError: an environment gave a number that is not finite; or observations are to be normalised
                and the policy has no normaliser.
        """
        if self.normalise_observations and getattr(policy, "normaliser", None) is None:
            raise UserError("normalise.observations: this policy has no `normaliser`; set it to false")
        generator = own_stream(self._generator)
        arrays = together(lambda: self._play(policy, generator))
        self._count(arrays)
        played = {name: _by_environment(array) for name, array in arrays.items()}
        rewards, ended = played["rewards"], played["terminated"] | played["truncated"]
        if self._reward_normaliser is not None:
            rewards = self._reward_normaliser(rewards, ended, played["valid"])
        return Rollout(
            observations=played["observations"],
            actions=played["actions"],
            rewards=rewards.float(),
            terminated=played["terminated"],
            truncated=played["truncated"],
            mask=played["valid"],
            critic_inputs=played["observations"],
            next_critic_inputs=played["successors"],
            metrics=self._metrics(),
        )

    def after_update(self, policy: nn.Module, rollout: Rollout) -> None:
        """Let the policy's normaliser learn from the rollout, now that no update will look at it again."""
        if self.normalise_observations:
            policy.normaliser.update(all_rows(rollout.observations[rollout.mask]))

    def describe(self, rollout: Rollout, row: int, step: int) -> str:
        """Where a number of a rollout stands, in words."""
        return f"step {step} of environment {row}"

    def evaluate(self, policy: nn.Module, count: int) -> dict[str, Any]:
        """`count` episodes with the most likely actions, on separate environments; see `evaluate_policy`.

        The first process plays them all, so that they are the same however many there are.
        """
        if self._make_evaluation is None:
            raise ValueError("this task was made without evaluation_environments")
        return in_the_first(lambda: self._evaluate(policy, count))

    def _evaluate(self, policy: nn.Module, count: int) -> dict[str, Any]:
        if self._evaluation is None or self._evaluation.count != count:
            if self._evaluation is not None:
                self._evaluation.close()
            self._evaluation = self._make_evaluation(count)
        return evaluate_policy(policy, self._evaluation)

    def remembered(self) -> list[Episode]:
        """Of the last `evaluate`, the episodes of those environments that are `Remembering`, in their order."""
        environments = [] if self._evaluation is None else self._evaluation.envs
        return [env.episode for env in environments if isinstance(env, Remembering)]

    def state_dict(self) -> dict[str, Any]:
        """All that a later `collect` depends on besides the policy."""
        return {
            "steps": self.steps,
            "episodes": self._episodes,
            "returns": torch.from_numpy(self._returns.copy()),
            "lengths": torch.from_numpy(self._lengths.copy()),
            "finished": [list(episode) for episode in self._finished],
            "generator": self._generator.get_state(),
            "environments": self.environments.state_dict(),
            "reward_normaliser": (
                None if self._reward_normaliser is None else _copied(self._reward_normaliser.state_dict())
            ),
        }

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of the run from that of each process: the environments of all, one after another."""
        whole = {
            **states[0],
            **{name: torch.cat([state[name] for state in states]) for name in ("returns", "lengths")},
            "environments": self.environments.joined([state["environments"] for state in states]),
        }
        if self._reward_normaliser is not None:
            returns = torch.cat([state["reward_normaliser"]["returns"] for state in states])
            whole["reward_normaliser"] = states[0]["reward_normaliser"] | {"returns": returns}
        return whole

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of the run: exactly, where the environments' `load_state_dict` says it can."""
        self.environments.load_state_dict(state["environments"])
        own = placed_rows(self.environments.count).slice
        self.steps, self._episodes = state["steps"], state["episodes"]
        self._returns, self._lengths = state["returns"][own].numpy().copy(), state["lengths"][own].numpy().copy()
        self._finished = deque(((total, length) for total, length in state["finished"]), maxlen=WINDOW)
        self._generator.set_state(state["generator"])
        if self._reward_normaliser is not None:
            saved = state["reward_normaliser"]
            self._reward_normaliser.load_state_dict(saved | {"returns": saved["returns"][own]})
        if not self.environments.keeps_episodes:  # what the lost ones had earned belongs to none of the new
            self._returns[:], self._lengths[:] = 0.0, 0
            if self._reward_normaliser is not None:
                self._reward_normaliser.returns.zero_()

    def close(self) -> None:
        """Close all environments."""
        self.environments.close()
        if self._evaluation is not None:
            self._evaluation.close()

    def _metrics(self) -> dict[str, Any]:
        """Of the last finished episodes, unscaled; None before the first one finished."""
        returns, lengths = zip(*self._finished, strict=True) if self._finished else ((), ())
        return {
            "reward_mean": float(np.mean(returns)) if returns else None,
            "episode_length": float(np.mean(lengths)) if lengths else None,
            "episodes": self._episodes,
        }


def _by_environment(array: np.ndarray) -> Tensor:
    """(T, B, ...) to a (B, T, ...) tensor."""
    return torch.from_numpy(np.ascontiguousarray(array.swapaxes(0, 1)))


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}

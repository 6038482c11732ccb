"""Several copies of an environment stepped together, each episode from its own explicit seed.

The state of a copy is a function of its episode's seed and of the actions since: that is what makes a resume
exact whatever the environment, and why episodes are restarted here and not by gymnasium's vector
environments, whose automatic resets go on from the environment's own generator. (It costs no time: with 8
copies a step takes 0.84 of what it takes in `SyncVectorEnv` with `AutoresetMode.DISABLED` on CartPole, 0.92
on HalfCheetah.)
"""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

from lm_trust.control.spaces import action_space, described, observation_encoder
from lm_trust.core.processes import RowRange
from lm_trust.core.seeding import stream_seed
from lm_trust.errors import UserError, in_line
from lm_trust.user_code import working_directory_importable

_RESET = "reset(*, seed, options) must return (observation, info)"
_STEP = "step(action) must return (observation, reward, terminated, truncated, info)"


class Transition(NamedTuple):
    """What one step of B environments gave.

    Attributes:
        rewards: (B,) float64, as the environments gave them.
        terminated, truncated: (B,) bool.
        valid: (B,) bool, False where there was no step and nothing can be learnt: an action that was ignored.
        final: row -> (O,) the last observation of an episode that ended in this step. The next one has begun
            already: `Environments.observations` holds its first observation.
    """

    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    final: dict[int, np.ndarray]


class Environments:
    """B copies of one environment.

    Args:
        name: what messages call the environment.
        envs: the copies, alike but separate.
        seed: of which every episode's seed is a function.
        placed: where they stand among the environments of the whole run; None: they are all.

    Attributes:
        count: B.
        observation_size: O.
        action_space: what a policy acts with.
        observations: (B, O) float32, what each environment shows now; a new array after every step.
        keeps_episodes: a loaded state goes on in the middle of its episodes.

    Raises:
        UserError: a space that is not supported, copies that are one object, or another interface than gymnasium's.
    """

    keeps_episodes = True

    def __init__(
        self,
        name: str,
        envs: Sequence[gymnasium.Env],
        *,
        seed: int,
        placed: RowRange | None = None,
    ) -> None:
        require_separate(name, envs)
        self.name = name
        self.count = len(envs)
        self._placed = placed or RowRange(0, self.count, self.count)
        self.action_space = action_space(getattr(envs[0], "action_space", None), name)
        self.observation_size, self._encode = observation_encoder(getattr(envs[0], "observation_space", None), name)
        self._seed = seed
        self.envs = list(envs)
        self._step_functions = [env.step for env in self.envs]
        given = self.action_space.to_environment(np.zeros((self.count, *self.action_space.shape), np.int64))
        self._log = np.empty((256, *given.shape), given.dtype)  # of what the environments were given
        self.reset()

    def reset(self) -> None:
        """Begin episode 0 in every environment."""
        self.observations = np.empty((self.count, self.observation_size), np.float32)
        self._cursor = 0  # actions in the log
        self._started = [0] * self.count  # where in the log each environment's episode began
        self._episodes = [0] * self.count
        self._returns = np.zeros(self.count)  # of the present episodes
        for row in range(self.count):
            self.observations[row] = self._begin(row, 0)

    def step(self, actions: np.ndarray, rows: Sequence[int] | None = None) -> Transition:
        """One step with a policy's raw actions, (B,) int64 or (B, A); after an episode's end the next begins.

        Args:
            actions: a row for every environment.
            rows: step these environments only; the others' entries in the result are zero, and not valid.

        Raises:
            UserError: the environment returned something else than gymnasium asks for; an observation has another
                shape than its space says; a reward is no number; or one of them is not finite, which names the
                environment, the copy and the step.
        """
        if self._cursor == len(self._log):
            self._make_room()
        given = self.action_space.to_environment(actions)
        self._log[self._cursor] = given
        self._cursor += 1

        encode, size = self._encode, self.observation_size
        observations = self.observations.copy()
        rewards = np.zeros(self.count)
        terminated, truncated = np.zeros(self.count, bool), np.zeros(self.count, bool)
        valid = np.zeros(self.count, bool)
        valid[slice(None) if rows is None else list(rows)] = True
        for row in range(self.count) if rows is None else rows:
            try:
                observation, reward, terminated[row], truncated[row], _ = self._step_functions[row](given[row])
            except (TypeError, ValueError) as error:
                self._refuse_interface(error, _STEP)
                raise
            try:
                rewards[row] = reward
            except (TypeError, ValueError):
                raise UserError(
                    f"environment {self.name}: a reward is {described(reward)}, not a number; return float(reward)"
                ) from None
            encoded = observation if encode is None else encode(observation)
            try:
                length = len(encoded)
            except TypeError:  # a bare number, as some environments with a single one give
                length = 1
            if length != size:  # numpy would repeat a single number without a word
                raise self._misshapen(row, observation)
            try:
                observations[row] = encoded
            except (TypeError, ValueError):
                raise self._misshapen(row, observation) from None
        # A sum of squares is the cheapest look at every number; where it overflows, the exact check decides.
        if not math.isfinite(np.vdot(observations, observations) + np.vdot(rewards, rewards)):
            self._require_finite(observations, "observation")
            self._require_finite(rewards, "reward")

        self._returns += rewards
        final = {}
        for row in (terminated | truncated).nonzero()[0].tolist():
            final[row] = observations[row].copy()
            observations[row] = self._begin(row, self._episodes[row] + 1)
        self.observations = observations
        return Transition(rewards, terminated, truncated, valid, final)

    def state_dict(self) -> dict[str, Any]:
        """Each environment's episode, the actions taken in it, what was seen last, and what was earned."""
        return {
            "episodes": torch.tensor(self._episodes),
            "observations": torch.from_numpy(self.observations.copy()),
            "returns": torch.from_numpy(self._returns.copy()),
            "actions": {
                str(row): torch.from_numpy(self._log[start : self._cursor, row].copy())
                for row, start in enumerate(self._started)
            },
        }

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of all of a run's environments from those of each process's."""
        actions = [taken for state in states for taken in state["actions"].values()]
        return {
            **{name: torch.cat([state[name] for state in states]) for name in ("episodes", "observations", "returns")},
            "actions": {str(row): taken for row, taken in enumerate(actions)},
        }

    @working_directory_importable()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a saved state of the run by playing each environment's present episode again.

        Exact for an environment that is a function of its reset seed and its actions, as gymnasium asks and
        as its classic control and MuJoCo ones are. One that draws from the global generators, reads a clock
        or carries something from one episode into the next comes back different; where what it shows or pays
        in the present episodes tells so, there is a warning. The time it takes, and the memory to be able to,
        are those of the present episodes alone.

        Raises:
            UserError: the state is of another number of environments.
        """
        first, _, total = self._placed
        if len(state["episodes"]) != total:
            raise UserError(f"environment.count: the checkpoint is of {len(state['episodes'])}, not {total}")
        self._episodes = state["episodes"][self._placed.slice].tolist()
        actions = [state["actions"][str(first + row)].numpy() for row in range(self.count)]
        self._cursor = max(len(taken) for taken in actions)
        self._log = np.empty((max(256, 2 * self._cursor), *self._log.shape[1:]), self._log.dtype)
        self._started = [self._cursor - len(taken) for taken in actions]
        for row, taken in enumerate(actions):
            self._log[self._started[row] : self._cursor, row] = taken
            self.observations[row] = self._replay(row, taken)
        found = {"observations": self.observations, "returns": self._returns}
        if not all(np.array_equal(values, state[name][self._placed.slice].numpy()) for name, values in found.items()):
            warnings.warn(
                f"environment {self.name} is not deterministic given its seed: the resumed run differs from "
                "one that was never stopped",
                stacklevel=3,  # of who called it, beyond the context around it
            )

    @working_directory_importable()
    def close(self) -> None:
        """Close every copy."""
        for env in self.envs:
            env.close()

    def _begin(self, row: int, episode: int) -> np.ndarray:
        """Reset one environment to the given episode, and return its first observation, (O,)."""
        self._episodes[row], self._started[row], self._returns[row] = episode, self._cursor, 0.0
        # 31 bits, because some environments hand their seed to a 32-bit generator.
        seed = stream_seed(self._seed, f"control.episode/{self._placed.first + row}/{episode}") >> 32
        try:
            given = self.envs[row].reset(seed=seed)
            if not isinstance(given, tuple | list):  # an observation alone, which may well hold two numbers
                raise TypeError(f"it returned {type(given).__name__}")
            observation, _ = given
        except (TypeError, ValueError) as error:
            self._refuse_interface(error, _RESET)
            raise
        encoded = np.asarray(observation if self._encode is None else self._encode(observation), np.float32)
        if encoded.shape != (self.observation_size,):
            raise self._misshapen(row, observation)
        if not np.isfinite(encoded).all():
            raise UserError(
                f"environment {self.name}, copy {self._placed.first + row}: nan or infinity in the first "
                f"observation of episode {episode} (reset seed {seed})"
            )
        return encoded

    def _refuse_interface(self, error: Exception, asked: str) -> None:
        """Raise a UserError where it is a call or what it returned that failed; not where it is the environment's code.

        A wrapper around the environment, gymnasium's or ours, takes apart what is returned as well.
        """
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if all(module.startswith((__package__, "gymnasium.core", "gymnasium.wrappers")) for module in modules):
            raise UserError(f"environment {self.name}: {asked}, as gymnasium asks: {in_line(error)}") from error

    def _misshapen(self, row: int, observation: Any) -> UserError:
        return UserError(
            f"environment {self.name}: an observation has shape {np.shape(observation)}, "
            f"its space says {in_line(self.envs[row].observation_space)}"
        )

    def _replay(self, row: int, actions: np.ndarray) -> np.ndarray:
        started = self._started[row]
        encoded = self._begin(row, self._episodes[row])
        self._started[row] = started
        for action in actions.copy():
            observation, reward, end, limit, _ = self._step_functions[row](action)
            self._returns[row] += float(reward)
            if end or limit:  # only where the environment does not repeat itself
                return self._begin(row, self._episodes[row] + 1)
            encoded = observation if self._encode is None else self._encode(observation)
        return encoded

    def _make_room(self) -> None:
        """Drop what belongs to finished episodes; grow where one episode fills most of the log."""
        first = min(self._started)
        kept = self._log[first : self._cursor]
        log = np.empty((max(256, 2 * len(kept)), *kept.shape[1:]), kept.dtype)
        log[: len(kept)] = kept
        self._log, self._cursor = log, len(kept)
        self._started = [start - first for start in self._started]

    def _require_finite(self, values: np.ndarray, what: str) -> None:
        bad = ~np.isfinite(values.reshape(self.count, -1)).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            raise UserError(
                f"environment {self.name}, copy {self._placed.first + row}: nan or infinity in the {what} "
                f"at step {self._cursor - self._started[row]} of episode {self._episodes[row]}"
            )


def require_separate(name: str, envs: Sequence[gymnasium.Env]) -> None:
    """Refuse copies of the environment `name` that are one object.

    Raises:
        UserError: they are.
    """
    if len({id(env) for env in envs}) < len(envs):
        raise UserError(f"environment {name}: the factory returned one object twice, not a new one")

"""Any `gymnasium.vector.VectorEnv` behind the interface of `Environments`.

Vector environments begin an episode's successor by themselves, in one of two ways (`AutoresetMode`):

- NEXT_STEP: the step that ends an episode shows its final observation, and the step after it ignores its action
  and shows the next episode's first observation. That step is no transition: it is not `valid`.
- SAME_STEP: the step that ends an episode already shows the next one's first observation; the final one is in
  `infos["final_obs"]`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from lm_trust.control.spaces import action_space, observation_encoder
from lm_trust.control.vector import Transition
from lm_trust.core.processes import RowRange
from lm_trust.core.seeding import stream_seed
from lm_trust.errors import UserError
from lm_trust.user_code import working_directory_importable


class VectorEnvironments:
    """B environments that are stepped together by other means than ours.

    A resume is not exact: a vector environment's state can be neither read nor set, and its episodes go on from
    its own generators. See `load_state_dict`.

    Args:
        name: what messages call the environment.
        vector_env: reset by itself on the next or on the same step, which its metadata say; `reset` takes a list
            of seeds, one an environment.
        seed: of which all seeds are a function.
        placed: where they stand among the environments of the whole run; None: they are all.

    Attributes:
        count: B.
        observation_size: O.
        action_space: what a policy acts with.
        observations: (B, O) float32, what each environment shows now; a new array after every step.
        keeps_episodes: a loaded state does not go on in the middle of its episodes.

    Raises:
        UserError: a space or an autoreset mode that is not supported.
    """

    keeps_episodes = False

    def __init__(self, name: str, vector_env: VectorEnv, *, seed: int, placed: RowRange | None = None) -> None:
        mode = vector_env.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise UserError(
                f"environment {name}: its vector environment has autoreset_mode {mode} in its metadata; supported "
                "are AutoresetMode.NEXT_STEP and AutoresetMode.SAME_STEP"
            )
        self.name = name
        self.vector_env = vector_env
        self.count = vector_env.num_envs
        self._placed = placed or RowRange(0, self.count, self.count)
        self.action_space = action_space(vector_env.single_action_space, name)
        self.observation_size, self._encode = observation_encoder(vector_env.single_observation_space, name)
        self._next_step = mode == AutoresetMode.NEXT_STEP
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the episodes of the beginning."""
        self._begin(0)

    def step(self, actions: np.ndarray) -> Transition:
        """One step with a policy's raw actions, (B,) int64 or (B, A); those of rows that are not `valid` are ignored.

        Raises:
            UserError: an observation or a reward is not finite; names the environment, the copy and the step.
        """
        given = self.action_space.to_environment(actions)
        shown, rewards, terminated, truncated, infos = self.vector_env.step(given)
        self._steps += 1
        valid = ~self._awaiting_reset
        observations = self._encoded(shown)
        rewards = np.where(valid, rewards, 0.0).astype(np.float64, copy=False)
        terminated, truncated = terminated & valid, truncated & valid
        ended = terminated | truncated
        final = {int(row): self._final(int(row), observations, infos) for row in np.flatnonzero(ended)}
        if self._next_step:
            self._awaiting_reset = ended
        self._require_finite(observations, "observation")
        self._require_finite(rewards, "reward")
        for row, observation in final.items():
            self._require_finite(observation[None], "final observation", row)
        self.observations = observations
        return Transition(rewards, terminated, truncated, valid, final)

    def state_dict(self) -> dict[str, Any]:
        """How many environments there are, and how many steps each of them has taken."""
        return {"count": self.count, "steps": self._steps}

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of all of a run's environments from those of each process's."""
        return states[0] | {"count": sum(state["count"] for state in states)}

    @working_directory_importable()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin a new episode in every environment, from seeds that are a function of the run's seed and its steps.

        So the resumed run is another one than that which was never stopped, though the same state always gives
        the same one. What was under way is lost: the part of an episode after the checkpoint is never played, and
        it is counted in no return. A warning says so.

        Raises:
            UserError: the state is of another number of environments.
        """
        if state["count"] != self._placed.total:
            raise UserError(f"environment.count: the checkpoint is of {state['count']}, not {self._placed.total}")
        self._begin(state["steps"])
        warnings.warn(
            f"environment {self.name}: the state of vector environments cannot be restored, so every environment "
            "begins a new episode: the resumed run differs from one that was never stopped",
            stacklevel=3,  # of who called it, beyond the context around it
        )

    @working_directory_importable()
    def close(self) -> None:
        """Close the vector environment."""
        self.vector_env.close()

    def _begin(self, steps: int) -> None:
        """Reset all environments, from the seeds that belong to this many steps of each."""
        # 31 bits, because some environments hand their seed to a 32-bit generator.
        rows = range(self._placed.first, self._placed.first + self.count)
        seeds = [stream_seed(self._seed, f"control.vector/{row}/{steps}") >> 32 for row in rows]
        shown, _ = self.vector_env.reset(seed=seeds)
        self._steps = steps
        self._awaiting_reset = np.zeros(self.count, bool)
        self.observations = self._encoded(shown)
        self._require_finite(self.observations, "first observation")

    def _encoded(self, shown: Any) -> np.ndarray:
        """Observations as the vector environment gives them, to (B, O): always a new array."""
        if self._encode is not None:
            shown = [self._encode(observation) for observation in shown]
        encoded = np.array(shown, np.float32)
        if encoded.shape != (self.count, self.observation_size):
            raise UserError(
                f"environment {self.name}: the observations have shape {np.shape(shown)}, "
                f"not that of {self.count} times {self.vector_env.single_observation_space}"
            )
        return encoded

    def _final(self, row: int, observations: np.ndarray, infos: dict[str, Any]) -> np.ndarray:
        """The last observation of the episode that ended in an environment, (O,)."""
        if self._next_step:
            return observations[row].copy()
        if "final_obs" not in infos:
            raise UserError(f"environment {self.name}: an episode ended, and its infos hold no 'final_obs'")
        shown = infos["final_obs"][row]
        return np.array(shown if self._encode is None else self._encode(shown), np.float32)

    def _require_finite(self, values: np.ndarray, what: str, row: int | None = None) -> None:
        # A sum of squares is the cheapest look at every number; where it overflows, the exact check decides.
        if math.isfinite(np.vdot(values, values)):
            return
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if bad.any():
            copy = self._placed.first + (int(bad.argmax()) if row is None else row)
            raise UserError(
                f"environment {self.name}, copy {copy}: nan or infinity in the {what} at step {self._steps} of the run"
            )

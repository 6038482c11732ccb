"""Playing the steps of a rollout."""

from __future__ import annotations

import numpy as np

from lm_trust.control.acting import Sampler
from lm_trust.control.vector import Environments
from lm_trust.control.vector_env import VectorEnvironments
from lm_trust.user_code import working_directory_importable


@working_directory_importable()
def play(environments: Environments | VectorEnvironments, draw: Sampler, steps: int) -> dict[str, np.ndarray]:
    """T steps of B environments.

    Returns:
        Time-major arrays, (T, B, ...): observations; successors, what each action led to, the final observation where
        an episode ended; actions, as drawn; rewards, as the environments gave them; terminated, truncated and valid.
    """
    count = environments.count
    observations = np.empty((steps + 1, count, environments.observation_size), np.float32)
    observations[0] = environments.observations
    actions: np.ndarray | None = None
    rewards = np.empty((steps, count))
    terminated, truncated, valid = (np.empty((steps, count), bool) for _ in range(3))
    finals: list[tuple[int, int, np.ndarray]] = []
    for step in range(steps):
        chosen = draw(observations[step])
        if actions is None:
            actions = np.empty((steps, *chosen.shape), chosen.dtype)
        actions[step] = chosen
        rewards[step], terminated[step], truncated[step], valid[step], final = environments.step(chosen)
        observations[step + 1] = environments.observations
        finals += [(step, row, observation) for row, observation in final.items()]
    successors = observations[1:].copy()
    for step, row, observation in finals:
        successors[step, row] = observation
    return {
        "observations": observations[:-1],
        "successors": successors,
        "actions": actions,
        "rewards": rewards,
        "terminated": terminated,
        "truncated": truncated,
        "valid": valid,
    }

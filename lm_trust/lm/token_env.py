"""The token-level MDP as a `gymnasium.Env`: one sequence, stepped by hand, one token an action.

It pays what the batched rollout pays and ends where that ends (`LanguageTask.pay`), so the two can be shown to agree.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from lm_trust.lm.generation import complete, decode
from lm_trust.lm.rollout import LanguageTask


class TokenEnv(gymnasium.Env):
    """Writes one completion token by token.

    Observation: {"tokens": (L,) prompt and completion ids padded on the right with 0, "length": how many are real}.
    Action: the next token's id. Reward: as `token_mdp` places it, scaled as the task's last rollout was; 0 until the
    last token where every reward scores whole texts. A reward for tokens or steps is asked at each token about the text
    so far, so that the two agree where its numbers do not depend on what comes later.
    `info` holds the prompt and, at the end, the completion's text. `reset(options={"prompt": index})` chooses the
    prompt; otherwise it is drawn with the environment's own generator.

    Args:
        task: gives tokenizer, rewards, training prompts, length limit and its meaning.
        vocabulary: V.
        eos_ids: tokens that end a completion.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, task: LanguageTask, *, vocabulary: int, eos_ids: list[int]) -> None:
        self._task = task
        self._eos_ids = eos_ids
        longest = max(len(ids) for ids in task.training.ids)
        self._width = longest + task.max_new_tokens
        self.observation_space = spaces.Dict(
            {
                "tokens": spaces.Box(0, vocabulary - 1, (self._width,), np.int64),
                "length": spaces.Box(1, self._width, (), np.int64),
            }
        )
        self.action_space = spaces.Discrete(vocabulary)
        self._prompt = 0
        self._completion: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin a completion."""
        super().reset(seed=seed)
        prompts = self._task.training
        chosen = (options or {}).get("prompt")
        self._prompt = int(self.np_random.integers(len(prompts.ids))) if chosen is None else chosen
        self._completion = []
        return self._observation(), {"prompt": prompts.prompts.texts[self._prompt]}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Append a token."""
        self._completion.append(int(action))
        row = torch.tensor([self._prompt])
        prompt = torch.tensor([self._task.training.ids[self._prompt]])
        written = complete(
            torch.ones_like(prompt, dtype=torch.bool),
            prompt,
            torch.tensor([self._completion]),
            eos_ids=self._eos_ids,
        )
        if not written.ended and len(self._completion) < self._task.max_new_tokens:
            return self._observation(), float(self._task.pay_unfinished(row, written)[0, -1]), False, False, {}
        _, paid = self._task.pay(row, written)
        info = {
            "prompt": self._task.training.prompts.texts[self._prompt],
            "completion": decode(self._task.tokenizer, written)[0],
        }
        ends = bool(paid.terminated[0, -1]), bool(paid.truncated[0, -1])
        return self._observation(), float(paid.rewards[0, -1]), *ends, info

    def _observation(self) -> dict[str, Any]:
        ids = self._task.training.ids[self._prompt] + self._completion
        tokens = np.zeros(self._width, np.int64)
        tokens[: len(ids)] = ids
        return {"tokens": tokens, "length": np.array(len(ids), np.int64)}

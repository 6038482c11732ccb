"""The language world as the Trainer sees it: prompts in, completions sampled, scored and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lm_trust.core.batch import Rollout
from lm_trust.core.seeding import make_generator
from lm_trust.lm.evaluation import evaluation_record
from lm_trust.lm.generation import Completions, decode, eos_ids, sample_completions
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.prompts import Prompts, PromptSampler
from lm_trust.lm.rewards import RewardScores, WeightedRewards
from lm_trust.lm.token_mdp import LimitRule, TokenRewards, token_rewards


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their token ids, in the same order."""

    prompts: Prompts
    ids: list[list[int]]


class LanguageTask:
    """B completions of at most T tokens an iteration.

    Args:
        tokenizer: of the policy's model.
        rewards: score whole texts.
        training, heldout: prompts to draw from and prompts to evaluate on.
        batch_size: B.
        samples_per_prompt: consecutive rows that share a prompt.
        max_new_tokens: the length limit.
        at_limit, limit_penalty: see `token_mdp`.
        with_features: whether a critic wants the reference model's hidden states.
        seed: the run's seed.

    Attributes:
        steps: completion tokens so far.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rewards: WeightedRewards,
        *,
        training: PromptSet,
        heldout: PromptSet,
        batch_size: int,
        max_new_tokens: int,
        samples_per_prompt: int = 1,
        at_limit: LimitRule = "terminate",
        limit_penalty: float = 0.0,
        with_features: bool = True,
        seed: int = 0,
    ) -> None:
        self.steps = 0
        self.tokenizer = tokenizer
        self.rewards = rewards
        self.training = training
        self.heldout = heldout
        self.max_new_tokens = max_new_tokens
        self._group_size = samples_per_prompt
        self._at_limit = at_limit
        self._limit_penalty = limit_penalty
        self._with_features = with_features
        self._seed = seed
        self._sampler = PromptSampler(len(training.ids), batch_size // samples_per_prompt, seed)
        self._generator = make_generator(seed, "lm.sampling")

    def collect(self, policy: CausalPolicy) -> Rollout:
        """Sample B completions, score them, and run the reference over them.

        Raises:
            RewardError: a reward failed; the message names it and the sample.
        """
        rows = self._sampler.next().repeat_interleave(self._group_size)
        completions = self.sample(policy, self.training, rows, self._generator)
        scores, placed = self.pay(rows, completions)
        # One pass of the reference serves its distribution and the critic.
        with torch.no_grad(), policy.as_reference():
            states = policy.step_states(completions.observations, final=True)
        self.steps += int(completions.lengths.sum())
        return Rollout(
            observations=completions.observations,
            actions=completions.tokens,
            rewards=placed.rewards,
            terminated=placed.terminated,
            truncated=placed.truncated,
            mask=completions.mask,
            critic_inputs=states[:, :-1] if self._with_features else None,
            next_critic_inputs=states[:, 1:] if self._with_features else None,
            reference=policy.head(states[:, :-1]),
            group_size=self._group_size,
            whole_sequences=True,
            metrics=self._metrics(scores, completions),
        )

    def after_update(self, policy: CausalPolicy, rollout: Rollout) -> None:
        """Nothing in this world learns besides policy and critic."""

    def evaluate(self, policy: CausalPolicy, count: int) -> dict[str, Any]:
        """`count` completions of the held-out prompts, always with the same noise, so that before and after compare."""
        rows = torch.arange(count) % len(self.heldout.ids)
        completions = self.sample(policy, self.heldout, rows, make_generator(self._seed, "lm.evaluation"))
        scores = self.score(self.heldout, rows, completions)
        texts = self.heldout.prompts.select(rows).texts
        return evaluation_record(policy, completions, scores.total, rows, texts, decode(self.tokenizer, completions))

    def sample(self, policy: CausalPolicy, prompts: PromptSet, rows: Tensor, generator: torch.Generator) -> Completions:
        """One completion for each of the prompts' rows."""
        return sample_completions(
            policy,
            [prompts.ids[row] for row in rows.tolist()],
            max_new_tokens=self.max_new_tokens,
            eos_ids=eos_ids(self.tokenizer, policy),
            pad_id=self.tokenizer.pad_token_id,
            generator=generator,
        )

    def pay(self, rows: Tensor, completions: Completions) -> tuple[RewardScores, TokenRewards]:
        """The scores of completions of training prompts, and what each of their tokens is paid."""
        scores = self.score(self.training, rows, completions)
        placed = token_rewards(
            scores.total.float().to(completions.tokens.device),
            completions.lengths,
            completions.ended,
            steps=completions.tokens.shape[1],
            dense_scores=self.dense_scores(rows, completions),
            at_limit=self._at_limit,
            limit_penalty=self._limit_penalty,
        )
        return scores, placed

    def score(self, prompts: PromptSet, rows: Tensor, completions: Completions) -> RewardScores:
        """The rewards of the completions of the prompts' rows."""
        chosen = prompts.prompts.select(rows)
        return self.rewards.score(chosen.texts, decode(self.tokenizer, completions), chosen.fields)

    def dense_scores(self, rows: Tensor, completions: Completions) -> Tensor | None:
        """(B, T + 1) score of the dense rewards after each number of tokens; None where no reward is dense."""
        if not self.rewards.has_dense:
            return None
        lengths = completions.lengths.tolist()
        prefixes = [
            ids[:length]
            for ids, end in zip(completions.tokens.tolist(), lengths, strict=True)
            for length in range(end + 1)
        ]
        chosen = self.training.prompts.select(rows.repeat_interleave(completions.lengths.cpu() + 1))
        texts = self.tokenizer.batch_decode(prefixes, skip_special_tokens=True)
        flat = self.rewards.score(chosen.texts, texts, chosen.fields, dense_only=True).total
        padded = pad_sequence(flat.split([length + 1 for length in lengths]), batch_first=True)
        return padded.float().to(completions.tokens.device)

    def _metrics(self, scores: RewardScores, completions: Completions) -> dict[str, Any]:
        parts = (
            {f"reward/{name}": part.mean().item() for name, part in scores.parts.items()}
            if len(scores.parts) > 1
            else {}
        )
        return {
            "reward_mean": scores.total.mean().item(),
            **parts,
            "completion_length": completions.lengths.double().mean().item(),
            "truncated_fraction": (~completions.ended).double().mean().item(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tokens so far, order of prompts and sampling noise."""
        return {
            "steps": self.steps,
            "prompts": self._sampler.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.steps = state["steps"]
        self._sampler.load_state_dict(state["prompts"])
        self._generator.set_state(state["generator"])

    def close(self) -> None:
        """Nothing is held open."""

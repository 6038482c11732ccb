"""The language world as the Trainer sees it: prompts in, completions sampled, scored and measured."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lm_trust.core.batch import Rollout
from lm_trust.core.processes import all_rows, mean, own_stream, share_of, summed, together
from lm_trust.core.seeding import make_generator
from lm_trust.lm.completion_texts import CompletionTexts
from lm_trust.lm.evaluation import evaluation_record
from lm_trust.lm.generation import Completions, GenerationEngine, decode, eos_ids, sample_completions
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.prompts import Prompts, PromptSampler
from lm_trust.lm.reward_scaling import RewardScaler
from lm_trust.lm.rewards import RewardScores, WeightedRewards
from lm_trust.lm.token_mdp import LimitRule, Payments, TokenRewards, payments, progress, token_rewards


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their token ids, in the same order."""

    prompts: Prompts
    ids: list[list[int]]


class LanguageTask:
    """B completions of at most T tokens an iteration, shared out among the processes by prompts.

    Args:
        tokenizer: of the policy's model.
        rewards: score whole texts.
        training, heldout: prompts to draw from and prompts to evaluate on.
        batch_size: B.
        samples_per_prompt: consecutive rows that share a prompt.
        max_new_tokens: the length limit.
        at_limit, limit_penalty: see `token_mdp`.
        scaling: how the learner sees the rewards; None: as they are.
        with_features: whether a critic wants the reference model's hidden states, and the states' `progress` with them.
        engine: samples what is trained on; everything else is sampled by `sample_completions`.
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
        scaling: RewardScaler | None = None,
        with_features: bool = True,
        engine: GenerationEngine = sample_completions,
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
        self._scaler = scaling or RewardScaler()
        self._batch_size = batch_size
        self._with_features = with_features
        self._engine = engine
        self._seed = seed
        self._sampler = PromptSampler(len(training.ids), batch_size // samples_per_prompt, seed)
        self._generator = make_generator(seed, "lm.sampling")

    def collect(self, policy: CausalPolicy) -> Rollout:
        """Sample B completions, score them, and run the reference over them.

        Raises:
            RewardError: a reward failed; the message names it and the sample.
        """
        if self._scaler.needs_reference:
            self._scaler.observe(self._starting_totals(policy))
        prompts = self._sampler.next()
        rows = prompts[share_of(len(prompts)).slice].repeat_interleave(self._group_size)
        generator = own_stream(self._generator)
        completions, scores, paid = together(lambda: self._sampled(policy, rows, generator, self._engine))
        self._scaler.observe(all_rows(paid.totals))
        placed = self._placed(paid, completions)
        # One pass of the reference serves its distribution and the critic.
        with torch.no_grad(), policy.as_reference():
            states = policy.step_states(completions.observations, final=True)
            size = states.shape[-1]
            if self._with_features:
                # The reference keeps a view of the critic's inputs: the states are held once.
                so_far = progress(placed.rewards, self.max_new_tokens, self._at_limit)
                states = torch.cat([states, so_far.to(states)], -1)
            reference = policy.head(states[:, :-1, :size])
        self.steps += int(summed(completions.lengths.sum()))
        return Rollout(
            observations=completions.observations,
            actions=completions.tokens,
            rewards=placed.rewards,
            terminated=placed.terminated,
            truncated=placed.truncated,
            mask=completions.mask,
            critic_inputs=states[:, :-1] if self._with_features else None,
            next_critic_inputs=states[:, 1:] if self._with_features else None,
            old=None if completions.step_states is None else policy.head(completions.step_states).detach(),
            reference=reference,
            engine_log_prob=completions.engine_log_prob,
            group_size=self._group_size,
            whole_sequences=True,
            metrics=self._metrics(scores, completions),
            samples=self._samples(rows, scores, completions),
        )

    def after_update(self, policy: CausalPolicy, rollout: Rollout) -> None:
        """Nothing in this world learns besides policy and critic."""

    def describe(self, rollout: Rollout, row: int, step: int) -> str:
        """Where a number of a rollout stands, in words: its token, its sample and, in short, its prompt."""
        return f"token {step} of sample {row}, prompt {reprlib.repr(rollout.samples['prompt'][row])}"

    def evaluate(self, policy: CausalPolicy, count: int) -> dict[str, Any]:
        """`count` completions of the held-out prompts, always with the same noise, so that before and after compare."""
        rows = (torch.arange(count) % len(self.heldout.ids))[share_of(count).slice]
        generator = own_stream(make_generator(self._seed, "lm.evaluation"))

        def written() -> tuple[Completions, RewardScores]:
            completions = self.sample(policy, self.heldout, rows, generator)
            return completions, self.score(self.heldout, rows, completions)

        completions, scores = together(written)
        texts = self.heldout.prompts.select(rows).texts
        same = torch.tensor(self.heldout.prompts.firsts())[rows]
        return evaluation_record(policy, completions, scores, same, texts, decode(self.tokenizer, completions))

    def sample(
        self,
        policy: CausalPolicy,
        prompts: PromptSet,
        rows: Tensor,
        generator: torch.Generator,
        engine: GenerationEngine = sample_completions,
    ) -> Completions:
        """One completion for each of the prompts' rows."""
        return engine(
            policy,
            [prompts.ids[row] for row in rows.tolist()],
            max_new_tokens=self.max_new_tokens,
            eos_ids=eos_ids(self.tokenizer, policy),
            pad_id=self.tokenizer.pad_token_id,
            generator=generator,
        )

    def pay(self, rows: Tensor, completions: Completions) -> tuple[RewardScores, TokenRewards]:
        """The scores of completions of training prompts, and what each of their tokens is paid.

        Scaled as the last batch was: what is paid here leaves no trace.
        """
        scores, paid = self._earned(rows, completions)
        return scores, self._placed(paid, completions)

    def pay_unfinished(self, rows: Tensor, completions: Completions) -> Tensor:
        """(B, T) what the tokens of unfinished completions are paid as they are written."""
        texts = self._texts(self.training, rows, completions)
        paid = payments(self.rewards, self._scores(texts, pays=("token", "step")), texts)
        return self._scaler.scale(paid).per_token.float()

    def score(self, prompts: PromptSet, rows: Tensor, completions: Completions) -> RewardScores:
        """The rewards of the completions of the prompts' rows."""
        return self._scores(self._texts(prompts, rows, completions))

    def _starting_totals(self, policy: CausalPolicy) -> Tensor:
        """(B,) totals of completions of the policy that training started from, by a random stream of their own."""
        generator = make_generator(self._seed, "lm.reward_scaling")
        rows = torch.randperm(len(self.training.ids), generator=generator)
        rows = rows[torch.arange(self._batch_size) % len(rows)][share_of(self._batch_size).slice]
        generator = own_stream(generator)
        with policy.as_reference():
            _, _, paid = together(lambda: self._sampled(policy, rows, generator))
        return all_rows(paid.totals)

    def _sampled(
        self,
        policy: CausalPolicy,
        rows: Tensor,
        generator: torch.Generator,
        engine: GenerationEngine = sample_completions,
    ) -> tuple[Completions, RewardScores, Payments]:
        completions = self.sample(policy, self.training, rows, generator, engine)
        return completions, *self._earned(rows, completions)

    def _earned(self, rows: Tensor, completions: Completions) -> tuple[RewardScores, Payments]:
        texts = self._texts(self.training, rows, completions)
        scores = self._scores(texts)
        return scores, payments(self.rewards, scores, texts)

    def _placed(self, paid: Payments, completions: Completions) -> TokenRewards:
        scaled = self._scaler.scale(paid)
        device = completions.tokens.device
        return token_rewards(
            scaled.final.float().to(device),
            completions.lengths,
            completions.ended,
            per_token=scaled.per_token.float().to(device),
            at_limit=self._at_limit,
            limit_penalty=self._limit_penalty,
        )

    def _texts(self, prompts: PromptSet, rows: Tensor, completions: Completions) -> CompletionTexts:
        return CompletionTexts(self.tokenizer, prompts.prompts.select(rows), completions)

    def _scores(self, texts: CompletionTexts, **settings: Any) -> RewardScores:
        return self.rewards.score(
            texts.prompts.texts,
            texts.texts,
            texts.prompts.fields,
            lengths=texts.lengths,
            ended=texts.ended,
            chats=texts.prompts.chat_column,
            tokens=texts.tokens if self.rewards.pays_by("token") else None,
            **settings,
        )

    def _metrics(self, scores: RewardScores, completions: Completions) -> dict[str, Any]:
        return {
            "reward_mean": mean(scores.total),
            **{f"reward/{name}": mean(part) for name, part in scores.parts.items()},
            **self._scaler.metrics(),
            "completion_length": mean(completions.lengths),
            "truncated_fraction": mean(~completions.ended),
        }

    def _samples(self, rows: Tensor, scores: RewardScores, completions: Completions) -> dict[str, list]:
        return {
            "prompt": self.training.prompts.select(rows).texts,
            "completion": decode(self.tokenizer, completions),
            "reward": scores.total.tolist(),
            **{f"reward/{name}": part.tolist() for name, part in scores.parts.items()},
            "tokens": completions.lengths.tolist(),
            "ended": completions.ended.tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tokens so far, order of prompts, sampling noise and the moments of rewards."""
        return {
            "steps": self.steps,
            "prompts": self._sampler.state_dict(),
            "generator": self._generator.get_state(),
            "scaling": self._scaler.state_dict(),
        }

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of the run from that of each process: here they are all the same."""
        return states[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.steps = state["steps"]
        self._sampler.load_state_dict(state["prompts"])
        self._generator.set_state(state["generator"])
        self._scaler.load_state_dict(state["scaling"])

    def close(self) -> None:
        """Nothing is held open."""

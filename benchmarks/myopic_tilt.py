"""What the reward of a dense language job is worth without foresight: the reference, tilted token by token.

    python benchmarks/myopic_tilt.py [--config configs/lm/sentiment_trpo.yaml] [--samples 2]

At each step every likely next token is tried, and its probability multiplied by exp(change of the score / beta): the
best that can be done for a step's own reward at its KL, by who knows that reward exactly and nothing of what follows.
No policy has that knowledge, so this is a mark to hold trained ones against: what lies between it and the limit (the
tilted reference of `lm-trust compare`, which weighs whole completions) is what planning ahead is worth. The KL is exact
at each step, summed along the completion, in nats; the prompts are the held-out ones.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lm_trust.core.seeding import make_generator
from lm_trust.lm.generation import ExponentialRace, complete, eos_ids, greedy_settings, left_pad, seeded
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.rollout import LanguageTask
from lm_trust.training.build import build_world
from lm_trust.training.config_file import load_config

BETAS = (0.5, 0.3, 0.2, 0.17, 0.15, 0.1)
TRIED = 50  # likeliest tokens of a step


class Tilt(LogitsProcessor):
    """Multiplies the probabilities of the likeliest tokens by exp(what each would be paid / beta).

    Attributes:
        kl: (B,) of the tilted distributions to those before, summed over the steps so far.
    """

    def __init__(
        self, task: LanguageTask, rows: Tensor, width: int, ends: list[int], *, temperature: float, beta: float
    ) -> None:
        self._task, self._rows, self._width, self._temperature, self._beta = task, rows, width, temperature, beta
        self._ends = torch.tensor(ends)
        self.kl = torch.zeros(len(rows))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written, log_p = input_ids[:, self._width :], (scores / self._temperature).log_softmax(-1)
        running = ~torch.isin(written, self._ends).any(-1)
        tried = log_p.topk(TRIED).indices[running]
        before = written[running]
        now = self._paid(running, before.unsqueeze(1))
        then = self._paid(running, torch.cat([before.unsqueeze(1).expand(-1, TRIED, -1), tried.unsqueeze(-1)], -1))
        tilted = log_p.clone()
        tilted[running] = tilted[running].scatter_add(-1, tried, (then - now) / self._beta).log_softmax(-1)
        self.kl += (tilted.exp() * (tilted - log_p)).sum(-1)  # 0 where it is not running
        return tilted * self._temperature  # by which they are divided after this

    def _paid(self, running: Tensor, tokens: Tensor) -> Tensor:
        """Scores (b, n) of n texts (b, n, t) for each running row."""
        count = tokens.shape[1]
        prompts = self._task.heldout.prompts.select(self._rows[running].repeat_interleave(count))
        texts = self._task.tokenizer.batch_decode(tokens.flatten(0, 1), skip_special_tokens=True)
        scored = self._task.rewards.score(prompts.texts, texts, prompts.fields, pays=("change",))
        return scored.total.float().view(-1, count)


@torch.no_grad()
def tilted(task: LanguageTask, policy: CausalPolicy, rows: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(B,) rewards and KLs of a completion for each of the held-out prompts' rows."""
    ends, pad = eos_ids(task.tokenizer, policy), task.tokenizer.pad_token_id
    prompts, mask = left_pad([task.heldout.ids[row] for row in rows.tolist()], pad)
    tilt = Tilt(task, rows, prompts.shape[1], ends, temperature=policy.temperature, beta=beta)
    settings = greedy_settings(max_new_tokens=task.max_new_tokens, eos_ids=ends, pad_id=pad)
    with seeded(policy.device, make_generator(0, "benchmark.tilt")) as seed, policy.as_reference():
        sequences = policy.causal_lm.generate(
            input_ids=prompts,
            attention_mask=mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([tilt, ExponentialRace(policy.temperature, seed)]),
        )
    completions = complete(mask, prompts, sequences[:, prompts.shape[1] :], eos_ids=ends)
    return task.score(task.heldout, rows, completions).total, tilt.kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/lm/sentiment_trpo.yaml", help="a language job with dense rewards")
    parser.add_argument("--samples", type=int, default=2, help="completions of each held-out prompt")
    given = parser.parse_args()
    trainer = build_world(load_config(given.config)).trainer
    task: LanguageTask = trainer.task
    if not task.rewards.pays_by("change"):
        raise SystemExit(
            f"{given.config}: none of its rewards is dense, so no single token is paid for what it changes"
        )
    rows = torch.arange(len(task.heldout.ids)).repeat_interleave(given.samples)
    print(f"{len(rows)} completions\n{'beta':>5} {'KL, nats':>9} {'reward':>7} {'standard error':>15}")
    for beta in BETAS:
        rewards, kl = tilted(task, trainer.policy, rows, beta)
        error = (rewards.std() / len(rewards) ** 0.5).item()
        print(f"{beta:>5} {kl.mean().item():>9.2f} {rewards.mean().item():>7.3f} {error:>15.3f}", flush=True)


if __name__ == "__main__":
    main()

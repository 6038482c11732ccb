"""The price of a trust region on language models: Fisher products, the way to a usable step, whole updates.

    python benchmarks/lm_update.py                                            (everything; SmolLM2 takes most of it)
    python benchmarks/lm_update.py --models tiny gpt2 --shapes 16x16+32 --parts products updates
    python benchmarks/lm_update.py --models smollm2-135m --shapes 64x16+48 --repeats 1 --microbatch 16

Each model has LoRA adapters with r=8: GPT-2 124M and a tiny GPT-2 (4 layers, 256 wide, a vocabulary of 2,048) with
random weights from their configurations, SmolLM2-135M with its own. Adapters are a few trust-region steps from their
start, where B = 0 would make half of the work trivial. A shape is sequences x prompt tokens + completion tokens;
completions are sampled from the policy and none ends early. What is compared takes turns on the same rollout, and the
median counts; memory is the process's highest beyond what it held before (Linux, or a CUDA device's own count).

- products: one Fisher product over one policy gradient on the same tokens, those of one microbatch, by each method that
  the policy supports. "the first" also builds what the later ones reuse.
- usable: the gain in the surrogate at the same exact mean step KL, by the share of rows that the Fisher sees, by
  conjugate gradient iterations, with and without a preconditioner, relative to ten plain iterations on all rows; means
  of several batches of one policy, and the least and the most of them. Every direction is scaled, by a search on the
  exact KL over all rows, to the same KL. Its work is in gradients: share x iterations x a product; what the products
  reuse is built by the gradient's own passes. SmolLM2 writes movie reviews, with the advantages of
  configs/lm/sentiment_trpo.yaml; to the others each token is worth a random number of its own, and noise as large.
- updates: a whole TRPO update over PPO-clip's 4 epochs of 2 minibatches and over one plain policy gradient, a forward
  and a backward pass. Updates are as the Trainer calls them: from a scored batch to a moved and measured policy.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from programs.measuring import peak_memory, start_of_memory, synchronize  # beside this file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lm_trust.core import FisherOperator, conjugate_gradient
from lm_trust.core.advantages import masked_whiten
from lm_trust.core.batch import Batch, spread_rows
from lm_trust.core.objective import SurrogateObjective
from lm_trust.core.parameters import assign, flatten, trainable_parameters
from lm_trust.core.preconditioner import gradient_preconditioner
from lm_trust.lm.generation import sample_completions
from lm_trust.lm.loading import attach_adapter, load_policy, prepare_base
from lm_trust.lm.policy import CausalPolicy
from lm_trust.lm.smollm2 import SMOLLM2
from lm_trust.training.build import build_world
from lm_trust.training.config_file import load_config
from lm_trust.updates import TRPO, PPOClip

GPT2 = {"tiny": {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 2048}, "gpt2": {}}
MAX_KL, DAMPING = 0.02, 0.03
WARM_UP_STEPS, WARM_UP_SHAPE = 2, (16, 16, 32)
FRACTIONS, ITERATIONS = (1.0, 0.66, 0.5, 0.25), (1, 2, 3, 4, 10)
PLAIN = {"max_kl": MAX_KL, "damping": DAMPING, "fisher_fraction": 0.25}
PRECONDITIONED = PLAIN | {"cg_iterations": 3, "preconditioner": "gradient"}


def make_policy(
    name: str, device: str = "cpu", autocast: str | None = None, *, rank: int = 8, vocabulary: int | None = None
) -> CausalPolicy:
    """One of the models; of GPT-2s, rank and vocabulary may be others than their own."""
    if name == SMOLLM2:
        return load_policy(name, device=device, autocast=autocast)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {} if vocabulary is None else {"vocab_size": vocabulary}
        base = GPT2LMHeadModel(GPT2Config(**GPT2[name] | size, bos_token_id=0, eos_token_id=0))
    adapted = attach_adapter(prepare_base(base.to(device)), r=rank)
    return CausalPolicy(adapted, autocast=None if autocast is None else getattr(torch, autocast))


def make_batch(policy: CausalPolicy, shape: tuple[int, int, int], seed: int) -> Batch:
    """A rollout of random prompts, scored; a token is worth a number of its own, and noise as large."""
    rows, prompt, steps = shape
    generator = torch.Generator().manual_seed(seed)
    vocabulary = policy.causal_lm.config.vocab_size
    prompts = torch.randint(vocabulary - 1, (rows, prompt), generator=generator).tolist()
    # The end of sequence is a token that these models do not draw, so that no completion ends early.
    completions = sample_completions(
        policy, prompts, max_new_tokens=steps, eos_ids=[vocabulary - 1], pad_id=0, generator=generator
    )
    worth = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(completions.tokens.shape, generator=generator)
    advantages = masked_whiten(worth.to(policy.device)[completions.tokens] + noise.to(policy.device), completions.mask)
    with torch.no_grad():
        old = policy.distribution(completions.observations).detach()
        old_log_prob = old.log_prob(completions.tokens)
    return Batch(completions.observations, completions.tokens, old, old_log_prob, advantages, completions.mask)


def warmed_up(policy: CausalPolicy, shape: tuple[int, int, int]) -> Batch:
    """A batch of the policy after a few steps."""
    update = TRPO(**PRECONDITIONED)
    for seed in range(WARM_UP_STEPS):
        update.step(policy, make_batch(policy, WARM_UP_SHAPE, seed))
    return make_batch(policy, shape, WARM_UP_STEPS)


def sentiment_batches(shape: tuple[int, int, int], batches: int) -> tuple[CausalPolicy, list[Batch]]:
    """SmolLM2 after a few iterations on movie reviews, and batches of it; prompts are as long as they are."""
    rows, _, steps = shape
    settings = {
        "rollout.batch_size": rows,
        "rollout.max_new_tokens": steps,
        "rollout.microbatch_size": rows,
        "model.lora.targets": "null",  # queries and values, as the other models have them
    }
    overrides = [(key, str(value)) for key, value in settings.items()]
    trainer = build_world(load_config("configs/lm/sentiment_trpo.yaml", overrides)).trainer
    for _ in range(WARM_UP_STEPS):
        trainer.iterate()
    return trainer.policy, [trainer.experience().batch for _ in range(batches)]


# Measuring


@dataclass
class Cost:
    """Medians of several calls; MiB is the most that one of them added."""

    seconds: float
    mib: float


def take_turns(programs: dict[str, Callable[[], Any]], repeats: int, reset: Callable[[], Any]) -> dict[str, Cost]:
    """The cost of each program; they take turns, each from where `reset` leaves things."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    mib: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            reset()
            before = start_of_memory()
            synchronize()
            started = time.perf_counter()
            program()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
            mib[name].append(peak_memory() - before)
    return {name: Cost(statistics.median(seconds[name]), max(mib[name])) for name in programs}


def print_costs(costs: dict[str, Cost], title: str, *units: str) -> None:
    """One line a program: its seconds, its peak memory, and its ratio to each of the units among them."""
    print(f"{title:44} {'seconds':>9} {'MiB':>8} " + " ".join(f"{'/ ' + unit:>14}" for unit in units))
    for name, cost in costs.items():
        ratios = " ".join(f"{cost.seconds / costs[unit].seconds:>13.2f}x" for unit in units)
        print(f"  {name:42} {cost.seconds:>9.3f} {cost.mib:>8,.0f} {ratios}", flush=True)


# (a) Fisher products


def product_costs(policy: CausalPolicy, batch: Batch, repeats: int) -> dict[str, Cost]:
    """A gradient, and a Fisher product on the same tokens by each method."""
    parameters = trainable_parameters(policy)
    objective = SurrogateObjective(policy, batch.observations, batch.actions, batch.advantages, mask=batch.mask)
    vector = objective.gradient(parameters)
    programs: dict[str, Callable[[], Any]] = {"gradient": lambda: objective.gradient(parameters)}
    for method in ("gauss_newton", "kl_hessian", "finite_difference"):
        make = Maker(policy, batch, method)
        try:
            make().undamped(vector)
        except RuntimeError:
            continue  # not every policy has every derivative
        programs[f"{method}, the first"] = lambda make=make: make().undamped(vector)
        programs[f"{method}, a later one"] = lambda make=make: make.last.undamped(vector)
    return take_turns(programs, repeats, lambda: None)


class Maker:
    """Makes Fisher operators, and keeps the last."""

    def __init__(self, policy: CausalPolicy, batch: Batch, method: str) -> None:
        self._given = {"policy": policy, "observations": batch.observations, "mask": batch.mask, "method": method}
        self.last: FisherOperator

    def __call__(self) -> FisherOperator:
        self.last = None  # its graph need not be held beside the next one's
        self.last = FisherOperator(**self._given)
        return self.last


# (b) a usable step


class Remembered:
    """An operator whose products with one sequence of vectors are computed once.

    Conjugate gradient of few iterations asks for the first products of one with more.
    """

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        self._operator = operator
        self._products: list[Tensor] = []
        self._next = 0

    def rewind(self) -> Remembered:
        self._next = 0
        return self

    def __call__(self, vector: Tensor) -> Tensor:
        if self._next == len(self._products):
            self._products.append(self._operator(vector))
        self._next += 1
        return self._products[self._next - 1]


class Solved(NamedTuple):
    """How a direction was found."""

    preconditioned: bool
    fraction: float
    iterations: int


def gains(policy: CausalPolicy, batch: Batch, microbatch: int | None) -> dict[Solved, float]:
    """The surrogate's gain at the same exact KL."""
    parameters = trainable_parameters(policy)
    objective = SurrogateObjective(
        policy, batch.observations, batch.actions, batch.advantages, mask=batch.mask, microbatch_size=microbatch
    )
    gradient = objective.gradient(parameters)
    steps = {}
    for fraction in FRACTIONS:
        rows = spread_rows(len(batch), fraction)
        fisher = FisherOperator(policy, batch.observations[rows], mask=batch.mask[rows], microbatch_size=microbatch)
        for preconditioner in (None, gradient_preconditioner(gradient, parameters)):
            products = Remembered(fisher.undamped)
            for iterations in ITERATIONS:
                solved = conjugate_gradient(
                    products.rewind(),
                    gradient,
                    max_iterations=iterations,
                    damping=DAMPING,
                    preconditioner=preconditioner,
                )
                how = Solved(preconditioner is not None, fraction, iterations)
                steps[how] = (2 * MAX_KL / solved.curvature) ** 0.5 * solved.solution
    return {key: gain_at_bound(objective, parameters, step) for key, step in steps.items()}


def gain_at_bound(objective: SurrogateObjective, parameters: list[nn.Parameter], step: Tensor) -> float:
    """The gain where the step, scaled, has an exact mean KL of MAX_KL; the policy is left as it was."""
    theta, scale = flatten(parameters).detach(), 1.0
    try:
        while True:
            assign(parameters, theta + scale * step)
            measured = objective.measure()
            if abs(measured.step_kl / MAX_KL - 1) < 2e-3:
                return measured.gain
            scale *= (MAX_KL / measured.step_kl) ** 0.5  # KL grows with the square of the step
    finally:
        assign(parameters, theta)


def print_gains(found: Sequence[dict[Solved, float]], costs: dict[str, Cost]) -> None:
    """Each share of the full solution's gain, of several batches, and the Fisher work that it takes in gradients."""
    product = costs["gauss_newton, a later one"].seconds / costs["gradient"].seconds
    full = Solved(False, FRACTIONS[0], ITERATIONS[-1])
    print(
        f"gain at equal exact KL, of 10 plain iterations on all rows, mean of {len(found)} batches (least to most) / "
        "Fisher work in gradients"
    )
    print(f"  {'preconditioned':14} {'rows':>5}" + "".join(f"{f'{count} iterations':>28}" for count in ITERATIONS))
    for preconditioned, fraction in itertools.product((False, True), FRACTIONS):
        cells = []
        for iterations in ITERATIONS:
            how, work = Solved(preconditioned, fraction, iterations), fraction * iterations * product
            shares = [gains[how] / gains[full] for gains in found]
            spread = f"({min(shares):.0%} to {max(shares):.0%})"
            cells.append(f"{f'{statistics.mean(shares):.1%} {spread} /{work:5.2f}':>28}")
        print(f"  {'yes' if preconditioned else 'no':14} {fraction:>5.2f}" + "".join(cells), flush=True)


# (c) whole updates


def update_costs(policy: CausalPolicy, batch: Batch, repeats: int, microbatch: int | None) -> dict[str, Cost]:
    """Each rule's update from the same policy and batch."""
    parameters = trainable_parameters(policy)
    theta = flatten(parameters).detach()
    plain = PLAIN | {"microbatch_size": microbatch}
    objective = SurrogateObjective(
        policy, batch.observations, batch.actions, batch.advantages, mask=batch.mask, microbatch_size=microbatch
    )
    rules = {
        "PPO": PPOClip(epochs=4, minibatches=2, microbatch_size=microbatch),
        **{f"TRPO, {count} products on a quarter": TRPO(cg_iterations=count, **plain) for count in (2, 4, 10)},
        "TRPO, 3 preconditioned on a quarter": TRPO(**PRECONDITIONED, microbatch_size=microbatch),
    }
    if len(batch) <= 16:
        rules["TRPO, 10 products on all rows"] = TRPO(cg_iterations=10, **plain | {"fisher_fraction": 1.0})
    # A rule is kept over the turns, as in training: the line search begins where the last one ended.
    programs: dict[str, Callable[[], Any]] = {"policy gradient": lambda: objective.gradient(parameters)}
    programs |= {name: lambda rule=rule: rule.step(policy, batch) for name, rule in rules.items()}
    return take_turns(programs, repeats, lambda: assign(parameters, theta))


def shape_of(text: str) -> tuple[int, int, int]:
    rows, _, tokens = text.partition("x")
    prompt, _, completion = tokens.partition("+")
    return int(rows), int(prompt), int(completion)


def measure(given: argparse.Namespace) -> Iterator[None]:
    """All tables, one after another."""
    for name in given.models:
        for shape in given.shapes:
            rows, prompt, steps = shape
            print(f"\n{name}, {rows} x ({prompt} + {steps}) tokens", flush=True)
            policy = make_policy(name, given.device, given.autocast)
            batch = warmed_up(policy, shape)
            costs: dict[str, Cost] = {}
            if {"products", "usable"} & set(given.parts):
                costs = product_costs(policy, batch[: given.microbatch or rows], given.repeats)
                print_costs(costs, f"Fisher products, {len(batch[: given.microbatch or rows])} sequences", "gradient")
            if "updates" in given.parts:
                update = update_costs(policy, batch, given.repeats, given.microbatch)
                print_costs(update, "whole updates", "policy gradient", "PPO")
            if "usable" in given.parts:
                if name == SMOLLM2:
                    del policy, batch
                    policy, batches = sentiment_batches(shape, given.batches)
                else:
                    seeds = range(WARM_UP_STEPS + 1, WARM_UP_STEPS + given.batches)
                    batches = [batch, *(make_batch(policy, shape, seed) for seed in seeds)]
                print_gains([gains(policy, batch, given.microbatch) for batch in batches], costs)
            yield


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*GPT2, SMOLLM2], default=[*GPT2, SMOLLM2])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(16, 16, 32), (64, 16, 48)], metavar="BxP+T")
    parser.add_argument("--parts", nargs="+", choices=["products", "usable", "updates"])
    parser.add_argument("--repeats", type=int, default=5, help="turns, of which the median counts")
    parser.add_argument("--batches", type=int, default=3, help="of which the mean gain counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--microbatch", type=int, default=16, help="sequences differentiated at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="what the models compute in")
    given = parser.parse_args(arguments)
    given.parts = given.parts or ["products", "usable", "updates"]
    return given


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    where = (
        torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.machine()}, {given.threads} thread(s)"
    )
    print(f"{where}, torch {torch.__version__}, {given.autocast or 'float32'}, microbatches of {given.microbatch}")
    for _ in measure(given):
        gc.collect()


if __name__ == "__main__":
    main()

"""What `control_speed.py` measures: our trainer, the peers and the bare environments, on the same settings.

    python benchmarks/control_programs.py JOB          (JOB as JSON; prints the result as JSON)

One job is one process: imports and construction, one iteration to warm up, then the training loop, timed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

ALONE_ACTIONS, ALONE_SECONDS = 500, 3.0
PROFILED_ITERATIONS = 8


@dataclass(frozen=True)
class Settings:
    """What both programs are given."""

    environment: str
    rule: str  # ppo or trpo
    minibatch: int = 256
    normalise: bool = False  # observations and rewards
    environments: int = 8
    steps: int = 256  # of each environment an iteration
    hidden: tuple[int, ...] = (64, 64)
    gamma: float = 0.99
    lam: float = 0.95
    epochs: int = 10  # PPO's, and those of TRPO's critic
    learning_rate: float = 3e-4  # PPO's, policy and value; of TRPO's critic 1e-3
    clip: float = 0.2
    max_grad_norm: float = 0.5
    max_kl: float = 0.01  # nats a step
    damping: float = 0.1
    cg_iterations: int = 10
    backtrack_ratio: float = 0.8
    candidates: int = 10  # steps that the line search tries, at most

    @property
    def batch(self) -> int:
        """Steps an iteration."""
        return self.environments * self.steps


def rows(environment: str) -> list[Settings]:
    """What is compared in one environment; 64 is SB3's own minibatch."""
    ppo = Settings(environment, "ppo", normalise=not environment.startswith("CartPole"))
    return [ppo, replace(ppo, minibatch=64), replace(ppo, rule="trpo", learning_rate=1e-3)]


def our_trainer(settings: Settings, backend: str, *, alone: bool = False) -> Any:
    """Our trainer by the package's public path, on both cores as our configs have it, or `alone` in one process."""
    from lm_trust.training.build import build_world
    from lm_trust.training.config import ControlConfig

    fit = {
        "epochs": settings.epochs,
        "minibatches": settings.batch // settings.minibatch,
        "learning_rate": settings.learning_rate,
    }
    ppo = {"kind": "ppo_clip", **fit, "clip": settings.clip, "max_grad_norm": settings.max_grad_norm}
    trpo = {
        "kind": "trpo",
        "max_kl": settings.max_kl,
        "damping": settings.damping,
        "cg_iterations": settings.cg_iterations,
        "backtrack_ratio": settings.backtrack_ratio,
        "max_backtracks": settings.candidates - 1,  # the full step is a candidate too
    }
    # CartPole's step is shorter than a message to another process; envpool has threads.
    shared_out = settings.environment != "CartPole-v1" and backend == "gymnasium" and not alone
    environment = {"id": settings.environment, "count": settings.environments, "backend": backend}
    config = ControlConfig.model_validate(
        {
            "total_steps": 10**9,  # nothing here is annealed
            "environment": {**environment, "processes": 2 if shared_out else 1},
            "policy": {"hidden": list(settings.hidden), "activation": "tanh", "log_std": 0.0},
            "rollout": {"steps": settings.steps},
            "normalise": {"observations": settings.normalise, "rewards": settings.normalise},
            "advantage": {"kind": "gae", "gamma": settings.gamma, "lam": settings.lam, "whiten": True},
            "critic": {"kind": "mlp", "hidden": list(settings.hidden), **fit, "own_process": not alone},
            "update": ppo if settings.rule == "ppo" else trpo,
        }
    )
    trainer = build_world(config).trainer
    if backend not in (*sys.modules, "gymnasium"):
        raise SystemExit(f"environment.backend {backend} was asked for, and {backend} was never imported")
    return trainer


def run_ours(settings: Settings, iterations: int, backend: str) -> float:
    trainer = our_trainer(settings, backend)
    trainer.iterate()
    started = time.perf_counter()
    for _ in range(iterations):
        trainer.iterate()
    return time.perf_counter() - started


def run_peer(settings: Settings, iterations: int) -> float:
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    # Without gymnasium's passive checker, as ours are made.
    environments = make_vec_env(
        settings.environment, settings.environments, seed=0, env_kwargs={"disable_env_checker": True}
    )
    if settings.normalise:
        environments = VecNormalize(environments, norm_obs=True, norm_reward=True, gamma=settings.gamma)
    hidden = list(settings.hidden)
    shared = {
        "n_steps": settings.steps,
        "batch_size": settings.minibatch,
        "learning_rate": settings.learning_rate,
        "gamma": settings.gamma,
        "gae_lambda": settings.lam,
        "policy_kwargs": {"net_arch": {"pi": hidden, "vf": hidden}, "activation_fn": nn.Tanh},
        "seed": 0,
        "device": "cpu",
    }
    if settings.rule == "ppo":
        model = PPO(
            "MlpPolicy",
            environments,
            n_epochs=settings.epochs,
            clip_range=settings.clip,
            max_grad_norm=settings.max_grad_norm,
            ent_coef=0.0,
            **shared,
        )
    else:
        dimensions = math.prod(environments.action_space.shape) or 1
        model = TRPO(
            "MlpPolicy",
            environments,
            n_critic_updates=settings.epochs,
            target_kl=settings.max_kl / dimensions,
            cg_damping=settings.damping,
            cg_max_steps=settings.cg_iterations,
            line_search_shrinking_factor=settings.backtrack_ratio,
            line_search_max_iter=settings.candidates,
            **shared,
        )
    model.learn(settings.batch)
    started = time.perf_counter()
    model.learn(iterations * settings.batch, reset_num_timesteps=False)
    return time.perf_counter() - started


def run_alone(settings: Settings, backend: str) -> float:
    """Steps a second of the bare environments under random actions."""
    import gymnasium
    import numpy as np

    count, draw = settings.environments, np.random.default_rng(0)
    envs = [gymnasium.make(settings.environment, disable_env_checker=True) for _ in range(count)]
    space = envs[0].action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        actions = draw.integers(space.n, size=(ALONE_ACTIONS, count))
    else:
        actions = draw.uniform(space.low, space.high, (ALONE_ACTIONS, count, *space.shape)).astype(space.dtype)
    if backend == "envpool":
        import envpool

        threads = min(count, len(os.sched_getaffinity(0)))  # as our own backend has it
        pool = envpool.make_gymnasium(settings.environment, num_envs=count, num_threads=threads, seed=0)
        pool.reset()
        step = pool.step
    else:
        for seed, env in enumerate(envs):
            env.reset(seed=seed)

        def step(given: np.ndarray) -> None:
            for env, action in zip(envs, given, strict=True):
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()

    steps, seconds, started = 0, 0.0, time.perf_counter()
    while seconds < ALONE_SECONDS:
        for given in actions:
            step(given)
        steps += ALONE_ACTIONS * count
        seconds = time.perf_counter() - started
    return steps / seconds


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement; this process does nothing else."""
    program, settings, backend = job["program"], Settings(**job["settings"]), job.get("backend", "gymnasium")
    if program == "profile":
        from control_profile import profile, update_costs  # beside this file

        trainer = our_trainer(settings, backend, alone=True)
        costs = None
        if settings.rule == "trpo":
            ppo = replace(settings, rule="ppo", learning_rate=3e-4)
            costs = update_costs(trainer, our_trainer(ppo, backend))
        return {"shares": profile(trainer, PROFILED_ITERATIONS), "costs": costs}
    if program == "alone":
        return {"speed": run_alone(settings, backend)}
    iterations = job["iterations"]
    seconds = run_peer(settings, iterations) if program == "peer" else run_ours(settings, iterations, backend)
    return {"seconds": seconds, "speed": iterations * settings.batch / seconds}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))

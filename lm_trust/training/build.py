"""From a configuration to a Trainer: the only place that knows both worlds.

Cheap checks come first: rewards are resolved and prompts read and measured before any model loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lm_trust.training.config import Config, ControlConfig, LanguageConfig
from lm_trust.training.critic import Critic, NoCritic, ValueCritic
from lm_trust.training.trainer import Trainer, UpdateRule
from lm_trust.updates import TRPO, PPOClip, PPOPenalty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lm_trust.lm.policy import CausalPolicy


@dataclass(frozen=True)
class World:
    """A trainer and what a run needs to know of its world.

    Attributes:
        kind: which world.
        trainer: ready for its first iteration.
        save_policy: writes the trained policy into a run folder, `adapter/` or `policy.safetensors`.
        load_policy: reads it back from a run folder.
        step_kl_bound: the update rule's bound in nats per step; None where it has none.
    """

    kind: Literal["language", "control"]
    trainer: Trainer
    save_policy: Callable[[Path], None]
    load_policy: Callable[[Path], None]
    step_kl_bound: float | None


def build_world(config: Config) -> World:
    """Everything that a configuration describes.

    Raises:
        UserError: what it names does not exist or does not fit; the message names the key or file.
    """
    return _control_world(config) if isinstance(config, ControlConfig) else _language_world(config)


def build_tokenizer(config: LanguageConfig) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The model's tokenizer, and how many positions the model has (None: no limit); the model is not loaded.

    Raises:
        UserError: they cannot be loaded.
    """
    from lm_trust.lm.loading import context_length, load_tokenizer

    source = _source(config)
    return load_tokenizer(config.model.path, **source), context_length(config.model.path, **source)


def build_language_policy(config: LanguageConfig) -> CausalPolicy:
    """The policy as training starts from it, on the GPU where there is one; it needs neither prompts nor rewards.

    Raises:
        UserError: the model or its adapter cannot be loaded.
    """
    from lm_trust.lm.loading import load_policy

    return load_policy(
        config.model.path,
        adapter=config.model.adapter,
        r=config.model.lora.r,
        alpha=config.model.lora.alpha,
        targets=config.model.lora.targets,
        temperature=config.rollout.temperature,
        microbatch_size=config.rollout.microbatch_size,
        seed=config.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        **_source(config),
    )


def _language_world(config: LanguageConfig) -> World:
    from lm_trust.lm.loading import load_trained, save_adapter
    from lm_trust.lm.prompts import encode, load_prompts, split_heldout
    from lm_trust.lm.rewards import WeightedRewards
    from lm_trust.lm.rollout import LanguageTask, PromptSet
    from lm_trust.lm.value_head import ValueHead

    rollout = config.rollout
    rewards = WeightedRewards([(reward.name, reward.weight, reward.dense) for reward in config.rewards])
    training = load_prompts(config.prompts.path, field=config.prompts.field)
    if config.prompts.heldout is None:
        training, heldout = split_heldout(training, config.prompts.heldout_fraction, config.seed)
    else:
        heldout = load_prompts(config.prompts.heldout, field=config.prompts.field)
    rewards.check_columns(training.fields)
    rewards.check_columns(heldout.fields)

    tokenizer, context = build_tokenizer(config)
    if config.prompts.max_tokens is not None:
        limit = config.prompts.max_tokens + rollout.max_new_tokens
        context = limit if context is None else min(context, limit)
    training, heldout = (
        PromptSet(prompts, encode(tokenizer, prompts, context=context, max_new_tokens=rollout.max_new_tokens))
        for prompts in (training, heldout)
    )
    policy = build_language_policy(config)
    with_critic = config.critic.kind != "none"
    task = LanguageTask(
        tokenizer,
        rewards,
        training=training,
        heldout=heldout,
        batch_size=rollout.batch_size,
        max_new_tokens=rollout.max_new_tokens,
        samples_per_prompt=rollout.samples_per_prompt,
        at_limit=rollout.at_limit,
        limit_penalty=rollout.limit_penalty,
        with_features=with_critic,
        seed=config.seed,
    )
    critic: Critic = NoCritic()
    if with_critic:
        size = policy.causal_lm.get_output_embeddings().weight.shape[1]
        network = ValueHead(size, config.critic.hidden, seed=config.seed).to(policy.device)
        critic = ValueCritic(network, seed=config.seed, **_settings(config.critic, "hidden"))
    trainer = Trainer(
        policy,
        task,
        critic,
        _update(
            config,
            microbatch_size=rollout.microbatch_size,
            reference_loss=config.reference.loss,
            reference_budget=config.reference.budget,
        ),
        config.advantage,
        iterations=config.iterations,
        reference_penalty=config.reference.penalty,
        adaptive_penalty=config.reference.adaptive,
    )
    return World(
        "language",
        trainer,
        save_policy=lambda run: save_adapter(policy, run / "adapter"),
        load_policy=lambda run: load_trained(policy, run / "adapter"),
        step_kl_bound=_bound(config),
    )


def _control_world(config: ControlConfig) -> World:
    from lm_trust.control.environments import make_environments
    from lm_trust.control.normaliser import ObservationNormaliser
    from lm_trust.control.policies import MLPPolicy, value_network
    from lm_trust.control.rollout import ControlTask
    from lm_trust.control.saving import load_policy, save_policy
    from lm_trust.core.seeding import make_generator, stream_seed

    environments = make_environments(
        config.environment.id,
        config.environment.count,
        seed=config.seed,
        arguments=config.environment.arguments,
        backend=config.environment.backend,
    )
    normaliser = ObservationNormaliser(environments.observation_size) if config.normalise.observations else None
    policy = MLPPolicy(
        environments.observation_size,
        environments.action_space,
        hidden=config.policy.hidden,
        activation=config.policy.activation,
        log_std=config.policy.log_std,
        normaliser=normaliser,
        generator=make_generator(config.seed, "control.policy"),
    )
    critic: Critic = NoCritic()
    if config.critic.kind != "none":
        network = value_network(
            environments.observation_size,
            hidden=config.critic.hidden,
            activation=config.policy.activation,
            normaliser=normaliser,
            generator=make_generator(config.seed, "control.critic"),
        )
        critic = ValueCritic(network, seed=config.seed, **_settings(config.critic, "hidden"))
    task = ControlTask(
        environments,
        steps=config.rollout.steps,
        gamma=config.advantage.gamma,
        seed=config.seed,
        normalise_observations=config.normalise.observations,
        normalise_rewards=config.normalise.rewards,
        evaluation_environments=lambda count: make_environments(
            config.environment.id,
            count,
            seed=stream_seed(config.seed, "control.evaluation"),
            arguments=config.environment.arguments,
            remember=config.evaluation.videos,
        ),
    )
    steps_an_iteration = config.environment.count * config.rollout.steps
    trainer = Trainer(
        policy,
        task,
        critic,
        _update(config),
        config.advantage,
        iterations=-(-config.total_steps // steps_an_iteration),
    )
    return World(
        "control",
        trainer,
        save_policy=lambda run: save_policy(policy, run / "policy.safetensors"),
        load_policy=lambda run: load_policy(policy, run / "policy.safetensors"),
        step_kl_bound=_bound(config),
    )


def _update(config: Config, **shared: float | int | None) -> UpdateRule:
    settings = _settings(config.update) | shared
    if config.update.kind == "trpo":
        return TRPO(**settings)
    rule = {"ppo_clip": PPOClip, "ppo_penalty": PPOPenalty}[config.update.kind]
    return rule(**settings, seed=config.seed)


def _source(config: LanguageConfig) -> dict:
    return {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}


def _settings(section: object, *without: str) -> dict:
    return section.model_dump(exclude={"kind", *without})


def _bound(config: Config) -> float | None:
    return getattr(config.update, "max_kl", None)

"""From a configuration to a Trainer: the only place that knows both worlds.

Cheap checks come first: rewards are resolved and prompts read and measured before any model loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lm_trust.core.processes import process_count, share_of, together
from lm_trust.errors import UserError
from lm_trust.launching import wants_gpu
from lm_trust.training.build_update import build_update
from lm_trust.training.config import Config, ControlConfig, LanguageConfig
from lm_trust.training.critic import Critic, NoCritic, ValueCritic
from lm_trust.training.critic_process import CriticProcess
from lm_trust.training.sequence_critic import SequenceCritic
from lm_trust.training.trainer import Trainer
from lm_trust.training.wrappers import sharding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lm_trust.lm.policy import CausalPolicy
    from lm_trust.lm.prompts import Prompts
    from lm_trust.lm.rows import BadRows


@dataclass(frozen=True)
class World:
    """A trainer and what a run needs to know of its world.

    Attributes:
        kind: which world.
        trainer: ready for its first iteration.
        policy_name: what the trained policy is called in a run folder: adapter, model or policy.safetensors.
        save_policy: writes it into a run folder.
        load_policy: reads it back from a run folder.
        step_kl_bound: the update rule's bound in nats per step, at first where it is annealed; None where it has none.
    """

    kind: Literal["language", "control"]
    trainer: Trainer
    policy_name: str
    save_policy: Callable[[Path], None]
    load_policy: Callable[[Path], None]
    step_kl_bound: float | None


def build_world(config: Config) -> World:
    """Everything that a configuration describes, in every process of the run.

    Raises:
        UserError: what it names does not exist or does not fit; the message names the key or file.
    """
    _check_processes(config)
    build = _control_world if isinstance(config, ControlConfig) else _language_world
    return together(lambda: build(config))


def _check_processes(config: Config) -> None:
    """Each process needs something to do.

    Raises:
        UserError: there are more processes than rows to share out.
    """
    if isinstance(config, ControlConfig):
        shared = {"environment.count": (config.environment.count, "environments")}
    else:
        rows, samples = config.rollout.batch_size, config.rollout.samples_per_prompt
        shared = {
            "rollout.batch_size": (rows // samples, "completions" if samples == 1 else f"prompts of {samples} samples"),
            "evaluation.count": (config.evaluation.count, "completions"),
        }
    for key, (count, what) in shared.items():
        if count < process_count():
            raise UserError(f"{key}: {count} {what} cannot be shared out among {process_count()} processes; raise it")


def build_tokenizer(config: LanguageConfig) -> tuple[PreTrainedTokenizerBase, int | None, int | None]:
    """The model's tokenizer, its positions to sample in and how many tokens it knows (None: it does not say).

    The model is not loaded.

    Raises:
        UserError: they cannot be loaded.
    """
    from lm_trust.lm.loading import load_text_config, load_tokenizer, sampling_length, vocabulary_size

    path, source = config.model.path, _source(config)
    tokenizer, model_config = load_tokenizer(path, **source), load_text_config(path, **source)
    return tokenizer, sampling_length(model_config), vocabulary_size(model_config)


def build_language_policy(config: LanguageConfig) -> CausalPolicy:
    """The policy as training starts from it, on the GPU where there is one; it needs neither prompts nor rewards.

    Raises:
        UserError: the model or its adapter cannot be loaded.
    """
    from lm_trust.lm.loading import load_policy

    lora = {"r": None} if config.model.lora is None else config.model.lora.model_dump()
    return load_policy(
        config.model.path,
        adapter=config.model.adapter,
        **lora,
        autocast=config.model.autocast,
        gradient_checkpointing=config.model.gradient_checkpointing,
        sharding=sharding(),
        temperature=config.rollout.temperature,
        microbatch_size=config.rollout.microbatch_size,
        seed=config.seed,
        device=_device(),
        **_source(config),
    )


def _language_world(config: LanguageConfig) -> World:
    from lm_trust.lm.encoding import encode
    from lm_trust.lm.engines import check_engine, load_engine
    from lm_trust.lm.reward_scaling import RewardScaler
    from lm_trust.lm.rollout import LanguageTask, PromptSet
    from lm_trust.lm.rows import BadRows
    from lm_trust.lm.saving import load_trained, save_trained, trained_name
    from lm_trust.lm.value_model import common_context
    from lm_trust.training.reward_building import build_rewards

    rollout = config.rollout
    engine = load_engine(rollout.engine)
    rewards = build_rewards(config.rewards, device=_device())
    bad = BadRows(getattr(config.prompts, "on_bad_row", "error"))
    of_model = cache(lambda: build_tokenizer(config))
    training, heldout = _prompts(config, bad, lambda: of_model()[0])
    rewards.check_columns(training.fields)
    rewards.check_columns(heldout.fields)

    tokenizer, context, vocabulary = of_model()
    if config.critic.kind == "model" and config.critic.path is not None:
        context = common_context(tokenizer=tokenizer, context=context, **_critic_source(config))
    limits = {
        "context": context,
        "max_new_tokens": rollout.max_new_tokens,
        "vocabulary": vocabulary,
        "max_tokens": config.prompts.max_tokens,
        "truncate": getattr(config.prompts, "truncate", None),
    }
    training, heldout = (PromptSet(*encode(tokenizer, side, **limits, bad=bad)) for side in (training, heldout))
    bad.print_report()
    rewards.load()
    policy = build_language_policy(config)
    check_engine(rollout.engine, policy)
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
        scaling=RewardScaler(**_settings(config.reward_scaling)),
        with_features=config.critic.kind == "reference_head",
        engine=engine,
        seed=config.seed,
    )
    trainer = Trainer(
        policy,
        task,
        _language_critic(config, policy),
        build_update(config),
        config.advantage,
        iterations=config.iterations,
        reference_penalty=config.reference.penalty,
        adaptive_penalty=config.reference.adaptive,
        mismatch=rollout.mismatch,
    )
    return World(
        "language",
        trainer,
        policy_name=trained_name(policy),
        save_policy=lambda run: save_trained(policy, tokenizer, run),
        load_policy=lambda run: load_trained(policy, run / trained_name(policy)),
        step_kl_bound=_bound(config),
    )


def _language_critic(config: LanguageConfig, policy: CausalPolicy) -> Critic:
    from lm_trust.lm.token_mdp import PROGRESS_SIZE
    from lm_trust.lm.value_head import ValueHead
    from lm_trust.lm.value_model import adapter_critic, model_critic

    section = config.critic
    if section.kind == "none":
        return NoCritic()
    if section.kind == "reference_head":
        size = policy.causal_lm.get_output_embeddings().weight.shape[1]
        head = ValueHead(size, section.hidden, progress=PROGRESS_SIZE, seed=config.seed).to(policy.device)
        return ValueCritic(head, seed=config.seed, **_settings(section, "hidden"))
    microbatch_size = config.rollout.microbatch_size
    lora = {"r": section.r, "alpha": section.alpha, "targets": section.targets, "seed": config.seed}
    if section.kind == "adapter":
        network = adapter_critic(policy, **lora)
    else:
        network = model_critic(
            **_critic_source(config),
            **lora,
            microbatch_size=microbatch_size,
            autocast=config.model.autocast,
            gradient_checkpointing=config.model.gradient_checkpointing,
            sharding=sharding(),
            device=policy.device,
        )
    return SequenceCritic(
        network,
        microbatch_size=microbatch_size,
        seed=config.seed,
        **_settings(section, "r", "alpha", "targets", "path", "revision"),
    )


def _prompts(
    config: LanguageConfig, bad: BadRows, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> tuple[Prompts, Prompts]:
    """(training, held out), not yet encoded; the tokenizer is asked for where cut prompts are split."""
    from lm_trust.lm.encoding import cut
    from lm_trust.lm.prompts import load_prompts, split_heldout
    from lm_trust.lm.reasoning import load_reasoning

    section = config.prompts
    if section.kind == "reasoning_gym":
        return load_reasoning(**_settings(section, "max_tokens"), seed=config.seed)
    how = {"field": section.field, "chat": section.chat, "bad": bad}
    training = load_prompts(section.path, subset=section.subset, split=section.split, **how)
    if section.heldout is None:
        # Different texts may be the same once they are cut.
        seen = None if section.truncate is None else cut(tokenizer(), training, section.truncate)
        return split_heldout(training, section.heldout_fraction, config.seed, seen=seen)
    part = {"subset": section.heldout_subset, "split": section.heldout_split}
    return training, load_prompts(section.heldout, **part, heldout=True, **how)


def _control_world(config: ControlConfig) -> World:
    from lm_trust.control.environments import make_environments
    from lm_trust.control.normaliser import ObservationNormaliser
    from lm_trust.control.policies import MLPPolicy, value_network
    from lm_trust.control.rollout import ControlTask
    from lm_trust.control.saving import load_policy, save_policy
    from lm_trust.core.seeding import make_generator, stream_seed

    placed = share_of(config.environment.count)
    environments = make_environments(
        config.environment.id,
        placed.count,
        seed=config.seed,
        arguments=config.environment.arguments,
        processes=min(config.environment.processes, placed.count),
        backend=config.environment.backend,
        placed=placed,
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
        critic = ValueCritic(network, seed=config.seed, **_settings(config.critic, "hidden", "own_process"))
        if config.critic.own_process and process_count() == 1:  # its child is no member of the group of processes
            critic = CriticProcess(critic)
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
    trainer = Trainer(
        policy,
        task,
        critic,
        build_update(config),
        config.advantage,
        iterations=config.iterations,
    )
    return World(
        "control",
        trainer,
        policy_name="policy.safetensors",
        save_policy=lambda run: save_policy(policy, run / "policy.safetensors"),
        load_policy=lambda run: load_policy(policy, run / "policy.safetensors"),
        step_kl_bound=_bound(config),
    )


def _device() -> str:
    return "cuda" if wants_gpu() else "cpu"


def _source(config: LanguageConfig) -> dict:
    return {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}


def _critic_source(config: LanguageConfig) -> dict:
    """Where a critic's own model is loaded from."""
    model = config.critic if config.critic.path is not None else config.model
    return {
        "path": model.path,
        "revision": model.revision,
        "trust_remote_code": config.model.trust_remote_code,
    }


def _settings(section: object, *without: str) -> dict:
    return section.model_dump(exclude={"kind", *without})


def _bound(config: Config) -> float | None:
    return getattr(config.update, "max_kl", None)

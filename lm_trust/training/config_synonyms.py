"""What other libraries call our keys, so that a key of theirs is answered with ours.

The words are those of trl, stable-baselines3, sb3-contrib, CleanRL, peft and datasets.
"""

from __future__ import annotations

_CLIP = ("update.clip",)
_COMPLETION_LENGTH = ("rollout.max_new_tokens",)
_LEARNING_RATE = ("update.learning_rate", "critic.learning_rate", "training.learning_rate")
_SUBSET = ("prompts.subset", "data.subset")
_REFERENCE_PENALTY = ("reference.penalty",)

# Ours are dotted, and in the order in which they are likely to be meant. In a section that has a key called like the
# last part of one of them it is that: `critic.update_epochs` is answered with `critic.epochs`.
SYNONYMS: dict[str, tuple[str, ...]] = {
    # rollouts
    "num_generations": ("rollout.samples_per_prompt",),
    "max_completion_length": _COMPLETION_LENGTH,
    "response_length": _COMPLETION_LENGTH,
    "max_tokens": _COMPLETION_LENGTH,
    "max_prompt_length": ("prompts.max_tokens",),
    "per_device_train_batch_size": ("rollout.batch_size", "training.batch_size"),
    "n_steps": ("rollout.steps",),
    "num_steps": ("rollout.steps",),
    "n_envs": ("environment.count",),
    "num_envs": ("environment.count",),
    "env_id": ("environment.id",),
    "total_timesteps": ("total_steps",),
    "net_arch": ("policy.hidden",),
    # the reference
    "kl_coef": _REFERENCE_PENALTY,
    "init_kl_coef": _REFERENCE_PENALTY,
    "beta": _REFERENCE_PENALTY,
    # advantages
    "lambda": ("advantage.lam",),
    "gae_lambda": ("advantage.lam",),
    "norm_adv": ("advantage.whiten",),
    "normalize_advantage": ("advantage.whiten",),
    # updates
    "lr": _LEARNING_RATE,
    "epsilon": _CLIP,
    "cliprange": _CLIP,
    "clip_range": _CLIP,
    "clip_coef": _CLIP,
    "epsilon_high": ("update.clip_high",),
    "ent_coef": ("update.entropy",),
    "n_epochs": ("update.epochs", "critic.epochs"),
    "num_epochs": ("update.epochs", "critic.epochs", "training.epochs"),
    "num_ppo_epochs": ("update.epochs",),
    "num_iterations": ("update.epochs", "iterations"),
    "update_epochs": ("update.epochs",),
    "num_mini_batches": ("update.minibatches",),
    "num_minibatches": ("update.minibatches",),
    "anneal_lr": ("update.anneal",),
    "delta": ("update.max_kl",),
    "cg_damping": ("update.damping",),
    "cg_max_steps": ("update.cg_iterations",),
    "cg_iters": ("update.cg_iterations",),
    "line_search_shrinking_factor": ("update.backtrack_ratio",),
    "line_search_max_iter": ("update.max_backtracks",),
    "sub_sampling_factor": ("update.fisher_fraction",),
    # critics
    "cliprange_value": ("critic.clip",),
    "clip_range_vf": ("critic.clip",),
    "n_critic_updates": ("critic.epochs",),
    # models and data
    "name_or_path": ("model.path",),
    "model_name_or_path": ("model.path",),
    "rank": ("model.lora.r",),
    "lora_r": ("model.lora.r",),
    "lora_alpha": ("model.lora.alpha",),
    "target_modules": ("model.lora.targets",),
    "lora_target_modules": ("model.lora.targets",),
    "bf16": ("model.autocast",),
    "dataset_name": ("prompts.path", "data.path"),
    "dataset_config": _SUBSET,
    "dataset_config_name": _SUBSET,
    "config_name": _SUBSET,
    "name": (*_SUBSET, "environment.id", "update.kind", "model.path", "output"),
    # supervised stages
    "num_train_epochs": ("training.epochs",),
    "lr_scheduler_type": ("training.scheduler",),
    "output_dir": ("output",),
    "run_name": ("output",),
    "exp_name": ("output",),
    "report_to": ("trackers",),
}
# Of other libraries and papers, what `update.kind` is here.
KINDS: dict[str, str] = {
    "ppo": "ppo_clip",
    "grpo": "ppo_clip with advantage.kind group_relative",
    "dr_grpo": "ppo_clip with advantage {kind: group_relative, scale: false}",
    "dapo": "ppo_clip with update.clip_high and advantage.kind group_relative",
    "rloo": "ppo_clip or trpo with advantage.kind leave_one_out",
    "npg": "natural_gradient",
    "vpg": "reinforce",
    "pg": "reinforce",
    "a2c": "reinforce",
    "troll": "projection",
    "dppo": "divergence_mask",
}
# What would end a completion, or keep it from its end, otherwise than the policy that is scored and measured does.
STOPPING = ("stop", "stop_strings", "stop_sequences", "stop_token", "min_new_tokens", "min_length", "min_tokens")
# What would cut the distribution that completions are drawn from: its KL would be another than the one measured.
TRUNCATED_SAMPLING = ("top_k", "top_p", "min_p")

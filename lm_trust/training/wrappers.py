"""What accelerate is asked to wrap the model in, by the settings that its launcher leaves in the environment: FSDP2.

What was never run with a trust region is refused by name, before anything is loaded.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lm_trust.core.processes import process_count
from lm_trust.errors import UserError
from lm_trust.training.config import Config, LanguageConfig

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin

_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# Of an `fsdp_config`: key, what the environment calls it and holds where it is not set, the one value that is taken.
_FIXED = (
    ("fsdp_version", "FSDP_VERSION", "1", "2"),
    ("fsdp_auto_wrap_policy", "FSDP_AUTO_WRAP_POLICY", "no_wrap", "transformer_based_wrap"),
    ("fsdp_cpu_ram_efficient_loading", "FSDP_CPU_RAM_EFFICIENT_LOADING", "false", "false"),
    ("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", "false", "false"),
    ("fsdp_activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", "false", "false"),
)


def check_wrappers(config: Config) -> None:
    """Refuse what cannot be served.

    Raises:
        UserError: another wrapper than FSDP2, a setting of it, or a key of the config that does not go with it.
    """
    for name, words in _OTHERS.items():
        if _is_set(name):
            raise UserError(f"accelerate's settings ask for {words}, which is not supported; use distributed_type FSDP")
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    for key, name, unset, wanted in _FIXED:
        found = os.environ.get(name, unset).lower()
        if found != wanted:
            also = "; model.gradient_checkpointing does it" if key == "fsdp_activation_checkpointing" else ""
            raise UserError(f"accelerate's {key}: must be {wanted}, got {found}{also}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UserError(f"accelerate's mixed_precision: must be no, got {precision}; model.autocast does it")
    problem = _problem(config)
    if problem is not None:
        raise UserError(f"{problem[0]}: under FSDP {problem[1]}")


def sharding() -> FullyShardedDataParallelPlugin | None:
    """Accelerate's settings, where the model is to be spread over the processes."""
    if not _is_set("ACCELERATE_USE_FSDP") or process_count() == 1:
        return None
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin()


def _problem(config: Config) -> tuple[str, str] | None:
    """(dotted key, message) of what does not go with FSDP."""
    if not isinstance(config, LanguageConfig):
        return "environment", "there is no language model to spread; launch a control run without it"
    if config.model.lora is None and config.model.adapter is None:
        return "model.lora", "only frozen weights are spread, and null trains all of them; train an adapter"
    if config.rollout.engine != "generate":
        return "rollout.engine", f"{config.rollout.engine} does not wait for the other processes; use generate"
    method = getattr(config.update, "fisher_method", None)
    if method in ("gauss_newton", "kl_hessian"):
        return "update.fisher_method", f"{method} cannot differentiate twice; use auto or finite_difference"
    if method is not None and config.model.autocast is not None:
        return "model.autocast", f"{config.update.kind} takes finite differences, which need float32; leave it null"
    return None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"

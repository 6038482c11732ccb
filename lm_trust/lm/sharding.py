"""A language model's frozen weights spread over the processes by FSDP2, for one that outgrows a card.

Only what is frozen is spread: each process holds a slice of every layer, and a layer is put together for as long as it
computes. Adapters stay whole everywhere, as does the vocabulary head, by which scores are computed from hidden states.
So the gradients, the Fisher's products and the line search are those of a run without sharding, and nothing that is
trained or saved is spread. How a layer is found and when it is put away are settings of accelerate's plugin.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import get_module_children_bottom_up
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lm_trust.core.processes import process_count

if TYPE_CHECKING:
    from lm_trust.lm.policy import CausalPolicy


def shard(policy: CausalPolicy, plugin: FullyShardedDataParallelPlugin, device: torch.device | str) -> None:
    """Spread the frozen weights of a policy with an adapter over all processes.

    Args:
        policy: the same in all processes, on the CPU.
        plugin: accelerate's settings, of FSDP2.
        device: where this process computes.
    """
    # The root is the model without its head: scoring and generation both pass through it.
    trunk = policy.causal_lm.base_model
    kept = {*policy.causal_lm.get_output_embeddings().parameters(), *_adapter_parameters(trunk)}
    for parameter in kept:  # what is spread is moved when it is
        parameter.data = parameter.data.to(device)
    plugin.set_auto_wrap_policy(trunk)
    mesh = init_device_mesh(torch.device(device).type, (process_count(),))
    settings = {"mesh": mesh, "ignored_params": kept, "reshard_after_forward": plugin.reshard_after_forward}
    for module in get_module_children_bottom_up(trunk)[:-1]:
        if plugin.auto_wrap_policy(module, recurse=False, nonwrapped_numel=0):
            fully_shard(module, **settings)
    fully_shard(trunk, **settings)
    policy.sharded = True
    # Last hidden states are a view in some models; nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _adapter_parameters(trunk: nn.Module) -> set[nn.Parameter]:
    """Those of all adapters, the reference's and the critic's as well."""
    return {
        parameter
        for layer in trunk.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.adapter_layer_names
        for parameter in getattr(layer, name).parameters()
    }

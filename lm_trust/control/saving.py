"""A control policy on disk: its parameters and its normaliser's statistics in one safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lm_trust.errors import UserError, first_line
from lm_trust.verified_folder import follow_umask, replacing


def save_policy(policy: nn.Module, path: Path) -> None:
    """Write the policy's state, whole or not at all."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}, temporary)
        follow_umask(temporary)


def load_policy(policy: nn.Module, path: Path) -> None:
    """Read the policy's state back.

    Raises:
        UserError: there is no such file, or it is of a policy of other shape.
    """
    try:
        policy.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: the policy could not be loaded: {first_line(error)}") from error

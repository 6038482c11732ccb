"""The critics that see tokens: a language model's last hidden states, by a LoRA adapter of their own, and a head.

The adapter is either a second one on the policy's model, which then holds one copy of the base weights for both, or the
only one on a model of the critic's own. Head and adapter are all that is trained, and neither is part of the policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lm_trust.core.seeding import stream_seed
from lm_trust.errors import UserError
from lm_trust.lm.loading import attach_adapter, load_policy, load_text_config, load_tokenizer, sampling_length
from lm_trust.lm.policy import CausalPolicy, TokenObservations
from lm_trust.lm.value_head import ValueHead

CRITIC_ADAPTER = "critic"


class ValueModel(nn.Module):
    """Maps token observations of B sequences to the values of their states, zero at first.

    Args:
        trunk: a PEFT model with its passes; the policy itself, or a model that only the critic uses.
        adapter: the trunk's adapter that is trained together with the head.
    """

    def __init__(self, trunk: CausalPolicy, adapter: str) -> None:
        super().__init__()
        self.trunk = trunk
        self._adapter = adapter
        output = trunk.causal_lm.get_output_embeddings().weight
        # No hidden layer: what one would learn the adapter can learn as well.
        self.head = ValueHead(output.shape[1], ()).to(output)
        self.eval()

    def forward(self, observations: TokenObservations) -> Tensor:
        """(B, T + 1) values of the states before each token, and of the last one. Only within `active()`."""
        return self.head(self.trunk.step_states(observations, final=True))

    @property
    def sharded(self) -> bool:
        """Whether the trunk is; see `lm_trust.core.passes`."""
        return self.trunk.sharded

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context the trunk computes with the critic's adapter, and that one alone is trainable in it."""
        adapters = self.trunk.model.base_model
        adapters.set_adapter(self._adapter)
        try:
            yield
        finally:
            adapters.set_adapter("default")


def adapter_critic(
    policy: CausalPolicy, *, r: int = 8, alpha: int = 16, targets: list[str] | None = None, seed: int = 0
) -> ValueModel:
    """A value head on the policy's base model with a second adapter, which the policy never computes with.

    Args:
        policy: gets the adapter; its trainable parameters and what it computes stay as they are.
        r, alpha, targets, seed: as for `attach_adapter`.

    Raises:
        UserError: the targets do not exist or include the output head.
    """
    with _named("model.lora.targets", "critic.targets"):
        attach_adapter(
            policy.model, r=r, alpha=alpha, targets=targets, seed=stream_seed(seed, "lm.critic"), name=CRITIC_ADAPTER
        )
    return ValueModel(policy, CRITIC_ADAPTER)


def model_critic(path: str, *, seed: int = 0, **settings: Any) -> ValueModel:
    """A value head on a model that is loaded for the critic, with an adapter on it.

    Args:
        path, seed, settings: as for `load_policy`; r is not None.

    Raises:
        UserError: the model cannot be loaded, or the targets do not exist or include the output head.
    """
    with _named("model.path", "critic.path"), _named("model.lora.targets", "critic.targets"):
        trunk = load_policy(path, seed=stream_seed(seed, "lm.critic"), **settings)
    return ValueModel(trunk, "default")


def common_context(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int | None:
    """How many positions both the policy's and the critic's model have (None: no limit); neither model is loaded.

    Args:
        path, revision, trust_remote_code: the critic's model.
        tokenizer, context: those of the policy's.

    Raises:
        UserError: the critic's model has another tokenizer, so that the policy's token ids mean other texts to it.
    """
    with _named("model.path", "critic.path"):
        source = {"revision": revision, "trust_remote_code": trust_remote_code}
        other = load_tokenizer(path, **source)
        own_context = sampling_length(load_text_config(path, **source))
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"critic.path: the tokenizer of {path!r} is not that of model.path; give a model of the same")
    return min((each for each in (context, own_context) if each is not None), default=None)


@contextmanager
def _named(key: str, critics: str) -> Iterator[None]:
    """Errors about the policy's key are about the critic's here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(key, critics, 1)) from error

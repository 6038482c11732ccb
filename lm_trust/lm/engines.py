"""The generation engines of a rollout, by the names that `rollout.engine` gives them.

Another engine, vLLM for instance, is a module with a function like `sample_completions`, a name here and the same name
in the configuration.
"""

from __future__ import annotations

from transformers.utils.versions import require_version

from lm_trust.errors import UserError, first_line
from lm_trust.lm.generation import GenerationEngine, sample_completions
from lm_trust.lm.policy import CausalPolicy


def load_engine(name: str) -> GenerationEngine:
    """The engine of that name.

    Raises:
        UserError: what it needs is not installed.
    """
    if name == "generate":
        return sample_completions
    if name == "continuous_batching":
        try:
            require_version("transformers>=5.23")  # before it there was no seed, no log-probability or another cache
        except ImportError as error:
            raise UserError(
                f"rollout.engine: continuous_batching needs a newer transformers ({first_line(error)})"
            ) from error
        from lm_trust.lm.continuous_batching import sample_continuously

        return sample_continuously
    raise ValueError(f"no generation engine {name!r}")


def check_engine(name: str, policy: CausalPolicy) -> None:
    """Look, before anything is sampled, whether the engine of that name can run the policy's model.

    Raises:
        UserError: it cannot.
    """
    if name == "continuous_batching":
        from lm_trust.lm.continuous_batching import check_model

        check_model(policy)

"""The head of every critic of language: from hidden states to values.

By itself it is the default critic's network, on the frozen reference model's hidden states: the reference pass has
computed those already, so values cost next to nothing and cannot move the policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm_trust.core.seeding import stream_seed


class ValueHead(nn.Module):
    """Maps hidden states (..., H) to values (...).

    Args:
        size: H.
        hidden: widths of the hidden layers.
        seed: of the initial weights; the caller's generators are left as they were. The last layer starts at zero, so
            that values start at the mean's neighbourhood and not at noise.
    """

    def __init__(self, size: int, hidden: Sequence[int] = (256,), *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(seed, "lm.value_head"))
            # Hidden states of different models differ in scale by orders of magnitude.
            layers: list[nn.Module] = [nn.LayerNorm(size, elementwise_affine=False)]
            for width in hidden:
                layers += [nn.Linear(size, width), nn.Tanh()]
                size = width
            last = nn.Linear(size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, features: Tensor) -> Tensor:
        """Values (...) of hidden states (..., H)."""
        return self.layers(features).squeeze(-1)

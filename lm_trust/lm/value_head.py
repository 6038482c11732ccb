"""The head of every critic of language: from hidden states to values.

By itself it is the default critic's network, on the frozen reference model's hidden states: the reference pass has
computed those already, so values cost next to nothing and cannot move the policy. There it is also told what a state of
the token MDP holds besides its text (`token_mdp.progress`), which a frozen model's states hardly show.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm_trust.core.seeding import stream_seed


class ValueHead(nn.Module):
    """Maps hidden states (..., H), or those and P numbers of each state's progress (..., H + P), to values (...).

    Args:
        size: H.
        hidden: widths of the hidden layers.
        progress: P.
        seed: of the initial weights; the caller's generators are left as they were. The last layer starts at zero, so
            that values start at the mean's neighbourhood and not at noise.
    """

    def __init__(self, size: int, hidden: Sequence[int] = (256,), *, progress: int = 0, seed: int = 0) -> None:
        super().__init__()
        self._size = size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(seed, "lm.value_head"))
            # Hidden states of different models differ in scale by orders of magnitude.
            layers: list[nn.Module] = [nn.LayerNorm(size, elementwise_affine=False)]
            for width in hidden:
                layers += [nn.Linear(size, width), nn.Tanh()]
                size = width
            last = nn.Linear(size, 1)
            # A layer of its own: as two more among hundreds of inputs they would start at a tenth of the weight.
            first_width = hidden[0] if hidden else 1
            self.progress = nn.Linear(progress, first_width, bias=False) if progress else None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if self.progress is not None and not hidden:  # it is a part of the last layer then
            nn.init.zeros_(self.progress.weight)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, features: Tensor) -> Tensor:
        """Values (...) of features (..., H + P)."""
        norm, first, *rest = self.layers
        values = first(norm(features[..., : self._size]))
        if self.progress is not None:
            values = values + self.progress(symlog(features[..., self._size :]))
        for layer in rest:
            values = layer(values)
        return values.squeeze(-1)


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|), near x at small x: takes rewards of any scale (Hafner et al. 2023, eq. 9)."""
    return x.sign() * x.abs().log1p()

"""Small policies of every kind of action in float64, and batches for them, for tests of update rules."""

import copy

import torch
from torch import nn

from lm_trust.core import Categorical, DiagonalGaussian, MultiCategorical
from lm_trust.core.batch import Batch

B, T, D = 8, 5, 3
MASK = torch.arange(T) < torch.tensor([5, 1, 3, 2, 5, 4, 0, 1])[:, None]
SIZES = {"categorical": 4, "multi_categorical": 5, "gaussian": 2}
KINDS, V = list(SIZES), SIZES["categorical"]


class Policy(nn.Module):
    """One of KINDS over D observed numbers, with weights that are all drawn."""

    def __init__(self, kind="categorical", seed=0):
        super().__init__()
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, SIZES[kind]))
        self.log_std = nn.Parameter(torch.zeros(2)) if kind == "gaussian" else None
        fill(self, seed)

    def distribution(self, observations):
        output = self.net(observations)
        if self.kind == "gaussian":
            return DiagonalGaussian(output, self.log_std)
        return Categorical(output) if self.kind == "categorical" else MultiCategorical(output, [2, 3])

    def independent(self, observations):
        """The same by torch.distributions."""
        if self.kind == "multi_categorical":
            raise NotImplementedError(self.kind)
        output = self.net(observations)
        return torch_distribution((output, self.log_std) if self.kind == "gaussian" else output)


class LowRank(nn.Module):
    """A frozen layer plus B A x, with B = 0 as LoRA starts."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.a, self.b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        fill(self)
        self.base.requires_grad_(False)
        nn.init.zeros_(self.b.weight)

    def forward(self, observations):
        return self.base(observations) + self.b(self.a(observations))

    def distribution(self, observations):
        return Categorical(self(observations))


class Records:
    """Observations of a kind of their own: rows can be counted and picked, nothing else."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Records(self.rows[index])


@torch.no_grad()
def fill(module, seed=0, scale=0.6):
    """Draw all of a module's weights, in float64."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def torch_distribution(outputs):
    """torch's own distribution of logits, or of a mean and a log-std."""
    if isinstance(outputs, tuple):
        mean, log_std = outputs
        return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp().expand_as(mean)), 1)
    return torch.distributions.Categorical(logits=outputs)


@torch.no_grad()
def batch_for(policy, *, seed=1, mask=MASK, reference=None, progress=0.0):
    """Actions of the policy with random advantages; the advantages of a masked step are absurd."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    old = policy.distribution(observations).detach()
    actions = old.sample(generator=generator)
    advantages = torch.randn(B, T, generator=generator, dtype=torch.float64)
    return Batch(
        observations=observations,
        actions=actions,
        old=old,
        old_log_prob=old.log_prob(actions),
        advantages=advantages if mask is None else torch.where(mask, advantages, 1e6),
        mask=mask,
        reference=None if reference is None else reference.distribution(observations).detach(),
        progress=progress,
    )


def vector_of(policy):
    """(P,) all parameters."""
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


@torch.no_grad()
def moved(policy, scale, seed=3):
    """A copy of the policy, a random step of each weight away."""
    other, generator = copy.deepcopy(policy), torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return other


@torch.no_grad()
def step_kl(old, new, batch):
    """(N,) exact KL(old || new) at the valid steps."""
    kl = old.distribution(batch.observations).kl(new.distribution(batch.observations))
    return kl.flatten() if batch.mask is None else kl[batch.mask]


@torch.no_grad()
def independent_kl(old, new, batch):
    """The same of a batch with a mask, by torch.distributions."""
    one, other = old.independent(batch.observations), new.independent(batch.observations)
    return torch.distributions.kl_divergence(one, other)[batch.mask]

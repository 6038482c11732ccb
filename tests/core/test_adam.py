"""The functional step against the optimiser's own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_trust.core.adam import adam_step


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_it_is_the_optimisers_own_step(kind):
    networks = []
    for step in (adam_step, lambda optimizer: optimizer.step()):
        generator = torch.Generator().manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(generator=generator)
        network[0].bias.requires_grad_(False)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = kind(trained, lr=0.01, eps=1e-5, betas=(0.8, 0.95), weight_decay=0.1, fused=True)
        for number in range(4):
            optimizer.zero_grad()
            network(torch.randn(5, 3, generator=generator)).square().sum().backward()
            step(optimizer)
            optimizer.param_groups[0]["lr"] *= 0.5
            if number == 1:  # as after a resume
                saved, optimizer = optimizer.state_dict(), kind(trained, fused=True)
                optimizer.load_state_dict(saved)
        networks.append([parameter.detach() for parameter in network.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*networks, strict=True))


def test_a_parameter_whose_first_gradient_comes_late_is_stepped_as_the_optimiser_would():
    networks = []
    for step in (adam_step, lambda optimizer: optimizer.step()):
        generator = torch.Generator().manual_seed(0)
        branches = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))
        with torch.no_grad():
            for parameter in branches.parameters():
                parameter.normal_(generator=generator)
        optimizer = torch.optim.Adam(branches.parameters(), lr=0.01, eps=1e-5, fused=True)
        for number in (0, 0, 1, 0, 1):
            optimizer.zero_grad()
            branches[number](torch.randn(5, 3, generator=generator)).square().sum().backward()
            step(optimizer)
        networks.append([parameter.detach() for parameter in branches.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*networks, strict=True))

"""REINFORCE against Adam on advantage * log-probability, written out."""

import pytest
import torch
from tiny_policies import MASK, Policy, batch_for, vector_of

from lm_trust.updates import Reinforce


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_is_one_step_of_adam_on_the_plain_objective(kind, entropy, microbatch_size):
    policy, plain = Policy(kind), Policy(kind)
    batch = batch_for(policy)
    rule = Reinforce(learning_rate=0.01, entropy=entropy, max_grad_norm=None, microbatch_size=microbatch_size)
    report = rule.step(policy, batch)

    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01, eps=1e-5)
    new = plain.independent(batch.observations)
    objective = new.log_prob(batch.actions) * batch.advantages + entropy * new.entropy()
    (-objective[MASK].mean()).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()]).norm().item()
    optimizer.step()
    torch.testing.assert_close(vector_of(policy), vector_of(plain), rtol=0, atol=1e-9)
    assert report.gradient_norm == pytest.approx(norm, rel=1e-9)
    assert report.metrics["gradient_steps"] == 1 and report.accepted


def test_the_first_step_of_ppo_without_a_clip_is_the_same():
    """At the policy that sampled, the ratio's gradient is the log-probability's."""
    from lm_trust.updates import PPOClip

    policy, other = Policy(), Policy()
    batch = batch_for(policy)
    Reinforce(learning_rate=0.01).step(policy, batch)
    PPOClip(learning_rate=0.01, epochs=1, minibatches=1).step(other, batch)
    torch.testing.assert_close(vector_of(policy), vector_of(other), rtol=0, atol=1e-9)

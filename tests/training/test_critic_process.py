"""The critic in a process of its own: the same numbers, bit for bit, as in this one."""

import pytest
import torch

from lm_trust.training.build import build_world
from lm_trust.training.config_file import load_config

OVERRIDES = {"total_steps": "10000", "environment.count": "2", "rollout.steps": "32", "trackers": "[]"}
RULES = {"trpo": {}, "ppo_clip": {"critic.clip": "0.2", "critic.anneal": "true"}}


def trainer(tmp_path, own_process, **settings):
    config = tmp_path / "config.yaml"
    config.write_text(
        "total_steps: 1\nenvironment: {id: CartPole-v1}\nnormalise: {observations: true, rewards: true}\n"
    )
    overrides = {**OVERRIDES, "critic.own_process": str(own_process).lower(), **settings}
    return build_world(load_config(config, list(overrides.items()))).trainer


def numbers(metrics):
    return {key: value for key, value in metrics.items() if "second" not in key}


def parameters(trainer):
    state = trainer.state_dict()
    return state["policy"] + list(state["critic"]["network"].values())


@pytest.mark.parametrize("rule", RULES)
def test_training_is_the_same_bit_for_bit(tmp_path, rule):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child: more of them may add up in another order
    try:
        here, there = (trainer(tmp_path, own, **{"update.kind": rule}, **RULES[rule]) for own in (False, True))
        for _ in range(3):
            assert numbers(here.iterate()) == numbers(there.iterate())
        assert all(map(torch.equal, parameters(here), parameters(there)))
    finally:
        torch.set_num_threads(threads)


def test_a_saved_state_goes_on_exactly(tmp_path):
    first, second = trainer(tmp_path, True), trainer(tmp_path, True)
    first.iterate()
    state = first.state_dict()
    second.load_state_dict(state)
    assert all(map(torch.equal, parameters(first), parameters(second)))
    assert numbers(first.iterate()) == numbers(second.iterate())
    assert all(map(torch.equal, parameters(first), parameters(second)))


def test_a_critic_whose_process_is_gone_is_an_error(tmp_path):
    run = trainer(tmp_path, True)
    run.iterate()
    run.critic._child._process.kill()
    with pytest.raises(RuntimeError, match=r"critic\.own_process: its process is gone"):
        run.iterate()

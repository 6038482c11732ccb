"""From a config to its rule: every kind is built with what its section says, and only real bounds are called bounds."""

import inspect

import pytest

from lm_trust.training.build import build_world
from lm_trust.training.build_update import _RULES, build_update
from lm_trust.training.config import ControlConfig, LanguageConfig
from lm_trust.training.config_errors import variants
from lm_trust.training.config_learning import Update
from lm_trust.updates.adam_rule import AdamRule
from lm_trust.updates.ppo_clip import PPOClip

SECTIONS = variants(Update)
TINY = {"total_steps": 32, "environment": {"id": "CartPole-v1", "count": 2}, "rollout": {"steps": 16}, "trackers": []}


def control(**update):
    return ControlConfig(**TINY, update=update, critic={"kind": "mlp", "hidden": [4], "epochs": 1})


def defaults_of(rule):
    """All keyword defaults that the rule takes, with those of what it hands its settings on to."""
    own = inspect.signature(rule).parameters
    wider = (
        {}
        if "settings" not in own
        else inspect.signature(AdamRule if issubclass(rule, AdamRule) else PPOClip).parameters
    )
    return {name: parameter.default for name, parameter in {**wider, **own}.items()}


def test_every_kind_has_a_rule():
    assert list(SECTIONS) and set(SECTIONS) == set(_RULES)


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_config_and_the_rule_have_the_same_defaults(kind):
    defaults = defaults_of(_RULES[kind])
    for name, field in SECTIONS[kind].model_fields.items():
        if name != "kind":
            assert defaults[name] == field.default, name


def language(**update):
    return LanguageConfig(
        iterations=1,
        model={"path": "x"},
        prompts={"path": "p.jsonl"},
        rewards=[{"name": "vader"}],
        rollout={"microbatch_size": 4, "batch_size": 8},
        reference={"loss": 0.1, "budget": None if update["kind"] == "natural_gradient" else 2.0},
        update=update,
    )


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_kind_is_built_in_both_worlds(kind):
    assert type(build_update(language(kind=kind))) is type(build_update(control(kind=kind))) is _RULES[kind]


@pytest.mark.parametrize("kind", ["trpo", "ppo_clip"])
def test_what_other_sections_say_of_an_update_reaches_the_rule(kind):
    rule = build_update(language(kind=kind))
    assert (rule.microbatch_size, rule.reference_loss, rule.reference_budget) == (4, 0.1, 2.0)


def test_settings_the_discount_and_the_seed_reach_the_rule():
    first = build_update(control(kind="trpo_penalty", coefficient=None).model_copy(update={"seed": 5}))
    assert (first._given, first._gamma) == (None, 0.99)
    other = build_update(control(kind="trpo_penalty", coefficient=2.0))
    assert other._given == 2.0
    assert first.state_dict()["generator"].tolist() != other.state_dict()["generator"].tolist()


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_bound_is_named_where_it_is_promised_and_every_rule_iterates(kind):
    world = build_world(control(kind=kind))
    assert world.step_kl_bound == {"trpo": 0.01, "ppo_trust": 0.015}.get(kind)
    line = world.trainer.iterate()
    assert line["step_kl"] <= (world.step_kl_bound or 1.0)
    assert {"step_kl", "step_kl_max", "surrogate_gain", "predicted_gain", "accepted"} <= line.keys()

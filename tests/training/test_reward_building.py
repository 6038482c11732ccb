"""From a configuration's rewards to their sum: every key arrives, and models wait until they are asked for."""

import pytest
from pydantic import TypeAdapter

import lm_trust.lm.classifier_reward
import lm_trust.lm.human_rating
from lm_trust.errors import UserError
from lm_trust.lm.rewards import RewardPart
from lm_trust.training.config_rewards import FunctionReward, Rewards
from lm_trust.training.reward_building import build_rewards


def build(*sections, device="cpu"):
    return build_rewards(TypeAdapter(Rewards).validate_python(list(sections)), device=device)


def test_every_key_of_a_function_arrives():
    given = {"weight": -2.0, "dense": True, "level": "step", "step_delimiter": ";", "timeout": 3.0, "parallel": 4}
    given |= {"process": True, "memory": 500}
    assert {"kind", "name", *given} == FunctionReward.model_fields.keys()
    rewards = build({"name": "vader"}, {"name": "length", **given})
    assert rewards.parts == {"vader": RewardPart("vader"), "length": RewardPart("length", **given)}


def test_a_wrong_name_is_found_at_once():
    with pytest.raises(UserError, match=r"^rewards\[1\]\.name: importing 'no_such_module'"):
        build({"name": "vader"}, {"name": "no_such_module:f"})


def test_rewards_with_a_model_are_loaded_when_asked_for(monkeypatch):
    asked = []

    def loader(score):
        def load(section, *, key, device):
            asked.append((section.kind, key, device))
            return lambda prompts, completions: [score] * len(completions)

        return load

    monkeypatch.setattr(lm_trust.lm.classifier_reward, "load_classifier", loader(3.0))
    monkeypatch.setattr(lm_trust.lm.human_rating, "load_human_rating", loader(5.0))
    rewards = build(
        {"kind": "classifier", "path": "models/judge-1.0/", "weight": 2.0},
        {"kind": "human_rating", "dense": True},
        {"kind": "classifier", "path": "models/judge-1.0", "name": "strict"},
        {"kind": "human_rating"},
        device="cuda",
    )
    assert rewards.names == ["judge-1.0", "human_rating", "strict", "human_rating_2"]
    assert [part.dense for part in rewards.parts.values()] == [False, True, False, False]
    rewards.check_columns(["answer"])
    assert asked == []
    rewards.load()
    kinds = ["classifier", "human_rating", "classifier", "human_rating"]
    assert asked == [(kind, f"rewards[{index}]", "cuda") for index, kind in enumerate(kinds)]
    assert rewards.score(["p"], ["c"], {"answer": [1]}).total.tolist() == [2 * 3.0 + 5.0 + 3.0 + 5.0]
    assert len(asked) == 4

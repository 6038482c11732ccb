"""The token MDP as a gymnasium environment agrees with the batched rollout: rewards, ends and log-probabilities."""

import warnings

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from lm_trust.lm.generation import eos_ids
from lm_trust.lm.policy import TokenObservations
from lm_trust.lm.reward_scaling import RewardScaler
from lm_trust.lm.rewards import RewardPart
from lm_trust.lm.token_env import TokenEnv

SETTINGS = [
    {"at_limit": "terminate"},
    {"at_limit": "penalise", "limit_penalty": 0.7},
    {"at_limit": "bootstrap"},
]


@pytest.fixture
def environment(tokenizer, lm):
    def make(task=None, **settings):
        return TokenEnv(task or lm.task(tokenizer, **settings), vocabulary=lm.V, eos_ids=[lm.EOS])

    return make


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["at_limit"])
def test_gymnasium_finds_no_fault(environment, settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(environment(**settings), skip_render_check=True)
    # It is not registered, so it has no spec; nothing else may be said of it.
    assert [str(each.message) for each in caught if "spec" not in str(each.message)] == []


def test_an_episode_by_hand(environment, lm, tokenizer):
    env = environment(max_new_tokens=3)
    observation, info = env.reset(options={"prompt": 1})
    prompt = tokenizer(lm.TEXTS[1])["input_ids"]
    assert info == {"prompt": lm.TEXTS[1]}
    assert observation["length"] == len(prompt)
    assert observation["tokens"].tolist() == prompt + [0] * (env.observation_space["tokens"].shape[0] - len(prompt))
    observation, reward, terminated, truncated, info = env.step(5)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    assert observation["tokens"][: observation["length"]].tolist() == [*prompt, 5]
    observation, reward, terminated, truncated, info = env.step(np.int64(lm.EOS))
    assert (terminated, truncated) == (True, False)
    text = lm.completion_text(tokenizer, prompt, [5])
    assert info == {"prompt": lm.TEXTS[1], "completion": text}
    assert reward == pytest.approx(lm.letters([lm.TEXTS[1]], [text], [0.5])[0])
    assert observation["length"] == len(prompt) + 2
    observation, _ = env.reset(options={"prompt": 0})
    assert observation["length"] == len(tokenizer(lm.TEXTS[0])["input_ids"])


def test_an_end_at_the_first_token_is_paid_for_an_empty_text(environment, lm):
    env = environment(at_limit="bootstrap")
    env.reset(options={"prompt": 2})
    _, reward, terminated, truncated, info = env.step(lm.EOS)
    assert (terminated, truncated, info["completion"]) == (True, False, "")
    assert reward == pytest.approx(lm.letters([lm.TEXTS[2]], [""], [1.0])[0])


def test_prompts_are_drawn_by_the_environments_own_seed(environment):
    env = environment()

    def prompts(seed):
        return [env.reset(seed=seed)[1]["prompt"], *(env.reset()[1]["prompt"] for _ in range(20))]

    assert prompts(3) == prompts(3)
    assert len(set(prompts(3))) == 4


def closeness(prompts, completions, **_):
    """Changes with every word, and is not zero without one."""
    return [0.3 + 0.05 * len(completion) ** 1.5 for completion in completions]


def lengths_and_places(completion_tokens, **_):
    """A number a token, from that token and its place."""
    return [[0.1 * len(token) + 0.01 * place for place, token in enumerate(tokens)] for tokens in completion_tokens]


def step_sizes(steps, **_):
    """A number a step, from that step and its place."""
    return [[0.3 * len(step) - place for place, step in enumerate(each)] for each in steps]


# " " ends a step: the tiny tokenizer writes one between words.
PARTS = {
    "at the end": [],
    "dense": [(closeness, -0.5, True)],
    "token": [RewardPart(lengths_and_places, 0.7, level="token")],
    "step": [RewardPart(step_sizes, 1.3, level="step", step_delimiter=" ")],
    "all": [
        (closeness, -0.5, True),
        RewardPart("length", 0.1, dense=True),
        RewardPart("missing_eos", 0.4),
        RewardPart(lengths_and_places, 0.7, level="token", parallel=2),
        RewardPart(step_sizes, 1.3, level="step", step_delimiter=" ", timeout=30.0),
    ],
}


SCALINGS = {"unscaled": ("none", None), "running": ("running", None), "reference": ("reference", 0.8)}
SCALINGS["whitened"] = ("whiten", 1.5)
CASES = [
    *(("terminate", parts, "unscaled") for parts in PARTS),
    *(("penalise", "all", "reference"), ("bootstrap", "all", "unscaled")),
    *(("bootstrap", "all", "running"), ("terminate", "all", "whitened")),
]


@pytest.mark.parametrize(("at_limit", "parts", "scaling"), CASES)
def test_stepping_by_hand_gives_the_batched_rollout(make_policy, tokenizer, environment, lm, at_limit, parts, scaling):
    policy = make_policy(temperature=1.5)
    task = lm.task(
        tokenizer,
        rewards=[(lm.letters, 1.0), *PARTS[parts]],
        batch_size=16,
        scaling=RewardScaler(*SCALINGS[scaling]),
        **next(settings for settings in SETTINGS if settings["at_limit"] == at_limit),
    )
    rollout = task.collect(policy)
    assert rollout.terminated.any()
    assert (rollout.mask.sum(-1) == task.max_new_tokens).any()
    log_probs = policy.distribution(rollout.observations).log_prob(rollout.actions)
    env = TokenEnv(task, vocabulary=lm.V, eos_ids=eos_ids(tokenizer, policy))
    seen = rollout.observations
    for row, length in enumerate(rollout.mask.sum(-1).tolist()):
        prompt = seen.input_ids[row, : seen.prompt_width][seen.attention_mask[row, : seen.prompt_width]].tolist()
        observation, _ = env.reset(options={"prompt": task.training.ids.index(prompt)})
        for step in range(length):
            token = int(rollout.actions[row, step])
            assert one_step_log_prob(policy, observation, token) == pytest.approx(log_probs[row, step].item(), abs=1e-8)
            observation, reward, terminated, truncated, info = env.step(token)
            assert reward == pytest.approx(rollout.rewards[row, step].item(), abs=1e-6)
            assert terminated == rollout.terminated[row, step]
            assert truncated == rollout.truncated[row, step]
        assert terminated or truncated
        assert observation["length"] == len(prompt) + length
        assert not rollout.rewards[row, length:].any()
        assert not (rollout.terminated | rollout.truncated)[row, length:].any()
        assert info["completion"] == lm.completion_text(tokenizer, prompt, rollout.actions[row, :length].tolist())


@torch.no_grad()
def one_step_log_prob(policy, observation, token):
    """The policy's log-probability of a token in the environment's state."""
    ids = torch.from_numpy(observation["tokens"][: observation["length"]])
    written = torch.cat([ids, torch.tensor([token])]).unsqueeze(0)
    state = TokenObservations(written, torch.ones_like(written, dtype=torch.bool), len(ids))
    return policy.distribution(state).log_prob(torch.tensor([[token]])).item()

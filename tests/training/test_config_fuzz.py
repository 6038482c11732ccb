"""Anything at all in a config: it becomes a config that is written and read back equal, or one plain line a problem."""

import copy
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_trust.errors import UserError
from lm_trust.training.config import ControlConfig, LanguageConfig
from lm_trust.training.config_errors import keys_of
from lm_trust.training.config_file import dump, load_config
from lm_trust.training.config_yaml import read_yaml, write_yaml

LANGUAGE = {
    "iterations": 3,
    "model": {"path": "gpt2"},
    "prompts": {"path": "prompts.jsonl"},
    "rewards": [{"name": "vader"}, {"name": "my.module:function", "weight": -1.0}],
}
CONTROL = {"total_steps": 1000, "environment": {"id": "CartPole-v1", "arguments": {"sutton_barto_reward": True}}}
# One of each kind of section at least once; the rest of their keys comes from the defaults.
SECTIONS = [
    LANGUAGE,
    LANGUAGE | {"update": {"kind": "ppo_clip"}, "advantage": {"kind": "returns_to_go"}, "critic": {"kind": "none"}},
    LANGUAGE
    | {"advantage": {"kind": "leave_one_out"}, "rollout": {"samples_per_prompt": 4}, "stop": {"reward": 1.0}}
    | {"reference": {"penalty": 0.1, "adaptive": {"target": 6.0, "horizon": 10000}}},
    LANGUAGE | {"prompts": {"kind": "reasoning_gym", "task": "chain_sum"}, "update": {"kind": "ppo_penalty"}},
    CONTROL,
    CONTROL | {"update": {"kind": "ppo_clip"}, "normalise": {"observations": True}},
]
KEYS = sorted({name for root in (LanguageConfig, ControlConfig) for key in keys_of(root) for name in key})
DOTTED = sorted({".".join(key) for root in (LanguageConfig, ControlConfig) for key in keys_of(root)})

NAMES = st.sampled_from(KEYS) | st.text(max_size=8) | st.sampled_from(["extends", "kind", "0", "<<", "*", "a.b", "\0"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["trpo", "gae", "none", "null", "1e-3", "~", "", "vader", "prompts.jsonl", "../x", "\ud800", 10**30]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def deep(value, times):
    for _ in range(times):
        value = {"a": [value]}
    return value


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """The configs above with every default written out, as mappings; the working directory has their prompts."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "prompts.jsonl").write_text('{"prompt": "The film"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield [read_yaml(dump(load_config(written("base.yaml", tree)))) for tree in SECTIONS]


def written(name, tree):
    with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(write_yaml(tree))
    return name


def places(tree):
    """Every mapping or list of a nested value, with each of its keys."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def mutate(tree, data):
    """The tree with a value replaced, a key removed or a key added, anywhere."""
    holder, key = data.draw(st.sampled_from(list(places(tree))), label="place")
    how = data.draw(st.sampled_from(["replace", "replace", "remove", "add", "deepen"]), label="how")
    if how == "replace":
        holder[key] = data.draw(VALUES)
    elif how == "remove":
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder[data.draw(NAMES)] = data.draw(VALUES)
    elif how == "deepen":
        holder[key] = deep(holder[key], data.draw(st.sampled_from([1, 3, 60])))


def read_or_refused(path, overrides=()):
    """A config, which must be written and read back equal, or None where it is refused in plain lines."""
    try:
        config = load_config(path, overrides)
    except UserError as error:
        lines = str(error).split("\n")
        assert all(line.strip() and line.isprintable() for line in lines), lines
        assert not any(word in str(error) for word in ("pydantic", "Traceback", "https://")), lines
        return None
    again = load_config(written("again.yaml", read_yaml(dump(config))))
    assert dump(again) == dump(config)
    assert repr(again) == repr(config)  # which tells 1 from 1.0, and NaN is like NaN
    return config


def any_config_is_read_or_refused(trees, data):
    tree = copy.deepcopy(data.draw(st.sampled_from(trees)))
    for _ in range(data.draw(st.integers(1, 3))):
        if tree:
            mutate(tree, data)
    overrides = data.draw(
        st.lists(st.tuples(st.sampled_from(DOTTED) | st.text(max_size=8), VALUES.map(as_text)), max_size=2)
    )
    read_or_refused(written("any.yaml", tree), overrides)


def as_text(value):
    return write_yaml(value).strip()


LIKE_A_RUN = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=100, **LIKE_A_RUN)
@given(data=st.data())
def test_any_config_is_read_or_refused(trees, data):
    any_config_is_read_or_refused(trees, data)


@pytest.mark.slow
@settings(max_examples=2000, **LIKE_A_RUN)
@given(data=st.data())
def test_any_config_is_read_or_refused_at_length(trees, data):
    any_config_is_read_or_refused(trees, data)


def test_what_is_changed_by_nothing_is_read(trees):
    """The fuzzing above starts from configs that are good."""
    assert all(read_or_refused(written("any.yaml", tree)) is not None for tree in trees)


@pytest.mark.parametrize(("root", "base"), [(LanguageConfig, LANGUAGE), (ControlConfig, CONTROL)])
def test_every_key_takes_or_refuses_a_value_of_every_type(trees, root, base):
    path = written("bare.yaml", base)
    for key in keys_of(root):
        for text in ("[]", "{a: 1}", "x"):
            read_or_refused(path, [(".".join(key), text)])


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("base", [0, -1], ids=["language", "control"])
def test_a_number_that_is_none_is_refused_wherever_a_number_stands(trees, base, number):
    tree = copy.deepcopy(trees[base])
    numbers = [(holder, key) for holder, key in places(tree) if type(holder[key]) in (int, float)]
    assert len(numbers) > 15
    for holder, key in numbers:
        before, holder[key] = holder[key], number
        assert read_or_refused(written("any.yaml", tree)) is None, key
        holder[key] = before

"""Configs: what is accepted, what is resolved, and that every problem is one line with its key."""

import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import lm_trust
from lm_trust.compare.config import load_comparison
from lm_trust.errors import UserError
from lm_trust.training.config import ControlConfig, LanguageConfig
from lm_trust.training.config_errors import keys_of, variants
from lm_trust.training.config_file import dump, load_config
from lm_trust.training.config_help import key_listing
from lm_trust.training.config_stages import RewardModelConfig, SftConfig
from lm_trust.training.config_synonyms import KINDS, SYNONYMS, TRUNCATED_SAMPLING
from lm_trust.training.config_yaml import YamlTextError, read_yaml, write_yaml

BARE = "vader, length, missing_eos, exact_match"
LANGUAGE = """\
iterations: 3
model: {path: gpt2}
prompts: {path: prompts.jsonl}
rewards: [{name: vader}]
"""
CONTROL = """\
total_steps: 1000
environment: {id: CartPole-v1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The film"}\n')
    (tmp_path / "lm.yaml").write_text(LANGUAGE)
    (tmp_path / "control.yaml").write_text(CONTROL)
    return tmp_path


def write(name, text):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def lm(**overrides):
    """The language config with overrides; `update__max_kl` stands for update.max_kl."""
    return load_config("lm.yaml", [(key.replace("__", "."), value) for key, value in overrides.items()])


def control(**overrides):
    return load_config("control.yaml", [(key.replace("__", "."), value) for key, value in overrides.items()])


def problems(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    return str(caught.value).splitlines()


# ---- worlds and defaults


def test_the_section_present_tells_the_world(folder):
    assert isinstance(lm(), LanguageConfig)
    assert isinstance(control(), ControlConfig)
    assert problems(write("both.yaml", LANGUAGE + CONTROL)) == [
        "both.yaml: both environment (a control run) and model (a language run) are given; keep one"
    ]
    assert problems(write("neither.yaml", "seed: 1\n")) == [
        "neither.yaml: neither environment (a control run) nor model (a language run) is given; add one"
    ]


def test_defaults_are_the_documented_ones(folder):
    config = lm()
    assert (config.seed, config.output, config.iterations) == (0, "runs/lm", 3)
    assert (config.rollout.batch_size, config.rollout.max_new_tokens, config.rollout.at_limit) == (
        64,
        20,
        "terminate",
    )
    assert (config.update.kind, config.update.max_kl, config.update.damping) == ("trpo", 0.01, 0.1)
    assert (config.advantage.kind, config.advantage.gamma, config.advantage.lam) == ("gae", 0.99, 0.95)
    assert (config.critic.kind, config.evaluation.count) == ("reference_head", 64)
    config = control()
    assert (config.critic.kind, config.critic.hidden, config.evaluation.count) == ("mlp", [64, 64], 20)
    assert (config.environment.count, config.rollout.steps) == (8, 256)


def test_estimators_that_compare_completions_have_no_critic_by_default(folder):
    assert lm(advantage__kind="leave_one_out", rollout__samples_per_prompt="4").critic.kind == "none"
    built = LanguageConfig(
        iterations=1,
        model={"path": "gpt2"},
        prompts={"path": "p"},
        rewards=[{"name": "vader"}],
        rollout={"samples_per_prompt": 2},
        advantage={"kind": "group_relative"},
    )
    assert built.critic.kind == "none"


def test_sections_are_frozen(folder):
    with pytest.raises(ValidationError):
        lm().update.max_kl = 1.0


def fields_of(model):
    for name, field in model.model_fields.items():
        sections = variants(field.annotation).values()
        for section in sections:
            yield from fields_of(section)
        if not sections and name != "kind":
            yield name, field


@pytest.mark.parametrize("root", [LanguageConfig, ControlConfig])
def test_every_key_is_listed_with_its_meaning(root):
    listing = key_listing(root).splitlines()
    assert max(map(len, listing)) < 80
    listed = [line.split()[0] for line in listing if line.strip()]
    for name, field in fields_of(root):
        assert field.description, name
        assert name in listed
    assert "  hidden             [64, 64]     widths of the hidden layers" in key_listing(ControlConfig)


def test_what_a_section_is_for_and_what_null_means_are_listed():
    sections = key_listing(LanguageConfig).split("\n\n")
    told = {text.splitlines()[0]: " ".join(text.split()) for text in sections}
    assert "null: all of the model's weights are trained" in told["model.lora"]
    assert "null: the penalty stays as it is" in told["reference.adaptive"]
    assert "End the training early" in told["stop"]
    assert "what is reported stays as it was scored" in told["reward_scaling"]
    assert "what to do about it (Yao et al. 2025)" in told["rollout.mismatch"]
    assert told["rollout"].startswith("rollout batch_size")


def test_names_agree_with_the_modules_that_they_name():
    from lm_trust.core.fisher import METHODS
    from lm_trust.core.trust_region import trust_region_step
    from lm_trust.training.config_learning import Trpo

    methods = Trpo.model_fields["fisher_method"].annotation.__args__
    assert set(methods) == {"auto", *METHODS}
    parameters = inspect.signature(trust_region_step).parameters
    for name, field in Trpo.model_fields.items():
        if name not in ("kind", "anneal"):  # a schedule is the rule's
            assert parameters[name].default == field.default, name


# ---- files


def test_dump_loads_back_equal(folder):
    for config in (
        lm(update__kind="ppo_clip", update__learning_rate="1e-5", prompts__field="'1e-3'", output="'010'"),
        lm(model__lora__targets="['2001-01-01', 'yes', '<<', q_proj]", prompts__field='"é\\n# x"'),
        control(policy__hidden="[]", total_steps="1e6"),
    ):
        assert load_config(write("config.yaml", dump(config))) == config


def test_dump_of_control_reads_like_a_config(folder):
    text = dump(control())
    assert yaml.safe_load(text)["policy"] == {"hidden": [64, 64], "activation": "tanh", "log_std": 0.0}
    assert "hidden: [64, 64]" in text
    assert text.startswith("seed: 0\noutput: runs/control\ntotal_steps: 1000\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("010", 10),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("2001-99-99", "2001-99-99"),
        ("=", "="),
        ("true", True),
        ("", None),
        ("~", None),
        ("a.b:c", "a.b:c"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    read = read_yaml(text)
    assert read == value
    assert type(read) is type(value)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text()
        | st.from_regex(r"[-+.0-9e_]{1,8}"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
)
def test_written_yaml_reads_back_equal(value):
    assert read_yaml(write_yaml(value)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: duplicate key a"),
        ("update: {max_kl: 1, max_kl: 2}\n", "line 1: duplicate key max_kl"),
        ("a: [1\n", "line 2: "),
        ("1: a\n", "line 1: a key must be a name"),
        ("? [a]\n: b\n", "line 1: a key must be a name"),
        ("a: !!python/object:os.system x\n", "line 1: tags"),
        ("a: &x [*x]\n", "line 1: aliases"),
        ("a: \x07\n", "a character that YAML does not allow"),
        ("a: " + "[" * 1500, "nested too deeply"),
        ("a: " + "9" * 5000, "line 1: a number with too many digits"),
        ("a: 1\n---\nb: 2\n", "line 2: "),
    ],
)
def test_bad_yaml_is_one_line_with_its_place(folder, text, words):
    with pytest.raises(YamlTextError):
        read_yaml(text)
    (line,) = problems(write("bad.yaml", text))
    assert line.startswith("bad.yaml: ")
    assert words in line


def test_files_that_cannot_be_configs(folder):
    assert problems("lmm.yaml") == ["no such file: lmm.yaml; did you mean lm.yaml?"]
    assert problems(str(folder)) == [f"{folder}: this is a folder; give a YAML file"]
    (folder / "run").mkdir()
    write("run/config.yaml", "seed: 0\n")
    assert problems("run") == ["run: this is a folder; give a YAML file; a run goes on by --resume"]
    assert problems(write("empty.yaml", "# nothing\n")) == ["empty.yaml: the file is empty"]
    assert problems(write("list.yaml", "- 1\n")) == ["list.yaml: expected `key: value` lines, got a list"]
    (folder / "latin.yaml").write_bytes(b"a: \xff\n")
    assert problems("latin.yaml") == ["latin.yaml: not a text file in UTF-8"]


# ---- extends


def test_extends_merges_sections_and_replaces_the_rest(folder):
    os.mkdir("sub")
    write("base.yaml", LANGUAGE + "update: {max_kl: 0.02, damping: 0.3}\nrollout: {batch_size: 8}\n")
    write(
        "sub/child.yaml",
        "extends: ../base.yaml\nupdate: {damping: 0.5}\ncritic: {hidden: [9]}\nrewards: [{name: a.b:c, weight: 2}]\n",
    )
    config = load_config("sub/child.yaml")
    assert (config.update.max_kl, config.update.damping) == (0.02, 0.5)
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("a.b:c", 2.0)]
    assert config.critic.hidden == [9]
    assert config.rollout.batch_size == 8
    assert config.output == "runs/child"


def test_another_kind_replaces_a_section_whole(folder):
    write("base.yaml", LANGUAGE + "update: {max_kl: 0.02}\n")
    config = load_config(write("ppo.yaml", "extends: base.yaml\nupdate: {kind: ppo_clip, clip: 0.1}\n"))
    assert (config.update.kind, config.update.clip) == ("ppo_clip", 0.1)
    same = load_config(write("same.yaml", "extends: base.yaml\nupdate: {kind: trpo, damping: 0.2}\n"))
    assert (same.update.max_kl, same.update.damping) == (0.02, 0.2)
    config = load_config("ppo.yaml", [("update.kind", "trpo")])
    assert config.update.max_kl == 0.01


def test_extends_names_what_is_wrong_in_the_file_where_it_is(folder):
    write("base.yaml", LANGUAGE + "update: {max_kl: 0}\n")
    write("child.yaml", "extends: base.yaml\nupdate: {dampng: 1}\n")
    assert problems("child.yaml") == [
        "base.yaml: update.max_kl: must be greater than 0, got 0",
        "child.yaml: update.dampng: unknown key; did you mean update.damping?",
    ]
    assert problems(write("lost.yaml", "extends: bse.yaml\n")) == [
        "lost.yaml: extends: no such file: bse.yaml; did you mean base.yaml?"
    ]
    assert problems(write("odd.yaml", "extends: [a]\n")) == [
        "odd.yaml: extends: expected the name of a file, got a list"
    ]


def test_extends_in_a_circle(folder):
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    (line,) = problems("a.yaml")
    assert "circle" in line
    (line,) = problems(write("self.yaml", "extends: ./self.yaml\n"))
    assert "circle" in line


# ---- overrides


def test_overrides_reach_sections_lists_and_negative_numbers(folder):
    config = lm(update__max_kl="2e-2", rewards__0__weight="-2", seed="7", model__lora__targets="[q_proj]")
    assert (config.update.max_kl, config.rewards[0].weight, config.seed) == (0.02, -2.0, 7)
    assert config.rewards[0].name == "vader"
    assert config.model.lora.targets == ["q_proj"]
    assert lm(model__lora__targets="all-linear").model.lora.targets == ["all-linear"]
    assert control(policy__log_std="-0.5").policy.log_std == -0.5
    assert control(policy__hidden="[8]", update="{max_kl: 0.5}").update.max_kl == 0.5
    assert lm(critic__clip="null").critic.clip is None


def test_the_order_of_overrides_matters_only_for_one_key(folder):
    for order in (1, -1):
        pairs = [("update.clip", "0.1"), ("update.kind", "ppo_clip")][::order]
        assert load_config("lm.yaml", pairs).update.clip == 0.1
    assert load_config("lm.yaml", [("seed", "1"), ("seed", "2")]).seed == 2
    assert load_config("lm.yaml", [("update.kind", "ppo_clip"), ("update.kind", "trpo")]).update.kind == "trpo"
    listed = [("rewards", "[{name: a:b}, {name: vader}]"), ("rewards.1.weight", "3")]
    assert load_config("lm.yaml", listed).rewards[1].weight == 3.0


def test_a_control_run_is_told_nothing_of_completions(folder):
    (line,) = problems("control.yaml", ("rollout.top_p", "0.9"))
    assert line.startswith("command line: rollout.top_p: unknown key; did you mean update.top_k? It is of update.kind ")


def test_other_libraries_words_are_answered_with_keys_that_there_are():
    roots = (LanguageConfig, ControlConfig, SftConfig, RewardModelConfig)
    known = {".".join(key) for root in roots for key in keys_of(root)}
    assert {ours for each in SYNONYMS.values() for ours in each} <= known
    assert not known & {f"rollout.{word}" for word in TRUNCATED_SAMPLING}
    # A word that is a key of ours in the same section would never be asked about.
    beside = {f"{ours.rpartition('.')[0]}.{word}".lstrip(".") for word, each in SYNONYMS.items() for ours in each}
    assert not known & beside


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("critic.update_epochs", "critic.update_epochs: unknown key; did you mean critic.epochs?"),
        ("critic.num_minibatches", "critic.num_minibatches: unknown key; did you mean critic.minibatches?"),
        ("critic.target_modules", "critic.target_modules: unknown key; did you mean critic.targets?"),
        ("critic.rank", "critic.rank: unknown key; did you mean critic.r?"),
        ("prompts.name", "prompts.name: unknown key; did you mean prompts.subset?"),
        ("update.name", "update.name: unknown key; did you mean update.kind?"),
        ("run_name", "run_name: unknown key; did you mean output?"),
        (
            "update.cliprange",
            "update.cliprange: unknown key; did you mean update.clip? It is of update.kind ppo_clip, ",
        ),
        ("clip_high", "clip_high: unknown key; did you mean update.clip_high? It is of update.kind ppo_clip, "),
        ("top_p", "top_p: unknown key; completions are drawn from the whole distribution, "),
    ],
)
def test_a_key_of_another_library_is_looked_for_in_its_own_section_first(folder, key, line):
    (found,) = problems("lm.yaml", ("critic", "{kind: adapter}"), (key, "1"))
    assert found.startswith(f"command line: {line}")


def test_another_kinds_key_beside_a_kind_that_is_none(folder):
    lines = problems("lm.yaml", ("update.kind", "[trpo]"), ("lr", "1"))
    assert "command line: lr: unknown key; did you mean update.learning_rate?" in lines


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("update.max_kll", "1", "update.max_kll: unknown key; did you mean update.max_kl?"),
        ("max_kl", "1", "max_kl: unknown key; did you mean update.max_kl?"),
        ("policy.hidden", "[1]", "policy: unknown key here; it belongs to control runs"),
        ("kl_coef", "1", "kl_coef: unknown key; did you mean reference.penalty?"),
        ("update.cg_max_steps", "1", "update.cg_max_steps: unknown key; did you mean update.cg_iterations?"),
        ("model.lora.rank", "1", "model.lora.rank: unknown key; did you mean model.lora.r?"),
        ("num_iterations", "1", "num_iterations: unknown key; did you mean iterations?"),
        (
            "rollout.top_p",
            "0.9",
            "rollout.top_p: unknown key; completions are drawn from the whole distribution, as the KL is measured; see "
            "rollout.temperature",
        ),
        ("rollout.steps", "1", "rollout.steps: unknown key here; it belongs to control runs"),
        ("total_steps", "1", "total_steps: unknown key here; it belongs to control runs"),
        ("seed", "4294967296", "seed: must be at most 4294967295, got 4294967296"),
        (
            "model.path",
            "smolm2-135m",
            "model.path: no model 'smolm2-135m' here; did you mean smollm2-135m? (a hub id is written owner/name)",
        ),
        (
            "model.path",
            "SmolLM2-135M",
            "model.path: no model 'SmolLM2-135M' here; did you mean smollm2-135m? (a hub id is written owner/name)",
        ),
        ("rewards.0.wieght", "1", "rewards.0.wieght: unknown key; did you mean rewards.0.weight?"),
        (
            "model.lora.dropout",
            "0.1",
            "model.lora.dropout: unknown key; the keys of model.lora are r, alpha, targets",
        ),
        ("evaluation.x\ny", "1", "evaluation.'x\\ny': unknown key; the keys of evaluation are every, count"),
        ("update.max_kl", "0", "update.max_kl: must be greater than 0, got 0"),
        ("update.max_kl", "big", "update.max_kl: expected a number, got 'big' (text)"),
        ("update.max_kl", "true", "update.max_kl: expected a number, got true"),
        ("update.max_kl", ".nan", "update.max_kl: expected a finite number, got nan"),
        ("update.max_kl", ".inf", "update.max_kl: expected a finite number, got inf"),
        ("update.fisher_fraction", "1.5", "update.fisher_fraction: must be at most 1, got 1.5"),
        ("update.backtrack_ratio", "1", "update.backtrack_ratio: must be less than 1, got 1"),
        ("iterations", "2.5", "iterations: expected a whole number, got 2.5"),
        ("iterations", "true", "iterations: expected a whole number, got true"),
        ("iterations", "-3", "iterations: must be greater than 0, got -3"),
        ("evaluation.count", "0", "evaluation.count: must be greater than 0, got 0"),
        ("seed", "-1", "seed: must be at least 0, got -1"),
        ("rollout.temperature", "0", "rollout.temperature: must be greater than 0, got 0"),
        ("model.trust_remote_code", "1", "model.trust_remote_code: expected true or false, got 1"),
        ("model.lora", "3", "model.lora: expected a section with keys of its own, got 3"),
        ("model.path", "3", "model.path: expected text, got 3"),
        ("model.path", "''", "model.path: must not be empty"),
        ("rewards", "[]", "rewards: must not be empty"),
        ("rewards", "vader", "rewards: expected a list, got 'vader' (text)"),
        ("rewards.1.weight", "1", "rewards.1: rewards is a list with items 0 to 0"),
        ("rewards.x", "1", "rewards.x: rewards is a list with items 0 to 0"),
        ("seed.x", "1", "seed: expected a whole number, got a section"),
        ("update.kind.x", "1", "update.kind is a single value, not a section with keys of its own"),
        (
            "update.kind",
            "tpro",
            "update.kind: unknown kind 'tpro'; one of trpo, ppo_clip, ppo_penalty, ppo_trust, natural_gradient, "
            "reinforce, trpo_penalty, projection, divergence_mask; did you mean trpo?",
        ),
        (
            "trackers",
            "[tensorbord]",
            "trackers.0: must be one of tensorboard, wandb, trackio, got 'tensorbord'; did you mean tensorboard?",
        ),
        (
            "update.kind",
            "null",
            "update.kind: required but not given: one of trpo, ppo_clip, ppo_penalty, ppo_trust, natural_gradient, "
            "reinforce, trpo_penalty, projection, divergence_mask",
        ),
        ("critic.kind", "mlp", "critic.kind: mlp is for control runs; here: reference_head, adapter, model, none"),
        (
            "update.clip",
            "0.2",
            "update.clip: unknown key of kind trpo; its keys are max_kl, anneal, damping, cg_iterations, "
            "preconditioner, fisher_fraction, fisher_method, backtrack_ratio, max_backtracks, accept_ratio, "
            "holdout_fraction",
        ),
        (
            "rollout.at_limit",
            "boostrap",
            "rollout.at_limit: must be one of terminate, bootstrap, penalise, got 'boostrap'; did you mean bootstrap?",
        ),
        (
            "rewards.0.name",
            "vadr",
            f"rewards.0.name: unknown reward 'vadr'; give {BARE} or a function as package.module:function",
        ),
        (
            "reference.budget",
            "0",
            "reference.budget: must be greater than 0, got 0",
        ),
        ("reference.budget", "far", "reference.budget: expected a number, got 'far' (text)"),
        ("reference.adaptive", "6", "reference.adaptive: expected a section with keys of its own, got 6"),
        (
            "reference.adaptive",
            "{target: 6, horizon: 10000}",
            "reference.penalty: must be greater than 0 with reference.adaptive, which starts from it",
        ),
        (
            "reference.adaptive",
            "{target: 6, horizon: 10000, horizn: 1}",
            "reference.adaptive.horizn: unknown key; did you mean reference.adaptive.horizon?",
        ),
        (
            "reference.adaptive",
            "{target: 6}",
            "reference.adaptive.horizon: required but not given: completions over which a KL 10 % off changes the "
            "penalty by 10 %",
        ),
        (
            "reference.adaptive",
            "{target: -6, horizon: 10000}",
            "reference.adaptive.target: must be greater than 0, got -6",
        ),
        ("extends", "a.yaml", "extends: only a config file can extend another"),
        ("update..max_kl", "1", "--update..max_kl: expected a key such as --update.max_kl"),
        ("update.max_kl", "[1", "update.max_kl: '[1' is not valid YAML: line 1: "),
        ("iterations", "null", "iterations: expected a whole number, got null"),
    ],
)
def test_each_mistake_is_one_line(folder, key, value, line):
    (found,) = problems("lm.yaml", (key, value))
    assert found.startswith(f"command line: {line}")
    assert found == f"command line: {line}" or line.endswith(": ")


def test_all_problems_come_at_once_each_from_its_place(folder):
    write("bad.yaml", "iterations: no\nmodel: {}\nrewards: [{name: vader}, {weight: x}]\nupdate: {max_kl: -1}\n")
    assert problems("bad.yaml", ("update.dampin", "1")) == [
        "bad.yaml: iterations: expected a whole number, got false",
        "bad.yaml: model.path: required but not given: smollm2-135m, a local folder, or a hub id",
        "bad.yaml: prompts: required but not given",
        f"bad.yaml: rewards.1.name: required but not given: {BARE}, or a function as package.module:function",
        "bad.yaml: rewards.1.weight: expected a number, got 'x' (text)",
        "bad.yaml: update.max_kl: must be greater than 0, got -1",
        "command line: update.dampin: unknown key; did you mean update.damping?",
    ]


# ---- settings that do not go together


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            {"update.kind": "ppo_clip", "update.minibatches": "3"},
            "update.minibatches: must divide rollout.batch_size (64), got 3",
        ),
        ({"critic.minibatches": "3"}, "critic.minibatches: must divide rollout.batch_size (64), got 3"),
        (
            {"rollout.samples_per_prompt": "3"},
            "rollout.batch_size: must be divisible by rollout.samples_per_prompt (3), got 64",
        ),
        (
            {"advantage.kind": "leave_one_out"},
            "rollout.samples_per_prompt: must be at least 2 with advantage.kind leave_one_out, got 1",
        ),
        (
            {
                "advantage.kind": "group_relative",
                "critic.kind": "reference_head",
                "rollout.samples_per_prompt": "4",
            },
            "critic.kind: must be none with advantage.kind group_relative, got reference_head",
        ),
        ({"critic.kind": "none"}, "critic.kind: advantage.kind gae needs a critic, got none"),
        (
            {"critic.kind": "model", "critic.revision": "v1"},
            "critic.revision: has no effect without critic.path; the model is model.path's",
        ),
        (
            {"advantage.kind": "returns_to_go", "critic.kind": "none", "rollout.at_limit": "bootstrap"},
            "rollout.at_limit: bootstrap needs a critic, which values the state at the limit",
        ),
        (
            {"rollout.at_limit": "penalise"},
            "rollout.limit_penalty: must be greater than 0 with rollout.at_limit penalise",
        ),
        (
            {"rollout.limit_penalty": "1"},
            "rollout.limit_penalty: has no effect with rollout.at_limit terminate; use penalise",
        ),
        (
            {"prompts.heldout_subset": "main"},
            "prompts.heldout_subset: has no effect without prompts.heldout; name the dataset there, or leave it out",
        ),
        (
            {"prompts.heldout_split": "test_sft"},
            "prompts.heldout_split: has no effect without prompts.heldout; name the dataset there, or leave it out",
        ),
        (
            {"rewards.0.step_delimiter": "'.'", "rewards.0.level": "token"},
            "rewards.0.step_delimiter: has no effect with level token; use step, or leave it out",
        ),
        (
            {"update.kind": "natural_gradient", "reference.budget": "3"},
            "reference.budget: cannot be kept with update.kind natural_gradient, a fixed step; use trpo",
        ),
        (
            {"reference.penalty": "0.1", "reference.adaptive": "{target: 6, horizon: 12}"},
            "reference.adaptive.horizon: must be greater than rollout.batch_size / 5 (12.8), or the penalty would fall "
            "to 0 and below; got 12",
        ),
        (
            {"update.kind": "trpo_penalty", "update.coefficient": "null", "advantage.gamma": "1.0"},
            "update.coefficient: must be given without a discount, where that of the theory is infinite",
        ),
        (
            {
                "update.kind": "trpo_penalty",
                "update.coefficient": "null",
                "advantage.kind": "group_relative",
                "rollout.samples_per_prompt": "4",
            },
            "update.coefficient: must be given without a discount, where that of the theory is infinite",
        ),
        (
            {"update.kind": "trpo", "update.holdout_fraction": "0.001"},
            "update.holdout_fraction: must leave rows on both sides of 64 rows, got 0.001",
        ),
        (
            {"update.kind": "trpo", "update.holdout_fraction": "0.3", "rollout.samples_per_prompt": "4"},
            "update.holdout_fraction: must leave whole prompts on both sides of 64 rows, got 0.3",
        ),
    ],
)
def test_language_settings_must_go_together(folder, overrides, line):
    (found,) = problems("lm.yaml", *overrides.items())
    assert found.partition(": ")[2] == line


def test_an_adapter_to_start_from_says_itself_what_it_is_like(folder):
    os.mkdir("adapter")
    write("adapter/adapter_config.json", "{}")
    given = [("model.adapter", "adapter")]
    for lora in ("{r: 4}", "{alpha: 32}", "{targets: [q_proj]}"):
        assert problems("lm.yaml", *given, ("model.lora", lora)) == [
            "command line: model.lora: has no effect with model.adapter, which has its own rank, scale and targets; "
            "leave it at its defaults"
        ]
    config = load_config("lm.yaml", given)
    assert load_config(write("again.yaml", dump(config))) == config


def test_bootstrap_goes_with_any_critic(folder):
    for kind in ("gae", "returns_to_go"):
        assert lm(advantage__kind=kind, rollout__at_limit="bootstrap").rollout.at_limit == "bootstrap"


def test_a_key_of_another_command_is_told_before_a_likeness(folder):
    assert problems("control.yaml", ("iterations", "5")) == [
        "command line: iterations: unknown key here; it belongs to language runs"
    ]
    write("stage.yaml", "model: {path: gpt2}\ndata: {path: rows.jsonl}\niterations: 3\n")
    with pytest.raises(UserError, match=r"stage\.yaml: iterations: unknown key here; it belongs to language runs"):
        load_config("stage.yaml", root=SftConfig)


def test_a_key_of_no_critic_says_where_no_critic_comes_from(folder):
    write("headed.yaml", LANGUAGE + "critic: {hidden: [9]}\nrollout: {samples_per_prompt: 4}\n")
    assert problems("headed.yaml", ("advantage.kind", "leave_one_out")) == [
        "headed.yaml: critic.hidden: unknown key of kind none, which has no keys; "
        "it is the only one with advantage.kind leave_one_out or group_relative"
    ]
    assert problems("control.yaml", ("critic", "{kind: none, hidden: [9]}")) == [
        "command line: critic.hidden: unknown key of kind none, which has no keys"
    ]


def test_arguments_are_a_section(folder):
    assert problems("control.yaml", ("environment.arguments", "[1]")) == [
        "command line: environment.arguments: expected a section with keys of its own, got a list"
    ]


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("update.kind", "grpo", "did you mean ppo_clip with advantage.kind group_relative?"),
        ("update.kind", "PPO", "did you mean ppo_clip?"),
        ("update.kind", "rloo", "did you mean ppo_clip or trpo with advantage.kind leave_one_out?"),
        ("rollout.stop_strings", "[x]", "a completion ends with the policy's end of sequence or at rollout.max_new_"),
        ("rollout.min_new_tokens", "4", "a completion ends with the policy's end of sequence or at rollout.max_new_"),
    ],
)
def test_what_has_another_name_here_or_is_not_offered_is_answered(folder, key, value, hint):
    (line,) = problems("lm.yaml", (key, value))
    assert hint in line


@pytest.mark.parametrize("ours", KINDS.values())
def test_kinds_of_others_are_answered_with_kinds_that_there_are(folder, ours):
    for kind in ours.partition(" with ")[0].split(" or "):
        assert lm(update__kind=kind).update.kind == kind


def test_a_hub_id_is_no_slip_for_a_folder_of_another_size(folder):
    os.makedirs("owner/model-1B")
    for name in ("gpt2", "distilgpt2", "owner/model-3B", "owner/smolm2-135m"):
        assert lm(model__path=name).model.path == name


def test_a_run_of_a_less_strict_version_can_still_be_looked_at(folder):
    path = write("run.yaml", dump(lm(model__lora__r="64")).replace("adapter: null", "adapter: runs/sft/adapter"))
    with pytest.raises(UserError, match=r"model\.lora: has no effect with model\.adapter"):
        load_config(path, check_files=False)
    assert load_config(path, check_files=False, saved=True).model.lora.r == 64


def test_control_settings_must_go_together(folder):
    given = [("update.kind", "ppo_clip"), ("update.minibatches", "7"), ("environment.count", "2")]
    given += [("rollout.steps", "9"), ("critic.minibatches", "9")]
    assert [line.partition(": ")[2] for line in problems("control.yaml", *given)] == [
        "update.minibatches: must divide environment.count * rollout.steps (18), got 7"
    ]
    (line,) = problems("control.yaml", ("advantage.kind", "group_relative"))
    assert line == "command line: advantage.kind: group_relative is for language runs; here: gae, returns_to_go"
    (line,) = problems(
        "control.yaml", ("update.kind", "trpo_penalty"), ("update.coefficient", "null"), ("advantage.gamma", "1.0")
    )
    assert line.endswith("update.coefficient: must be given without a discount, where that of the theory is infinite")
    (line,) = problems("control.yaml", ("critic.kind", "none"))
    assert line.endswith("critic.kind: advantage.kind gae needs a critic, got none")
    assert control(critic__kind="none", advantage__kind="returns_to_go").critic.kind == "none"


def test_models_built_in_python_are_checked_too():
    with pytest.raises(ValidationError, match=r"critic\.minibatches: must divide"):
        ControlConfig(
            total_steps=1,
            environment={"id": "X", "count": 1},
            rollout={"steps": 3},
            critic={"kind": "mlp", "minibatches": 4},
        )


@pytest.mark.parametrize(("rows", "parts"), [(64, 4), (10, 2), (7, 1), (6, 3), (5, 1), (3, 3), (2, 2), (1, 1)])
def test_a_number_of_minibatches_that_nobody_wrote_divides_the_batch(folder, rows, parts):
    """In the config itself, so that config.yaml says what was used, and says the same when it is read again."""
    config = lm(rollout__batch_size=str(rows), critic__kind="adapter", critic__epochs="1", update__kind="ppo_clip")
    assert config.critic.minibatches == config.update.minibatches == parts
    assert load_config(write("resolved.yaml", dump(config))) == config
    child = write("child.yaml", f"extends: lm.yaml\nrollout: {{batch_size: {rows}}}\ncritic: {{epochs: 1}}\n")
    assert load_config(child).critic.minibatches == parts
    config = control(environment__count=str(rows), rollout__steps="1", update__kind="ppo_trust")
    assert config.critic.minibatches == config.update.minibatches == parts
    built = ControlConfig(total_steps=1, environment={"id": "X", "count": rows}, rollout={"steps": 1})
    assert built.critic.minibatches == parts


def test_a_number_of_minibatches_that_a_parent_file_wrote_was_written(folder):
    write("parent.yaml", LANGUAGE + "critic: {minibatches: 4}\n")
    (line,) = problems(write("child.yaml", "extends: parent.yaml\nrollout: {batch_size: 6}\n"))
    assert line.endswith("critic.minibatches: must divide rollout.batch_size (6), got 4")


def test_the_runs_of_a_comparison_have_minibatches_that_divide_their_batch(folder):
    text = "base: lm.yaml\nshared: {rollout: {batch_size: 6}}\nseeds: [0]\n"
    text += "rules: {trpo: {}, ppo_clip: {update: {kind: ppo_clip}, knob: rollout.batch_size, values: [6, 10]}}\n"
    cells = load_comparison(write("compare.yaml", text)).cells
    found = [(cell.config.critic.minibatches, getattr(cell.config.update, "minibatches", None)) for cell in cells]
    assert found == [(3, None), (3, 3), (2, 2)]


# ---- paths


def test_local_paths_become_absolute_and_names_stay(folder):
    os.makedirs("base/model")
    os.mkdir("adapter")
    write("adapter/adapter_config.json", "{}")
    config = lm(model__path="base/model", model__adapter="adapter", prompts__heldout="./prompts.jsonl", output="'~/x'")
    assert config.model.path == str(folder / "base" / "model")
    assert config.model.adapter == str(folder / "adapter")
    assert config.prompts.path == config.prompts.heldout == str(folder / "prompts.jsonl")
    assert config.output == os.path.expanduser("~/x")
    for name in ("smollm2-135m", "gpt2", "openai-community/gpt2"):
        assert lm(model__path=name).model.path == name
    for name in ("stanfordnlp/imdb", "teknium/OpenHermes-2.5"):  # a version is no suffix
        assert lm(prompts__path=name).prompts.path == name


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("prompts.path", "none.jsonl", "prompts.path: no such file: none.jsonl"),
        (
            "prompts.path",
            "promts.jsonl",
            "prompts.path: no such file: promts.jsonl; did you mean prompts.jsonl?",
        ),
        ("prompts.path", "prompts", "prompts.path: no such file: prompts; did you mean prompts.jsonl?"),
        ("prompts.path", '"a\\0b.jsonl"', "prompts.path: no such file: 'a\\x00b.jsonl'"),
        ("prompts.heldout", "/none.csv", "prompts.heldout: no such file: /none.csv"),
        ("prompts.heldout", "~nobody-here/x.csv", "prompts.heldout: no such file: ~nobody-here/x.csv"),
        ("prompts.path", "x" * 5000 + ".csv", f"prompts.path: no such file: {'x' * 5000}.csv"),
        ("model.path", "./none", "model.path: no such folder: ./none"),
        ("model.path", "a/b/c", "model.path: no such folder: a/b/c"),
        ("model.path", "~/none/at/all", "model.path: no such folder: ~/none/at/all"),
        ("model.path", "prompts.jsonl", "model.path: expected a model's folder, got a file: prompts.jsonl"),
        ("model.path", "my model", "model.path: expected smollm2-135m, a folder or a hub id, got 'my model'"),
        ("model.adapter", "none", "model.adapter: no such folder: none"),
        ("model.adapter", "run", "model.adapter: no adapter_config.json in run; did you mean run/adapter?"),
        *(
            (
                "model.path",
                path,
                "model.path: run/adapter is an adapter and no whole model; give its base, and it as "
                "model.adapter of a run",
            )
            for path in ("run", "run/adapter")
        ),
        ("rewards", "[{kind: classifier, path: run}]", "rewards.0.path: no model in run; did you mean run/adapter?"),
        ("model.path", "whole", "model.path: no model in whole; did you mean whole/model?"),
    ],
)
def test_missing_files_are_told_before_anything_loads(folder, key, value, line):
    os.makedirs("run/adapter")
    os.makedirs("whole/model")
    write("run/adapter/adapter_config.json", "{}")
    write("whole/model/config.json", "{}")
    assert problems("lm.yaml", (key, value)) == [f"command line: {line}"]


def test_a_finished_run_can_be_read_without_its_prompts(folder):
    os.remove("prompts.jsonl")
    assert problems("lm.yaml") == ["lm.yaml: prompts.path: no such file: prompts.jsonl"]
    assert load_config("lm.yaml", check_files=False).prompts.path == str(folder / "prompts.jsonl")


# ---- anything at all

KEYS = sorted({".".join(key) for root in (LanguageConfig, ControlConfig) for key in keys_of(root)})
VALUES = st.text(max_size=20) | st.sampled_from(
    [
        "-1",
        "0",
        "1",
        "0.5",
        "1e400",
        "[]",
        "{}",
        "null",
        "true",
        "[1, 2]",
        "{kind: ppo_clip}",
        "{kind: [x]}",
        "-",
        "--x",
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["lm.yaml", "control.yaml"]),
    overrides=st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=12), VALUES), max_size=4),
)
def test_overrides_never_raise_anything_but_plain_lines(folder, name, overrides):
    try:
        config = load_config(name, overrides)
    except UserError as error:
        lines = str(error).splitlines()
        assert lines
        for line in lines:
            assert line.startswith(("command line: ", name))
            assert "pydantic" not in line
            assert "http" not in line
    else:
        assert load_config(write("again.yaml", dump(config))) == config


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.binary(max_size=30))
def test_files_never_raise_anything_but_plain_lines(folder, content):
    data = content if isinstance(content, bytes) else (CONTROL + content).encode("utf-8", "surrogatepass")
    (folder / "any.yaml").write_bytes(data)
    try:
        load_config("any.yaml")
    except UserError as error:
        assert str(error)


def test_validating_a_config_loads_nothing_heavy(folder):
    code = (
        "import sys; from lm_trust.training.config_file import load_config; load_config('lm.yaml');"
        "print([name for name in ('torch', 'transformers', 'gymnasium', 'numpy') if name in sys.modules])"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


CONFIGS = Path(lm_trust.__file__).parent.parent / "configs"
STAGES = {"sft.yaml": SftConfig, "reward_model.yaml": RewardModelConfig}
# What is in configs/accelerate is accelerate's: tests/training/test_sharding.py launches a run by it.
RUNS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "accelerate"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_that_comes_with_the_package_is_valid(path):
    # The files that some of them name are made by another command first.
    if path.parent.name == "compare":
        config = load_comparison(path).config
    else:
        config = load_config(path, root=STAGES.get(path.name), check_files=False)
    assert config.output.startswith("runs/")


OF_OTHERS = {
    "compare/cartpole.yaml": "base and rules are given, as for lm-trust compare",
    "lm/sentiment_trpo.yaml": "prompts and model are given, as for lm-trust train",
    "control/cartpole_trpo.yaml": "environment is given, as for lm-trust train",
    "lm/pipeline/sft.yaml": "data and model are given, as for lm-trust sft or lm-trust reward-model",
}


@pytest.mark.parametrize("path", OF_OTHERS)
def test_a_config_of_another_command_is_told_in_one_line(path):
    commands = {
        "lm-trust train": load_config,
        "lm-trust sft or lm-trust reward-model": partial(load_config, root=SftConfig),
        "lm-trust compare": load_comparison,
    }
    commands.pop(OF_OTHERS[path].partition("as for ")[2])
    for command, load in commands.items():
        with pytest.raises(UserError) as error:
            load(CONFIGS / path)
        assert str(error.value) == f"{CONFIGS / path}: {OF_OTHERS[path]}; here one for {command} is needed"


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "advantage.kind": "leave_one_out",
            "critic.kind": "none",
            "rollout.samples_per_prompt": "4",
            "rewards": "[{name: vader, dense: true}]",
        },
        {"rollout.engine": "generate", "rollout.mismatch.limit": "0.1"},
        {"update.kind": "ppo_clip", "update.anneal_entropy": "true", "update.entropy": "0.0"},
    ],
)
def test_what_one_override_leaves_without_effect_is_no_error(folder, overrides):
    """Who tries another estimator, engine or weight on a config is not to edit the rest of it first."""
    load_config("lm.yaml", list(overrides.items()))

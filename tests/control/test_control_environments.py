"""Making environments, and refusing by name what cannot be used."""

import itertools
import sys
from contextlib import closing
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TimeLimit

from lm_trust.cli import main
from lm_trust.control import ControlTask, Environments, MLPPolicy, make_environments
from lm_trust.control.environments import make_environment
from lm_trust.control.evaluation import Remembering, evaluate_policy
from lm_trust.errors import UserError
from lm_trust.training.config_yaml import write_yaml


class Shaped(gymnasium.Env):
    """Any spaces; observations come from `shown`."""

    def __init__(self, observation_space, action_space=None, shown=None):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        self.shown = observation_space.sample() if shown is None else shown
        self.given = []

    def reset(self, *, seed=None, options=None):
        return self.shown, {}

    def step(self, action):
        self.given.append(action)
        return self.shown, 0.0, False, False, {}


def wrap(*envs):
    return Environments("Shaped", envs, seed=0)


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiDiscrete([[2, 3]]),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),  # its text has two lines
        spaces.MultiBinary([2, 2]),
        spaces.Box(-1, 1, (2, 2)),
        spaces.Box(0, 9, (2,), np.int64),
        spaces.Dict({"a": spaces.Discrete(2)}),
    ],
    ids=lambda space: type(space).__name__ + str(space.shape),
)
def test_an_unsupported_action_space_is_refused_by_name(space):
    env = Shaped(spaces.Box(-1, 1, (2,)), space)
    refused(lambda: wrap(env), "environment Shaped", "action space", type(space).__name__)


def test_an_unsupported_observation_space_is_refused_by_name():
    env = Shaped(spaces.Dict({"a": spaces.Discrete(2)}))
    refused(lambda: wrap(env), "environment Shaped", "observation space Dict", "FlattenObservation")
    refused(lambda: wrap(Shaped(spaces.MultiDiscrete([[2, 3], [4, 5]]))), "MultiDiscrete([[2 3] [4 5]])")


def test_a_discrete_observation_becomes_one_hot():
    environments = wrap(Shaped(spaces.Discrete(4, start=3), shown=np.int64(5)))
    assert environments.observations.tolist() == [[0, 0, 1, 0]]
    environments.envs[0].shown = 3
    environments.step(np.zeros(1, np.int64))
    assert environments.observations.tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    "shown, words",
    [
        (np.int64(2), "2 (int64)"),  # numpy would show the last state
        (7, "7 (int)"),
        (3.0, "3.0 (float)"),
        (np.array([[3], [4]]), "[[3] [4]] (ndarray)"),
        ("first", "first (str)"),
    ],
    ids=["below", "beyond", "float", "array", "text"],
)
def test_a_discrete_observation_that_is_not_in_its_space_is_refused(shown, words):
    space = spaces.Discrete(4, start=3)
    refused(lambda: wrap(Shaped(space, shown=shown)), f"environment Shaped: an observation is {words}, its space says")
    environments = wrap(Shaped(space, shown=3))
    environments.envs[0].shown = shown
    refused(lambda: environments.step(np.zeros(1, np.int64)), "Shaped", words, "Discrete(4, start=3)")


def test_a_discrete_observation_takes_no_more_memory_than_it_has_numbers():
    environments = wrap(Shaped(spaces.Discrete(200_000), shown=199_999))
    assert environments.observations.shape == (1, 200_000)
    assert environments.observations.sum() == environments.observations[0, -1] == 1


def test_an_observation_of_several_dimensions_is_flattened():
    environments = wrap(Shaped(spaces.Box(-1, 9, (2, 3), np.float64), shown=np.arange(6.0).reshape(2, 3)))
    assert environments.observations.tolist() == [[0, 1, 2, 3, 4, 5]]
    environments.envs[0].shown = np.ones((2, 3))
    environments.step(np.zeros(1, np.int64))
    assert environments.observations.tolist() == [[1] * 6] and environments.observation_size == 6


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8])
def test_discrete_actions_count_from_where_the_environment_does(dtype):
    env = Shaped(spaces.Box(-1, 1, (2,)), spaces.Discrete(3, start=-1, dtype=dtype))
    environments = wrap(env)
    for index in range(3):
        environments.step(np.array([index]))
    assert [given.dtype for given in env.given] == [dtype] * 3
    assert env.given == [-1, 0, 1] and all(env.action_space.contains(action) for action in env.given)


@pytest.mark.parametrize(
    "space, sizes",
    [
        (spaces.MultiDiscrete([2, 3, 1], start=[0, -1, 5]), (2, 3, 1)),
        (spaces.MultiDiscrete([2, 3], dtype=np.int8, start=[126, 0]), (2, 3)),
        (spaces.MultiBinary(3), (2, 2, 2)),
    ],
    ids=str,
)
def test_each_dimension_of_a_multi_discrete_action_counts_from_where_the_environment_does(space, sizes):
    env = Shaped(spaces.Box(-1, 1, (2,)), space)
    environments = wrap(env)
    described = environments.action_space
    assert (described.kind, described.shape, described.sizes) == ("multi_discrete", (len(sizes),), sizes)
    assert described.size == sum(sizes)
    combinations = list(itertools.product(*map(range, sizes)))
    for actions in combinations:
        environments.step(np.array([actions]))
    start = getattr(space, "start", np.zeros(len(sizes), int))
    assert [given.tolist() for given in env.given] == (np.array(combinations) + start).tolist()
    # Of the space's own type, which gymnasium's check asks for as well as for the values.
    assert all(space.contains(given) and given.dtype == space.dtype for given in env.given)


def test_an_action_box_without_bounds_clips_nothing():
    env = Shaped(spaces.Box(-1, 1, (1,)), spaces.Box(-np.inf, np.inf, (2,)))
    wrap(env).step(np.array([[1e6, -1e6]], np.float32))
    assert env.given[0].tolist() == [1e6, -1e6]


def test_observations_are_not_overwritten_by_the_environment():
    env = Shaped(spaces.Box(-9, 9, (2,)), shown=np.zeros(2, np.float32))
    environments = wrap(env)
    first = environments.observations
    env.shown[:] = 7  # an environment that shows its own working memory
    environments.step(np.zeros(1, np.int64))
    second = environments.observations
    env.shown[:] = 8
    assert first.tolist() == [[0, 0]] and second.tolist() == [[7, 7]]


def test_the_final_observation_survives_the_reset(clocks):
    environments = clocks(2, lives=1)
    transition = environments.step(np.zeros(2, np.int64))
    assert {row: final.tolist() for row, final in transition.final.items()} == {0: [0, 1], 1: [1, 1]}
    assert environments.observations.tolist() == [[0, 0], [1, 0]]
    environments.step(np.zeros(2, np.int64))
    assert transition.final[1].tolist() == [1, 1]


def test_an_observation_that_is_not_of_its_space_is_refused():
    env = Shaped(spaces.Box(-1, 1, (3,)), shown=np.float32(0.5))  # numpy would spread it over all three
    refused(lambda: wrap(env), "environment Shaped", "shape ()")


@pytest.mark.parametrize(
    "shown",
    [np.float32([0.5]), np.zeros(4), np.float32(0.5), np.zeros((3, 1))],
    ids=["one number", "one too many", "a bare number", "a column"],
)
def test_an_observation_that_changes_its_shape_is_refused(shown):
    env = Shaped(spaces.Box(-1, 1, (3,)))
    environments = wrap(env)
    environments.step(np.array([0]))
    env.shown = shown
    refused(lambda: environments.step(np.array([0])), "environment Shaped", f"shape {shown.shape}", "(3,)")


@pytest.mark.parametrize("shown", [0.5, np.float32(0.5), np.array(0.5)], ids=["float", "float32", "array"])
def test_a_bare_number_is_an_observation_of_one(shown):
    env = Shaped(spaces.Box(-1, 1, (1,)))
    environments = wrap(env)
    env.shown = shown
    environments.step(np.array([0]))
    assert environments.observations.tolist() == [[0.5]]


def test_a_reward_that_is_no_number_is_refused():
    env = Shaped(spaces.Box(-1, 1, (3,)))
    env.step = lambda action: (env.shown, np.array([1.0, 2.0]), False, False, {})
    environments = wrap(env)
    refused(lambda: environments.step(np.array([0])), "environment Shaped", "[1. 2.] (ndarray), not a number")


@pytest.mark.parametrize("wrapper", [lambda env: env, lambda env: TimeLimit(env, 9), Remembering])
@pytest.mark.parametrize(
    "returned, words",
    [
        (([0.0, 0.0], 0.0, False, {}), "not enough values to unpack (expected 5, got 4)"),  # gym's before 0.26
        (None, "cannot unpack non-iterable NoneType object"),
    ],
    ids=["four", "nothing"],
)
def test_a_step_that_returns_something_else_is_refused_by_name(wrapper, returned, words):
    env = Shaped(spaces.Box(-1, 1, (2,)))
    env.step = lambda action: returned
    environments = wrap(wrapper(env))
    refused(lambda: environments.step(np.array([0])), "environment Shaped: step(action) must return (obs", words)


@pytest.mark.parametrize("wrapper", [lambda env: env, lambda env: TimeLimit(env, 9), Remembering])
@pytest.mark.parametrize(
    "reset, words",
    [
        (lambda *, seed=None, options=None: np.zeros(2), "it returned ndarray"),  # gym's before 0.26
        (lambda *, seed=None, options=None: np.zeros((2, 1)), "it returned ndarray"),
        (lambda *, seed=None, options=None: None, "it returned NoneType"),
        (lambda: (np.zeros(2), {}), "got an unexpected keyword argument"),
    ],
    ids=["observation", "column", "nothing", "no seed"],
)
def test_a_reset_of_another_interface_is_refused_by_name(wrapper, reset, words):
    env = Shaped(spaces.Box(-1, 1, (2,)))
    env.reset = reset
    refused(lambda: wrap(wrapper(env)), "environment Shaped: reset(*, seed, options) must return (obs", words)


def test_an_error_in_the_environments_own_code_keeps_its_traceback():
    def broken(*_, **__):
        raise ValueError("motor")

    env = Shaped(spaces.Box(-1, 1, (2,)))
    environments = wrap(TimeLimit(env, 9))
    env.step = env.reset = broken
    for call in (environments.reset, lambda: environments.step(np.array([0]))):
        with pytest.raises(ValueError, match="motor"):
            call()


class Spaceless(gymnasium.Env):
    pass


@pytest.mark.parametrize("given", [None, (3,), 2], ids=str)
def test_what_is_no_space_is_refused_by_name(given):
    env = Spaceless()
    refused(lambda: wrap(env), "environment Shaped: the action space None is not supported")
    env.action_space = given
    refused(lambda: wrap(env), f"environment Shaped: the action space {given} is not supported")
    env.action_space = spaces.Discrete(2)
    refused(lambda: wrap(env), "environment Shaped: the observation space None is not supported")


@pytest.mark.parametrize("what, argument", [("observation", "nan_at"), ("reward", "nan_reward_at")])
def test_nan_stops_the_run_and_says_where(clocks, what, argument):
    environments = clocks(3, limit=4)
    setattr(environments.envs[1].unwrapped, argument, 3)
    actions = np.zeros(3, np.int64)
    environments.step(actions), environments.step(actions)
    message = refused(lambda: environments.step(actions), "environment Clock", "copy 1", "step 3 of episode 0")
    assert what in message


def test_nan_in_a_first_observation_is_found(clocks):
    refused(lambda: clocks(2, nan_at=0), "environment Clock", "copy 0", "first observation of episode 0")


@pytest.mark.filterwarnings("error")
def test_large_finite_observations_are_let_through():
    env = Shaped(spaces.Box(-np.inf, np.inf, (2,)), shown=np.full(2, 1e30, np.float32))
    environments = wrap(env)
    environments.step(np.zeros(1, np.int64))
    assert np.array_equal(environments.observations[0], env.shown)


def test_an_unknown_id_names_the_nearest():
    refused(lambda: make_environments("CartPol-v1", 1, seed=0), "environment.id", "did you mean 'CartPole-v1'?")
    refused(lambda: make_environments("utter nonsense", 1, seed=0), "'utter nonsense'", "module:factory")


def test_missing_mujoco_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("mujoco", "gymnasium.envs.mujoco"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    refused(lambda: make_environments("HalfCheetah-v5", 1, seed=0), "HalfCheetah-v5", "lm-trust[mujoco]")


@pytest.mark.filterwarnings("ignore:.*is out of date")
@pytest.mark.parametrize("id", ["HalfCheetah-v2", "Ant-v3"])
def test_an_old_mujoco_id_is_told_in_gymnasiums_words(id):
    pytest.importorskip("mujoco")
    told = refused(lambda: make_environments(id, 1, seed=0), f"environment {id}: ", "gymnasium-robotics")
    assert "pip install" not in told


@pytest.mark.parametrize(
    ("id", "arguments"),
    [
        ("FrozenLake-v1", {"map_name": "9x9"}),
        ("CartPole-v1", {"max_episode_steps": 0}),
        ("HalfCheetah-v5", {"xml_file": "nope.xml"}),
        ("HalfCheetah-v5", {"frame_skip": 0}),
    ],
)
def test_arguments_that_an_environment_cannot_be_made_with(id, arguments):
    if id == "HalfCheetah-v5":
        pytest.importorskip("mujoco")
    (name, value), *_ = arguments.items()
    make = {"arguments": arguments, "seed": 0}
    refused(lambda: make_environments(id, 1, **make), f"environment.arguments: {id} cannot", name, str(value))


def test_an_argument_that_an_environment_does_not_take():
    make = {"arguments": {"gravity_typo": 3}, "seed": 0}
    refused(lambda: make_environments("CartPole-v1", 1, **make), "environment.arguments", "gravity_typo")


FACTORY = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

single = CartPoleEnv()

def make(force=10.0):
    env = CartPoleEnv()
    env.force_mag = force
    return env

class Plain(gymnasium.Env):  # without an __init__ of its own
    observation_space = action_space = gymnasium.spaces.Discrete(2)

class Broken(Plain):
    def __init__(self, size=1):
        self.size = size + "1"

def same():
    return single

def wrong():
    return 3

gymnasium.register("Registered-v0", entry_point=CartPoleEnv, max_episode_steps=5)
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    name = f"my_environments_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)  # importable as for `python -m`, with nothing on the path
    before = dict(gymnasium.registry)
    path = list(sys.path)
    yield name
    assert sys.path == path
    sys.modules.pop(name, None)
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


def test_a_factory_by_dotted_path(my_module):
    environments = make_environments(f"{my_module}:make", 2, seed=0, arguments={"force": 3.0})
    assert [env.force_mag for env in environments.envs] == [3.0, 3.0]


@pytest.mark.parametrize("factory", ["make", "Plain", "Broken"])
def test_an_argument_that_a_factory_does_not_take(my_module, factory):
    make = {"arguments": {"size_typo": 3}, "seed": 0}
    told = f"environment.arguments: {my_module}:{factory} does not take {{'size_typo': 3}}: "
    refused(lambda: make_environments(f"{my_module}:{factory}", 1, **make), told)
    refused(lambda: make_environment(f"{my_module}:{factory}", render_mode="human"), "does not take a render_mode")


def test_a_factory_that_fails_by_itself_keeps_its_traceback(my_module):
    with pytest.raises(TypeError, match="unsupported operand"):
        make_environments(f"{my_module}:Broken", 1, seed=0, arguments={"size": 3})


@pytest.mark.filterwarnings("ignore:.*A Box observation space:UserWarning")
def test_the_example_environment_is_sound(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    environments = make_environments("examples.custom_environment:make", 2, seed=0)
    check_env(environments.envs[0].unwrapped, skip_render_check=True)
    policy = MLPPolicy(environments.observation_size, environments.action_space)
    rollout = ControlTask(environments, steps=250, gamma=0.99, seed=0).collect(policy)
    assert rollout.actions.shape == (2, 250, 1)
    assert (rollout.truncated | rollout.terminated).any()


def test_an_id_that_a_module_registers(my_module):
    environments = make_environments(f"{my_module}:Registered-v0", 2, seed=0)
    assert environments.envs[0].spec.max_episode_steps == 5


@pytest.mark.parametrize(
    "path, words",
    [
        ("{}:mak", ["environment.id", "no factory 'mak'", "did you mean 'make'?"]),
        ("{}:same", ["one object twice"]),
        ("{}:wrong", ["returned int, not a gymnasium.Env"]),
        ("no_such_module_anywhere:make", ["environment.id", "no_such_module_anywhere"]),
    ],
)
def test_a_dotted_path_that_leads_nowhere(my_module, path, words):
    refused(lambda: make_environments(path.format(my_module), 2, seed=0), *words)


def test_one_object_is_refused_whichever_process_it_is_for(my_module):
    refused(lambda: make_environments(f"{my_module}:same", 2, seed=0, processes=2), "one object twice")


LATE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Late(CartPoleEnv):
    def step(self, action):
        import {name}_while_stepping
        return super().step(action)

def make():
    import {name}_in_the_factory
    return gymnasium.wrappers.TimeLimit(Late(), 5)
"""


@pytest.mark.parametrize("where", ["in_the_factory", "while_stepping"])
@pytest.mark.parametrize("processes", [None, 1, 2])
def test_what_an_environment_imports_late_may_lie_beside_it(tmp_path, monkeypatch, where, processes):
    name = f"late_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(LATE.format(name=name))
    for each in ("in_the_factory", "while_stepping"):
        (tmp_path / f"{name}_{each}.py").write_text("")
    missing = tmp_path / f"{name}_{where}.py"
    monkeypatch.chdir(tmp_path)  # importable as for `python -m`, with nothing on the path

    def use():
        with closing(make_environments(f"{name}:make", 2, seed=0, processes=processes or 1)) as environments:
            policy = MLPPolicy(environments.observation_size, environments.action_space, hidden=(4,))
            if processes is None:
                return evaluate_policy(policy, environments)["length_mean"]
            return ControlTask(environments, steps=6, gamma=1.0, seed=0).collect(policy).mask.sum().item()

    assert use() > 0
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]
    missing.unlink()
    with pytest.raises((ModuleNotFoundError, UserError), match=missing.stem):
        use()


ALWAYS_LATE = """
import sys

import gymnasium
import numpy as np

def beside():
    sys.modules.pop("{name}_beside", None)
    import {name}_beside

class Walk(gymnasium.Env):
    metadata = {{"render_modes": ["rgb_array"]}}
    observation_space = gymnasium.spaces.Box(-99, 99, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        beside()
        self.time = 0
        return np.zeros(1, np.float32), {{}}

    def step(self, action):
        beside()
        self.time += 1
        return np.full(1, self.time, np.float32), 1.0, False, self.time == 7, {{}}

    def render(self):
        beside()
        return np.zeros((32, 32, 3), np.uint8)

    def close(self):
        beside()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_is_resumed_filmed_and_closed_where_its_environment_imports_late(tmp_path, monkeypatch, processes):
    pytest.importorskip("imageio_ffmpeg")
    name = f"late_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(ALWAYS_LATE.format(name=name))
    (tmp_path / f"{name}_beside.py").write_text("")
    monkeypatch.chdir(tmp_path)  # importable as for `python -m`, with nothing on the path
    config = {
        "total_steps": 2 * 10,  # ends within an episode
        "environment": {"id": f"{name}:Walk", "count": 2, "processes": processes},
        "rollout": {"steps": 10},
        "policy": {"hidden": [4]},
        "critic": {"kind": "mlp", "hidden": [4], "epochs": 1, "minibatches": 1},
        "evaluation": {"count": 1},
        "output": "run",
        "trackers": [],
    }
    (tmp_path / "walk.yaml").write_text(write_yaml(config))
    assert main(["train", "walk.yaml"]) == 0
    assert main(["train", "--resume", "run", "--total_steps", "40"]) == 0
    assert main(["evaluate", "run", "--videos", "1"]) == 0
    assert len(list((tmp_path / "run/videos").iterdir())) == 1
    assert not {"", str(tmp_path)} & set(sys.path)

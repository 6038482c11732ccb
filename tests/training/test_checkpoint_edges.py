"""Checkpoints at the edges: names that coincide, every type, disks that fill up, and what is not ours."""

import ast
import os
import resource
from pathlib import Path

import pytest
import torch

import lm_trust
from lm_trust.control.saving import save_policy
from lm_trust.errors import UserError
from lm_trust.training.checkpoint import load_checkpoint, save_checkpoint

TYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


def round_trip(folder, state):
    save_checkpoint(folder, state, iteration=1, keep_last=1)
    return load_checkpoint(folder)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_and_shape_bit_for_bit(tmp_path, dtype):
    random = torch.randint(0, 2, (3, 4), generator=torch.Generator().manual_seed(0))
    tensors = [random.to(dtype), random.to(dtype).T, random.to(dtype)[0, 0], torch.empty(0, 5, dtype=dtype)]
    found = round_trip(tmp_path, {"tensors": tensors})["tensors"]
    for one, other in zip(tensors, found, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_not_a_number_and_infinity_come_back(tmp_path):
    numbers = [float("nan"), float("inf"), -0.0, 1e-320]
    found = round_trip(tmp_path, {"tensor": torch.tensor(numbers, dtype=torch.float64), "list": numbers})
    for values in (found["tensor"].tolist(), found["list"]):
        assert repr(values) == repr(numbers)


def test_keys_keep_their_type_and_their_order(tmp_path):
    state = {"b": {1: torch.ones(1), 0: "zero", "1": torch.zeros(1)}, "a": {}}
    found = round_trip(tmp_path, state)
    assert list(found) == ["b", "a"] and list(found["b"]) == [1, 0, "1"]
    assert found["b"][1] == 1 and found["b"]["1"] == 0 and found["a"] == {}


def test_a_tuple_comes_back_as_a_list(tmp_path):
    assert round_trip(tmp_path, {"betas": (0.9, (1, None))})["betas"] == [0.9, [1, None]]


def test_words_that_the_file_itself_uses_are_only_words(tmp_path):
    state = {"tensor": "tensor", "items": {"items": [["a", 1]], "tensor": torch.ones(1)}}
    found = round_trip(tmp_path, state)
    assert found["tensor"] == "tensor" and found["items"]["items"] == [["a", 1]] and found["items"]["tensor"] == 1


def test_names_that_read_the_same_when_joined_stay_apart(tmp_path):
    """A module's own keys hold dots."""
    state = {"network": {"layer": {"weight": torch.tensor(1.0)}, "layer.weight": torch.tensor(2.0)}}
    found = round_trip(tmp_path, state)["network"]
    assert found["layer"]["weight"] == 1 and found["layer.weight"] == 2


def test_tensors_that_share_memory_come_back_each_whole(tmp_path):
    shared = torch.arange(6.0)
    found = round_trip(tmp_path, {"all": shared, "part": shared[2:4], "again": shared})
    assert torch.equal(found["all"], shared) and torch.equal(found["again"], shared)
    assert found["part"].tolist() == [2, 3]


def test_an_optimizer_goes_on_bit_for_bit(tmp_path):
    def make():
        weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
        return weights, torch.optim.AdamW([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:]}], amsgrad=True)

    def step(weights, optimizer):
        optimizer.zero_grad()
        sum((weight.sin() * torch.arange(len(weight))).sum() for weight in weights).backward()
        optimizer.step()

    weights, optimizer = make()
    step(weights, optimizer)
    state = round_trip(tmp_path, {"weights": [weight.detach() for weight in weights], "adam": optimizer.state_dict()})
    others, other = make()
    for weight, saved in zip(others, state["weights"], strict=True):
        weight.data.copy_(saved)
    other.load_state_dict(state["adam"])
    for _ in range(2):
        step(weights, optimizer)
        step(others, other)
    assert all(torch.equal(one, same) for one, same in zip(weights, others, strict=True))


def test_saving_the_same_iteration_again_replaces_it(tmp_path):
    for number in (1, 2):
        save_checkpoint(tmp_path, {"number": number}, iteration=5, keep_last=2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000005"]
    assert load_checkpoint(tmp_path)["number"] == 2


def test_a_torn_later_checkpoint_gives_way_to_the_run_that_goes_on(tmp_path, caplog):
    for iteration in (2, 4, 6):
        save_checkpoint(tmp_path, {"iteration": iteration}, iteration=iteration, keep_last=3)
    (tmp_path / "00000006" / "state.json").unlink()
    assert load_checkpoint(tmp_path)["iteration"] == 4
    assert "00000006" in caplog.text and "state.json is missing" in caplog.text
    save_checkpoint(tmp_path, {"iteration": 5}, iteration=5, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000005"]
    assert load_checkpoint(tmp_path)["iteration"] == 5


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
    save_checkpoint(tmp_path, {"iteration": 1}, iteration=1, keep_last=1)
    (tmp_path / "00000009.bak").mkdir()
    (tmp_path / "00000008").write_text("a file")
    save_checkpoint(tmp_path, {"iteration": 2}, iteration=2, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000008", "00000009.bak"]
    assert load_checkpoint(tmp_path)["iteration"] == 2


def test_a_disk_without_room_is_told_and_leaves_nothing_half(tmp_path):
    save_checkpoint(tmp_path, {"iteration": 1}, iteration=1, keep_last=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the tensors' file, written in Rust, is what fails
    try:
        with pytest.raises(UserError, match="00000002: the checkpoint could not be written"):
            save_checkpoint(tmp_path, {"tensor": torch.zeros(10_000)}, iteration=2, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert load_checkpoint(tmp_path)["iteration"] == 1


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_what_is_saved_is_for_the_umask_to_say(tmp_path, umask, mode):
    policy = torch.nn.Linear(2, 1)
    before = os.umask(umask)
    try:
        checkpoint = save_checkpoint(tmp_path, policy.state_dict(), iteration=1, keep_last=1)
        save_policy(policy, tmp_path / "policy.safetensors")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    files = [*checkpoint.iterdir(), tmp_path / "policy.safetensors"]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        name: mode for name in ("state.json", "tensors.safetensors", "manifest.json", "policy.safetensors")
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    save_checkpoint(tmp_path, {"iteration": 1}, iteration=1, keep_last=1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="older ones are intact"):
            save_checkpoint(tmp_path, {"iteration": 2}, iteration=2, keep_last=1)
    finally:
        tmp_path.chmod(0o700)
    assert load_checkpoint(tmp_path)["iteration"] == 1


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_nothing_here_pickles():
    found = []
    files = sorted(Path(lm_trust.__file__).parent.rglob("*.py"))
    for path in files:
        if path.name == "child.py":  # messages between a process and its own fork, never a file
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
                names += [
                    alias.name for alias in node.names if node.module == "torch" and alias.name in ("load", "save")
                ]
                names = [name for name in names if name in UNSAFE | {"load", "save"}]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                names = [node.attr] if node.attr in ("load", "save") else []
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                names = ["allow_pickle"]
            found += [f"{path.name}: {name}" for name in names if name in UNSAFE | {"load", "save", "allow_pickle"}]
    assert len(files) > 30 and not found, "\n".join(found)

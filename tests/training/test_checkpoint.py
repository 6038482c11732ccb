"""Checkpoints: any nested state comes back as it was, and a failed write harms nothing."""

import pytest
import torch

from lm_trust.errors import UserError
from lm_trust.training import checkpoint
from lm_trust.training.checkpoint import load_checkpoint, save_checkpoint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_nested_states_come_back_as_they_were(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {
        "tensors": [torch.ones(2, 3).to(dtype) for dtype in DTYPES],
        "empty": torch.empty(0, dtype=torch.long),
        "scalar": torch.tensor(1.5),
        "view": torch.arange(6).view(2, 3).T,
        "nothing": None,
        "words": {"a.b": "text", "number": 0.1, "true": True, "list": [1, [2, {}]]},
        "optimizer": optimizer.state_dict(),
        "generator": torch.Generator().manual_seed(3).get_state(),
    }
    save_checkpoint(tmp_path, state, iteration=1, keep_last=1)
    loaded = load_checkpoint(tmp_path)
    assert loaded.keys() == state.keys()
    for left, right in zip(state["tensors"], loaded["tensors"], strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    for name in ("empty", "scalar", "view", "generator"):
        assert torch.equal(state[name], loaded[name])
    assert loaded["words"] == state["words"]
    assert loaded["nothing"] is None
    other = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    other.load_state_dict(loaded["optimizer"])
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_the_newest_are_kept(tmp_path):
    for iteration in (1, 2, 10, 11):
        save_checkpoint(tmp_path, {"iteration": iteration}, iteration=iteration, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000011"]
    assert load_checkpoint(tmp_path)["iteration"] == 11


@pytest.mark.parametrize("harm", ["truncate", "remove", "alter", "manifest"])
def test_a_harmed_checkpoint_is_passed_over(tmp_path, caplog, harm):
    for iteration in (1, 2):
        state = {"iteration": iteration, "tensor": torch.ones(4)}
        save_checkpoint(tmp_path, state, iteration=iteration, keep_last=2)
    newest = tmp_path / "00000002"
    tensors = newest / "tensors.safetensors"
    content = tensors.read_bytes()
    if harm == "truncate":
        tensors.write_bytes(content[:-1])
    elif harm == "remove":
        tensors.unlink()
    elif harm == "alter":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (newest / "manifest.json").unlink()
    assert load_checkpoint(tmp_path)["iteration"] == 1
    assert "00000002" in caplog.text


def test_a_failed_write_leaves_the_older_ones(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"iteration": 1}, iteration=1, keep_last=1)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(tmp_path, {"iteration": 2}, iteration=2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert load_checkpoint(tmp_path)["iteration"] == 1


def test_nothing_to_resume_from_is_said(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_checkpoint(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        save_checkpoint(tmp_path / "file", {}, iteration=1, keep_last=1)

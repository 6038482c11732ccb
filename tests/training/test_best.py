"""best/: the highest evaluation's policy, at every moment a whole one."""

import json
import os
from pathlib import Path

import pytest

from lm_trust.errors import UserError
from lm_trust.training import best
from lm_trust.training.best import Best, best_folder
from lm_trust.training.run_folder import RunFolder


class Policy:
    """Saves its version, as an adapter of two files would be."""

    version = 0

    def save(self, folder: Path) -> None:
        (folder / "adapter").mkdir()
        for name in ("config.json", "weights"):
            (folder / "adapter" / name).write_text(str(self.version))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def policy():
    return Policy()


def offer(keeper, policy, iteration, reward):
    policy.version = iteration
    keeper.offer({"iteration": iteration, "steps": 10 * iteration, "reward_mean": reward})


def kept(folder):
    place = best_folder(folder.path)
    assert sorted(path.name for path in place.iterdir()) == ["adapter", "evaluation.json"]
    assert [path.name for path in folder.path.iterdir()] == ["best"]
    record = json.loads((place / "evaluation.json").read_text())
    assert {(place / "adapter" / name).read_text() for name in ("config.json", "weights")} == {str(record["iteration"])}
    return record["iteration"], record["reward_mean"]


def test_what_was_written_about_the_policy_before_goes_with_it(folder, policy):
    keeper = Best(folder, policy.save, resumed=False)
    offer(keeper, policy, 1, 0.0)
    (best_folder(folder.path) / "adapter" / "README.md").write_text("of iteration 1")
    offer(keeper, policy, 2, 1.0)
    assert kept(folder) == (2, 1.0)
    assert not (best_folder(folder.path) / "adapter" / "README.md").exists()


def test_the_highest_evaluation_is_kept(folder, policy):
    keeper = Best(folder, policy.save, resumed=False)
    with pytest.raises(UserError, match="no best policy"):
        best_folder(folder.path)
    for iteration, reward, expected in (
        *((1, None, None), (2, float("nan"), None), (3, -5.0, 3), (4, -6.0, 3), (5, 0.0, 5), (6, 0.0, 5), (7, 1.0, 7)),
    ):
        offer(keeper, policy, iteration, reward)
        assert (kept(folder)[0] if best_folder_exists(folder) else None) == expected


def best_folder_exists(folder):
    return (folder.path / "best").exists()


def test_a_resumed_run_knows_its_best_and_a_new_one_has_none(folder, policy):
    offer(Best(folder, policy.save, resumed=True), policy, 1, 3.0)
    offer(Best(folder, policy.save, resumed=True), policy, 2, 2.0)
    assert kept(folder) == (1, 3.0)
    keeper = Best(folder, policy.save, resumed=False)
    assert not best_folder_exists(folder)
    offer(keeper, policy, 3, 1.0)
    assert kept(folder) == (3, 1.0)


@pytest.mark.parametrize("text", ["", '{"reward_mean": 3', "3.0"])
def test_an_evaluation_that_is_not_whole_is_named(folder, policy, text):
    offer(Best(folder, policy.save, resumed=False), policy, 1, 3.0)
    for path, read in (
        (folder.path / "best" / "evaluation.json", lambda: Best(folder, policy.save, resumed=True)),
        (folder.path / "evaluation.json", folder.evaluation),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"{path}: not a file that a run wrote; take it back from a copy"):
            read()


def test_a_kill_at_any_moment_leaves_a_policy_and_the_next_best_mends_it(folder, policy, monkeypatch):
    offer(Best(folder, policy.save, resumed=False), policy, 1, 1.0)
    whole, replace = [], os.replace

    def die_after(count):
        def die(source, target):
            if not count[0]:
                raise KeyboardInterrupt
            count[0] -= 1
            replace(source, target)

        return die

    for moment in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(best.os, "replace", die_after([moment]))
            offer(Best(folder, policy.save, resumed=True), policy, 2, 2.0)
        place = best_folder(folder.path)
        assert {path.name for path in (place / "adapter").iterdir()} == {"config.json", "weights"}
        whole.append(json.loads((place / "evaluation.json").read_text())["iteration"])
    assert whole == [1, 1, 1], "the evaluation comes last, so that the same one is not taken for old"
    offer(Best(folder, policy.save, resumed=True), policy, 2, 2.0)
    assert kept(folder) == (2, 2.0)


def test_a_disk_that_fails_leaves_the_best_so_far(folder, policy):
    keeper = Best(folder, policy.save, resumed=False)
    offer(keeper, policy, 1, 1.0)

    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"best could not be written .*No space left"):
        offer(Best(folder, full, resumed=True), policy, 2, 2.0)
    assert json.loads((best_folder(folder.path) / "evaluation.json").read_text())["iteration"] == 1

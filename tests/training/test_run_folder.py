"""A run's folder belongs to one process at a time."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed_runs import CONTROL, write_config

from lm_trust.cli import main
from lm_trust.errors import UserError
from lm_trust.training.run_folder import RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from lm_trust.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).claimed():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process has claimed, and that process."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield folder, holder
        holder.kill()


def test_a_relative_folder_stays_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("run"))
    monkeypatch.chdir("/")
    folder.write_config("seed: 1\n")
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_run_does_not_write_where_another_does(held, tmp_path, capsys):
    folder, holder = held
    config = write_config(tmp_path, "run", CONTROL, total_steps=64)
    assert main(["train", str(config), "--output", str(folder)]) == 2
    assert f"output: another process is writing to {folder}" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in folder.iterdir()] == [".lock"]

    holder.send_signal(signal.SIGKILL)  # what it held is free, without anybody cleaning up
    holder.wait()
    assert main(["train", str(config), "--output", str(folder)]) == 0
    assert main(["train", "--resume", str(folder), "--total_steps", "96"]) == 0
    assert len(RunFolder(folder).metrics()) == 3


def test_a_claim_ends_with_its_context(tmp_path):
    folder = RunFolder(tmp_path)
    for _ in range(2):
        with folder.claimed(), pytest.raises(UserError, match="another process"), RunFolder(tmp_path).claimed():
            pass
        assert not list(tmp_path.iterdir())

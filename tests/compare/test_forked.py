"""Commands in forks of the server: what they inherit, where they print, how they end."""

import pytest

from lm_trust.compare import forked

TELLER = """
import os
import torch

def build(**settings):
    alone = os.getsid(0) == os.getpid()
    raise ValueError(f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']} {os.environ['COLUMNS']} {alone}")
"""


@pytest.mark.parametrize(("own", "said"), [(None, "3 3 80 True"), ("1", "1 1 80 True")])
def test_a_command_has_its_threads_its_session_and_the_environment_of_now(tmp_path, monkeypatch, own, said):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teller.py").write_text(TELLER)
    (tmp_path / "run.yaml").write_text("total_steps: 9\nenvironment: {id: 'teller:build'}\ntrackers: []\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    log = tmp_path / "log"
    log.write_text("earlier\n")
    process = forked.start(["train", "run.yaml", "--output", "run"], log, threads=3)
    process.join(120)
    lines = log.read_text().splitlines()
    assert lines[0] == "earlier" and said in lines[-1], lines


@pytest.mark.parametrize(("arguments", "status"), [(["config", "control"], 0), (["train", "none.yaml"], 2)])
def test_a_commands_exit_code_is_its_own(tmp_path, arguments, status):
    process = forked.start(arguments, tmp_path / "log", threads=1)
    process.join(120)
    assert process.exitcode == status
    assert ("error: no such file: none.yaml" in (tmp_path / "log").read_text()) == (status == 2)

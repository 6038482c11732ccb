"""monitor.csv, read as those who know the format read it."""

import json

import pandas as pd
import pytest

from lm_trust.errors import UserError
from lm_trust.training import monitor
from lm_trust.training.monitor import Monitor
from lm_trust.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def clock(monkeypatch):
    times = [1000.0]
    monkeypatch.setattr(monitor.time, "time", lambda: times[0])
    return times


def load(folder):
    """As stable-baselines3's load_results does: a JSON comment, then a table."""
    with (folder.path / "monitor.csv").open() as file:
        first = file.readline()
        assert first[0] == "#"
        return json.loads(first[1:]), pd.read_csv(file, index_col=None)


def test_an_episode_is_a_line(folder, clock):
    writer = Monitor(folder, 'odd "name"-v1')
    header, table = load(folder)
    assert header == {"t_start": 1000.0, "env_id": 'odd "name"-v1'}
    assert list(table.columns) == ["r", "l", "t", "steps"] and len(table) == 0
    clock[0] = 1002.5
    writer.append([(1.23456789, 12, 96), (-3.0, 5, 104)])
    writer.append([])
    clock[0] = 1004.0
    writer.append([(1e-9, 500, 2000)])
    table = load(folder)[1]
    assert table.r.tolist() == [1.234568, -3.0, 0.0] and table.l.tolist() == [12, 5, 500]
    assert table.t.tolist() == [2.5, 2.5, 4.0] and table.steps.tolist() == [96, 104, 2000]
    assert pd.read_csv(folder.path / "monitor.csv", skiprows=1).equals(table)


def test_a_resumed_run_drops_what_it_does_again(folder, clock):
    Monitor(folder, "Hopper-v5").append([(1.0, 10, 80), (2.0, 10, 160), (3.0, 10, 161)])
    with (folder.path / "monitor.csv").open("a") as file:
        file.write("4.0,10,1")  # a kill in the midst of a line
    clock[0] = 5000.0
    writer = Monitor(folder, "Hopper-v5", resume_at=160)
    writer.append([(5.0, 9, 168)])
    header, table = load(folder)
    assert header["t_start"] == 1000.0
    assert table.r.tolist() == [1.0, 2.0, 5.0] and table.t.tolist() == [0.0, 0.0, 4000.0]


@pytest.mark.parametrize("line", ["", "1.0,10", "one,two,three,four"])
def test_a_line_that_no_run_wrote_is_told(folder, clock, line):
    Monitor(folder, "Hopper-v5").append([(1.0, 10, 80)])
    with (folder.path / "monitor.csv").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"monitor\.csv: it holds a line that no run wrote"):
        Monitor(folder, "Hopper-v5", resume_at=160)


def test_a_new_run_begins_anew_and_an_old_one_without_a_monitor_goes_on(folder):
    Monitor(folder, "Hopper-v5", resume_at=100).append([(1.0, 10, 180)])
    assert len(load(folder)[1]) == 1
    Monitor(folder, "Hopper-v5")
    assert len(load(folder)[1]) == 0

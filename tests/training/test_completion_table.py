"""Tables of completions: what the policy wrote, whole in the run folder and in short on the terminal."""

import io
import shutil

import pandas as pd
import pytest
import tiny_runs
from rich.console import Console
from rich.text import Text

from lm_trust.cli import main
from lm_trust.errors import UserError
from lm_trust.training.completion_table import show_completions, write_completions
from lm_trust.training.progress import Progress
from lm_trust.training.run_folder import RunFolder

SAMPLES = {
    "prompt": ["The film", "A\nplot", "🙂"],
    "completion": [" was dull", "", "\x1b[2J[red]no[/red]"],
    "reward": [0.25, -1.0, 1e9],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of five iterations with a table every two, and a second reward."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        tiny_runs.prepare(folder)
        rewards = [{"name": "tiny_run_rewards:vowels"}, {"name": "tiny_run_rewards:length", "weight": 0.5}]
        tables, saved = {"every": 2, "show": 1}, {"every": 1, "keep_last": 9}
        assert tiny_runs.train(iterations=5, rewards=rewards, completions=tables, checkpoint=saved) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of it, in the working directory."""
    monkeypatch.chdir(finished)
    monkeypatch.syspath_prepend(finished)
    return shutil.copytree(finished / "run", tmp_path / "run")


def tables(run):
    return sorted(path.name for path in (run / "completions").iterdir())


def printed(samples, count, *, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    show_completions(7, samples, count, Console(file=file, width=width, _environ={}))
    file.flush()
    lines = file.buffer.getvalue().decode(encoding).splitlines()
    assert all(Text(line).cell_len <= min(width, 80) for line in lines)
    return [line.rstrip() for line in lines]


# In the run folder


def test_a_table_every_few_iterations_and_of_the_last_one(run):
    assert tables(run) == [f"iteration-{iteration:08d}.parquet" for iteration in (2, 4, 5)]


def test_all_tables_read_as_one_and_agree_with_the_metrics(run):
    table = pd.read_parquet(run / "completions")
    assert list(table.columns) == [
        *("iteration", "sample", "prompt", "completion", "reward", "reward/vowels", "reward/length"),
        *("tokens", "ended", "advantage", "reference_kl"),
    ]
    assert table["iteration"].tolist() == [2] * 6 + [4] * 6 + [5] * 6
    assert table["sample"].tolist() == list(range(6)) * 3
    for line in tiny_runs.metrics(run):
        rows = table[table["iteration"] == line["iteration"]]
        if len(rows):
            assert rows["reward"].mean() == pytest.approx(line["reward_mean"])
            assert rows["reward/length"].mean() == pytest.approx(line["reward/length"])
            assert rows["reference_kl"].mean() == pytest.approx(line["reference_kl"], abs=1e-6)
            assert rows["tokens"].mean() == pytest.approx(line["completion_length"])
            assert 1 - rows["ended"].mean() == pytest.approx(line["truncated_fraction"])
            # Advantages are whitened over tokens.
            assert (rows["advantage"] * rows["tokens"]).sum() == pytest.approx(0, abs=1e-4)
    assert table["reward"].tolist() == pytest.approx((table["reward/vowels"] + 0.5 * table["reward/length"]).tolist())
    assert table["reward/length"].tolist() == [len(text) for text in table["completion"]]
    assert (table.loc[~table["ended"], "tokens"] == 4).all()
    assert table["prompt"].str.contains("film").all()
    assert table["advantage"].std() > 0.1 and (table.loc[table["iteration"] > 2, "reference_kl"] > 0).all()


def test_a_resumed_run_makes_its_later_tables_again(run, finished):
    for iteration in (3, 4, 5):
        shutil.rmtree(run / "checkpoints" / f"{iteration:08d}")
    (run / "completions" / "iteration-00000003.parquet").write_text("of a run that was made again")
    assert main(["train", "--resume", str(run)]) == 0
    assert tables(run) == tables(finished / "run")
    once, again = (pd.read_parquet(folder / "completions") for folder in (finished / "run", run))
    pd.testing.assert_frame_equal(again, once)


def test_tables_can_change_and_be_left_out_in_a_resumed_run(run):
    assert main(["train", "--resume", str(run), "--iterations", "7", "--completions.every", "0"]) == 0
    assert tables(run)[-1] == "iteration-00000005.parquet"


def test_a_table_is_whole_or_not_there(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    write_completions(folder, 3, SAMPLES)
    before = folder.completions(3).read_bytes()

    def break_off(table, path):
        path.write_bytes(b"PAR1")
        raise OSError("no space left")

    monkeypatch.setattr("pyarrow.parquet.write_table", break_off)
    with pytest.raises(UserError, match="no space left"):
        write_completions(folder, 3, SAMPLES)
    assert folder.completions(3).read_bytes() == before
    assert pd.read_parquet(folder.path / "completions")["completion"].tolist() == SAMPLES["completion"]


def test_a_disk_that_fails_is_one_line(tmp_path):
    (tmp_path / "completions").write_text("in the way")
    with pytest.raises(UserError, match=r"iteration-00000003\.parquet could not be written .*checkpoints"):
        write_completions(RunFolder(tmp_path), 3, SAMPLES)


# On the terminal


def test_the_first_completions_are_shown_with_their_rewards():
    assert printed(SAMPLES, 2) == [
        "Iteration 7, 2 of 3 completions:",
        "       prompt  The film",
        " reward 0.250  was dull",
        "       prompt  A\\nplot",
        "reward -1.000  (empty)",
    ]


def test_texts_are_shown_and_never_obeyed():
    assert printed(SAMPLES, 9)[-2:] == ["        prompt  🙂", "reward 1.0e+09  \\x1b[2J[red]no[/red]"]
    assert printed(SAMPLES, 9, encoding="ascii")[-2] == "        prompt  \\U0001f642"
    assert printed(SAMPLES, 0) == []


@pytest.mark.parametrize("width", [80, 30, 200])
def test_long_texts_are_cut_and_folded(width):
    prompt = "".join(f"<{number}>" for number in range(1000))
    lines = printed({"prompt": [prompt], "completion": ["word " * 1000], "reward": [0.5]}, 1, width=width)
    text = "".join(line[14:] for line in lines[1:])
    assert text.startswith("...") and text.replace(" ", "").count("word") == 48
    assert "<999>" in text and "<0>" not in text and text.endswith("...")


def test_a_run_shows_as_many_as_it_is_told(run, capsys):
    options = ["--completions.every", "1", "--completions.show", "2", "--iterations", "6"]
    assert main(["train", "--resume", str(run), *options]) == 0
    out = capsys.readouterr().out
    assert "Iteration 6, 2 of 6 completions:" in out
    assert out.count("prompt  ") == 2
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_on_a_terminal_it_scrolls_by_above_the_display():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    console = Console(file=Terminal(), width=80, height=30, force_terminal=True, _environ={"TERM": "xterm"})
    with Progress(3, step_kl_bound=None, world="language", console=console) as progress:
        progress.update({"iteration": 1})
        show_completions(1, SAMPLES, 1, console)
        progress.update({"iteration": 2})
    # What was printed stays, and the display is drawn anew below it.
    lines = console.file.getvalue().split("Iteration 1, 1 of 3 completions:")
    assert len(lines) == 2 and "iteration 2/3" in lines[1] and "\x1b[2J" not in lines[1]

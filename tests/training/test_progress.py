"""Progress: the plain lines, the live display in 80 columns, and a terminal given back as it was."""

import io
import os
import re
import threading

import pytest
from rich.cells import cell_len
from rich.console import Console

from lm_trust.training.progress import _SHORT_REASONS, Progress, format_duration, format_number, format_rate

TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}


def line(iteration, **changes):
    return {
        "iteration": iteration,
        "steps": iteration * 2048,
        "reward_mean": 0.153,
        "step_kl": 0.0192,
        "accepted": True,
        "reason": "accepted",
        "reference_kl": 1.25,
        "iteration_seconds": 10.0,
        "steps_per_second": 189.6,
    } | changes


def plain(total, lines, *, step_kl_bound=0.02, world="language"):
    file = io.StringIO()
    with Progress(total, step_kl_bound=step_kl_bound, world=world, console=Console(file=file)) as progress:
        for metrics in lines:
            progress.update(metrics)
    return file.getvalue().splitlines()


def display(progress_lines, *, total=30, step_kl_bound=0.02, world="language", width=80):
    file = io.StringIO()
    console = Console(file=file, width=width, height=24, _environ={})
    progress = Progress(total, step_kl_bound=step_kl_bound, world=world, console=console)
    for metrics in progress_lines:
        progress.update(metrics)
    file.truncate(0)
    file.seek(0)
    console.print(progress)
    return file.getvalue().splitlines()


ODD = [
    line(1, reward_mean=None, step_kl=None, reference_kl=None, steps_per_second=None, iteration_seconds=None),
    line(
        2,
        reward_mean=-1.2345e12,
        step_kl=1.2e7,
        reference_kl=float("inf"),
        steps=10**10,
        steps_per_second=1e12,
    ),
    line(3, reward_mean=float("nan"), step_kl=3e-9, accepted=None, reason=None, iteration_seconds=1e9),
    line(4, accepted=False, reason="a_reason_much_longer_than_anybody_who_laid_out_a_table_has_foreseen"),
    {"iteration": 5},
]


def test_each_iteration_is_one_plain_line_with_every_number():
    heading, first, second = plain(30, [line(1), line(2, accepted=False, reason="kl_exceeded", step_kl=0.0)])
    assert heading.split() == [
        "iteration",
        "reward",
        "step",
        "KL",
        "/",
        "bound",
        "ref",
        "KL",
        "tok/s",
        "left",
        "accepted",
    ]
    assert first.split() == ["1", "0.153", "0.0192", "/", "0.02", "1.250", "190", "4:50", "yes"]
    assert second.split(maxsplit=8) == [
        "2",
        "0.153",
        "0.0000",
        "/",
        "0.02",
        "1.250",
        "190",
        "4:40",
        "no: step KL",
    ]
    for word in ("reward", "step KL / bound", "ref KL", "tok/s", "left"):
        end = heading.index(word) + len(word)
        assert first[end - 1] != " " and first[end : end + 2] == "  ", word
    assert first.index("yes") == second.index("no:") == heading.index("accepted")


def test_control_shows_environment_steps_and_no_reference_kl():
    heading, first = plain(49, [line(1)], world="control")
    assert "env steps" in heading and "steps/s" in heading and "ref KL" not in heading
    assert "2,048" in first and "1.250" not in first


def test_an_annealed_bound_is_shown_as_it_was_in_force():
    _, first, second = plain(9, [line(1, max_kl=0.02), line(2, max_kl=0.0125)])
    assert "0.0192 / 0.02  " in first and "0.0192 / 0.0125  " in second


def test_the_start_is_shown_at_its_reference_whatever_rounding_left():
    shown = [text.split()[5] for text in plain(9, [line(1, reference_kl=8e-8), line(2, reference_kl=2e-5)])[1:]]
    assert shown == ["0.000", "2.0e-05"]


def test_a_rule_without_a_bound_shows_none():
    heading, first = plain(49, [line(1)], step_kl_bound=None)
    assert "/ bound" not in heading and "0.0192 " in first and "/" not in first


@pytest.mark.parametrize("world", ["language", "control"])
@pytest.mark.parametrize("step_kl_bound", [None, 0.0123456])
def test_plain_lines_are_short_ascii_and_without_control_codes_whatever_the_numbers(world, step_kl_bound):
    lines = plain(5, ODD, step_kl_bound=step_kl_bound, world=world)
    assert len(lines) == 1 + len(ODD)
    assert all(text.isascii() and text.isprintable() and len(text) < 100 for text in lines)


def test_a_file_taken_for_a_terminal_still_gets_plain_lines():
    file = io.StringIO()
    with Progress(2, step_kl_bound=0.02, world="language", console=Console(file=file, force_terminal=True)) as progress:
        progress.update(line(1))
    assert "\x1b" not in file.getvalue() and len(file.getvalue().splitlines()) == 2


def test_a_plain_line_is_flushed_at_once(tmp_path):
    with open(tmp_path / "log", "w", buffering=1 << 16) as file:
        progress = Progress(2, step_kl_bound=0.02, world="language", console=Console(file=file))
        progress.update(line(1))
        assert "0.0192" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("total", [81, 390, 3000, 3001])
def test_a_long_control_run_is_thinned_and_every_step_is_counted(total):
    rejected = {7, 8, total - 1}
    lines = plain(total, [line(k, accepted=k not in rejected) for k in range(1, total + 1)], world="control")[1:]
    iterations = [int(text.split()[0]) for text in lines]
    assert 40 <= len(lines) <= 82
    assert iterations[0] == 1 and iterations[-1] == total and iterations == sorted(set(iterations))
    counted = accepted = 0
    for text in lines:
        match = re.search(r"(\d+) of (\d+)$", text)
        counted += int(match[2]) if match else 1
        accepted += int(match[1]) if match else text.endswith("yes")
    assert (counted, accepted) == (total, total - len(rejected))


def test_every_iteration_of_a_long_language_run_has_its_line():
    assert len(plain(500, [line(k) for k in range(1, 501)])) == 501


def test_an_interrupted_thinned_run_ends_with_its_last_iteration():
    lines = plain(3000, [line(k) for k in range(1, 100)], world="control")
    assert lines[-1].split()[0] == "99"


def test_time_left_is_the_median_times_what_remains():
    lines = plain(10, [line(1, iteration_seconds=500.0), line(2), line(3), line(4, iteration_seconds=None)])
    assert [text.split()[7] for text in lines[1:]] == ["1:15:00", "34:00", "1:10", "1:00"]


def test_a_message_stands_among_the_lines():
    file = io.StringIO()
    with Progress(2, step_kl_bound=0.02, world="language", console=Console(file=file)) as progress:
        progress.message("see [bold]runs/a[/bold]")
    assert file.getvalue() == "see [bold]runs/a[/bold]\n"


@pytest.mark.parametrize("world", ["language", "control"])
@pytest.mark.parametrize("width", [80, 81, 140])
def test_the_display_fits_and_aligns(world, width):
    lines = [line(k) for k in range(1, 11)] + [line(11, accepted=False, reason="negative_curvature")]
    shown = display(lines, world=world, width=width)
    assert all(cell_len(text) <= width for text in shown)
    assert "iteration 11/30" in shown[0] and "elapsed 0:0" in shown[0] and "left 3:10" in shown[0]
    assert "step KL / bound" in shown[2] and "0.0192 / 0.02" in shown[4]
    assert [int(text.split()[0]) for text in shown[4:]] == list(range(4, 12)), "the last eight"
    assert shown[-2].rstrip().endswith("✓") and shown[-1].rstrip().endswith("no: curvature")
    assert shown[-2].index("✓") == shown[-1].index("no:")


@pytest.mark.parametrize("world", ["language", "control"])
@pytest.mark.parametrize("width", [40, 80])
def test_the_display_fits_whatever_the_numbers(world, width):
    shown = display(ODD, world=world, width=width, total=10**6)
    assert len(shown) == 4 + len(ODD) and all(cell_len(text) <= width for text in shown)


def test_the_display_before_the_first_iteration():
    assert "iteration 0/30" in display([])[0] and "left -" in display([])[0]
    assert display([])[-1].endswith("first iteration under way") or "first iteration under way" in display([])[-1]


@pytest.mark.parametrize("reason", _SHORT_REASONS)
def test_every_reason_is_whole_at_80_columns(reason):
    for world in ("language", "control"):
        rejected = line(123, steps=9_999_999, accepted=False, reason=reason)
        assert f"no: {_SHORT_REASONS[reason]}" in display([rejected], world=world)[-1]
        printed = plain(5, [rejected], world=world)[-1]
        assert printed.endswith(f"no: {_SHORT_REASONS[reason]}") and len(printed) <= 80


def run_on_a_terminal(use):
    """What a real terminal is sent while `use(progress)` runs, and the exception it ended with."""
    master, slave = os.openpty()
    received = bytearray()

    def read():
        try:
            while chunk := os.read(master, 65536):
                received.extend(chunk)
        except OSError:  # Linux says EIO where the other side has closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    error = None
    with os.fdopen(slave, "w", encoding="utf-8") as file:
        console = Console(file=file, _environ=TERMINAL)
        try:
            with Progress(3, step_kl_bound=0.02, world="language", console=console) as progress:
                use(progress)
        except (RuntimeError, KeyboardInterrupt) as caught:
            error = caught
    reader.join(timeout=10)
    os.close(master)
    return received.decode(), error


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, None])
def test_the_terminal_is_given_back_with_the_last_state_standing(kind):
    def use(progress):
        progress.message("a message")
        progress.update(line(1, reward_mean=0.777))
        if kind:
            raise kind

    sent, error = run_on_a_terminal(use)
    assert type(error) is (kind or type(None))
    hidden, shown = sent.rfind("\x1b[?25l"), sent.rfind("\x1b[?25h")
    assert 0 <= hidden < shown, "the cursor is shown again, last"
    assert sent.endswith(("\n", "\x1b[?25h")) and "a message" in sent
    last = sent[sent.rfind("iteration 1/3") :]
    assert "0.777" in last and "✓" in last


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0.0, "0.000"), (-0.4567, "-0.457"), (12.5, "12.500"), (-123.44, "-123.4"), (12345.6, "12,346"),
        (2e6, "2.0e+06"), (4e-5, "4.0e-05"), (0.0006, "0.001"), (float("nan"), "nan"), (float("-inf"), "-inf"),
        (500, "500.0"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0.0, "0.0"), (7.34, "7.3"), (9.97, "10"), (189.6, "190"), (9999.4, "9999"), (9999.6, "10k"),
        (24_310, "24k"), (999_499, "999k"), (999_501, "1.0M"), (756e6, "756M"), (1e12, "1e+12"), (float("nan"), "-"),
    ],
)  # fmt: skip
def test_rates(value, text):
    assert format_rate(value) == text and len(text) <= 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (245, "4:05"),
        (3845, "1:04:05"),
        (359_999, "99:59:59"),
        (5e5, "5 days"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text

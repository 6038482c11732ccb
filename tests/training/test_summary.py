"""The final table and the completions side by side."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from lm_trust.training.summary import print_summary, visible


def printed(evaluation, *, world="language", width=80, **changes):
    file = io.StringIO()
    print_summary(evaluation, Console(file=file, width=width, _environ={}, **changes), world=world)
    lines = file.getvalue().splitlines()
    assert all(Text.from_ansi(line).cell_len <= min(width, 80) for line in lines)
    return [line.rstrip() for line in lines]


def row(lines, label):
    (found,) = [line for line in lines if line.startswith(label)]
    return found.removeprefix(label).split(maxsplit=0)[0]


def evaluation(reward, samples=()):
    return {
        "reward_mean": reward,
        "reward_interval": [reward - 0.1, reward + 0.1],
        "count": 64,
        "reference_kl": 2.3714,
        "perplexity": 14.2134,
        "distinct_2": 0.9124,
        "completion_length": 19.84,
        "samples": [{"prompt": p, "completion": c, "reward": r} for p, c, r in samples],
    }


def test_before_stands_against_after():
    lines = printed({"before": evaluation(0.153), "after": evaluation(-0.561) | {"reference_kl": 0.0}})
    assert "Held-out evaluation, 64 completions" in lines
    assert lines[2].split() == ["before", "after"]
    assert row(lines, "mean reward [95 % interval]").split("   ") == ["0.153 [0.053, 0.253]", "-0.561 [-0.661, -0.461]"]
    assert row(lines, "reference KL (nats/sequence)").split() == ["2.371", "0.000"]
    assert row(lines, "perplexity under base model").split() == ["14.21", "14.21"]
    assert row(lines, "distinct-2").split() == ["0.912", "0.912"]
    assert row(lines, "completion length (tokens)").split() == ["19.8", "19.8"]


def test_sides_of_different_counts_show_each_its_own():
    lines = printed({"before": evaluation(0.1), "after": evaluation(0.2) | {"count": 240}})
    assert "Held-out evaluation" in lines
    assert row(lines, "completions").split() == ["64", "240"]
    lines = printed({"before": evaluation(0.1), "after": evaluation(0.2)})
    assert not any(line.startswith("completions") for line in lines)


def test_control_has_only_after():
    after = {"reward_mean": 500.0, "reward_interval": [499.5, 500.0], "count": 20, "length_mean": 500.0}
    lines = printed({"after": after}, world="control")
    assert "Evaluation, 20 episodes" in lines
    assert row(lines, "mean return [95 % interval]") == "500.0 [499.5, 500.0]"
    assert row(lines, "episode length (steps)") == "500.0"
    assert not any("before" in line or "KL" in line or "perplexity" in line for line in lines)


def test_missing_null_and_huge_numbers_fit():
    lines = printed(
        {
            "before": {"reward_mean": None, "reward_interval": [None, None], "perplexity": 1e300},
            "after": {"reward_mean": -1.2e7, "reward_interval": [-1e9, 1e9], "distinct_2": float("nan")},
        }
    )
    assert row(lines, "mean reward [95 % interval]").split(maxsplit=1) == [
        "-",
        "-1.2e+07 [-1.0e+09, 1.0e+09]",
    ]
    assert row(lines, "perplexity under base model").split() == ["1.0e+300", "-"]
    assert row(lines, "distinct-2").split() == ["-", "nan"]
    assert printed({"before": None, "after": None}) == []


def test_four_completions_stand_side_by_side_with_their_rewards():
    prompts = [f"prompt {k}" for k in range(6)]
    before = [(prompt, f" dull {k}", -0.25) for k, prompt in enumerate(prompts)]
    after = [(prompt, f" splendid {k}", 0.75) for k, prompt in enumerate(prompts)]
    lines = printed({"before": evaluation(0.1, before), "after": evaluation(0.5, after)})
    assert [line for line in lines if line.startswith("prompt")] == prompts[:4]
    for k in range(4):
        place = lines.index(prompts[k])
        assert lines[place + 1].split("  ")[0] == "before, reward -0.250"
        assert lines[place + 1].endswith("after, reward 0.750")
        assert lines[place + 2].split() == ["dull", str(k), "splendid", str(k)]
        assert lines[place + 1].index("after") == lines[place + 2].index("splendid")


def test_prompts_are_bold_on_a_terminal():
    lines = printed(
        {"after": evaluation(0.1, [("The film", "was", 0.1)])}, force_terminal=True, color_system="standard"
    )
    assert "\x1b[1mThe film\x1b[0m" in "\n".join(lines)


def test_long_text_wraps_and_loses_nothing():
    before = "word " * 30
    after = "z" * 150 + "日本語" * 20
    for width in (50, 80, 200):
        lines = printed(
            {
                "before": evaluation(0, [("long " * 40, before, 0)]),
                "after": evaluation(0, [("long " * 40, after, 0)]),
            },
            width=width,
        )
        text = "\n".join(lines)
        assert text.count("long") == 40 and text.count("word") == 30
        assert text.count("z") == 150 and sum(map(text.count, "日本語")) == 60


def test_a_completion_cannot_style_or_move_the_terminal():
    nasty = "\n[bold red]a[/bold red] :smile:\t\x1b[2J\x07\r\u202eb\u2028\x85[/nothing]\udc80"
    samples = [("[green]p[/green]\n", nasty, 0.1), ("[link=http://x]q", "", None)]
    lines = printed({"after": evaluation(0.1, samples)}, force_terminal=True, color_system=None)
    text = "\n".join(lines)
    assert "[green]p[/green]\\n" in text and "[link=http://x]q" in text
    assert "\\n[bold red]a[/bold red] :smile:\\t\\x1b[2J\\x07\\r\\u202eb\\u2028\\x85[/nothing]\\udc80" in text
    assert all(line.isprintable() for line in lines)
    assert "after, reward -" in lines and lines[-1] == "(empty)"


def test_a_poor_encoding_is_no_error():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    print_summary({"after": evaluation(0.1, [("café", "naïve 日", 0.1)])}, console, world="language")
    assert b"caf\\xe9" in raw.getvalue() and b"na\\xefve \\u65e5" in raw.getvalue()


def test_samples_without_their_counterpart_are_left_out():
    lines = printed({"before": evaluation(0, [("one", "a", 0)]), "after": evaluation(0, [("two", "b", 0)])})
    assert "one" not in lines and "two" not in lines


@pytest.mark.parametrize(
    ("text", "shown"), [("a b", "a b"), ("naïve — 日本", "naïve — 日本"), ("\x00\x7f", "\\x00\\x7f")]
)
def test_visible(text, shown):
    assert visible(text) == shown

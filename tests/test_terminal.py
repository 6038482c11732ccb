"""A line on the terminal is what was said, whatever the terminal can show."""

import io

import pytest
from rich.console import Console

from lm_trust.terminal import say

LINE = "runs/[bold]a[/bold]/:smile:/\u00e9 " + "x" * 200


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "\u00e9"), ("ascii", "\\xe9")])
def test_a_line_is_printed_as_it_is(encoding, shown):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    say(LINE, Console(file=file))
    assert file.buffer.getvalue().decode(encoding) == LINE.replace("\u00e9", shown) + "\n"


def test_without_a_console_it_goes_to_standard_output(capsys):
    say(LINE)
    assert capsys.readouterr().out == LINE + "\n"

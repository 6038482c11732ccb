"""Tables of completions: what the policy wrote in an iteration, whole in the run folder and in short on the terminal.

`completions/iteration-00000010.parquet` has a row a completion, and all files of a run have the same columns, so that
`pandas.read_parquet(run / "completions")` reads them as one:

    iteration, sample    the row in the batch; samples of one prompt follow one another
    prompt, completion   text
    reward               the weighted sum
    reward/NAME          each reward's own score, before its weight
    tokens               of the completion, the end of sequence included
    ended                false where the length limit cut it
    advantage            the mean over its tokens, as the update saw it
    reference_kl         exact KL(policy || reference), nats, the sum over its tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lm_trust.training.progress import format_number
from lm_trust.training.run_folder import RunFolder
from lm_trust.training.summary import WIDTH, visible
from lm_trust.verified_folder import replacing

SHOWN_PROMPT, SHOWN_COMPLETION = 60, 240  # characters

Samples = Mapping[str, Sequence[Any]]


def write_completions(folder: RunFolder, iteration: int, samples: Samples) -> None:
    """Write an iteration's table, whole or not at all.

    Args:
        folder: the run's.
        iteration: names the file.
        samples: B values a column, `prompt` among them.

    Raises:
        UserError: it cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    path = folder.completions(iteration)
    count = len(samples["prompt"])
    table = pyarrow.table({"iteration": [iteration] * count, "sample": list(range(count)), **samples})
    with folder.writing(str(path.relative_to(folder.path))), replacing(path) as temporary:
        parquet.write_table(table, temporary)


def show_completions(iteration: int, samples: Samples, count: int, console: Console) -> None:
    """Print the first `count` completions in at most 80 columns, prompt over completion, both cut to a few lines.

    Args:
        iteration: in the heading.
        samples: `prompt`, `completion` and `reward`, B values each; texts may hold anything.
        count: how many; 0 prints nothing.
        console: where to write; a live display on it stays below.
    """
    total = len(samples["prompt"])
    count = min(count, total)
    if not count:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for prompt, completion, reward in zip(
        *(samples[name][:count] for name in ("prompt", "completion", "reward")), strict=True
    ):
        # A prompt is continued at its end, so its end is what is shown.
        start = "..." if len(prompt) > SHOWN_PROMPT else ""
        table.add_row(Text("prompt", "dim"), Text(start + visible(prompt[-SHOWN_PROMPT:], console.encoding), "bold"))
        end = "..." if len(completion) > SHOWN_COMPLETION else ""
        shown = visible(completion[:SHOWN_COMPLETION].strip(" "), console.encoding) + end
        table.add_row(Text(f"reward {format_number(reward)}", "dim"), Text(shown) if shown else Text("(empty)", "dim"))
    heading = Text(f"Iteration {iteration}, {count} of {total} completions:", "bold")
    console.print(Group(heading, table), width=min(console.width, WIDTH), highlight=False)

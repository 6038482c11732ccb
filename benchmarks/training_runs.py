"""What `control_results.py` and `critics.py` share: runs that begin or go on, and a page that holds their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm_trust.arguments import split_overrides
from lm_trust.compare import running
from lm_trust.errors import UserError
from lm_trust.training.config import Config
from lm_trust.training.config_file import load_config
from lm_trust.training.config_leaves import MAY_DIFFER, differing_keys, leaves
from lm_trust.training.run_folder import RunFolder, is_finished

END = "<!-- end of table -->"


def own_and_passed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The script's own arguments, and those after `--`, for `lm-trust train`."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:cut]), list(arguments[cut + 1 :])


def begin_or_go_on(folder: Path, name: str) -> list[str]:
    """The options of `lm-trust train` for a run that is not finished; says which it is."""
    options = running.begin_or_go_on(folder)
    print(f"{name}: {'goes on' if options[0] == '--resume' else 'begins'}", flush=True)
    return options


def check_same_settings(folder: Path, config: Path, options: Sequence[str]) -> None:
    """A finished run of other settings would pass for one of these.

    Raises:
        UserError: names the folder and the first setting that differs; or the settings do not go together.
    """
    now = load_config(config, split_overrides(options)[1])
    keys = differing(load_config(folder / "config.yaml", check_files=False), now) if is_finished(folder) else []
    if keys:
        raise UserError(
            f"{folder}: {keys[0]} is not what {config} and the options say now; "
            "move or delete the folder to train it again"
        )


def differing(one: Config, other: Config, *may_differ: str) -> list[str]:
    """The keys in which two configs differ, without those that do not touch a run's course."""
    left, right = leaves(one.model_dump()), leaves(other.model_dump())
    return differing_keys(left, right, (*MAY_DIFFER, "evaluation.every", "evaluation.videos", *may_differ))


def train_seconds(folder: Path) -> float:
    """Seconds of rollouts and updates, over all sessions of the run."""
    return sum(line["iteration_seconds"] for line in RunFolder(folder).metrics())


def write_page(page: Path, script: str, text: str) -> None:
    """Put the text between the page's markers, which name the script.

    Raises:
        UserError: the page lacks them.
    """
    marker = f"<!-- table: written by {script} -->"
    before, begin, rest = (page.read_text(encoding="utf-8") if page.exists() else "").partition(marker)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page}: it lacks the lines {marker} and {END}, between which the table goes")
    page.write_text(f"{before}{marker}\n\n{text}\n\n{END}{after}", encoding="utf-8")

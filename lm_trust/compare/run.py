"""What `lm-trust compare` does: the runs, the limit, the one-update study, the page; each only where it is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lm_trust.compare.config import Comparison
from lm_trust.compare.report import PAGE, make_report, read_report, write_report
from lm_trust.compare.running import check_free, check_unchanged, train_cells
from lm_trust.errors import UserError
from lm_trust.training.config_file import dump
from lm_trust.training.run_folder import RunFolder, json_text


def compare(comparison: Comparison) -> int:
    """Make the comparison, or what is missing of it, and its page.

    A run that fails, or a stage, is reported in the page and does not stop the rest.

    Returns:
        The exit status: 0; 1 where something failed; 130 or 143 after a signal.

    Raises:
        UserError: the folder holds another comparison, is being written to, or cannot be written.
    """
    check_unchanged(comparison.cells)
    folder = RunFolder(comparison.output)
    with folder.claimed():
        check_free(comparison.cells)
        return _compare(comparison, folder)


def _compare(comparison: Comparison, folder: RunFolder) -> int:
    console = Console()

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    status = train_cells(comparison.cells, comparison.config.jobs, tell)
    limit = one_update = None
    if not status:
        limit = _stage("limit", folder, _limit_key(comparison), lambda: _limit(comparison), tell)
        one_update = _stage("one_update", folder, _study_key(comparison), lambda: _study(comparison), tell)
    report, rows = make_report(comparison, limit, one_update)
    write_report(comparison.output, report, rows)
    _write_page(comparison.output, report, rows)
    for sentence in report["summary"]:
        tell(f"- {sentence}")
    tell(f"Page: {comparison.output / PAGE}")
    failed = any(cell["status"] == "failed" for cell in report["cells"])
    return status or int(failed)


def replot(output: Path) -> int:
    """Make the page again from report.json and results.parquet.

    Raises:
        UserError: they are not there.
    """
    _write_page(output, *read_report(output))
    Console().print(f"Page: {output / PAGE}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _write_page(output: Path, report: dict[str, Any], rows: Any) -> None:
    from lm_trust.compare.page import write_page

    write_page(report, rows, output / PAGE)


def _stage(
    name: str, folder: RunFolder, key: Any, make: Callable[[], dict[str, Any]], tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """What a stage found, now or, for the same key, before; None where it is not asked for, or failed."""
    if key is None:
        return None
    path = folder.path / f"{name}.json"
    if path.is_file():
        noted = json.loads(path.read_text(encoding="utf-8"))
        if noted["of"] == key:
            return noted["found"]
    tell(f"{name.replace('_', '-')} ...")
    try:
        found = make()
    except UserError as error:
        tell(f"{name}: FAILED: {error}")
        return None
    folder.replace(path.name, json_text({"of": key, "found": found}))
    return json.loads(path.read_text(encoding="utf-8"))["found"]


def _limit_key(comparison: Comparison) -> Any:
    section = comparison.config.limit
    return section and [section.model_dump(), dump(comparison.cells[0].config)]


def _study_key(comparison: Comparison) -> Any:
    section = comparison.config.one_update
    return section and [section.model_dump(), *(dump(candidate.config) for candidate in comparison.candidates)]


def _limit(comparison: Comparison) -> dict[str, Any]:
    from lm_trust.compare.limit import limit_curves, reference_rewards
    from lm_trust.training.build import build_world

    trainer, section = build_world(comparison.cells[0].config).trainer, comparison.config.limit
    return limit_curves(reference_rewards(trainer.task, trainer.policy, section.prompts, section.samples))


def _study(comparison: Comparison) -> dict[str, Any]:
    from lm_trust.compare.one_update import one_update_study

    section = comparison.config.one_update
    return one_update_study(
        comparison.candidates,
        iterations_before=section.iterations_before,
        evaluations=section.evaluations,
    )

"""What `lm-trust compare` does: the runs, the limit, the one-update study, the page; each only where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lm_trust.compare.config import Comparison
from lm_trust.compare.report import PAGE, REPORT, RESULTS, make_report, read_report, write_report
from lm_trust.compare.running import check_free, check_unchanged, train_cells
from lm_trust.errors import UserError, error_text
from lm_trust.training.config_file import dump
from lm_trust.training.run_folder import RunFolder, json_text, read_json

# Of a run's configuration: what the reference's completions, their rewards and the held-out prompts depend on.
LIMIT_SECTIONS = {"seed", "model", "prompts", "rollout", "rewards", "evaluation"}


def compare(comparison: Comparison) -> int:
    """Make the comparison, or what is missing of it, and its page.

    A run that fails, or a stage, is reported in the page and does not stop the rest; the next time it is tried again.

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
    errors: dict[str, str] = {}
    limit, study = _limit_key(comparison), _study_key(comparison)
    if not status:
        _stage("limit", folder, limit, lambda: _limit(comparison), tell, errors)
        _stage("one_update", folder, study, lambda: _study(comparison), tell, errors)
    found = _noted("limit", folder, limit), _noted("one_update", folder, study)
    report, rows = make_report(comparison, *found, errors)
    write_report(comparison.output, report, rows)
    _write_page(comparison.output, report, rows)
    for sentence in report["summary"]:
        tell(f"- {sentence}")
    tell(f"Page: {comparison.output / PAGE}")
    failed = any(cell["status"] == "failed" for cell in report["cells"])
    return status or int(failed or bool(errors))


def replot(output: Path) -> int:
    """Make the page again from report.json and results.parquet.

    Raises:
        UserError: they are not there or lack something, or the page cannot be written.
    """
    from jinja2 import UndefinedError

    try:
        _write_page(output, *read_report(output))
    except (KeyError, UndefinedError) as error:  # as where they were edited by hand
        raise UserError(
            f"{output}: {REPORT} or {RESULTS} lacks something that the page shows ({error_text(error)}); "
            "run lm-trust compare without --plot-only, which makes them again"
        ) from error
    Console().print(f"Page: {output / PAGE}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _write_page(output: Path, report: dict[str, Any], rows: Any) -> None:
    from lm_trust.compare.page import write_page

    with RunFolder(output).writing(PAGE):
        write_page(report, rows, output / PAGE)


def _stage(
    name: str,
    folder: RunFolder,
    key: Any,
    make: Callable[[], dict[str, Any]],
    tell: Callable[[str], None],
    errors: dict[str, str],
) -> None:
    """Note what a stage finds, where it is asked for and not noted yet; why it failed goes into `errors`."""
    if key is None or _noted(name, folder, key) is not None:
        return
    tell(f"{name.replace('_', '-')} ...")
    try:
        found = make()
    except Exception as error:  # whatever it is, the runs are still worth their page
        errors[name] = error_text(error)
        tell(f"{name}: FAILED: {errors[name]}")
        return
    folder.replace(f"{name}.json", json_text({"of": key, "found": found}))


def _noted(name: str, folder: RunFolder, key: Any) -> dict[str, Any] | None:
    """What a stage found, now or earlier, for this key; None where it did not, or is not asked for."""
    path = folder.path / f"{name}.json"
    if key is None or not path.is_file():
        return None
    noted = read_json(path)
    return noted["found"] if noted["of"] == key else None


def _limit_key(comparison: Comparison) -> Any:
    """What the limit is of; how long the runs are and what trains them is not among it."""
    section, run = comparison.config.limit, comparison.cells[0].config
    # As JSON has it, in which a noted key comes back.
    return section and [section.model_dump(), run.model_dump(mode="json", include=LIMIT_SECTIONS)]


def _study_key(comparison: Comparison) -> Any:
    section = comparison.config.one_update
    return section and [section.model_dump(), *(dump(candidate.config) for candidate in comparison.candidates)]


def _limit(comparison: Comparison) -> dict[str, Any]:
    from lm_trust.compare.limit import limit_curves, reference_rewards
    from lm_trust.training.build import build_world

    config, section = comparison.cells[0].config, comparison.config.limit
    trainer = build_world(config).trainer
    try:
        found = limit_curves(reference_rewards(trainer.task, trainer.policy, section.prompts, section.samples))
        return found | {"evaluated_prompts": min(config.evaluation.count, len(trainer.task.heldout.ids))}
    finally:
        trainer.task.close()


def _study(comparison: Comparison) -> dict[str, Any]:
    from lm_trust.compare.one_update import one_update_study

    section = comparison.config.one_update
    return one_update_study(
        comparison.candidates,
        iterations_before=section.iterations_before,
        evaluations=section.evaluations,
    )

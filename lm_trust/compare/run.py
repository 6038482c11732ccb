"""What `lm-trust compare` does: the runs, the limit, the one-update study, the page; each only where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from lm_trust.compare.config import Comparison
from lm_trust.compare.report import PAGE, REPORT, RESULTS, make_report, read_report, write_report
from lm_trust.compare.running import changes, check_free, check_unchanged, train_cells
from lm_trust.errors import UserError, error_text
from lm_trust.terminal import say
from lm_trust.training.config import Config
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
    status = train_cells(comparison.cells, comparison.config.jobs, say)
    errors: dict[str, str] = {}
    stages = _stages(comparison)
    if not status:
        for stage in stages:
            _run_stage(stage, folder, errors)
    found = (_noted(stage, folder) for stage in stages)
    report, rows = make_report(comparison, *found, errors)
    write_report(comparison.output, report, rows)
    _write_page(comparison.output, report, rows)
    for sentence in report["summary"]:
        say(f"- {sentence}")
    say(f"Page: {comparison.output / PAGE}")
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
    say(f"Page: {output / PAGE}")
    return 0


def _write_page(output: Path, report: dict[str, Any], rows: Any) -> None:
    from lm_trust.compare.page import write_page

    with RunFolder(output).writing(PAGE):
        write_page(report, rows, output / PAGE)


class _Stage(NamedTuple):
    """What is found beside the runs, and noted in a file of that name.

    Attributes:
        name: of the stage.
        settings: its own section; None: it is not asked for.
        configs: the runs' that it is of.
        sections: those of their sections on which it depends; None: all.
        find: finds it.
    """

    name: str
    settings: BaseModel | None
    configs: list[Config]
    sections: set[str] | None
    find: Callable[[], dict[str, Any]]


def _stages(comparison: Comparison) -> list[_Stage]:
    config = comparison.config
    limited, studied = [comparison.cells[0].config], [candidate.config for candidate in comparison.candidates]
    return [
        _Stage("limit", config.limit, limited, LIMIT_SECTIONS, lambda: _limit(comparison)),
        _Stage("one_update", config.one_update, studied, None, lambda: _study(comparison)),
    ]


def _run_stage(stage: _Stage, folder: RunFolder, errors: dict[str, str]) -> None:
    """Note what a stage finds, where it is asked for and not noted yet; why it failed goes into `errors`."""
    name = stage.name
    if stage.settings is None or _noted(stage, folder) is not None:
        return
    say(f"{name.replace('_', '-')} ...")
    try:
        found = stage.find()
    except Exception as error:  # whatever it is, the runs are still worth their page
        errors[name] = error_text(error)
        say(f"{name}: FAILED: {errors[name]}")
        return
    configs = [config.model_dump(mode="json", include=stage.sections) for config in stage.configs]
    of = [stage.settings.model_dump(mode="json"), *configs]
    folder.replace(f"{name}.json", json_text({"of": of, "found": found}))


def _noted(stage: _Stage, folder: RunFolder) -> dict[str, Any] | None:
    """What a stage found, now or earlier, for these settings and runs; None where it did not, or is not asked for."""
    path = folder.path / f"{stage.name}.json"
    if stage.settings is None or not path.is_file():
        return None
    noted = read_json(path)
    return noted["found"] if _is_of(stage, *noted["of"]) else None


def _is_of(stage: _Stage, settings: Any, *configs: Any) -> bool:
    """Whether what was noted with these is of the stage: keys that a version did not have are at their defaults."""
    if len(configs) != len(stage.configs):
        return False
    pairs = []
    try:
        section = type(stage.settings).model_validate(settings)
        for config, noted in zip(stage.configs, configs, strict=True):
            rest = {} if stage.sections is None else config.model_dump(mode="json", exclude=stage.sections)
            pairs.append((type(config).model_validate(rest | noted, context={"saved": True}), config))
    except (TypeError, ValidationError):  # of a version that noted other things
        return False
    return section == stage.settings and not any(changes(before, config) for before, config in pairs)


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

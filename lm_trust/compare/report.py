"""A comparison's numbers put together: report.json for the page, results.parquet for people's own plots."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from lm_trust.compare.config import Comparison
from lm_trust.compare.frontier import Curve, by_rule, frontier, improvement_table, matched_table, reached_kls
from lm_trust.compare.results import curves_of, read_cell, same_start, side_by_side, table
from lm_trust.compare.summary import summarise
from lm_trust.errors import UserError
from lm_trust.training.config_file import dump
from lm_trust.training.config_yaml import write_yaml
from lm_trust.training.run_folder import RunFolder, json_text, read_json
from lm_trust.verified_folder import replacing

REPORT, RESULTS, PAGE = "report.json", "results.parquet", "report.html"
_GRID = 40  # KLs at which a rule's frontier is drawn
_PACKAGES = ("torch", "transformers", "peft", "gymnasium", "numpy", "scipy")


def make_report(
    comparison: Comparison,
    limit: dict[str, Any] | None,
    one_update: dict[str, Any] | None,
    errors: Mapping[str, str],
) -> tuple[dict[str, Any], pyarrow.Table]:
    """(report, results) from the run folders as they are, finished or not.

    Args:
        comparison: validated.
        limit, one_update: what the stages of these names found; None where there are none.
        errors: by the names of the stages that failed, in a line.
    """
    config, language = comparison.config, comparison.language
    results = [read_cell(cell) for cell in comparison.cells]
    curves = curves_of(results, language=language)
    kls, seeds = list(config.matched_kl), len(config.seeds)
    matched = matched_table(curves, kls, seeds=seeds)
    report = {
        "title": config.title or comparison.output.name.replace("_", " "),
        "world": "language" if language else "control",
        "x_label": "reference KL, nats a sequence" if language else "mean step KL, nats a step",
        "reward_label": "held-out reward" if language else "return of the final policy",
        "steps_label": "completion tokens" if language else "environment steps",
        "created": datetime.date.today().isoformat(),
        "versions": _versions(),
        "config": write_yaml(config.model_dump()),
        "cell_configs": {rule: dump(cell.config) for rule, cell in comparison.first_cells.items()},
        "rules": _rules(comparison),
        "seeds": config.seeds,
        "cells": [one.summary for one in results],
        "same_start": same_start(results),
        "trajectories": [one.trajectory for one in results if one.trajectory],
        "frontier": _frontier(curves, seeds),
        "matched": matched,
        "improvement": improvement_table(curves, kls, seeds=seeds),
        "limit": limit and limit | {"of_seed": _of_seed(comparison)},
        "one_update": one_update,
        "errors": dict(errors),
        "completions": side_by_side(results, _values_read(comparison, matched), config.seeds[0]) if language else [],
    }
    report["summary"] = summarise(report, curves)
    return report, table(results)


def _of_seed(comparison: Comparison) -> int | None:
    """The seed whose held-out prompts the limit is of; None where all seeds have the same ones, of a set of its own."""
    split = getattr(comparison.cells[0].config.prompts, "heldout", None) is None
    return comparison.config.seeds[0] if split and len(comparison.config.seeds) > 1 else None


def write_report(output: Path, report: dict[str, Any], rows: pyarrow.Table) -> None:
    """report.json and results.parquet, each whole or not at all.

    Raises:
        UserError: they cannot be written.
    """
    folder = RunFolder(output)
    folder.replace(REPORT, json_text(report))
    with folder.writing(RESULTS), replacing(output / RESULTS) as temporary:
        parquet.write_table(rows, temporary)


def read_report(output: Path) -> tuple[dict[str, Any], pyarrow.Table]:
    """What `write_report` wrote.

    Raises:
        UserError: it is not there, or not whole.
    """
    for name in (REPORT, RESULTS):
        if not (output / name).is_file():
            raise UserError(f"{output}: there is no {name} yet; run lm-trust compare without --plot-only")
    try:
        return read_json(output / REPORT), parquet.read_table(output / RESULTS)
    except (ValueError, OSError) as error:
        raise UserError(f"{output}: {REPORT} or {RESULTS} cannot be read ({error}); make them again") from error


def _rules(comparison: Comparison) -> list[dict[str, Any]]:
    first = comparison.first_cells
    return [
        {
            "name": name,
            "kind": first[name].config.update.kind,
            "knob": rule.knob,
            "values": rule.values,
            "bounded": hasattr(first[name].config.update, "max_kl"),
            "also": write_yaml(rule.also) if rule.also else None,
        }
        for name, rule in comparison.config.rules.items()
    ]


def _frontier(curves: Sequence[Curve], seeds: int) -> list[dict[str, Any]]:
    """Each rule over its own KLs: on a grid that all share, a rule that went far would leave the others no place."""
    entries = []
    for own in by_rule(curves).values():
        entries += frontier(own, reached_kls(own, _GRID, seeds=seeds), seeds=seeds)
    return entries


def _values_read(comparison: Comparison, matched: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The value of each rule's knob whose completions are shown: that of the largest KL it is compared at."""
    values = {rule: cell.value for rule, cell in comparison.first_cells.items()}
    chosen = {
        row["rule"]: row["value"] for row in sorted(matched, key=lambda row: row["kl"]) if row["mean"] is not None
    }
    return values | chosen


def _versions() -> dict[str, str]:
    versions = {"lm_trust": metadata.version("lm_trust"), "python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = metadata.version(package)
    return versions

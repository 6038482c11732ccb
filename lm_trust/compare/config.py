"""What `lm-trust compare` reads: one base run, what is varied in it, and where the rules are compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from lm_trust.compare.words import cell_name, knob_text
from lm_trust.errors import UserError
from lm_trust.training.config import Config, ConfigError, LanguageConfig
from lm_trust.training.config_file import load_compare_config, load_config
from lm_trust.training.config_learning import Count, Name, PositiveFloat, PositiveInt, Section, Seed
from lm_trust.training.config_leaves import differing_keys, leaves

_RULE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # it names a folder


class Rule(Section):
    """What a rule's runs have that the others' have not."""

    update: dict[str, Any] = Field(default_factory=dict, description="the update section of its runs, over the base's")
    also: dict[str, Any] = Field(
        default_factory=dict, description="other sections that differ, for comparisons of details; the page names them"
    )
    knob: Name | None = Field(None, description="dotted key that is swept; null: there is one run a seed")
    values: list[float] = Field(default_factory=list, description="what the knob is set to")


class Limit(Section):
    """Samples of the reference that the limit of reward per nat is estimated from."""

    prompts: PositiveInt = Field(
        24, description="held-out prompts, from the first; to tell a rule's share: as many as it is evaluated on"
    )
    samples: Annotated[PositiveInt, Field(ge=8)] = Field(128, description="completions of each")


class OneUpdate(Section):
    """One update by each rule and value of its knob, from the same checkpoint and the same rollout."""

    iterations_before: Count = Field(3, description="iterations of the first rule that lead to the checkpoint")
    evaluations: PositiveInt = Field(96, description="held-out completions or episodes, before and after")
    values: dict[Name, list[float]] = Field(
        default_factory=dict, description="values of a rule's knob here; a rule that is not named has those of its runs"
    )


class CompareConfig(Section):
    """A comparison of update rules."""

    output: Name | None = Field(None, description="the comparison's folder; null: runs/NAME of this file")
    title: Name | None = Field(None, description="of the page; null: from the output's name")
    base: Name = Field(description="a run's config, relative to this file")
    shared: dict[str, Any] = Field(default_factory=dict, description="changes of the base that all runs share")
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field([0, 1, 2], description="one run each of every cell")
    rules: Annotated[dict[Annotated[str, Field(pattern=_RULE_NAME)], Rule], Field(min_length=1)]
    matched_kl: list[PositiveFloat] = Field(
        default_factory=list, description="KLs at which rules are compared: reference KL (control: mean step KL)"
    )
    limit: Limit | None = Field(None, description="how a language run's limit is estimated; null: it is not")
    one_update: OneUpdate | None = Field(None, description="the one-update study; null: there is none")
    jobs: PositiveInt = Field(1, description="runs at a time, each with its share of the cores")

    @model_validator(mode="after")
    def _together(self) -> CompareConfig:
        problems = []
        for name, rule in self.rules.items():
            if (rule.knob is None) != (not rule.values):
                problems.append((f"rules.{name}.values", "a knob needs values, and values need a knob"))
            if len(set(map(knob_text, rule.values))) < len(rule.values):
                problems.append((f"rules.{name}.values", "the same value stands there twice, in six digits"))
            if name == "reference":
                problems.append((f"rules.{name}", "the page calls the start so; choose another name"))
            if "update" in rule.also:
                problems.append((f"rules.{name}.also", "the update section stands in update"))
            if "seed" in rule.also or rule.knob == "seed":  # its runs would pass for those of the other seeds
                problems.append((f"rules.{name}", "seed is what seeds sets, alike for all rules"))
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(("seeds", "the same seed stands there twice"))
        for name in self.one_update.values if self.one_update else ():
            if name not in self.rules or self.rules[name].knob is None:
                problems.append((f"one_update.values.{name}", "there is no rule of this name with a knob"))
        if problems:
            raise ConfigError(problems)
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        rule: its name.
        value: of the rule's knob; None where it has none.
        config: of the run, validated.
        folder: of the run.
    """

    rule: str
    value: float | None
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        return cell_name(self.rule, self.value, self.config.seed)


@dataclass(frozen=True)
class Candidate:
    """One rule at one value of its knob, in the one-update study.

    Attributes:
        rule: its name.
        knob: the dotted key that `value` is of; None where it has none.
        value: of the knob.
        config: of a run by it, validated.
    """

    rule: str
    knob: str | None
    value: float | None
    config: Config


@dataclass(frozen=True)
class Comparison:
    """A comparison, validated to its last cell.

    Attributes:
        config: what the file says.
        output: its folder.
        cells: every run, seed by seed, so that an early end leaves whole seeds, of which `--seeds` makes a page.
        candidates: of the one-update study.
    """

    config: CompareConfig
    output: Path
    cells: list[Cell]
    candidates: list[Candidate]

    @property
    def first_cells(self) -> dict[str, Cell]:
        """The first cell of each rule."""
        return {cell.rule: cell for cell in reversed(self.cells)}

    @property
    def language(self) -> bool:
        return isinstance(self.cells[0].config, LanguageConfig)


def load_comparison(
    path: str | os.PathLike, overrides: Sequence[tuple[str, str]] = (), output: str | None = None
) -> Comparison:
    """Read a comparison and the config of each of its runs.

    Args:
        path: the YAML file.
        overrides: (dotted key, YAML text) pairs over it.
        output: the comparison's folder, over the file's.

    Raises:
        UserError: one line for each problem, from this file or from a run's config; nothing has been started.
    """
    path = os.fspath(path)
    config = load_compare_config(path, CompareConfig, overrides)
    folder = Path(output or config.output or Path("runs") / Path(path).stem).expanduser()
    base = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(config.base)))
    cells = [
        Cell(name, value, _run_config(path, base, config, name, value, seed), _cell_folder(folder, name, value, seed))
        for seed in config.seeds
        for name, rule in config.rules.items()
        for value in rule.values or [None]
    ]
    comparison = Comparison(config, folder, cells, _candidates(path, base, config))
    if config.limit is not None and not comparison.language:
        raise UserError(f"{path}: limit: it is of reward per nat of reference KL, and a control run has no reference")
    return comparison


def _candidates(path: str, base: str, config: CompareConfig) -> list[Candidate]:
    if config.one_update is None:
        return []
    if any(rule.also for rule in config.rules.values()):
        raise UserError(f"{path}: one_update: needs rules that differ in their update section alone; remove it")
    candidates = [
        Candidate(name, rule.knob, value, _run_config(path, base, config, name, value, config.seeds[0]))
        for name, rule in config.rules.items()
        for value in config.one_update.values.get(name, rule.values) or [None]
    ]
    try:
        require_comparable(candidates)
    except ValueError as error:
        raise UserError(f"{path}: one_update: {error}; remove it") from None
    before, iterations = config.one_update.iterations_before, candidates[0].config.iterations
    if before >= iterations:
        raise UserError(
            f"{path}: one_update.iterations_before: must be less than the {iterations} iterations of a run, "
            f"got {before}"
        )
    return candidates


def require_comparable(candidates: Sequence[Candidate]) -> None:
    """The candidates of a one-update study differ in nothing but the update section (and the output folder).

    Raises:
        ValueError: there is none, or they differ in more.
    """
    if not candidates:
        raise ValueError("a one-update study needs a candidate")
    first, *others = (leaves(candidate.config.model_dump()) for candidate in candidates)
    for candidate, other in zip(candidates[1:], others, strict=True):
        differing = differing_keys(first, other, ("update.", "output"))
        if differing:
            raise ValueError(
                f"candidates differ in more than their update: {candidates[0].rule} has {differing[0]} "
                f"{first.get(differing[0])!r} and {candidate.rule} {other.get(differing[0])!r}"
            )


def _run_config(path: str, base: str, config: CompareConfig, name: str, value: float | None, seed: int) -> Config:
    rule = config.rules[name]
    place = f"{path}: rules.{name}"
    layers = [(f"{path}: shared", config.shared), (f"{path}: seeds", {"seed": seed}), (place, rule.also)]
    layers.append((place, {"update": rule.update}))
    if rule.knob is not None:
        nested: Any = value
        for part in reversed(rule.knob.split(".")):
            nested = {part: nested}
        layers.append((f"{place}.knob", nested))
    return load_config(base, layers=layers)


def _cell_folder(output: Path, rule: str, value: float | None, seed: int) -> Path:
    return output / "cells" / rule / (knob_text(value) or "run") / f"seed{seed}"

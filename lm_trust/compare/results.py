"""What the runs of a comparison left in their folders, as tables: of iterations, of cells, of held-out evaluations.

Divergence, the axis that rules are compared along, is the exact reference KL of the held-out completions in the
language world. A control run has no reference: there it is the mean exact step KL of its updates so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow

from lm_trust.compare.config import Cell
from lm_trust.compare.frontier import Curve
from lm_trust.compare.running import failure
from lm_trust.errors import UserError
from lm_trust.training.config import Config, LanguageConfig
from lm_trust.training.run_folder import Record, RunFolder, is_finished

FORWARD = 1 / 3  # of a gradient: a pass without the backward one, which costs twice as much


# The columns that are taken over from metrics.jsonl as they are.
_COPIED = {
    "iteration": pyarrow.int64(),
    "steps": pyarrow.int64(),
    "accepted": pyarrow.bool_(),
    "reward_mean": pyarrow.float64(),
    "reference_kl": pyarrow.float64(),
    "step_kl": pyarrow.float64(),
    "step_kl_max": pyarrow.float64(),
    "surrogate_gain": pyarrow.float64(),
    "predicted_gain": pyarrow.float64(),
    "entropy": pyarrow.float64(),
    "clip_fraction": pyarrow.float64(),
    "rollout_seconds": pyarrow.float64(),
    "update_seconds": pyarrow.float64(),
    "step_seconds": pyarrow.float64(),
}
_COLUMNS = {
    "rule": pyarrow.string(),
    "value": pyarrow.float64(),
    "seed": pyarrow.int64(),
    "bound": pyarrow.float64(),
    "seconds": pyarrow.float64(),
    "gradients": pyarrow.float64(),
    **_COPIED,
}


@dataclass(frozen=True)
class CellResult:
    """What is known of a cell.

    Attributes:
        summary: its line in report["cells"].
        rows: its lines in results.parquet.
        trajectory: its held-out evaluations, for report["trajectories"]; None where there is none.
        first_batch: numbers of the first batch, which is sampled before any update.
        samples: the held-out completions before and after (language).
    """

    cell: Cell
    summary: Record
    rows: list[Record]
    trajectory: Record | None
    first_batch: tuple[float | None, ...]
    samples: dict[str, list[Record]]


def gradients(line: Record, config: Config) -> float:
    """What an update cost in gradients of the whole batch: passes over its tokens, with the backward one counted.

    A Fisher product is counted as a gradient on its share of the rows, a candidate as a forward pass. With a budget the
    reference KL has a gradient of its own at the start: a backward pass more, and for a rule that steps by minibatches
    the objective's there as well. The pass that scores the batch under the policy that sampled it is common to all
    rules and not counted.

    Args:
        line: of metrics.jsonl.
        config: of its run.
    """
    update = config.update
    by_minibatches = "gradient_steps" in line
    if by_minibatches:
        spent = line["gradients_computed"] + FORWARD * line.get("forwards_computed", 0)
        spent /= getattr(update, "minibatches", 1)
    else:
        spent = 1 + (line.get("cg_iterations") or 0) * getattr(update, "fisher_fraction", 1.0)
    if isinstance(config, LanguageConfig) and config.reference.budget is not None:
        spent += (1 - FORWARD) + by_minibatches
    return spent + FORWARD * line["candidates"]


def read_cell(cell: Cell) -> CellResult:
    """A cell's results as far as its run has come.

    Raises:
        UserError: a file of its folder is not whole, or the metrics of a finished run are missing.
    """
    run = RunFolder(cell.folder) if cell.folder.is_dir() else None
    lines = run.metrics() if run else []
    bound = getattr(cell.config.update, "max_kl", None)
    spent = list(accumulate(gradients(line, cell.config) for line in lines))
    seconds = list(accumulate(line["iteration_seconds"] for line in lines))
    place = {"rule": cell.rule, "value": cell.value, "seed": cell.config.seed}
    rows = [
        # An annealed bound is less, update by update, than the config's.
        place
        | {"bound": line.get("max_kl", bound), "seconds": elapsed, "gradients": cost}
        | {key: line.get(key) for key in _COPIED}
        for line, elapsed, cost in zip(lines, seconds, spent, strict=True)
    ]
    sides = run.evaluation() if run else {}
    if "after" in sides and not lines:
        raise UserError(
            f"{cell.folder}: the run is finished and has no metrics.jsonl; take it back, or remove the folder"
        )
    evaluations = run.held_out() if run else []
    trajectory = _trajectory(evaluations, rows) if evaluations else None
    return CellResult(
        cell=cell,
        summary=place | _summary(cell, rows, sides.get("after"), bound),
        rows=rows,
        trajectory=trajectory and place | trajectory,
        first_batch=tuple(lines[0].get(key) for key in ("reward_mean", "entropy", "steps")) if lines else (),
        samples={side: record.get("samples", []) for side, record in sides.items()},
    )


def _summary(cell: Cell, rows: Sequence[Record], after: Record | None, bound: float | None) -> Record:
    error = failure(cell)
    status = "finished" if is_finished(cell.folder) else "failed" if error is not None else "missing"
    last = rows[-1] if rows else {}
    after = after or {}
    kept = [row["step_kl"] for row in rows]
    broken = [row["step_kl"] > row["bound"] for row in rows if row["bound"] is not None]
    return {
        "folder": str(cell.folder),
        "status": status,
        "error": error,
        "steps": last.get("steps"),
        "iterations": last.get("iteration"),
        "gradients": last.get("gradients"),
        "seconds": last.get("seconds"),
        "update_seconds": sum(row["update_seconds"] for row in rows) if rows else None,
        "step_seconds": sum(row["step_seconds"] for row in rows) if rows else None,
        "reward": after.get("reward_mean"),
        "reward_interval": after.get("reward_interval"),
        "reference_kl": after.get("reference_kl"),
        "step_kl": float(np.mean(kept)) if kept else None,
        "step_kl_mean_max": max(kept, default=None),
        "step_kl_max": max((row["step_kl_max"] for row in rows), default=None),
        "bound": bound,
        "violations": float(np.mean(broken)) if broken else None,
        "rejected": sum(row["accepted"] is False for row in rows),
    }


def _trajectory(evaluations: Sequence[Record], rows: Sequence[Record]) -> Record:
    step_kls = np.cumsum([row["step_kl"] for row in rows])
    at = {row["iteration"]: row for row in rows} | {0: {"steps": 0, "seconds": 0.0, "gradients": 0.0}}
    divergence = [
        line["reference_kl"]
        if "reference_kl" in line
        else float(step_kls[line["iteration"] - 1] / line["iteration"])
        if line["iteration"]
        else 0.0
        for line in evaluations
    ]
    return {
        "kl": divergence,
        "reward": [line["reward_mean"] for line in evaluations],
        **{key: [at[line["iteration"]][key] for line in evaluations] for key in ("steps", "seconds", "gradients")},
    }


def table(results: Iterable[CellResult]) -> pyarrow.Table:
    """results.parquet: a row an iteration of a cell."""
    rows = [row for one in results for row in one.rows]
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(_COLUMNS.items())))


def curves_of(results: Iterable[CellResult], *, language: bool) -> list[Curve]:
    """What rules are compared by: a language run's course, or the ends of a seed's control runs.

    A seed of a control comparison that lacks one of the rule's knob values has no curve: a line across what is missing
    would make it up.
    """
    if language:
        return [
            Curve(one.cell.rule, one.cell.value, one.cell.config.seed, *_arrays(one.trajectory), by_root=True)
            for one in results
            if _has_ended(one)
        ]
    sweeps: dict[tuple[str, int], list[CellResult]] = {}
    for one in results:
        sweeps.setdefault((one.cell.rule, one.cell.config.seed), []).append(one)
    curves = []
    for (rule, seed), sweep in sweeps.items():
        if all(map(_has_ended, sweep)):
            ends = sorted((one.trajectory["kl"][-1], one.trajectory["reward"][-1]) for one in sweep)
            curves.append(Curve(rule, None, seed, *np.array(ends, dtype=float).T))
    return curves


def _has_ended(one: CellResult) -> bool:
    return one.summary["status"] == "finished" and one.trajectory is not None


def _arrays(trajectory: Record) -> tuple[np.ndarray, np.ndarray]:
    return np.array(trajectory["kl"], dtype=float), np.array(trajectory["reward"], dtype=float)


def same_start(results: Sequence[CellResult]) -> Record:
    """Whether the rules' first batches agree, seed by seed: same weights, same prompts, same noise."""
    batches: dict[int, set[tuple]] = {}
    for one in results:
        if one.first_batch:
            batches.setdefault(one.cell.config.seed, set()).add(one.first_batch)
    checked = sum(1 for one in results if one.first_batch)
    return {"checked": checked, "equal": all(len(found) == 1 for found in batches.values())}


def side_by_side(results: Sequence[CellResult], chosen: dict[str, float | None], seed: int) -> list[Record]:
    """Completions of the same held-out prompts by the reference and by every rule at its chosen value.

    Args:
        results: of the comparison.
        chosen: each rule's value.
        seed: whose runs.
    """
    runs = {
        one.cell.rule: one
        for one in results
        if one.cell.config.seed == seed and one.cell.value == chosen[one.cell.rule] and one.samples.get("after")
    }
    if not runs:
        return []
    texts = {rule: _by_prompt(one.samples["after"]) for rule, one in runs.items()}
    before = max((one.samples["before"] for one in runs.values()), key=len)
    return [
        {
            "prompt": sample["prompt"],
            "reference": {key: sample[key] for key in ("completion", "reward")},
            "rules": {
                rule: {
                    **{key: texts[rule][place][key] for key in ("completion", "reward")},
                    "value": one.cell.value,
                    "kl": one.summary["reference_kl"],
                }
                for rule, one in runs.items()
                if place in texts[rule]
            },
        }
        for place, sample in _by_prompt(before).items()
    ]


def _by_prompt(samples: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """Samples by their prompt and how many before them have it: a rule may be evaluated on others, or on fewer."""
    seen: Counter[str] = Counter()
    places = {}
    for sample in samples:
        places[sample["prompt"], seen[sample["prompt"]]] = sample
        seen[sample["prompt"]] += 1
    return places

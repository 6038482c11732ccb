"""The report's tables and its completions, as rows of text for the template; what is missing is a dash."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from lm_trust.compare.frontier import limit_at, unfinished_runs
from lm_trust.compare.statistics import known
from lm_trust.compare.words import cell_name, knob_text, nats_text, number_text
from lm_trust.training.run_folder import Record

LEVEL = 0.05  # of the test by which a rule is shown as ahead of another
MISSING = "\u2013"  # a dash


def number(value: Any) -> str:
    """Three digits, or all that are before the point; a dash for what is not a finite number."""
    if not known(value):
        return MISSING
    return number_text(value).replace("-", "\u2212")  # the minus sign is as wide as a digit


def estimate(value: Any, low: Any, high: Any) -> str:
    """A value with its interval, or without where there is none."""
    if not known(value) or not known(low) or not known(high):
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def matched(report: Record) -> list[dict[str, Any]]:
    """The rules at each KL, as {"kl", "rows"}; the last row of a KL is what it can buy at most, where that is known."""
    # In control a seed's curve begins at its run of the least KL, so that one may lie beyond this KL.
    missed = "outside the runs of" if report.get("world") == "control" else "not reached by"
    groups = []
    for kl in sorted({row["kl"] for row in report.get("matched") or ()}):
        rows = []
        for row in report["matched"]:
            if row["kl"] == kl:
                seeds, reached = row["seeds"], row["reached"]
                mean = estimate(row["mean"], row["low"], row["high"])
                iqm = estimate(row["iqm"], row["iqm_low"], row["iqm_high"])
                if row["mean"] is None:
                    mean, iqm = _why_none(report, row["rule"], f"{missed} {seeds - reached} of {seeds} seeds"), MISSING
                rows.append([row["rule"], mean, iqm, knob_text(row["value"]) or MISSING, str(seeds)])
        of_runs, seeds = {row[0] for row in rows}, len(report.get("seeds") or ())
        for rule in report.get("rules") or ():
            if rule["name"] not in of_runs:  # it has no curve
                why = _why_none(report, rule["name"], f"{missed} {seeds} of {seeds} seeds")
                rows.append([rule["name"], why, MISSING, MISSING, str(seeds)])
        groups.append({"kl": nats_text(kl), "rows": rows, "limit": _most(report, kl)})
    return groups


def _why_none(report: Record, rule: str, missed: str) -> str:
    """Why a rule has no mean at a KL: its runs missed it, unless some have not finished and might not have."""
    unfinished = unfinished_runs(report, rule)
    return f"{unfinished} run{'' if unfinished == 1 else 's'} not finished" if unfinished else missed


def _most(report: Record, kl: float) -> str | None:
    limit = limit_at(report.get("limit"), kl)
    return limit and estimate(limit["reward"], limit["low"], limit["high"])


def improvement(report: Record) -> list[dict[str, Any]]:
    """A matrix a KL of P(row's rule > column's rule), as {"kl", "rules", "rows"}; a cell is (text, side).

    The side is "ahead" or "behind" where the exact test of the pair says that they are not alike, else "".
    """
    matrices = []
    rows = report.get("improvement") or ()
    for kl in sorted({row["kl"] for row in rows}):
        cells = {(row["rule"], row["other"]): row for row in rows if row["kl"] == kl}
        rules = list(dict.fromkeys(rule for pair in cells for rule in pair))
        matrices.append({
            "kl": nats_text(kl),
            "rules": rules,
            "rows": [(rule, [_wins(cells.get((rule, other))) for other in rules]) for rule in rules],
        })  # fmt: skip
    return matrices


def _wins(row: Record | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    side = "ahead" if row["probability"] > 0.5 else "behind"
    certain = known(row.get("p_value")) and row["p_value"] < LEVEL
    return estimate(row["probability"], row["low"], row["high"]), side if certain else ""


def study(report: Record) -> list[dict[str, Any]]:
    """The one-update study, as {"rule", "error", "cells"}."""
    rows = []
    for row in (report.get("one_update") or {}).get("rows") or ():
        within = {True: "yes", False: "no"}.get(row.get("within"), MISSING)
        cells = [
            knob_text(row.get("value")) or MISSING,
            "yes" if row.get("accepted") else "no",
            number(row.get("batch_gain")),
            number(row.get("predicted_gain")),
            estimate(row.get("fresh_gain"), row.get("fresh_low"), row.get("fresh_high")),
            estimate(row.get("improvement"), row.get("improvement_low"), row.get("improvement_high")),
            number(row.get("step_kl")),
            number(row.get("step_kl_max")),
            number(row.get("bound")),
            within,
            number(row.get("reference_kl")),
            number(row.get("seconds")),
        ]
        rows.append({"rule": row["rule"], "error": row.get("error"), "cells": cells})
    return rows


def cells(report: Record) -> list[dict[str, Any]]:
    """Every run, as {"rule", "status", "cells"}."""
    rows = []
    for cell in report.get("cells") or ():
        low, high = cell.get("reward_interval") or (None, None)
        share = cell.get("violations")
        texts = [
            knob_text(cell.get("value")) or MISSING,
            str(cell["seed"]),
            cell["status"],
            number(cell.get("iterations")),
            number(cell.get("steps")),
            number(cell.get("gradients")),
            number(cell.get("seconds")),
            number(cell.get("step_seconds")),
            estimate(cell.get("reward"), low, high),
            number(cell.get("reference_kl")),
            number(cell.get("step_kl")),
            number(cell.get("step_kl_max")),
            number(cell.get("bound")),
            f"{share:.1%}" if known(share) else MISSING,
            number(cell.get("rejected")),
        ]
        rows.append({"rule": cell["rule"], "status": cell["status"], "cells": texts})
    return rows


def failures(report: Record) -> list[tuple[str, str]]:
    """(which run, what it said) of the runs that failed."""
    return [
        (cell_name(cell["rule"], cell.get("value"), cell["seed"]), cell.get("error") or "no message")
        for cell in report.get("cells") or ()
        if cell["status"] == "failed"
    ]


def completions(report: Record, rules: Sequence[str]) -> list[dict[str, Any]]:
    """The held-out prompts with what each rule made of them, as {"prompt", "texts", "rewards"}.

    A text is {"rule", "note", "completion", "reward"}; the reference's has no rule. `rewards` has the finite ones. A
    completion's first space, which joins it to the prompt, is left out.
    """
    cards = []
    for entry in report.get("completions") or ():
        given = entry.get("rules") or {}
        found = [(None, "the start", entry["reference"])] if entry.get("reference") else []
        found += [(rule, _note(given[rule]), given[rule]) for rule in rules if given.get(rule)]
        texts = [
            {
                "rule": rule,
                "note": note,
                "completion": printable(text["completion"].removeprefix(" ")),
                "reward": number(text["reward"]),
            }
            for rule, note, text in found
        ]
        rewards = {rule or "reference": text["reward"] for rule, _, text in found if known(text["reward"])}
        cards.append({"prompt": printable(entry["prompt"]), "texts": texts, "rewards": rewards})
    return cards


def _note(text: Record) -> str:
    kl = nats_text(text["kl"]) if known(text.get("kl")) else ""
    return ", ".join(part for part in (knob_text(text.get("value")), kl) if part)


def printable(text: str) -> str:
    """The text with escapes for what could not be seen or would turn its neighbours round.

    These are control characters other than tabs and line ends, halves of surrogate pairs, and overrides of direction.
    """
    return "".join(
        character.encode("unicode_escape").decode("ascii") if _is_escaped(character) else character
        for character in text
    )


def _is_escaped(character: str) -> bool:
    hidden = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return hidden or unicodedata.bidirectional(character) in ("LRO", "RLO")

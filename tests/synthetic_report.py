"""A comparison's report and results table with made-up numbers, and everything that can be missing or nasty in one."""

import math

import numpy as np
import pyarrow

from lm_trust.compare.limit import limit_curves

SEEDS = [0, 1, 2]
RULES = {  # name: (knob, values, bounded, how good it is)
    "trpo": ("update.max_kl", [0.01, 0.03], True, 0.9),
    "ppo_clip": ("update.learning_rate", [1e-4, 3e-4], False, 1.0),
    "ppo_trust": ("update.max_kl", [0.006, 0.015], True, 1.15),
    "ppo_penalty": ("update.target_kl", [0.01], False, 0.85),
    "reinforce": (None, [], False, 0.5),
}
NASTY = [
    "</script><script>document.title = 'broken'</script>",
    "<img src=x onerror=\"document.title = 'broken'\">",
    "\u202ereversed\u2028line\x00nul \ud800 half & <b>bold</b> {{ 7 * 7 }} \"quoted\" 'single'",
    "<!--<script>",
]
FILMS = ("comedy", "thriller", "musical", "western", "drama", "documentary")
PRAISE = ("wonderful and warm", "a joy from start to end", "quite good", "long", "a sad waste of time", "about trains")


def synthetic_report(world="language", *, seeds=SEEDS, iterations=16, prompts=30):
    """(report, results) of `world`; the last run of reinforce failed."""
    language = world == "language"
    random = np.random.default_rng(0)
    cells, trajectories, rows = [], [], []
    for rule, (_, values, bounded, skill) in RULES.items():
        for value in values or [None]:
            for seed in seeds:
                place = {"rule": rule, "value": value, "seed": seed}
                if rule == "reinforce" and seed == seeds[-1]:
                    cells.append(_failed(place))
                    continue
                course, run = _run(place, bounded, skill, random, iterations, language)
                rows += run
                trajectories.append(place | course)
                cells.append(_finished(place, course, run))
    report = {
        "title": "Sentiment, 5 rules" if language else "CartPole, 5 rules",
        "world": world,
        "x_label": "reference KL, nats a sequence" if language else "mean step KL, nats a step",
        "reward_label": "held-out reward" if language else "return of the final policy",
        "steps_label": "completion tokens" if language else "environment steps",
        "created": "2026-11-21",
        "versions": {"lm_trust": "0.1.0", "python": "3.11.9", "torch": "2.13.0"},
        "config": "seeds: [0, 1, 2]\n# </pre><script>document.title = 'broken'</script>\n",
        "cell_configs": {rule: f"update:\n  kind: {rule}\n" * 20 for rule in RULES},
        "rules": [_rule(name) for name in RULES],
        "seeds": list(seeds),
        "cells": cells,
        "same_start": {"checked": len(trajectories), "equal": True},
        "trajectories": trajectories,
        "frontier": [_frontier(rule, len(seeds), language) for rule in RULES],
        "matched": [_matched(rule, kl, len(seeds)) for kl in (1.0, 2.0, 4.0) for rule in RULES] if language else [],
        "improvement": [_improvement(one, two) for one in RULES for two in RULES if one != two] if language else [],
        "limit": _limit(random) if language else None,
        "one_update": _study(random) if language else None,
        "completions": _completions(random, prompts) if language else [],
        "summary": [
            f"{len(trajectories)} of {len(cells)} runs finished: 5 update rules, {len(seeds)} seeds.",
            "At 2 nats of reference KL ppo_trust has the highest mean reward, 0.512 [0.481, 0.54].",
            "There its lead over ppo_clip and trpo is not supported: the interval of it holds zero.",
            "trpo kept its bound on the exact step KL in every one of 96 updates.",
        ],
    }
    return report, pyarrow.Table.from_pylist(rows)


def _limit(random):
    return limit_curves(random.normal(0.2, 0.4, (24, 128)).clip(-1, 1)) | {"evaluated_prompts": 24, "of_seed": None}


def _rule(name):
    knob, values, bounded, _ = RULES[name]
    return {"name": name, "kind": name, "knob": knob, "values": values, "bounded": bounded, "also": None}


def _failed(place):
    unknown = dict.fromkeys((
        "steps", "iterations", "gradients", "seconds", "update_seconds", "step_seconds", "reward", "reward_interval",
        "reference_kl", "step_kl", "step_kl_max", "bound", "violations",
    ))  # fmt: skip
    error = "rewards[0]: returned NaN for <img src=x onerror=\"document.title = 'broken'\">"
    return {**place, **unknown, "folder": "cells/reinforce/run/seed2", "status": "failed", "error": error}


def _run(place, bounded, skill, random, iterations, language):
    rule, value = place["rule"], place["value"]
    size = {"ppo_clip": 60, "ppo_penalty": 1.2}.get(rule, 1.0) * (value or 0.01)
    steps = seconds = gradients = travelled = 0.0
    rows, course = [], {"kl": [0.0], "reward": [0.16], "steps": [0], "seconds": [0.0]}
    for iteration in range(1, iterations + 1):
        step_kl = size * (random.uniform(0.7, 0.99) if bounded else random.lognormal(0, 0.6))
        accepted = not (rule == "trpo" and iteration == 5)
        step_kl *= accepted
        travelled += 12 * step_kl * random.uniform(0.8, 1.2)
        steps, seconds = steps + 600 + random.integers(40), seconds + random.uniform(9, 12)
        cost = {"trpo": 3.0, "reinforce": 1.0}.get(rule, 4.7)
        gradients += cost
        reward = 0.16 + 0.4 * skill * (1 - math.exp(-travelled / 2)) + random.normal(0, 0.03)
        predicted = 0.05 * math.sqrt(step_kl / 0.01) if rule in ("trpo", "ppo_trust") else None
        rows.append({
            **place, "iteration": iteration, "steps": int(steps), "seconds": seconds, "gradients": gradients,
            "reward_mean": reward, "reference_kl": travelled if language else None, "step_kl": step_kl,
            "step_kl_max": 9 * step_kl, "bound": value if bounded else None, "accepted": accepted,
            "surrogate_gain": 0.04 * math.sqrt(step_kl / 0.01) + random.normal(0, 0.004),
            "predicted_gain": predicted, "entropy": 2.0,
            "clip_fraction": 10 * step_kl if rule in ("ppo_clip", "ppo_trust") else None, "rollout_seconds": 8.0,
            "update_seconds": cost * random.uniform(0.5, 0.6), "step_seconds": 0.4 * cost,
        })  # fmt: skip
        if iteration % 4 == 0:
            kl = travelled if language else step_kl
            for key, entry in (("kl", kl), ("reward", reward), ("steps", int(steps)), ("seconds", seconds)):
                course[key].append(entry)
    return course, rows


def _finished(place, course, run):
    reward, kls = course["reward"][-1], [row["step_kl"] for row in run]
    bound = run[0]["bound"]
    return {
        **place, "folder": f"cells/{place['rule']}/{place['value']}/seed{place['seed']}", "status": "finished",
        "error": None, "steps": run[-1]["steps"], "iterations": len(run), "gradients": run[-1]["gradients"],
        "seconds": run[-1]["seconds"], "update_seconds": sum(row["update_seconds"] for row in run),
        "step_seconds": sum(row["step_seconds"] for row in run), "reward": reward,
        "reward_interval": [reward - 0.09, reward + 0.09], "reference_kl": run[-1]["reference_kl"],
        "step_kl": float(np.mean(kls)), "step_kl_mean_max": max(kls), "step_kl_max": 9 * max(kls), "bound": bound,
        "violations": None if bound is None else 0.0,
    }  # fmt: skip


def _frontier(rule, seeds, language):
    _, values, _, skill = RULES[rule]
    kls = np.linspace(0, 5 if rule == "ppo_clip" else 3.2, 30) if language else np.geomspace(0.002, 0.05, 20)
    reward = 0.16 + 0.4 * skill * (1 - np.exp(-kls / (2 if language else 0.01)))
    half = 0.01 + 0.04 * np.linspace(0, 1, len(kls))
    several = seeds > 1
    return {
        "rule": rule, "kl": kls.tolist(), "reward": reward.tolist(),
        "low": (reward - half).tolist() if several else [None] * len(kls),
        "high": (reward + half).tolist() if several else [None] * len(kls),
        "value": [values[-1] if values and language else None] * len(kls),
    }  # fmt: skip


def _matched(rule, kl, seeds):
    _, values, _, skill = RULES[rule]
    row = {"kl": kl, "rule": rule, "value": values[-1] if values else None, "seeds": seeds}
    keys = ("mean", "low", "high", "iqm", "iqm_low", "iqm_high")
    if kl == 4.0 and rule != "ppo_clip":
        return row | {"reached": 1} | dict.fromkeys(keys)
    mean = 0.16 + 0.4 * skill * (1 - math.exp(-kl / 2))
    ends = (mean - 0.03, mean + 0.03) if seeds > 1 else (None, None)
    return row | {"reached": seeds} | dict(zip(keys, (mean, *ends, mean, *ends), strict=True))


def _improvement(one, two):
    better = RULES[one][3] - RULES[two][3]
    wins = min(max(0.5 + better, 0.0), 1.0)
    low, high = (round(end, 3) for end in (max(wins - 0.25, 0.0), min(wins + 0.25, 1.0)))
    return {"kl": 1.0, "rule": one, "other": two, "probability": wins, "low": low, "high": high, "p_value": 0.1}


def _study(random):
    rows = []
    for rule, (knob, values, bounded, skill) in RULES.items():
        for value in values or [None]:
            kl = (value or 0.01) * (60 if rule == "ppo_clip" else 0.95)
            batch = 0.06 * math.sqrt(kl / 0.01)
            fresh, gain = 0.7 * batch * skill, 0.05 * skill * math.sqrt(kl / 0.01) + random.normal(0, 0.005)
            rows.append({
                "rule": rule, "knob": knob, "value": value, "batch_gain": batch, "fresh_gain": fresh,
                "fresh_low": fresh - 0.02, "fresh_high": fresh + 0.02, "improvement": gain,
                "improvement_low": gain - 0.03, "improvement_high": gain + 0.03, "step_kl": kl, "step_kl_max": 9 * kl,
                "reference_kl": None, "bound": value if bounded else None, "within": True if bounded else None,
                "predicted_gain": 1.1 * batch if bounded else None, "accepted": True, "seconds": 2.1, "error": None,
            })  # fmt: skip
    broken = dict.fromkeys(rows[0]) | {"rule": "reinforce", "accepted": False, "error": "boom <script>"}
    return {"iterations_before": 3, "rows": [*rows, broken]}


def _completions(random, count):
    entries = []
    for number in range(count):
        texts = {}
        for rule, (_, values, _, skill) in RULES.items():
            nasty = NASTY[number] if number < len(NASTY) and rule == "trpo" else None
            text = nasty or f" it was {PRAISE[random.integers(len(PRAISE))]}, said {rule} of number {number}."
            reward = float(random.normal(0.3 * skill, 0.4))
            texts[rule] = {"completion": text, "reward": reward, "value": values[-1] if values else None, "kl": 2.4}
        if number == 5:
            del texts["reinforce"]
        if number == 6:
            texts["trpo"]["reward"] = None
        start = {"completion": " it was long.", "reward": float(random.normal(0.1, 0.3))}
        prompt = f"I saw the new {FILMS[number % len(FILMS)]} number {number} and"
        entries.append({"prompt": prompt, "reference": start, "rules": texts})
    return entries

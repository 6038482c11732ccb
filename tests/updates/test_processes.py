"""An update whose batch is spread over processes is that of one process on the whole batch."""

import pytest
import torch
from spread import Workers
from tiny_policies import KINDS, MASK, B, Policy, batch_for, moved, vector_of

from lm_trust.core.processes import share_of
from lm_trust.updates import (
    TRPO,
    DivergenceMask,
    NaturalGradient,
    PPOClip,
    PPOPenalty,
    PPOTrust,
    Projection,
    Reinforce,
    TRPOPenalty,
)

ADAM = {"learning_rate": 0.01, "epochs": 2, "minibatches": 3}
RULES = {
    "trpo": (TRPO, {}),
    "trpo_part_of_the_fisher": (TRPO, {"fisher_fraction": 0.4, "cg_iterations": 3}),
    "trpo_one_row_of_the_fisher": (TRPO, {"fisher_fraction": 0.1, "cg_iterations": 3}),
    "trpo_microbatches": (TRPO, {"microbatch_size": 1}),
    "trpo_finite_difference": (TRPO, {"fisher_method": "finite_difference", "cg_iterations": 3}),
    "trpo_kl_hessian": (TRPO, {"fisher_method": "kl_hessian"}),
    "trpo_preconditioned": (TRPO, {"preconditioner": "gradient", "cg_iterations": 2}),
    "trpo_holdout": (TRPO, {"holdout_fraction": 0.4}),
    "trpo_reference": (TRPO, {"reference_loss": 0.3}),
    "trpo_budget": (TRPO, {"reference_budget": 0.05}),
    "natural_gradient": (NaturalGradient, {}),
    "reinforce": (Reinforce, {"learning_rate": 0.01}),
    "ppo_clip": (PPOClip, {**ADAM, "clip": 0.005}),
    "ppo_clip_target": (PPOClip, {**ADAM, "target_kl": 2e-5, "epochs": 8}),
    "ppo_clip_entropy": (PPOClip, {**ADAM, "entropy": 0.1, "microbatch_size": 1}),
    "ppo_clip_budget": (PPOClip, {**ADAM, "reference_budget": 0.05, "epochs": 8}),
    "ppo_clip_reference": (PPOClip, {**ADAM, "reference_loss": 0.3}),
    "ppo_penalty": (PPOPenalty, {**ADAM, "target_kl": 1e-4}),
    "ppo_trust": (PPOTrust, {**ADAM, "max_kl": 1e-4}),
    "trpo_penalty": (TRPOPenalty, ADAM),
    "trpo_penalty_theoretical": (TRPOPenalty, {**ADAM, "coefficient": None, "gamma": 0.1}),
    "projection": (Projection, {**ADAM, "token_kl": 1e-4}),
    "divergence_mask": (DivergenceMask, {**ADAM, "threshold": 1e-4}),
}


@pytest.fixture(scope="module")
def workers():
    with Workers(4) as workers:
        yield workers


def updated(name, kind, flat, dtype):
    """Two updates in a row on this process's rows; parameters and reports."""
    make, settings = RULES[name]
    policy, reference = Policy(kind), moved(Policy(kind), 0.02)
    whole = batch_for(policy, reference=reference)
    policy, rule, reports = policy.to(dtype), make(**settings), []
    for _ in range(2):
        own = whole[share_of(B).slice]
        # As a model pads: to the longest row here, which is not that of another process.
        width = max(int(own.mask.sum(-1).max()), 1)
        own = cut(own, width, dtype)
        reports.append(rule.step(policy, own.flattened() if flat else own))
    return vector_of(policy), [report.as_metrics() for report in reports]


def cut(batch, width, dtype):
    def first(distribution):
        return type(distribution)(
            *(part.to(dtype) for part in distribution[:, :width].parameters), *sizes(distribution)
        )

    def sizes(distribution):
        return [distribution.sizes] if hasattr(distribution, "sizes") else []

    return type(batch)(
        observations=batch.observations[:, :width].to(dtype),
        actions=batch.actions[:, :width]
        if not batch.actions.is_floating_point()
        else batch.actions[:, :width].to(dtype),
        old=first(batch.old),
        old_log_prob=batch.old_log_prob[:, :width].to(dtype),
        advantages=batch.advantages[:, :width].to(dtype),
        mask=batch.mask[:, :width],
        reference=first(batch.reference),
    )


def assert_alike(one, other, tolerance):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, float) and key != "cg_residual":
            assert other[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
        elif key != "cg_residual":
            assert other[key] == value, key


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "categorical") for name in RULES]
    + [(name, kind) for name in ("trpo", "ppo_clip", "ppo_penalty", "projection") for kind in KINDS[1:]],
)
def test_two_and_four_processes_take_the_step_of_one(workers, name, kind):
    expected, reports = updated(name, kind, False, torch.float64)
    assert any(report["accepted"] for report in reports) or name == "trpo_holdout"
    for count in (2, 4):
        for vector, spread in workers.run(updated, count, name, kind, False, torch.float64):
            torch.testing.assert_close(vector, expected, rtol=0, atol=1e-8)
            for one, other in zip(reports, spread, strict=True):
                assert_alike(one, other, 1e-6)


@pytest.mark.parametrize("name", ["trpo", "ppo_clip", "ppo_trust", "trpo_penalty", "reinforce"])
@pytest.mark.parametrize(("flat", "dtype"), [(True, torch.float64), (False, torch.float32)], ids=["flat", "float32"])
def test_single_steps_and_float32(workers, name, flat, dtype):
    expected, reports = updated(name, "gaussian", flat, dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    for vector, spread in workers.run(updated, 4, name, "gaussian", flat, dtype):
        torch.testing.assert_close(vector, expected, rtol=0, atol=tolerance)
        for one, other in zip(reports, spread, strict=True):
            assert one["accepted"] == other["accepted"]
            assert other["step_fraction"] == pytest.approx(one["step_fraction"], rel=tolerance)
            assert other["step_kl"] == pytest.approx(one["step_kl"], rel=100 * tolerance)


def test_the_processes_hold_the_same_bits(workers):
    for name in ("trpo", "ppo_clip"):
        vectors = [vector for vector, _ in workers.run(updated, 4, name, "categorical", False, torch.float32)]
        assert all(torch.equal(vector, vectors[0]) for vector in vectors)


def updated_on_rows_that_are_alike():
    policy = Policy()
    whole = batch_for(policy, mask=None)[torch.zeros(B, dtype=torch.long)]
    rule = TRPOPenalty(learning_rate=0.01, epochs=3, minibatches=1, coefficient=3.0)
    rule.step(policy, whole[share_of(B).slice])
    return vector_of(policy)


def test_the_step_that_is_furthest_off_counts_once_where_several_processes_have_it(workers):
    for vector in workers.run(updated_on_rows_that_are_alike, 2):
        torch.testing.assert_close(vector, updated_on_rows_that_are_alike(), rtol=0, atol=1e-8)


def test_the_shares_are_uneven():
    """Otherwise means of means would pass these tests."""
    counts = MASK.sum(-1)
    assert counts[:4].sum() != counts[4:].sum() and counts[6] == 0

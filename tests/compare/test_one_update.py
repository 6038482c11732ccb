"""The one-update study: one start for all, paired numbers that separate computations confirm, and failures on rows."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_runs import prepare, write_config

from lm_trust.compare import one_update as module
from lm_trust.compare.config import Candidate
from lm_trust.compare.fresh_samples import _clusters, clustered_mean, fresh_gain, paired_improvement
from lm_trust.compare.one_update import one_update_study
from lm_trust.core.objective import SurrogateObjective
from lm_trust.errors import UserError
from lm_trust.training.build import build_world
from lm_trust.training.config import ControlConfig
from lm_trust.training.config_file import load_config

ADAM = {"epochs": 2, "minibatches": 2}
UPDATES = {
    "trpo": {"kind": "trpo", "max_kl": 0.05, "cg_iterations": 3},
    "ppo_trust": {"kind": "ppo_trust", **ADAM, "learning_rate": 0.05, "max_kl": 0.001},
    "ppo_clip": {"kind": "ppo_clip", **ADAM, "learning_rate": 0.02},
    "reinforce": {"kind": "reinforce", "learning_rate": 0.02},
}
COMMON = {
    "iterations": 5,
    "rollout": {"batch_size": 8, "max_new_tokens": 5, "microbatch_size": 3},
    "reference": {"loss": 0.2, "budget": 5.0},
    "critic": {"kind": "reference_head", "hidden": [4], "epochs": 1, "minibatches": 1},
}
CARTPOLE = {
    "total_steps": 400,
    "environment": {"id": "CartPole-v1", "count": 4},
    "policy": {"hidden": [8]},
    "rollout": {"steps": 20},
    "normalise": {"observations": True, "rewards": True},
    "critic": {"kind": "mlp", "hidden": [4], "epochs": 1},
    "trackers": [],
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    prepare(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield


def language(name, **sections):
    return Candidate(name, "update.x", 1.0, load_config(write_config(update=UPDATES[name], **COMMON | sections)))


def control(name):
    return Candidate(name, "update.x", 1.0, ControlConfig(**CARTPOLE, update=UPDATES[name]))


CANDIDATES = {"language": language, "control": control}
both_worlds = pytest.mark.parametrize("candidate", CANDIDATES.values(), ids=CANDIDATES)


class Watch:
    """Notes what each rule of a study was given and what the fresh samples were measured with."""

    def __init__(self, monkeypatch):
        self.starts, self.batches, self.ends, self.fresh = [], [], [], []
        build, measure = module.build_update, module.fresh_gain

        def built(*given, **shared):
            rule = build(*given, **shared)
            step = rule.step

            def stepping(policy, batch):
                self.starts.append(copy.deepcopy(policy))
                self.batches.append(batch)
                report = step(policy, batch)
                self.ends.append(copy.deepcopy(policy))
                return report

            rule.step = stepping
            return rule

        def measured(policy, experience, **given):
            self.fresh.append(experience)
            return measure(policy, experience, **given)

        monkeypatch.setattr(module, "build_update", built)
        monkeypatch.setattr(module, "fresh_gain", measured)


def without_times(rows):
    return [row | {"seconds": None} for row in rows]


def same_bits(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def log_probs(policy, batch):
    """Of a batch's actions at its valid steps, (N,), from the model's own logits."""
    seen = batch.observations
    if isinstance(seen, torch.Tensor):
        logits = policy.distribution(seen).logits
    else:
        logits = policy.model(
            input_ids=seen.input_ids, attention_mask=seen.attention_mask.long(), position_ids=seen.position_ids
        ).logits[:, seen.prompt_width - 1 : -1]
    chosen = logits.double().log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    return (chosen if batch.mask is None else chosen[batch.mask]).detach()


@both_worlds
def test_each_candidate_starts_from_the_same_bits_on_the_same_batch_and_their_order_changes_nothing(
    candidate, monkeypatch
):
    names, watch = list(UPDATES), Watch(monkeypatch)
    study = one_update_study([candidate(name) for name in names], iterations_before=2, evaluations=4)
    assert study["iterations_before"] == 2
    assert [row["rule"] for row in study["rows"]] == names
    alone = build_world(candidate(names[0]).config).trainer
    for _ in range(2):
        alone.iterate()
    assert all(same_bits(start, alone.policy) for start in watch.starts)
    assert not any(same_bits(end, alone.policy) for end in watch.ends)
    assert len({id(batch) for batch in watch.batches}) == 1 and watch.batches[0].progress == 2 / 5
    again = one_update_study(
        [candidate(name) for name in [names[0], *names[:0:-1]]], iterations_before=2, evaluations=4
    )
    rows = without_times(again["rows"])
    assert [rows[0], *rows[:0:-1]] == without_times(study["rows"])


@both_worlds
def test_a_row_is_what_an_ordinary_run_of_the_rule_does_in_its_first_iteration(candidate):
    study = one_update_study([candidate(name) for name in UPDATES], iterations_before=0, evaluations=4)
    for name, row in zip(UPDATES, study["rows"], strict=True):
        trainer = build_world(candidate(name).config).trainer
        before = trainer.task.evaluate(trainer.policy, 4)
        line = trainer.iterate()
        after = trainer.task.evaluate(trainer.policy, 4)
        trainer.task.close()
        assert row["error"] is None and row["accepted"] and row["seconds"] > 0
        assert row["batch_gain"] == line["surrogate_gain"] > 0
        for key in ("step_kl", "step_kl_max", "predicted_gain"):
            assert row[key] == line[key]
        assert row["reference_kl"] == line.get("reference_kl_after")
        if candidate is language:  # in control an iteration ends with the normaliser's, which moves the policy too
            assert row["improvement"] == pytest.approx(after["reward_mean"] - before["reward_mean"], abs=1e-9)
            sides = [[sample["reward"] for sample in record["samples"]] for record in (before, after)]
            gains = np.subtract(*reversed(sides))
            interval = stats.ttest_1samp(gains, 0.0).confidence_interval() if np.ptp(gains) else (gains[0], gains[0])
            assert (row["improvement_low"], row["improvement_high"]) == pytest.approx(tuple(interval), abs=1e-9)
            assert row["reference_kl"] > 0
    assert any(row["improvement_low"] != row["improvement_high"] for row in study["rows"])


def test_episodes_are_paired():
    before, after = ({"reward_mean": sum(each) / 3, "returns": each} for each in ([1.0, 5.0, 9.0], [2.0, 5.5, 11.0]))
    expected = stats.ttest_rel(after["returns"], before["returns"]).confidence_interval()
    assert paired_improvement(before, after) == pytest.approx((3.5 / 3, *expected))


@both_worlds
def test_both_gains_are_those_of_log_probabilities_and_the_fresh_samples_are_others(candidate, monkeypatch):
    watch = Watch(monkeypatch)
    chosen = [candidate(name) for name in UPDATES]
    if candidate is language:
        chosen = [language(name, reference={"loss": 0.0}) for name in UPDATES]
    study = one_update_study(chosen, iterations_before=1, evaluations=4)
    fresh = watch.fresh[0].batch
    assert all(one.batch is fresh for one in watch.fresh)
    seen = watch.batches[0]
    assert seen.actions.shape[1:] != fresh.actions.shape[1:] or not torch.equal(seen.actions, fresh.actions)
    for row, start, end in zip(study["rows"], watch.starts, watch.ends, strict=True):
        for key, batch in (("batch_gain", seen), ("fresh_gain", fresh)):
            advantages = (batch.advantages if batch.mask is None else batch.advantages[batch.mask]).double()
            ratios = (log_probs(end, batch) - log_probs(start, batch)).exp()
            assert row[key] == pytest.approx(((ratios - 1) * advantages).mean().item(), rel=1e-3, abs=1e-6)
        assert row["batch_gain"] != row["fresh_gain"] and row["fresh_low"] < row["fresh_gain"] < row["fresh_high"]
    # The fresh samples are the old policy's own.
    old_log_prob = fresh.old_log_prob if fresh.mask is None else fresh.old_log_prob[fresh.mask]
    assert log_probs(watch.starts[0], fresh) == pytest.approx(old_log_prob.double(), abs=1e-4)


@both_worlds
def test_the_improvement_is_that_of_two_separate_evaluations(candidate, monkeypatch):
    watch = Watch(monkeypatch)
    rows = one_update_study([candidate(name) for name in UPDATES], iterations_before=1, evaluations=3)["rows"]
    task = build_world(candidate("trpo").config).trainer.task
    found = [[task.evaluate(policy, 3)["reward_mean"] for policy in side] for side in (watch.starts, watch.ends)]
    assert len(set(found[0])) == 1
    for row, before, after in zip(rows, *found, strict=True):
        assert row["improvement"] == pytest.approx(after - before, abs=1e-9)
    assert any(row["improvement"] for row in rows)


@pytest.mark.parametrize("loss", [0.0, 0.7])
def test_the_fresh_gain_is_that_of_the_surrogate_objective(loss):
    trainer = build_world(language("reinforce").config).trainer
    trainer.iterate()
    fresh = trainer.experience()
    assert fresh_gain(trainer.policy, fresh, reference_loss=loss)[:3] == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    batch = fresh.batch
    objective = SurrogateObjective(
        trainer.policy,
        batch.observations,
        batch.actions,
        batch.advantages,
        mask=batch.mask,
        reference=batch.reference,
        reference_loss=loss,
        microbatch_size=3,
    )
    objective.start_from(batch.old)
    trainer.iterate()
    found = fresh_gain(trainer.policy, fresh, reference_loss=loss)
    assert found.value == pytest.approx(objective.measure().gain, rel=1e-4) and found.value != 0


@both_worlds
def test_a_rule_with_a_bound_is_within_it_and_a_report_beyond_is_a_violation(candidate, monkeypatch):
    study = one_update_study([candidate(name) for name in UPDATES], iterations_before=1, evaluations=2)
    for row in study["rows"]:
        bound = UPDATES[row["rule"]].get("max_kl")
        assert row["bound"] == bound and row["within"] is (None if bound is None else True)
        assert bound is None or 0 < row["step_kl"] <= bound < row["step_kl"] * 20
    watch = Watch(monkeypatch)
    build = module.build_update

    def bent(*given, **shared):
        rule = build(*given, **shared)
        step = rule.step

        def stepping(policy, batch):
            report = step(policy, batch)
            report.step_kl = 0.06
            return report

        rule.step = stepping
        return rule

    monkeypatch.setattr(module, "build_update", bent)
    (row,) = one_update_study([candidate("trpo")], iterations_before=0, evaluations=2)["rows"]
    assert row["within"] is False and len(watch.ends) == 1


def test_what_fails_is_a_row_and_the_rest_go_on(monkeypatch):
    names = list(UPDATES)
    whole = one_update_study([language(name) for name in names], iterations_before=1, evaluations=3)
    build = module.build_update

    def failing(config, **shared):
        rule = build(config, **shared)
        if config.update.kind == "ppo_trust":

            def broken(policy, batch):
                rule.__class__.step(rule, policy, batch)
                raise RuntimeError("out of\nmemory")

            rule.step = broken
        return rule

    monkeypatch.setattr(module, "build_update", failing)
    rows = one_update_study([language(name) for name in names], iterations_before=1, evaluations=3)["rows"]
    assert all(row.keys() == whole["rows"][0].keys() for row in rows)
    bad = rows[1]
    assert bad["error"] == "RuntimeError: out of memory" and bad["accepted"] is False and bad["batch_gain"] is None
    others, expected = (without_times([each[0], *each[2:]]) for each in (rows, whole["rows"]))
    assert others == expected


def test_a_reward_that_fails_leaves_what_was_measured_before_it(monkeypatch):
    calls = []
    original = module.paired_improvement

    def failing(before, after):
        calls.append(after)
        if len(calls) == 1:
            raise UserError("rewards: vowels: no")
        return original(before, after)

    monkeypatch.setattr(module, "paired_improvement", failing)
    bad, good = one_update_study([language("trpo"), language("reinforce")], iterations_before=0, evaluations=3)["rows"]
    assert bad["error"] == "rewards: vowels: no" and bad["fresh_gain"] is not None and bad["improvement"] is None
    assert good["error"] is None and good["improvement"] is not None


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="needs a candidate"):
        one_update_study([], iterations_before=0, evaluations=2)
    other = language("reinforce", rollout={**COMMON["rollout"], "temperature": 0.7})
    with pytest.raises(ValueError, match=r"trpo has rollout.temperature 1.0 and reinforce 0.7"):
        one_update_study([language("trpo"), other], iterations_before=0, evaluations=2)


def test_a_rollout_with_a_number_that_is_not_finite_is_named(monkeypatch):
    estimate = "lm_trust.training.trainer.estimate_advantages"
    monkeypatch.setattr(estimate, lambda config, rollout, rewards, *values: (rewards * math.nan, rewards))
    closed = []
    monkeypatch.setattr("lm_trust.control.rollout.ControlTask.close", lambda task: closed.append(task))
    with pytest.raises(UserError, match=r"one_update: .*the advantage is nan at step 0 of environment 0"):
        one_update_study([control("trpo")], iterations_before=0, evaluations=2)
    assert len(closed) == 1


def test_single_values_have_student_s_interval_and_equal_clusters_that_of_their_means():
    values = np.random.default_rng(0).normal(size=24)
    whole = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert clustered_mean(values, np.arange(24)) == pytest.approx((values.mean(), *whole))
    means = stats.ttest_1samp(values.reshape(6, 4).mean(1), 0.0).confidence_interval()
    names = [f"prompt {number // 4}" for number in range(24)]
    assert clustered_mean(values, names) == pytest.approx((values.mean(), *means))
    assert clustered_mean(values, np.zeros(24)) == (values.mean(), None, None)
    assert clustered_mean([2.0, 2.0], [0, 1]) == (2.0, 2.0, 2.0)
    assert clustered_mean([math.inf, 2.0], [0, 1]) == (math.inf, None, None)


def test_the_interval_of_unequal_clusters_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = {"clusters": 0, "single values": 0}
    for _ in range(1000):
        sizes = generator.integers(3, 12, size=15)
        clusters = np.repeat(np.arange(15), sizes)
        values = 0.3 + generator.normal(size=15)[clusters] + generator.normal(size=len(clusters))
        for name, labels in (("clusters", clusters), ("single values", np.arange(len(values)))):
            found = clustered_mean(values, labels)
            covered[name] += found.low <= 0.3 <= found.high
    assert 925 <= covered["clusters"] <= 970 and covered["single values"] < 700


def test_what_is_taken_together_is_a_prompt_s_rows_and_an_episode_s_part():
    trainer = build_world(control("reinforce").config).trainer
    trainer.experience()
    rollout = trainer.experience().rollout
    expected, number = [], -1
    for row in range(4):
        begins = True
        for step in range(20):
            number += begins
            expected.append(number)
            begins = bool(rollout.terminated[row, step] | rollout.truncated[row, step])
    _, found = _clusters(rollout).unique(return_inverse=True)
    assert found.tolist() == expected and number > 4
    grouped = language(
        "reinforce",
        rollout={**COMMON["rollout"], "samples_per_prompt": 4},
        advantage={"kind": "leave_one_out"},
        critic={"kind": "none"},
    )
    rollout = build_world(grouped.config).trainer.experience().rollout
    prompts = np.array(rollout.samples["prompt"])[rollout.mask.nonzero()[:, 0]]
    clusters = _clusters(rollout).numpy()
    assert len(set(clusters)) == 2 == len(set(zip(clusters, prompts, strict=True)))


def test_two_evaluations_of_other_prompts_are_refused():
    one, two = ({"samples": [{"prompt": text, "reward": 1.0}]} for text in "ab")
    with pytest.raises(ValueError, match="same prompts"):
        paired_improvement(one, two)

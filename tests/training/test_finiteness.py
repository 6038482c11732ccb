"""Numbers that are not finite: the update is rejected, nothing learns from them, and the first sample is named."""

import copy
import json
import math

import pytest
import tiny_runs
import torch
from tiny_models import WORDS

from lm_trust.training.build import build_world
from lm_trust.training.checkpoint import load_checkpoint
from lm_trust.training.config import LanguageConfig
from lm_trust.training.config_errors import variants
from lm_trust.training.config_file import load_config
from lm_trust.training.finiteness import first_non_finite
from lm_trust.training.trainer import Trainer

SAW = 1 + WORDS.index("saw")
RULES = variants(LanguageConfig.model_fields["update"].annotation)
REFERENCE = {"penalty": 0.1, "adaptive": {"target": 0.01, "horizon": 10}, "budget": 5.0, "loss": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finiteness")
    tiny_runs.prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def place(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def make(kind, **sections):
    update = {"kind": kind} | ({"minibatches": 2} if "minibatches" in RULES[kind].model_fields else {})
    reference = REFERENCE | ({"budget": None} if kind == "natural_gradient" else {})  # which can keep none
    config = tiny_runs.write_config(kind, **{"reference": reference, "update": update} | sections)
    return build_world(load_config(config)).trainer


@pytest.fixture
def trainer():
    """One iteration of a language run is done, so that every part of it has a state."""
    made = make("ppo_clip")
    assert made.iterate()["accepted"]
    return made


def learnt(trainer):
    """All that an iteration may change but the world's random streams and counts; bits, so that NaN equals NaN."""
    state = copy.deepcopy(trainer.state_dict())
    return bits({name: state[name] for name in ("policy", "critic", "update", "reference_penalty")})


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


@torch.no_grad()
def poison(tensor):
    tensor[...] = math.nan


def adapter(trainer):
    return [parameter for parameter in trainer.policy.parameters() if parameter.requires_grad]


# Where


def test_the_first_quantity_that_is_broken_is_named_at_its_first_place():
    cause, consequence, mask = torch.zeros(3, 4), torch.full((3, 4), math.nan), torch.ones(3, 4, dtype=torch.bool)
    assert first_non_finite({"cause": cause}, mask) is None
    assert first_non_finite({"cause": cause, "consequence": consequence}, mask)[::2] == ("consequence", 0)
    cause[1, 3], cause[2, 0] = -math.inf, math.nan
    assert first_non_finite({"cause": cause, "consequence": consequence}, mask) == ("cause", -math.inf, 1, 3)
    mask[1, 3] = False
    found = first_non_finite({"cause": cause, "consequence": consequence}, mask)
    assert math.isnan(found.value) and (found.quantity, found.row, found.step) == ("cause", 2, 0)


# A rollout


def test_a_broken_embedding_is_traced_to_the_first_sample_that_meets_it(trainer):
    poison(trainer.policy.causal_lm.get_input_embeddings().weight[SAW])
    before = learnt(trainer)
    line = trainer.iterate()
    texts = zip(trainer.samples["prompt"], trainer.samples["completion"], strict=True)
    # In a completion it is met only where something follows it.
    hit = ["saw" in prompt or completion.split()[:-1].count("saw") > 0 for prompt, completion in texts]
    assert 0 < sum(hit) < len(hit), "some samples are sound"
    row = hit.index(True)
    place = f"token 0 of sample {row}, prompt {trainer.samples['prompt'][row]!r}"
    assert line["offender"] == f"the log-probability is nan at {place}"
    assert (line["accepted"], line["reason"], line["step_kl"], line["value_loss"]) == (False, "non_finite", 0.0, None)
    assert learnt(trainer) == before
    assert trainer.iteration == line["iteration"] == 2 and line["reference_penalty"] == trainer.reference_penalty
    assert [math.isnan(value) for value in trainer.samples["reference_kl"]] == hit


def test_a_diverged_adapter_hits_every_sample(trainer):
    poison(adapter(trainer)[-1])
    before = learnt(trainer)
    line = trainer.iterate()
    assert line["offender"].startswith("the log-probability is nan at token 0 of sample 0, prompt ")
    assert learnt(trainer) == before
    assert trainer.samples["tokens"] == [1] * 6 and all(trainer.samples["ended"])


@pytest.mark.parametrize("what", ["reward", "reference", "value"])
def test_other_numbers_are_told_apart(what, monkeypatch):
    trainer = make("trpo")
    if what == "value":
        for parameter in trainer.critic.network.parameters():
            poison(parameter)
    collect = trainer.task.collect

    def spoilt(policy):
        rollout = collect(policy)
        if what == "reward":
            rollout.rewards[2, 0] = math.inf
        if what == "reference":
            poison(rollout.reference.hidden[3, 0])
        return rollout

    monkeypatch.setattr(trainer.task, "collect", spoilt)
    before = learnt(trainer)
    told = {
        "reward": "the reward is inf at token 0 of sample 2, prompt ",
        "reference": "the reference log-probability is nan at token 0 of sample 3, prompt ",
        "value": "the value is nan at token 0 of sample 0, prompt ",
    }
    assert trainer.iterate()["offender"].startswith(told[what])
    assert learnt(trainer) == before


def test_numbers_beyond_a_completions_end_are_nobodys_business(monkeypatch):
    trainer = make("trpo", rollout={"batch_size": 12, "max_new_tokens": 8}, reference={"penalty": 0.1})
    collect, spoilt = trainer.task.collect, []

    def with_nonsense(policy):
        rollout = collect(policy)
        spoilt.append((~rollout.mask).sum())
        rollout.reference = rollout.reference.detach()  # its states are also the critic's
        rollout.reference.hidden[~rollout.mask] = math.nan
        return rollout

    monkeypatch.setattr(trainer.task, "collect", with_nonsense)
    line = trainer.iterate()
    assert spoilt[0] > 0 and line["accepted"] and "offender" not in line


# An update


@pytest.mark.parametrize("kind", RULES)
def test_what_an_update_meets_restores_the_policy_bit_for_bit(kind, monkeypatch):
    """Past the check of the rollout, each rule guards itself."""
    trainer, batches = make(kind), []
    step = trainer.update.step
    monkeypatch.setattr(trainer.update, "step", lambda policy, batch: batches.append(batch) or step(policy, batch))
    assert trainer.iterate()["accepted"]
    (batch,) = batches
    sound, parameter = copy.deepcopy(batch), adapter(trainer)[-1]
    weights = parameter.detach().clone()
    for where in ("policy", "reference", "advantages"):
        batch = copy.deepcopy(sound)
        if where == "policy":
            poison(parameter)
        elif where == "reference":
            poison(batch.reference.hidden[0, 0])
        else:
            poison(batch.advantages[1, 0])
        before = bits(trainer.state_dict()["policy"])
        report = step(trainer.policy, batch)
        assert (report.accepted, report.reason, report.step_kl) == (False, "non_finite", 0.0), where
        assert bits(trainer.state_dict()["policy"]) == before, where
        with torch.no_grad():
            parameter.copy_(weights)
    assert step(trainer.policy, sound).reason != "non_finite", "nothing of it has stayed in the rule"


# A run


def test_a_run_whose_adapter_diverges_names_the_sample_and_stops(place, monkeypatch, capsys):
    iterate = Trainer.iterate

    def diverge(self):
        if self.iteration == 1:
            poison(adapter(self)[-1])
        return iterate(self)

    monkeypatch.setattr(Trainer, "iterate", diverge)
    evaluation = {"every": 2, "count": 2}
    assert tiny_runs.train("run", iterations=9, evaluation=evaluation, completions={"every": 1, "show": 1}) == 2
    out, err = capsys.readouterr()
    told = "the log-probability is nan at token 0 of sample 0, prompt "
    assert out.count("was rejected") == 1 and f"Iteration 2 was rejected: {told}" in " ".join(out.split())
    assert err.count("\n") == 1
    assert err.startswith(f"error: stop.rejections: 3 updates in a row were rejected: NaN or infinite ({told}")
    assert "update.max_kl" in err and "(iteration 4; a checkpoint was written)" in err
    lines = tiny_runs.metrics("run")
    assert [line["accepted"] for line in lines] == [True, False, False, False]
    assert lines[1]["entropy"] is None and lines[1]["reference_kl"] is None and lines[1]["offender"].startswith(told)
    noted = json.loads((place / "run" / "evaluations.jsonl").read_text(), parse_constant=pytest.fail)
    assert noted["iteration"] == 2 and noted["reference_kl"] is None
    assert load_checkpoint(place / "run" / "checkpoints")["iteration"] == 4

"""Runs whose rollouts continuous batching samples: their metrics, their resumption, and a mismatch that is refused."""

import pytest
import torch
from tiny_runs import metrics, prepare, train, untimed
from transformers import LlamaForCausalLM

from lm_trust.cli import main
from lm_trust.errors import UserError
from lm_trust.lm.engines import load_engine
from lm_trust.training.checkpoint import holds_checkpoint
from lm_trust.training.config_yaml import read_yaml

try:
    load_engine("continuous_batching")
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

ROLLOUT = {"batch_size": 6, "max_new_tokens": 4, "engine": "continuous_batching"}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_run_logs_the_mismatch_and_goes_on_exactly(workplace):
    assert train("whole", rollout=ROLLOUT) == 0
    lines = untimed(metrics("whole"))
    assert len(lines) == 4
    for line in lines:
        assert abs(line["engine_kl"]) < 1e-6
        assert line["engine_ratio_max"] == pytest.approx(1, abs=1e-4)
        assert line["engine_clipped_fraction"] == 0
    assert train("halves", rollout=ROLLOUT, iterations=2) == 0
    assert main(["train", "--resume", "halves", "--iterations", "4"]) == 0
    assert untimed(metrics("halves")) == lines
    assert train("generated", rollout={**ROLLOUT, "engine": "generate"}) == 0
    assert "engine_kl" not in metrics("generated")[0]


def test_a_mismatch_beyond_the_limit_ends_the_run_with_a_checkpoint(workplace, capsys):
    """A policy in half precision, whose engine computes in float32."""
    model = {"path": "llama", "lora": {"r": 2, "alpha": 8}, "autocast": "bfloat16"}
    refused = {**ROLLOUT, "mismatch": {"limit": 1e-9}}
    assert train("refused", rollout=refused, model=model) == 2
    error = capsys.readouterr().err
    assert "rollout.mismatch.limit: the engine's distribution is" in error
    assert "(iteration 1; a checkpoint was written)" in error
    assert holds_checkpoint(workplace / "refused" / "checkpoints")
    assert main(["train", "--resume", "refused", "--rollout.mismatch.limit", "0.1"]) == 0
    found = metrics("refused")
    assert len(found) == 4 and all(1e-9 < line["engine_kl"] < 0.1 for line in found)
    assert read_yaml((workplace / "refused" / "config.yaml").read_text())["rollout"]["mismatch"]["limit"] == 0.1


def test_a_model_that_the_engine_cannot_run_is_refused_before_anything_is_sampled(workplace, capsys, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    monkeypatch.setattr(LlamaForCausalLM, "generate", None)
    assert train("refused", rollout=ROLLOUT) == 2
    assert "rollout.engine: continuous_batching cannot run LlamaForCausalLM; use generate" in capsys.readouterr().err
    assert not holds_checkpoint(workplace / "refused" / "checkpoints")


def test_the_keys_have_limits(capsys):
    assert train(rollout={**ROLLOUT, "engine": "continuous_baching"}) == 2
    assert "rollout.engine: " in capsys.readouterr().err
    assert train(rollout={**ROLLOUT, "mismatch": {"cap": 0.5}}) == 2
    assert "rollout.mismatch.cap: must be at least 1, got 0.5" in capsys.readouterr().err
    assert train(rollout={**ROLLOUT, "mismatch": {"limit": 0.0}}) == 2
    assert "rollout.mismatch.limit: must be greater than 0, got 0" in capsys.readouterr().err


def test_a_run_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert train(rollout=ROLLOUT, iterations=1) == 0
    assert torch.get_rng_state().equal(before)
